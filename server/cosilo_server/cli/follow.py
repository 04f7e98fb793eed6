"""Follows a run over the wire until it is done, or for as long as somebody looks: reconnects, tells rounds that
ended, shows the rest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.shapes import RoundShape, round_shape, run_shape
from cosilo_server.cli.terminal import CoordinatorUnreachable, ExitCode, is_terminal, note, short
from cosilo_server.cli.watching import Patience, RoundLog, Snapshot, Verdict, ended_line

if TYPE_CHECKING:
    from cosilo_server.cli.connection import Coordinator
    from cosilo_server.cli.watch_view import View

RECONNECT_FIRST_S = 0.5  # a coordinator that restarts is back within a second or two
RECONNECT_MAX_S = 8.0
RECONNECT_WINDOW_S = 120.0  # a machine that reboots; past that somebody should look


def follow(coordinator: Coordinator, run: bytes, patience: Patience | None, *, after: int | None = None, plain: bool = False) -> None:
    """Shows a run until the verdict of `patience`, or for ever without one.

    after: rounds up to this number are not told. Raises CosiloError for a bad end, and CoordinatorUnreachable where
    the coordinator stays away.
    """
    verdict: Verdict | None = None
    try:
        with _view(plain) as view:
            verdict = _watch(coordinator, run, patience, after, view)
    except KeyboardInterrupt:
        note(f"the run goes on; watch it again with cosilo run watch {short(run)}")
        raise typer.Exit(ExitCode.DONE if patience is None else ExitCode.FAILED) from None
    if verdict is not None and verdict.code is not ExitCode.DONE:
        raise CosiloError("watch run", f"{short(run)}: {verdict.reason}", f"cosilo round list {short(run)} has every round's reason")


def fetch_rounds(coordinator: Coordinator, run: bytes) -> list[RoundShape]:
    """All rounds of a run, oldest first."""
    from cosilo_common.rpc.v1 import admin_pb2

    answer = coordinator.ask("list rounds", coordinator.admin.ListRounds, admin_pb2.ListRoundsRequest(run=run))
    return [round_shape(entry) for entry in answer.rounds]


def _watch(coordinator: Coordinator, run: bytes, patience: Patience | None, after: int | None, view: View) -> Verdict | None:
    rounds = RoundLog(lambda: fetch_rounds(coordinator, run), after)
    for snapshot in snapshots(coordinator, run):
        for entry in rounds.newly_ended(snapshot):
            view.tell(ended_line(entry), entry)
            if patience is not None:
                patience.saw_end(entry)
        view.show(snapshot)
        verdict = patience.verdict(snapshot) if patience is not None else None
        if verdict is not None:
            return verdict
    return None


def snapshots(
    coordinator: Coordinator,
    run: bytes,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Snapshot]:
    """Snapshots for ever, through the coordinator's restarts.

    Raises CoordinatorUnreachable where it never answered, or stays away too long.
    """
    from cosilo_common.rpc.v1 import admin_pb2

    last_heard: float | None = None
    pause_s = RECONNECT_FIRST_S
    while True:
        try:
            with coordinator.stream("watch run", coordinator.admin.WatchRun, admin_pb2.WatchRunRequest(run=run)) as answers:
                for answer in answers:
                    last_heard, pause_s = now(), RECONNECT_FIRST_S
                    yield Snapshot(run_shape(answer.summary), round_shape(answer.current) if answer.current.round else None)
        except CoordinatorUnreachable as error:
            if last_heard is None or now() - last_heard > RECONNECT_WINDOW_S:
                raise
            if pause_s == RECONNECT_FIRST_S:
                note(f"connection lost, trying again: {error.subject}")
        sleep(pause_s)  # a stream that ended in order is a coordinator that shuts down
        pause_s = min(2 * pause_s, RECONNECT_MAX_S)


def _view(plain: bool) -> View:
    from cosilo_server.cli.watch_view import LiveView, PlainView

    if plain or not is_terminal(sys.stdout):
        return PlainView()
    from rich.console import Console

    return LiveView(Console())
