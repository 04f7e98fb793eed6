"""The simulator's event loop: asyncio with a clock that jumps and threads that run in it, one callback after another.

Owns time and the order in which things happen. Nothing here waits: where the loop would sleep, the clock moves. What production code
hands to a thread runs inline, later by a drawn while, so that whatever it races with gets its chance. Must not know what runs on it.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Callable
from typing import Any

from tests.simulation.process import CURRENT, ProcessDied

STALL_CALLBACKS_MAX = 400_000  # callbacks without the clock moving: something spins
THREAD_SLOW = 0.05  # share of thread calls that take long enough for messages to overtake them
THREAD_S = 0.004
THREAD_SLOW_S = 1.5


class Stalled(Exception):
    """Nothing is scheduled any more, or callbacks go round without the clock moving."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """time() is simulated seconds from 0; events counts the callbacks that have run."""

    def __init__(self, randomness: random.Random) -> None:
        super().__init__()
        self._random = randomness
        self._now = 0.0
        self._clock_resolution = 1e-7
        self._since_moved = 0
        self.events = 0
        self.on_exception: Callable[[dict[str, Any]], None] | None = None
        self.set_exception_handler(self._exception)

    def time(self) -> float:
        """Simulated seconds."""
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:  # type: ignore[override]  # typeshed's TypeVars
        """As the base's, without its looks at threads and debugging: most of what a simulation does passes here."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]  # BaseEventLoop's own queue
        return handle

    def _run_once(self) -> None:
        """One turn, as the base's; where that waits for sockets, this moves the clock."""
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]  # BaseEventLoop's own queues
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        self.events += len(ready)
        self._since_moved += len(ready)
        if not ready:
            if not scheduled:
                raise Stalled("nothing is scheduled: every task waits for another")
            if scheduled[0]._when > self._now:
                self._now += scheduled[0]._when - self._now  # by the base's sum: its last bit is in every history
                self._since_moved = 0
        if self._since_moved > STALL_CALLBACKS_MAX:
            raise Stalled(f"{self._since_moved} callbacks ran at {self._now:.3f} s and the clock did not move")
        due = self._now + self._clock_resolution
        while scheduled and scheduled[0]._when < due:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def create_task(self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None) -> asyncio.Task[Any]:  # type: ignore[override]  # typeshed's overloads
        """A task belongs to the process in whose context it is made, and dies with it."""
        task = super().create_task(coro, name=name, context=context)
        process = CURRENT.get() if context is None else context.get(CURRENT)
        if process is not None:
            process.owns(task)
        return task

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]  # runs here
        """Runs the call in the loop after a while. A cancelled waiter does not always stop it: a thread cannot be stopped."""
        future: asyncio.Future[Any] = self.create_future()
        draw = self._random.random()
        process = CURRENT.get()

        def run() -> None:
            if process is not None and not process.alive:
                if not future.done():
                    future.set_exception(ProcessDied())
                return
            if future.cancelled() and draw > 0.7:  # it had not begun
                return
            try:
                result = func(*args)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        if draw < 0.4:
            self.call_soon(run)
        else:
            self.call_later(self._random.random() * (THREAD_SLOW_S if draw > 1 - THREAD_SLOW else THREAD_S), run)
        return future

    def _write_to_self(self) -> None:
        pass

    def _exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ProcessDied | asyncio.CancelledError | GeneratorExit):
            return
        if self.on_exception is not None:
            self.on_exception(context)
