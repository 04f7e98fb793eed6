"""IDX files, the format of MNIST and Fashion-MNIST: a four-byte magic, sizes, then raw bytes; plain or .gz.

Owns the format (described at yann.lecun.com/exdb/mnist). A header that lies about its size is refused before anything
is allocated.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from cosilo_client.data.arrays import ARRAY_BYTES_MAX, ArraySource, array_source
from cosilo_client.data.config import DataConfig
from cosilo_common.errors import CosiloError

UNSIGNED_BYTE = 0x08  # the type code of MNIST's files; the format's other types are not used for images
DIMENSIONS_MAX = 4
BLOCK_BYTES = 1 << 20
_PREFIX = {"train": "train", "test": "t10k"}


def open_idx(config: DataConfig) -> ArraySource:
    """The images and labels of one split in a folder.

    Raises CosiloError if a file is missing or does not match its header.
    """
    if config.split not in _PREFIX or config.path is None:
        raise CosiloError("read data", f"IDX files have no split {config.split!r}", "set split to train or test")
    prefix = _PREFIX[config.split]
    images_path = _find(config.path, prefix, "images", 3)
    labels_path = _find(config.path, prefix, "labels", 1)
    images, labels = read_idx(images_path), read_idx(labels_path)
    return array_source(config, images_path.name, images, labels)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """One IDX file of unsigned bytes, whole.

    Reads no more than its header declares, and that at most ARRAY_BYTES_MAX.
    """
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as stream:
            magic = stream.read(4)
            if len(magic) != 4 or magic[:3] != bytes((0, 0, UNSIGNED_BYTE)) or not 1 <= magic[3] <= DIMENSIONS_MAX:
                raise CosiloError("read data", f"{path}: not an IDX file of unsigned bytes", "check path in [data]")
            sizes = stream.read(4 * magic[3])
            shape = tuple(int.from_bytes(sizes[k : k + 4], "big") for k in range(0, len(sizes), 4))
            declared = math.prod(shape)
            if len(shape) != magic[3] or declared > ARRAY_BYTES_MAX:
                raise CosiloError("read data", f"{path}: its header declares {declared} bytes", f"at most {ARRAY_BYTES_MAX} are read")
            body = _up_to(stream, declared)
            if len(body) != declared or stream.read(1):
                raise CosiloError("read data", f"{path}: its length is not the {declared} bytes of its header", "copy the file again")
    except (OSError, EOFError, zlib.error) as error:
        raise CosiloError("read data", f"{path}: {error}", "copy the file again") from None
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _up_to(stream: IO[bytes], size_bytes: int) -> bytearray:
    """What is there, at most so many bytes. `read(size)` would set them all aside first, on the word of a header."""
    body = bytearray()
    while len(body) < size_bytes and (block := stream.read(min(BLOCK_BYTES, size_bytes - len(body)))):
        body += block
    return body


def _find(folder: Path, prefix: str, what: str, dimensions: int) -> Path:
    names = [f"{prefix}-{what}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CosiloError("read data", f"{folder}: no {names[0]}, plain or .gz", "check path and split in [data]")
