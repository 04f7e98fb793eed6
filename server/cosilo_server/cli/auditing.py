"""`cosilo audit`: the coordinator's audit log, checked here line by line before a word of it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_server.cli.commands import AsJson, Seat, command, group
from cosilo_server.cli.terminal import say, say_json

if TYPE_CHECKING:
    from cosilo_common.audit import Entry, Head

WHERE = "the coordinator's audit log"


def add_to(parent: typer.Typer) -> None:
    """Adds the noun to the tree."""
    audit = group(parent, "audit", "The coordinator's log of who did what, whose lines are chained.")
    command(audit, "show", show)
    command(audit, "verify", verify)


def show(
    seat: Seat,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="A date, or an age such as 24h or 7d.")] = "",
    who: Annotated[str, typer.Option("--who", metavar="TEXT", help="Only entries whose doer's name has this in it.")] = "",
    what: Annotated[str, typer.Option("--what", metavar="TEXT", help="Only entries whose deed has this in it.")] = "",
    last: Annotated[int, typer.Option("--last", min=1, max=1_000_000, help="How many at most, the newest.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show entries, oldest first, once the whole chain holds."""
    import time

    from cosilo_common.audit_reading import Selection, in_words, moment, plain

    chosen = Selection(who, what, moment(since, time.time()) if since else 0.0, last)
    with _entries(seat, None) as entries:
        found = chosen.of(entries)
    if as_json:
        say_json({"entries": [plain(entry) for entry in found]})
        return
    for entry in found:
        say(in_words(entry))


def verify(
    seat: Seat,
    head: Annotated[
        Path | None,
        typer.Option(
            "--head", metavar="FILE", help="Compare with the head that this file keeps, then keep the new one.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the whole chain; with --head, also that nothing was cut off or written anew since the last time."""
    from cosilo_common.audit import head_of
    from cosilo_common.audit_reading import read_head, verified

    kept: Head | None = read_head(head) if head else None
    with _entries(seat, kept) as entries:
        found = head_of(entries)
    words = verified(found, head)
    say_json({"entries": found.entries, "hash": found.hash}) if as_json else say(words)


@contextmanager
def _entries(seat: Seat, kept: Head | None) -> Iterator[Iterator[Entry]]:
    from cosilo_common.audit import follow
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect

    with (
        connect(seat) as coordinator,
        coordinator.stream("read audit log", coordinator.admin.ReadAudit, admin_pb2.ReadAuditRequest()) as answers,
    ):
        yield follow((line for answer in answers for line in answer.lines), WHERE, kept)
