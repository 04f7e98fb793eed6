"""A round of adapters: real trainers over a frozen base, one sum that has the adapters and nothing else, and the model that comes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosilo_client.data import DataConfig
from cosilo_client.trainer.jobs import EvaluateJob, TrainJob
from cosilo_client.trainer.workshop import Workshop
from cosilo_common.diffusion.adapters import adapter_table, initial_adapters, whole_unet
from cosilo_common.diffusion.lora import Lora, LoraBase
from cosilo_common.diffusion.model import initial_state, tensor_table
from cosilo_common.diffusion.parts import split_of
from cosilo_common.diffusion.presets import preset
from cosilo_common.encoding import Encoding, Section
from cosilo_common.manifest import ServerOptimiserTerms
from cosilo_common.weights import TensorTable, open_vector, write_weights
from cosilo_server.aggregation import Aggregation
from cosilo_server.artifacts import Artifacts
from tests.integration.test_trainer_training import ALONE, TINY
from tests.unit.test_aggregation import CAP, CLIP, Site, opening_of

RECIPE = preset("digits")
TARGETS = ("to_q", "to_v", "conv1")
SITES = ("anna", "beda", "clara")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> LoraBase:
    path = tmp_path / "base"
    write_weights(path, tensor_table(TINY), (tensor.numpy().ravel() for tensor in initial_state(TINY, 1).values()))
    return LoraBase(Lora(base="ab" * 32, base_bytes=path.stat().st_size, rank=2, alpha=4.0, targets=TARGETS), path)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., TrainJob]:
    def make(site: str, weights: Path, lora: LoraBase, **training: Any) -> TrainJob:
        place = SITES.index(site)
        (tmp_path / f"{site}.index").write_text("\n".join(map(str, range(100 * place, 100 * place + 40))))
        changes = {"local_epochs": 1, "batch_size": 12, "learning_rate": 0.01, **training}
        return TrainJob(
            weights=weights,
            update=tmp_path / f"{site}.update",
            architecture=TINY,
            schedule=RECIPE.schedule,
            training=RECIPE.training.model_copy(update=changes),
            data=DataConfig(kind="digits", index_file=tmp_path / f"{site}.index"),
            seed=place,
            threads=1,
            lora=lora,
        )

    return make


def first_adapters(tmp_path: Path, lora: LoraBase) -> tuple[Path, TensorTable]:
    table, path = adapter_table(TINY, lora.terms), tmp_path / "adapters"
    write_weights(path, table, (tensor.numpy().ravel() for tensor in initial_adapters(TINY, lora.terms, 7).values()))
    return path, table


def test_only_adapters_move_and_the_base_stays_bit_for_bit(tmp_path: Path, base: LoraBase, make_job: Callable[..., TrainJob]) -> None:
    weights, table = first_adapters(tmp_path, base)
    before, workshop = hashlib.sha256(base.weights.read_bytes()).digest(), Workshop(ALONE)
    result = workshop.perform(make_job("anna", weights, base), lambda progress: None)
    update = np.fromfile(tmp_path / "anna.update", "<f4")
    assert (result.weight, result.steps, update.size) == (36, 3, table.size)
    for name, place in table.slices().items():
        assert np.any(update[place]), name  # B from the first step on, and then A, whose gradient is zero where B is

    assert workshop._model is not None
    state = {name.replace(".base_layer.", "."): value for name, value in workshop._model[1].state_dict().items() if ".lora_" not in name}
    for name, value in initial_state(TINY, 1).items():
        assert torch.equal(state[name], value), name
    assert hashlib.sha256(base.weights.read_bytes()).digest() == before

    # The incoming model of a first round is the base: held-out losses are the base's own.
    plain = make_job("anna", base.weights, base).model_copy(update={"lora": None})
    fields = plain.model_dump(exclude={"kind", "update", "keep_personal", "seed", "micro_batch"})
    assert workshop.perform(EvaluateJob(**fields), lambda progress: None).heldout_losses == result.heldout_losses


def test_other_levers_hold_for_adapters_as_for_a_model(tmp_path: Path, base: LoraBase, make_job: Callable[..., TrainJob]) -> None:
    lora = LoraBase(base.terms.model_copy(update={"freeze_a": True}), base.weights)
    weights, table = first_adapters(tmp_path, lora)
    training = {"personal": ("encoder",), "control_variates": True, "anchor_mu": 0.1, "proximal_mu": 0.1}
    split = split_of(table, TINY, ("encoder",), True, lora.terms)
    assert split.kept_table is not None
    fetched, kept = tmp_path / "fetched", tmp_path / "kept"
    variates = np.zeros(split.shared_table.size, np.float32)
    write_weights(fetched, split.base_table, [np.array(open_vector(weights, table)), variates])
    job = make_job("clara", fetched, lora, **training).model_copy(update={"keep_personal": kept})
    Workshop(ALONE).perform(job, lambda progress: None)
    update = np.fromfile(tmp_path / "clara.update", "<f4")
    assert update.size == split.summed_size == 2 * split.shared_table.size
    assert np.all([np.any(update[place]) for place in split.shared_table.slices().values()])
    stays = open_vector(kept, split.kept_table)
    names = [name for name, _ in split.kept_table.entries if not name.startswith("z-control/")]
    assert names and all(name.startswith("down_blocks.") and name.endswith("lora_B.weight") for name in names)
    assert all(np.any(stays[split.kept_table.slices()[name]]) for name in names)
    Workshop(ALONE).perform(job.model_copy(update={"personal": kept}), lambda progress: None)  # and the next round begins from them


def test_with_the_same_seed_the_update_is_the_same(tmp_path: Path, base: LoraBase, make_job: Callable[..., TrainJob]) -> None:
    weights, _ = first_adapters(tmp_path, base)
    lora = LoraBase(base.terms.model_copy(update={"dropout": 0.2}), base.weights)
    found = []
    for _ in range(2):
        Workshop(ALONE).perform(make_job("beda", weights, lora), lambda progress: None)
        found.append((tmp_path / "beda.update").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_round_sums_adapters_only(tmp_path: Path, base: LoraBase, make_job: Callable[..., TrainJob], freeze_a: bool) -> None:
    lora = LoraBase(base.terms.model_copy(update={"freeze_a": freeze_a}), base.weights)
    weights, table = first_adapters(tmp_path, lora)
    split, artifacts = split_of(table, TINY, (), lora=lora.terms), Artifacts(tmp_path / "artifacts")
    summed = split.shared_table
    assert {name.rsplit(".", 2)[1] for name, _ in summed.entries} == ({"lora_B"} if freeze_a else {"lora_A", "lora_B"})
    encoding = Encoding(bits=32, participants=len(SITES), cap=CAP, sections=(Section(summed.size, CLIP),), loss_max=16.0, losses=5)
    run = Aggregation(artifacts, table, encoding, ServerOptimiserTerms(), 0.0, split.personal, frozen=split.frozen)
    start = np.array(open_vector(weights, table))
    first = run.initial(artifacts.put_file(weights))
    workshop, uploads, updates = Workshop(ALONE), {}, []
    for site in SITES:
        result = workshop.perform(make_job(site, artifacts.path(first.weights), lora), lambda progress: None)
        updates.append(np.fromfile(tmp_path / f"{site}.update", "<f4"))
        assert updates[-1].size == summed.size
        uploads[site] = Site(encoding, updates[-1], result.weight, (*result.heldout_losses, result.train_loss))
    assert all(len(upload.raw) == 4 * encoding.length for upload in uploads.values())

    checkpoint = run.train(first, opening_of(encoding, uploads)).checkpoint
    after = np.array(open_vector(artifacts.path(checkpoint.weights), table))
    moved = np.concatenate([np.arange(place.start, place.stop) for place in split.shared_runs])
    np.testing.assert_allclose(after[moved], start[moved] + np.mean(updates, axis=0), atol=1e-6)  # every site has 36 images
    stays = np.setdiff1d(np.arange(table.size), moved)
    assert np.array_equal(after[stays], start[stays])

    # Where A is frozen the new model is the mean of the sites' own models; where it is not, it is near it and not it.
    def layer(vector: np.ndarray) -> np.ndarray:
        path = tmp_path / "one"
        write_weights(path, table, [vector.astype(np.float32)])
        weight: torch.Tensor = dict(whole_unet(TINY, path, lora).named_parameters())["mid_block.attentions.0.to_v.weight"]
        return weight.detach().numpy()

    own = []
    for update in updates:
        vector = start.copy()
        vector[moved] += update
        own.append(layer(vector))
    apart = np.abs(layer(after) - np.mean(own, axis=0)).max()
    assert apart < 1e-6 if freeze_a else apart > 1e-6
