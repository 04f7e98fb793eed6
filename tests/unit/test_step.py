"""The step from one checkpoint to the next: bit for bit on both sides, within its bound, and never applied to or from something else."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cosilo_common.errors import CosiloError
from cosilo_common.step import (
    BLOCK_VALUES,
    EXPONENT_MIN,
    GROUP_VALUES,
    HEADER_BYTES,
    LARGEST,
    StepHeader,
    apply_step,
    expected_step,
    make_step,
    rounded,
    seal_step,
    step_bytes,
    stepped,
)
from cosilo_common.transfer import file_digest
from cosilo_common.weights import TensorTable, open_vector, write_weights

SIZES = [
    1,
    GROUP_VALUES - 1,
    GROUP_VALUES,
    GROUP_VALUES + 1,
    BLOCK_VALUES - 1,
    BLOCK_VALUES,
    BLOCK_VALUES + 1,
    2 * BLOCK_VALUES + GROUP_VALUES + 5,
]
HALF = 2.0**127
FLOATS = st.floats(-HALF, HALF, width=32)  # two of them differ by no more than float32 can say
MAX = float(np.finfo(np.float32).max)


class Made:
    """A step between two files of one tensor, and what it is expected to be."""

    def __init__(self, folder: Path, before: np.ndarray, after: np.ndarray) -> None:
        self.table = TensorTable.of([("w", (len(before),))])
        self.base, self.after, self.step, self.out = (folder / name for name in ("base", "after", "step", "out"))
        write_weights(self.base, self.table, [before])
        write_weights(self.after, self.table, [after])
        make_step(self.base, self.after, self.step)
        self.header = StepHeader(file_digest(self.base), file_digest(self.after), len(before))
        seal_step(self.step, self.header)

    def apply(self) -> None:
        apply_step(self.base, self.step, self.out, self.header)

    def refused(self, match: str) -> None:
        with pytest.raises(CosiloError, match=match):
            self.apply()
        assert not self.out.exists()


def pair(size: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    before = random.normal(0, 0.1, size).astype(np.float32)
    return before, before + random.normal(0, 1e-3, size).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_a_site_makes_the_coordinators_file_bit_for_bit(tmp_path: Path, size: int) -> None:
    made = Made(tmp_path, *pair(size))
    made.apply()
    assert made.out.read_bytes() == made.after.read_bytes()
    assert made.out.stat().st_mode & 0o777 == 0o600
    assert made.step.stat().st_size == step_bytes(size)
    assert expected_step(made.base, made.header.base, made.header.made, made.after.stat().st_size, step_bytes(size)) == made.header


def test_a_step_takes_three_quarters_of_the_weights() -> None:
    assert step_bytes(36_440_000) == HEADER_BYTES + 3 * 36_440_000 + 2 * 8897
    assert step_bytes(36_440_000) / (4 * 36_440_000) < 0.7502


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, 40, elements=FLOATS), arrays(np.float32, 40, elements=FLOATS))
def test_no_value_is_off_by_more_than_half_a_lattice_step_and_its_own_rounding(before: np.ndarray, after: np.ndarray) -> None:
    exponents, integers = rounded(before, after)
    change = after.astype(np.float64) - before
    (exponent,) = exponents
    assert np.abs(integers).max() <= LARGEST
    assert exponent == EXPONENT_MIN or np.abs(change).max() > LARGEST * 2.0 ** (int(exponent) - 1)  # no finer lattice would do
    made = stepped(before, exponents, integers)
    wanted, ulp = before.astype(np.float64) + change, np.spacing(np.abs(after)).astype(np.float64)
    assert (np.abs(made - wanted) <= 2.0 ** (int(exponent) - 1) + ulp).all()
    large = np.minimum(np.abs(before), np.abs(after)).astype(np.float64) > 2 * np.abs(change).max()
    assert (made[large] == after[large]).all()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0.0, 0.0),
        (-0.0, 0.0),
        (0.0, 1e-45),  # float32's smallest
        (MAX, MAX),
        (HALF, -HALF),
        (-HALF, HALF),
        (1.0, float(np.nextafter(np.float32(1), np.float32(2)))),
        (0.0, LARGEST * 2.0**-30),
        (0.0, (LARGEST + 1) * 2.0**-30),  # the next power of two
    ],
)
def test_extreme_values_arrive_as_they_are(tmp_path: Path, before: float, after: float) -> None:
    made = Made(tmp_path, np.full(3, before, np.float32), np.full(3, after, np.float32))
    made.apply()
    assert open_vector(made.out, made.table).tolist() == [np.float32(after)] * 3


def test_a_large_change_coarsens_its_own_group_only(tmp_path: Path) -> None:
    before, after = pair(2 * GROUP_VALUES)
    wanted = after.copy()
    after[0] = 1e6
    made = Made(tmp_path, before, after)
    second = slice(GROUP_VALUES, None)
    alone = Made(tmp_path, before[second], wanted[second])
    assert np.abs(open_vector(alone.after, alone.table) - wanted[second]).max() <= 2.0**-30
    assert made.table.size == 2 * alone.table.size


def test_a_change_between_two_lattices_takes_the_coarser_one() -> None:
    exponents, integers = rounded(np.zeros(1, np.float32), np.array([(LARGEST + 0.5) * 2.0**-30], np.float32))
    assert (exponents.tolist(), integers.tolist()) == ([-29], [1 << 22])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_swing_over_all_of_float32_is_refused(tmp_path: Path, sign: int) -> None:
    with pytest.raises(CosiloError, match="not finite"):
        Made(tmp_path, np.full(3, sign * MAX, np.float32), np.full(3, -sign * MAX, np.float32))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_no_step(tmp_path: Path, wrong: float) -> None:
    before, after = pair(10)
    table = TensorTable.of([("w", (10,))])
    write_weights(tmp_path / "base", table, [before])
    write_weights(tmp_path / "after", table, [after])
    with (tmp_path / "after").open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(wrong).tobytes())
    with pytest.raises(CosiloError, match="not finite"):
        make_step(tmp_path / "base", tmp_path / "after", tmp_path / "step")


def test_other_tensors_become_no_step(tmp_path: Path) -> None:
    write_weights(tmp_path / "base", TensorTable.of([("w", (10,))]), [np.zeros(10, np.float32)])
    write_weights(tmp_path / "after", TensorTable.of([("v", (10,))]), [np.zeros(10, np.float32)])
    with pytest.raises(CosiloError, match="other tensors"):
        make_step(tmp_path / "base", tmp_path / "after", tmp_path / "step")


@pytest.mark.parametrize("place", [HEADER_BYTES + 2, HEADER_BYTES + 2 + 3 * 7])
def test_a_changed_value_is_caught_by_what_it_makes(tmp_path: Path, place: int) -> None:
    made = Made(tmp_path, *pair(10))
    data = bytearray(made.step.read_bytes())
    data[place] ^= 64
    made.step.write_bytes(data)
    made.refused("it makes")


def test_a_base_that_rotted_is_caught_by_what_it_makes(tmp_path: Path) -> None:
    made = Made(tmp_path, *pair(10))
    data = bytearray(made.base.read_bytes())
    data[-1] ^= 1
    made.base.write_bytes(data)
    made.refused("rotted")


def test_a_step_of_another_length_or_name_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, *pair(10))
    whole = made.step.read_bytes()
    for data, match in [
        (whole[:-1], "ends early"),
        (whole + b"\0", "goes on"),
        (whole[: HEADER_BYTES - 1], "not a step's header"),
        (b"x" + whole[1:], "not a step's header"),
        (StepHeader(made.header.made, made.header.base, 10).encode() + whole[HEADER_BYTES:], "not the step that the round names"),
        (whole[:HEADER_BYTES] + (108).to_bytes(2, "little") + whole[HEADER_BYTES + 2 :], "an exponent is not from -149 to 107"),
    ]:
        made.step.write_bytes(data)
        made.refused(match)
    size = made.after.stat().st_size
    for made_bytes, length in [(size, step_bytes(10) + 1), (size + 1, step_bytes(10)), (1 << 40, 1 << 40)]:
        with pytest.raises(CosiloError, match="are no step from 10 values"):
            expected_step(made.base, made.header.base, made.header.made, made_bytes, length)


def test_memory_is_a_few_blocks_for_any_model(tmp_path: Path) -> None:
    before, after = pair(20 * BLOCK_VALUES)
    made = Made(tmp_path, before, after)
    tracemalloc.start()
    made.apply()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 4 * BLOCK_VALUES
    assert hashlib.sha256(made.out.read_bytes()).hexdigest() == made.header.made
