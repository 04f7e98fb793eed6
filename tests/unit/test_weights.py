"""Canonical weights files: one byte form for one set of weights, and nothing held that need not be."""

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cosilo_common.errors import CosiloError
from cosilo_common.weights import (
    BLOCK_WORDS,
    TENSORS_MAX,
    TensorTable,
    WeightsWriter,
    open_vector,
    read_header,
    write_weights,
)

SHAPES = [("up.2.weight", (2, 3)), ("down.bias", (4,)), ("scale", ())]
TABLE = TensorTable.of(SHAPES)
VECTOR = np.arange(11, dtype=np.float32)  # down.bias 0..3, scale 4, up.2.weight 5..10


def test_a_table_is_sorted_by_name_and_counts_its_elements() -> None:
    assert TABLE.entries == (("down.bias", (4,)), ("scale", ()), ("up.2.weight", (2, 3)))
    assert TABLE.size == 11
    assert TABLE.slices() == {"down.bias": slice(0, 4), "scale": slice(4, 5), "up.2.weight": slice(5, 11)}


def test_a_table_survives_its_plain_form_and_its_digest_names_it() -> None:
    assert TensorTable.from_plain(TABLE.to_plain()) == TABLE
    assert TABLE.to_plain() == [["down.bias", [4]], ["scale", []], ["up.2.weight", [2, 3]]]
    assert TensorTable.of(reversed(SHAPES)).digest == TABLE.digest
    assert TensorTable.of([*SHAPES[:2], ("scale", (1,))]).digest != TABLE.digest


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        ([], "0 tensors"),
        ({}, "not a list"),
        ([["a"]], "not [name, shape]"),
        ([[1, [2]]], "not [name, shape]"),
        ([["a", 3]], "not [name, shape]"),
        ([["a", [2, 0]]], "tensor a has the impossible shape [2, 0]"),
        ([["a", [-1]]], "tensor a has the impossible shape [-1]"),
        ([["a", [True]]], "tensor a has the impossible shape [True]"),
        ([["a", [1.0]]], "tensor a has the impossible shape [1.0]"),
        ([["a", [1] * 9]], "tensor a has the impossible shape"),
        ([["a", [1 << 20, 1 << 21]]], "elements up to tensor a"),
        ([["b", [1]], ["a", [1]]], "tensor a is repeated or out of order after b"),
        ([["a", [1]], ["a", [1]]], "tensor a is repeated or out of order after a"),
        ([["../a", [1]]], "tensor name '../a'"),
        ([["__meta\n", [1]]], "tensor name"),
        ([["", [1]]], "tensor name ''"),
        ([["__metadata__", [1]]], "tensor name '__metadata__'"),
        ([["a" * 257, [1]]], "tensor name"),
        ([["a", [1]]] * (TENSORS_MAX + 1), "100001 tensors"),
    ],
)
def test_an_impossible_table_is_refused_with_the_tensor_and_the_reason(plain: object, reason: str) -> None:
    with pytest.raises(CosiloError) as caught:
        TensorTable.from_plain(plain)
    assert reason in caught.value.subject


def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path: Path) -> None:
    write_weights(tmp_path / "ours", TABLE, [VECTOR[:3], VECTOR[3:]])
    tensors = {name: VECTOR[where].reshape(shape) for (name, shape), where in zip(TABLE.entries, TABLE.slices().values(), strict=True)}
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {name: tensor.tolist() for name, tensor in tensors.items()}


def test_a_file_of_the_library_opens_as_the_vector(tmp_path: Path) -> None:
    save_file({"b": np.full((2, 2), 7, np.float32), "a": np.array([1, 2], np.float32)}, tmp_path / "file")
    table = read_header(tmp_path / "file").table
    assert table.entries == (("a", (2,)), ("b", (2, 2)))
    vector = open_vector(tmp_path / "file", table)
    assert vector.tolist() == [1, 2, 7, 7, 7, 7]
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 0


def test_the_library_agrees_on_a_table_of_many_tensors(tmp_path: Path) -> None:
    table = TensorTable.of((f"blocks.{i}.w", (i % 3 + 1,)) for i in range(500))
    write_weights(tmp_path / "file", table, [np.zeros(table.size, np.float32)])
    assert read_header(tmp_path / "file").table == table
    with safe_open(tmp_path / "file", "np") as file:
        assert sorted(file.keys()) == [name for name, _ in table.entries]


