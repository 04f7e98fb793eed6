"""The site's images in memory, as the model takes them: decoded once, one size, integers.

Owns cropping, resizing and planes. Must not know torch, training or where images come from. What it skips it counts and
names in the log.
"""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cosilo_client.data.sources import ImageSource, Picture, Pixels, Unreadable
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError

NAMED_MAX = 100  # unreadable images named one by one in the log; the rest are counted
TO_SIXTEEN_BITS = 257  # 255 * 257 = 65535
_PLANES = {1: "L", 3: "RGB", 4: "RGBA"}

log = logging.getLogger("cosilo.data")


@dataclass(frozen=True)
class LocalImages:
    """A site's images: (n, C, S, S) uint8 or uint16 in [0, full_scale], labels (n,) int64.

    Skipped: images that did not decode.
    """

    images: Pixels
    labels: npt.NDArray[np.int64]
    full_scale: int
    skipped: int


def load_images(source: ImageSource, architecture: Architecture) -> LocalImages:
    """Decode every image of the source to the architecture's size and planes.

    A picture that is not square is cropped to its centre, then resized with antialiasing. uint8 is kept unless a
    picture has 16 bits. Raises CosiloError if the source's classes are not the model's, if the model's planes have no
    picture form, or nothing decodes.
    """
    _check_classes(source, architecture)
    size, planes = architecture.sample_size, architecture.in_channels
    total = sum(source.counts())
    images: Pixels = np.empty((total, planes, size, size), np.uint8)
    labels = np.empty(total, np.int64)
    filled, skipped = 0, 0
    for item in source.pictures():
        if isinstance(item, Unreadable):
            skipped += 1
            if skipped <= NAMED_MAX:
                log.warning("image skipped: %s: %s", item.name, item.reason)
            continue
        pixels = fit_picture(item, size, planes)
        if pixels.dtype == np.uint16 and images.dtype == np.uint8:
            images = images.astype(np.uint16) * np.uint16(TO_SIXTEEN_BITS)
        elif images.dtype == np.uint16 and pixels.dtype == np.uint8:
            pixels = pixels.astype(np.uint16) * np.uint16(TO_SIXTEEN_BITS)
        images[filled], labels[filled] = pixels, item.label
        filled += 1
    if skipped:
        log.warning("%d of %d images skipped: they did not decode", skipped, total)
    if not filled:
        raise CosiloError("read data", f"none of {total} images decodes", "see the log for each image's reason")
    return LocalImages(images[:filled], labels[:filled], 255 if images.dtype == np.uint8 else 65_535, skipped)


def fit_picture(picture: Picture, size: int, planes: int) -> Pixels:
    """One picture as (planes, size, size): uint8 from 8-bit pixels, uint16 stretched to [0, 65535] from 16-bit ones."""
    pixels = picture.pixels
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    pixels = _centre_square(pixels)
    given = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.dtype == np.uint8 and planes in _PLANES and given in _PLANES:
        image = Image.fromarray(np.ascontiguousarray(pixels)).convert(_PLANES[planes])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        array = np.asarray(image).reshape(size, size, planes)
        return np.ascontiguousarray(array.transpose(2, 0, 1))
    if given != planes and given != 1:
        raise CosiloError(
            "read data",
            f"{picture.name}: {given} planes of {pixels.dtype} for a model of {planes}",
            "choose a model with as many planes",
        )
    separate = [pixels] if pixels.ndim == 2 else [pixels[:, :, plane] for plane in range(given)]
    limit = 255 if pixels.dtype == np.uint8 else 65_535
    resized = [_resize_plane(plane, size, limit / picture.full_scale, limit) for plane in separate]
    stacked = np.stack(resized if given == planes else resized * planes)
    return stacked.astype(np.uint8) if pixels.dtype == np.uint8 else stacked.astype(np.uint16)


def _resize_plane(plane: Pixels, size: int, gain: float, limit: int) -> npt.NDArray[np.float64]:
    image = Image.fromarray(np.minimum(plane.astype(np.float32) * gain, limit).astype(np.float32))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.clip(np.rint(np.asarray(image, dtype=np.float64)), 0, limit)


def _centre_square(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _check_classes(source: ImageSource, architecture: Architecture) -> None:
    found = len(source.class_names)
    # Numbers stand for absent names, and a site need not own an image of the last class. Names must agree with the
    # run's.
    unnamed = source.class_names == tuple(str(number) for number in range(found))
    if found > architecture.num_classes or (found < architecture.num_classes and not unnamed):
        raise CosiloError(
            "read data",
            f"{found} classes ({', '.join(source.class_names[:5])}) for a model of {architecture.num_classes}",
            "name all of the run's classes, in its order, as classes in [data]",
        )
