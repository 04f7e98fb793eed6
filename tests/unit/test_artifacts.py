"""Artifacts and the spool: whole under their own name or not there, and no name from outside becomes a path."""

import errno
import hashlib
import shutil
from pathlib import Path

import pytest

from cosilo_common import transfer
from cosilo_common.errors import CosiloError
from cosilo_common.transfer import Refusal, TransferError
from cosilo_server.artifacts import Artifacts
from cosilo_server.spool import ROUND_MAX, Spool

RUN = "ab" * 32
CONTENT = b"an update" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NOT_DIGESTS = [
    "",
    "..",
    "../" + "a" * 61,
    "A" * 64,
    "a" * 63,
    "a" * 65,
    "g" * 64,
    "a" * 63 + "/",
    "a" * 63 + "\n",
    "٣" * 64,
]


def test_an_artifact_is_named_by_its_digest(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    digest = artifacts.put_bytes(CONTENT)
    assert digest == DIGEST
    assert artifacts.has(DIGEST)
    assert artifacts.size(DIGEST) == len(CONTENT)
    assert artifacts.digests() == [DIGEST]
    with artifacts.open(DIGEST) as file:
        assert file.read() == CONTENT
    assert artifacts.path(DIGEST).stat().st_mode & 0o777 == 0o600


def test_a_file_is_moved_in_and_twice_is_harmless(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    for _ in range(2):
        with artifacts.scratch(".weights") as path:
            path.write_bytes(CONTENT)
            assert artifacts.put_file(path) == DIGEST
            assert not path.exists()
    assert artifacts.digests() == [DIGEST]


def test_what_a_killed_process_left_unfinished_is_removed_at_start(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    kept = artifacts.put_bytes(CONTENT)
    (tmp_path / "artifacts" / "scratch" / "half").write_bytes(b"half")
    assert Artifacts(tmp_path / "artifacts").digests() == [kept]
    assert list((tmp_path / "artifacts" / "scratch").iterdir()) == []


def test_a_failed_scratch_leaves_nothing(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    with pytest.raises(RuntimeError), artifacts.scratch() as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert not path.exists()


def test_damage_on_disk_is_found(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    artifacts.put_bytes(CONTENT)
    artifacts.verify(DIGEST)
    artifacts.path(DIGEST).write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(CosiloError, match="the disk has damaged it"):
        artifacts.verify(DIGEST)


def test_a_deleted_artifact_is_gone_and_says_so(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    artifacts.put_bytes(CONTENT)
    artifacts.delete(DIGEST)
    artifacts.delete(DIGEST)
    assert not artifacts.has(DIGEST)
    for ask in (artifacts.open, artifacts.size, artifacts.path, artifacts.verify):
        with pytest.raises(CosiloError, match="is not in the store"):
            ask(DIGEST)


@pytest.mark.parametrize("name", NOT_DIGESTS)
def test_no_name_from_outside_becomes_a_path(tmp_path: Path, name: str) -> None:
    artifacts, spool = Artifacts(tmp_path / "artifacts"), Spool(tmp_path / "spool")
    for ask in (artifacts.has, artifacts.open, artifacts.size, artifacts.delete, artifacts.verify, artifacts.path):
        with pytest.raises(CosiloError, match="is not a digest"):
            ask(name)
    with pytest.raises(CosiloError, match="is not a run"):
        spool.path(name, 1, "st-anna")
    with pytest.raises(CosiloError, match="is not a run"):
        spool.discard_run(name)
    with pytest.raises(TransferError, match="digest is not"):
        spool.receive(RUN, 1, "st-anna", 10, name)


@pytest.mark.parametrize("site", ["", "..", "St-Anna", "a/b", "a" * 64, "a.part", "st-anna\n", "*"])
def test_no_site_but_a_site_becomes_a_path(tmp_path: Path, site: str) -> None:
    with pytest.raises(CosiloError, match="is not a site's name"):
        Spool(tmp_path).receive(RUN, 1, site, 10, DIGEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [-1, ROUND_MAX + 1])
def test_no_round_but_a_round_becomes_a_path(tmp_path: Path, number: int) -> None:
    with pytest.raises(CosiloError, match=f"round {number} is not from 0"):
        Spool(tmp_path).path(RUN, number, "st-anna")


def upload(spool: Spool, number: int, site: str, stop: int = len(CONTENT)) -> None:
    with spool.receive(RUN, number, site, len(CONTENT), DIGEST) as sink:
        sink.append(sink.offset, CONTENT[sink.offset : stop])
        if sink.complete:
            sink.finish()


def test_an_upload_goes_on_where_it_ended_in_a_later_process(tmp_path: Path) -> None:
    upload(Spool(tmp_path), 3, "st-anna", stop=100)
    spool = Spool(tmp_path)
    assert spool.received_bytes(RUN, 3, "st-anna", DIGEST) == 100
    assert not spool.whole(RUN, 3, "st-anna")
    upload(spool, 3, "st-anna")
    assert spool.whole(RUN, 3, "st-anna")
    assert spool.received_bytes(RUN, 3, "st-anna", DIGEST) == len(CONTENT)
    path = tmp_path / RUN / "3" / "st-anna"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["st-anna"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_uploads_are_kept_apart_by_round_and_site_and_discarded_together(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number, site in [(1, "st-anna"), (2, "st-anna"), (2, "st-anna-2")]:
        upload(spool, number, site)
    upload(spool, 2, "north", stop=10)
    assert spool.rounds() == [(RUN, 1), (RUN, 2)]
    assert spool.whole_sites(RUN, 2) == ["st-anna", "st-anna-2"]
    spool.discard(RUN, 2, "st-anna")
    assert spool.whole_sites(RUN, 2) == ["st-anna-2"]
    spool.discard(RUN, 2, "north")
    assert spool.received_bytes(RUN, 2, "north", DIGEST) == 0
    spool.discard_round(RUN, 2)
    spool.discard_round(RUN, 2)
    assert spool.rounds() == [(RUN, 1)]
    assert spool.whole_sites(RUN, 2) == []
    spool.discard_run(RUN)
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_was_discarded_takes_no_upload_any_more(tmp_path: Path) -> None:
    """A thread that opens an upload as its round ends comes after the removal: what it made nobody would remove."""
    spool = Spool(tmp_path)
    upload(spool, 2, "st-anna", stop=10)
    spool.discard_round(RUN, 2)
    for late in (1, 2):
        with pytest.raises(CosiloError, match=f"round {late} of run .* is over"):
            spool.receive(RUN, late, "st-anna", len(CONTENT), DIGEST)
    assert spool.rounds() == []
    upload(spool, 3, "st-anna")
    assert spool.rounds() == [(RUN, 3)]


def test_a_round_is_discarded_while_an_upload_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk renames the file between the removal's look at the folder and its hand on the name."""
    spool = Spool(tmp_path)
    sink = spool.receive(RUN, 1, "st-anna", len(CONTENT), DIGEST)
    sink.append(0, CONTENT)
    remove = shutil.rmtree
    removals: list[Path] = []

    def rmtree(folder: Path) -> None:
        removals.append(folder)
        if len(removals) == 1:
            sink.finish()
            raise FileNotFoundError(errno.ENOENT, "gone")
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    spool.discard_round(RUN, 1)
    assert len(removals) == 2
    assert spool.rounds() == []


def test_an_upload_that_does_not_fit_is_refused_before_a_byte_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    upload(spool, 1, "st-anna", stop=100)
    monkeypatch.setattr(transfer, "free_bytes", lambda path: 8000)
    with pytest.raises(CosiloError, match="8900 bytes needed, 8000 free, 900 bytes missing"):
        spool.receive(RUN, 1, "st-anna", len(CONTENT), DIGEST)
    monkeypatch.undo()
    upload(spool, 1, "st-anna")  # the refused one let go of its lock
    assert spool.whole(RUN, 1, "st-anna")


def test_one_upload_of_a_site_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with spool.receive(RUN, 1, "st-anna", len(CONTENT), DIGEST), pytest.raises(TransferError) as caught:
        spool.receive(RUN, 1, "st-anna", len(CONTENT), DIGEST)
    assert caught.value.refusal is Refusal.BUSY
