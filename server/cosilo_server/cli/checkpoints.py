"""`cosilo checkpoint`: list, pull, export; and `cosilo sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import AsJson, RunName, Seat, command, group
from cosilo_server.cli.shapes import CheckpointShape, checkpoint_shape
from cosilo_server.cli.terminal import byte_words, columns, say, say_json, short, time_words

if TYPE_CHECKING:
    from cosilo_server.cli.connection import Coordinator

PER_CLASS_MAX = 64  # admin.proto, SampleRequest.per_class
STEPS_MAX = 10_000  # diffusion.specification, TIMESTEPS_MAX
SEED_MAX = 2**63 - 1  # diffusion.specification, SEED_MAX

AtRound = Annotated[
    int | None,
    typer.Option("--round", min=0, metavar="N", help="The round that made it; the newest unless given.", show_default=False),
]
Raw = Annotated[bool, typer.Option("--raw", help="The weights themselves rather than their moving average.")]


def add_to(parent: typer.Typer) -> None:
    """Adds the noun, and `sample`, to the tree."""
    checkpoints = group(parent, "checkpoint", "Checkpoints: the global weights after each round.")
    command(checkpoints, "list", list_checkpoints)
    command(checkpoints, "pull", pull)
    command(checkpoints, "export", export)
    command(checkpoints, "keep", keep)
    command(checkpoints, "unkeep", unkeep)
    command(parent, "sample", sample)


def list_checkpoints(seat: Seat, run: RunName, as_json: AsJson = False) -> None:
    """List a run's checkpoints, oldest first."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        checkpoints = fetch_checkpoints(coordinator, summary.run)
    if as_json:
        say_json({"run": summary.run.hex(), "checkpoints": checkpoints})
        return
    columns(
        ("ROUND", "WEIGHTS", "EMA", "BYTES", "CREATED", "KEPT"),
        (
            (
                str(c["round"]),
                short(c["weights"]),
                short(c["ema"] or ""),
                str(c["bytes"]),
                time_words(c["created_unix_s"]),
                _fate(c),
            )
            for c in checkpoints
        ),
    )


def _fate(checkpoint: CheckpointShape) -> str:
    """Why it is there, or since when it is not."""
    if checkpoint["retired_unix_s"] is not None:
        return f"retired {time_words(checkpoint['retired_unix_s'])}"
    return checkpoint["kept"] or "until the next collection"


def keep(
    seat: Seat,
    run: RunName,
    at_round: Annotated[int, typer.Argument(min=0, metavar="ROUND", help="The round that made it.", show_default=False)],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="A name of its own in the run.", show_default=False)] = "",
) -> None:
    """Keep a checkpoint whatever the retention policy says."""
    _shelve(seat, run, at_round, name, leave=False)
    say(f"the checkpoint of round {at_round} is kept" + (f" as {name}" if name else ""))


def unkeep(
    seat: Seat,
    run: RunName,
    at_round: Annotated[int, typer.Argument(min=0, metavar="ROUND", help="The round that made it.", show_default=False)],
) -> None:
    """Leave a kept checkpoint to the retention policy again."""
    _shelve(seat, run, at_round, "", leave=True)
    say(f"the checkpoint of round {at_round} is left to the retention policy")


def _shelve(seat: Seat, run: str, at_round: int, name: str, *, leave: bool) -> None:
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        question = admin_pb2.KeepCheckpointRequest(run=summary.run, round=at_round, name=name, leave=leave)
        coordinator.ask("keep checkpoint", coordinator.admin.KeepCheckpoint, question)


