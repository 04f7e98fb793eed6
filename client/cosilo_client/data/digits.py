"""scikit-learn's 1,797 hand-written digits, 8x8: real images that come in a wheel, for the demo.

Owns the reading of that one file (Alpaydin and Kaynak, UCI 1998), which is found without importing scikit-learn: that
would load scipy into the daemon. scikit-learn is the client's `digits` extra.
"""

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np

from cosilo_client.data.arrays import ArraySource, array_source
from cosilo_client.data.config import DataConfig
from cosilo_common.errors import CosiloError

SIDE = 8
LEVELS = 16  # the data's brightest value
FILE_BYTES_MAX = 1 << 20  # the file has 265 KiB unpacked


def open_digits(config: DataConfig) -> ArraySource:
    """The digits, or those of the index file. Raises CosiloError where scikit-learn is not installed."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise CosiloError("read data", "digits: scikit-learn is not installed", "run pip install 'cosilo-client[digits]'")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path) as stream:
            lines = stream.read(FILE_BYTES_MAX).decode("ascii").splitlines()
        table = np.array([line.split(",") for line in lines], dtype=np.float64)  # (1797, 65): 64 pixels, then the digit
        images = np.rint(table[:, :-1].reshape(-1, SIDE, SIDE) * (255 / LEVELS)).astype(np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CosiloError("read data", f"{path}: {error}", "install scikit-learn again") from None
    return array_source(config, "digits", images, table[:, -1].astype(np.int64))
