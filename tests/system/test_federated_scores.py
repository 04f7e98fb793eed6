"""Three real sites sum their images' moments under masks: the federated FID is the pooled one, and no second sum is had of other sites."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from cosilo_client.data import load_images, open_source
from cosilo_common.diffusion.model import build_unet, load_vector, tensor_table
from cosilo_common.evaluation.distances import frechet_distance, gaussian
from cosilo_common.evaluation.extractors import extractor
from cosilo_common.evaluation.scoring import draw_for_scoring
from cosilo_common.manifest import Manifest
from cosilo_common.weights import open_vector
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation
from tests.federation.processes import FederationError, wait_until
from tests.system.reference import plan, recipe_of, site_data

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

SEED, SAMPLES, STEPS = 91, 60, 3
FEATURES = 20
NETWORK = "tiny_features:build"
MODULE = '''
import torch


def build():
    """Twenty features of 8x8 pixels: a fixed layer that bends, and two classes to have an Inception score of."""
    weights = torch.randn(64, 20, generator=torch.Generator().manual_seed(3)) / 8

    def network(images):
        features = torch.tanh(images[:, 0].flatten(1) / 128 @ weights)
        return features, features[:, :2]

    return 8, network
'''


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("scores")
    modules = root / "modules"
    modules.mkdir()
    (modules / "tiny_features.py").write_text(MODULE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(modules))
        patch.setattr(sys, "path", [str(modules), *sys.path])
        specs = [replace(spec, evaluation={"extractor": NETWORK}) for spec in digits_sites(root, 3, alpha=0.5, least=200, seed=1)]
        with LocalFederation(root, specs, typed=False) as federation:
            federation.start()
            yield federation


def evaluated(federation: LocalFederation, name: str, **more: Any) -> str:
    """A run that names the network, accepted everywhere."""
    digest = hashlib.sha256((federation.root / "modules" / "tiny_features.py").read_bytes()).hexdigest()
    terms = {"extractor": NETWORK, "sha256": digest, "side_pixels": 8, "features": FEATURES, "feature_max": 1.0, "images_max": 1024}
    run = federation.create_run(plan(name, SEED, evaluation=terms, **more))
    federation.accept_all(run)
    return run


@pytest.fixture(scope="module")
def measured(federation: LocalFederation) -> tuple[str, dict[str, Any]]:
    run = evaluated(federation, "scored")
    (entry,) = federation.run_rounds(run, 1, "--moments")
    return run, entry


def pooled_pixels(federation: LocalFederation) -> np.ndarray[Any, np.dtype[np.uint8]]:
    architecture = recipe_of(SEED).architecture
    return np.concatenate([load_images(open_source(data), architecture).images for data in site_data(federation).values()])


def test_the_opened_moments_are_those_of_all_images_together(federation: LocalFederation, measured: tuple[str, dict[str, Any]]) -> None:
    _, entry = measured
    assert (entry["kind"], entry["phase"], entry["survivors"]) == ("moments", "closed", sorted(federation.sites))
    images = pooled_pixels(federation)
    assert entry["note"] == f"moments of {len(images)} images"
    rows = extractor(NETWORK).features(images).vectors.astype(np.float64)
    found = load_file(federation.artifact(entry["moments"]))
    assert {name: value.shape for name, value in found.items()} == {"count": (1,), "mean": (20,), "second_moment": (210,)}
    assert found["count"][0] == len(images)
    np.testing.assert_allclose(found["mean"], rows.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["second_moment"], (rows.T @ rows / len(rows))[np.triu_indices(20)], rtol=0, atol=1e-6)


def test_the_federated_fid_is_the_pooled_one(federation: LocalFederation, measured: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    run, entry = measured
    out = tmp_path / "scores.json"
    asked = ("--samples", str(SAMPLES), "--steps", str(STEPS), "--seed", "5", "--extractor", NETWORK, "--out", str(out))
    told = federation.cosilo_json("score", run, *asked)
    recipe = recipe_of(SEED)
    (checkpoint,) = federation.checkpoints(run)  # a moments round makes none
    unet = build_unet(recipe.architecture)
    load_vector(unet, open_vector(federation.artifact(checkpoint["ema"] or checkpoint["weights"]), tensor_table(recipe.architecture)))
    sampling = recipe.sampling.model_copy(update={"steps": STEPS})
    with torch.no_grad():
        images, _ = draw_for_scoring(unet, recipe.schedule, sampling, count=SAMPLES, classes=10, seed=5)
    network = extractor(NETWORK)
    real, drawn = (network.features(these).vectors.astype(np.float64) for these in (pooled_pixels(federation), images))
    pooled = frechet_distance(gaussian(real), gaussian(drawn))
    assert told["fid"] == pytest.approx(pooled, rel=1e-3)
    assert told["inception_score"] > 1.0
    assert (told["real_images"], told["moments"], told["extractor"]) == (len(real), entry["moments"], f"{NETWORK}@8")

    assert json.loads(out.read_text(encoding="utf-8"))["summary"]["scored, " + told["artifact"] + " of round 0"]["fid"] == told["fid"]
    folder = tmp_path / "exported"
    federation.cosilo("checkpoint", "export", run, "--to", str(folder), "--scores", str(out))
    assert f"{told['fid']:.4g}" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_ones_own_gives_every_score(federation: LocalFederation, measured: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The pooled images in a folder: the FID is that against the sum of moments, and the rest comes with it."""
    run, _ = measured
    images, architecture = pooled_pixels(federation), recipe_of(SEED).architecture
    labels = np.concatenate([load_images(open_source(data), architecture).labels for data in site_data(federation).values()])
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "real" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(tmp_path / "real" / str(label) / f"{number}.png")
    out = tmp_path / "scores.json"
    asked = ("--samples", str(SAMPLES), "--steps", str(STEPS), "--seed", "5", "--extractor", NETWORK, "--out", str(out))
    summed = federation.cosilo_json("score", run, *asked)
    told = federation.cosilo_json("score", run, *asked, "--against", str(tmp_path / "real"))
    assert told["fid"] == pytest.approx(summed["fid"], rel=1e-3) and told["real_images"] == len(images)
    assert {"kid", "kid_deviation", "precision", "recall", "inception_score"} <= told.keys()
    assert [row["label"] for row in told["by_class"]] == list(range(10))
    (row,) = json.loads(out.read_text(encoding="utf-8"))["summary"].values()
    assert row == {"images": SAMPLES, **{name: told[name] for name in ("fid", "kid", "precision", "recall", "inception_score")}}


