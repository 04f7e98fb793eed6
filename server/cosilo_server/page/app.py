"""The page's HTTP: which address answers what, the headers of every answer, and who is refused.

Must not know runs or rounds. Every route is GET; nothing that arrives is written anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from ipaddress import ip_address
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosilo_server.page.board import Board
from cosilo_server.page.feed import Feed

STREAMS_MAX: Final = 16  # browsers that watch at once; each holds a connection
RECONNECT_MS: Final = 2000
STATIC: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Connection": "close",  # one request a connection, so that each has one deadline (server.py)
}
_FOR_EVER: Final = "private, max-age=31536000, immutable"  # what is named by its digest


def page_app(board: Board, feed: Feed, hosts: Collection[str] = ()) -> ASGIApp:
    """The whole page as an ASGI application. hosts: names, beside localhost and addresses, by which a browser may ask for it."""
    one_at_a_time = asyncio.Lock()  # of the threads that rounds need too, the page takes one for this and one for the feed

    async def history(request: Request) -> Response:
        async with one_at_a_time:
            found = await asyncio.to_thread(board.history, request.path_params["run"])
        return JSONResponse(found) if found is not None else _not_found("no such run")

    async def grid(request: Request) -> Response:
        async with one_at_a_time:
            path = await asyncio.to_thread(board.grid, request.path_params["digest"])
        if path is None:
            return _not_found("no such grid")
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": _FOR_EVER})

    routes = [
        *(Route(path, partial(_static, *_load(name, kind)), methods=["GET"]) for path, (name, kind) in STATIC.items()),
        Route("/events", _Events(feed)),
        Route("/runs/{run}.json", history, methods=["GET"]),
        Route("/grids/{digest}.png", grid, methods=["GET"]),
    ]
    return _Guarded(Starlette(routes=routes), frozenset(hosts))


class _Guarded:
    """Puts the headers on every answer, and answers nobody who asks for another host.

    A page on the web can give its own name this machine's address and have a visitor's browser read what is here as its own (DNS rebinding).
    Such a request carries the other page's name; one for an address carries none.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "no-store")
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        app: ASGIApp = self._app
        if scope["type"] == "http" and not self._is_ours(Headers(scope=scope).getlist("host")):
            said = "this page is not known by that name; see page_hosts in coordinator.toml\n"
            app = PlainTextResponse(said, HTTPStatus.MISDIRECTED_REQUEST)
        await app(scope, receive, with_headers)

    def _is_ours(self, said: list[str]) -> bool:
        if len(said) != 1:
            return False
        host, colon, port = said[0].lower().rpartition(":")
        if not colon or not port.isdecimal():
            host = said[0].lower()
        if host.removesuffix(".") in self._hosts:
            return True
        with suppress(ValueError):
            return bool(ip_address(host.removeprefix("[").removesuffix("]")))
        return False


class _Events:
    """Server-sent events (HTML Standard, 9.2): `standing` with the board's JSON at every change, a comment as a heartbeat."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "GET":
            await PlainTextResponse("only GET\n", HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET"})(scope, receive, send)
            return
        if self._streams >= STREAMS_MAX:
            said = f"{STREAMS_MAX} browsers watch already\n"
            await PlainTextResponse(said, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "10"})(scope, receive, send)
            return
        self._streams += 1
        try:
            async with self._feed.watch() as texts:
                await StreamingResponse(_lines(texts), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})(
                    scope, receive, send
                )
        finally:
            self._streams -= 1


async def _lines(texts: AsyncIterator[str | None]) -> AsyncIterator[str]:
    yield f"retry: {RECONNECT_MS}\n\n"
    async for text in texts:
        yield ": nothing new\n\n" if text is None else f"event: standing\ndata: {text}\n\n"


def _load(name: str, kind: str) -> tuple[bytes, str]:
    return (files("cosilo_server.page") / "static" / name).read_bytes(), kind


async def _static(content: bytes, kind: str, _request: Request) -> Response:
    return Response(content, media_type=kind)


def _not_found(why: str) -> Response:
    return PlainTextResponse(f"{why}\n", HTTPStatus.NOT_FOUND)
