"""The links between sites and their coordinator: what may happen to a message on its way, and to the connection that it is on.

Owns connections, latency, partitions, and who notices a broken link first. What TCP and gRPC promise is kept (messages of one call arrive in order
or the call breaks); what they do not promise is drawn. Must not know what a call is for, nor what messages mean.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc

from tests.simulation.process import Process

if TYPE_CHECKING:
    from tests.simulation.wire import Call

KEEPALIVE_S: Final = (12.0, 27.0)  # KEEPALIVE_MS and KEEPALIVE_TIMEOUT_MS of cosilo_common.identity.tls: when a silent link is noticed


@dataclass
class Weather:
    """How likely a message is to meet each fault, and how slow links are. All are zero in fair weather."""

    latency_s: float = 0.01
    delayed: float = 0.0  # by up to delay_s
    delay_s: float = 8.0
    cut: float = 0.0  # the connection breaks around this message
    vanished: float = 0.0  # a unary request that no answer ever comes to
    doubled: float = 0.0  # a Submit that is carried out again, later
    corrupted: float = 0.0  # a flipped bit in a chunk of data
    dawdled: float = 0.0  # an upload whose data comes by dawdle_s later, whatever its site has heard meanwhile
    dawdle_s: tuple[float, float] = (12.0, 20.0)  # about the deadline: the round is still there, and has its survivors


class Observer(Protocol):
    """Who sees every message as it leaves."""

    def site_sends(self, site: str, method: str, call: int, data: bytes) -> None: ...

    def coordinator_sends(self, site: str, method: str, call: int, data: bytes, ended: bool) -> None: ...

    def fail(self, rule: str, what: str) -> None: ...


class Twister(Protocol):
    """Who may change what the coordinator says to a site: a coordinator that lies."""

    def twist(self, site: str, method: str, data: bytes) -> bytes: ...


class Server:
    """Where a coordinator registers its service: as much of grpc.aio.Server as `add_to` needs."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.methods: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """gRPC's older way; the registered handlers are the same."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Handlers by name; the later registration stands."""
        self.methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


@dataclass
class Link:
    """The way between one site and the coordinator. While it is down messages wait, and connections may be given up."""

    outages: int = 0
    down: bool = False
    slow_s: float = 0.0
    held: deque[Callable[[], None]] = field(default_factory=deque)


