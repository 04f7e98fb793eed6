"""What a site's role masks: bytes that look random, in bounded memory; updates that cannot be masked, found again or thrown away."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cosilo_client import durable, masking
from cosilo_client.journal import TrainedUpdate
from cosilo_common import transfer
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import Secret
from cosilo_common.secagg.masks import CHUNK_WORDS
from cosilo_common.secagg.messages import RoundKind
from tests.protocol.parties import (
    BASE,
    RUN,
    Site,
    federation,
    make_start,
    make_terms,
    names,
    some_update,
)
from tests.protocol.site_roles import VALUES, A, delivered, sites

__all__ = ["sites"]  # the fixtures


# The masked bytes


def test_a_masked_upload_of_zeros_looks_random(tmp_path: Path) -> None:
    """Chi-square of the bytes and serial correlation of the words, of a rehearsal's upload; two attempts share nothing."""
    terms = make_terms(names(3), CHUNK_WORDS)
    start = make_start(terms, kind=RoundKind.REHEARSAL)
    sites = federation(tmp_path, terms, start)
    uploads = []
    for attempt in (1, 2):
        delivered(sites, attempt)
        sites[A].role.mask_chunks()
        uploads.append(np.frombuffer(sites[A].spool_bytes(attempt), dtype=np.uint8))
    for data in uploads:
        counts = np.bincount(data, minlength=256)
        expected = len(data) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 150 < chi_square < 380  # 255 degrees of freedom: mean 255, sd 22.6; five sd either side
        words = data.view("<u4").astype(np.float64)
        assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 5 / np.sqrt(len(words))
    first, second = (data.view("<u4") for data in uploads)
    assert (first == second).sum() < 5  # by chance 6e-5 of the words
    for site in sites.values():
        site.close()


def test_masking_takes_memory_for_chunks_not_for_the_vector(tmp_path: Path) -> None:
    terms = make_terms(names(3), 16 * CHUNK_WORDS + 17)
    start = make_start(terms)
    values = np.zeros(terms.values, dtype=np.float32)
    sites = federation(tmp_path, terms, start, dict.fromkeys(names(3), (values, 1)))
    delivered(sites)
    tracemalloc.start()
    try:
        sites[A].role.mask_chunks()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24 << 20  # four chunks in work at 3 MiB, and two threads' scratch; the vector alone has 16 MiB
    for site in sites.values():
        site.close()


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("bits", [32, 24])
@pytest.mark.parametrize("extra", [0, 1, CHUNK_WORDS - 30])
def test_workers_and_chunk_ends_do_not_change_the_bytes(tmp_path: Path, workers: int, bits: int, extra: int) -> None:
    """The tail may begin a chunk, end one, or run on into the next."""
    terms = make_terms(names(3), CHUNK_WORDS + extra, bits=bits)
    encoding = make_start(terms).encoding
    path = tmp_path / "values"
    values = some_update(terms.values, 5)[0]
    values.tofile(path)
    vector = masking.Vector(path, 0, 7, (1.0, 2.0))
    seed = Secret(sha256(b"rounding"))
    first = masking.write_spool(tmp_path / "one", encoding, (), vector, seed, workers=1)
    again = masking.write_spool(tmp_path / "more", encoding, (), vector, seed, workers=workers)
    assert again == first
    assert (tmp_path / "more").read_bytes() == (tmp_path / "one").read_bytes()
    assert first.size_bytes == encoding.wire_bytes
    assert first.digest == sha256((tmp_path / "one").read_bytes())


@pytest.mark.parametrize("spoil", ["nan", "short", "weight"])
def test_an_update_that_cannot_be_masked_leaves_no_spool(sites: dict[str, Site], spoil: str) -> None:
    """A NaN, a file cut short, a weight above the cap; trained again, the same attempt goes on."""
    delivered(sites)
    site = sites[A]
    values, weight = some_update(VALUES, 0)
    if spoil == "nan":
        values[-1] = np.nan
    site.train(values[:-1] if spoil == "short" else values, 65 if spoil == "weight" else weight)
    with pytest.raises(CosiloError):
        site.role.mask_chunks()
    assert not list(site.journal.files(RUN).folder.glob("spool*"))
    assert site.journal.ledger.model_uploads(BASE) == ()
    site.train(*some_update(VALUES, 0))
    site.role.mask_chunks()


def test_a_full_disk_is_said_with_the_bytes_needed(sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    delivered(sites)

    def full(_descriptor: int, _data: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(masking.os, "write", full)
        with pytest.raises(CosiloError, match="No space left on device; 476 bytes are needed"):
            sites[A].role.mask_chunks()
    assert not list(sites[A].journal.files(RUN).folder.glob("spool*"))


def test_a_trained_update_is_found_again(sites: dict[str, Site]) -> None:
    site = sites[A]
    facts = json.loads(site.journal.files(RUN).facts.read_text())
    assert facts["round"] == 1
    site.restart()
    assert site.journal.trained_update(RUN, 1) == TrainedUpdate(1, 16, some_update(VALUES, 0)[1], (1.0, 2.0))
    assert site.journal.trained_update(RUN, 2) is None


def test_a_half_written_update_is_thrown_away_at_the_next_start(sites: dict[str, Site]) -> None:
    site = sites[A]
    site.begin(make_start(site.terms, 2))
    site.journal.files(RUN).update.write_bytes(b"half")
    site.restart()
    assert not site.journal.files(RUN).update.exists()


def test_durable_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    durable.write_durably(path, b"one")
    durable.write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert transfer.partials(path) == [] or list(tmp_path.iterdir()) == [path]
    durable.shred(path)
    durable.shred(path)
    assert list(tmp_path.iterdir()) == []
