"""Uploads in progress and uploads whole: spool/RUN/ROUND/SITE.

Owns the spool folder. An upload is whole when its file stands under the site's name, and its digest was right at that
moment; until then it is a partial beside it (cosilo_common.transfer). Must not know what an upload means, nor when a
round is over. Every call may block on the disk: callers on an event loop use a thread.
"""

import errno
import shutil
import threading
from pathlib import Path
from typing import Final

from cosilo_common.canonical import SITE_NAME
from cosilo_common.errors import CosiloError
from cosilo_common.transfer import FileSink, is_digest, partial_path, partials, require_free_bytes

ROUND_MAX = 1 << 32
"""Above any manifest's count of rounds; keeps a folder's name short."""

_REMOVALS_MAX: Final = 8  # at each, one upload that was just ending can have been renamed under the removal's hands


class Spool:
    """The spool folder of one coordinator; folders are made 0700 and files 0600.

    run: hex SHA-256 of the manifest; round_number: 0 .. ROUND_MAX; site: its name in the federation. All three become
    file names, so each is checked here again; raises CosiloError for one that is malformed. free_bytes_min: of the disk,
    which uploads leave alone: the database that shares it must not be the one that finds it full.
    """

    def __init__(self, root: Path, free_bytes_min: int = 0) -> None:
        self._root = root
        self._free_bytes_min = free_bytes_min
        self._over: dict[str, int] = {}  # by run, the highest round whose uploads were discarded: none begins there any more
        self._opening = threading.Lock()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def root(self) -> Path:
        """The folder, for asking how much space is free."""
        return self._root

    def receive(self, run: str, round_number: int, site: str, size: int, digest: str) -> FileSink:
        """Begin an upload, or go on with it where the last one with the same digest ended.

        size: declared bytes. Raises CosiloError where the disk has no room for the rest of them or the round's uploads were
        discarded, TransferError where the same upload is being received already.
        """
        path = self.path(run, round_number, site)
        with self._opening:  # a thread that comes late would make the folder of a round that is over, and nobody removes it
            if round_number <= self._over.get(run, -1):
                raise CosiloError("open spool", f"round {round_number} of run {run[:12]} is over", "wait for an assignment")
            for folder in (path.parent.parent, path.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
            sink = FileSink(path, size, digest)
        try:
            self.require_room(size - sink.offset)
        except CosiloError:
            sink.close()
            raise
        return sink

    def require_room(self, needed_bytes: int) -> None:
        """Raises CosiloError, naming the bytes that are missing, unless this many may be written."""
        require_free_bytes(self._root, needed_bytes + self._free_bytes_min)

    def received_bytes(self, run: str, round_number: int, site: str, digest: str) -> int:
        """Bytes on disk of the upload with this declared digest, whole or not; where the site is to go on."""
        path = self.path(run, round_number, site)
        for candidate in (path, partial_path(path, digest) if is_digest(digest) else path):
            if candidate.is_file():
                return candidate.stat().st_size
        return 0

    def whole(self, run: str, round_number: int, site: str) -> bool:
        """Whether the site's upload has arrived and its digest was right."""
        return self.path(run, round_number, site).is_file()

    def whole_sites(self, run: str, round_number: int) -> list[str]:
        """The sites whose upload of this round is whole, sorted."""
        folder = self._round_folder(run, round_number)
        return sorted(path.name for path in folder.iterdir() if SITE_NAME.fullmatch(path.name)) if folder.is_dir() else []

    def path(self, run: str, round_number: int, site: str) -> Path:
        """Where a whole upload lies, to be read only."""
        if not SITE_NAME.fullmatch(site):
            raise CosiloError("open spool", f"{site[:80]!r} is not a site's name")
        return self._round_folder(run, round_number) / site

    def discard(self, run: str, round_number: int, site: str) -> None:
        """Remove what one site has uploaded in a round, whole or not."""
        path = self.path(run, round_number, site)
        if path.parent.is_dir():
            for file in [path, *partials(path)]:
                file.unlink(missing_ok=True)

    def discard_round(self, run: str, round_number: int) -> None:
        """Remove a round's uploads, and take none for it or an earlier one any more; none there is no error."""
        folder = self._round_folder(run, round_number)
        with self._opening:
            self._over[run] = max(round_number, self._over.get(run, -1))
            _remove(folder)

    def discard_run(self, run: str) -> None:
        """Remove all uploads of a run; none there is no error."""
        _remove(self._run_folder(run))

    def rounds(self) -> list[tuple[str, int]]:
        """Every (run, round) that has a folder here, sorted: what a restarted coordinator compares with its store."""
        return sorted(
            (run.name, int(folder.name))
            for run in self._root.iterdir()
            if is_digest(run.name)
            for folder in run.iterdir()
            if folder.name.isascii() and folder.name.isdigit()
        )

    def _run_folder(self, run: str) -> Path:
        if not is_digest(run):
            raise CosiloError("open spool", f"{run[:80]!r} is not a run: 64 lower-case hex digits")
        return self._root / run

    def _round_folder(self, run: str, round_number: int) -> Path:
        if not 0 <= round_number <= ROUND_MAX:
            raise CosiloError("open spool", f"round {round_number} is not from 0 to {ROUND_MAX}")
        return self._run_folder(run) / str(round_number)


def _remove(folder: Path) -> None:
    for _ in range(_REMOVALS_MAX):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
        if not folder.is_dir():
            return
    raise CosiloError("discard spool", f"{folder}: its files change while they are removed", "restart the coordinator")
