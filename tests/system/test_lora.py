"""Three real sites under masks train adapters over a base: it comes down once, nothing but the adapters goes up, and the export is whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cosilo_common.diffusion.adapters import adapter_table, whole_unet
from cosilo_common.diffusion.lora import Lora, LoraBase, file_bytes
from cosilo_common.diffusion.model import initial_state, load_vector, ordered_parameters, tensor_table
from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.transfer import file_digest
from cosilo_common.weights import open_vector, write_weights
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation
from tests.system.reference import plan, recipe_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

SEED = 91
TARGETS = ("to_q", "to_k", "to_v", "conv1", "conv2")
TAIL_WORDS = 1 + 5 + 1 + 1 + 64  # PROTOCOL.md, Encoding


def test_the_base_comes_down_once_and_only_adapters_go_up(tmp_path: Path) -> None:
    architecture = recipe_of(SEED).architecture
    table, own = tensor_table(architecture), tmp_path / "base"
    write_weights(own, table, (tensor.numpy().ravel() for tensor in initial_state(architecture, 5).values()))
    digest = file_digest(own)
    terms = Lora(base=digest, base_bytes=file_bytes(table), rank=4, targets=TARGETS)
    adapters = adapter_table(architecture, terms)
    with LocalFederation(tmp_path, digits_sites(tmp_path, 3, alpha=0.5, least=200, seed=1), typed=False) as federation:
        federation.start()
        (federation.data / "warm").mkdir()
        (federation.data / "warm" / f"{digest}.safetensors").write_bytes(own.read_bytes())
        run = federation.create_run(plan("adapters", SEED, lora={"base": digest, "rank": 4, "targets": list(TARGETS)}))
        federation.accept_all(run)
        first, second = federation.run_rounds(run, 2)
        up = len(federation.sites) * 4 * (adapters.size + TAIL_WORDS)
        assert (first["phase"], second["phase"], first["bytes_up"], second["bytes_up"]) == ("closed", "closed", up, up)
        down = len(federation.sites) * file_bytes(adapters)
        assert second["bytes_down"] == down
        assert first["bytes_down"] == down + len(federation.sites) * terms.base_bytes

        weights = [federation.artifact(checkpoint["weights"]) for checkpoint in federation.checkpoints(run)]
        start, end = (np.array(open_vector(path, adapters)) for path in (weights[0], weights[-1]))
        for name, place in adapters.slices().items():
            assert np.any(start[place]) == (".lora_A." in name)
            assert not np.array_equal(start[place], end[place]), name
        for site in federation.sites:
            kept = list((federation.state(site) / "artifacts").glob(digest))
            assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in kept] == [digest]

        federation.cosilo("checkpoint", "export", run, "--to", str(tmp_path / "out"))
        drawn = dict(ordered_parameters(CosiloPipeline.from_pretrained(tmp_path / "out").unet))
        whole = whole_unet(architecture, weights[-1], LoraBase(terms, own))
        assert all(np.array_equal(drawn[name].detach(), parameter.detach()) for name, parameter in ordered_parameters(whole))
        load_vector(whole, open_vector(own, table))
        moved = {n.removesuffix(".weight") for n, p in ordered_parameters(whole) if not np.array_equal(p.detach(), drawn[n].detach())}
        assert moved == {name.rsplit(".lora_", 1)[0] for name, _ in adapters.entries}
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"| base \\(SHA-256\\) | `{digest}` |" in card or f"| base (SHA-256) | `{digest}` |" in card
        assert "LoRA adapters" in card and "adapter/adapter\\_model.safetensors" in card
        assert sorted(path.name for path in tmp_path.glob(".*")) == []
