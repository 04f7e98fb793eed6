"""The trainer as a real process behind a real socket: warm, crashed, starved, idle, orphaned, doubled.

The tests that share `link` run in order on one warm trainer, as a daemon's rounds do.
"""

import asyncio
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from cosilo_client.data import DataConfig
from cosilo_client.trainer import EvaluateJob, FailureCode, Progress, TrainerConfig, TrainerFailed, TrainerLink, TrainJob
from cosilo_client.trainer import process as process_module
from cosilo_client.trainer.channel import connect, lines, listen
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.workshop import Workshop
from cosilo_common.diffusion.model import initial_state, tensor_table
from cosilo_common.diffusion.presets import PRESETS
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.weights import write_weights

pytestmark = pytest.mark.asyncio(loop_scope="module")

DIGITS = PRESETS["digits"]
SMALL = DIGITS.architecture.model_copy(update={"block_out_channels": (8, 16), "norm_num_groups": 4})
GONE_TIMEOUT_S = 10.0  # a worker exits as its socket closes; the machine may be busy
LONG = 60  # epochs: the first of ten reports comes within a second, and what it sets off comes long before the end
ALONE = Workplace(torch.device("cpu"), rank=0, world=1, bf16=False)


def ignore(progress: Progress) -> None:
    """For jobs whose progress is not the point."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    (path / "mine").write_text("\n".join(map(str, range(100))))
    make_weights(path / "global.safetensors", SMALL)
    return path


def make_weights(path: Path, architecture: Architecture) -> None:
    state = initial_state(architecture, 0)
    write_weights(path, tensor_table(architecture), [tensor.numpy().ravel() for tensor in state.values()])


def train_job(folder: Path, update: str = "update", **training: Any) -> TrainJob:
    return TrainJob(
        weights=folder / "global.safetensors",
        update=folder / update,
        architecture=SMALL,
        schedule=DIGITS.schedule,
        training=DIGITS.training.model_copy(update={"local_epochs": 1, "batch_size": 30} | training),
        data=DataConfig(kind="digits", index_file=folder / "mine"),
        seed=7,
        threads=1,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def link(folder: Path) -> AsyncIterator[TrainerLink]:
    trainer = TrainerLink(TrainerConfig(folder))
    yield trainer
    await trainer.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a fact about other processes."""
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def first_report_s() -> dict[str, float]:
    """Seconds from a job's start to its first report, cold and warm."""
    return {}


async def test_the_process_computes_the_same_bits_as_this_one(link: TrainerLink, folder: Path, first_report_s: dict[str, float]) -> None:
    seen: list[Progress] = []
    began = time.monotonic()

    def note(progress: Progress) -> None:
        first_report_s.setdefault("cold", time.monotonic() - began)
        seen.append(progress)

    result = await link.run(train_job(folder), note)
    torch.set_num_threads(1)
    expected = Workshop(ALONE).perform(train_job(folder, "expected"), ignore)
    assert (folder / "update").read_bytes() == (folder / "expected").read_bytes()
    assert (result.weight, result.steps, result.heldout_losses) == (90, 3, expected.heldout_losses)
    assert [progress.tenths for progress in seen] == [3, 6, 10]


async def test_nothing_but_the_update_is_left_in_the_folder(link: TrainerLink, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["expected", "global.safetensors", "mine", "update"]
    assert (folder / "update").stat().st_mode & 0o777 == 0o600


async def test_a_warm_trainer_starts_at_once_and_repeats_itself(link: TrainerLink, folder: Path, first_report_s: dict[str, float]) -> None:
    """Warm, a report comes in 0.2 s on an idle machine, cold in 3 s: a ratio, because the machine may be busy."""
    (pid,) = link.process_ids()
    began = time.monotonic()
    await link.run(train_job(folder, "again"), lambda progress: first_report_s.setdefault("warm", time.monotonic() - began))
    assert first_report_s["warm"] < first_report_s["cold"] / 3
    assert (folder / "again").read_bytes() == (folder / "update").read_bytes()
    assert link.process_ids() == (pid,)


async def test_a_statistics_round_measures_and_trains_nothing(link: TrainerLink, folder: Path) -> None:
    fields = train_job(folder).model_dump(exclude={"kind", "update", "keep_personal", "seed", "micro_batch"})
    result = await link.run(EvaluateJob(**fields), ignore)
    assert (result.weight, result.steps, result.images, result.train_loss) == (90, 0, 0, 0.0)
    assert len(result.heldout_losses) == 4


async def test_a_skipped_image_is_named_in_the_daemons_log(
    link: TrainerLink, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image

    for number in range(10):
        (tmp_path / str(number)).mkdir()
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / str(number) / "a.png")
    (tmp_path / "3" / "b.png").write_bytes(b"broken")
    job = train_job(folder, "other").model_copy(update={"data": DataConfig(kind="folder", path=tmp_path)})
    with caplog.at_level(logging.WARNING, "cosilo.trainer"):
        result = await link.run(job, ignore)
    assert (result.weight, result.skipped) == (9, 1)
    assert "image skipped: 3/b.png: neither JPEG nor PNG" in caplog.text


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"data": DataConfig(kind="folder", path=Path("/absent"))}, FailureCode.DATA, "/absent: No such file"),
        ({"weights": Path("/absent")}, FailureCode.DATA, "read weights: absent"),
        ({"update": Path("/absent/update")}, FailureCode.DISK, "No such file or directory; free"),
    ],
)
async def test_a_job_that_cannot_be_done_leaves_the_trainer_warm(
    link: TrainerLink, folder: Path, change: dict[str, Any], code: FailureCode, message: str
) -> None:
    before = link.process_ids()
    with pytest.raises(TrainerFailed, match=message) as caught:
        await link.run(train_job(folder, max_steps=1).model_copy(update=change), ignore)
    assert caught.value.code is code
    assert link.process_ids() == before
    assert link.restarts == 0


