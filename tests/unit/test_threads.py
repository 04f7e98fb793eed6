"""A cancelled caller waits for the call that it made in a thread, and what that has opened is closed again."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cosilo_common.threads import in_thread, opened_in_thread


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


async def test_it_closes_what_was_opened_at_the_end_of_the_block() -> None:
    async with opened_in_thread(Thing) as thing:
        assert (made, thing.closed) == ([thing], False)
    assert thing.closed


async def test_it_raises_what_opening_raised() -> None:
    with pytest.raises(OSError, match="no such thing"):
        async with opened_in_thread(Thing, error=OSError("no such thing")):
            raise AssertionError("nothing was opened")


@pytest.mark.parametrize("error", [None, OSError("no such thing")])
async def test_a_caller_who_is_cancelled_while_it_opens_leaves_nothing_open(error: Exception | None) -> None:
    may_open = threading.Event()

    async def use() -> None:
        async with opened_in_thread(Thing, may_open, error):
            raise AssertionError("the caller is gone")

    call = asyncio.ensure_future(use())
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.sleep(0)
    assert not call.done()
    may_open.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [thing.closed for thing in made] == ([True] if error is None else [])


async def test_a_cancelled_caller_goes_on_when_the_call_has_ended_however_often_it_is_asked() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert may_end.wait(20)
        ended.set()

    call = asyncio.ensure_future(in_thread(work))
    for _ in range(3):
        await asyncio.sleep(0)
        call.cancel()
    await asyncio.sleep(0)
    assert not call.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()
