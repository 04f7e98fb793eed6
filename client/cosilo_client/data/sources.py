"""What an image source is, and which source a [data] table means.

Owns the small interface that every source has, DICOM's too when it comes. Must not know resizing, held-out parts or
training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cosilo_client.data.config import CLASSES_MAX, DataConfig
from cosilo_common.errors import CosiloError

IMAGES_MAX = 10_000_000  # of one site; bounds listings and label arrays

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Picture:
    """One decoded image: pixels (H, W) or (H, W, planes), uint8 or uint16; full_scale is the value that means white."""

    name: str
    label: int
    pixels: Pixels
    full_scale: int


@dataclass(frozen=True)
class Unreadable:
    """One image that would not decode, by its name in the source, and why."""

    name: str
    reason: str


class ImageSource(Protocol):
    """A site's labelled images, in an order that does not change while the data does not."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label; a source whose labels have no names gives their numbers."""

    def counts(self) -> tuple[int, ...]:
        """Images by label, from a listing: nothing is decoded."""

    def pictures(self) -> Iterator[Picture | Unreadable]:
        """Every image once, decoded one at a time."""


def open_source(config: DataConfig) -> ImageSource:
    """The source that a [data] table names. Raises CosiloError if it is missing, empty or not what it says."""
    # Each kind brings its own reader, so that a site loads only what it uses (scikit-learn takes a second).
    if config.kind == "folder":
        from cosilo_client.data.folder import FolderSource

        return FolderSource.open(config)
    if config.kind == "digits":
        from cosilo_client.data.digits import open_digits

        return open_digits(config)
    if config.kind == "idx":
        from cosilo_client.data.idx import open_idx

        return open_idx(config)
    from cosilo_client.data.npz import open_npz

    return open_npz(config)


def census(source: ImageSource) -> dict[str, int]:
    """Images per class name, for `cosilo-site check`.

    From a listing, so an image that does not decode still counts here.
    """
    return dict(zip(source.class_names, source.counts(), strict=True))


def data_stamp(config: DataConfig) -> str:
    """Changes when images are added, removed or replaced: sizes and times of what [data] names, cheap enough to ask
    before every round.

    A file rewritten in place inside a class's folder is not noticed; it is read when the trainer next starts.
    """
    named = [path for path in (config.path, config.index_file) if path is not None]
    try:
        if config.path is not None and config.path.is_dir():
            named += sorted(config.path.iterdir())[:CLASSES_MAX]
        stats = [(path.name, path.stat()) for path in named]
    except OSError as error:
        raise CosiloError("read data", f"{error.filename}: {error.strerror}", "check path in [data]") from None
    return "/".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def refuse_immense(count: int, subject: str) -> None:
    """Raise CosiloError above IMAGES_MAX."""
    if count > IMAGES_MAX:
        raise CosiloError("read data", f"{subject}: {count} images are more than {IMAGES_MAX}", "give the site a part of them")
