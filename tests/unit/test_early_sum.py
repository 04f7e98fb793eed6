"""The sum before the last upload: exact, found out where the disk changes it, and left alone where it fails."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosilo_common.errors import CosiloError
from cosilo_common.secagg.masks import CHUNK_WORDS, pack24
from cosilo_server.early_sum import EarlySum


def read_from(data: bytes) -> Callable[[int, memoryview], None]:
    def read(offset: int, buffer: memoryview) -> None:
        buffer[:] = data[offset : offset + len(buffer)]

    return read


def wire(words: np.ndarray, bits: int) -> bytes:
    return words.tobytes() if bits == 32 else pack24(words).tobytes()


def random_words(length: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, length, dtype=np.uint32)


def loaded(early: EarlySum, length: int) -> np.ndarray:
    out = np.empty(length, np.uint32)
    with early:
        for chunk, start in enumerate(range(0, length, CHUNK_WORDS)):
            early.load(chunk, out[start : start + CHUNK_WORDS])
    return out


@pytest.mark.parametrize("bits", [24, 32])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sites=st.integers(1, 5), length=st.sampled_from([1, 70, CHUNK_WORDS - 1, CHUNK_WORDS, CHUNK_WORDS + 1, 2 * CHUNK_WORDS + 5]))
def test_it_is_the_sum_of_its_uploads(tmp_path: Path, bits: int, sites: int, length: int) -> None:
    early, uploads = EarlySum(tmp_path / ".sum", length, bits), {f"site-{n}": random_words(length, bits, n) for n in range(sites)}
    for name, words in uploads.items():
        data = wire(words, bits)
        early.add(name, read_from(data), sha256(data).digest())
    total = sum(words.astype(np.uint64) for words in uploads.values())
    np.testing.assert_array_equal(loaded(early, length), total.astype(np.uint32))
    assert early.digests == {name: sha256(wire(words, bits)).digest() for name, words in uploads.items()}
    assert (tmp_path / ".sum").stat().st_mode & 0o777 == 0o600


def test_an_upload_that_is_not_the_signed_one_breaks_it_and_takes_its_room_away(tmp_path: Path) -> None:
    early, data = EarlySum(tmp_path / ".sum", 70, 32), random_words(70, 32, 1).tobytes()
    early.add("st-anna", read_from(data), sha256(data).digest())
    with pytest.raises(CosiloError, match="the upload of riverside is not the one it signed"):
        early.add("riverside", read_from(data), sha256(b"another").digest())
    assert (early.broken, early.digests, (tmp_path / ".sum").exists()) == (True, {}, False)
    with pytest.raises(ValueError, match="broken"):
        early.add("lakeview", read_from(data), sha256(data).digest())


def test_a_site_is_in_it_once(tmp_path: Path) -> None:
    early, data = EarlySum(tmp_path / ".sum", 70, 32), random_words(70, 32, 1).tobytes()
    early.add("st-anna", read_from(data), sha256(data).digest())
    with pytest.raises(ValueError, match="st-anna"):
        early.add("st-anna", read_from(data), sha256(data).digest())
    assert list(early.digests) == ["st-anna"]


@pytest.mark.parametrize("what", ["a byte", "the end"])
def test_a_sum_that_changed_on_the_disk_is_found_out(tmp_path: Path, what: str) -> None:
    path, length = tmp_path / ".sum", CHUNK_WORDS + 9
    early, data = EarlySum(path, length, 32), random_words(length, 32, 1).tobytes()
    early.add("st-anna", read_from(data), sha256(data).digest())
    changed = bytearray(path.read_bytes())
    if what == "a byte":
        changed[4 * CHUNK_WORDS + 3] ^= 1
    else:
        del changed[-1]
    path.write_bytes(changed)
    with early:
        early.load(0, np.empty(CHUNK_WORDS, np.uint32))
        with pytest.raises(CosiloError, match="chunk 1 is not what was written"):
            early.load(1, np.empty(9, np.uint32))
    with pytest.raises(CosiloError, match="chunk 1"):  # nor does it take another upload, and is broken then
        early.add("riverside", read_from(data), sha256(data).digest())
    assert early.digests == {}
