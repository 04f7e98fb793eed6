"""LoRA (Hu et al., arXiv 2106.09685): the base to begin with, W + (alpha / r) B A afterwards, and what a manifest says of it."""

from __future__ import annotations

import importlib.util
import json
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosilo_client.config import PolicyTable
from cosilo_client.joining import Candidate, accept_as_person, explain
from cosilo_client.trainer.jobs import TrainJob, job_from_line, to_line
from cosilo_common.diffusion.adapters import adapted_unet, adapter_table, initial_adapters, whole_unet
from cosilo_common.diffusion.export import export_pipeline
from cosilo_common.diffusion.lora import Lora, LoraBase, file_bytes, require_peft
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, ordered_parameters, tensor_table
from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.diffusion.presets import PRESETS
from cosilo_common.diffusion.specification import Architecture, Schedule
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, parse_manifest
from cosilo_common.weights import write_weights
from tests.integration.memory_rounds import manifest_of

TINY = Architecture(
    sample_size=8, in_channels=1, num_classes=3, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=4, norm_num_groups=4
)
LAYERS = ("to_q", "to_out.0", "conv1", "time_emb_proj")  # linear layers and convolutions
BASE_SEED, SEED = 1, 2


@pytest.fixture
def base(tmp_path: Path) -> LoraBase:
    path = tmp_path / "base.safetensors"
    write_weights(path, tensor_table(TINY), (tensor.numpy().ravel() for tensor in initial_state(TINY, BASE_SEED).values()))
    terms = Lora(base="ab" * 32, base_bytes=path.stat().st_size, rank=2, alpha=6.0, targets=LAYERS)
    return LoraBase(terms, path)


def trained(tmp_path: Path, base: LoraBase) -> tuple[Path, dict[str, np.ndarray]]:
    """Adapters as training could have left them, with no B zero."""
    table, random = adapter_table(TINY, base.terms), np.random.default_rng(0)
    values = {name: random.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in table.entries}
    path = tmp_path / "adapters.safetensors"
    write_weights(path, table, (value.ravel() for value in values.values()))
    return path, values


def predicted(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn((3, 1, 8, 8), generator=generator)
    with torch.no_grad():
        return unet.eval()(noisy, torch.tensor([5, 500, 900]), class_labels=torch.arange(3), return_dict=False)[0]  # type: ignore[no-any-return]  # untyped


def test_the_first_model_is_the_base_bit_for_bit(base: LoraBase) -> None:
    before = torch.random.get_rng_state()
    first = initial_adapters(TINY, base.terms, SEED)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.count_nonzero(value) == 0 for name, value in first.items() if ".lora_B." in name)
    assert all(torch.count_nonzero(value) == value.numel() for name, value in first.items() if ".lora_A." in name)
    again, other = initial_adapters(TINY, base.terms, SEED), initial_adapters(TINY, base.terms, SEED + 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)

    adapted = adapted_unet(TINY, base)
    load_vector(adapted, np.concatenate([value.numpy().ravel() for value in first.values()]))
    assert torch.equal(predicted(adapted), predicted(whole_unet(TINY, base.weights)))


def test_the_table_is_of_the_adapters_alone_and_only_they_can_be_trained(base: LoraBase) -> None:
    table = adapter_table(TINY, base.terms)
    shapes = dict(tensor_table(TINY).entries)
    adapted = adapted_unet(TINY, base)
    assert [(name, tuple(parameter.shape)) for name, parameter in ordered_parameters(adapted)] == list(table.entries)
    can = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in can) == table.size < tensor_table(TINY).size / 4
    adapters = dict(table.entries)
    for name in adapters:
        layer, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        out, into, *kernel = shapes[f"{layer}.weight"]
        assert adapters[name] == ((2, into, *kernel) if side == "A" else (out, 2, *[1] * len(kernel)))
        assert layer.endswith(LAYERS)


