"""What a daemon says of itself: its log, and one HTTP port with /metrics, /healthz and /readyz.

Owns how lines are formed, the processor that keeps secrets out of them, and the port. Must not know what is measured,
nor when a daemon is healthy: both are handed in. The log goes to stderr, so that a command's stdout stays its answer.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket
from typing import Any, Final, Literal, TextIO

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from structlog.typing import EventDict, WrappedLogger

from cosilo_common.errors import CosiloError, printable
from cosilo_common.journald import JournalHandler, is_journal

LogForm = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
State = tuple[bool, str]
"""Whether all is well, and the reason in words."""

CONNECTIONS_MAX: Final = 16  # a scraper, a supervisor and a person or two; more is a flood and is hung up on
REQUEST_TIMEOUT_S: Final = 10.0  # a client that says nothing must not hold one of those
CONNECTION_LIFE_S: Final = 20.0  # nor one that says it, or reads the answer, a byte at a time
EVENT_CHARS_MAX: Final = 8_000  # a line of the log: bounds what a hostile peer's text can put into it

REDACTED: Final = "[redacted]"
SECRET_WORDS: Final = frozenset(
    {"credential", "credentials", "invitation", "key", "keys", "mask", "masks", "passphrase", "password", "private"}
    | {"secret", "secrets", "seed", "seeds", "share", "shares", "token", "tokens"}
)
"""Names of fields that are never logged, as whole words of the field's name. `public_key` and `fingerprint` may be."""
_PEM_PRIVATE: Final = "PRIVATE KEY-----"
_QUIET: Final = ("grpc", "asyncio", "sqlalchemy", "urllib3", "PIL")  # libraries: warnings and worse only


def configure_logging(form: LogForm = "auto", level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Sends structlog's and the standard library's log through one chain to `stream` (stderr).

    form: "json" is one object a line, "console" is for people, "auto" is console on a terminal and JSON elsewhere.
    Where `stream` is systemd's journal, both "json" and "auto" become journald's own fields (cosilo_common.journald).
    Times are UTC. Call it once, when a process starts; calling it again replaces the chain.
    """
    out = sys.stderr if stream is None else stream
    as_json = form == "json" or (form == "auto" and not out.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        forbid_secrets,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=out.isatty())
    )
    handler = JournalHandler(out) if as_json and is_journal(out) else logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a second call must reach loggers that modules made before it
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger: `log.info("round begun", round=3)`. name: the part of the program, such as "cosilo.session"."""
    return structlog.stdlib.get_logger(name)


def forbid_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replaces what must not be logged: fields named like secrets, raw bytes, private keys in PEM, in nested values
    too.

    Raw bytes are never logged, whatever they are called: who knows that some are public (a digest) logs them as hex.
    """
    return {name: _fit(name, value) for name, value in event.items()}


def parse_listen(listen: str) -> tuple[str, int]:
    """`127.0.0.1:9465` or `[::1]:9465` as (address, port). Port 0 lets the system choose. Raises CosiloError on other
    shapes.
    """
    host, colon, port = listen.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if not colon or not port.isdecimal() or int(port) > 65_535 or (":" in bare and bare == host):
            raise ValueError
        return str(ip_address(bare)), int(port)
    except ValueError:
        raise CosiloError("open telemetry port", f"{listen[:80]!r} is not ADDRESS:PORT", 'write listen = "127.0.0.1:9465"') from None


class TelemetryServer:
    """The running port. `close` ends it and waits for its thread."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="telemetry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops answering and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_telemetry(
    listen: str,
    registry: CollectorRegistry,
    healthy: Callable[[], State],
    ready: Callable[[], State],
    *,
    refused: Callable[[str], None] = lambda _reason: None,
    life_s: float = CONNECTION_LIFE_S,
) -> tuple[TelemetryServer, int]:
    """Opens the port in a thread of its own and returns (server, the port in use).

    /metrics is the registry in Prometheus' text form. /healthz and /readyz call `healthy` and `ready`, in that thread
    and at each request: 200 and the reason where all is well, 503 and the reason otherwise. There is no authentication,
    so listen on loopback unless the network in front of it has some. refused: told the reason (`metrics_connections`, `metrics_slow`) for
    each connection that is hung up on, to count it; life_s: of a connection, whatever it says. Raises CosiloError where the port is in use or the
    address is not this machine's.
    """
    address = parse_listen(listen)
    pages: Mapping[str, Callable[[], State]] = {"/healthz": healthy, "/readyz": ready}

    class Handler(_Pages):
        metrics = staticmethod(lambda: generate_latest(registry))
        states = pages

    class Server(_BoundedServer):
        address_family = AF_INET6 if ":" in address[0] else AF_INET

    try:
        server = Server(address, Handler, refused, life_s)
    except OSError as error:
        raise CosiloError(
            "open telemetry port",
            f"{listen}: {error.strerror}",
            "stop what uses it, or choose another port for [metrics] listen",
        ) from None
    return TelemetryServer(server), int(server.server_address[1])


class _BoundedServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # a restart must not wait for the last connection's TIME_WAIT

    def __init__(self, address: tuple[str, int], handler: type[_Pages], refused: Callable[[str], None], life_s: float) -> None:
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._refused = refused
        self._life_s = life_s
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self._refused("metrics_connections")
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        over = threading.Timer(self._life_s, self._hang_up, (request,))
        over.daemon = True
        over.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            over.cancel()
            self._slots.release()

    def _hang_up(self, request: socket) -> None:
        """Ends a connection under its thread, whose next read or write then fails."""
        self._refused("metrics_slow")
        with suppress(OSError):  # it ended by itself in the same moment
            request.shutdown(SHUT_RDWR)

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        get_logger("cosilo.telemetry").debug("request failed", peer=str(client_address[0]))


class _Pages(BaseHTTPRequestHandler):
    metrics: Callable[[], bytes]
    states: Mapping[str, Callable[[], State]]
    timeout = REQUEST_TIMEOUT_S
    server_version = "cosilo"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, self.metrics())
        elif path in self.states:
            well, reason = self.states[path]()
            status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, "text/plain; charset=utf-8", f"{reason}\n".encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"/metrics, /healthz or /readyz\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes every few seconds are no news."""

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _fit(name: str, value: Any) -> Any:
    if _is_secret(name):
        return REDACTED
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if isinstance(value, str):
        return REDACTED if _PEM_PRIVATE in value else printable(value[:EVENT_CHARS_MAX])
    if isinstance(value, Mapping):
        return {str(key): _fit(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_fit("", item) for item in value]
    return value


def _is_secret(name: str) -> bool:
    words = name.lower().replace("-", "_").split("_")
    return "public" not in words and not SECRET_WORDS.isdisjoint(words)
