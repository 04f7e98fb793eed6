"""Real images in a folder of one's own, a sub-folder a class, as scores compare them with drawn ones.

Owns the listing, and how a picture is fitted: as a site fits its own (centre square, Lanczos, the model's planes). Must not know networks or
runs. Unlike a site, which skips a broken file and goes on, this refuses it by name: a score against other images than were meant is none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError

PICTURES_MAX: Final = 200_000  # 614 MB at 32x32x3; distances between so many take hours already
PIXELS_MAX: Final = 64_000_000  # a decompression bomb declares more; a chest radiograph has 10 million
_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png"})
_FORMATS: Final = ("JPEG", "PNG")
_MODES: Final = {1: "L", 3: "RGB"}
_OPERATION: Final = "read pictures"


def read_pictures(folder: Path, architecture: Architecture) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(images (n, C, S, S) uint8, labels (n,) int64), sorted by class and name.

    A class is a sub-folder: either their names are the classes' numbers, of which some may be missing, or there is one for each class and
    their sorted order is the classes'. Raises CosiloError naming the folder or the file that is wrong.
    """
    planes, size = architecture.in_channels, architecture.sample_size
    if planes not in _MODES:
        raise CosiloError(_OPERATION, f"a model of {planes} planes draws no pictures of 1 or 3")
    found = [(path, label) for name, label in _classes(folder, architecture.num_classes) for path in _pictures_in(folder / name)]
    if not 0 < len(found) <= PICTURES_MAX:
        raise CosiloError(_OPERATION, f"{folder}: {len(found)} JPEG or PNG in its sub-folders", f"give 1 to {PICTURES_MAX}")
    images = np.empty((len(found), planes, size, size), np.uint8)
    for position, (path, _) in enumerate(found):
        images[position] = _fitted(path, planes, size)
    return images, np.array([label for _, label in found], np.int64)


def _classes(folder: Path, classes: int) -> list[tuple[str, int]]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise CosiloError(_OPERATION, f"{folder}: {error.strerror}", "name a folder with a sub-folder for each class") from None
    numbers = {str(number): number for number in range(classes)}
    if names and set(names) <= set(numbers):
        return [(name, numbers[name]) for name in names]
    if len(names) != classes:
        hint = f"one for each class, in their order, or their numbers from 0 to {classes - 1}"
        raise CosiloError(_OPERATION, f"{folder}: {len(names)} sub-folders for a model of {classes} classes", hint)
    return [(name, label) for label, name in enumerate(names)]


def _pictures_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    except OSError as error:
        raise CosiloError(_OPERATION, f"{folder}: {error.strerror}", "let it be read") from None


def _fitted(path: Path, planes: int, size: int) -> NDArray[np.uint8]:
    """One picture: (planes, size, size)."""
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            if opened.width * opened.height > PIXELS_MAX:
                raise ValueError(f"{opened.width}x{opened.height} pixels are more than {PIXELS_MAX}")
            if opened.mode.startswith(("I", "F")):
                raise ValueError("16 bits a pixel; scores are of 8-bit pictures")
            image = ImageOps.exif_transpose(opened)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).convert(_MODES[planes])
            if side != size:
                square = square.resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(square).reshape(size, size, planes).transpose(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # a broken file raises whatever Pillow's parser stumbled on: struct, zlib, ...
        raise CosiloError(_OPERATION, f"{path}: {error}", "correct the file, or take it out of the folder") from None
