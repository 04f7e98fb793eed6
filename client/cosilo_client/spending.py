"""What each run has had of this site: rounds trained and seconds of training, in one small file of the state folder.

Owns that file, `spending.json`. It bounds work, and protects nothing: losing it costs rounds, so it is no part of the
ledger. Must not know what the bounds are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from cosilo_client.durable import write_durably
from cosilo_client.policy import Spent
from cosilo_common.errors import CosiloError

FILE_NAME: Final = "spending.json"


class Spending:
    """The file, read once when the daemon starts; only the daemon writes it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._by_run = self._read()

    def of(self, run: bytes) -> Spent:
        """What a run has had."""
        rounds, seconds = self._by_run.get(run.hex(), ({}, 0.0))
        return Spent(len(rounds), seconds)

    def add(self, run: bytes, round_: int, seconds: float) -> None:
        """Notes a trained round, on disk when this returns. A round trained again counts once, its seconds twice."""
        rounds, before = self._by_run.get(run.hex(), ([], 0.0))
        self._by_run[run.hex()] = (sorted({*rounds, round_}), before + seconds)
        document = {run: {"rounds": rounds, "seconds": spent} for run, (rounds, spent) in self._by_run.items()}
        write_durably(self._path, json.dumps(document, sort_keys=True).encode())

    def _read(self) -> dict[str, tuple[list[int], float]]:
        try:
            raw = json.loads(self._path.read_bytes())
            return {str(run): ([int(n) for n in entry["rounds"]], float(entry["seconds"])) for run, entry in raw.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CosiloError(
                "read spending", f"{self._path} is damaged", "move it away: rounds and hours count from nothing again"
            ) from None
