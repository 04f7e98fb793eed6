"""A backup vouches for every byte, a torn one is found, and a restore never mixes two states."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from cosilo_common.audit import AUDIT_FILE, AuditLog
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import load_identity
from cosilo_server import backup as module
from cosilo_server.artifacts import Artifacts
from cosilo_server.backup import (
    LISTING_FILE,
    UNFINISHED_FILE,
    back_up,
    check_restored,
    data_folder_after,
    newest_weights,
    read_backup,
    restore,
)
from cosilo_server.store import Store
from tests.identity_parties import FEDERATION, found
from tests.unit.test_retention import RUN, Folder


@dataclass
class Place:
    """A coordinator's folder, configuration and data."""

    config: Path
    data: Path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    identity = found(tmp_path / "federation").coordinator.folder
    config = identity / "coordinator.toml"
    if not config.exists():
        config.write_text(f'federation = "{FEDERATION}"\n')
    data = identity / "data"
    data.mkdir()
    folder = Folder(data)
    folder.fill(8)
    folder.collected(retired=4)
    folder.artifacts.put_bytes(b"on its way")  # nothing refers to it
    return Place(config, data)


def whole(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_restored_is_what_was_backed_up(place: Place, tmp_path: Path) -> None:
    made = back_up(place.config, tmp_path / "backup")
    assert read_backup(tmp_path / "backup") == made
    assert made.federation == FEDERATION
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "backup").rglob("*") if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "backup", tmp_path / "backup" / "identity"]} == {0o700}
    new = tmp_path / "new machine" / "coordinator.toml"
    new.parent.mkdir()
    (new.parent / "data").mkdir()
    assert restore(tmp_path / "backup", new) == made
    assert new.read_bytes() == place.config.read_bytes()
    assert load_identity(new.parent).membership == load_identity(place.config.parent).membership
    store, artifacts = Store(new.parent / "data" / "state.db"), Artifacts(new.parent / "data" / "artifacts")
    assert [c.round for c in store.checkpoints(RUN)] == list(range(9))
    assert set(artifacts.digests()) == {digest.hex() for digest in store.shelf.references()}
    check_restored(new.parent / "data")


def test_a_backup_says_which_weights_a_new_federation_can_begin_from(place: Place, tmp_path: Path) -> None:
    back_up(place.config, tmp_path / "backup")
    before = whole(tmp_path / "backup")
    (newest,) = newest_weights(tmp_path / "backup")
    store = Store(place.data / "state.db")
    last = store.checkpoints(RUN)[-1]
    assert (newest.run, newest.round, newest.weights.name) == (RUN.hex(), 8, last.weights.hex())
    assert newest.weights.is_file()
    assert whole(tmp_path / "backup") == before


def test_who_did_what_is_not_lost_with_the_machine(place: Place, tmp_path: Path) -> None:
    """The chain goes on from where the backup has it; a head that was kept later shows that the end is missing."""
    log = AuditLog(place.data / AUDIT_FILE)
    log.append("admin/ada", "create run")
    kept = log.verify()
    back_up(place.config, tmp_path / "backup")
    log.append("admin/ada", "stop run")
    later = log.verify()
    new = tmp_path / "new machine" / "coordinator.toml"
    new.parent.mkdir()
    (new.parent / "data").mkdir()
    restore(tmp_path / "backup", new)
    restored = AuditLog(new.parent / "data" / AUDIT_FILE)
    assert restored.verify(kept) == kept
    restored.append("coordinator", "started")
    restored.verify(kept)
    with pytest.raises(CosiloError, match="is not the one whose hash was kept"):
        restored.verify(later)


def test_an_existing_backup_is_never_replaced(place: Place, tmp_path: Path) -> None:
    back_up(place.config, tmp_path / "backup")
    before = whole(tmp_path / "backup")
    with pytest.raises(CosiloError, match=r"back up: .*backup is not empty; name a new folder"):
        back_up(place.config, tmp_path / "backup")
    assert whole(tmp_path / "backup") == before


@pytest.mark.parametrize("kind", ["cut", "longer", "changed", "missing", "unlisted"])
def test_a_damaged_backup_is_found_before_anything_is_written(place: Place, tmp_path: Path, kind: str) -> None:
    backup = tmp_path / "backup"
    back_up(place.config, backup)
    artifact = next((backup / "artifacts").iterdir())
    data = artifact.read_bytes()
    match kind:
        case "cut":
            artifact.write_bytes(data[:-1])
        case "longer":
            artifact.write_bytes(data + b"\0")
        case "changed":
            artifact.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "missing":
            artifact.unlink()
        case "unlisted":
            (backup / LISTING_FILE).unlink()
    with pytest.raises(CosiloError, match="use another"):
        restore(backup, tmp_path / "new" / "coordinator.toml")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "path", ["../evil", "identity/../../evil", "/etc/passwd", "artifacts/../state.db", "identity/./x", "data/state.db"]
)
def test_a_listing_cannot_name_a_file_elsewhere(place: Place, tmp_path: Path, path: str) -> None:
    back_up(place.config, tmp_path / "backup")
    listing = json.loads((tmp_path / "backup" / LISTING_FILE).read_text())
    listing["files"][0]["path"] = path
    (tmp_path / "backup" / LISTING_FILE).write_text(json.dumps(listing))
    with pytest.raises(CosiloError, match=r"read backup: .*files\.0\.path"):
        read_backup(tmp_path / "backup")