async def test_a_crash_costs_the_round_and_the_next_one_starts_anew(link: TrainerLink, folder: Path) -> None:
    (pid,) = link.process_ids()
    with pytest.raises(TrainerFailed, match="the trainer ended during a job: SIGSEGV") as caught:
        await link.run(train_job(folder, "crashed", local_epochs=LONG), lambda progress: os.kill(pid, signal.SIGSEGV))
    assert caught.value.code is FailureCode.CRASHED
    assert not list(folder.glob("crashed*"))
    assert link.process_ids() == ()
    await link.run(train_job(folder, "after"), ignore)
    assert (folder / "after").read_bytes() == (folder / "update").read_bytes()
    assert link.restarts == 1


async def test_out_of_memory_restarts_once_with_half_the_micro_batch(
    link: TrainerLink, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pid,) = link.process_ids()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)  # the batch below needs several hundred MiB
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    make_weights(folder / "large.safetensors", DIGITS.architecture)
    large = {"weights": folder / "large.safetensors", "architecture": DIGITS.architecture, "data": DataConfig(kind="digits")}
    job = train_job(folder, "halved", batch_size=1024, max_steps=1).model_copy(update=large)
    with caplog.at_level(logging.WARNING, "cosilo.trainer"):
        result = await link.run(job, ignore)
    assert "out of memory with 1024 images a pass; starting again with 512" in caplog.text
    assert (result.images, link.restarts) == (1024, 2)
    assert link.process_ids() != (pid,)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cosilo.trainer"):
        await link.run(job, ignore)  # the smaller micro-batch is remembered
    assert caplog.text == ""


async def test_a_trainer_that_somebody_kills_starts_once_more_and_gives_the_same_bits(link: TrainerLink, folder: Path) -> None:
    killed: list[int] = []

    def kill_once(progress: Progress) -> None:
        if not killed:
            killed.extend(link.process_ids())
            os.kill(killed[0], signal.SIGKILL)

    await link.run(train_job(folder, "undisturbed", local_epochs=LONG), ignore)
    await link.run(train_job(folder, "interrupted", local_epochs=LONG), kill_once)
    assert len(killed) == 1
    assert (folder / "interrupted").read_bytes() == (folder / "undisturbed").read_bytes()


