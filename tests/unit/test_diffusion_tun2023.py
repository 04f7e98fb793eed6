"""The study's own recipe (arXiv 2311.16538): its network, its noise levels, its weights, its even timesteps, and its loop."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.training import DeviceImages, Trained, train
from cosilo_common.diffusion.export import export_pipeline
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, tensor_table, vector_blocks
from cosilo_common.diffusion.objective import draw_noise, log_snr, loss_weights, noise_schedule, sobol_sequence
from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Architecture, Preset, Schedule, Training
from cosilo_common.errors import CosiloError
from cosilo_common.weights import write_weights

TUN = preset("tun2023")
NARROW = Architecture.model_validate({**TUN.architecture.model_dump(), "sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16)})
ALONE = Workplace(torch.device("cpu"), rank=0, world=1, bf16=False)


def test_it_has_the_papers_parameters_in_the_papers_places() -> None:
    sizes = {name: math.prod(shape) for name, shape in tensor_table(TUN.architecture).entries}
    assert sum(sizes.values()) == 23_211_315
    bottleneck = sum(size for name, size in sizes.items() if name.startswith("below.below.below."))
    decoder = sum(size for name, size in sizes.items() if "leave" in name and not name.startswith("below.below.below."))
    # PAPER: encoder 11.8 %, bottleneck 72.3 %, decoder 15.9 %
    assert round(100 * bottleneck / 23_211_315, 1) == 72.3
    assert round(100 * decoder / 23_211_315, 1) == 15.9


def test_the_schedules_log_snr_is_the_papers_formula() -> None:
    noiser = noise_schedule(TUN.schedule)
    for k in (0, 10, 499, 999):
        t = (k + 1) / 1000
        expected = -math.log(math.expm1(1e-4 + 10 * t**2))
        signal = float(noiser.alphas_cumprod[k])
        assert math.log(signal / (1 - signal)) == pytest.approx(expected, abs=2e-3)
        assert float(log_snr(torch.tensor(k), 1000)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [
        ("alpha_squared", "v_prediction", lambda snr: snr / (snr + 1)),
        ("min_snr", "v_prediction", lambda snr: min(snr, 5.0) / (snr + 1)),
        ("min_snr", "epsilon", lambda snr: min(snr, 5.0) / snr),
    ],
)
def test_a_loss_counts_by_its_signal_to_noise_ratio(weighting: str, prediction: str, expected: object) -> None:
    noiser = noise_schedule(Schedule(prediction_type=prediction))
    weights = loss_weights(noiser, Training(loss_weighting=weighting))
    assert weights is not None
    for k in (0, 300, 999):
        signal = float(noiser.alphas_cumprod[k])
        assert float(weights[k]) == pytest.approx(expected(signal / (1 - signal)), rel=1e-4)  # type: ignore[operator]


def test_a_uniform_loss_has_no_weights() -> None:
    assert loss_weights(noise_schedule(Schedule()), Training()) is None


def test_sobol_timesteps_fill_every_part_of_the_schedule_once() -> None:
    sequence = sobol_sequence(5)
    drawn = [draw_noise((32, 1, 2, 2), 1024, False, torch.Generator(), sequence).timesteps for _ in range(2)]
    assert sorted(int(t) // 16 for t in torch.cat(drawn)) == list(range(64))
    again = draw_noise((32, 1, 2, 2), 1024, False, torch.Generator(), sobol_sequence(5)).timesteps
    assert torch.equal(again, drawn[0])


def test_what_the_network_has_not_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="neither attention nor norms"):
        Architecture.model_validate({**NARROW.model_dump(), "mid_attention": True})
    with pytest.raises(ValueError, match='knows only beta_schedule = "log_snr"'):
        Preset.model_validate({**TUN.model_dump(), "schedule": {"beta_schedule": "linear"}})


def test_an_exported_folder_draws_and_a_stock_one_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    state = initial_state(NARROW, 3)
    write_weights(weights, tensor_table(NARROW), (tensor.numpy().ravel() for tensor in state.values()))
    export_pipeline(weights, NARROW, TUN.schedule, tmp_path / "out")
    images = CosiloPipeline.from_pretrained(tmp_path / "out")([0, 9], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    with pytest.raises(CosiloError, match="stock pipelines cannot hold"):
        export_pipeline(weights, NARROW, TUN.schedule, tmp_path / "stock", class_index=1)


def test_its_first_rounds_agree_in_loss_with_a_plain_loop_of_the_papers_algorithm() -> None:
    """Two sites, three rounds of FedAvg: the loop below has the paper's continuous t and its own loss; only the network is shared."""
    torch.set_num_threads(1)
    recipe = Training.model_validate(
        {**TUN.training.model_dump(), "batch_size": 16, "local_epochs": 2, "learning_rate": 1e-3, "horizontal_flip": False}
    )
    narrow = Architecture.model_validate({**NARROW.model_dump(), "dropout": 0.0})
    sites = [_images(48, 1), _images(32, 2)]
    start = np.concatenate([tensor.numpy().ravel() for tensor in initial_state(narrow, 1).values()])
    ours, theirs = start.copy(), start.copy()
    for number in range(3):
        mine, papers = [], []
        for place, site in enumerate(sites):
            mine.append(_train(narrow, ours, site, recipe, seed=10 * number + place))
            papers.append(_papers_loop(narrow, theirs, site, recipe, seed=10 * number + place))
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in papers], rel=5e-3)
        shares = [len(site.train) / 80 for site in sites]
        ours = sum(share * weights for share, (weights, _) in zip(shares, mine, strict=True))  # type: ignore[assignment]
        theirs = sum(share * weights for share, (weights, _) in zip(shares, papers, strict=True))  # type: ignore[assignment]


