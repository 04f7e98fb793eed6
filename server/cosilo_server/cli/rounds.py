"""`cosilo round`: ask for rounds, list them, show one, show where its time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import AsJson, RunName, Seat, command, group
from cosilo_server.cli.shapes import RoundShape
from cosilo_server.cli.terminal import (
    byte_words,
    columns,
    fields,
    note,
    number_words,
    say,
    say_json,
    second_words,
    short,
    time_words,
)

ROUNDS_PER_ORDER_MAX = 10_000  # admin.proto, StartRoundsRequest.rounds


def add_to(parent: typer.Typer) -> None:
    """Adds the noun to the tree."""
    rounds = group(parent, "round", "Rounds: fetch weights, train, mask, upload, open the sum.")
    command(rounds, "start", start)
    command(rounds, "list", list_rounds)
    command(rounds, "show", show)
    command(rounds, "trace", trace)


def start(
    seat: Seat,
    run: RunName,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=ROUNDS_PER_ORDER_MAX, help="How many.")] = 1,
    rehearsal: Annotated[bool, typer.Option("--rehearsal", help="Zero training steps and a sum that must be zero; nothing moves.")] = False,
    statistics: Annotated[bool, typer.Option("--statistics", help="Held-out losses of the newest weights; no training.")] = False,
    moments: Annotated[
        bool, typer.Option("--moments", help="Moments of the real images' features, for cosilo score; once a run, no training.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until they are done: 0 if they are, 1 if they cannot be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask for rounds."""
    from cosilo_common.rpc.v1 import admin_pb2, site_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.follow import follow
    from cosilo_server.cli.run_names import find_run
    from cosilo_server.cli.watching import Patience

    if rehearsal + statistics + moments > 1:
        raise typer.BadParameter("--rehearsal, --statistics and --moments are kinds of rounds; give one")
    if wait and as_json:
        raise typer.BadParameter("--wait prints rounds as they end; give it without --json")
    kind, word = site_pb2.ROUND_KIND_TRAIN, "round"
    if rehearsal:
        kind, word = site_pb2.ROUND_KIND_REHEARSAL, "rehearsal"
    elif statistics:
        kind, word = site_pb2.ROUND_KIND_STATISTICS, "statistics round"
    elif moments:
        kind, word = site_pb2.ROUND_KIND_MOMENTS, "moments round"
    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        question = admin_pb2.StartRoundsRequest(run=summary.run, rounds=rounds, kind=kind)
        first = coordinator.ask("start rounds", coordinator.admin.StartRounds, question).first_round
        if as_json:
            say_json(
                {
                    "run": summary.run.hex(),
                    "first_round": first,
                    "rounds": rounds,
                    "kind": word.split()[0] if kind != site_pb2.ROUND_KIND_TRAIN else "train",
                }
            )
            return
        counted = f"{rounds} {word}{'' if rounds == 1 else 's'}"
        say(f"asked for {counted} of {summary.name} {short(summary.run)}, from round {first} on")
        if wait:
            follow(coordinator, summary.run, Patience(), after=first - 1)


def list_rounds(seat: Seat, run: RunName, as_json: AsJson = False) -> None:
    """List a run's rounds, oldest first."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.follow import fetch_rounds
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        rounds = fetch_rounds(coordinator, summary.run)
    if as_json:
        say_json({"run": summary.run.hex(), "rounds": rounds})
        return
    columns(
        ("ROUND", "KIND", "PHASE", "SITES", "SECONDS", "HELD-OUT", "TRAINING", "DOWN", "UP", "CHECKPOINT", "REASON"),
        (_row(entry) for entry in rounds),
    )


def show(
    seat: Seat,
    run: RunName,
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="The round's number.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show one round."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.follow import fetch_rounds
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        found = [entry for entry in fetch_rounds(coordinator, summary.run) if entry["round"] == number]
    if not found:
        raise CosiloError(
            "show round",
            f"{summary.name} has no round {number}",
            f"cosilo round list {short(summary.run)} shows those it has",
        )
    if as_json:
        say_json({"run": summary.run.hex(), **found[0]})
        return
    _show(found[0])


def trace(
    seat: Seat,
    run: RunName,
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="The round's number.", show_default=False)],
    perfetto: Annotated[
        Path | None,
        typer.Option("--perfetto", metavar="FILE", help="Write it for ui.perfetto.dev too; replaced if it is there.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a round's time went: phases, and what each site did when."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.perfetto import trace_events
    from cosilo_server.cli.run_names import find_run
    from cosilo_server.cli.timeline import fetch_trace, lines

    if perfetto is not None and (perfetto.is_dir() or not perfetto.parent.is_dir()):
        raise CosiloError("write trace", f"{perfetto} cannot be a file", "name a file in a folder that is there")
    with connect(seat) as coordinator:
        summary = find_run(coordinator, run)
        found = fetch_trace(coordinator, summary.run, number)
    if perfetto is not None:
        perfetto.write_text(json.dumps(trace_events(found, summary.name)), encoding="utf-8")
    if as_json:
        say_json(found)
        return
    for line in lines(found, summary.name):
        say(line)
    if perfetto is not None:
        note(f"{perfetto}: open it at https://ui.perfetto.dev, which reads it in the browser and sends it nowhere")


def _row(entry: RoundShape) -> tuple[str, ...]:
    losses = entry["losses"]
    return (
        str(entry["round"]),
        entry["kind"],
        entry["phase"],
        f"{len(entry['survivors'])}/{len(entry['invited'])}",
        f"{entry['seconds']:.1f}",
        number_words(losses["heldout"]) if losses else "",
        number_words(losses["train"]) if losses else "",
        byte_words(entry["bytes_down"]).replace(" ", ""),
        byte_words(entry["bytes_up"]).replace(" ", ""),
        short(entry["checkpoint"] or ""),
        entry["reason"] or entry["note"],
    )


def _show(entry: RoundShape) -> None:
    pairs = [
        ("round", str(entry["round"])),
        ("kind", entry["kind"]),
        ("phase", entry["phase"]),
        ("started", time_words(entry["started_unix_s"])),
        ("took", second_words(entry["seconds"])),
        ("attempt", str(entry["attempt"])),
        ("invited", ", ".join(entry["invited"])),
        ("in the sum", ", ".join(entry["survivors"])),
        ("down", byte_words(entry["bytes_down"])),
        ("up", byte_words(entry["bytes_up"])),
        ("started from", short(entry["base"] or "")),
        ("made", short(entry["checkpoint"] or "")),
    ]
    losses = entry["losses"]
    if losses is not None:
        pairs += [
            ("held-out loss before", number_words(losses["heldout"])),
            ("by noise level", " ".join(number_words(loss) for loss in losses["heldout_by_bucket"])),
            ("training loss", number_words(losses["train"])),
            ("values clipped", f"{100 * (losses['clip_ratio'] or 0):.2g} %"),
            ("update norm", number_words(losses["update_norm"])),
            ("images, weighted", str(losses["total_weight"])),
        ]
    pairs += [("reason", entry["reason"]), ("note", entry["note"])]
    fields(pairs)
    if entry["sites"]:
        say()
        columns(
            ("SITE", "ACTIVITY", "TENTHS", "BYTES", "CONNECTED", "DELIVERED", "DECLINED", "LATE"),
            (
                (
                    site["site"],
                    site["activity"],
                    str(site["tenths"]),
                    str(site["bytes"]),
                    _yes(site["connected"]),
                    _yes(site["delivered"]),
                    site["declined"] or "",
                    _yes(site["late"]),
                )
                for site in entry["sites"]
            ),
        )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
