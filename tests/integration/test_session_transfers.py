"""A session's transfers and messages against a real gRPC server: resumed where they were cut, bounded, never wedged."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

import cosilo_client.session
from cosilo_client.artifacts import ArtifactCache
from cosilo_client.coordinator import Refused, Unreachable, UploadHeader
from cosilo_client.wire import owed_from
from cosilo_common.errors import CosiloError
from cosilo_common.transfer import CHUNK_BYTES, partial_path
from tests.identity_parties import Founded
from tests.integration.scripted_session import DIGEST, FAST, OWED, RUN, SPOOL, WEIGHTS, Attended, assignment, attended, listen, parties

__all__ = ["attended", "parties"]  # the fixtures


# Transfers


async def test_weights_are_fetched_once_and_found_afterwards(attended: Attended) -> None:
    path = await attended.session.fetch(OWED, False, attended.moved.append)
    assert path.read_bytes() == WEIGHTS
    assert attended.moved[-1] == len(WEIGHTS)
    assert await attended.session.fetch(OWED, False, attended.moved.append) == path
    assert attended.servicer.fetches == [0]


async def test_a_forced_fetch_fetches_what_is_here(attended: Attended) -> None:
    await attended.session.fetch(OWED, False, attended.moved.append)
    await attended.session.fetch(OWED, True, attended.moved.append)
    assert attended.servicer.fetches == [0, 0]


async def test_a_cut_fetch_goes_on_at_its_offset(attended: Attended) -> None:
    attended.servicer.cuts = [CHUNK_BYTES + 5, 2 * CHUNK_BYTES]
    path = await attended.session.fetch(OWED, False, attended.moved.append)
    assert path.read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, CHUNK_BYTES + 5, 2 * CHUNK_BYTES]


async def test_a_fetch_goes_on_where_an_earlier_process_was_killed(attended: Attended) -> None:
    path = attended.cache.path(DIGEST)
    partial_path(path, DIGEST.hex()).write_bytes(WEIGHTS[:1000])
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [1000]


async def test_corrupt_weights_are_discarded_and_fetched_again_from_the_start(attended: Attended) -> None:
    attended.servicer.corrupt = 2
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 0, 0]


async def test_weights_that_are_always_corrupt_are_an_error_and_leave_nothing(attended: Attended) -> None:
    attended.servicer.corrupt = 99
    with pytest.raises(CosiloError, match="SHA-256"):
        await attended.session.fetch(OWED, False, attended.moved.append)
    assert attended.servicer.fetches == [0] * cosilo_client.session.CORRUPT_MAX
    assert list(attended.cache.path(DIGEST).parent.iterdir()) == []


async def test_what_adapters_stand_on_is_fetched_once_and_stays_beside_the_round_s_weights(attended: Attended) -> None:
    path = await attended.session.fetch_base(RUN, DIGEST, len(WEIGHTS), attended.moved.append)
    assert path.read_bytes() == WEIGHTS
    attended.cache.use(RUN, bytes(32))  # the run's next weights
    attended.cache._make_room(bytes(32), 1 << 40)  # takes everything that no run needs
    assert await attended.session.fetch_base(RUN, DIGEST, len(WEIGHTS), attended.moved.append) == path
    assert attended.servicer.fetches == [0]


async def test_another_base_than_the_manifest_names_is_refused_by_its_digest(attended: Attended) -> None:
    attended.servicer.corrupt = 99
    with pytest.raises(CosiloError) as caught:
        await attended.session.fetch_base(RUN, DIGEST, len(WEIGHTS), attended.moved.append)
    assert caught.value.operation == "fetch lora base"
    assert caught.value.subject == f"run {RUN.hex()[:12]}: what came is not {DIGEST.hex()}, which the signed manifest names"
    assert list(attended.cache.path(DIGEST).parent.iterdir()) == []


async def test_a_base_of_another_length_is_not_fetched_to_its_end(attended: Attended) -> None:
    with pytest.raises(CosiloError, match=f"has {len(WEIGHTS)} bytes there and 7 in the assignment"):
        await attended.session.fetch_base(RUN, DIGEST, 7, attended.moved.append)


async def test_weights_that_rotted_on_the_disk_are_fetched_again(attended: Attended) -> None:
    path = await attended.session.fetch(OWED, False, attended.moved.append)
    path.write_bytes(WEIGHTS[:-1] + b"?")
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 0]


async def test_another_size_than_the_assignment_s_is_an_error(attended: Attended) -> None:
    wrong = owed_from(assignment(base_bytes=len(WEIGHTS) + 1))
    with pytest.raises(CosiloError, match=f"has {len(WEIGHTS)} bytes there and {len(WEIGHTS) + 1} in the assignment"):
        await attended.session.fetch(wrong, False, attended.moved.append)


async def test_a_fetch_that_moves_nothing_is_begun_again(attended: Attended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attended.session, "_network", FAST.model_copy(update={"stall_s": 0.3}))
    await attended.snapshot()
    attended.servicer.snapshots.put_nowait(None)  # the next connection has the shorter patience
    await attended.snapshot()
    attended.servicer.cuts, attended.servicer.stall = [CHUNK_BYTES], True
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, CHUNK_BYTES]


async def test_a_fetch_outlives_the_connection(attended: Attended, parties: Founded) -> None:
    await attended.snapshot()
    attended.servicer.cuts, attended.servicer.stall = [2 * CHUNK_BYTES], True
    fetching = asyncio.create_task(attended.session.fetch(OWED, False, attended.moved.append))
    async with asyncio.timeout(20):
        while 2 * CHUNK_BYTES not in attended.moved:
            await asyncio.sleep(0.01)
    await attended.server.stop(0)
    attended.server, _ = await listen(attended.servicer, parties.coordinator.tls, attended.port)
    assert (await asyncio.wait_for(fetching, 20)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 2 * CHUNK_BYTES]


async def test_the_least_recently_used_weights_go_when_the_cache_is_full(attended: Attended) -> None:
    cache = ArtifactCache(attended.cache.path(DIGEST).parent, 2 * len(WEIGHTS))
    session = attended.session
    session._cache = cache
    old, held = cache.path(b"\1" * 32), cache.path(b"\2" * 32)
    for path in (old, held):
        path.write_bytes(bytes(len(WEIGHTS)))
    cache.use(b"another run", b"\2" * 32)
    await session.fetch(OWED, False, attended.moved.append)
    assert sorted(path.name for path in cache.path(DIGEST).parent.iterdir()) == sorted([held.name, DIGEST.hex()])


HEADER = UploadHeader(RUN, 3, 1, b"statement")


async def test_an_upload_goes_up_whole(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert bytes(attended.servicer.held) == SPOOL
    assert (attended.moved[0], attended.moved[-1]) == (0, len(SPOOL))


async def test_a_cut_upload_goes_on_where_the_coordinator_has_it(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    attended.servicer.cuts = [1, 2 * CHUNK_BYTES]
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert bytes(attended.servicer.held) == SPOOL
    assert attended.servicer.puts == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


async def test_an_upload_that_is_there_already_sends_nothing(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    attended.servicer.held += SPOOL
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert attended.moved == [len(SPOOL)]


async def test_an_upload_that_a_link_corrupted_is_sent_again(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    attended.servicer.data_losses = 1
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert attended.servicer.puts == [0, 0]
    assert bytes(attended.servicer.held) == SPOOL


async def test_a_refused_upload_says_why_and_is_not_tried_again(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    with pytest.raises(Refused, match=r"FAILED_PRECONDITION: header.run: no such run"):
        await attended.session.put(UploadHeader(bytes(32), 3, 1, b""), tmp_path / "spool", attended.moved.append)
    assert attended.moved == []


async def test_a_message_is_handed_in_through_failures_that_pass(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
    await attended.session.submit(b"signed")
    assert attended.servicer.submitted == [b"signed"]


async def test_a_refused_message_says_why_and_is_not_tried_again(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.FAILED_PRECONDITION]
    with pytest.raises(Refused, match="rule R2") as raised:
        await attended.session.submit(b"signed")
    assert raised.value.status == "FAILED_PRECONDITION"
    assert attended.servicer.submitted == []


async def test_tries_that_move_nothing_are_bounded(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.UNAVAILABLE] * (cosilo_client.session.TRIES_MAX + 5)
    with pytest.raises(Unreachable, match="UNAVAILABLE"):
        await attended.session.submit(b"signed")
    assert len(attended.servicer.statuses) == 4


async def test_a_cancelled_fetch_is_cancelled_and_keeps_what_arrived(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.cuts, attended.servicer.stall = [2 * CHUNK_BYTES], True
    fetching = asyncio.create_task(attended.session.fetch(OWED, False, attended.moved.append))
    async with asyncio.timeout(20):
        while max(attended.moved, default=0) < CHUNK_BYTES:  # told when the second chunk is here, which is written behind the first
            await asyncio.sleep(0.01)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 2 * CHUNK_BYTES]
