"""Files that a call opens in a thread, and that no cancelled call leaves open.

Owns the way from a thread to whoever awaits it, or to nobody. Must not know what is opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar


class Closing(Protocol):
    """What has to be closed."""

    def close(self) -> None: ...


Parameters = ParamSpec("Parameters")
Opened = TypeVar("Opened", bound=Closing)


async def opened(call: Callable[Parameters, Opened], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Opened:
    """What the call opens, in a thread. A caller that is cancelled meanwhile gets nothing, and what is opened for it is closed again."""
    opening = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _close(ended: asyncio.Future[Opened]) -> None:
    if not ended.cancelled() and ended.exception() is None:
        ended.result().close()
