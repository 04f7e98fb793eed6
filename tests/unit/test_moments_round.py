"""A moments round's pieces: the manifest's table and its bytes, the encoding, what a site measures with what, and the opened artifact."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cosilo_client.data.config import DataConfig
from cosilo_client.due_terms import checked_encoding
from cosilo_client.ledger import ModelUpload
from cosilo_client.overrides import BaseModel, explain_permit
from cosilo_client.run_terms import RunTerms
from cosilo_client.trainer.jobs import MomentsJob, TrainerFailed, job_from_line, to_line
from cosilo_client.trainer.measuring import even_choice, measure
from cosilo_client.trainer.training import DeviceImages
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.diffusion.presets import preset
from cosilo_common.encoding import Section
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation.extractors import LITE0
from cosilo_common.evaluation.moments import Moments, moments_table, read_moments
from cosilo_common.manifest import EvaluationTerms, Manifest, parse_manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_common.weights import write_weights
from cosilo_server.cli.model_card import read_scores
from cosilo_server.cli.scores import named_extractor, write_scores
from tests.integration.memory_rounds import manifest_of

SITES = ("anna", "beda", "clara", "dora")
TERMS = EvaluationTerms(extractor="own_network:build", sha256="ab" * 32, side_pixels=4, features=3, feature_max=2.0, images_max=64)
MODULE = """
def build():
    return 4, lambda images: (images[:, :, 0, 0] / 255, None)
