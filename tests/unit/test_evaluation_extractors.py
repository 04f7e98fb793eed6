"""Feature networks: the real EfficientNet-lite0 from its package, FID's Inception by its shapes, and a user's own."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cosilo_common.diffusion.model import build_unet
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation import inception, lite0
from cosilo_common.evaluation.extractors import LITE0_SHA256, Extractor, extractor
from cosilo_common.evaluation.scoring import draw_for_scoring, score, scored, scored_real
from tools.convert_efficientnet import CHECKPOINT_SHA256, convert, package_file

TINY = Architecture(sample_size=8, in_channels=1, num_classes=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


def own_network() -> tuple[int, object]:
    """What a user's module:callable returns: here each image's 8x8 pixels themselves."""
    return 8, lambda images: (images[:, 0].flatten(1) / 255.0, None)


OWN = f"{__name__}:own_network"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "lite0.safetensors"
    assert convert(package_file(), CHECKPOINT_SHA256, out) == LITE0_SHA256
    return out


def pictures(n: int, seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, side, side), dtype=np.uint8)


def test_a_checkpoint_that_is_another_file_is_not_parsed(tmp_path: Path) -> None:
    wrong = tmp_path / "x.pth"
    wrong.write_bytes(b"\x80\x04.")  # an empty pickle
    with pytest.raises(ValueError, match="has SHA-256"):
        convert(wrong, CHECKPOINT_SHA256, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_lite0_gives_1280_features_between_0_and_6_and_1000_classes(weights: Path) -> None:
    features = extractor("efficientnet-lite0", weights=weights).features(pictures(3))
    assert features.vectors.shape == (3, lite0.FEATURES)
    assert features.logits is not None
    assert features.logits.shape == (3, lite0.CLASSES)
    assert 0.0 <= features.vectors.min() <= features.vectors.max() <= lite0.FEATURE_MAX


def test_lite0_with_folded_norms_is_the_network_that_applies_them_apart(weights: Path) -> None:
    """The stem, unfolded: convolution with TensorFlow's padding, batch norm, ReLU6."""
    state = load_file(weights)
    image = torch.from_numpy(pictures(1, side=64)).float().expand(-1, 3, -1, -1)
    padded = torch.nn.functional.pad((image - 127.0) / 128.0, (0, 1, 0, 1))
    x = torch.nn.functional.conv2d(padded, state["_conv_stem.weight"], stride=2)
    norm = [state[f"_bn0.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(x, *norm, eps=1e-3)
    got = lite0._convolve((image - 127.0) / 128.0, lite0._folded(state, "_conv_stem", "_bn0"), 2)
    assert torch.allclose(got, expected, atol=1e-4)


def test_features_do_not_depend_on_the_batch_an_image_is_in(weights: Path) -> None:
    network, images = extractor("efficientnet-lite0", weights=weights), pictures(101)
    whole = network.features(images).vectors
    assert np.allclose(whole[100], network.features(images[100:]).vectors[0], atol=1e-4)


def test_weights_that_are_missing_or_other_ones_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="convert_efficientnet"):
        extractor("efficientnet-lite0", weights=tmp_path / "none.safetensors")
    with pytest.raises(CosiloError, match="has SHA-256"):
        extractor("efficientnet-lite0", weights=weights, sha256="0" * 64)
    with pytest.raises(CosiloError, match="path and their SHA-256"):
        extractor("inception")
    with pytest.raises(CosiloError, match="none is called 'vgg'"):
        extractor("vgg")


def test_inception_gives_2048_features_from_a_state_of_the_published_names(tmp_path: Path) -> None:
    path = tmp_path / "inception.safetensors"
    save_file(inception_state(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    network = extractor("inception", weights=path, sha256=digest)
    features = network.features(pictures(1))
    assert network.name == "inception@299"
    assert features.vectors.shape == (1, inception.FEATURES)
    assert features.logits is not None
    assert features.logits.shape == (1, 1008)


def test_a_users_own_module_is_an_extractor_and_the_cache_answers_for_it(tmp_path: Path) -> None:
    network = extractor(OWN)
    images, labels = pictures(20, side=8), np.arange(20) % 3
    first = scored_real(network, images, labels, tmp_path)
    assert np.array_equal(first.features.vectors, images[:, 0].reshape(20, 64).astype(np.float32) / 255)

    def forbidden(_: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise AssertionError("the cache was not asked")

    silent = Extractor(network.name, network.digest, network.side_pixels, forbidden)
    again = scored_real(silent, images, labels, tmp_path)
    assert np.array_equal(again.features.vectors, first.features.vectors)
    with pytest.raises(AssertionError, match="not asked"):
        scored_real(silent, pictures(20, seed=1, side=8), labels, tmp_path)  # other pixels, another entry


def test_scores_of_real_images_against_themselves_and_against_noise() -> None:
    network, labels = extractor(OWN), np.arange(60) % 3
    real = scored(network, pictures(60, 0, 8) // 4, labels)
    same, other = score(real, real, seed=0, by_class=True), score(real, scored(network, pictures(60, 1, 8), labels), seed=0)
    assert same.fid == pytest.approx(0.0, abs=1e-5)
    assert (same.precision, same.recall) == (1.0, 1.0)
    assert [(entry.label, entry.images) for entry in same.by_class] == [(0, 20), (1, 20), (2, 20)]
    assert same.inception_score is None
    assert other.fid > 1.0
    assert other.kid > same.kid


def test_every_model_is_drawn_from_the_same_noise_whatever_the_global_generator_does() -> None:
    torch.manual_seed(1)
    unet = build_unet(TINY)
    first, labels = draw_for_scoring(unet, Schedule(), Sampling(steps=2), count=7, classes=3, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, _ = draw_for_scoring(unet, Schedule(), Sampling(sampler="ddpm", steps=2), count=7, classes=3, seed=5)
    second, _ = draw_for_scoring(unet, Schedule(), Sampling(steps=2), count=7, classes=3, seed=5)
    assert np.array_equal(first, second)
    assert again.shape == first.shape == (7, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(before, torch.get_rng_state())


def inception_state() -> dict[str, torch.Tensor]:
    """Tensors of the published names and shapes, small and constant in their norms."""
    random = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def unit(name: str, inside: int, outside: int, *kernel: int) -> int:
        size = kernel if len(kernel) == 2 else (kernel[0], kernel[0])
        state[f"{name}.conv.weight"] = torch.randn((outside, inside, *size), generator=random) * 0.05
        for part, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{name}.bn.{part}"] = torch.full((outside,), value)
        return outside

    width = 3
    for name, outside, kernel in (("1a_3x3", 32, 3), ("2a_3x3", 32, 3), ("2b_3x3", 64, 3), ("3b_1x1", 80, 1), ("4a_3x3", 192, 3)):
        width = unit(f"Conv2d_{name}", width, outside, kernel)

    def chain(block: str, inside: int, *units: tuple[str, int, tuple[int, ...]]) -> int:
        for name, outside, kernel in units:
            inside = unit(f"{block}.{name}", inside, outside, *kernel)
        return inside

    one, three, five, row, column = (1,), (3,), (5,), (1, 7), (7, 1)
    for block, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        width = (
            chain(block, width, ("branch1x1", 64, one))
            + chain(block, width, ("branch5x5_1", 48, one), ("branch5x5_2", 64, five))
            + chain(block, width, ("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three), ("branch3x3dbl_3", 96, three))
            + chain(block, width, ("branch_pool", pool, one))
        )
    double = (("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three), ("branch3x3dbl_3", 96, three))
    width = chain("Mixed_6a", width, ("branch3x3", 384, three)) + chain("Mixed_6a", width, *double) + width
    for block, middle in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        seven = (("branch7x7_1", middle, one), ("branch7x7_2", middle, row), ("branch7x7_3", 192, column))
        turns = (one, column, row, column, row)
        doubled = tuple((f"branch7x7dbl_{k + 1}", 192 if k == 4 else middle, turn) for k, turn in enumerate(turns))
        width = (
            chain(block, width, ("branch1x1", 192, one))
            + chain(block, width, *seven)
            + chain(block, width, *doubled)
            + chain(block, width, ("branch_pool", 192, one))
        )
    turns7 = (("branch7x7x3_1", 192, one), ("branch7x7x3_2", 192, row), ("branch7x7x3_3", 192, column), ("branch7x7x3_4", 192, three))
    width = chain("Mixed_7a", width, ("branch3x3_1", 192, one), ("branch3x3_2", 320, three)) + chain("Mixed_7a", width, *turns7) + width
    for block in ("Mixed_7b", "Mixed_7c"):
        total = chain(block, width, ("branch1x1", 320, one)) + chain(block, width, ("branch_pool", 192, one))
        for first, last in (
            ((("branch3x3_1", 384, one),), "branch3x3_2"),
            ((("branch3x3dbl_1", 448, one), ("branch3x3dbl_2", 384, three)), "branch3x3dbl_3"),
        ):
            inside = chain(block, width, *first)
            total += unit(f"{block}.{last}a", inside, 384, 1, 3) + unit(f"{block}.{last}b", inside, 384, 3, 1)
        width = total
    state["fc.weight"], state["fc.bias"] = torch.randn((1008, width), generator=random) * 0.01, torch.zeros(1008)
    assert width == inception.FEATURES
    return state