def test_the_same_sum_may_be_had_again_and_another_may_not(federation: LocalFederation, measured: tuple[str, dict[str, Any]]) -> None:
    """R9, over two runs: the second run's sum has the same sites and the same images, so its bytes are the first's."""
    _, first = measured
    again = evaluated(federation, "again")
    (entry,) = federation.run_rounds(again, 1, "--moments")
    assert entry["moments"] == first["moments"]

    site = next(iter(federation.sites))
    index_file = Path(str(federation.sites[site].data["index_file"]))
    lines = index_file.read_text(encoding="ascii").splitlines(keepends=True)
    index_file.write_text("".join(lines[:-1]), encoding="ascii")
    federation.start_rounds(again, 1, "--moments")
    # the site measures its images, and declines to upload what differs from its first sum by one of them
    wait_until(lambda: "its images have changed since round 1 of run" in federation.log(site), "the site declines", 120)
    federation.cosilo("run", "stop", again, "--abandon")


def test_a_run_without_an_extractor_has_no_moments_rounds(federation: LocalFederation) -> None:
    run = federation.create_run(plan("unscored", SEED))
    manifest = Manifest.model_validate(federation.cosilo_json("run", "show", run)["manifest"])
    assert manifest.evaluation is None
    assert b'"evaluation"' not in manifest.canonical()
    with pytest.raises(FederationError, match="names no extractor, so it has no moments rounds"):
        federation.start_rounds(run, 1, "--moments")
