"""Which run a person means by a name or by the beginning of a digest.

Must not know the wire's calls beyond the list of runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cosilo_common.errors import CosiloError
from cosilo_server.cli.terminal import short

if TYPE_CHECKING:
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import Coordinator

PREFIX_CHARS_MIN = 4  # one or two hex digits are more often a slip than a choice
_HEX = re.compile(r"[0-9a-f]+")


def find_run(coordinator: Coordinator, wanted: str) -> admin_pb2.RunSummary:
    """The run of this name or digest prefix. Raises CosiloError where there is none, or more than one."""
    from cosilo_common.rpc.v1 import admin_pb2

    runs = coordinator.ask("list runs", coordinator.admin.ListRuns, admin_pb2.ListRunsRequest()).runs
    return choose_run(runs, wanted)


def choose_run(runs: Sequence[admin_pb2.RunSummary], wanted: str) -> admin_pb2.RunSummary:
    """The one run that `wanted` names: its whole name, or at least four digits from the beginning of its digest."""
    prefix = wanted.lower()
    by_digest = [run for run in runs if _is_prefix(prefix) and run.run.hex().startswith(prefix)]
    by_name = [run for run in runs if run.name == wanted]
    found = by_digest if len(prefix) == 64 else [*by_name, *(run for run in by_digest if run.name != wanted)]
    if len(found) == 1:
        return found[0]
    if not found:
        known = ", ".join(f"{run.name} ({short(run.run)})" for run in runs[-5:])
        raise CosiloError("find run", f"no run is called {wanted!r}", f"there are {known}" if known else "run cosilo run create FILE")
    raise CosiloError(
        "find run",
        f"{wanted!r} may be {len(found)} runs",
        f"name one by its digest: {', '.join(short(run.run) for run in found)}",
    )


def _is_prefix(text: str) -> bool:
    return len(text) >= PREFIX_CHARS_MIN and _HEX.fullmatch(text) is not None
