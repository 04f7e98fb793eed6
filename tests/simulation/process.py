"""A process that can be killed: what belongs to it, and every point at which it may die.

Owns the tasks and open files of one incarnation of a party. Code knows which process it runs in by a context variable, which tasks and
simulated threads inherit. A killed process runs no further effect: its tasks are unwound with every write and every send refused, which
leaves the world as SIGKILL would. Must not know what the process does.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.disk import Disk

REAP_ROUNDS_MAX = 10_000  # cancellations of a dead process's tasks before one of them counts as immortal

CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("simulated process", default=None)


class ProcessDied(BaseException):
    """Raised in a process at the point where it is killed, and at every effect it tries after that."""


class Process:
    """One incarnation. points: writes and sends that it has begun or ended; on_death: called once, at the moment of death."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, disk: Disk, on_death: Callable[[Process], None]) -> None:
        self.name = name
        self.disk = disk
        self.alive = True
        self.points = 0
        self.dies_at = 0  # the point at which it dies; 0 for none
        self.died_at_point = ""
        self.crashed: BaseException | None = None  # what its main task raised, where it died of that
        self.dead = asyncio.Event()
        self.files: dict[int, str] = {}
        self._loop = loop
        self._on_death = on_death
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def start(self, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Runs a coroutine in this process."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        return self._loop.create_task(work, name=name or self.name, context=context)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in this process, now."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        return context.run(function, *args)

    def owns(self, task: asyncio.Task[Any]) -> None:
        """Notes a task of this process."""
        self._tasks[task] = None
        task.add_done_callback(self._tasks_done)

    def point(self, what: str) -> None:
        """A moment between one effect and the next: here a process may die. Raises ProcessDied."""
        if not self.alive:
            raise ProcessDied
        self.points += 1
        if self.points == self.dies_at:
            self.died_at_point = what
            self.die()
            raise ProcessDied

    def dies_soon(self, points: int) -> None:
        """Has it die at the point that comes so many later."""
        self.dies_at = self.points + points

    def die(self) -> None:
        """Kills it: nothing that it does has any effect from here on."""
        if self.alive:
            self.alive = False
            self._on_death(self)
            self._loop.call_soon(self.dead.set)

    async def reap(self) -> None:
        """Unwinds what was running, and closes what was open: as the kernel does. Call it from outside the process."""
        for _ in range(REAP_ROUNDS_MAX):
            running = list(self._tasks)
            if not running:
                break
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=1.0)
        else:
            raise AssertionError(f"{self.name}: tasks that do not end: {[task.get_name() for task in self._tasks]}")
        self.close_files()

    def close_files(self) -> None:
        """Closes every descriptor that is still open."""
        for descriptor in list(self.files):
            del self.files[descriptor]
            os.close(descriptor)

    def _tasks_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and self.alive and task.get_name() == self.name:
            self.crashed = error
            self.die()


@contextmanager
def outside() -> Iterator[None]:
    """Within it no process is running: what the simulator itself does there is no effect of anybody's."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)
