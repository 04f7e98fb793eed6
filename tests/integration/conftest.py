"""What the tests of this folder share: a coordinator's torch work is done in this process, where torch is loaded already."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from cosilo_server.evaluation import Evaluation
from cosilo_server.worker import perform

_start_a_process = Evaluation._run


async def _perform_here(self: Evaluation, job: dict[str, object]) -> None:
    """The same task from the same job, which crosses JSON here as it does on its way to the process."""
    async with self._one_at_a_time:
        await asyncio.to_thread(perform, json.loads(json.dumps(job)))


@pytest.fixture(scope="module", autouse=True)
def _torch_work_here() -> Iterator[None]:
    """A worker process costs three seconds of a core, all but a tenth of it to load torch; dozens of runs are created here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "_run", _perform_here)
        yield


@pytest.fixture
def worker_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of what the process itself answers."""
    monkeypatch.setattr(Evaluation, "_run", _start_a_process)