"""


def plain() -> Manifest:
    return manifest_of(SITES)


def with_moments(**changes: object) -> Manifest:
    return manifest_of(SITES, evaluation={**TERMS.model_dump(), **changes})


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationTerms:
    path = tmp_path / "own_network.py"
    path.write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    return TERMS.model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})


def job(tmp_path: Path, terms: EvaluationTerms, network: str = TERMS.extractor) -> MomentsJob:
    recipe = preset("digits")
    return MomentsJob(
        data=DataConfig(kind="digits"),
        architecture=recipe.architecture,
        training=recipe.training,
        update=tmp_path / "update",
        network=network,
        terms=terms,
    )


def images_of(count: int, full_scale: int = 255) -> DeviceImages:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 3, 4, 4))
    images = (
        torch.from_numpy(pixels.astype(np.uint8))
        if full_scale == 255
        else torch.from_numpy((pixels * 257).astype(np.uint16).view(np.int16))
    )
    everything = torch.arange(count)
    return DeviceImages(images, torch.zeros(count, dtype=torch.int64), everything[: count // 2], everything[count // 2 :], full_scale, 0)


# The manifest


def test_a_manifest_without_the_table_has_the_bytes_that_it_had_before_there_was_one() -> None:
    document = json.loads(plain().canonical())
    assert "evaluation" not in document
    assert set(document) == set(Manifest.model_fields) - {"evaluation", "warm_start", "lora", "correction", "downlink"}
    assert parse_manifest(plain().canonical()) == plain()


def test_a_table_that_is_null_is_not_canonical() -> None:
    """One run has one form of bytes."""
    document = {**json.loads(plain().canonical()), "evaluation": None}
    with pytest.raises(CosiloError, match="not in canonical form"):
        parse_manifest(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def test_a_manifest_with_the_table_is_another_run_and_comes_back_whole() -> None:
    run = with_moments()
    assert parse_manifest(run.canonical()).evaluation == TERMS
    assert run.digest() != plain().digest()


def test_images_of_all_sites_are_a_count_that_float32_holds() -> None:
    with_moments(images_max=1 << 22)
    with pytest.raises(ValueError, match="images_max"):
        with_moments(images_max=(1 << 22) + 1)


def test_r9_counts_by_the_network_alone() -> None:
    same = TERMS.model_copy(update={"side_pixels": 8, "feature_max": 9.0, "images_max": 1, "features": 2})
    assert same.key == TERMS.key
    assert TERMS.model_copy(update={"sha256": "ac" * 32}).key != TERMS.key
    assert TERMS.model_copy(update={"extractor": LITE0}).key != TERMS.key


# The encoding


@pytest.mark.parametrize("bits", [24, 32])
def test_a_moments_round_is_encoded_by_its_own_terms(bits: int) -> None:
    run = manifest_of(SITES, evaluation=TERMS.model_dump(), encoding={"bits": bits, "clip": 0.5, "cap": 64})
    encoding = round_encoding(run, RoundKind.MOMENTS)
    assert (encoding.bits, encoding.cap, encoding.losses) == (32, 64, 0)
    assert encoding.sections == (Section(3 + 6, 4.0),)
    assert checked_encoding(run, RoundKind.MOMENTS, encoding.canonical()) == encoding
    RunTerms.of(run).check_encoding(RoundKind.MOMENTS, encoding)
    with pytest.raises(ProtocolViolation, match="R3"):
        checked_encoding(run, RoundKind.MOMENTS, replace(encoding, cap=63).canonical())


def test_a_site_has_no_moments_round_in_a_run_without_the_table() -> None:
    encoding = round_encoding(with_moments(), RoundKind.MOMENTS)
    with pytest.raises(ProtocolViolation, match="R3"):
        checked_encoding(plain(), RoundKind.MOMENTS, encoding.canonical())
    with pytest.raises(ProtocolViolation, match="phase-0"):
        RunTerms.of(plain()).check_encoding(RoundKind.MOMENTS, encoding)
    with pytest.raises(CosiloError, match="has no \\[evaluation\\]"):
        round_encoding(plain(), RoundKind.MOMENTS)


# What a site measures


@pytest.mark.parametrize(("images", "images_max", "chosen"), [(5, 64, [0, 1, 2, 3, 4]), (10, 4, [0, 2, 5, 7]), (3, 3, [0, 1, 2])])
def test_images_are_taken_at_even_distances(images: int, images_max: int, chosen: list[int]) -> None:
    assert even_choice(images, images_max).tolist() == chosen


@pytest.mark.parametrize("full_scale", [255, 65535])
def test_all_images_are_measured_the_held_out_ones_too(tmp_path: Path, own_network: EvaluationTerms, full_scale: int) -> None:
    tenths: list[int] = []
    result = measure(images_of(12, full_scale), job(tmp_path, own_network), lambda progress: tenths.append(progress.tenths))
    rows = images_of(12).images[:, :, 0, 0].numpy().astype(np.float32) / np.float32(255)
    assert np.array_equal(np.fromfile(tmp_path / "update", "<f4"), Moments.of(rows).vector())
    assert (result.weight, result.heldout_losses, tenths) == (12, (), [10])
    assert len(bytes.fromhex(result.data)) == 32


def test_images_max_bounds_the_weight_and_what_is_measured(tmp_path: Path, own_network: EvaluationTerms) -> None:
    few = own_network.model_copy(update={"images_max": 4})
    assert measure(images_of(12), job(tmp_path, few), lambda _: None).weight == 4


def test_the_digest_is_of_the_images(tmp_path: Path, own_network: EvaluationTerms) -> None:
    made = [measure(images_of(count), job(tmp_path, own_network), lambda _: None).data for count in (12, 12, 11)]
    assert made[0] == made[1] != made[2]


def test_a_network_is_not_loaded_by_the_runs_word(tmp_path: Path, own_network: EvaluationTerms) -> None:
    with pytest.raises(TrainerFailed, match="this site has no extractor"):
        measure(images_of(3), job(tmp_path, own_network, network=""), lambda _: None)
    assert "own_network" not in sys.modules
    assert not (tmp_path / "update").exists()


def test_another_network_of_the_same_name_measures_nothing(tmp_path: Path, own_network: EvaluationTerms) -> None:
    other = own_network.model_copy(update={"sha256": "00" * 32})
    with pytest.raises(CosiloError, match="the run says 0000"):
        measure(images_of(3), job(tmp_path, other), lambda _: None)
    assert not (tmp_path / "update").exists()


@pytest.mark.parametrize("changes", [{"features": 4}, {"side_pixels": 8}])
def test_a_network_of_another_shape_measures_nothing(tmp_path: Path, own_network: EvaluationTerms, changes: dict[str, int]) -> None:
    with pytest.raises(CosiloError):
        measure(images_of(3), job(tmp_path, own_network.model_copy(update=changes)), lambda _: None)
    assert not (tmp_path / "update").exists()


def test_a_job_travels_as_one_line(tmp_path: Path) -> None:
    sent = job(tmp_path, TERMS)
    assert job_from_line(to_line(sent)) == sent


# The artifact and the scores


def test_the_artifact_reads_as_moments(tmp_path: Path) -> None:
    moments = Moments.of(np.random.default_rng(2).normal(size=(50, 3)))
    path = tmp_path / "moments"
    write_weights(path, moments_table(3), [np.array([50], np.float32), moments.vector()])
    found = read_moments(path)
    assert found.count == 50
    assert np.array_equal(found.vector(), moments.vector())


def test_a_file_of_something_else_is_no_artifact_of_moments(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_weights(path, with_moments().tensor_table, [np.zeros(16, np.float32)])
    with pytest.raises(CosiloError):
        read_moments(path)


def test_code_runs_at_the_admins_only_if_they_say_its_name() -> None:
    with pytest.raises(CosiloError, match="is code"):
        named_extractor(TERMS, None)
    assert named_extractor(TERMS, TERMS.extractor) is TERMS
    lite0 = TERMS.model_copy(update={"extractor": LITE0})
    assert named_extractor(lite0, None) is lite0
    with pytest.raises(CosiloError, match="the run measures with"):
        named_extractor(lite0, "inception")
    with pytest.raises(CosiloError, match="names no extractor"):
        named_extractor(None, None)


def test_scores_are_what_an_export_reads(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, "digits, ema of round 3", {"samples": 100, "fid": 12.5, "inception_score": None})
    assert read_scores(path) == {"digits, ema of round 3": {"images": 100, "fid": 12.5}}


def test_a_person_who_permits_another_sum_reads_what_it_risks() -> None:
    model = BaseModel(TERMS.key, "digits", (ModelUpload(b"r" * 32, 4, b"d" * 32),), unasked=2, permitted=0, extractor=TERMS.extractor)
    words = explain_permit(model, 2)
    assert words.startswith(f"Moments by own_network:build ({TERMS.key.hex()})\n")
    assert "put its moments into 1 sums" in words
    assert "round 4 of run 727272727272" in words
    assert "exactly its moments" in words
