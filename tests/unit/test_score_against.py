"""`cosilo score --against`: a folder of real images, and every score of what a checkpoint draws against them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosilo_common.diffusion.model import build_unet, tensor_table, vector_blocks
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation.extractors import extractor
from cosilo_common.evaluation.picture_folder import read_pictures
from cosilo_common.evaluation.scoring import draw_for_scoring, score, scored
from cosilo_common.manifest import EvaluationTerms
from cosilo_common.weights import write_weights
from cosilo_server.cli.scores import DEFAULT_EXTRACTOR, local_extractor
from cosilo_server.cli.torch_work import score_against_folder
from tests.integration.memory_rounds import manifest_of

TINY = Architecture(sample_size=8, in_channels=1, num_classes=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
RGB = TINY.model_copy(update={"in_channels": 3})
MODULE = """
import torch


def build():
    weights = torch.randn(64, 6, generator=torch.Generator().manual_seed(3)) / 8
    return 8, lambda images: (torch.tanh(images[:, 0].flatten(1) / 128 @ weights), None)
"""


def pictures(folder: Path, names: tuple[str, ...] = ("cat", "dog"), each: int = 5, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (len(names), each, size[1], size[0]), np.uint8)
    for name, group in zip(names, pixels, strict=True):
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(group):
            Image.fromarray(picture).save(folder / name / f"{number}.png")
    return pixels


def test_sub_folders_in_order_are_the_classes(tmp_path: Path) -> None:
    pixels = pictures(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    images, labels = read_pictures(tmp_path, TINY)
    assert np.array_equal(images, pixels.reshape(10, 1, 8, 8)) and labels.tolist() == [0] * 5 + [1] * 5


def test_numbers_name_their_class_and_may_be_missing(tmp_path: Path) -> None:
    pictures(tmp_path, ("1",))
    assert read_pictures(tmp_path, TINY)[1].tolist() == [1] * 5


def test_pictures_are_fitted_as_a_site_fits_its_own(tmp_path: Path) -> None:
    from cosilo_client.data import DataConfig, load_images, open_source

    pictures(tmp_path, size=(20, 13))
    for architecture in (TINY, RGB):
        images, labels = read_pictures(tmp_path, architecture)
        theirs = load_images(open_source(DataConfig(kind="folder", path=tmp_path)), architecture)
        assert np.array_equal(images, theirs.images) and np.array_equal(labels, theirs.labels)


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="nowhere: No such file"):
        read_pictures(tmp_path / "nowhere", TINY)
    pictures(tmp_path / "three", ("a", "b", "c"))
    with pytest.raises(CosiloError, match="3 sub-folders for a model of 2 classes"):
        read_pictures(tmp_path / "three", TINY)
    (tmp_path / "none" / "0").mkdir(parents=True)
    with pytest.raises(CosiloError, match="0 JPEG or PNG"):
        read_pictures(tmp_path / "none", TINY)
    pictures(tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(CosiloError, match=r"cat/0\.png: cannot identify"):
        read_pictures(tmp_path / "broken", TINY)
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "broken" / "cat" / "0.png")
    with pytest.raises(CosiloError, match="16 bits a pixel"):
        read_pictures(tmp_path / "broken", TINY)


def test_every_score_is_that_of_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "against_features.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = preset("digits").model_copy(update={"architecture": TINY})
    manifest = manifest_of(("anna", "beda", "clara"), **recipe.model_dump(mode="json"), tensors=tensor_table(TINY).to_plain())
    sampling = recipe.sampling.model_copy(update={"steps": 2})
    torch.manual_seed(1)
    unet = build_unet(TINY)
    weights, folder = tmp_path / "weights", tmp_path / "real"
    write_weights(weights, tensor_table(TINY), vector_blocks(unet))
    real = pictures(folder, each=9).reshape(18, 1, 8, 8)
    name = "against_features:build"
    found = score_against_folder(weights, manifest, sampling, name, None, folder, samples=12, seed=4)
    network = extractor(name)
    drawn = draw_for_scoring(unet, recipe.schedule, sampling, count=12, classes=2, seed=4)
    expected = score(scored(network, real, np.repeat([0, 1], 9)), scored(network, *drawn), seed=4, by_class=True)
    assert asdict(found.scores) == asdict(expected) and [row.label for row in expected.by_class] == [0, 1]
    assert (found.real_images, found.extractor, found.digest) == (18, network.name, network.digest)
    with pytest.raises(CosiloError, match="18 real and 3 drawn images"):
        score_against_folder(weights, manifest, sampling, name, None, folder, samples=3, seed=4)


def test_the_runs_extractor_goes_before_ones_own_choice() -> None:
    terms = EvaluationTerms(extractor=DEFAULT_EXTRACTOR, sha256="0" * 64, side_pixels=64, features=1280, feature_max=6.0)
    assert local_extractor(terms, None) is terms
    assert (local_extractor(None, None), local_extractor(None, "own:net")) == (DEFAULT_EXTRACTOR, "own:net")
    with pytest.raises(CosiloError, match="do not compare"):
        local_extractor(terms, "own:net")
