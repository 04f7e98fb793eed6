"""`cosilo run`: make a run out of a file, list runs, show one, pause, resume or stop one, watch one; run_signing.py has `sign`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import AsJson, RunName, Seat, command, group
from cosilo_server.cli.run_signing import sign
from cosilo_server.cli.shapes import RunShape, run_shape
from cosilo_server.cli.terminal import columns, fields, note, say, say_json, short, warn

NONCE_BYTES = 16  # PROTOCOL.md: two runs with the same values are still two runs


def add_to(parent: typer.Typer) -> None:
    """Adds the noun to the tree."""
    runs = group(parent, "run", "Runs: one training of one model.")
    command(runs, "create", create)
    command(runs, "list", list_runs)
    command(runs, "show", show)
    command(runs, "sign", sign)
    command(runs, "pause", pause)
    command(runs, "resume", resume)
    command(runs, "stop", stop)
    command(runs, "watch", watch)


def create(
    seat: Seat,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run's TOML; docs/cli.md explains it.", show_default=False)],
    insecure_plain_sum: Annotated[
        bool,
        typer.Option(
            "--insecure-plain-sum",
            help="Confirm a file that says so: the coordinator will see every site's own update.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a signed run out of a TOML file."""
    from cosilo_common.manifest import PLAIN_AGGREGATION, sign_manifest
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import WORK_TIMEOUT_S, connect
    from cosilo_server.cli.members import fetch_members, site_keys
    from cosilo_server.cli.run_file import RunFile
    from cosilo_server.cli.torch_work import adapter_table, tensor_table

    run_file = RunFile(file)
    if run_file.plain and not insecure_plain_sum:
        raise CosiloError(
            "create run",
            f'{file} says aggregation = "{PLAIN_AGGREGATION}": the coordinator would see every site\'s own update',
            "add --insecure-plain-sum if that is meant",
        )
    if insecure_plain_sum and not run_file.plain:
        raise CosiloError(
            "create run",
            f"--insecure-plain-sum was given, but {file} asks for {run_file.values['aggregation']}",
            "leave the flag out",
        )
    with connect(seat) as coordinator:
        members = fetch_members(coordinator)
        signing_key = coordinator.identity.signing_key()
        manifest = run_file.manifest(
            coordinator.identity.peer.federation,
            site_keys(members),
            tensor_table(run_file.architecture),
            secrets.token_bytes(NONCE_BYTES),
            lambda lora: adapter_table(run_file.architecture, lora),
        )
        if run_file.plain:
            warn("insecure-plain-sum: updates are not masked; the coordinator sees every site's own update")
        if manifest.training.personal:
            warn(f"personal: {', '.join(manifest.training.personal)} stay at the sites; no checkpoint is a whole model (docs/levers.md)")
        answer = coordinator.ask(
            "create run",
            coordinator.admin.CreateRun,
            admin_pb2.CreateRunRequest(manifest=manifest.canonical(), signature=sign_manifest(manifest, signing_key)),
            WORK_TIMEOUT_S,
        )
    if answer.run != manifest.digest():
        raise CosiloError(
            "create run",
            f"the coordinator answered with another digest, {short(answer.run)}",
            "do not start rounds; look at its log",
        )
    run = answer.run.hex()
    names = [participant.name for participant in manifest.participants]
    if as_json:
        say_json(
            {
                "run": run,
                "short": short(run),
                "name": manifest.name,
                "participants": names,
                "parameters": manifest.tensor_table.size,
                "aggregation": manifest.aggregation,
            }
        )
        return
    fields(
        [
            ("run", short(run)),
            ("digest", run),
            ("name", manifest.name),
            ("participants", ", ".join(names)),
            ("parameters", str(manifest.tensor_table.size)),
            ("aggregation", manifest.aggregation),
            ("a round needs", f"{manifest.least_invited} sites"),
        ]
    )
    note(f"next: each site runs cosilo-site accept {short(run)}; then cosilo round start {short(run)} --rounds 10")