def test_weights_split_in_any_way_have_one_digest(tmp_path: Path) -> None:
    digests = set()
    for cut in range(TABLE.size + 1):
        write_weights(tmp_path / "file", TABLE, [VECTOR[:cut], VECTOR[cut:]])
        digests.add(hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest())
    assert len(digests) == 1


def header_of(entries: str, data_bytes: int) -> bytes:
    raw = ("{" + entries + "}").encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def entry(name: str, shape: str, begin: int, end: int, dtype: str = "F32") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}'


A = entry("a", "2", 0, 8)
LIES = {
    "empty file": (b"", "0 bytes are too few"),
    "header past the end": ((1000).to_bytes(8, "little") + b"{}", "claims 1000 bytes, the file has 10"),
    "header of 2^63 bytes": ((1 << 63).to_bytes(8, "little") + b"{}", "allowed are"),
    "no tensor": (header_of("", 0), "0 tensors"),
    "not an object": ((8).to_bytes(8, "little") + b"[1,2,3] ", "not a JSON object"),
    "nested deeply": (header_of('"a":' + "[" * 100_000, 0), "byte 1 of the header"),
    "truncated data": (header_of(A, 7), "truncated"),
    "trailing data": (header_of(A, 9), "trailing data"),
    "shape larger than its bytes": (
        header_of(entry("a", "3", 0, 8), 8),
        "tensor a: shape [3] ends at byte 12, the header says 8",
    ),
    "overlap": (
        header_of(A + "," + entry("b", "2", 4, 12), 12),
        "tensor b: overlaps the tensor before it (begins at byte 4, expected 8)",
    ),
    "gap": (
        header_of(A + "," + entry("b", "1", 12, 16), 16),
        "tensor b: leaves a gap before it (begins at byte 12, expected 8)",
    ),
    "first tensor not at 0": (header_of(entry("a", "1", 4, 8), 8), "tensor a: leaves a gap before it"),
    "half precision": (header_of(entry("a", "4", 0, 8, "F16"), 8), "tensor a: dtype F16, must be F32"),
    "repeated name": (header_of(A + "," + entry("a", "2", 8, 16), 16), "tensor a: repeated"),
    "unsorted": (
        header_of(entry("b", "1", 0, 4) + "," + entry("a", "1", 4, 8), 8),
        "tensor a: repeated, or not sorted by name",
    ),
    "metadata": (header_of('"__metadata__":{"format":"pt"},' + A, 8), "metadata"),
    "a tensor called __metadata__": (header_of(entry("__metadata__", "2", 0, 8), 8), "metadata"),
    "zero extent": (header_of(entry("a", "0", 0, 0), 0), "impossible shape [0]"),
    "negative extent": (header_of(entry("a", "-1", 0, 8), 8), "byte 1 of the header"),
    "huge extent": (header_of(entry("a", "99999999999999", 0, 8), 8), "tensor a: shape [99999999999999] ends at byte"),
    "extent of 5,000 digits": (header_of(entry("a", "9" * 5000, 0, 8), 8), "byte 1 of the header"),
    "too many dimensions": (header_of(entry("a", ",".join("1" * 9), 0, 4), 4), "impossible shape"),
    "name that is a path": (header_of(entry("../../a", "2", 0, 8), 8), "tensor name '../../a'"),
    "name that is not ASCII": (header_of(entry("é", "2", 0, 8), 8), "tensor name"),
    "space in the JSON": (header_of(A.replace(":", ": ", 1), 8), "byte 1 of the header"),
    "no comma": (header_of(A + entry("b", "1", 8, 12), 12), "a comma was expected"),
    "comma at the end": (header_of(A + ",", 8), "padded in another way"),
    "padded to 16": ((80).to_bytes(8, "little") + header_of(A, 0)[8:].ljust(80) + bytes(8), "padded in another way"),
}


