"""Weights that were fetched, by digest, in a folder with a size limit.

Owns the folder: what is in it is whole and was hashed when it arrived, and is hashed again when it is asked for,
because a digest decides, never a name or a size. Blocks on the disk: callers on an event loop use a thread. Must not
know gRPC, rounds or what the bytes mean.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from cosilo_client.durable import make_folder
from cosilo_common.errors import CosiloError
from cosilo_common.step import StepHeader, apply_step
from cosilo_common.transfer import FileSink, file_digest, is_digest, partial_path, partials, require_free_bytes, sync_folder

FREE_MARGIN_BYTES: Final = 64 << 20  # for the ledger, the log and whatever else shares the disk

log = logging.getLogger("cosilo.artifacts")


class ArtifactCache:
    """A folder of artifacts. limit_bytes: what it may hold; the least recently used go first, those in use never."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        make_folder(folder)
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._in_use: dict[tuple[bytes, str], bytes] = {}

    def path(self, digest: bytes) -> Path:
        """Where an artifact lies once it is here. digest: 32 bytes."""
        return self._folder / digest.hex()

    def use(self, run: bytes, digest: bytes, purpose: str = "weights") -> None:
        """Keeps one artifact a run and purpose from being evicted: the one that its round needs."""
        self._in_use[run, purpose] = digest

    def release(self, run: bytes, purpose: str) -> None:
        """Lets an artifact be evicted again."""
        self._in_use.pop((run, purpose), None)

    def forget(self, digest: bytes) -> None:
        """Removes an artifact that nobody will ask for again."""
        self.path(digest).unlink(missing_ok=True)

    def has(self, digest: bytes) -> bool:
        """Whether a file of that name is here; `find` says whether it is right."""
        return self.path(digest).exists()

    def stepped(self, header: StepHeader, step: bytes, size_bytes: int) -> Path:
        """The artifact of size_bytes that a step leads to, from one that is here; the step's file is then removed.

        Raises CosiloError, leaving nothing, where the disk lacks room, or the step makes anything else.
        """
        made = bytes.fromhex(header.made)
        self._make_room(made, size_bytes)
        require_free_bytes(self._folder, size_bytes + FREE_MARGIN_BYTES)
        growing = partial_path(self.path(made), header.made).with_suffix(".step")  # not what a fetch would go on with
        try:
            apply_step(self.path(bytes.fromhex(header.base)), self.path(step), growing, header)
            growing.replace(self.path(made))
            sync_folder(self._folder)
        except OSError as error:
            raise CosiloError("apply step", f"{self._folder}: {error.strerror}", "free space on that disk") from None
        self.forget(step)
        return self.path(made)

    def find(self, digest: bytes) -> Path | None:
        """The artifact, if it is here and its bytes are still the right ones; wrong ones are removed."""
        path = self.path(digest)
        if not path.exists():
            return None
        if file_digest(path) != digest.hex():
            log.warning("artifact %s has rotted on the disk: fetching it again", digest.hex()[:12])
            path.unlink()
            return None
        path.touch()
        return path

    def sink(self, digest: bytes, size_bytes: int) -> FileSink:
        """Where an artifact is received, resuming what arrived before. Raises CosiloError where the disk lacks room."""
        self._make_room(digest, size_bytes)
        arrived = sum(part.stat().st_size for part in partials(self.path(digest)))
        require_free_bytes(self._folder, max(0, size_bytes - arrived) + FREE_MARGIN_BYTES)
        return FileSink(self.path(digest), size_bytes, digest.hex())

    def _make_room(self, digest: bytes, size_bytes: int) -> None:
        kept = {held.hex() for held in self._in_use.values()} | {digest.hex()}
        entries = sorted(
            ((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._folder.iterdir()),
            key=lambda entry: entry[:2],
        )
        total = sum(size for _, size, path in entries if not path.name.startswith(digest.hex()))
        for _, size, path in entries:
            if total + size_bytes <= self._limit_bytes:
                return
            if is_digest(path.name[:64]) and path.name[:64] not in kept:
                path.unlink(missing_ok=True)
                total -= size
