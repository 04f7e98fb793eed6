"""One file, or four at once, each way between two processes: the daemons' own code, mTLS, digest checked and on disk, beside raw TLS.

    python -m bench.transfer [--mb 146] [--repeat 3]

The server process answers with the coordinator's own halves (`send_artifact`, `UploadDesk`), the site process calls with the site's own
(`Transport`, `FileSink`, `FileSource`); rounds, store and members are left out. Seconds are from the call to the file under its name, synced;
processor seconds are both processes' together.
Memory is each process's peak of anonymous memory (sampled) beyond what it had before the first byte.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import psutil

from bench.figures import Figure, at_least, at_most, table
from bench.yardsticks import anonymous_bytes, raw_tls_s
from cosilo_client.coordinator import UploadHeader
from cosilo_client.transport import Transport
from cosilo_common.allocation import allocate_for_chunks
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import TlsFiles, server_credentials, server_options
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.threads import in_thread
from cosilo_common.transfer import FileSink, FileSource
from cosilo_server.artifacts import Artifacts
from cosilo_server.membership import Removal
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.state import Phase
from cosilo_server.services.downloads import DownloadNotes, send_artifact
from cosilo_server.services.gate import Gate
from cosilo_server.services.turns import Turns
from cosilo_server.services.uploads import UploadDesk, messages_of
from cosilo_server.spool import Spool
from cosilo_server.trace import RoundTrace
from tests.identity_parties import FEDERATION, found

GOAL = 0.75  # of raw TLS
MEMORY_GOAL_MB = 32.0
STREAMS = (1, 4)
SAMPLE_S = 0.01
SITE = "st-anna"


def measure(quick: bool = False) -> Iterator[Figure]:
    """Both ways, one stream and four."""
    yield from figures(36 if quick else 146, 1 if quick else 3)


def figures(mb: int, repeat: int) -> Iterator[Figure]:
    """mb: of each file; repeat: the median of so many is a figure."""
    size = mb * 1_000_000
    with tempfile.TemporaryDirectory(prefix="cosilo-bench-") as folder, _processes(Path(folder), size) as (server, site):
        for streams in STREAMS:
            for way in ("down", "up"):
                if streams == STREAMS[0]:
                    site.ask(way, streams)  # warm
                yard = [raw_tls_s(size, *_counts(way, streams), streams=streams)]
                before, cpu_before_s = (server.anonymous(), site.anonymous()), server.cpu_s() + site.cpu_s()
                with _peaks(server, site) as peaks:
                    seconds = [site.ask(way, streams) for _ in range(repeat)]
                cpu_s = (server.cpu_s() + site.cpu_s() - cpu_before_s) / repeat
                yard.append(raw_tls_s(size, *_counts(way, streams), streams=streams))
                rate, raw = streams * mb / statistics.median(seconds), streams * mb / statistics.mean(yard)
                yield Figure(f"transfer.{way}.{streams}", rate, "MB/s", "raw TLS, MB/s", raw, at_least(GOAL))
                kept = (
                    streams * mb / statistics.median(raw_tls_s(size, *_counts(way, streams), streams, Path(folder)) for _ in range(repeat))
                )
                yield Figure(f"transfer.{way}.{streams}.kept", rate, "MB/s", "raw TLS, hashed and on disk, MB/s", kept)
                yield Figure(f"transfer.{way}.{streams}.bound", kept, "MB/s", "raw TLS, MB/s", raw)
                yield Figure(f"transfer.{way}.{streams}.cpu", 1000 * cpu_s / streams / mb, "s a GB")
                for who, peak, base in zip(("coordinator", "site"), peaks, before, strict=True):
                    extra = max(0, peak - base) / 1e6
                    yield Figure(f"transfer.{way}.{streams}.memory.{who}", extra, "MB", "allowed, MB", MEMORY_GOAL_MB, at_most(1.0))


def _counts(way: str, streams: int) -> tuple[int, int]:
    return (streams, 0) if way == "down" else (0, streams)


class _Process:
    """A child that answers one line of JSON with another."""

    def __init__(self, *arguments: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.transfer", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hello = self._read()

    def ask(self, *what: Any) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(what) + "\n")
        self._child.stdin.flush()
        return float(self._read())

    def anonymous(self) -> int:
        return anonymous_bytes(self._child.pid)

    def cpu_s(self) -> float:
        times = psutil.Process(self._child.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("a process of the bench ended early")
        return json.loads(line)


@contextmanager
def _processes(folder: Path, size: int) -> Iterator[tuple[_Process, _Process]]:
    founded = found(folder / "f")
    tls = founded.party(Role.SITE, SITE)
    coordinator = founded.coordinator.tls
    source = folder / "source"
    with source.open("wb") as file:
        block = os.urandom(1_000_000)
        for _ in range(size // len(block)):
            file.write(block)
    with _paths(coordinator) as own, _paths(tls) as site_own:
        server = _Process("--serve", str(folder), own)
        try:
            site = _Process("--site", str(folder), site_own, str(server.hello))
            try:
                yield server, site
            finally:
                site.close()
        finally:
            server.close()


@contextmanager
def _paths(tls: TlsFiles) -> Iterator[str]:
    yield json.dumps([str(tls.ca), str(tls.certificate), str(tls.key)])


@contextmanager
def _peaks(*processes: _Process) -> Iterator[list[int]]:
    peaks, over = [process.anonymous() for process in processes], threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            for at, process in enumerate(processes):
                peaks[at] = max(peaks[at], process.anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


# The coordinator's process


class _NoRounds:
    """What the two halves ask of a conductor and a store, for one upload that is always due."""

    due = SimpleNamespace(run=bytes(32), number=1, attempt=1, phase=Phase.UPLOADING)
    trace = RoundTrace(cast(Any, None), time.time)

    def round(self, run: bytes) -> Any:
        return self.due

    def runs_of(self, site: str) -> tuple[bytes, ...]:
        return ()

    async def handle(self, run: bytes, event: object, number: int) -> str:
        return ""

    def add_bytes(self, *_: object) -> None:
        pass


class _Desk(UploadDesk):
    """Takes `site/size/digest` for a signed statement."""

    async def receive(self, site: str, requests: AsyncIterator[bytes]) -> AsyncGenerator[site_pb2.PutUpdateResponse]:
        iterator = aiter(requests)
        header = site_pb2.PutUpdateRequest.FromString(await anext(iterator)).header
        name, size, digest = header.statement.decode().split("/")
        due = cast(Any, _NoRounds.due)
        async with self._turns.turn() as turn:
            sink = await asyncio.to_thread(self._spool.receive, "0" * 64, 1, name, int(size), digest)
            try:
                yield site_pb2.PutUpdateResponse(resume_offset=sink.offset)
                await self._fill(sink, iterator, due, name, turn)
            finally:
                sink.close()
        yield site_pb2.PutUpdateResponse(stored=True)


async def _serve(folder: Path, tls: TlsFiles) -> None:
    artifacts, metrics, rounds = Artifacts(folder / "artifacts"), CoordinatorMetrics(), cast(Any, _NoRounds())
    copy = folder / "artifacts" / "copy"
    os.link(folder / "source", copy)
    artifacts.put_file(copy)
    gate = Gate(FEDERATION, lambda _: True, lambda _: Removal.NOTHING, metrics)
    desk = _Desk(rounds, rounds, Spool(folder / "spool"), metrics)
    turns = Turns()
    notes = DownloadNotes(lambda *_, **__: None)

    async def get(request: site_pb2.GetArtifactRequest, context: Any) -> AsyncIterator[bytes]:
        peer = await gate.site(context)
        async for chunk in send_artifact(gate, rounds, rounds, metrics, artifacts, notes, turns, peer, request, context):
            yield chunk

    async def put(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[site_pb2.PutUpdateResponse]:
        peer = await gate.site(context)
        async with messages_of(requests) as messages:
            async for answer in desk.receive(peer.name.name, gate.while_member(peer, messages, asyncio.Event(), context)):
                yield answer

    server = grpc.aio.server(options=server_options())
    handlers = {
        "GetArtifact": grpc.unary_stream_rpc_method_handler(get, request_deserializer=site_pb2.GetArtifactRequest.FromString),
        "PutUpdate": grpc.stream_stream_rpc_method_handler(put, response_serializer=site_pb2.PutUpdateResponse.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("cosilo.v1.SiteService", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(tls))
    await server.start()
    print(json.dumps(f"127.0.0.1:{port}"), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the bench closes it
    await server.stop(0)


# The site's process


async def _site(folder: Path, tls: TlsFiles, address: str) -> None:
    size, digest = (folder / "source").stat().st_size, _digest(folder / "source")
    lanes = [Transport.open(address, tls, timeout_s=30, stall_s=30) for _ in range(30)]
    print(json.dumps("ready"), flush=True)
    count = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        way, streams = json.loads(line)
        count += 1
        began_s = time.perf_counter()
        if way == "down":
            work = [_fetch(lane, folder / f"got-{number}", size, digest) for number, lane in enumerate(lanes[:streams])]
        else:
            work = [_put(lane, folder / "source", f"{SITE}-{count}-{number}", digest) for number, lane in enumerate(lanes[:streams])]
        await asyncio.gather(*work)
        print(json.dumps(time.perf_counter() - began_s), flush=True)
        for left in [*folder.glob("got-*"), *folder.glob(f"spool/*/*/{SITE}-*")]:
            left.unlink()
    for lane in lanes:
        await lane.close()


async def _fetch(transport: Transport, path: Path, size: int, digest: str) -> None:
    with FileSink(path, size, digest) as sink:
        await transport.fetch(bytes.fromhex(digest), sink, lambda _: None)
        await in_thread(sink.finish)


async def _put(transport: Transport, path: Path, name: str, digest: str) -> None:
    with FileSource(path) as source:
        header = UploadHeader(bytes(32), 1, 1, f"{name}/{source.size}/{digest}".encode())
        await transport.put(header, source, lambda _: None)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(text: str) -> TlsFiles:
    ca, certificate, key = map(Path, json.loads(text))
    return TlsFiles(ca=ca, certificate=certificate, key=key)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=146)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--site", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve or arguments.site:
        allocate_for_chunks()  # as the daemons do
    if arguments.serve:
        asyncio.run(_serve(Path(arguments.serve[0]), _files(arguments.serve[1])))
    elif arguments.site:
        asyncio.run(_site(Path(arguments.site[0]), _files(arguments.site[1]), arguments.site[2]))
    else:
        found_figures: Iterable[Figure] = figures(arguments.mb, arguments.repeat)
        print(table(found_figures))


if __name__ == "__main__":
    main()