@pytest.mark.parametrize(("raw", "reason"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused_with_a_reason(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(CosiloError) as caught:
        read_header(tmp_path / "file")
    assert reason in str(caught.value)


def test_ten_million_tensors_are_refused_before_they_are_held(tmp_path: Path) -> None:
    part = ",".join(entry(f"t{i:08d}", "1", 4 * i, 4 * i + 4) for i in range(TENSORS_MAX + 5))
    (tmp_path / "many").write_bytes(header_of(part, 4 * (TENSORS_MAX + 5)))
    with pytest.raises(CosiloError, match=r"more than 100000 tensors"):
        read_header(tmp_path / "many")
    with (tmp_path / "huge").open("wb") as file:  # ten million entries would need some 800 MB of header
        file.write((800_000_000).to_bytes(8, "little"))
        file.truncate(900_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(CosiloError, match=r"claims 800000000 bytes"):
            read_header(tmp_path / "huge")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_but_a_cosilo_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    for data in (raw, len(raw).to_bytes(8, "little") + raw, header_of(raw.decode("latin-1"), 0)):
        path.write_bytes(data)
        with pytest.raises(CosiloError):
            read_header(path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_changed_header_byte_never_opens_as_the_same_table(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    write_weights(path, TABLE, [VECTOR])
    raw = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(raw) - VECTOR.nbytes - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with pytest.raises(CosiloError):
        open_vector(path, TABLE)


def test_weights_of_another_model_are_refused_by_the_first_tensor_that_differs(tmp_path: Path) -> None:
    write_weights(tmp_path / "file", TABLE, [VECTOR])
    with pytest.raises(CosiloError, match=r"has tensor up\.2\.weight \[2, 3\] where the run's model has up\.2\.weight \[6\]"):
        open_vector(tmp_path / "file", TensorTable.of([*SHAPES[1:], ("up.2.weight", (6,))]))
    with pytest.raises(CosiloError, match=r"has 3 tensors, the run's model has 2"):
        open_vector(tmp_path / "file", TensorTable(TABLE.entries[:2]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_leaves_no_file(tmp_path: Path, value: float) -> None:
    bad = VECTOR.copy()
    bad[7] = value
    with pytest.raises(CosiloError, match="element 7 is not finite"):
        write_weights(tmp_path / "file", TABLE, [bad[:5], bad[5:]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([VECTOR[:10]], "10 of 11 elements"),
        ([VECTOR, VECTOR[:1]], "ends at element 12, the table has 11"),
        ([VECTOR.astype(np.float64)], "float64"),
        ([VECTOR.reshape(11, 1)], "2 dimensions"),
    ],
)
def test_blocks_that_do_not_fill_the_table_leave_the_old_file(tmp_path: Path, blocks: list[np.ndarray], reason: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(CosiloError, match=reason):
        write_weights(tmp_path / "file", TABLE, blocks)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_writer_takes_two_runs_side_by_side_and_refuses_overlap_and_holes(tmp_path: Path) -> None:
    with WeightsWriter(tmp_path / "file", TABLE) as writer:
        for start in (0, 6, 3, 9):
            writer.put(start, VECTOR[start : min(start + 3, 11)])
    assert open_vector(tmp_path / "file", TABLE).tolist() == VECTOR.tolist()
    with pytest.raises(CosiloError, match="already written"), WeightsWriter(tmp_path / "other", TABLE) as writer:
        writer.put(0, VECTOR[:6])
        writer.put(5, VECTOR[5:])
    with pytest.raises(CosiloError, match="10 of 11 elements"), WeightsWriter(tmp_path / "other", TABLE) as writer:
        writer.put(0, VECTOR[:5])
        writer.put(6, VECTOR[6:])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "file", TABLE) as writer:
        writer.append(VECTOR[:5])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    write_weights(tmp_path / "file", TABLE, [VECTOR])
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_writing_and_opening_sixty_four_megabytes_holds_a_few_blocks(tmp_path: Path) -> None:
    blocks = 64
    table = TensorTable.of([("w", (blocks, BLOCK_WORDS))])
    block = np.ones(BLOCK_WORDS, np.float32)
    tracemalloc.start()
    try:
        write_weights(tmp_path / "file", table, (block for _ in range(blocks)))
        vector = open_vector(tmp_path / "file", table)
        assert float(vector[-1]) == 1.0
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
