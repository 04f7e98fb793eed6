"""A tensor table is worked out once; whatever stands in the cache that is not one is made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosilo_common.diffusion.presets import PRESETS
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.weights import TensorTable
from cosilo_server.cli import known_tables
from cosilo_server.cli.known_tables import known_table

DIGITS = PRESETS["digits"].architecture
OTHER = DIGITS.model_copy(update={"num_classes": DIGITS.num_classes + 1})
TABLE = TensorTable((("bias", (3,)), ("weight", (3, 2))))


class Counted:
    """Works a table out, and counts how often."""

    def __init__(self) -> None:
        self.asked: list[Architecture] = []

    def __call__(self, architecture: Architecture) -> TensorTable:
        self.asked.append(architecture)
        return TABLE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cosilo" / "tables"


def test_a_table_is_worked_out_once_an_architecture(cache: Path) -> None:
    work_out = Counted()
    assert [known_table(which, work_out) for which in (DIGITS, DIGITS, OTHER, DIGITS)] == [TABLE] * 4
    assert work_out.asked == [DIGITS, OTHER]
    assert len(list(cache.iterdir())) == 2


def test_another_release_of_the_network_s_library_is_asked_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_out = Counted()
    known_table(DIGITS, work_out)
    monkeypatch.setattr(known_tables, "version", lambda name: "99.0")
    known_table(DIGITS, work_out)
    assert work_out.asked == [DIGITS, DIGITS]


@pytest.mark.parametrize("spoilt", [b"", b"[", b"{}", b"\xff", b'[["weight", [0]]]', b"[" * 100_000])
def test_a_file_that_is_no_table_is_made_again(cache: Path, spoilt: bytes) -> None:
    work_out = Counted()
    known_table(DIGITS, work_out)
    (file,) = cache.iterdir()
    file.write_bytes(spoilt)
    assert [known_table(DIGITS, work_out), known_table(DIGITS, work_out)] == [TABLE, TABLE]
    assert work_out.asked == [DIGITS, DIGITS]


def test_a_folder_that_cannot_be_made_is_done_without(cache: Path) -> None:
    cache.parent.parent.joinpath("cosilo").write_bytes(b"a file in its place")
    work_out = Counted()
    assert [known_table(DIGITS, work_out), known_table(DIGITS, work_out)] == [TABLE, TABLE]
    assert work_out.asked == [DIGITS, DIGITS]
