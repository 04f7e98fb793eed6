"""What a daemon says of itself: no secret in it, health that means it, and a port that says why it is not open."""

from __future__ import annotations

import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from cosilo_common.errors import CosiloError
from cosilo_common.telemetry import REDACTED, configure_logging, get_logger, parse_listen, serve_telemetry

CANARY = "c4n4ry-7d1f"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("json", "info", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_its_fields(log: io.StringIO) -> None:
    get_logger("cosilo.test").info("round begun", round=3)
    (line,) = lines(log)
    assert {name: line[name] for name in ("event", "level", "logger", "round")} == {
        "event": "round begun",
        "level": "info",
        "logger": "cosilo.test",
        "round": 3,
    }


def test_the_standard_library_s_log_goes_the_same_way(log: io.StringIO) -> None:
    logging.getLogger("cosilo.data").warning("image skipped: %s", "a.png")
    (line,) = lines(log)
    assert (line["event"], line["level"], line["logger"]) == ("image skipped: a.png", "warning", "cosilo.data")


@pytest.mark.parametrize("name", ["token", "round_key", "private", "mask-seed", "shares", "Password"])
def test_fields_named_like_secrets_are_not_logged(log: io.StringIO, name: str) -> None:
    get_logger("cosilo.test").info("event", **{name: CANARY, "nested": {"more": [{name: CANARY}]}})
    assert CANARY not in log.getvalue()
    assert lines(log)[0][name] == REDACTED


def test_bytes_and_private_keys_are_not_logged(log: io.StringIO) -> None:
    pem = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"
    get_logger("cosilo.test").info("event", value=CANARY.encode(), text=pem)
    assert CANARY not in log.getvalue()
    assert (lines(log)[0]["value"], lines(log)[0]["text"]) == ("[11 bytes]", REDACTED)


def test_public_keys_and_fingerprints_are_logged(log: io.StringIO) -> None:
    get_logger("cosilo.test").info("event", public_key="ab", fingerprint="cd")
    assert (lines(log)[0]["public_key"], lines(log)[0]["fingerprint"]) == ("ab", "cd")


@pytest.mark.parametrize("listen", ["", "9465", "localhost:9465", "127.0.0.1:", "127.0.0.1:70000", "::1:9465", "[::1"])
def test_what_is_no_address_and_port_is_refused(listen: str) -> None:
    with pytest.raises(CosiloError, match="ADDRESS:PORT"):
        parse_listen(listen)


def test_addresses_of_both_families_are_read() -> None:
    assert parse_listen("127.0.0.1:9465") == ("127.0.0.1", 9465)
    assert parse_listen("[::1]:0") == ("::1", 0)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_port_says_what_it_is_told() -> None:
    registry = CollectorRegistry()
    Counter("cosilo_images", "Images.", registry=registry).inc(5)
    state = [(True, "attending"), (False, "not connected: connection refused")]
    server, port = serve_telemetry("127.0.0.1:0", registry, lambda: state[0], lambda: state[1])
    try:
        assert get(port, "/healthz") == (200, "attending\n")
        assert get(port, "/readyz") == (503, "not connected: connection refused\n")
        assert "cosilo_images_total 5.0" in get(port, "/metrics")[1]
        assert get(port, "/")[0] == 404
        state[1] = (True, "connected")
        assert get(port, "/readyz") == (200, "connected\n")
    finally:
        server.close()


def test_a_port_in_use_is_an_error_that_says_what_to_do() -> None:
    server, port = serve_telemetry("127.0.0.1:0", CollectorRegistry(), lambda: (True, ""), lambda: (True, ""))
    try:
        with pytest.raises(CosiloError, match="in use; stop what uses it"):
            serve_telemetry(f"127.0.0.1:{port}", CollectorRegistry(), lambda: (True, ""), lambda: (True, ""))
    finally:
        server.close()
