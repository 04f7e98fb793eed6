"""Bytes by digest: checkpoints, sample grids, manifests.

Owns the artifacts folder: a file is there whole and under its own SHA-256, or not at all. Must not know rounds, runs,
or what the bytes mean. Every call may block on the disk: callers on an event loop use a thread.
"""

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cosilo_common.errors import CosiloError
from cosilo_common.transfer import file_digest, is_digest, sync_folder

_SCRATCH = "scratch"
LINGERS_MAX = 24  # a cut download that is resumed lasts hours on the slowest line; after these many lingers, who reads on keeps nothing


class Artifacts:
    """The artifacts folder of one coordinator.

    root: made if it is missing (0700). What an earlier process left unfinished is removed. Every digest that is passed
    in is checked before it becomes a file name; raises CosiloError for one that is not 64 lower-case hex digits, or
    that is not here.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._unclaimed: dict[str, float] = {}  # put by this process at that time, and not yet seen in the store
        self._readers: Counter[str] = Counter()
        self._read_at: dict[str, float] = {}  # of those that were read since the process began, when last
        self._spared_at: dict[str, float] = {}  # of those that lingered, when first
        self._scratch = root / _SCRATCH
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._scratch.iterdir():
            left.unlink()

    @property
    def root(self) -> Path:
        """The folder, for asking how much space is free."""
        return self._root

    @contextmanager
    def scratch(self, suffix: str = "") -> Iterator[Path]:
        """A path for a file in the making, on the artifacts' own disk; whatever is there when the `with` block ends is
        removed.
        """
        fd, name = tempfile.mkstemp(suffix=suffix, dir=self._scratch)
        os.close(fd)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def put_file(self, path: Path) -> str:
        """Move a finished file of the same disk into the store; returns its digest. Putting the same bytes twice is
        harmless.
        """
        digest = file_digest(path)
        path.chmod(0o600)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        with self._lock:
            self._unclaimed[digest] = time.time()
            path.replace(self._root / digest)
        sync_folder(self._root)
        return digest

    def put_bytes(self, content: bytes) -> str:
        """Store a small content, such as a manifest; returns its digest."""
        with self.scratch() as path:
            path.write_bytes(content)
            return self.put_file(path)

    def has(self, digest: str) -> bool:
        return self._checked(digest).is_file()

    def path(self, digest: str) -> Path:
        """Where the artifact lies, to be read only."""
        path = self._checked(digest)
        if not path.is_file():
            raise CosiloError("open artifact", f"{digest} is not in the store", "look it up with `cosilo checkpoint list`")
        return path

    def open(self, digest: str) -> BinaryIO:
        """The artifact's bytes, from the start."""
        return self.path(digest).open("rb")

    def size(self, digest: str) -> int:
        """Bytes of the artifact."""
        return self.path(digest).stat().st_size

    def digests(self) -> list[str]:
        """Everything in the store, sorted."""
        return sorted(path.name for path in self._root.iterdir() if is_digest(path.name))

    def verify(self, digest: str) -> None:
        """Hash the artifact again; raises CosiloError where its bytes are not those of its name."""
        found = file_digest(self.path(digest))
        if found != digest:
            raise CosiloError(
                "verify artifact",
                f"{digest} has the bytes of {found}",
                "restore it from a backup: the disk has damaged it",
            )

    def delete(self, digest: str) -> None:
        """Remove an artifact; one that is not there is no error."""
        self._checked(digest).unlink(missing_ok=True)

    @contextmanager
    def lease(self, digest: str) -> Iterator[Path]:
        """The artifact's path; nothing deletes it before the `with` block ends, and for a while after."""
        with self._lock:
            path = self.path(digest)
            self._readers[digest] += 1
        try:
            yield path
        finally:
            with self._lock:
                self._readers[digest] -= 1
                self._read_at[digest] = time.monotonic()
                if not self._readers[digest]:
                    del self._readers[digest]

    def has_been_read(self, digest: str) -> None:
        """The last reader has it whole: it will not resume."""
        with self._lock:
            self._read_at.pop(digest, None)

    def claim(self, stored: Mapping[str, float]) -> None:
        """What has arrived in the store, and when, UTC seconds: once nothing refers to it any more, it may be deleted. What was put again
        since is on its way there once more.
        """
        with self._lock:
            for digest in [digest for digest, at in self._unclaimed.items() if at <= stored.get(digest, -1.0)]:
                del self._unclaimed[digest]

    def delete_idle(self, digest: str, linger_s: float) -> bool:
        """Delete an artifact that nothing refers to; False where it is being read, was read within linger_s (but for LINGERS_MAX of those at
        most), or was put and never claimed: what it is for is still on its way to the store.
        """
        with self._lock:
            now = time.monotonic()
            if digest in self._readers or digest in self._unclaimed:
                return False
            lingers = now - self._read_at.get(digest, float("-inf")) < linger_s
            # A site that reads one byte every few minutes would keep every checkpoint there ever was.
            if lingers and now - self._spared_at.setdefault(digest, now) < LINGERS_MAX * linger_s:
                return False
            self._read_at.pop(digest, None)
            self._spared_at.pop(digest, None)
            self.delete(digest)
            return True

    def _checked(self, digest: str) -> Path:
        if not is_digest(digest):
            raise CosiloError("open artifact", f"{digest[:80]!r} is not a digest: 64 lower-case hex digits")
        return self._root / digest
