"""The UNet as a vector, its losses and its samples, on a tiny real UNet."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosilo_common.diffusion.grid import grid_png
from cosilo_common.diffusion.model import (
    build_unet,
    initial_state,
    load_vector,
    refuse_unfederated_state,
    tensor_table,
    vector_blocks,
)
from cosilo_common.diffusion.objective import (
    HELDOUT_IMAGES_MAX,
    draw_noise,
    heldout_count,
    heldout_losses,
    noise_schedule,
    per_image_loss,
    to_model_range,
)
from cosilo_common.diffusion.sampling import draw_images, to_uint8
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule
from cosilo_common.errors import CosiloError

TINY = Architecture(
    sample_size=8,
    in_channels=1,
    num_classes=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_unet(TINY)


def test_the_table_is_sorted_and_is_the_models_own(unet: torch.nn.Module) -> None:
    table = tensor_table(TINY)
    assert [name for name, _ in table.entries] == sorted(name for name, _ in unet.named_parameters())
    assert table.size == sum(parameter.numel() for parameter in unet.parameters())


def test_initial_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = initial_state(TINY, 1), initial_state(TINY, 1), initial_state(TINY, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert list(one) == [name for name, _ in tensor_table(TINY).entries]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_a_vector_loads_and_comes_back_bit_for_bit() -> None:
    vector = np.random.default_rng(0).standard_normal(tensor_table(TINY).size).astype(np.float32)
    vector.flags.writeable = False  # as memory-mapped weights are
    module = build_unet(TINY)
    load_vector(module, vector)
    assert np.array_equal(np.concatenate(list(vector_blocks(module))), vector)


def test_a_vector_of_another_model_is_refused(unet: torch.nn.Module) -> None:
    with pytest.raises(CosiloError, match="3 values for a model of"):
        load_vector(unet, np.zeros(3, np.float32))


def test_state_that_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(CosiloError, match="buffer running_mean"):
        refuse_unfederated_state(torch.nn.BatchNorm2d(2))
    with pytest.raises(CosiloError, match=r"weight \(torch.float16\)"):
        refuse_unfederated_state(torch.nn.Linear(2, 2, bias=False, dtype=torch.float16))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_network_that_predicts_the_target_has_no_loss(prediction: str) -> None:
    noiser = noise_schedule(Schedule(prediction_type=prediction))
    draw = draw_noise((4, 1, 8, 8), 1000, False, torch.Generator().manual_seed(0))
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    # x_t = a x + s n, and v = a n - s x (Salimans and Ho 2022, appendix D).
    signal = noiser.alphas_cumprod[draw.timesteps].sqrt()[:, None, None, None]
    spread = (1 - noiser.alphas_cumprod[draw.timesteps]).sqrt()[:, None, None, None]
    target = draw.noise if prediction == "epsilon" else signal * draw.noise - spread * images

    class Oracle(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            assert torch.allclose(noisy, signal * images + spread * draw.noise, atol=1e-6)
            return (target,)

    losses = per_image_loss(Oracle(), noiser, images, torch.zeros(4, dtype=torch.int64), draw.timesteps, draw.noise)
    assert losses.shape == (4,)
    assert float(losses.max()) < 1e-10


def test_noise_is_drawn_in_the_documented_order() -> None:
    generator = torch.Generator().manual_seed(7)
    draw = draw_noise((5, 1, 8, 8), 100, True, torch.Generator().manual_seed(7))
    assert torch.equal(draw.timesteps, torch.randint(0, 100, (5,), generator=generator))
    assert torch.equal(draw.noise, torch.randn((5, 1, 8, 8), generator=generator))
    assert draw.flips is not None
    assert torch.equal(draw.flips, torch.rand(5, generator=generator) < 0.5)


def test_pixels_reach_both_ends_of_the_models_range() -> None:
    eight = to_model_range(torch.tensor([0, 255], dtype=torch.uint8), 255)
    sixteen = np.array([0, 32768, 65535], np.uint16).view(np.int16)
    assert eight.tolist() == [-1.0, 1.0]
    assert to_model_range(torch.from_numpy(sixteen), 65535).tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=2e-5)


def test_heldout_losses_are_the_same_bits_each_time_and_add_up_over_ranks(unet: torch.nn.Module) -> None:
    images = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 3, (70,))
    noiser = noise_schedule(Schedule())
    whole = heldout_losses(unet, noiser, images, labels, 255, 3)
    torch.manual_seed(123)  # the global generator must not matter
    assert torch.equal(whole, heldout_losses(unet, noiser, images, labels, 255, 3))
    parts = [heldout_losses(unet, noiser, images, labels, 255, 3, None, rank, 2) for rank in range(2)]
    assert torch.allclose(whole, parts[0] + parts[1], rtol=1e-12)
    assert torch.allclose(whole, heldout_losses(unet, noiser, images, labels, 255, 3, micro_batch=7), rtol=1e-5)
    assert (whole > 0).all()


def test_heldout_buckets_tell_timesteps_apart() -> None:
    """A silent network has loss E|v|^2 = a^2 + s^2 |x|^2: near 1 where noise is low, |x|^2 where it is whole."""

    class Silent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(1))

        def forward(self, noisy: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            return (torch.zeros_like(noisy),)

    grey = torch.full((64, 1, 8, 8), 191, dtype=torch.uint8)  # about 0.5 in [-1, 1]
    sums = heldout_losses(Silent(), noise_schedule(Schedule()), grey, torch.zeros(64, dtype=torch.int64), 255, 10)
    means = sums / 64
    assert float(means[0]) == pytest.approx(1.0, abs=0.1)
    assert float(means[-1]) == pytest.approx(0.25, abs=0.02)


def test_heldout_evaluation_is_bounded() -> None:
    assert heldout_count(3) == 3
    assert heldout_count(10_000_000) == HELDOUT_IMAGES_MAX


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling_repeats_with_its_generator(unet: torch.nn.Module, sampler: str) -> None:
    labels = torch.tensor([0, 1, 2, 2])
    sampling = Sampling(sampler=sampler, steps=4)
    one, again, other = (draw_images(unet, Schedule(), labels, sampling, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == (4, 1, 8, 8)
    assert float(one.abs().max()) <= 1.0
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_sampling_obeys_the_class(unet: torch.nn.Module) -> None:
    drawn = [draw_images(unet, Schedule(), torch.tensor([label]), Sampling(steps=3), torch.Generator().manual_seed(1)) for label in (0, 1)]
    assert not torch.equal(drawn[0], drawn[1])


def test_a_grid_shows_every_image_in_its_place(tmp_path: Path) -> None:
    images = np.zeros((3, 1, 8, 8), np.uint8)
    images[1] = 255
    grid_png(tmp_path / "grid.png", images, columns=2)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert (sheet.mode, sheet.size) == ("L", (2 * 42 + 2, 2 * 42 + 2))  # 8 pixels five times, and gaps of 2
        assert [sheet.getpixel(spot) for spot in ((10, 10), (50, 10), (10, 50), (50, 50))] == [0, 255, 0, 128]


def test_a_grid_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="no image to show"):
        grid_png(tmp_path / "grid.png", np.zeros((0, 1, 8, 8), np.uint8), columns=4)
    assert not (tmp_path / "grid.png").exists()


def test_float_images_become_bytes_rounded() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
