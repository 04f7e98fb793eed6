"""Transfers: in order or refused, resumed at any byte, decided by the digest."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common import transfer
from cosilo_common.errors import CosiloError
from cosilo_common.transfer import (
    CHUNK_BYTES,
    FILE_BYTES_MAX,
    FileSink,
    FileSource,
    Refusal,
    TransferError,
    file_digest,
    partial_path,
    require_free_bytes,
)

CONTENT = bytes(range(256)) * 10
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FOUR_GIB = 1 << 32


def refusal_of(call: object, *arguments: object) -> Refusal:
    with pytest.raises(TransferError) as caught:
        call(*arguments)  # type: ignore[operator]  # any method of a sink or source
    return caught.value.refusal


def test_a_file_arrives_in_chunks_of_a_mebibyte(tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 7)
    (tmp_path / "source").write_bytes(content)
    with FileSource(tmp_path / "source") as source:
        chunks = list(source.chunks())
        assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 7]
        sink = FileSink(tmp_path / "target", source.size, file_digest(tmp_path / "source"))
        for chunk in chunks:
            sink.append(sink.offset, memoryview(chunk))
        assert sink.finish() == tmp_path / "target"
    assert (tmp_path / "target").read_bytes() == content
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@given(stops=st.lists(st.integers(0, len(CONTENT)), max_size=6), piece=st.integers(1, len(CONTENT)))
@settings(max_examples=150, deadline=None)
def test_a_transfer_cut_at_any_bytes_gives_the_same_file(tmp_path_factory: pytest.TempPathFactory, stops: list[int], piece: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "source").write_bytes(CONTENT)
    with FileSource(folder / "source") as source:
        for stop in [*sorted(stops), len(CONTENT)]:
            with FileSink(folder / "target", source.size, DIGEST) as sink:
                for chunk in source.chunks(sink.offset):
                    for start in range(0, len(chunk), piece):
                        part = chunk[start : start + min(piece, max(0, stop - sink.offset))]
                        if part:
                            sink.append(sink.offset, part)
                assert sink.offset == stop
        with FileSink(folder / "target", source.size, DIGEST) as sink:
            assert sink.complete
            sink.finish()
    assert (folder / "target").read_bytes() == CONTENT


def test_a_chunk_anywhere_but_at_the_offset_is_refused_and_stores_nothing(tmp_path: Path) -> None:
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        sink.append(0, CONTENT[:100])
        assert refusal_of(sink.append, 0, CONTENT[:100]) is Refusal.OUT_OF_ORDER  # repeated
        assert refusal_of(sink.append, 101, CONTENT[101:]) is Refusal.OUT_OF_ORDER  # a hole
        assert refusal_of(sink.append, 99, CONTENT[99:]) is Refusal.OUT_OF_ORDER
        assert sink.offset == 100
        sink.append(100, CONTENT[100:])
        sink.finish()
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_bytes_past_the_declared_size_are_refused_and_store_nothing(tmp_path: Path) -> None:
    with FileSink(tmp_path / "target", 10, DIGEST) as sink:
        assert refusal_of(sink.append, 0, CONTENT[:11]) is Refusal.OVERSIZE
        assert refusal_of(sink.append, 0, b"") is Refusal.OVERSIZE
        sink.append(0, CONTENT[:10])
        assert refusal_of(sink.append, 10, b"x") is Refusal.OVERSIZE
    assert partial_path(tmp_path / "target", DIGEST).stat().st_size == 10
    with FileSink(tmp_path / "large", FILE_BYTES_MAX, DIGEST) as sink:
        assert refusal_of(sink.append, 0, bytes(CHUNK_BYTES + 1)) is Refusal.OVERSIZE


@pytest.mark.parametrize(
    ("size", "digest"),
    [(-1, DIGEST), (FILE_BYTES_MAX + 1, DIGEST), (1, DIGEST.upper()), (1, DIGEST[:-1]), (1, "../" + DIGEST[3:])],
)
def test_an_impossible_declaration_makes_no_file(tmp_path: Path, size: int, digest: str) -> None:
    assert refusal_of(FileSink, tmp_path / "target", size, digest) is Refusal.BAD_DECLARATION
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_of_the_right_size_are_discarded(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "target", len(CONTENT), DIGEST)
    sink.append(0, CONTENT[:-1] + b"!")
    with pytest.raises(TransferError, match=f"declared {DIGEST}; discarded; send it again from the start") as caught:
        sink.finish()
    assert caught.value.refusal is Refusal.DIGEST
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_a_crash_damaged_on_disk_are_found_by_the_digest(tmp_path: Path) -> None:
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        sink.append(0, CONTENT[:1000])
    partial = partial_path(tmp_path / "target", DIGEST)
    partial.write_bytes(bytes(1000))  # a length that reached the disk before its bytes did
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        assert sink.offset == 1000
        sink.append(1000, CONTENT[1000:])
        assert refusal_of(sink.finish) is Refusal.DIGEST
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        assert sink.offset == 0


def test_finishing_early_keeps_what_has_arrived(tmp_path: Path) -> None:
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        sink.append(0, CONTENT[:100])
        assert refusal_of(sink.finish) is Refusal.INCOMPLETE
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        assert sink.offset == 100


def test_another_digest_begins_again_and_removes_the_old_partial(tmp_path: Path) -> None:
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        sink.append(0, CONTENT[:100])
    other = hashlib.sha256(b"other").hexdigest()
    with FileSink(tmp_path / "target", 5, other) as sink:
        assert sink.offset == 0
        sink.append(0, b"other")
        sink.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_partial_longer_than_declared_begins_again(tmp_path: Path) -> None:
    partial_path(tmp_path / "target", DIGEST).write_bytes(CONTENT + b"more")
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        assert sink.offset == 0


def test_one_sink_at_a_time_holds_a_partial(tmp_path: Path) -> None:
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST):
        assert refusal_of(FileSink, tmp_path / "target", len(CONTENT), DIGEST) is Refusal.BUSY
    FileSink(tmp_path / "target", len(CONTENT), DIGEST).close()


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    with FileSource(tmp_path / "source") as source:
        assert list(source.chunks()) == []
    FileSink(tmp_path / "target", 0, hashlib.sha256().hexdigest()).finish()
    assert (tmp_path / "target").read_bytes() == b""


def test_offsets_past_four_gibibytes_are_read_and_written(tmp_path: Path) -> None:
    size = FOUR_GIB + CHUNK_BYTES + 3
    with (tmp_path / "source").open("wb") as file:  # sparse: a few blocks on disk
        file.truncate(size)
        file.seek(FOUR_GIB - 1)
        file.write(b"AB")
        file.seek(size - 1)
        file.write(b"Z")
    with FileSource(tmp_path / "source") as source:
        assert source.size == size
        assert source.chunk_at(FOUR_GIB - 1)[:2] == b"AB"
        tail = list(source.chunks(FOUR_GIB))
    assert [len(chunk) for chunk in tail] == [CHUNK_BYTES, 3]
    partial = partial_path(tmp_path / "target", DIGEST)
    with partial.open("wb") as file:
        file.truncate(FOUR_GIB)
    with FileSink(tmp_path / "target", size, DIGEST) as sink:
        assert sink.offset == FOUR_GIB
        for chunk in tail:
            sink.append(sink.offset, chunk)
        assert sink.complete
    with partial.open("rb") as file:
        file.seek(FOUR_GIB)
        assert file.read(1) == b"B"
        file.seek(size - 1)
        assert file.read() == b"Z"


def test_a_source_says_when_it_cannot_be_read_or_has_shrunk(tmp_path: Path) -> None:
    assert refusal_of(FileSource, tmp_path / "missing") is Refusal.SOURCE
    (tmp_path / "source").write_bytes(CONTENT)
    with FileSource(tmp_path / "source") as source:
        assert refusal_of(source.chunk_at, len(CONTENT) + 1) is Refusal.OUT_OF_ORDER
        assert refusal_of(source.chunk_at, -1) is Refusal.OUT_OF_ORDER
        os.truncate(tmp_path / "source", 100)
        assert refusal_of(source.chunk_at, 0) is Refusal.SOURCE


def test_a_full_disk_keeps_the_offset_and_names_the_missing_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileSink(tmp_path / "target", len(CONTENT), DIGEST) as sink:
        sink.append(0, CONTENT[:100])
        with monkeypatch.context() as patch:

            def full(fd: int, data: memoryview, offset: int) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(transfer.os, "pwrite", full)
            patch.setattr(transfer, "free_bytes", lambda path: 60)
            with pytest.raises(TransferError, match="2400 bytes are missing; free space, then try again") as caught:
                sink.append(100, CONTENT[100:])
        assert caught.value.refusal is Refusal.DISK
        assert sink.offset == 100
        sink.append(100, CONTENT[100:])
        sink.finish()


def test_free_space_is_asked_of_a_folder_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_free_bytes(tmp_path / "not" / "yet", 1)
    monkeypatch.setattr(transfer, "free_bytes", lambda path: 1000)
    with pytest.raises(CosiloError, match="1500 bytes needed, 1000 free, 500 bytes missing"):
        require_free_bytes(tmp_path, 1500)
