"""What each run has had of this site: rounds trained and measured, seconds of training, in one small file of the state folder.

Owns that file, `spending.json`. It bounds work, and protects nothing: losing it costs rounds, so it is no part of the
ledger. Must not know what the bounds are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cosilo_client.durable import write_durably
from cosilo_client.policy import Spent
from cosilo_common.errors import CosiloError

FILE_NAME: Final = "spending.json"


@dataclass(frozen=True)
class _Entry:
    rounds: frozenset[int] = frozenset()
    seconds: float = 0.0
    statistics: frozenset[int] = frozenset()


_NOTHING: Final = _Entry()


class Spending:
    """The file, read once when the daemon starts; only the daemon writes it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._by_run = self._read()

    def of(self, run: bytes) -> Spent:
        """What a run has had."""
        entry = self._by_run.get(run.hex(), _NOTHING)
        return Spent(len(entry.rounds), entry.seconds, len(entry.statistics))

    def add(self, run: bytes, round_: int, seconds: float) -> None:
        """Notes a trained round, on disk when this returns. A round trained again counts once, its seconds twice."""
        before = self._by_run.get(run.hex(), _NOTHING)
        self._write(run, replace(before, rounds=before.rounds | {round_}, seconds=before.seconds + seconds))

    def add_seconds(self, run: bytes, seconds: float) -> None:
        """Notes time that no round has anything of: a training that failed, or was cut off."""
        before = self._by_run.get(run.hex(), _NOTHING)
        self._write(run, replace(before, seconds=before.seconds + seconds))

    def add_statistics(self, run: bytes, round_: int) -> None:
        """Notes a statistics round, on disk when this returns; one measured again counts once."""
        before = self._by_run.get(run.hex(), _NOTHING)
        self._write(run, replace(before, statistics=before.statistics | {round_}))

    def _write(self, run: bytes, entry: _Entry) -> None:
        self._by_run[run.hex()] = entry
        document = {
            name: {"rounds": sorted(had.rounds), "seconds": had.seconds, "statistics": sorted(had.statistics)}
            for name, had in self._by_run.items()
        }
        write_durably(self._path, json.dumps(document, sort_keys=True).encode())

    def _read(self) -> dict[str, _Entry]:
        try:
            raw = json.loads(self._path.read_bytes())
            return {
                str(run): _Entry(
                    frozenset(int(n) for n in entry["rounds"]),
                    float(entry["seconds"]),
                    frozenset(int(n) for n in entry.get("statistics", ())),
                )
                for run, entry in raw.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CosiloError(
                "read spending", f"{self._path} is damaged", "move it away: rounds and hours count from nothing again"
            ) from None
