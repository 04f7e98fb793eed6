"""What a cancelled call has opened in a thread is closed again."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cosilo_server.services.opened import opened


class Thing:
    def __init__(self, may_open: threading.Event | None = None, error: Exception | None = None) -> None:
        if may_open is not None:
            assert may_open.wait(20)
        if error is not None:
            raise error
        self.closed = False
        made.append(self)

    def close(self) -> None:
        self.closed = True


made: list[Thing] = []


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    made.clear()


async def test_it_gives_what_was_opened() -> None:
    thing = await opened(Thing)
    assert (made, thing.closed) == ([thing], False)


async def test_it_raises_what_opening_raised() -> None:
    with pytest.raises(OSError, match="no such thing"):
        await opened(Thing, error=OSError("no such thing"))


@pytest.mark.parametrize("error", [None, OSError("no such thing")])
async def test_a_cancelled_caller_leaves_nothing_open(error: Exception | None) -> None:
    may_open = threading.Event()
    call = asyncio.ensure_future(opened(Thing, may_open, error))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    may_open.set()
    async with asyncio.timeout(20):
        while error is None and not (made and made[0].closed):
            await asyncio.sleep(0.001)
    assert [thing.closed for thing in made] == ([True] if error is None else [])
