"""`cosilo checkpoint pull|export` and `sample`: what arrives is what was asked for, resumed after a cut, and never another file's end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from cosilo_common.diffusion.presets import PRESETS
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.manifest import Manifest, Participant, sign_manifest
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_common.transfer import partial_path
from cosilo_server.cli import downloads
from cosilo_server.cli.commands import Seat
from cosilo_server.cli.connection import connect
from cosilo_server.cli.downloads import download
from cosilo_server.cli.main import main
from cosilo_server.cli.terminal import CoordinatorUnreachable
from tests.identity_parties import FEDERATION, Founded, found
from tests.integration.cli_coordinator import CHUNK_BYTES, Script, entries, serving

BIG = os.urandom(3 * CHUNK_BYTES + 17)
RUN = bytes(range(32))


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "made")


@pytest.fixture
def script(founded: Founded) -> Script:
    return Script(members=founded.members, runs=[admin_pb2.RunSummary(run=RUN, name="digits 1")])


@pytest.fixture
def address(founded: Founded, script: Script) -> Iterator[str]:
    with serving(founded, script) as at:
        yield at


def cosilo(founded: Founded, address: str, *arguments: str) -> int:
    return main(["--admin", str(founded.admin.folder), "--address", address, *arguments])


def offsets(script: Script) -> list[int]:
    return [request.offset for request in script.heard if isinstance(request, site_pb2.GetArtifactRequest)]


def test_a_download_is_whole_and_leaves_nothing_else(founded: Founded, address: str, script: Script, tmp_path: Path) -> None:
    digest = script.add_artifact(BIG)
    with connect(Seat(founded.admin.folder, address)) as coordinator:
        assert download(coordinator, digest, tmp_path / "file") == len(BIG)
        assert download(coordinator, digest, tmp_path / "file") == len(BIG)
    assert (tmp_path / "file").read_bytes() == BIG
    assert entries(tmp_path) == ["file"]
    assert offsets(script) == [0]  # what is there already is not fetched again


def test_a_cut_link_resumes_at_its_offset(
    founded: Founded, address: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = script.add_artifact(BIG)
    script.cuts = [CHUNK_BYTES, 2 * CHUNK_BYTES + 5]
    pauses: list[float] = []
    with connect(Seat(founded.admin.folder, address)) as coordinator:
        download(coordinator, digest, tmp_path / "file", pauses.append)
    assert (tmp_path / "file").read_bytes() == BIG
    assert offsets(script) == [0, CHUNK_BYTES, 2 * CHUNK_BYTES + 5]
    assert len(pauses) == 2
    assert f"connection lost at byte {CHUNK_BYTES}, resuming" in capsys.readouterr().err


def test_a_link_that_brings_nothing_more_is_given_up_and_what_came_is_kept(
    founded: Founded, address: str, script: Script, tmp_path: Path
) -> None:
    digest = script.add_artifact(BIG)
    script.cuts = [CHUNK_BYTES] * (1 + downloads.FRUITLESS_TRIES_MAX)
    with connect(Seat(founded.admin.folder, address)) as coordinator:
        with pytest.raises(CoordinatorUnreachable):
            download(coordinator, digest, tmp_path / "file", lambda seconds: None)
        assert partial_path(tmp_path / "file", digest.hex()).stat().st_size == CHUNK_BYTES
        script.cuts = []
        assert download(coordinator, digest, tmp_path / "file") == len(BIG)
    assert offsets(script)[-1] == CHUNK_BYTES


def test_wrong_bytes_are_discarded(
    founded: Founded, address: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promised = sha256(BIG).digest()
    script.artifacts[promised] = BIG[:-1] + b"!"
    script.checkpoints = [admin_pb2.Checkpoint(round=1, weights_digest=promised, bytes=len(BIG))]
    assert cosilo(founded, address, "checkpoint", "pull", "digits 1", "--to", str(tmp_path)) == 1
    assert f"declared {promised.hex()}; discarded" in capsys.readouterr().err
    assert entries(tmp_path) == []


def test_pull_takes_the_newest_ema_and_names_the_file(
    founded: Founded, address: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, weights, ema = (script.add_artifact(data) for data in (b"old", b"weights", b"average"))
    script.checkpoints = [
        admin_pb2.Checkpoint(round=0, weights_digest=old, bytes=3),
        admin_pb2.Checkpoint(round=2, weights_digest=weights, ema_digest=ema, bytes=7),
    ]
    pull = ("checkpoint", "pull", "digits 1", "--to", str(tmp_path))
    stem = "digits-1-000102030405-round"
    assert cosilo(founded, address, *pull, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": RUN.hex(),
        "round": 2,
        "artifact": "ema",
        "digest": ema.hex(),
        "bytes": 7,
        "path": str(tmp_path / f"{stem}-2-ema.safetensors"),
    }
    assert cosilo(founded, address, *pull, "--raw") == 0
    assert capsys.readouterr().out == (f"{tmp_path / f'{stem}-2-weights.safetensors'}: weights of round 2, 7 B, SHA-256 {weights.hex()}\n")
    assert cosilo(founded, address, *pull, "--round", "0") == 0  # a checkpoint without an average gives its weights
    assert (tmp_path / f"{stem}-0-weights.safetensors").read_bytes() == b"old"
    assert cosilo(founded, address, *pull, "--round", "1") == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: find checkpoint: digits 1 has no checkpoint of round 1"


def test_pull_never_replaces_another_file(
    founded: Founded, address: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.checkpoints = [admin_pb2.Checkpoint(round=1, weights_digest=script.add_artifact(b"weights"), bytes=7)]
    (tmp_path / "mine").write_text("mine")
    assert cosilo(founded, address, "checkpoint", "pull", "digits 1", "--to", str(tmp_path / "mine")) == 1
    assert capsys.readouterr().err.splitlines()[0] == f"error: pull checkpoint: {tmp_path / 'mine'} exists and is something else"
    assert (tmp_path / "mine").read_text() == "mine"


def test_sample_asks_for_what_was_typed_and_replaces_the_picture(
    founded: Founded, address: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.sampled = admin_pb2.SampleResponse(png_digest=script.add_artifact(b"\x89PNG"), bytes=4, round=7)
    out = tmp_path / "grid.png"
    out.write_bytes(b"yesterday's")
    assert cosilo(founded, address, "sample", "digits 1", "--out", str(out)) == 0
    assert out.read_bytes() == b"\x89PNG"
    assert capsys.readouterr().out == f"{out}: 8 images a class from round 7, 4 B\n"
    options = ("--per-class", "2", "--steps", "5", "--seed", "9", "--round", "0", "--raw", "--json")
    assert cosilo(founded, address, "sample", "digits 1", "--out", str(out), *options) == 0
    assert json.loads(capsys.readouterr().out)["round"] == 7
    assert [request for request in script.heard if isinstance(request, admin_pb2.SampleRequest)] == [
        admin_pb2.SampleRequest(run=RUN, newest=True, per_class=8),
        admin_pb2.SampleRequest(run=RUN, round=0, newest=False, raw=True, per_class=2, steps=5, seed=9),
    ]


def test_export_writes_a_folder_that_diffusers_loads(
    founded: Founded, address: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DDIMPipeline

    from cosilo_common.diffusion.model import initial_state, tensor_table
    from cosilo_common.diffusion.pipeline import CosiloPipeline
    from cosilo_common.weights import write_weights

    architecture = Architecture(
        sample_size=8, in_channels=1, num_classes=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    )
    table = tensor_table(architecture)
    state = initial_state(architecture, seed=1)
    write_weights(tmp_path / "weights", table, (tensor.flatten().numpy() for tensor in state.values()))
    weights = script.add_artifact((tmp_path / "weights").read_bytes())
    key = founded.admin_key
    recipe = PRESETS["digits"]
    manifest = Manifest(
        name="digits 1",
        federation=FEDERATION,
        nonce="00" * 16,
        participants=(Participant(name="north", key="11" * 32),),
        architecture=architecture,
        schedule=recipe.schedule,
        training=recipe.training,
        sampling=recipe.sampling,
        tensors=table.entries,
        aggregation="insecure-plain-sum",
        n_min=1,
        f=0,
    )
    run = manifest.digest()
    script.runs = [admin_pb2.RunSummary(run=run, name="digits 1")]
    script.manifests[run] = site_pb2.GetRunResponse(manifest=manifest.canonical(), signature=sign_manifest(manifest, key))
    script.checkpoints = [admin_pb2.Checkpoint(round=4, weights_digest=weights, bytes=1)]

    whole, one = tmp_path / "out" / "whole", tmp_path / "out" / "one"
    assert cosilo(founded, address, "checkpoint", "export", "digits 1", "--to", str(whole)) == 0
    assert capsys.readouterr().out == (
        f"{whole}: weights of round 4; load it with cosilo_common.diffusion.pipeline.CosiloPipeline.from_pretrained\n"
    )
    assert len(CosiloPipeline.from_pretrained(whole)(class_labels=[0, 2], num_inference_steps=2).images) == 2
    assert cosilo(founded, address, "checkpoint", "export", "digits 1", "--to", str(one), "--class", "2") == 0
    assert len(DDIMPipeline.from_pretrained(one)(num_inference_steps=2).images) == 1
    card = (whole / "README.md").read_text()
    assert sha256((whole / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest() in card
    assert sign_manifest(manifest, key).hex() in card
    assert "This folder draws class 2 only." in (one / "README.md").read_text()
    assert entries(tmp_path / "out") == ["one", "whole"]  # the downloaded weights are gone
    assert cosilo(founded, address, "checkpoint", "export", "digits 1", "--to", str(whole)) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert cosilo(founded, address, "checkpoint", "export", "digits 1", "--to", str(tmp_path / "x"), "--class", "3") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "hint: choose from 0 to 2"


def test_the_table_that_is_signed_is_the_models_own() -> None:
    from cosilo_common.diffusion.model import tensor_table
    from cosilo_server.cli import torch_work

    architecture = PRESETS["digits"].architecture
    for _ in range(2):  # worked out, then known
        assert torch_work.tensor_table(architecture) == tensor_table(architecture)
