"""Which of a site's images are never trained on.

Owns the split: by content, so that it stays the same across rounds, restarts and copies, and equal images fall on one
side.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cosilo_client.data.decoding import LocalImages
from cosilo_common.errors import CosiloError

_LABEL = b"cosilo/held-out/1"


@dataclass(frozen=True)
class Split:
    """Indices into LocalImages.

    Train: in the source's order; heldout: in the order of their digests, which is as good as random.
    """

    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]


def split_heldout(local: LocalImages, fraction: float) -> Split:
    """Hold out the images with the lowest content digests: fraction of them, at least one, and never all.

    Raises CosiloError for fewer than two distinct images. Copies of one image stay together, so the part is approximate
    where there are copies.
    """
    digests = [
        hashlib.sha256(_LABEL + int(label).to_bytes(4, "big") + image.tobytes()).digest()
        for image, label in zip(local.images, local.labels, strict=True)
    ]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise CosiloError(
            "read data",
            f"{len(digests)} images are too few to train on and hold one out",
            "give the site at least two different images",
        )
    wanted = min(max(1, round(len(distinct) * fraction)), len(distinct) - 1)
    limit = distinct[wanted]
    heldout = sorted((digest, index) for index, digest in enumerate(digests) if digest < limit)
    train = [index for index, digest in enumerate(digests) if digest >= limit]
    return Split(np.array(train, dtype=np.int64), np.array([index for _, index in heldout], dtype=np.int64))
