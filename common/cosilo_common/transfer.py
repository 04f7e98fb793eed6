"""Files in chunks: read from any offset, received in order, resumed by offset, decided by digest.

Owns the two ends of a transfer and the check for free space. Every call here may block on the disk: callers on an event
loop use a thread. Must not know grpc, rounds, or what the bytes mean.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from cosilo_common.errors import CosiloError

CHUNK_BYTES = 1 << 20
"""1 MiB: where gRPC's throughput stops growing (docs/decisions.md), and 2^18 words, as chunk k of docs/protocol.md."""
FILE_BYTES_MAX = 1 << 42
"""4 TiB: the largest vector that weights.py allows. A declared size above it is a lie."""

_SEND = "send file"
_RECEIVE = "receive file"


class Refusal(Enum):
    """Why a transfer was refused; the value is a metric's label."""

    BAD_DECLARATION = "bad_declaration"
    BUSY = "busy"
    OUT_OF_ORDER = "out_of_order"
    OVERSIZE = "oversize"
    INCOMPLETE = "incomplete"
    STALLED = "slow_upload"
    DIGEST = "digest"
    DISK = "disk"
    SOURCE = "source"


class TransferError(CosiloError):
    """A refused transfer: `refusal` for the program, the rest for the reader."""

    def __init__(self, refusal: Refusal, operation: str, subject: str, hint: str = "") -> None:
        super().__init__(operation, subject, hint)
        self.refusal = refusal


