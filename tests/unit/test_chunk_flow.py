"""Read ahead and write behind: the same bytes, the same refusals, and no thread that outlives the file that it works on."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from contextlib import aclosing
from pathlib import Path

import pytest

from cosilo_common.chunk_flow import WriteBehind, frames_from
from cosilo_common.framing import data_of
from cosilo_common.transfer import CHUNK_BYTES, FileSink, FileSource, Refusal, TransferError

CONTENT = bytes(range(256)) * 10_000  # two chunks and a half
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(CONTENT) - 1, len(CONTENT)])
async def test_frames_are_the_file_from_the_offset(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    found = b""
    with FileSource(path) as source:
        async with aclosing(frames_from(source, offset)) as frames:
            async for message, count in frames:
                data = data_of(message)
                assert data is not None and len(data) == count <= CHUNK_BYTES
                found += data
    assert found == CONTENT[offset:]


async def test_a_file_that_shrinks_ends_the_frames(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with FileSource(path) as source, pytest.raises(TransferError) as caught:
        path.write_bytes(CONTENT[:10])
        async with aclosing(frames_from(source, 0)) as frames:
            async for _ in frames:
                pass
    assert caught.value.refusal is Refusal.SOURCE


async def test_what_is_written_behind_is_all_there_when_it_is_settled(tmp_path: Path) -> None:
    with FileSink(tmp_path / "file", len(CONTENT), DIGEST) as sink:
        async with WriteBehind(sink) as writing:
            for start in range(0, len(CONTENT), CHUNK_BYTES):
                await writing.append(memoryview(CONTENT)[start : start + CHUNK_BYTES])
            assert writing.offset == len(CONTENT)
            await writing.settle()
            assert sink.complete
        assert sink.finish().read_bytes() == CONTENT


@pytest.mark.parametrize("chunk", [b"", bytes(CHUNK_BYTES + 1), bytes(101)])
async def test_a_chunk_that_the_sink_refuses_is_refused_at_once(tmp_path: Path, chunk: bytes) -> None:
    size = 100 if len(chunk) == 101 else len(CONTENT)
    with FileSink(tmp_path / "file", size, DIGEST) as sink:
        async with WriteBehind(sink) as writing:
            with pytest.raises(TransferError) as caught:
                await writing.append(chunk)
            assert (caught.value.refusal, sink.offset) == (Refusal.OVERSIZE, 0)


async def test_a_write_that_fails_is_told_with_the_next_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with FileSink(tmp_path / "file", len(CONTENT), DIGEST) as sink:
        monkeypatch.setattr("os.pwrite", full)
        async with WriteBehind(sink) as writing:
            await writing.append(CONTENT[:CHUNK_BYTES])
            with pytest.raises(TransferError) as caught:
                await writing.append(CONTENT[CHUNK_BYTES : 2 * CHUNK_BYTES])
        assert (caught.value.refusal, sink.offset) == (Refusal.DISK, 0)


async def test_leaving_waits_for_the_thread_even_when_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, let_go, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(sink: FileSink, offset: int, chunk: bytes) -> None:
        begun.set()
        assert let_go.wait(30)
        ended.set()

    monkeypatch.setattr(FileSink, "append", slow)
    with FileSink(tmp_path / "file", len(CONTENT), DIGEST) as sink:

        async def receive() -> None:
            async with WriteBehind(sink) as writing:
                await writing.append(CONTENT[:10])
                await asyncio.Event().wait()

        task = asyncio.create_task(receive())
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        assert not task.done()
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
