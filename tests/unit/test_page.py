"""The status page without a federation: what it says of a round, who is answered with which headers, and what its files contain."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cosilo_common.errors import CosiloError
from cosilo_server.cli.shapes import ProgressShape, RoundShape
from cosilo_server.config import CoordinatorConfig
from cosilo_server.page import feed as feed_module
from cosilo_server.page.app import HEADERS, STATIC, STREAMS_MAX, page_app
from cosilo_server.page.board import round_line
from cosilo_server.page.feed import Feed
from tests.e2e.page_extremes import HOSTILE, Extremes

STATIC_FILES = {path.name: path.read_text(encoding="utf-8") for path in files("cosilo_server.page").joinpath("static").iterdir()}
LINES_MAX = 500


class Still:
    """Stands in for the conductor. `changed` is what its watchers wait for."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[asyncio.Event]:
        yield self.changed

    def announce(self) -> None:
        self.changed.set()


def a_round(**changes: Any) -> RoundShape:
    site: ProgressShape = {
        "site": "st-anna",
        "connected": True,
        "activity": "training",
        "tenths": 4,
        "bytes": 10,
        "delivered": False,
        "declined": None,
        "late": False,
    }
    shape: RoundShape = {
        "round": 3,
        "kind": "train",
        "phase": "closed",
        "reason": "",
        "note": "",
        "started_unix_s": 100.0,
        "seconds": 12.5,
        "attempt": 1,
        "invited": ["st-anna", "st-beda", "st-clara"],
        "survivors": ["st-anna", "st-beda"],
        "bytes_down": 1,
        "bytes_up": 2,
        "base": "ab" * 32,
        "checkpoint": "cd" * 32,
        "losses": {
            "heldout": 0.5,
            "heldout_by_bucket": [0.4],
            "train": 0.6,
            "clip_ratio": 0.0,
            "total_weight": 7,
            "update_norm": 1.0,
        },
        "sites": [site],
    }
    return {**shape, **changes}  # type: ignore[typeddict-item]  # changes are RoundShape's own


async def ask(app: Any, path: str, method: str = "GET", hosts: tuple[str, ...] = ("localhost",)) -> tuple[int, dict[str, str], bytes]:
    """One request to an ASGI application, without a socket."""
    sent: list[dict[str, Any]] = []
    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers, "query_string": b""}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http", "root_path": ""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = next(message for message in sent if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body


def an_app(*hosts: str) -> Any:
    board: Any = Extremes()
    conductor: Any = Still()
    return page_app(board, Feed(conductor, board.standing), hosts)


# --- what it says ---


def test_a_round_is_told_in_means_and_phases_only() -> None:
    line = round_line(a_round())
    assert (line["heldout"], line["train"], line["seconds"], line["survivors"], line["invited"]) == (0.5, 0.6, 12.5, 2, 3)
    told = {"round", "kind", "phase", "failed_in", "reason", "note", "started_unix_s", "seconds", "attempt", "invited", "survivors"}
    assert set(line) == told | {"bytes_down", "bytes_up", "heldout", "train", "sites"}
    assert set(line["sites"][0]) == {"site", "connected", "activity", "tenths", "bytes", "delivered", "declined", "late"}


@pytest.mark.parametrize("survivors", [[], ["st-anna"]])
def test_the_loss_of_one_site_alone_is_not_shown(survivors: list[str]) -> None:
    line = round_line(a_round(survivors=survivors))
    assert (line["heldout"], line["train"]) == (None, None)


def test_seconds_of_a_round_that_goes_are_left_to_the_reader_s_clock() -> None:
    assert round_line(a_round(phase="uploading"))["seconds"] is None


def test_a_reason_cannot_turn_the_line_around() -> None:
    assert round_line(a_round(reason="a\u202eb\x1b[2J"))["reason"] == "a\ufffdb\ufffd[2J"


# --- who is answered, and how ---


@pytest.mark.parametrize("path", [*STATIC, f"/runs/{'ab' * 32}.json", "/runs/nonsense.json", "/nowhere", "/grids/..%2fstate.db.png"])
async def test_every_answer_has_the_headers(path: str) -> None:
    _, headers, _ = await ask(an_app(), path)
    assert {name.lower(): value for name, value in HEADERS.items()}.items() <= headers.items()
    assert headers["cache-control"] == "no-store"
    assert "script-src 'self'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize("path", [*STATIC, "/events", f"/runs/{'ab' * 32}.json", f"/grids/{'ab' * 32}.png"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_nothing_but_reading_is_answered(path: str, method: str) -> None:
    assert (await ask(an_app(), path, method))[0] == 405


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:7480", "127.0.0.1:7480", "[::1]:7480", "[::1]", "192.168.1.5", "page.example.org", "page.example.org:443"],
)
async def test_addresses_localhost_and_configured_names_are_answered(host: str) -> None:
    assert (await ask(an_app("page.example.org"), "/", hosts=(host,)))[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [
        ("evil.example",),
        ("evil.example:7480",),
        ("localhost.evil.example",),
        ("127.0.0.1.evil.example",),
        ("",),
        (),
        ("localhost", "evil.example"),
    ],
)
async def test_other_names_are_refused_whatever_is_asked(hosts: tuple[str, ...]) -> None:
    for path in ("/", "/events", f"/runs/{'ab' * 32}.json"):
        status, headers, body = await ask(an_app(), path, hosts=hosts)
        assert (status, body) == (421, b"this page is not known by that name; see page_hosts in coordinator.toml\n")
        assert headers["content-security-policy"] == HEADERS["Content-Security-Policy"]


