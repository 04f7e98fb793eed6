"""A source over one array of images and one of labels: what IDX, NPZ and digits have in common.

Owns the checks on labels and the index file. Must not know file formats.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cosilo_client.data.config import CLASSES_MAX, DataConfig
from cosilo_client.data.sources import IMAGES_MAX, Picture, Pixels, Unreadable, refuse_immense
from cosilo_common.errors import CosiloError

INDEX_FILE_BYTES_MAX = 12 * IMAGES_MAX  # ten digits, a line end and a spare for each image
ARRAY_BYTES_MAX = 8 << 30  # of one array file, whose images all stand in memory while they are resized


@dataclass(frozen=True)
class ArraySource:
    """Images (n, H, W) or (n, H, W, planes) with labels (n,); see `sources.ImageSource`."""

    subject: str
    class_names: tuple[str, ...]
    images: Pixels
    labels: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]
    full_scale: int

    def counts(self) -> tuple[int, ...]:
        return tuple(int(n) for n in np.bincount(self.labels[self.chosen], minlength=len(self.class_names)))

    def pictures(self) -> Iterator[Picture | Unreadable]:
        for index in self.chosen:
            yield Picture(f"{self.subject}[{index}]", int(self.labels[index]), self.images[index], self.full_scale)


def array_source(config: DataConfig, subject: str, images: Pixels, labels: npt.NDArray[np.integer]) -> ArraySource:
    """Check that images, labels, class names and index file agree. Raises CosiloError naming the one that does not."""
    if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4):
        raise CosiloError(
            "read data",
            f"{subject}: images are {images.dtype} {images.shape}",
            "store uint8 or uint16, (n, H, W) or (n, H, W, C)",
        )
    if labels.shape != (len(images),):
        raise CosiloError("read data", f"{subject}: labels {labels.shape} for {len(images)} images", "store one class number an image")
    if not len(images) or not images[0].size:
        raise CosiloError("read data", f"{subject}: no image", "check path and split in [data]")
    refuse_immense(len(images), subject)
    low, high = int(labels.min()), int(labels.max())
    limit = len(config.classes) or CLASSES_MAX
    if low < 0 or high >= limit:
        raise CosiloError(
            "read data",
            f"{subject}: label {low if low < 0 else high} is not between 0 and {limit - 1}",
            "check classes in [data]",
        )
    names = config.classes or tuple(str(number) for number in range(high + 1))
    chosen = np.arange(len(images))
    if config.index_file is not None:
        chosen = read_index_file(config.index_file, len(images))
    full_scale = 255 if images.dtype == np.uint8 else config.full_scale
    return ArraySource(subject, names, images, labels.astype(np.int64), chosen, full_scale)


def read_index_file(path: Path, count: int) -> npt.NDArray[np.int64]:
    """Image numbers, one a line, each in [0, count) and once; lines that start with # and empty lines are skipped."""
    try:
        size = path.stat().st_size
        if size > INDEX_FILE_BYTES_MAX:
            raise CosiloError(
                "read index file",
                f"{path}: {size} bytes are more than {INDEX_FILE_BYTES_MAX}",
                "list one number a line",
            )
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise CosiloError("read index file", f"{path}: {error.strerror}", "check index_file in [data]") from None
    chosen: list[int] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not text.isdigit() or len(text) > 10 or int(text) >= count:
            raise CosiloError(
                "read index file",
                f"{path}, line {number}: {text[:20]!r} is not a number below {count}",
                "correct the line",
            )
        chosen.append(int(text))
    if len(set(chosen)) != len(chosen):
        raise CosiloError("read index file", f"{path}: an image is listed twice", "list each image once")
    if not chosen:
        raise CosiloError("read index file", f"{path}: no image is listed", "list at least one number")
    return np.array(chosen, dtype=np.int64)