def _images(count: int, seed: int) -> DeviceImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return DeviceImages(images, torch.randint(0, 10, (count,), generator=generator), torch.arange(count), torch.arange(0), 255, 0)


def _train(narrow: Architecture, start: np.ndarray, data: DeviceImages, recipe: Training, seed: int) -> tuple[np.ndarray, float]:
    unet = build_unet(narrow)
    load_vector(unet, start.astype(np.float32))
    trained: Trained = train(unet, data, TUN.schedule, recipe, seed, None, ALONE, lambda progress: None)
    return np.concatenate(list(vector_blocks(unet))), trained.mean_loss


def _papers_loop(narrow: Architecture, start: np.ndarray, data: DeviceImages, recipe: Training, seed: int) -> tuple[np.ndarray, float]:
    """Adam made anew; t from a scrambled Sobol sequence; log-SNR = -log(expm1(1e-4 + 10 t^2)); (v - v')^2 SNR / (SNR + 1)."""
    unet = build_unet(narrow)
    load_vector(unet, start.astype(np.float32))
    optimiser = torch.optim.Adam(unet.parameters(), lr=recipe.learning_rate, fused=True)
    generator, sequence = torch.Generator().manual_seed(seed), torch.quasirandom.SobolEngine(1, scramble=True, seed=seed)
    losses = []
    for _ in range(recipe.local_epochs):
        for batch in torch.randperm(len(data.images), generator=generator).split(recipe.batch_size):
            t = sequence.draw(len(batch), dtype=torch.float64)[:, 0]
            noise = torch.randn((len(batch), 1, 8, 8), generator=generator)
            images = data.images[batch].float() / 127.5 - 1
            ratio = -torch.log(torch.expm1(1e-4 + 10 * t**2))
            alpha, sigma = (torch.sigmoid(sign * ratio).sqrt().float()[:, None, None, None] for sign in (1, -1))
            told = t * 1000 - 1  # the network's own scale of time, here between its steps
            predicted = unet(alpha * images + sigma * noise, told, class_labels=data.labels[batch])[0]
            errors = (predicted - (alpha * noise - sigma * images)).square().mean(dim=(1, 2, 3))
            loss = (errors * torch.sigmoid(ratio).float()).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append((float(loss.detach()), len(batch)))
    return np.concatenate(list(vector_blocks(unet))), sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
