"""Where a run's named first weights lie at the coordinator, and whether they are those. Must not know torch, sites or the store's tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable, Vector, open_vector, write_weights
from cosilo_server.artifacts import Artifacts

WARM_FOLDER = "warm"  # beside artifacts/ in the coordinator's data folder; its operator puts files there, nothing deletes them
_OPERATION = "warm start"
_BLOCK_WORDS = 1 << 20  # 4 MB at once: memory does not grow with the model


@contextmanager
def named_weights(artifacts: Artifacts, digest: str) -> Iterator[Path]:
    """The file with that SHA-256 (hex): an artifact such as another run's checkpoint, or WARM_FOLDER/DIGEST.safetensors.

    Raises CosiloError, naming the place, where there is neither. What lies in the folder is not trusted for its name: see `check_named`.
    """
    if artifacts.has(digest):
        with artifacts.lease(digest) as path:
            yield path
        return
    path = artifacts.root.parent / WARM_FOLDER / f"{digest}.safetensors"
    if not path.is_file():
        raise CosiloError(_OPERATION, f"the coordinator has no weights with the digest {digest}", f"put the file at {path} on its machine")
    yield path


def copy_weights(source: Path, table: TensorTable, out: Path) -> None:
    """Writes a canonical weights file again, byte for byte, as `out`.

    Raises CosiloError, naming the tensor, where names, shapes, order or dtype are not the table's, and where a value is not finite.
    """
    vector = open_vector(source, table)
    write_weights(out, table, _blocks(vector))


def check_named(wanted: str, stored: str) -> None:
    """Raises CosiloError where the weights that were stored are not those that the manifest names (both SHA-256, hex)."""
    if stored != wanted:
        raise CosiloError(_OPERATION, f"the file named {wanted} has the digest {stored}", "compare it with `sha256sum` and copy it again")


def _blocks(vector: Vector) -> Iterator[Vector]:
    for start in range(0, len(vector), _BLOCK_WORDS):
        yield vector[start : start + _BLOCK_WORDS]
