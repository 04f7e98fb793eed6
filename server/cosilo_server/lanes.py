"""Threads that each fill buffers of one chunk, in order, in memory that does not grow with the vector.

Owns the threads and the recycling of buffers. Must not know what a chunk holds. Threads pay because numpy, hashlib and
cryptography (50 and later) let go of the interpreter's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

import numpy as np

from cosilo_common.secagg.masks import CHUNK_WORDS, WORD, Words, Workspace

LANE_DEPTH: Final = 2  # one chunk being used while the next is made: more only costs memory
WORKERS_MAX: Final = 16  # past this the memory bus is the limit

Fill = Callable[[int, Words, Workspace], None]
"""Fills a buffer with a chunk, by its number, with the lane's own workspace."""


class Lanes:
    """Threads that each fill buffers of one chunk for their own sequence of chunk numbers, in order.

    Buffers are recycled: the one that `take` returns is valid until the same lane's next `take`. Leaving the block
    stops the threads.
    """

    def __init__(self, jobs: Sequence[Sequence[int]], fill: Fill | Sequence[Fill]) -> None:
        fills = [fill] * len(jobs) if callable(fill) else fill
        self._lanes = [_Lane(sequence, each) for sequence, each in zip(jobs, fills, strict=True)]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for lane in self._lanes:
            lane.start()
            self._stack.callback(lane.stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def take(self, lane: int) -> Words:
        """The lane's next chunk. Raises what filling it raised."""
        return self._lanes[lane].take()


class _Lane:
    def __init__(self, jobs: Sequence[int], fill: Fill) -> None:
        self._jobs, self._fill = jobs, fill
        self._free: queue.SimpleQueue[Words | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[Words | BaseException] = queue.SimpleQueue()  # bounded by the buffers there are
        self._taken: Words | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chunk-lane", daemon=True)

    def start(self) -> None:
        for _ in range(LANE_DEPTH):
            self._free.put(np.empty(CHUNK_WORDS, dtype=WORD))
        self._thread.start()

    def take(self) -> Words:
        if self._taken is not None:
            self._free.put(self._taken)
            self._taken = None
        item = self._filled.get()  # ends: the thread puts a chunk or the exception that ended it
        if isinstance(item, BaseException):
            raise item
        self._taken = item
        return item

    def stop(self) -> None:
        self._stopping.set()
        self._free.put(None)
        self._thread.join()

    def _run(self) -> None:
        workspace = Workspace()
        try:
            for chunk in self._jobs:
                buffer = self._free.get()
                if buffer is None or self._stopping.is_set():
                    return
                self._fill(chunk, buffer, workspace)
                self._filled.put(buffer)
            # not raised here: a traceback would hold this frame, and with it the buffers, in a cycle
            self._filled.put(IndexError("the lane has no more chunks"))
        except BaseException as error:  # handed to the thread that takes
            self._filled.put(error)


def check_workers(workers: int) -> int:
    """Returns workers if it is from 1 to 16."""
    if not 1 <= workers <= WORKERS_MAX:
        raise ValueError(f"workers are from 1 to {WORKERS_MAX}, not {workers}")
    return workers
