"""NPZ files in MedMNIST's layout: train_images, train_labels, and the same for val and test.

Owns the layout. Every array's header is checked before it is read: no pickled objects, no declared size that the file
does not hold.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosilo_client.data.arrays import ARRAY_BYTES_MAX, ArraySource, array_source
from cosilo_client.data.config import DataConfig
from cosilo_common.errors import CosiloError


def open_npz(config: DataConfig) -> ArraySource:
    """One split of an NPZ file.

    Raises CosiloError for a missing array, a wrong type, several labels an image, or a header that lies.
    """
    path = config.path
    if path is None:
        raise CosiloError("read data", "kind = npz has no path", "set path in [data]")
    try:
        with zipfile.ZipFile(path) as archive:
            images = _read_array(archive, path, f"{config.split}_images")
            labels = _read_array(archive, path, f"{config.split}_labels")
    except CosiloError:
        raise
    except Exception as error:  # a broken file raises whatever zipfile or numpy's parser stumbled on: struct, tokenize, SyntaxError, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CosiloError("read data", f"{path}: {reason}", "check path in [data], or copy the file again") from None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # MedMNIST stores a column
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise CosiloError(
            "read data",
            f"{path}: labels are {labels.dtype} {labels.shape}",
            "use a data set with one whole-number class an image",
        )
    return array_source(config, path.name, images, labels.astype(np.int64))


def _read_array(archive: zipfile.ZipFile, path: Path, name: str) -> npt.NDArray[Any]:
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise CosiloError("read data", f"{path}: no array {name}", "check split in [data]; the layout is MedMNIST's") from None
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        declared = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or declared > ARRAY_BYTES_MAX or declared != member.file_size - stream.tell():
            raise CosiloError("read data", f"{path}: {name} declares {dtype} {shape} and does not hold that", "copy the file again")
    with archive.open(member) as stream:
        array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array
