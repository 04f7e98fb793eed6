"""Chunks between an event loop and a file: one is read ahead of a sender, one is written behind a receiver.

Owns the overlap of disk, digest and network, and that no thread outlives it: a file is never closed under a read or write that still runs.
Must not know grpc, nor what the bytes mean. Memory is one chunk more than without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

from cosilo_common.framing import frame_data
from cosilo_common.transfer import FileSink, FileSource


async def frames_from(source: FileSource, offset: int) -> AsyncGenerator[tuple[bytes, int]]:
    """(message, bytes of data in it) from `offset` to the end, framed for the wire; the next is read while one is sent.

    Close it (contextlib.aclosing) before the source. Raises what reading raises.
    """
    reading = _start(_read, source, offset)
    try:
        while True:
            message, count = await asyncio.shield(reading)
            if not count:
                return
            offset += count
            reading = _start(_read, source, offset)
            yield message, count
            del message
    finally:
        await _ended(reading)


class WriteBehind:
    """A sink whose last chunk may still be on its way to the disk. Use it as a context; leave it before the sink is closed.

    `append` gives the sink a chunk and returns once the one before it is stored; `settle` waits for the last. Both raise what storing raised.
    """

    def __init__(self, sink: FileSink) -> None:
        self._sink = sink
        self._writing: asyncio.Future[None] | None = None
        self.offset = sink.offset  # as it will be when all is stored

    async def append(self, chunk: bytes | memoryview) -> None:
        """Stores the bytes that come next. A chunk that the sink refuses is refused at once."""
        await self.settle()
        self._writing = _start(self._sink.append, self.offset, chunk)
        if not self._sink.takes(len(chunk)):
            await self.settle()
        self.offset += len(chunk)

    async def settle(self) -> None:
        """Returns when every chunk so far is stored."""
        if self._writing is not None:
            await asyncio.shield(self._writing)
            self._writing = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._writing is not None:
            await _ended(self._writing)


def _read(source: FileSource, offset: int) -> tuple[bytes, int]:
    chunk = source.chunk_at(offset)
    return frame_data(chunk), len(chunk)


def _start(call: Any, *args: Any) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().run_in_executor(None, call, *args)


async def _ended(work: asyncio.Future[Any]) -> None:
    """Waits for a thread's end, whoever cancels the wait meanwhile; what it raised is the business of whoever waited for its result."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    if not work.cancelled():
        work.exception()  # seen, so that asyncio does not warn of it
    if cancelled:
        raise asyncio.CancelledError
