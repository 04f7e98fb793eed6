"""Writes a site's update: trained minus global weights, raw little-endian float32 in the tensor table's order, no
header.

Owns that file. Must not know how weights were trained. Whole and on disk, or not there; readable by its owner only.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cosilo_client.trainer.jobs import FailureCode, TrainerFailed
from cosilo_common.transfer import sync_folder


def write_update(path: Path, trained: Iterable[npt.NDArray[np.float32]], base: npt.NDArray[np.float32]) -> None:
    """Write trained - base.

    trained: flat float32 blocks in the table's order; base: (d,), may be memory-mapped. Raises TrainerFailed for a
    value that is not finite, or a disk that does not take it; then no file is left.
    """
    partial = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            offset = 0
            for block in trained:
                delta = block - base[offset : offset + block.size]
                if not np.isfinite(delta).all():
                    raise TrainerFailed(
                        FailureCode.NON_FINITE,
                        f"the update is not finite near element {offset}",
                        "ask the run's admin for a lower learning rate",
                    )
                stream.write(delta.astype("<f4", copy=False).data)
                offset += block.size
            if offset != base.size:
                raise TrainerFailed(FailureCode.DATA, f"{offset} values trained for a model of {base.size}")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainerFailed(
            FailureCode.DISK,
            f"{path}: {error.strerror}",
            f"free {4 * base.size} bytes there, then start the round again",
        ) from None
    except TrainerFailed:
        partial.unlink(missing_ok=True)
        raise
