"""A paused run: no round starts, what was ordered waits over a restart, and it goes on where an admin says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import PLAIN_AGGREGATION
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.aggregation import Checkpoint
from cosilo_server.closing import untrained_checkpoint
from cosilo_server.conductor import Conductor
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.state import Phase
from cosilo_server.spool import Spool
from cosilo_server.store import Pause, Store
from tests.integration.coordinator_world import World, world
from tests.integration.memory_rounds import manifest_of

__all__ = ["world"]

SITES = ("anna", "beda", "clara")
WEIGHTS = sha256(b"the untrained weights").hex()
MAINTENANCE = Pause("ada", "the scanner moves")


class Standing:
    """A conductor on a folder that outlives it, with three connected sites."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = manifest_of(SITES, aggregation=PLAIN_AGGREGATION, n_min=3, f=0)
        self.run = self.manifest.digest()

    async def up(self) -> None:
        self.store = Store(self.folder / "state.db")
        first = untrained_checkpoint(self.run, Checkpoint(WEIGHTS, WEIGHTS, WEIGHTS), 192, False, 0.0)
        self.store.add_run(self.run, self.manifest.canonical(), bytes(64), "ada", first)
        spool = Spool(self.folder / "spool")
        self.conductor = Conductor(self.store, spool, None, CoordinatorMetrics())  # type: ignore[arg-type]  # no sum is opened here
        await self.conductor.start()
        for name in SITES:
            await self.conductor.attend(name, True)

    async def down(self) -> None:
        await self.conductor.stop()
        self.store.close()

    async def restart(self) -> None:
        await self.down()
        await self.up()

    @property
    def round(self) -> tuple[int, Phase] | None:
        state = self.conductor.round(self.run)
        return (state.number, state.phase) if state else None

    async def tick(self) -> None:
        """What the clock does for a run whose round is over, so that nothing has to be waited for."""
        await self.conductor._start_next(self.conductor._runs[self.run])


@pytest_asyncio.fixture
async def standing(tmp_path: Path) -> AsyncIterator[Standing]:
    made = Standing(tmp_path)
    await made.up()
    yield made
    await made.down()


async def refusal(call: Awaitable[object]) -> str:
    with pytest.raises(CosiloError) as caught:
        await call
    return caught.value.subject


@pytest.mark.asyncio
async def test_what_was_ordered_waits_over_a_restart_and_goes_on_at_once(standing: Standing) -> None:
    conductor, run = standing.conductor, standing.run
    await conductor.order(run, RoundKind.TRAIN, 3)
    assert standing.round == (1, Phase.TRAINING)
    await conductor.pause_run(run, MAINTENANCE, abandon=True)
    assert standing.round == (1, Phase.ABANDONED)
    for _ in range(2):
        conductor = standing.conductor
        conductor._runs[run].not_before = 0.0  # the abandoned round's backoff is over
        await standing.tick()
        assert standing.round == (1, Phase.ABANDONED)
        assert conductor.note(run) == "paused by ada: the scanner moves"
        assert "is paused by ada: the scanner moves" in await refusal(conductor.order(run, RoundKind.TRAIN, 1))
        await standing.restart()
    conductor = standing.conductor
    conductor._runs[run].not_before = conductor._now() + 1e6  # a backoff does not outlive the pause
    await conductor.resume_run(run)
    assert standing.round == (2, Phase.TRAINING)
    assert conductor.note(run) == ""
    stored = standing.store.run(run)
    assert stored is not None
    assert stored.paused is None
    order = standing.store.open_order(run)
    assert order is not None
    assert (order.wanted, order.closed) == (3, 0)
    assert "is not paused" in await refusal(conductor.resume_run(run))


@pytest.mark.asyncio
async def test_the_round_in_progress_goes_on_unless_it_is_to_be_abandoned(standing: Standing) -> None:
    await standing.conductor.order(standing.run, RoundKind.TRAIN, 1)
    await standing.conductor.pause_run(standing.run, MAINTENANCE, abandon=False)
    assert standing.round == (1, Phase.TRAINING)
    await standing.conductor.pause_run(standing.run, Pause("ada", ""), abandon=True)
    state = standing.conductor.round(standing.run)
    assert state is not None
    assert state.reason == "paused by ada"


@pytest.mark.asyncio
async def test_a_stopped_run_cannot_be_paused_and_a_paused_one_can_be_stopped(standing: Standing) -> None:
    conductor, run = standing.conductor, standing.run
    await conductor.pause_run(run, MAINTENANCE, abandon=False)
    await conductor.stop_run(run, abandon=False)
    assert conductor.note(run) == "stopped by an admin"
    assert "is stopped already" in await refusal(conductor.pause_run(run, MAINTENANCE, abandon=False))
    await conductor.order(run, RoundKind.TRAIN, 1)  # which lets a stopped run go on
    assert standing.round == (1, Phase.TRAINING)


@pytest.mark.asyncio
async def test_a_pause_lets_a_round_that_is_being_started_begin_first(standing: Standing) -> None:
    """Under the run's lock: a round either stands before the pause or does not start."""
    conductor, run = standing.conductor, standing.run
    async with conductor._runs[run].lock:
        starting = asyncio.create_task(conductor.order(run, RoundKind.TRAIN, 1))
        while standing.store.open_order(run) is None:
            await asyncio.sleep(0)
        pausing = asyncio.create_task(conductor.pause_run(run, MAINTENANCE, abandon=False))
        await asyncio.sleep(0)
    await asyncio.gather(starting, pausing)
    assert standing.round in (None, (1, Phase.TRAINING))
    assert conductor.note(run) == MAINTENANCE.words
    assert (await asyncio.to_thread(standing.store.newest_round, run) is None) is (standing.round is None)


@pytest.mark.asyncio(loop_scope="module")
async def test_over_the_wire_a_paused_run_says_who_paused_it_and_why(world: World) -> None:
    run = await world.create(world.manifest("paused"))

    async def listed() -> tuple[str, str]:
        answer = await world.admin.ListRuns(admin_pb2.ListRunsRequest(), timeout=30)
        (found,) = [one for one in answer.runs if one.run == run]
        return found.state, found.note

    admin = world.founded.admin.membership.name
    await world.admin.PauseRun(admin_pb2.PauseRunRequest(run=run, reason="the scanner moves"), timeout=30)
    assert await listed() == ("paused", f"paused by {admin}: the scanner moves")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await world.admin.StartRounds(admin_pb2.StartRoundsRequest(run=run, rounds=1, kind=site_pb2.ROUND_KIND_TRAIN), timeout=30)
    assert f"let it go on: cosilo run resume {run.hex()[:12]}" in (refused.value.details() or "")
    await world.admin.ResumeRun(admin_pb2.ResumeRunRequest(run=run), timeout=30)
    assert await listed() == ("idle", "")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("reason", ["x" * 201, "two\nlines", "\x1b[2J"])
async def test_a_reason_is_one_printable_line(world: World, reason: str) -> None:
    run = await world.create(world.manifest("reasons", nonce=sha256(reason.encode())[:16].hex()))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await world.admin.PauseRun(admin_pb2.PauseRunRequest(run=run, reason=reason), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
