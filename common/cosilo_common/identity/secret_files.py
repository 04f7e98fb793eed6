"""Files that must not be read by others, and files that must be whole or absent.

A secret's file has mode 0600 from its first byte and is never opened through a symbolic link; one that others could
read is refused rather than quietly used. Must not know what the bytes mean.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cosilo_common.errors import CosiloError

SECRET_MODE = 0o600
SECRET_FOLDER_MODE = 0o700
PUBLIC_MODE = 0o644
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def write_secret(path: Path, data: bytes) -> None:
    """Creates a file that only its owner may read, and puts it on the disk (fsync). Raises CosiloError where the path
    exists already."""
    _create(path, data, SECRET_MODE)


def write_public(path: Path, data: bytes) -> None:
    """Creates a file that everybody may read, and puts it on the disk (fsync). Raises CosiloError where the path exists
    already."""
    _create(path, data, PUBLIC_MODE)


def replace_file(path: Path, data: bytes, mode: int = PUBLIC_MODE) -> None:
    """Replaces a file whole: a reader, or a crash, finds the old bytes or the new ones."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)  # what a crash left behind: never the file that readers look at
        _create(fresh, data, mode)
        fresh.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise CosiloError("write file", f"{path}: {error.strerror}", "free some space or correct the folder's rights") from None


def read_secret(path: Path, bytes_max: int) -> bytes:
    """Reads a secret. Raises CosiloError where it is missing, a link, too long, or where others than its owner have any
    right to it."""
    return _read(path, bytes_max, secret=True)


def read_public(path: Path, bytes_max: int) -> bytes:
    """Reads a file of at most `bytes_max` bytes. Raises CosiloError where it is missing or longer."""
    return _read(path, bytes_max, secret=False)


def sync_folder(folder: Path) -> None:
    """Puts a folder's entries on the disk, so that a rename or a new file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise CosiloError("write file", f"{path} exists already", "move it away first: it is never overwritten") from None
    except OSError as error:
        raise CosiloError("write file", f"{path}: {error.strerror}", "correct the folder's path or its rights") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # a umask takes bits away at creation, never adds them: this restores 0644
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # half a file is worse than none
        raise CosiloError("write file", f"{path}: {error.strerror}", "free some space and try again") from None


def _read(path: Path, bytes_max: int, secret: bool) -> bytes:
    follow = os.O_NOFOLLOW if secret else 0
    try:
        # O_NONBLOCK: opening a pipe must not wait for somebody to write into it
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | follow)
    except FileNotFoundError:
        raise CosiloError("read file", f"{path} does not exist", "check the path, or make it anew") from None
    except OSError as error:
        raise CosiloError("read file", f"{path}: {error.strerror}", "correct its path or its rights") from None
    status = os.fstat(descriptor)  # of the open file, so that nothing changes between the look and the read
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CosiloError("read file", f"{path} is not a regular file", "check the path")
    with os.fdopen(descriptor, "rb") as file:
        if secret and status.st_mode & _OTHERS:
            rights = stat.S_IMODE(status.st_mode)
            raise CosiloError("read key", f"{path} may be read by others (mode {rights:04o})", f"run chmod 600 {path}")
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise CosiloError("read file", f"{path} is longer than {bytes_max} bytes", "check that it is the right file")
    return data