def test_a_restore_goes_into_an_empty_folder_only(place: Place, tmp_path: Path) -> None:
    back_up(place.config, tmp_path / "backup")
    before = whole(place.data)
    with pytest.raises(CosiloError, match=r"data is not empty: .*move it away, whole; never mix two states"):
        restore(tmp_path / "backup", place.config)
    assert whole(place.data) == before
    shutil.move(place.data, tmp_path / "lost")
    place.data.mkdir()
    (place.config.parent / "tls.crt").write_bytes(b"a renewed one")
    with pytest.raises(CosiloError, match=r"tls\.crt is there and is another"):
        restore(tmp_path / "backup", place.config)
    assert list(place.data.iterdir()) == []


def test_a_restore_where_no_configuration_may_be_written_says_to_install_it_first(place: Place, tmp_path: Path) -> None:
    back_up(place.config, tmp_path / "backup")
    closed = tmp_path / "closed"
    closed.write_bytes(b"no folder, so that nobody writes into it, root included")
    asked = (
        rf"there is no {closed}/coordinator\.toml: install it first .*`install -m 644 {tmp_path}/backup/coordinator\.toml {closed}/coord"
    )
    with pytest.raises(CosiloError, match=asked):
        data_folder_after(tmp_path / "backup", closed / "coordinator.toml")
    with pytest.raises(CosiloError, match=asked):
        restore(tmp_path / "backup", closed / "coordinator.toml")


@pytest.mark.parametrize("step", range(0, 16, 3))
def test_a_restore_that_was_cut_is_not_served_and_begins_anew(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    back_up(place.config, tmp_path / "backup")
    new = tmp_path / "new" / "coordinator.toml"
    (new.parent / "data").mkdir(parents=True)
    real, calls = module._copy, iter(range(step + 1))

    class Killed(BaseException):
        pass

    def dying(source: Path, to: Path) -> None:
        if next(calls, None) == step:
            to.with_name(f"{to.name}.part").write_bytes(source.read_bytes()[:3])
            raise Killed
        real(source, to)

    monkeypatch.setattr(module, "_copy", dying)
    with pytest.raises(Killed):
        restore(tmp_path / "backup", new)
    assert (new.parent / "data" / UNFINISHED_FILE).exists()
    with pytest.raises(CosiloError, match="was cut; run cosilo-coordinator restore again"):
        check_restored(new.parent / "data")
    monkeypatch.undo()
    restore(tmp_path / "backup", new)
    check_restored(new.parent / "data")
    artifacts = Artifacts(new.parent / "data" / "artifacts")
    for digest in Store(new.parent / "data" / "state.db").shelf.references():
        artifacts.verify(digest.hex())


def test_a_rotten_artifact_is_found_while_it_is_backed_up(place: Place, tmp_path: Path) -> None:
    store, artifacts = Store(place.data / "state.db"), Artifacts(place.data / "artifacts")
    digest = sorted(store.shelf.references())[0].hex()
    artifacts.path(digest).write_bytes(b"rotten")
    with pytest.raises(CosiloError, match=f"artifact {digest} has rotted"):
        back_up(place.config, tmp_path / "backup")
    with pytest.raises(CosiloError, match="was never finished"):
        read_backup(tmp_path / "backup")


def test_a_backup_of_nothing_or_to_nowhere_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CosiloError, match="back up"):
        back_up(place.config, tmp_path / "file" / "backup")
    empty = tmp_path / "empty" / "coordinator.toml"
    empty.parent.mkdir()
    empty.write_text(f'federation = "{FEDERATION}"\n')
    with pytest.raises(CosiloError, match=r"has no state\.db"):
        back_up(empty, tmp_path / "backup")
    back_up(place.config, tmp_path / "backup")
    empty.write_text('federation = "another"\n')
    with pytest.raises(CosiloError, match=f"the backup is of federation {FEDERATION}"):
        restore(tmp_path / "backup", empty)
    assert [path.name for path in empty.parent.iterdir()] == ["coordinator.toml"]
