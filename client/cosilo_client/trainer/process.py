"""One start of the trainer: its process, or torchrun's with a rank for each GPU, and a socket to every rank.

Owns starting, talking to and ending that process. Must not know why it is started, torch, rounds or keys.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cosilo_client.trainer.channel import LINE_BYTES_MAX, listen
from cosilo_client.trainer.jobs import (
    Failure,
    FailureCode,
    Hello,
    Job,
    Notice,
    Progress,
    Report,
    Result,
    TrainerFailed,
    report_from_line,
    to_line,
)

START_TIMEOUT_S = 180.0  # importing torch from a cold, slow disk
STOP_TIMEOUT_S = 5.0  # a worker exits as soon as its socket closes; one that does not is stuck in a driver
REPORTS_WAITING_MAX = 256  # a round has some tens
STDERR_BYTES_KEPT = 8192  # enough for a traceback
PROCESSES_MAX = 64  # GPUs of one machine
SOCKETS = "trainer-*.sock"  # gone once every rank is connected, unless the daemon dies before that

log = logging.getLogger("cosilo.trainer")


@dataclass(frozen=True)
class TrainerConfig:
    """How the trainer runs.

    folder: the site's private folder, for the socket. idle_s: how long a trainer without work keeps its memory.
    processes: GPUs to use, each with a process of its own under torchrun when there are several.
    """

    folder: Path
    idle_s: float = 600.0
    processes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= PROCESSES_MAX:
            raise ValueError(f"processes must be from 1 to {PROCESSES_MAX}, not {self.processes}")
        if self.idle_s < 0:
            raise ValueError(f"idle_s must not be negative, not {self.idle_s}")


@dataclass(eq=False)
class TrainerProcess:
    """One start of the trainer: its process (torchrun's, if there are several ranks) and a connection to each rank."""

    config: TrainerConfig
    _process: asyncio.subprocess.Process | None = None
    _ranks: dict[int, tuple[asyncio.StreamWriter, int]] = field(default_factory=dict)
    _reports: "asyncio.Queue[tuple[int, Report | None]]" = field(default_factory=lambda: asyncio.Queue(REPORTS_WAITING_MAX))
    _stderr_task: "asyncio.Task[None] | None" = None
    _readers: set["asyncio.Task[None]"] = field(default_factory=set)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _stderr: bytes = b""
    _lost: bool = False
    _oom_kills: int | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None and not self._lost

    def process_ids(self) -> tuple[int, ...]:
        return tuple(pid for _, (_, pid) in sorted(self._ranks.items()))

    async def start(self) -> None:
        """Start the process and wait until every rank is connected. Raises TrainerFailed."""
        self._oom_kills = oom_kills()
        path = self.config.folder / SOCKETS.replace("*", secrets.token_hex(4))
        try:
            listener = listen(path, self.config.processes)
            server = await asyncio.start_unix_server(self._accept, sock=listener, limit=LINE_BYTES_MAX)
        except OSError as error:
            raise TrainerFailed(FailureCode.CRASHED, f"{path}: {error.strerror}", "check the site's state folder") from None
        try:
            self._process = await self._spawn(path)
            if self._process.stderr is not None:
                self._stderr_task = asyncio.create_task(self._read_stderr(self._process.stderr))
            ready, gone = asyncio.ensure_future(self._ready.wait()), asyncio.ensure_future(self._process.wait())
            try:
                await asyncio.wait({ready, gone}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ready.cancel()
                gone.cancel()
            if not self._ready.is_set():
                raise await self._death("did not start")
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def _spawn(self, path: Path) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                *_command(path, self.config.processes),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                # No module is imported from the folder that the daemon happens to run in, and nothing is fetched.
                env=os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "DIFFUSERS_OFFLINE": "1"},
                start_new_session=True,  # Ctrl-C reaches the daemon, which ends its trainer in order
            )
        except OSError as error:
            raise TrainerFailed(
                FailureCode.CRASHED,
                f"the trainer did not start: {error.strerror}",
                "free memory or processes on the machine",
            ) from None

    async def perform(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        """Send the job to every rank and wait for every rank's result; rank 0's counts."""
        line = to_line(job)
        if len(line) > LINE_BYTES_MAX:
            raise TrainerFailed(FailureCode.DATA, f"a job of {len(line)} bytes, allowed are {LINE_BYTES_MAX}", "name fewer classes")
        for writer, _ in self._ranks.values():
            writer.write(line)
        results: dict[int, Result] = {}
        while len(results) < self.config.processes:
            rank, report = await self._reports.get()
            match report:
                case Progress():
                    on_progress(report)
                case Notice():
                    log.warning("%s", report.text)
                case Result():
                    results[rank] = report
                case Failure():
                    raise TrainerFailed(report.code, report.subject, report.hint)
                case _:
                    raise await self._death("ended during a job")
        return results[0]

    async def stop(self) -> None:
        """End every rank: by closing its connection, which a rank obeys at once; then by signal."""
        for writer, _ in self._ranks.values():
            writer.close()
        if self._process is not None:
            if not self._ready.is_set():
                self._signal(signal.SIGKILL)  # some rank has no connection to be ended by
            elif self.config.processes > 1:
                self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._signal(signal.SIGKILL)
                await self._process.wait()
        tasks = self._readers if self._stderr_task is None else self._readers | {self._stderr_task}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One rank's connection, to its end."""
        rank = -1
        task = asyncio.current_task()
        if task is not None:
            self._readers.add(task)
        try:
            hello = report_from_line(await reader.readline())
            if not isinstance(hello, Hello) or hello.rank in self._ranks or hello.rank >= self.config.processes:
                raise ValueError("not a rank of this trainer")
            rank = hello.rank
            self._ranks[rank] = (writer, _peer_process(writer))
            if len(self._ranks) == self.config.processes:
                self._ready.set()
            while line := await reader.readline():
                await self._reports.put((rank, report_from_line(line)))
        except (OSError, ValueError, ValidationError) as error:
            log.warning("trainer rank %d: connection broken (%s)", rank, type(error).__name__)
        finally:
            writer.close()
            if rank >= 0:
                self._lost = True
                await self._reports.put((rank, None))

    async def _death(self, when: str) -> TrainerFailed:
        """Why the trainer is gone, from its exit status and its last words."""
        status = None
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            status = self._process.returncode
        words = self._stderr.decode(errors="replace").strip().splitlines()
        if words:
            log.warning("trainer's last words:\n%s", "\n".join(words[-20:]))
        if status == -signal.SIGKILL:
            # What the kernel does to a process when memory runs out, and what a person may do to any.
            if self._oom_kills is not None and oom_kills() == self._oom_kills:
                return TrainerFailed(FailureCode.KILLED, f"the trainer {when}: killed (SIGKILL), not for memory", "find out who killed it")
            return TrainerFailed(FailureCode.OUT_OF_MEMORY, f"the trainer {when}: killed (SIGKILL)", "give the site more memory")
        cause = "does not answer" if status is None else f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        last = f": {words[-1][:200]}" if words else ""
        return TrainerFailed(FailureCode.CRASHED, f"the trainer {when}: {cause}{last}", "see the log; the next round starts a new one")

    async def _read_stderr(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(4096):
            self._stderr = (self._stderr + chunk)[-STDERR_BYTES_KEPT:]

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _command(path: Path, processes: int) -> list[str]:
    python = [sys.executable, "-m"]
    worker = ["cosilo_client.trainer.worker", "--socket", str(path)]
    if processes == 1:
        return python + worker
    return [
        *python,
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "-m",
        *worker,
    ]


def _peer_process(writer: asyncio.StreamWriter) -> int:
    """The process at the other end of a unix socket; 0 where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return 0
    connection: socket.socket = writer.get_extra_info("socket")
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since it started (proc_vmstat(5)); None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