def pull(
    seat: Seat,
    run: RunName,
    to: Annotated[Path, typer.Option("--to", metavar="PATH", help="A file, or a folder to name it in.")] = Path(),
    at_round: AtRound = None,
    raw: Raw = False,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint as safetensors; resumes where it was cut."""
    from cosilo_common.transfer import file_digest
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.downloads import download
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        checkpoint = choose_checkpoint(fetch_checkpoints(coordinator, summary.run), summary.name, at_round)
        artifact, digest = artifact_of(checkpoint, raw)
        path = to
        if to.is_dir():
            stem = f"{summary.name.replace(' ', '-')}-{short(summary.run)}"
            path = to / f"{stem}-round-{checkpoint['round']}-{artifact}.safetensors"
        if path.exists() and (not path.is_file() or file_digest(path) != digest):
            raise CosiloError(
                "pull checkpoint",
                f"{path} exists and is something else",
                "move it away, or name another place with --to",
            )
        size = download(coordinator, bytes.fromhex(digest), path)
    if as_json:
        say_json(
            {
                "run": summary.run.hex(),
                "round": checkpoint["round"],
                "artifact": artifact,
                "digest": digest,
                "bytes": size,
                "path": str(path),
            }
        )
        return
    say(f"{path}: {artifact} of round {checkpoint['round']}, {byte_words(size)}, SHA-256 {digest}")


def export(
    seat: Seat,
    run: RunName,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new or empty folder.", show_default=False)],
    at_round: AtRound = None,
    class_index: Annotated[
        int | None,
        typer.Option(
            "--class",
            min=0,
            metavar="K",
            help="A folder of this class only, for stock diffusers.DDIMPipeline.",
            show_default=False,
        ),
    ] = None,
    raw: Raw = False,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", metavar="FILE", help="A results.json, for the model card.", show_default=False),
    ] = None,
) -> None:
    """Write a checkpoint as a folder that diffusers loads with from_pretrained, with a model card."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.downloads import download, download_base
    from cosilo_server.cli.follow import fetch_rounds
    from cosilo_server.cli.manifests import fetch_signed_manifest
    from cosilo_server.cli.model_card import CardFacts, model_card, read_scores
    from cosilo_server.cli.run_names import find_run
    from cosilo_server.cli.torch_work import export_folder

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CosiloError("export checkpoint", f"{to} is not an empty folder", "name another folder")
    evaluated = read_scores(scores) if scores is not None else None
    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        signed = fetch_signed_manifest(coordinator, summary.run)
        manifest = signed.manifest
        classes = manifest.architecture.num_classes
        if class_index is not None and class_index >= classes:
            raise CosiloError("export checkpoint", f"class {class_index} does not exist", f"choose from 0 to {classes - 1}")
        checkpoint = choose_checkpoint(fetch_checkpoints(coordinator, summary.run), summary.name, at_round)
        artifact, digest = artifact_of(checkpoint, raw)
        facts = CardFacts(
            manifest=manifest,
            signer=signed.signer,
            signature=signed.signature,
            members_version=signed.members_version,
            software=coordinator.ask("ask for status", coordinator.admin.GetStatus, admin_pb2.GetStatusRequest()).software,
            checkpoint=checkpoint,
            artifact=artifact,
            digest=digest,
            rounds=fetch_rounds(coordinator, summary.run),
            class_index=class_index,
            scores=evaluated,
        )
        to.parent.mkdir(parents=True, exist_ok=True)
        weights = to.parent / f".{to.name}.{short(digest)}.safetensors"  # beside the folder: the same disk, found again after a cut
        download(coordinator, bytes.fromhex(digest), weights)
        base = None if manifest.lora is None else download_base(coordinator, manifest.lora, to.parent)
    try:
        export_folder(weights, manifest.architecture, manifest.schedule, to, class_index, lambda made: model_card(facts, made), base)
    finally:
        weights.unlink(missing_ok=True)
        if base is not None:
            base.weights.unlink(missing_ok=True)
    pipeline, part = "cosilo_common.diffusion.pipeline.CosiloPipeline", ""
    if class_index is not None:
        pipeline, part = "diffusers.DDIMPipeline", f", class {class_index}"
    say(f"{to}: {artifact} of round {checkpoint['round']}{part}; load it with {pipeline}.from_pretrained")


def sample(
    seat: Seat,
    run: RunName,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="PNG", help="Where the picture goes; replaced if it is there.", show_default=False),
    ],
    per_class: Annotated[int, typer.Option("--per-class", min=1, max=PER_CLASS_MAX, help="Images a class.")] = 8,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, max=STEPS_MAX, help="Denoising steps; the run's own unless given.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED_MAX, help="Of the noise.")] = 0,
    at_round: AtRound = None,
    raw: Raw = False,
    as_json: AsJson = False,
) -> None:
    """Draw a grid of images, a row a class, beside the coordinator."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import WORK_TIMEOUT_S, connect
    from cosilo_server.cli.downloads import download
    from cosilo_server.cli.run_names import find_run

    if not out.parent.is_dir():
        raise CosiloError("sample", f"{out.parent} is not a folder", "make it, or name another place")
    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        question = admin_pb2.SampleRequest(
            run=summary.run,
            round=at_round or 0,
            newest=at_round is None,
            raw=raw,
            per_class=per_class,
            steps=steps or 0,
            seed=seed,
        )
        answer = coordinator.ask("sample", coordinator.admin.Sample, question, WORK_TIMEOUT_S)
        size = download(coordinator, answer.png_digest, out)
    if as_json:
        say_json(
            {
                "run": summary.run.hex(),
                "round": answer.round,
                "digest": answer.png_digest.hex(),
                "bytes": size,
                "path": str(out),
            }
        )
        return
    say(f"{out}: {per_class} images a class from round {answer.round}, {byte_words(size)}")


def fetch_checkpoints(coordinator: Coordinator, run: bytes) -> list[CheckpointShape]:
    """A run's checkpoints, oldest first."""
    from cosilo_common.rpc.v1 import admin_pb2

    answer = coordinator.ask("list checkpoints", coordinator.admin.ListCheckpoints, admin_pb2.ListCheckpointsRequest(run=run))
    return [checkpoint_shape(checkpoint) for checkpoint in answer.checkpoints]


def choose_checkpoint(checkpoints: list[CheckpointShape], name: str, at_round: int | None) -> CheckpointShape:
    """The newest, or the one that a round made."""
    found = [checkpoint for checkpoint in checkpoints if at_round is None or checkpoint["round"] == at_round]
    if not found:
        what = "no checkpoint" if at_round is None else f"no checkpoint of round {at_round}"
        raise CosiloError("find checkpoint", f"{name} has {what}", f"cosilo checkpoint list {name!r} shows those it has")
    if (retired := found[-1]["retired_unix_s"]) is not None:
        raise CosiloError(
            "find checkpoint",
            f"that of round {found[-1]['round']} was retired by policy on {time_words(retired)}",
            "choose one that cosilo checkpoint list says is kept; cosilo checkpoint keep keeps the next ones",
        )
    return found[-1]


def artifact_of(checkpoint: CheckpointShape, raw: bool) -> tuple[str, str]:
    """The artifact's word and digest: the moving average where there is one, unless the weights are asked for."""
    ema = checkpoint["ema"]
    return ("weights", checkpoint["weights"]) if raw or ema is None else ("ema", ema)
