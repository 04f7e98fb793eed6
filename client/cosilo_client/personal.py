"""The layers of each run that stay at this site: a file a round, private, and never part of an upload.

    personal/RUN/ROUND.safetensors

A round starts from the newest file of an earlier one, so that the same round trained again starts from the same values, whatever was
killed in between; a round that was abandoned has still taught them something, which stays here. With control variates only rounds whose
sum holds this site's part count. Owns which file that is and when it
goes: with the run (`cosilo-site leave`). Must not know what is in it, the ledger or the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cosilo_client.durable import make_folder, remove_folder, shred, unlink_durably
from cosilo_common.transfer import is_digest

PERSONAL_FOLDER: Final = "personal"
_SUFFIX: Final = ".safetensors"


class PersonalLayers:
    """One site's store of what stays at home. state: the site's private folder."""

    def __init__(self, state: Path) -> None:
        self._folder = state / PERSONAL_FOLDER

    def newest_before(self, run: bytes, round_: int, counts: Callable[[bytes, int], bool] | None = None) -> Path | None:
        """What this site had before the round; None where the run's own first values are meant. counts: of which rounds alone, None for all."""
        earlier = [number for number in self._rounds(run) if number < round_ and (counts is None or counts(run, number))]
        return self._file(run, max(earlier)) if earlier else None

    def place(self, run: bytes, round_: int, begun_from: Path | None) -> Path:
        """Where the round's values go. begun_from: the file that it starts from; with the round's own it is all that remains."""
        folder = self._run_folder(run)
        make_folder(self._folder)
        make_folder(folder)
        target = self._file(run, round_)
        unlink_durably(*(path for path in tuple(folder.iterdir()) if path not in (begun_from, target)))
        return target

    def forget(self, run: bytes) -> None:
        """Overwrites and deletes everything of a run."""
        folder = self._run_folder(run)
        if folder.is_dir():
            for path in tuple(folder.iterdir()):
                shred(path)
        remove_folder(folder)

    def runs(self) -> tuple[bytes, ...]:
        """The runs of which anything is kept."""
        return tuple(bytes.fromhex(path.name) for path in sorted(self._folder.glob("*")) if is_digest(path.name))

    def _rounds(self, run: bytes) -> list[int]:
        return [int(path.stem) for path in self._run_folder(run).glob(f"*{_SUFFIX}") if path.stem.isdecimal()]

    def _run_folder(self, run: bytes) -> Path:
        return self._folder / run.hex()

    def _file(self, run: bytes, round_: int) -> Path:
        return self._run_folder(run) / f"{round_}{_SUFFIX}"
