"""One blocking call in a thread, which cancellation waits for.

A thread cannot be stopped half-way through a write, and a file closed under it is another file's descriptor a moment
later. So a cancelled caller goes on only when the call has ended. Must not know what the call does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


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
