"""`cosilo-coordinator backup` and `restore`: the coordinator's folders as one folder whose every byte is vouched for, and back.

A backup is made while the coordinator serves. It holds the database as one moment had it (snapshot.py), every artifact that this database
refers to, the audit log, the identity with its keys, and the configuration; `backup.json` lists them with their SHA-256 and is written last, so
that a backup without it was never finished. A restored coordinator is older than its sites: what becomes of that is in
docs/operating/recover.md. Must not know rounds or sockets.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cosilo_common.audit import AUDIT_FILE
from cosilo_common.database import sync_file
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import describe_validation
from cosilo_common.transfer import file_digest, require_free_bytes
from cosilo_server.config import CoordinatorConfig
from cosilo_server.retention import HOLD_FILE, holding
from cosilo_server.snapshot import snapshot
from cosilo_server.store import Store

LISTING_FILE: Final = "backup.json"
UNFINISHED_FILE: Final = "restore.unfinished"  # in a data folder: a restore was cut, and serving it would begin from nothing
FORMAT: Final = 1
_DATABASE, _CONFIG, _ARTIFACTS, _IDENTITY = "state.db", "coordinator.toml", "artifacts", "identity"
_ABANDONED = "the coordinator was restored from a backup of {at}"
_IN_AN_EMPTY_FOLDER: Final = frozenset({"lock", UNFINISHED_FILE, "lost+found"})  # what may lie in a data folder that has no data
_COPY_BYTES = 1 << 20


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(pattern=r"^(state\.db|audit\.log|coordinator\.toml|artifacts/[0-9a-f]{64}|identity/\w[\w.-]*(/\w[\w.-]*)*)$")
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Listing(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    federation: str
    made_at: str
    files: tuple[_File, ...]


@dataclass(frozen=True)
class Backup:
    """A whole backup. made_at: RFC 3339, UTC; bytes: of all files together."""

    federation: str
    made_at: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Newest:
    """A run's newest checkpoint in a backup. run: hex; weights: a safetensors file named by its SHA-256."""

    run: str
    round: int
    weights: Path


def back_up(config_file: Path, to: Path) -> Backup:
    """Writes a backup of a coordinator, running or not, into a new or empty folder. Raises CosiloError; then the folder has no backup.json."""
    config = CoordinatorConfig.read(config_file)
    data = config.paths.data
    if not (data / _DATABASE).is_file():
        raise CosiloError("back up", f"{data} has no {_DATABASE}", "give the coordinator.toml of a coordinator that has run: --config FILE")
    _make_empty(to, "back up")
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with holding(data / HOLD_FILE, exclusive=False):  # the collector waits: nothing that the copy refers to goes before it is copied
            snapshot(data / _DATABASE, to / _DATABASE, _ABANDONED.format(at=made_at))
            artifacts = _referred(to / _DATABASE)
            require_free_bytes(to, sum((data / _ARTIFACTS / digest).stat().st_size for digest in artifacts))
            files = [_listed(to, _DATABASE)]
            for digest in artifacts:
                files.append(_copied(data / _ARTIFACTS / digest, to, f"{_ARTIFACTS}/{digest}"))
                if files[-1].sha256 != digest:
                    raise CosiloError(
                        "back up", f"artifact {digest} has rotted on the disk", "restore it from an earlier backup, then try again"
                    )
        if (data / AUDIT_FILE).exists():  # as far as it goes now: a line that is just being written is cut off by the next
            files.append(_copied(data / AUDIT_FILE, to, AUDIT_FILE))
        files.append(_copied(config_file, to, _CONFIG))
        for path in _identity_files(config.paths.identity, {data.resolve(), to.resolve()}, config_file):
            files.append(_copied(path, to, f"{_IDENTITY}/{path.relative_to(config.paths.identity)}"))
        listing = _Listing(format=FORMAT, federation=config.federation, made_at=made_at, files=tuple(files))
        for folder in {(to / file.path).parent for file in files}:
            sync_file(folder)
        _write(to / LISTING_FILE, json.dumps(listing.model_dump(mode="json"), indent=1).encode() + b"\n")
        sync_file(to)
    except OSError as error:
        raise CosiloError(
            "back up", f"{error.filename or to}: {error.strerror}", "check the folder, its owner and its free space"
        ) from None
    except ValidationError as error:
        raise CosiloError("back up", describe_validation(error), "rename that file: letters, digits, _ . and - only") from None
    return _summary(listing)


