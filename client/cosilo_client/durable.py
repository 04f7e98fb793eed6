"""Small files that survive a power cut, and files that are really gone: write, sync, rename, sync the folder.

Knows nothing of what is in the files. Everything is created with mode 0600.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from cosilo_common.transfer import sync_folder

PRIVATE_FILE: Final = 0o600
PRIVATE_FOLDER: Final = 0o700


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file whole: after a power cut it holds the old bytes or the new ones, never a part."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def unlink_durably(*paths: Path) -> None:
    """Unlinks files that may be absent; the folder is synced only where one was there."""
    folders = set()
    for path in paths:
        if path.exists():
            path.unlink()
            folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)


def shred(path: Path) -> None:
    """Overwrites a small secret file in place, then unlinks it; absent is fine.

    Overwriting is best effort (a copy-on-write file system or a flash translation layer keeps the old block); the
    unlink is the promise.
    """
    if not path.exists():
        return
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    unlink_durably(path)


def make_folder(folder: Path) -> None:
    """Makes a folder with mode 0700, durably; one that exists is kept."""
    if not folder.is_dir():
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True)
        sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder and all in it; absent is fine."""
    if folder.exists():
        shutil.rmtree(folder)
        sync_folder(folder.parent)
