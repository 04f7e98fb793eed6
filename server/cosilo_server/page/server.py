"""The page's port: uvicorn within the coordinator's event loop, with few connections and a deadline on each.

Must not know what is served. Nobody who connects is asked who they are, so every bound here is for a stranger on this machine.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cosilo_common.errors import CosiloError
from cosilo_server.config import split_host_port
from cosilo_server.page.feed import Feed

log = structlog.get_logger(__name__)

CONNECTIONS_MAX: Final = 48  # STREAMS_MAX browsers that watch, and what a few of them load at once; more are hung up on
REQUEST_TIMEOUT_S: Final = 10.0  # a client that says nothing, or says it one byte at a time, must not hold one of those
CONNECTION_LIFE_S: Final = 900.0  # nor one that does not read; a browser that watches comes back by itself
HEADER_BYTES_MAX: Final = 16 << 10
STOP_GRACE_S: Final = 2


class PagePort:
    """The page's port, open from the start. listen: "host:port", port 0 for a free one. Raises CosiloError where it cannot be bound."""

    def __init__(self, listen: str) -> None:
        host, port = split_host_port(listen)
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, OverflowError) as error:
            number = error.errno if isinstance(error, OSError) else None
            reason = os.strerror(number) if number and number > 0 else str(error)  # a name that is not found has a negative one
            raise CosiloError(
                "open the page's port",
                f"{listen}: {reason}",
                'stop what uses it, or choose another for page in [listen] of coordinator.toml; page = "" is none',
            ) from None
        self.address = f"{listen.rpartition(':')[0]}:{self._socket.getsockname()[1]}"
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._feed: Feed | None = None

    def serve(self, app: ASGIApp, feed: Feed, refused: Callable[[str], None] = lambda _reason: None) -> None:
        """Begins to answer, on the running event loop. refused: told the reason (`page_connections`, `page_slow`) for each that is hung up on."""

        class Connection(_Connection):
            refuse = staticmethod(refused)

        settings = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # strangers must not fill the log
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_GRACE_S,
            h11_max_incomplete_event_size=HEADER_BYTES_MAX,
        )
        self._server = _Server(settings)
        self._feed = feed
        self._tasks = [
            asyncio.create_task(self._server.serve([self._socket]), name="page"),
            asyncio.create_task(feed.run_for_ever(), name="page feed"),
        ]
        for task in self._tasks:
            task.add_done_callback(_tell_failure)

    async def close(self) -> None:
        """Ends every stream, answers what was asked, frees the port."""
        if self._server is not None and self._feed is not None:
            await self._feed.close()
            self._server.should_exit = True
            serving, watching = self._tasks
            watching.cancel()
            await asyncio.gather(serving, watching, return_exceptions=True)
        self._socket.close()


class _Server(uvicorn.Server):
    """uvicorn as one part of a daemon, whose signals are the daemon's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """One connection, for one request: refused where there are enough, ended where it takes too long."""

    refuse: Callable[[str], None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it so too
        super().connection_made(transport)
        self._timers = [
            self.loop.call_later(REQUEST_TIMEOUT_S, self._hang_up_unless_asked),
            self.loop.call_later(CONNECTION_LIFE_S, transport.abort),
        ]
        if len(self.connections) > CONNECTIONS_MAX:
            self.refuse("page_connections")
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        super().connection_lost(exc)

    def _hang_up_unless_asked(self) -> None:
        if not self.cycle:  # uvicorn sets it with the first request, whatever its type says
            self.refuse("page_slow")
            self.transport.abort()


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the page ended", error=repr(error))
