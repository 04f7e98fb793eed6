"""Images in one sub-folder per class, JPEG or PNG, as a hospital's export lies on its disk.

Owns the listing and the decoding of files. Must not know model sizes. A file that does not decode is reported, never
raised.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cosilo_client.data.config import DataConfig
from cosilo_client.data.sources import IMAGES_MAX, Picture, Pixels, Unreadable, refuse_immense
from cosilo_common.errors import CosiloError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
FORMATS = (
    "JPEG",
    "PNG",
)  # Pillow knows forty formats; each is code that reads hospital files, so only the needed two are open
PIXELS_MAX = 64_000_000  # a decompression bomb declares more; a chest radiograph has 10 million


@dataclass(frozen=True)
class FolderSource:
    """A folder of class sub-folders; see `sources.ImageSource`."""

    class_names: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]
    full_scale: int

    @classmethod
    def open(cls, config: DataConfig) -> "FolderSource":
        """List the folder. Classes are its sub-folders sorted by name, unless the config names them."""
        root = config.path
        if root is None:
            raise CosiloError("read data", "kind = folder has no path", "set path in [data]")
        try:
            present = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
            unknown = set(present) - set(config.classes)
            if config.classes and unknown:
                raise CosiloError(
                    "read data",
                    f"{root}: sub-folder {sorted(unknown)[0]!r} is none of the classes",
                    "list it in [data] classes or move it away",
                )
            names = config.classes or tuple(present)
            files = tuple(_images_in(root / name) if name in present else () for name in names)
        except OSError as error:
            raise CosiloError(
                "read data",
                f"{root}: {error.strerror or error}",
                "check path in [data], and that the daemon's user may read it",
            ) from None
        total = sum(map(len, files))
        refuse_immense(total, str(root))
        if not total:
            raise CosiloError(
                "read data",
                f"{root}: no JPEG or PNG in any sub-folder",
                "put each class's images in a sub-folder of its own",
            )
        return cls(names, files, config.full_scale)

    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.files))

    def pictures(self) -> Iterator[Picture | Unreadable]:
        for label, paths in enumerate(self.files):
            for path in paths:
                name = f"{path.parent.name}/{path.name}"
                try:
                    pixels = decode(path)
                except MemoryError:
                    raise
                except Exception as error:  # a broken file raises whatever Pillow's parser stumbled on: struct, zlib, ...
                    yield Unreadable(name, _reason(error))
                else:
                    yield Picture(name, label, pixels, 255 if pixels.dtype == np.uint8 else self.full_scale)


def decode(path: Path) -> Pixels:
    """One JPEG or PNG as (H, W) or (H, W, 3 or 4), uint8; 16-bit grey as uint16. Pillow reads 16-bit colour with 8
    bits.

    Raises ValueError or Image.DecompressionBombError for a bomb, and whatever Pillow raises for a broken file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXELS_MAX is stricter, and checked before decoding
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > PIXELS_MAX:
                raise ValueError(f"{opened.width}x{opened.height} pixels are more than {PIXELS_MAX}")
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16-bit grey, which some Pillow releases open with 32 bits
                values = np.asarray(upright)
                if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
                    raise ValueError("values beyond 16 bits")
                return values.astype(np.uint16)
            if upright.mode not in {"L", "RGB", "RGBA"}:
                upright = upright.convert("L" if upright.mode in {"1", "LA", "La"} else "RGB")
            return np.asarray(upright)


def _images_in(folder: Path) -> tuple[Path, ...]:
    found = []
    for entry in os.scandir(folder):
        if os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.name.startswith("."):  # noqa: PTH122 - a million names
            found.append(folder / entry.name)
        if len(found) > IMAGES_MAX:
            break
    return tuple(sorted(found))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "neither JPEG nor PNG"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
