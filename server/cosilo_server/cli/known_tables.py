"""Tensor tables that this machine has worked out before, so that only the first run of an architecture waits for torch.

Owns the files, one a table, in the user's cache folder. Must not know how a table is worked out. What stands there is a help and never
believed further than that: the coordinator works every run's table out for itself.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from cosilo_common.canonical import sha256
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable

TABLE_BYTES_MAX: Final = 32 << 20  # a manifest's tensor table at its largest
_RELEASES: Final = ("cosilo-common", "diffusers", "torch")  # whose change may change a table


def known_table(architecture: Architecture, work_out: Callable[[Architecture], TensorTable]) -> TensorTable:
    """The architecture's table, from the cache or worked out and put there.

    A file that is missing, cut or of other releases is made again; a folder that cannot be written is done without.
    """
    path = _folder() / f"{_key(architecture)}.json"
    found = _read(path)
    if found is not None:
        return found
    table = work_out(architecture)
    _write(path, table)
    return table


def _folder() -> Path:
    """As the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cosilo" / "tables"


def _key(architecture: Architecture) -> str:
    plain = {"architecture": architecture.model_dump(mode="json"), "releases": [_release(name) for name in _RELEASES]}
    return sha256(json.dumps(plain, sort_keys=True).encode()).hex()


def _release(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _read(path: Path) -> TensorTable | None:
    try:
        with path.open("rb") as file:
            return TensorTable.from_plain(json.loads(file.read(TABLE_BYTES_MAX)))
    except (OSError, ValueError, CosiloError, RecursionError):
        return None


def _write(path: Path, table: TensorTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(table.to_plain(), file)
        Path(file.name).replace(path)
    except OSError:
        pass  # the next run takes as long as this one
