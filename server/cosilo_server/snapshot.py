"""A copy of the coordinator's database that may be kept: no round is in progress in it, and no message of a site.

What sites revealed is deleted when its round ends (PROTOCOL R7), so a copy that outlives the round must not have it. And a round that was in
progress cannot go on from a copy: its uploads are not in it, and its sites have gone on. Works on the tables of every schema version so far,
because the copy before an upgrade is of the older one. Must not know what is done with the copy.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from cosilo_common.database import copy_database, sync_file
from cosilo_common.errors import CosiloError
from cosilo_server.rounds.state import ENDED, Phase


def snapshot(database: Path, to: Path, reason: str) -> None:
    """Copies the database while it is in use. reason: why its rounds in progress were abandoned, for whoever reads of them in the copy.

    Raises CosiloError where either file cannot be had.
    """
    raw = to.with_name(f"{to.name}.raw")
    try:
        copy_database(database, raw)
        with closing(sqlite3.connect(raw, isolation_level=None)) as db:
            db.execute("PRAGMA secure_delete=ON")
            db.execute("BEGIN IMMEDIATE")
            _end_rounds(db, reason)
            db.execute("DELETE FROM messages")
            db.execute("COMMIT")
        sync_file(raw)
        raw.replace(to)
        sync_file(to.parent)
    except (sqlite3.Error, OSError) as error:
        raise CosiloError("copy database", f"{database} to {to}: {error}", "check the folder, its owner and its free space") from None
    finally:
        raw.unlink(missing_ok=True)


def _end_rounds(db: sqlite3.Connection, reason: str) -> None:
    marks = ", ".join("?" for _ in ENDED)
    rows = db.execute(f"SELECT run, number, state, started_at FROM rounds WHERE phase NOT IN ({marks})", [str(phase) for phase in ENDED])  # noqa: S608 - question marks
    for run, number, document, started_at in rows.fetchall():
        state = json.loads(document) | {"phase": Phase.ABANDONED, "reason": reason, "ended_at": started_at}
        text = json.dumps(state, sort_keys=True, separators=(",", ":"))
        db.execute("UPDATE rounds SET phase = ?, state = ? WHERE run = ? AND number = ?", (str(Phase.ABANDONED), text, run, number))