def test_an_adapted_layer_is_w_plus_alpha_over_r_b_a(base: LoraBase, tmp_path: Path) -> None:
    path, adapters = trained(tmp_path, base)
    state, whole = initial_state(TINY, BASE_SEED), dict(whole_unet(TINY, path, base).named_parameters())
    moved = set()
    for name, weight in state.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in adapters:
            assert torch.equal(whole[name], weight)
            continue
        a, b = (torch.from_numpy(adapters[f"{layer}.lora_{side}.weight"]) for side in "AB")
        update = (b.flatten(1) @ a.flatten(1)).view(weight.shape) * (6.0 / 2)
        torch.testing.assert_close(whole[name], weight + update, rtol=0, atol=1e-6)
        moved.add(layer)
    assert len(moved) == len(adapters) / 2


def test_merged_draws_what_unmerged_draws(base: LoraBase, tmp_path: Path) -> None:
    path, adapters = trained(tmp_path, base)
    adapted = adapted_unet(TINY, base)
    load_vector(adapted, np.concatenate([value.ravel() for value in adapters.values()]))
    plain = predicted(adapted)
    torch.testing.assert_close(predicted(whole_unet(TINY, path, base)), plain, rtol=1e-4, atol=1e-5)
    assert (plain - predicted(whole_unet(TINY, base.weights))).abs().max() > 0.01