def list_runs(seat: Seat, as_json: AsJson = False) -> None:
    """List runs, oldest first."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        answer = coordinator.ask("list runs", coordinator.admin.ListRuns, admin_pb2.ListRunsRequest())
    runs = [run_shape(run) for run in answer.runs]
    if as_json:
        say_json({"runs": runs})
        return
    run_columns(runs)


def show(seat: Seat, run: RunName, as_json: AsJson = False) -> None:
    """Show one run and what its signed manifest says."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.manifests import fetch_manifest, terms_in_words
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = run_shape(find_run(coordinator, run))
        manifest, signer = fetch_manifest(coordinator, bytes.fromhex(summary["run"]))
    if as_json:
        say_json({**summary, "signer": signer, "manifest": manifest.model_dump(mode="json")})
        return
    fields(
        [
            ("run", short(summary["run"])),
            ("digest", summary["run"]),
            ("name", summary["name"]),
            ("signed by", signer),
            ("state", summary["state"]),
            ("rounds", f"{summary['rounds_closed']} of {summary['rounds_wanted']} closed"),
            ("aggregation", summary["aggregation"]),
            ("participants", ", ".join(summary["participants"])),
            ("parameters", str(summary["parameters"])),
            *terms_in_words(manifest),
            ("newest weights", short(summary["checkpoint"] or "")),
            ("note", summary["note"]),
        ]
    )


def pause(
    seat: Seat,
    run: RunName,
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Shown wherever the run is; 200 characters at most.", show_default=False)
    ] = "",
    abandon: Annotated[bool, typer.Option("--abandon", help="Abandon the round in progress too; its training is lost.")] = False,
) -> None:
    """Start no round until `run resume`; what was ordered waits, and the round in progress goes to its end."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        request = admin_pb2.PauseRunRequest(run=summary.run, reason=reason, abandon=abandon)
        coordinator.ask("pause run", coordinator.admin.PauseRun, request)
    say(f"paused {summary.name} {short(summary.run)}")


def resume(seat: Seat, run: RunName) -> None:
    """Let a paused run go on with the rounds that were ordered."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        coordinator.ask("resume run", coordinator.admin.ResumeRun, admin_pb2.ResumeRunRequest(run=summary.run))
    say(f"resumed {summary.name} {short(summary.run)}")


def stop(
    seat: Seat,
    run: RunName,
    abandon: Annotated[bool, typer.Option("--abandon", help="Abandon the round in progress too; its training is lost.")] = False,
) -> None:
    """Start no further rounds; the one in progress goes to its end unless --abandon is given."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        coordinator.ask("stop run", coordinator.admin.StopRun, admin_pb2.StopRunRequest(run=summary.run, abandon=abandon))
    say(f"stopped {summary.name} {short(summary.run)}")


def watch(
    seat: Seat,
    run: RunName,
    until_idle: Annotated[
        bool,
        typer.Option("--until-idle", help="End when the rounds asked for are done: 0 if they are, 1 if they cannot be."),
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live picture, as on anything but a terminal.")] = False,
) -> None:
    """Watch a run live: a bar for each site, the loss, a line for each round that ends."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.follow import follow
    from cosilo_server.cli.run_names import find_run
    from cosilo_server.cli.watching import Patience

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        follow(coordinator, summary.run, Patience() if until_idle else None, plain=plain)


def run_columns(runs: list[RunShape]) -> None:
    """Runs, one a line."""
    columns(
        ("RUN", "NAME", "STATE", "ROUNDS", "AGGREGATION", "PARAMETERS", "SITES", "NOTE"),
        (
            (
                short(run["run"]),
                run["name"],
                run["state"],
                f"{run['rounds_closed']}/{run['rounds_wanted']}",
                run["aggregation"],
                str(run["parameters"]),
                str(len(run["participants"])),
                run["note"],
            )
            for run in runs
        ),
    )
