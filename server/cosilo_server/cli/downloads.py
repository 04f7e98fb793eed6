"""Artifacts on their way to the admin's machine: resumed at an offset, decided by a digest.

Must not know what the bytes mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cosilo_common.diffusion.lora import Lora, LoraBase
from cosilo_common.errors import CosiloError
from cosilo_common.transfer import FileSink, file_digest, partial_path
from cosilo_server.cli.terminal import CoordinatorUnreachable, note, short

if TYPE_CHECKING:
    from cosilo_server.cli.connection import Coordinator

FRUITLESS_TRIES_MAX = 5  # in a row without one new byte; a link that is only slow never comes here
RETRY_PAUSE_S = 1.0


def download(coordinator: Coordinator, digest: bytes, to: Path, sleep: Callable[[float], None] = time.sleep) -> int:
    """Fetches an artifact (SHA-256, 32 bytes) into a file; returns its length in bytes.

    A file there that has the digest is left alone; another one is replaced, so callers ask first. What arrived before
    a failure stays beside `to` and is used by the next call. Raises CosiloError, and CoordinatorUnreachable where no
    more bytes come.
    """
    if to.is_file() and file_digest(to) == digest.hex():
        return to.stat().st_size
    if not to.parent.is_dir():
        raise CosiloError("download", f"{to.parent} is not a folder", "make it, or name another place")
    fruitless = 0
    while True:
        before = _held(to, digest)
        try:
            return _fetch(coordinator, digest, to)
        except CoordinatorUnreachable as error:
            fruitless = 0 if _held(to, digest) > before else fruitless + 1
            if (before == 0 and fruitless) or fruitless >= FRUITLESS_TRIES_MAX:
                raise
            note(f"connection lost at byte {_held(to, digest)}, resuming: {error.subject}")
            sleep(RETRY_PAUSE_S)


def download_base(coordinator: Coordinator, lora: Lora, folder: Path) -> LoraBase:
    """Fetches what a run's adapters stand on into a folder, as a hidden file that the caller removes. Raises as `download`."""
    path = folder / f".{short(lora.base)}.base.safetensors"
    download(coordinator, bytes.fromhex(lora.base), path)
    return LoraBase(lora, path)


def _fetch(coordinator: Coordinator, digest: bytes, to: Path) -> int:
    """One attempt, from where the last one ended."""
    from cosilo_common.rpc.v1 import site_pb2

    offset = _held(to, digest)
    question = site_pb2.GetArtifactRequest(digest=digest, offset=offset)
    with coordinator.stream("download", coordinator.site.GetArtifact, question) as answers:
        first = next(answers, None)
        if first is None:
            raise CoordinatorUnreachable("download", f"artifact {short(digest)}: the stream ended before its first byte")
        with FileSink(to, first.total_bytes, digest.hex()) as sink:
            if sink.offset != offset:
                raise CosiloError("download", f"{to}: what lay there of it is longer than the whole", "run the command again")
            if first.data:
                sink.append(sink.offset, first.data)
            for answer in answers:
                sink.append(sink.offset, answer.data)
            if not sink.complete:
                raise CoordinatorUnreachable("download", f"artifact {short(digest)}: the stream ended at byte {sink.offset} of {sink.size}")
            sink.finish()
            return sink.size


def _held(to: Path, digest: bytes) -> int:
    """Bytes of it that are here already."""
    try:
        return partial_path(to, digest.hex()).stat().st_size
    except FileNotFoundError:
        return 0
