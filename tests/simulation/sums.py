"""What every sum must be: the oracle beside the masks.

Owns a copy of each site's words before they were masked, taken as the site masks them, and the reckoning with them: one masking per keys
(R4), the exact integer sum of the survivors, and the model that follows from it by the definition of the mean. Must not know phases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cosilo_client.secagg
import cosilo_server.closing
from cosilo_client.masking import WORKERS, Vector, write_spool
from cosilo_common.encoding import Encoding
from cosilo_common.secagg.keys import Secret
from cosilo_common.secagg.masks import SignedMask
from cosilo_common.secagg.messages import Upload
from cosilo_server.secagg import SumOpening
from tests.simulation.process import outside

Fail = Callable[[str, str], None]


@dataclass(frozen=True)
class Masked:
    """One upload: its bytes, the words below its masks (uint64, so that sums of them are exact), and its weight."""

    data: bytes
    words: NDArray[np.uint64]
    weight: int


class Sums:
    """All maskings of one simulation. scratch: a folder outside of every simulated disk."""

    def __init__(self, scratch: Path, fail: Fail) -> None:
        self.opened = 0
        self._scratch = scratch
        self._fail = fail
        self._by_digest: dict[bytes, Masked] = {}
        self._by_keys: dict[bytes, bytes] = {}

    def find(self, digest: bytes) -> Masked | None:
        """The upload with this SHA-256."""
        return self._by_digest.get(digest)

    def forget(self) -> None:
        """Drops the uploads of rounds that are over; keys are remembered."""
        self._by_digest.clear()

    def write_spool(
        self, path: Path, encoding: Encoding, masks: Sequence[SignedMask], vector: Vector, rounding: Secret, workers: int = WORKERS
    ) -> Upload:
        """Stands where the site role calls masking's: masks as it does, and notes what was masked."""
        upload = write_spool(path, encoding, masks, vector, rounding, workers)
        with outside():
            plain = self._scratch / "plain"
            write_spool(plain, encoding, (), vector, rounding, workers)
            words = words_of(plain.read_bytes(), encoding.bits)
            data = path.read_bytes()
        if masks:
            keys = hashlib.sha256(b"".join(sorted(signed.mask.seed.reveal() for signed in masks))).digest()
            if self._by_keys.setdefault(keys, hashlib.sha256(data).digest()) != hashlib.sha256(data).digest():
                self._fail("R4", f"{path.name}: other values were masked under the same keys")
        self._by_digest[upload.digest] = Masked(data, words, vector.weight)
        return upload

    def check(self, encoding: Encoding, digests: Mapping[str, bytes], opened: NDArray[np.uint32], weight: int, contributors: int) -> None:
        """The opened words against the exact sum of the survivors' words."""
        self.opened += 1
        found = [self._by_digest.get(digest) for digest in digests.values()]
        uploads = [each for each in found if each is not None]
        if len(uploads) != len(digests):
            self._fail("sum", f"{len(digests) - len(uploads)} survivors' uploads were never masked")
            return
        total = np.sum([upload.words for upload in uploads], axis=0, dtype=np.uint64) & np.uint64((1 << encoding.bits) - 1)
        if not np.array_equal(total[: encoding.size], opened.astype(np.uint64)):
            self._fail("sum", f"the opened sum of {sorted(digests)} is not the sum of their words")
        if (weight, contributors) != (sum(upload.weight for upload in uploads), len(uploads)):
            self._fail("sum", f"it counts {contributors} sites of weight {weight}, not {len(uploads)}")


def words_of(data: bytes, bits: int) -> NDArray[np.uint64]:
    """An upload's words, three or four bytes each, little endian."""
    if bits == 32:
        return np.frombuffer(data, dtype="<u4").astype(np.uint64)
    raw = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3).astype(np.uint64)
    return raw[:, 0] | raw[:, 1] << np.uint64(8) | raw[:, 2] << np.uint64(16)


def watched_opening(sums: Sums) -> type[SumOpening]:
    """SumOpening, with what it opens compared at the end of its iteration."""

    class WatchedOpening(SumOpening):
        def __iter__(self) -> Any:
            blocks = [np.empty(0, np.uint32)]
            for start, words in super().__iter__():
                blocks.append(words.copy())
                yield start, words
            sums.check(self._encoding, self._digests, np.concatenate(blocks), self.tail.total_weight, self.tail.contributors)

    return WatchedOpening


def patches(sums: Sums) -> list[tuple[Any, str, Any]]:
    """Where the oracle stands in production code: (module, name, what stands there)."""
    return [
        (cosilo_client.secagg, "write_spool", sums.write_spool),
        (cosilo_server.closing, "SumOpening", watched_opening(sums)),
    ]
