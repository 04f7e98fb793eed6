"""A sheet of images in one PNG, for people to look at.

Owns layout only; must not know torch or models.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cosilo_common.errors import CosiloError

GAP_PIXELS = 2  # between images, so that neighbours of one colour stay apart
BACKGROUND = 128  # neither of the two colours that images end in
CELL_PIXELS_MIN = 40  # an 8x8 digit is unreadable at its own size
GRID_PIXELS_MAX = 64_000_000  # refuse a sheet that no viewer opens


def grid_png(path: Path, images: npt.NDArray[np.uint8], columns: int) -> None:
    """Write images, row by row, as one PNG.

    images: (n, C, H, W) uint8; one plane is grey, three are colour, any other number shows the first. columns: images a
    row. Small images are enlarged by a whole factor without smoothing. Raises CosiloError for an empty or immense
    sheet.
    """
    if not len(images) or columns < 1:
        raise CosiloError("write grid", f"{path}: there is no image to show", "ask for at least one sample")
    count, planes, height, width = images.shape
    scale = max(1, -(-CELL_PIXELS_MIN // max(height, width)))
    rows = -(-count // columns)
    cell_height, cell_width = height * scale + GAP_PIXELS, width * scale + GAP_PIXELS
    sheet_shape = (rows * cell_height + GAP_PIXELS, columns * cell_width + GAP_PIXELS, 3 if planes == 3 else 1)
    if sheet_shape[0] * sheet_shape[1] > GRID_PIXELS_MAX:
        raise CosiloError("write grid", f"{path}: {sheet_shape[1]}x{sheet_shape[0]} pixels are too many", "ask for fewer samples")
    sheet = np.full(sheet_shape, BACKGROUND, dtype=np.uint8)
    for number, image in enumerate(images):
        shown = image[: sheet_shape[2]].transpose(1, 2, 0)  # (H, W, 1 or 3)
        top = GAP_PIXELS + number // columns * cell_height
        left = GAP_PIXELS + number % columns * cell_width
        sheet[top : top + height * scale, left : left + width * scale] = shown.repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(sheet if planes == 3 else sheet[:, :, 0]).save(path, format="PNG")