class FileSource:
    """A file that is being sent: its size is what it was when it was opened, and chunks are read wherever they are
    asked for.

    path: the file; it must not change while it is sent. Raises TransferError where it cannot be read or has shrunk.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TransferError(Refusal.SOURCE, _SEND, f"{path.name}: {error.strerror}") from None
        self.size = os.fstat(self._fd).st_size

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        """The bytes from `offset` on, CHUNK_BYTES at a time; nothing where `offset` is the size."""
        while chunk := self.chunk_at(offset):
            yield chunk
            offset += len(chunk)

    def chunk_at(self, offset: int) -> bytes:
        """At most CHUNK_BYTES from `offset`, 0 <= offset <= size; empty at the end."""
        if not 0 <= offset <= self.size:
            raise TransferError(Refusal.OUT_OF_ORDER, _SEND, f"{self._name}: offset {offset} of {self.size} bytes")
        wanted = min(CHUNK_BYTES, self.size - offset)
        chunk = os.pread(self._fd, wanted, offset)
        if len(chunk) != wanted:
            raise TransferError(Refusal.SOURCE, _SEND, f"{self._name}: the file shrank below {offset + wanted} bytes")
        return chunk

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class FileSink:
    """A file that is being received: chunks are appended at exactly `offset`, and `finish` puts the file in place if
    its digest is right.

    What has arrived lies in a partial file beside `path` whose name holds the declared digest, so a sink opened again,
    in this process or a later one, goes on at `offset`; another digest's partial of the same `path` is removed. One
    sink at a time holds a partial (a lock on it). size: declared bytes, 0 .. FILE_BYTES_MAX; digest: lower-case hex
    SHA-256. Files are made 0600.
    """

    def __init__(self, path: Path, size: int, digest: str) -> None:
        if not 0 <= size <= FILE_BYTES_MAX:
            raise TransferError(Refusal.BAD_DECLARATION, _RECEIVE, f"{path.name}: declared size {size}")
        if not is_digest(digest):
            raise TransferError(Refusal.BAD_DECLARATION, _RECEIVE, f"{path.name}: declared digest is not 64 lower-case hex digits")
        self.size = size
        self.digest = digest
        self._path = path
        self._partial = partial_path(path, digest)
        self._fd = self._open_locked()
        for other in partials(path):
            if other != self._partial:
                other.unlink(missing_ok=True)
        self.offset = os.fstat(self._fd).st_size
        if self.offset > size:  # not what was declared: begin again
            os.ftruncate(self._fd, 0)
            self.offset = 0
        # A resumed file is hashed as a whole at the end, not now: the answer "go on at N" never waits for gigabytes.
        self._hash = hashlib.sha256() if self.offset == 0 else None

    @property
    def complete(self) -> bool:
        """All declared bytes are here; only `finish` says whether they are the right ones."""
        return self.offset == self.size

    def takes(self, count: int) -> bool:
        """Whether a chunk of so many bytes may come next, going by its length alone."""
        return 0 < count <= min(CHUNK_BYTES, self.size - self.offset)

    def append(self, offset: int, chunk: bytes | memoryview) -> None:
        """Store the bytes that begin at `offset`, which must be the sink's own offset.

        Raises TransferError, storing nothing, for another offset, an empty or too large chunk, or bytes past the
        declared size; and where the disk is full, naming how many bytes are missing. The sink goes on at its offset
        after any of these.
        """
        if offset != self.offset:
            raise TransferError(
                Refusal.OUT_OF_ORDER,
                _RECEIVE,
                f"{self._path.name}: chunk at {offset}, expected {self.offset}",
                "resume at that offset",
            )
        if not 0 < len(chunk) <= CHUNK_BYTES:
            raise TransferError(
                Refusal.OVERSIZE,
                _RECEIVE,
                f"{self._path.name}: chunk of {len(chunk)} bytes, allowed are 1 to {CHUNK_BYTES}",
            )
        if offset + len(chunk) > self.size:
            raise TransferError(
                Refusal.OVERSIZE,
                _RECEIVE,
                f"{self._path.name}: {offset + len(chunk)} bytes would pass the declared {self.size}",
            )
        try:
            view = memoryview(chunk)
            while view:
                view = view[os.pwrite(self._fd, view, offset + len(chunk) - len(view)) :]
        except OSError as error:
            os.ftruncate(self._fd, self.offset)
            missing = max(0, self.size - self.offset - free_bytes(self._path.parent))
            raise TransferError(
                Refusal.DISK,
                _RECEIVE,
                f"{self._path.name}: {error.strerror}; {missing} bytes are missing",
                "free space, then try again",
            ) from None
        self.offset += len(chunk)
        if self._hash is not None:
            self._hash.update(chunk)

    def finish(self) -> Path:
        """Check the digest, put the file on disk for good (fsync) and in place; returns its path.

        Raises TransferError: INCOMPLETE (what has arrived is kept), or DIGEST (what has arrived is discarded: begin
        again at 0).
        """
        if not self.complete:
            raise TransferError(
                Refusal.INCOMPLETE,
                _RECEIVE,
                f"{self._path.name}: {self.offset} of {self.size} bytes",
                "resume at that offset",
            )
        found = self._hash.hexdigest() if self._hash is not None else file_digest(self._partial)
        if found != self.digest:
            self.discard()
            raise TransferError(
                Refusal.DIGEST,
                _RECEIVE,
                f"{self._path.name}: SHA-256 {found}, declared {self.digest}; discarded",
                "send it again from the start",
            )
        try:
            os.fsync(self._fd)
            self._partial.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise TransferError(Refusal.DISK, _RECEIVE, f"{self._path.name}: {error.strerror}", "try again") from None
        self.close()
        return self._path

    def discard(self) -> None:
        """Remove what has arrived and close."""
        if self._fd >= 0:
            self._partial.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Keep what has arrived for a later resumption."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_locked(self) -> int:
        try:
            fd = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise TransferError(Refusal.DISK, _RECEIVE, f"{self._path.name}: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), self._partial.stat()):
                raise FileExistsError  # it was another's, finished between our open and our lock
        except OSError:
            os.close(fd)
            raise TransferError(
                Refusal.BUSY, _RECEIVE, f"{self._path.name}: another transfer of it is under way", "end that one first"
            ) from None
        return fd


def is_digest(text: str) -> bool:
    """Whether `text` is a SHA-256 as Cosilo writes it: 64 lower-case hex digits."""
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)


def file_digest(path: Path) -> str:
    """Lower-case hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_path(path: Path, digest: str) -> Path:
    """Where the bytes of a transfer to `path` with this declared digest lie until it is finished."""
    return path.with_name(f"{path.name}.{digest}.part")


def partials(path: Path) -> list[Path]:
    """Every unfinished transfer to `path`."""
    prefix = path.name + "."
    return [
        other
        for other in path.parent.iterdir()
        if other.name.startswith(prefix) and other.suffix == ".part" and is_digest(other.name[len(prefix) : -len(".part")])
    ]


def require_free_bytes(path: Path, needed_bytes: int) -> None:
    """Raise CosiloError, naming the bytes that are missing, unless the disk that holds `path` (which need not exist
    yet) has this many free.
    """
    free = free_bytes(path)
    if free < needed_bytes:
        raise CosiloError(
            "check free space",
            f"{path}: {needed_bytes} bytes needed, {free} free, {needed_bytes - free} bytes missing",
            "free space on that disk, or point the folder at a larger one",
        )


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write on the disk of `path` or of its nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