async def test_a_trainer_killed_for_memory_twice_in_one_round_fails_it(
    link: TrainerLink, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel counts a kill for memory: half the micro-batch once, then the round is given up."""
    counts = itertools.count()
    monkeypatch.setattr(process_module, "oom_kills", lambda: next(counts))
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        (pid,) = link.process_ids()
        killed.append(pid)
        os.kill(pid, signal.SIGKILL)

    with pytest.raises(TrainerFailed, match="SIGKILL") as caught:
        await link.run(train_job(folder, "killed", local_epochs=LONG), kill)
    assert caught.value.code is FailureCode.OUT_OF_MEMORY
    assert len(set(killed)) == 2
    assert not list(folder.glob("killed*"))


async def test_a_warm_trainer_that_is_to_rest_gives_its_memory_back_and_one_at_work_ends_its_job_first(folder: Path) -> None:
    trainer = TrainerLink(TrainerConfig(folder, idle_s=600.0))
    started = asyncio.Event()
    working = asyncio.create_task(trainer.run(train_job(folder), lambda progress: started.set()))
    await started.wait()
    (pid,) = trainer.process_ids()
    await trainer.rest()
    assert working.done()
    assert working.result().steps > 0
    assert not alive(pid)
    assert trainer.process_ids() == ()
    await trainer.run(train_job(folder), ignore)
    assert trainer.restarts == 0
    await trainer.close()


async def test_an_idle_trainer_gives_its_memory_back_and_a_cancelled_one_too(folder: Path) -> None:
    trainer = TrainerLink(TrainerConfig(folder, idle_s=0.0))
    pids: list[int] = []
    await trainer.run(train_job(folder), lambda progress: pids.extend(trainer.process_ids()))
    await until(lambda: not alive(pids[0]))
    assert trainer.process_ids() == ()
    assert trainer.restarts == 0

    started = asyncio.Event()
    task = asyncio.create_task(trainer.run(train_job(folder, local_epochs=LONG), lambda progress: started.set()))
    await started.wait()
    (pid,) = trainer.process_ids()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pid)
    await trainer.close()


async def test_a_daemon_that_is_killed_leaves_no_orphan(folder: Path) -> None:
    """Killed while its trainer computes: nobody is left to tell the trainer, and it ends all the same."""
    code = f"""
import asyncio, os
from pathlib import Path
from cosilo_client.trainer import TrainerConfig, TrainerLink, TrainJob
job = TrainJob.model_validate_json({train_job(folder, "orphan", local_epochs=LONG).model_dump_json()!r})
link = TrainerLink(TrainerConfig(Path({str(folder)!r})))
asyncio.run(link.run(job, lambda progress: print(*link.process_ids(), flush=True)))
"""
    daemon = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout is not None
        trainer = int(await asyncio.to_thread(daemon.stdout.readline))
        assert alive(trainer)
    finally:
        daemon.kill()
        daemon.communicate()
    await until(lambda: not alive(trainer))
    assert not (folder / "orphan").exists()


async def test_a_socket_that_a_killed_daemon_left_is_removed_by_the_next(folder: Path) -> None:
    """Killed while its trainer starts: nobody has connected yet, so the socket's name is still there."""
    left = folder / "trainer-4692f335.sock"
    listen(left, 1).close()
    assert left.is_socket()
    trainer = TrainerLink(TrainerConfig(folder))
    assert not left.exists()
    await trainer.close()


async def test_two_ranks_train_as_one(folder: Path) -> None:
    """Two processes under torchrun, gloo between them: the same W and losses, and the same update but for rounding."""
    trainer = TrainerLink(TrainerConfig(folder, processes=2))
    job = train_job(folder, "both", batch_size=25)  # 13 + 12 images a step, and 8 + 7 in the last
    try:
        result = await trainer.run(job, ignore)
        pids = trainer.process_ids()
        assert len(set(pids)) == 2
    finally:
        await trainer.close()
    expected = Workshop(ALONE).perform(train_job(folder, "expected", batch_size=25), ignore)
    assert (result.weight, result.steps, result.images) == (90, 4, 90)
    assert result.heldout_losses == pytest.approx(expected.heldout_losses, rel=1e-6)
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
    both, one = (np.fromfile(folder / name, "<f4") for name in ("both", "expected"))
    assert np.linalg.norm(both - one) < 1e-3 * np.linalg.norm(one)
    await until(lambda: not any(alive(pid) for pid in pids))


async def test_a_closed_link_takes_no_job(folder: Path) -> None:
    trainer = TrainerLink(TrainerConfig(folder))
    await trainer.close()
    with pytest.raises(TrainerFailed, match="link is closed"):
        await trainer.run(train_job(folder), ignore)


async def test_a_socket_works_at_any_depth_and_is_its_owners_only(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 6)
    deep.mkdir(parents=True)
    path = deep / "trainer.sock"
    assert len(str(path)) > 108
    with listen(path, 1) as listener:
        listener.setblocking(True)
        assert path.stat().st_mode & 0o777 == 0o600
        with connect(path) as mine:
            theirs, _ = listener.accept()
            with theirs:
                mine.sendall(b'{"a":1}\n{"b":')
                assert next(lines(theirs)) == b'{"a":1}\n'


async def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with listen(tmp_path / "s", 1) as listener, connect(tmp_path / "s") as mine:
        listener.setblocking(True)
        theirs, _ = listener.accept()
        with theirs:
            sender = asyncio.create_task(asyncio.to_thread(mine.sendall, b"x" * ((1 << 20) + 1)))
            with pytest.raises(ValueError, match="longer than 1048576 bytes"):
                await asyncio.to_thread(next, lines(theirs))
            await sender
