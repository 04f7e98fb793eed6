"""A session over a link that goes quiet, is slow, or stops: the real timers, a real coordinator, certificates, and a relay between.

Half-open links show on both sides within 30 s; a slow one is never taken for a dead one; a stalled transfer is begun again at its offset.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import pytest
import structlog

from cosilo_client.config import NetworkTable
from cosilo_common.identity.tls import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, PING_INTERVAL_MIN_MS, client_options, server_options
from tests.federation.relay import Direction, Fault
from tests.integration import test_transfer_resume
from tests.integration.coordinator_world import world
from tests.integration.test_transfer_resume import HANDSHAKE_BYTES, LIMIT_S, SITE, Link, fresh, link, owed, resent_bytes, sent_again

__all__ = ["link", "owed", "world"]  # the fixtures

pytestmark = pytest.mark.asyncio(loop_scope="module")

DETECTED_S: Final = 30.0
SLOW_BYTES_PER_S: Final = 1e6
SLOW_DELAY_S: Final = 0.1  # each way: a round trip of 200 ms


async def test_both_ends_ask_a_silent_link_and_give_up_within_30_s() -> None:
    assert (KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS) / 1000 <= DETECTED_S - 2  # a little for the clocks of two event loops
    for options in (client_options(), server_options()):
        assert dict(options)["grpc.keepalive_time_ms"] == KEEPALIVE_MS
        assert dict(options)["grpc.keepalive_timeout_ms"] == KEEPALIVE_TIMEOUT_MS
        assert dict(options)["grpc.http2.ping_timeout_ms"] == KEEPALIVE_TIMEOUT_MS  # or gRPC waits for 60 s
        assert dict(options)["grpc.keepalive_permit_without_calls"] == 1
    assert 2 * PING_INTERVAL_MIN_MS <= KEEPALIVE_MS  # or the server would tell an honest client that it pings too often


async def test_a_half_open_link_shows_on_both_sides_within_30_s_and_heals(link: Link) -> None:  # pytest's way
    await link.hand.leave()  # so that the session's stream is the site's only one
    session = await link.connect(fresh(link.folder / "cache"))
    await until(lambda: session.state()[0] and link.world.coordinator.conductor.connected(SITE), LIMIT_S)
    link.relay.set_fault(Fault.BLACK_HOLE)
    began = time.monotonic()
    at_site, at_coordinator = await asyncio.gather(
        seconds_until(lambda: not session.state()[0], began),
        seconds_until(lambda: not link.world.coordinator.conductor.connected(SITE), began),
    )
    print(f"half-open link seen by the site after {at_site:.1f} s, by the coordinator after {at_coordinator:.1f} s")
    assert max(at_site, at_coordinator) <= DETECTED_S
    link.relay.set_fault(Fault.NONE)
    await until(lambda: session.state()[0] and link.world.coordinator.conductor.connected(SITE), LIMIT_S)


async def test_a_slow_link_is_never_taken_for_a_dead_one(link: Link, owed: tuple[Any, bytes]) -> None:  # pytest's way
    """10 MiB at 1 MB/s with 200 ms take longer than any silence that a site is patient with."""
    due, data = owed
    session = await link.connect(fresh(link.folder / "cache"))
    await until(lambda: session.state()[0], LIMIT_S)
    link.relay.shape(SLOW_BYTES_PER_S, SLOW_DELAY_S)
    before, began, moved = link.relay.carried[Direction.DOWN], time.monotonic(), list[int]()
    try:
        path = await asyncio.wait_for(session.fetch(due, True, moved.append), LIMIT_S)
    finally:
        link.relay.shape(test_transfer_resume.RATE_BYTES_PER_S, 0.0)
    assert path.read_bytes() == data
    assert time.monotonic() - began > 0.9 * len(data) / SLOW_BYTES_PER_S > test_transfer_resume.QUICK.stall_s
    assert session.state()[0]
    assert sent_again(moved) == 0
    resent_bytes(link, Direction.DOWN, before, len(data), 0)


async def test_a_stalled_transfer_is_begun_again_at_its_offset(
    link: Link,  # pytest's way
    owed: tuple[Any, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(test_transfer_resume, "QUICK", NetworkTable(timeout_s=4.0, stall_s=2.0, backoff_min_s=0.01, backoff_max_s=0.05))
    due, data = owed
    session = await link.connect(fresh(link.folder / "cache"))
    await until(lambda: session.state()[0], LIMIT_S)
    before, moved = link.relay.carried[Direction.DOWN], list[int]()
    link.relay.fault_at(Direction.DOWN, HANDSHAKE_BYTES + (3 << 20), Fault.STALL)
    with structlog.testing.capture_logs() as said:
        fetching = asyncio.create_task(session.fetch(due, True, moved.append))
        await until(lambda: link.relay.fault is Fault.STALL, LIMIT_S)
        stood = link.relay.carried[Direction.DOWN]
        # until this site's patience is over, and the next try's has just begun
        await until(lambda: any(entry["event"] == "call failed: trying again" for entry in said), LIMIT_S)
    assert link.relay.carried[Direction.DOWN] == stood
    link.relay.set_fault(Fault.NONE)
    assert (await asyncio.wait_for(fetching, LIMIT_S)).read_bytes() == data
    resent_bytes(link, Direction.DOWN, before, len(data), 1)
    assert sent_again(moved) == 0


async def until(condition: Any, limit_s: float) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)


async def seconds_until(condition: Any, began: float) -> float:
    await until(condition, 2 * DETECTED_S)
    return time.monotonic() - began
