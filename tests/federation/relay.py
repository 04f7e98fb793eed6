"""A TCP relay of a test's own between sites and the coordinator: it delays, limits, cuts at a byte, stalls and swallows.

Owns a listening port and a thread with an event loop of its own, so that it serves tests with and without one. Must not know TLS, gRPC or what
travels: it counts bytes. Its own buffers are small, so that what it took from a sender is what it handed on, but for one read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self, TypeVar

Answer = TypeVar("Answer")

READ_BYTES: Final = 16 << 10  # a cut lies where it was asked for to the byte; a rate is held in steps of this
SOCKET_BYTES: Final = 64 << 10  # kernel buffers of the relay's sockets: a real link holds little
END_S: Final = 5.0  # for connections to end once they are reset
QUEUE_BYTES_MAX: Final = 4 << 20  # bytes on their way through a delay; at 200 ms this is no limit below 20 MB/s


class Direction(Enum):
    """up: from the site to the coordinator; down: the other way."""

    UP = "up"
    DOWN = "down"


class Fault(Enum):
    """What is wrong with the link.

    STALL: nothing is read, so that senders' buffers fill; TCP lives. BLACK_HOLE: everything is read and thrown away: the link looks well to
    both ends, and nothing arrives.
    """

    NONE = "none"
    STALL = "stall"
    BLACK_HOLE = "black hole"


@dataclass(eq=False)
class _Link:
    """One connection through the relay, and what it carried each way."""

    site: asyncio.StreamWriter
    coordinator: asyncio.StreamWriter
    carried: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))

    def abort(self) -> None:
        """Both ends get a reset."""
        for writer in (self.site, self.coordinator):
            with contextlib.suppress(Exception):
                transport: Any = writer.transport
                transport.abort()


class Relay:
    """Relays to one address until it is closed. rate_bytes_per_s: each way, each connection; delay_s: each way; None and 0 for neither."""

    def __init__(self, address: str, *, rate_bytes_per_s: float | None = None, delay_s: float = 0.0) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._rate, self._delay_s = rate_bytes_per_s, delay_s
        self._fault = Fault.NONE
        self._links: set[_Link] = set()
        self._cuts: dict[Direction, list[int]] = {direction: [] for direction in Direction}
        self._faults_at: dict[Direction, tuple[int, Fault]] = {}
        self._refusing = False
        self.carried = dict.fromkeys(Direction, 0)
        self.cuts = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        self._server = self._call(self._listen)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def retarget(self, address: str) -> None:
        """New connections go to another address."""
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))

    def shape(self, rate_bytes_per_s: float | None, delay_s: float) -> None:
        """Another rate and delay, also of connections that stand."""
        self._rate, self._delay_s = rate_bytes_per_s, delay_s

    def set_fault(self, fault: Fault) -> None:
        """From now on, for connections that stand and new ones. Ends what stands where a black hole is mended: its bytes are lost."""
        before, self._fault = self._fault, fault
        if before is Fault.BLACK_HOLE and fault is not Fault.BLACK_HOLE:
            self.cut()

    def refuse(self, refusing: bool) -> None:
        """Refuses new connections, and ends those that stand: a partition that both ends see at once."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def cut(self) -> int:
        """Resets every connection that stands; returns how many stood."""

        async def cut() -> int:
            links = list(self._links)
            for link in links:
                link.abort()
            return len(links)

        return self._call(cut)

    def cut_at(self, direction: Direction, *counts: int) -> None:
        """The next connections, one a count, are cut after exactly so many bytes in a direction."""
        self._cuts[direction].extend(counts)

    def forget_cuts(self) -> None:
        """Takes back cuts that no connection has met yet."""
        for counts in self._cuts.values():
            counts.clear()

    def fault_at(self, direction: Direction, count: int, fault: Fault) -> None:
        """The link has the fault as soon as a connection has carried so many bytes in a direction."""
        self._faults_at[direction] = (count, fault)

    @property
    def fault(self) -> Fault:
        """What is wrong with the link now."""
        return self._fault

    @property
    def standing(self) -> int:
        """Connections that stand."""
        return len(self._links)

    def close(self) -> None:
        """Ends every connection and the thread."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            self._fault = Fault.NONE
            self._server.close()
            for link in list(self._links):
                link.abort()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            if not tasks:
                return
            _, left = await asyncio.wait(tasks, timeout=END_S)  # each ends by itself, now that its connections are gone
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self._call(end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- in the relay's own loop ---

    def _call(self, work: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(30)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=READ_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection(*self._target, limit=READ_BYTES)
        except OSError:
            writer.transport.abort()
            return
        for end in (writer, back):
            found = end.get_extra_info("socket")
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                found.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
            end.transport.set_write_buffer_limits(high=READ_BYTES)
        link = _Link(writer, back)
        self._links.add(link)
        cuts = {d: counts.pop(0) for d, counts in self._cuts.items() if counts}
        ways = [
            asyncio.ensure_future(self._carry(link, Direction.UP, reader, back, cuts.get(Direction.UP))),
            asyncio.ensure_future(self._carry(link, Direction.DOWN, there, writer, cuts.get(Direction.DOWN))),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._links.discard(link)
            link.abort()

    async def _carry(
        self, link: _Link, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: int | None
    ) -> None:
        """One way of one connection; returns where it ends."""
        queue: deque[tuple[float, bytes]] = deque()
        more, room = asyncio.Event(), asyncio.Event()
        room.set()
        waiting = 0
        handing = asyncio.ensure_future(self._hand_on(queue, more, room, writer, lambda n: note(-n)))

        def note(count: int) -> None:
            nonlocal waiting
            waiting += count
            (room.set if waiting < QUEUE_BYTES_MAX else room.clear)()

        try:
            while not handing.done():
                while self._fault is Fault.STALL:
                    await asyncio.sleep(0.02)
                await room.wait()
                left = READ_BYTES if cut is None else min(READ_BYTES, cut - link.carried[direction])
                data = await reader.read(left) if left else b""
                while self._fault is Fault.STALL and data:  # it came while this way waited to read: held, and not counted
                    await asyncio.sleep(0.02)
                if not data:
                    if left == 0:
                        await self._drained(queue, handing)
                        self.cuts += 1
                    return
                link.carried[direction] += len(data)
                self.carried[direction] += len(data)
                self._count_down(link, direction)
                if self._fault is not Fault.BLACK_HOLE:
                    note(len(data))
                    queue.append((time.monotonic() + self._delay_s, data))
                    more.set()
                if self._rate:
                    await asyncio.sleep(len(data) / self._rate)
        except (ConnectionError, OSError):
            return
        finally:
            handing.cancel()
            await asyncio.gather(handing, return_exceptions=True)

    def _count_down(self, link: _Link, direction: Direction) -> None:
        armed = self._faults_at.get(direction)
        if armed is not None and link.carried[direction] >= armed[0]:
            del self._faults_at[direction]
            self._fault = armed[1]

    async def _drained(self, queue: deque[tuple[float, bytes]], handing: asyncio.Future[None]) -> None:
        while queue and not handing.done():
            await asyncio.sleep(0.005)

    async def _hand_on(
        self,
        queue: deque[tuple[float, bytes]],
        more: asyncio.Event,
        room: asyncio.Event,
        writer: asyncio.StreamWriter,
        taken: Callable[[int], None],
    ) -> None:
        while True:
            while not queue:
                more.clear()
                await more.wait()
            due, data = queue[0]
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            writer.write(data)
            await writer.drain()
            queue.popleft()
            taken(len(data))