async def test_hostile_words_are_data_and_stay_what_they_are() -> None:
    status, headers, body = await ask(an_app(), f"/runs/{'ab' * 32}.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["rounds"][16]["reason"] == HOSTILE


# --- the files ---


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    assert set(STATIC_FILES) == {name for name, _ in STATIC.values()}
    assert sum(text.count("\n") for text in STATIC_FILES.values()) < LINES_MAX
    for name, text in STATIC_FILES.items():
        assert re.findall(r"https?://[^\"' ]+", text) in ([], ["http://www.w3.org/2000/svg"]), name


def test_the_page_puts_text_in_as_text() -> None:
    script = STATIC_FILES["page.js"]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser", "srcdoc"):
        assert forbidden not in script
    html = STATIC_FILES["index.html"]
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    assert not re.search(r"<style|\son\w+=|style=|javascript:", html)


def test_words_have_contrast_in_light_and_dark() -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1 for text, on both backgrounds, in both schemes."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", STATIC_FILES["page.css"]))
    for scheme in (light, dark):
        for words in ("ink", "quiet", "accent", "bad", "second"):
            for ground in ("paper", "panel"):
                assert contrast(scheme[words], scheme[ground]) >= 4.5, (words, ground, scheme[words])


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- the feed ---


async def test_one_look_serves_every_watcher_and_none_is_taken_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "INTERVAL_S", 0.0)
    conductor: Any = Still()
    looks: list[int] = []
    standing: dict[str, Any] = {"federation": "one"}

    def look() -> Any:
        looks.append(1)
        return dict(standing)

    feed = Feed(conductor, look)
    task = asyncio.create_task(feed.run_for_ever())
    conductor.announce()
    for _ in range(10):
        await asyncio.sleep(0)
    assert looks == []
    async with asyncio.timeout(20), feed.watch() as mine, feed.watch() as yours:
        assert [json.loads(await anext(texts) or "")["federation"] for texts in (mine, yours)] == ["one", "one"]
        standing["federation"] = "two"
        before = len(looks)
        conductor.announce()
        assert [json.loads(await anext(texts) or "")["federation"] for texts in (mine, yours)] == ["two", "two"]
        assert len(looks) == before + 1
    task.cancel()


async def test_a_look_that_fails_does_not_end_the_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "INTERVAL_S", 0.0)
    conductor: Any = Still()
    answers: list[Any] = [OSError("disk full"), {"federation": "back"}]

    def look() -> Any:
        answer = answers.pop(0)
        conductor.changed.set()
        if isinstance(answer, Exception):
            raise answer
        return answer

    feed = Feed(conductor, look)
    task = asyncio.create_task(feed.run_for_ever())
    async with asyncio.timeout(20), feed.watch() as texts:
        assert json.loads(await anext(texts) or "")["federation"] == "back"
    task.cancel()


async def test_watchers_are_counted_and_told_nothing_new_as_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "HEARTBEAT_S", 0.01)
    conductor: Any = Still()
    feed = Feed(conductor, dict)  # type: ignore[typeddict-item,arg-type,return-value]
    async with feed.watch() as texts:
        assert await anext(texts) is None  # nobody looks: run_for_ever is not running
        await feed.close()
        assert [text async for text in texts] == []
    assert STREAMS_MAX == 16


# --- config and schema ---


def test_the_page_is_off_unless_the_config_names_its_port(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('federation = "north"\n')
    assert CoordinatorConfig.read(path).listen.page == ""
    path.write_text('federation = "north"\n[listen]\npage = "127.0.0.1:7480"\npage_hosts = ["page.example.org"]\n')
    listen = CoordinatorConfig.read(path).listen
    assert (listen.page, listen.page_hosts) == ("127.0.0.1:7480", ("page.example.org",))
    for wrong in ('page = "7480"', 'page_hosts = ["http://page.example.org"]', 'page_hosts = ["*"]'):
        path.write_text(f'federation = "north"\n[listen]\n{wrong}\n')
        with pytest.raises(CosiloError, match=r"listen\.page"):
            CoordinatorConfig.read(path)
