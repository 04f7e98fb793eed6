"""Bytes that are nearly right: what every fuzz test here feeds to a decoder. Counts them, so that a run says how many there were.

    COSILO_FUZZ_EXAMPLES=2000 .venv/bin/python -m pytest tests/fuzz       what `make fuzz` does

Without it a test takes the same few inputs each time, so that `make test` says the same of the same commit.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES: Final = int(os.environ.get("COSILO_FUZZ_EXAMPLES", "0"))
EXAMPLES_DEFAULT: Final = 40  # a decoder's: all of them together stay under half a minute
INPUT_BYTES_MAX: Final = 4096  # of random bytes; what is larger comes from valid inputs

inputs: Counter[str] = Counter()
"""Inputs given so far, by what they were given to."""


def fuzzed(examples_default: int = EXAMPLES_DEFAULT) -> Any:
    """The settings of one fuzz test. examples_default: where none are asked for."""
    return settings(
        max_examples=EXAMPLES or examples_default,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def some(data: bytes) -> st.SearchStrategy[bytes]:
    """Valid bytes after one to four of: a flipped bit, a changed, cut, doubled, removed, inserted or repeated stretch; or any bytes."""
    return st.one_of(st.binary(max_size=INPUT_BYTES_MAX), _edits(data), _edits(data), _edits(data))


@st.composite
def _edits(draw: st.DrawFn, data: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        data = _edit(draw, data)
    return data


def _edit(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(st.sampled_from(["flip", "set", "cut", "head", "remove", "insert", "double", "number"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    end = min(len(data), at + draw(st.integers(1, 64)))
    match kind:
        case "flip" if data:
            return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        case "set" if data:
            return data[:at] + bytes([draw(st.sampled_from([0, 1, 0x22, 0x2D, 0x30, 0x5B, 0x7B, 0x7F, 0x80, 0xFF]))]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "head":
            return data[at:]
        case "remove":
            return data[:at] + data[end:]
        case "double":
            return data[:end] + data[at:end] + data[end:]
        case "number":  # where JSON or TOML has one
            number = draw(
                st.sampled_from([b"-1", b"1e999", b"NaN", b"18446744073709551616", b"[" * 2000, b"null", b'"\\ud800"', b"0" * 5000])
            )
            return data[:at] + number + data[at:]
        case _:
            return data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:]


def truncations(data: bytes, most: int) -> list[bytes]:
    """The data cut at every byte; where that are more than `most`, at so many places, both ends among them."""
    step = max(1, len(data) // most)
    return [data[:size] for size in sorted({*range(0, len(data), step), *range(max(0, len(data) - 8), len(data))})]


def flips(data: bytes) -> list[bytes]:
    """The data with each of its bits flipped."""
    return [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in range(8)]