def test_the_networks_of_the_presets_take_adapters() -> None:
    terms = Lora(base="0" * 64, base_bytes=1, rank=4)
    assert adapter_table(PRESETS["fashion-16"].architecture, terms).size == 4 * 4 * (64 + 64)
    convolutions = terms.model_copy(update={"targets": ("first", "second")})
    assert len(adapter_table(PRESETS["tun2023"].architecture, convolutions).entries) == 64


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("to_q", "to_x"), "no layer of this network is called 'to_x'"),
        (("group_norm",), "adapters stand beside linear layers and convolutions, not beside 'group_norm'"),
        (("q",), "no layer of this network is called 'q'"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_by_name(base: LoraBase, targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(CosiloError) as caught:
        adapter_table(TINY, base.terms.model_copy(update={"targets": targets}))
    assert caught.value.subject == f"lora.targets: {said}"
    assert "to_q" in caught.value.hint and "to_out.0" in caught.value.hint


def test_a_base_of_another_shape_is_refused_by_its_tensor(base: LoraBase) -> None:
    with pytest.raises(CosiloError, match=r"base.safetensors: has tensor class_embedding.weight \[3, 32\] where"):
        adapted_unet(TINY.model_copy(update={"num_classes": 4}), base)


def test_an_exported_folder_is_merged_and_peft_reads_the_adapters_beside_it(base: LoraBase, tmp_path: Path) -> None:
    import peft

    path, _ = trained(tmp_path, base)
    whole = predicted(whole_unet(TINY, path, base))
    export_pipeline(path, TINY, Schedule(), tmp_path / "out", base=base)
    assert torch.equal(predicted(CosiloPipeline.from_pretrained(tmp_path / "out").unet), whole)
    plain = whole_unet(TINY, base.weights)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out" / "adapter"))  # type: ignore[arg-type]  # any module will do
    torch.testing.assert_close(predicted(theirs), whole, rtol=1e-4, atol=1e-5)
    assert "auto_mapping" in json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())


def test_the_mean_of_adapters_is_their_model_s_mean_only_where_a_is_frozen() -> None:
    """FFA-LoRA, arXiv 2403.12313, section 3: mean(B) mean(A) is not mean(B A), unless every A is the same."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 3, 5)), random.normal(size=(2, 4, 3))
    apart = (b @ a).mean(axis=0)
    assert np.abs(b.mean(axis=0) @ a.mean(axis=0) - apart).max() > 0.1
    one = np.broadcast_to(a[0], a.shape)
    np.testing.assert_allclose(b.mean(axis=0) @ a[0], (b @ one).mean(axis=0), atol=1e-12)


# The manifest


def adapting(**lora: Any) -> Manifest:
    """A run of adapters for the tiny network."""
    terms = Lora(base="cd" * 32, base_bytes=file_bytes(tensor_table(TINY)), rank=2, targets=LAYERS, **lora)
    plain = manifest_of(("anna", "beda", "clara", "dora"))
    values = plain.model_dump() | {"architecture": TINY, "lora": terms, "tensors": adapter_table(TINY, terms).entries}
    return Manifest.model_validate(values)


def test_a_manifest_without_the_table_keeps_its_bytes_and_one_with_it_is_read_again() -> None:
    manifest = adapting()
    assert parse_manifest(manifest.canonical()) == manifest
    assert b'"lora"' in manifest.canonical()
    assert manifest.shared_table == manifest.tensor_table == adapter_table(TINY, manifest.lora)  # type: ignore[arg-type]  # it has one
    plain = manifest_of(("anna", "beda", "clara", "dora"))
    assert b"lora" not in plain.canonical()
    assert plain.model_copy(update={"lora": None}).digest() == plain.digest()


def test_tensors_that_are_no_adapter_s_are_refused() -> None:
    values = adapting().model_dump() | {"tensors": tensor_table(TINY).entries}
    with pytest.raises(ValueError, match=r"tensor class_embedding\.weight is no adapter's"):
        Manifest.model_validate(values)


def test_frozen_a_is_fetched_and_in_no_sum() -> None:
    split = adapting(freeze_a=True).split
    assert all(name.endswith(".lora_B.weight") for name, _ in split.shared_table.entries)
    assert len(split.shared_table.entries) == len(split.table.entries) / 2
    assert (split.base_table, split.personal_table, split.kept_table) == (split.table, None, None)
    covered = sorted((place.start, place.stop) for place in (*split.shared_runs, *split.unsummed_runs))
    assert (covered[0][0], covered[-1][1]) == (0, split.table.size)
    assert all(one[1] == next_[0] for one, next_ in pairwise(covered))


def test_adapters_of_a_part_may_stay_at_the_sites() -> None:
    manifest = adapting(freeze_a=True)
    training = manifest.training.model_copy(update={"personal": ("encoder",)})
    split = Manifest.model_validate(manifest.model_dump() | {"training": training.model_dump()}).split
    assert split.personal and all(name.startswith("down_blocks.") and name.endswith(".lora_B.weight") for name in split.personal)
    everything = training.model_copy(update={"personal": ("encoder", "bottleneck", "decoder")})
    with pytest.raises(ValueError, match="nothing would be trained together"):
        Manifest.model_validate(manifest.model_dump() | {"training": everything.model_dump()})


# Where peft is not installed


def test_what_to_install_is_said_before_anything_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, real = Candidate(adapting(), None, "ada"), importlib.util.find_spec  # type: ignore[arg-type]  # never sent
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "peft" else real(name, package))
    with pytest.raises(CosiloError) as caught:
        require_peft("create run", "cosilo-server")
    assert caught.value.hint == "pip install 'cosilo-server[lora]' (a wheelhouse without a registry: --extras lora)"
    with pytest.raises(CosiloError, match=r"accept run: the run trains LoRA adapters, and peft is not installed here"):
        accept_as_person(None, None, candidate, datetime.now(UTC))  # type: ignore[arg-type]  # refused before either is used
    assert "cosilo-client[lora]" in explain(candidate, "anna", PolicyTable(f_min=1)).splitlines()[-1]


def test_a_person_reads_what_is_fetched_and_what_leaves() -> None:
    manifest = adapting(freeze_a=True)
    text = explain(Candidate(manifest, None, "ada"), "anna", PolicyTable(f_min=1))  # type: ignore[arg-type]  # never sent
    assert f"{manifest.tensor_table.size:,} values of adapters" in text
    assert "the adapters (LoRA, rank 2) change a model that stays as it is: this site fetches its 0.2 MB" in text
    assert f"with the SHA-256 {'cd' * 32}, and never sends it" in text
    assert "how much training changed each of the adapters' values" in text
    assert "values stay here" not in text


def test_a_job_carries_its_base(base: LoraBase, tmp_path: Path) -> None:
    digits = PRESETS["digits"]
    data = {"kind": "digits"}
    job = TrainJob(weights=tmp_path / "w", update=tmp_path / "u", architecture=TINY, schedule=digits.schedule, training=digits.training,
                   data=data, seed=1, lora=base)  # type: ignore[arg-type]  # parsed  # fmt: skip
    assert job_from_line(to_line(job)) == job


def test_a_network_without_adapters_is_as_it_was() -> None:
    unet = build_unet(TINY)
    assert ordered_parameters(unet) == sorted(unet.named_parameters())