def read_backup(folder: Path) -> Backup:
    """Verifies a backup, every byte. Raises CosiloError where it was never finished or a file is missing or changed."""
    return _summary(_verified(folder))


def newest_weights(folder: Path) -> list[Newest]:
    """Of each run in a finished backup, its newest checkpoint: what a federation that begins anew can train on from."""
    with closing(sqlite3.connect(f"{(folder / _DATABASE).resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        rows = database.execute("SELECT run, MAX(round), weights FROM checkpoints GROUP BY run ORDER BY MAX(created_at)").fetchall()
    return [Newest(run.hex(), number, folder / _ARTIFACTS / weights.hex()) for run, number, weights in rows]


def restore(folder: Path, config_file: Path) -> Backup:
    """Puts a verified backup in the places that config_file names, or, where there is no such file, that the backup's own names from there.

    The data folder must be empty; a file of the identity that is there already must be the same. Begun again after a cut, it begins anew.
    Raises CosiloError. The caller holds the data folder's lock.
    """
    listing = _verified(folder)
    config = _config_to_be(folder, config_file)
    if config.federation != listing.federation:
        raise CosiloError(
            "restore",
            f"the backup is of federation {listing.federation}, {config_file} of {config.federation}",
            "name another --config FILE",
        )
    data, identity = config.paths.data, config.paths.identity
    try:
        _check_places(listing, folder, data, identity)
        require_free_bytes(data, sum(file.size_bytes for file in listing.files))
        _write(data / UNFINISHED_FILE, b"cosilo-coordinator restore began here and has not ended\n")
        if not config_file.exists():
            _put_back(folder, listing, _CONFIG, config_file)
        for file in listing.files:
            place, _, rest = file.path.partition("/")
            if place == _IDENTITY and not (identity / rest).exists():
                _put_back(folder, listing, file.path, identity / rest)
            elif place in (_ARTIFACTS, AUDIT_FILE):
                _put_back(folder, listing, file.path, data / file.path)
        for left in (data / f"{_DATABASE}-wal", data / f"{_DATABASE}-shm"):
            left.unlink(missing_ok=True)
        _put_back(folder, listing, _DATABASE, data / _DATABASE)
        (data / UNFINISHED_FILE).unlink()
        sync_file(data)
    except OSError as error:
        raise _not_written(error, data, folder, config_file) from None
    return _summary(listing)


def check_restored(data: Path) -> None:
    """Raises CosiloError where a restore into this data folder was cut."""
    if (data / UNFINISHED_FILE).exists():
        raise CosiloError("start coordinator", f"a restore into {data} was cut", "run cosilo-coordinator restore again")


def data_folder_after(folder: Path, config_file: Path) -> Path:
    """Where `restore` will put the data, made if it is missing: its lock is to be held. Raises CosiloError."""
    data = _config_to_be(folder, config_file).paths.data
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(error, data, folder, config_file) from None
    return data


def _not_written(error: OSError, data: Path, folder: Path, config_file: Path) -> CosiloError:
    hint = "check the folder, its owner and its free space"
    if not config_file.exists():  # as the daemon's user, who may not write beside it
        hint = f"there is no {config_file}: install it first (as root, `install -m 644 {folder / _CONFIG} {config_file}`), then try again"
    return CosiloError("restore", f"{error.filename or data}: {error.strerror}", hint)


def _config_to_be(folder: Path, config_file: Path) -> CoordinatorConfig:
    if config_file.exists():
        return CoordinatorConfig.read(config_file)
    found = CoordinatorConfig.read(folder / _CONFIG)
    back, here = folder.resolve(), config_file.resolve().parent

    def moved(path: Path) -> Path:
        return here / path.relative_to(back) if path.is_relative_to(back) else path

    paths = found.paths.model_copy(update={"identity": moved(found.paths.identity), "data": moved(found.paths.data)})
    return found.model_copy(update={"paths": paths})


def _check_places(listing: _Listing, folder: Path, data: Path, identity: Path) -> None:
    if not (data / UNFINISHED_FILE).exists():
        found = sorted(path.name for path in data.iterdir() if path.name not in _IN_AN_EMPTY_FOLDER)
        if found:
            raise CosiloError("restore", f"{data} is not empty: {', '.join(found[:3])}", "move it away, whole; never mix two states")
    for file in listing.files:
        place, _, rest = file.path.partition("/")
        if place == _IDENTITY and (identity / rest).exists() and file_digest(identity / rest) != file.sha256:
            raise CosiloError("restore", f"{identity / rest} is there and is another", f"move {identity} away, whole, and restore again")


def _verified(folder: Path) -> _Listing:
    path = folder / LISTING_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CosiloError("read backup", f"{path}: {error.strerror}", "a backup without it was never finished: use another") from None
    try:
        listing = _Listing.model_validate_json(data)
    except ValidationError as error:
        raise CosiloError("read backup", f"{path}: {describe_validation(error)}", "use another backup") from None
    if listing.format != FORMAT:
        raise CosiloError("read backup", f"{path}: format {listing.format}, this Cosilo reads {FORMAT}", "install the Cosilo that wrote it")
    for file in listing.files:
        try:
            right = (folder / file.path).stat().st_size == file.size_bytes and file_digest(folder / file.path) == file.sha256
        except OSError as error:
            raise CosiloError("read backup", f"{file.path}: {error.strerror}", "use another backup: this one is torn") from None
        if not right:
            raise CosiloError("read backup", f"{file.path} is not as it was written", "use another backup: this one is damaged")
    return listing


def _referred(database: Path) -> list[str]:
    store = Store(database)
    try:
        return sorted(digest.hex() for digest in store.shelf.references())
    finally:
        store.close()
        for left in (f"{database}-wal", f"{database}-shm"):
            Path(left).unlink(missing_ok=True)


def _identity_files(folder: Path, but: set[Path], config_file: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.resolve() in but or path.resolve() == config_file.resolve():
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _identity_files(path, but, config_file)
        elif path.is_file():
            yield path


def _make_empty(folder: Path, operation: str) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink():
            raise CosiloError(operation, f"{folder} is a link", "name the folder itself: keys will lie in it")
        if folder.stat().st_uid != os.geteuid():  # who may put files there first, and read what is written into them
            raise CosiloError(operation, f"{folder} is somebody else's", "name a new folder: keys will lie in it")
        if any(folder.iterdir()):
            raise CosiloError(operation, f"{folder} is not empty", "name a new folder: a backup never replaces another")
        folder.chmod(0o700)  # keys will lie in it
    except OSError as error:
        raise CosiloError(operation, f"{folder}: {error.strerror}", "name a folder that can be made") from None


def _listed(folder: Path, name: str) -> _File:
    return _File(path=name, size_bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name))


def _copied(source: Path, folder: Path, name: str) -> _File:
    _copy(source, folder / name)
    return _listed(folder, name)


def _put_back(folder: Path, listing: _Listing, name: str, to: Path) -> None:
    _copy(folder / name, to)
    if file_digest(to) != next(file.sha256 for file in listing.files if file.path == name):
        raise CosiloError("restore", f"{to} does not have the bytes that were written", "check the disk, then restore again")


def _copy(source: Path, to: Path) -> None:
    """Mode 0600 always: half of these files are keys, and the coordinator is the one who reads the others."""
    to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = to.with_name(f"{to.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as there, source.open("rb") as here:
        while block := here.read(_COPY_BYTES):
            there.write(block)
        there.flush()
        os.fsync(there.fileno())
    part.replace(to)
    sync_file(to.parent)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _summary(listing: _Listing) -> Backup:
    return Backup(listing.federation, listing.made_at, len(listing.files), sum(file.size_bytes for file in listing.files))