class Network:
    """All links to one coordinator."""

    def __init__(self, loop: asyncio.AbstractEventLoop, random: Random, weather: Weather, observer: Observer) -> None:
        self.loop = loop
        self.random = random
        self.weather = weather
        self.observer = observer
        self.twister: Twister | None = None
        self.server: Server | None = None
        self.links: dict[str, Link] = {}
        self.faults: Counter[str] = Counter()
        self.messages = 0
        self.calls = 0
        self._connections: dict[Connection, None] = {}

    def link(self, site: str) -> Link:
        """A site's link."""
        return self.links.setdefault(site, Link())

    def link_down(self, site: str) -> None:
        """Partitions a site from the coordinator."""
        link = self.link(site)
        if link.down:
            return
        link.down, link.outages = True, link.outages + 1
        for connection in list(self._connections):
            if connection.link is link:
                connection.watch_outage(link.outages)

    def link_up(self, site: str) -> None:
        """Heals it: what waited arrives, on connections that still stand."""
        link = self.link(site)
        link.down = False
        while link.held:
            link.held.popleft()()

    def died(self, process: Process, silently: bool) -> None:
        """A process is gone. silently: with its machine, so that no kernel tells the other side."""
        if self.server is not None and self.server.process is process:
            self.server = None
        for connection in list(self._connections):
            if connection.client is process:
                connection.client_died(silently)
            elif connection.serving is process:
                connection.server_died(silently)

    def cut(self, connection: Connection) -> None:
        """Breaks one connection, on both sides at times of their own: at once for all messages, or while handlers are at work."""
        self.faults["connections cut"] += 1
        connection.severed = self.random.random() < 0.4
        soon_s = 4 * self.weather.latency_s + 0.02
        self.loop.call_later(
            self.random.random() * (1.0 if connection.severed else soon_s), connection.break_client, "the connection was reset"
        )
        self.loop.call_later(self.random.random() * (3.0 if connection.severed else soon_s), connection.break_server)

    def cut_any(self, site: str) -> bool:
        """Breaks the newest connection of a site, if it has any."""
        mine = [c for c in self._connections if c.client.name == site and not c.severed]
        if mine:
            self.cut(mine[-1])
        return bool(mine)

    def opened(self, connection: Connection) -> None:
        self._connections[connection] = None

    def closed(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    def latency_s(self, link: Link) -> float:
        """How long one message is on its way."""
        weather, draw = self.weather, self.random.random()
        base = weather.latency_s * (0.5 + self.random.random()) + link.slow_s * self.random.random()
        if draw < weather.delayed:
            self.faults["messages delayed"] += 1
            return base + weather.delay_s * self.random.random()
        return base

    def drawn(self, share: float, fault: str) -> bool:
        """Whether a fault strikes now; counted if so."""
        if share and self.random.random() < share:
            self.faults[fault] += 1
            return True
        return False


class Connection:
    """One TCP connection: it breaks on each side apart."""

    def __init__(self, network: Network, client: Process) -> None:
        self.network = network
        self.client = client
        self.link = network.link(client.name)
        self.serving: Process | None = None
        self.severed = False  # nothing arrives any more
        self.client_open = True
        self.server_open = True
        self.calls: dict[Call, None] = {}
        network.opened(self)
        if self.link.down:
            self.watch_outage(self.link.outages)

    def transmit(self, call: Call, up: bool, arrive: Callable[[], None]) -> None:
        """Puts a message of a call on its way, behind those before it."""
        network = self.network
        network.messages += 1
        after = call.last_up if up else call.last_down
        at = max(after + 1e-6, network.loop.time() + network.latency_s(self.link))
        if up:
            call.last_up = at
        else:
            call.last_down = at
        network.loop.call_at(at, self._arrive, up, arrive)

    def _arrive(self, up: bool, arrive: Callable[[], None]) -> None:
        if self.severed or not (self.server_open if up else self.client_open):
            return
        if self.link.down:
            self.link.held.append(lambda: self._arrive(up, arrive))
            return
        arrive()

    def break_client(self, why: str) -> None:
        """The site's side notices, or gives up: every call of it fails."""
        if not self.client_open:
            return
        self.client_open = False
        for call in list(self.calls):
            call.ended(grpc.StatusCode.UNAVAILABLE, why)
        self._tell(self.break_server)

    def break_server(self) -> None:
        """The coordinator's side notices: handlers that still run are cancelled."""
        if not self.server_open:
            return
        self.server_open = False
        for call in list(self.calls):
            call.cancel_handler()
        self._tell(lambda: self.break_client("the connection was closed by the coordinator"))

    def client_died(self, silently: bool) -> None:
        """The site's process is gone. silently: nothing tells the coordinator but its keepalive."""
        self.client_open, self.severed = False, self.severed or silently
        self._tell(self.break_server)

    def server_died(self, silently: bool) -> None:
        """The coordinator's process is gone."""
        self.server_open, self.severed = False, self.severed or silently
        self._tell(lambda: self.break_client("the connection was closed by the coordinator"))

    def watch_outage(self, outage: int) -> None:
        """Keepalive on both sides, each with its own clock."""

        def notice(side: Callable[[], None]) -> None:
            if self.link.down and self.link.outages == outage:
                self.network.faults["connections given up"] += 1
                side()

        wait_s = self.network.random.uniform
        self.network.loop.call_later(wait_s(*KEEPALIVE_S), notice, lambda: self.break_client("keepalive: no answer"))
        self.network.loop.call_later(wait_s(*KEEPALIVE_S), notice, self.break_server)

    def _tell(self, notice: Callable[[], None]) -> None:
        """The other side's kernel hears of the end, behind what is already on its way; keepalive finds out where it does not."""
        if not self.client_open and not self.server_open:
            self.network.closed(self)
            return
        self.network.loop.call_later(self.network.random.uniform(*KEEPALIVE_S), notice)
        if self.link.down or self.severed:
            return
        at = max([self.network.loop.time(), *(max(call.last_up, call.last_down) for call in self.calls)])
        self.network.loop.call_at(at + self.network.latency_s(self.link), notice)
