"""Blocking calls in threads, which cancellation waits for, and what they open, which it closes.

A thread cannot be stopped half-way through a write, and a file closed under it is another file's descriptor a moment later; what a call has
opened for a caller who is gone would stay open for good. So a cancelled caller goes on only when the call has ended. Must not know what the
call does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, Protocol, TypeVar

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


class Closable(Protocol):
    """What holds a descriptor."""

    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=Closable)


async def in_thread(call: Callable[Parameters, Answer], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
    """Runs a blocking call in a thread and returns its answer; cancelled, it waits for the call and then cancels."""
    task = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                pass  # asked again: the thread has still to end
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not warn of it
        raise


@asynccontextmanager
async def opened_in_thread(
    call: Callable[Parameters, Opened], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> AsyncIterator[Opened]:
    """Opens something in a thread and closes it at the end of the block; cancelled while it opens, it leaves nothing open."""
    opened: list[Opened] = []

    def open_it() -> None:
        opened.append(call(*args, **kwargs))

    try:
        await in_thread(open_it)
        yield opened[0]
    finally:
        for each in opened:
            each.close()
