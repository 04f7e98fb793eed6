"""Canonical safetensors files: one tensor table, one float32 vector.

Owns the tensor table, its only byte form, and reading and writing such files without holding them. The data section of
a file IS the vector in the table's order, so that masks, sums and optimisers work on numbers without ever holding a
dict of tensors. One set of weights has one byte form, hence one digest: the header is what
`safetensors.numpy.save_file` writes for float32 tensors without metadata (entries sorted by name, no gaps, padded with
spaces to 8 bytes), and every other spelling is refused. Must not know torch, models, rounds or the network.

Format: https://github.com/huggingface/safetensors, "Format".
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cosilo_common.errors import CosiloError
from cosilo_common.transfer import sync_folder

Vector = NDArray[np.float32]

TENSORS_MAX = 100_000
"""The largest published UNets have some 2,000 tensors; an optimiser's table holds each twice."""
NAME_CHARS_MAX = 256
"""diffusers' deepest parameter names have about 90 characters."""
DIMENSIONS_MAX = 8
"""A 3D convolution has five."""
ELEMENTS_MAX = 1 << 40
"""4 TiB of float32: far above any model, far below where 64-bit byte offsets end."""
HEADER_BYTES_MAX = 16 << 20
"""160 bytes for each of TENSORS_MAX tensors; a real UNet's header has about 100 KiB."""
BLOCK_WORDS = 1 << 18
"""Words in a block of a streamed pass: 1 MiB, as chunk k of docs/protocol.md."""

_LENGTH_BYTES = 8
_WORD_BYTES = 4
_DTYPE = "F32"
_METADATA = b"__metadata__"  # the one key that is not a tensor
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_./-]{{0,{NAME_CHARS_MAX - 1}}}")
_ENTRY = re.compile(
    rb'"([^"\\]{1,%d})":\{"dtype":"([A-Z0-9_]{1,16})","shape":\[((?:[0-9]{1,14}(?:,[0-9]{1,14}){0,63})?)\],'
    rb'"data_offsets":\[([0-9]{1,14}),([0-9]{1,14})\]\}' % NAME_CHARS_MAX
)
_READ = "read weights"
_WRITE = "write weights"


@dataclass(frozen=True)
class TensorTable:
    """The names and shapes of a model's tensors, sorted by name; fixes the meaning of every position of a vector.

    entries: (name, shape) pairs. Names are [A-Za-z0-9_./-], at most NAME_CHARS_MAX characters, strictly ascending; a
    shape has at most DIMENSIONS_MAX dimensions, each at least 1, and () is a scalar. Raises CosiloError where a bound
    is broken.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.entries) <= TENSORS_MAX:
            raise _table_error(f"{len(self.entries)} tensors, allowed are 1 to {TENSORS_MAX}")
        previous = ""
        total = 0
        for name, shape in self.entries:
            if not _NAME.fullmatch(name) or name == _METADATA.decode():
                raise _table_error(f"tensor name {name[:80]!r} is not 1 to {NAME_CHARS_MAX} of [A-Za-z0-9_./-]")
            if name <= previous:
                raise _table_error(f"tensor {name} is repeated or out of order after {previous}")
            if len(shape) > DIMENSIONS_MAX or any(type(extent) is not int or extent < 1 for extent in shape):
                raise _table_error(f"tensor {name} has the impossible shape {list(shape)[:16]}")
            total += math.prod(shape)
            if total > ELEMENTS_MAX:
                raise _table_error(f"more than {ELEMENTS_MAX} elements up to tensor {name}")
            previous = name

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]]) -> Self:
        """The table of these (name, shape) pairs, given in any order."""
        return cls(tuple(sorted((name, tuple(int(extent) for extent in shape)) for name, shape in shapes)))

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Parse [[name, [extent, ...]], ...] as a manifest holds it; raises CosiloError where it is anything else."""
        if not isinstance(plain, list | tuple):
            raise _table_error("not a list of [name, shape]")
        if len(plain) > TENSORS_MAX:
            raise _table_error(f"{len(plain)} tensors, allowed are 1 to {TENSORS_MAX}")
        entries = []
        for item in plain:
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise _table_error("an entry is not [name, shape]")
            name, shape = item
            if not isinstance(name, str) or not isinstance(shape, list | tuple):
                raise _table_error("an entry is not [name, shape]")
            entries.append((name, tuple(shape)))
        return cls(tuple(entries))

    def to_plain(self) -> list[list[object]]:
        """[[name, [extent, ...]], ...] in the table's order: what from_plain reads."""
        return [[name, list(shape)] for name, shape in self.entries]

    @cached_property
    def size(self) -> int:
        """Elements of the vector, d."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @cached_property
    def digest(self) -> str:
        """Lower-case hex SHA-256 of the table's one byte form."""
        return hashlib.sha256(b"cosilo/1/tensor-table\x00" + self.header_bytes).hexdigest()

    @cached_property
    def header_bytes(self) -> bytes:
        """The header of a file with this table: JSON in the library's own spelling, padded with spaces to a multiple of
        8.
        """
        parts = []
        offset = 0
        for name, shape in self.entries:
            end = offset + _WORD_BYTES * math.prod(shape)
            extents = ",".join(map(str, shape))
            parts.append(f'"{name}":{{"dtype":"{_DTYPE}","shape":[{extents}],"data_offsets":[{offset},{end}]}}')
            offset = end
        header = ("{" + ",".join(parts) + "}").encode("ascii")
        return header + b" " * (-len(header) % 8)

    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the vector, by name."""
        result = {}
        start = 0
        for name, shape in self.entries:
            stop = start + math.prod(shape)
            result[name] = slice(start, stop)
            start = stop
        return result


@dataclass(frozen=True)
class Header:
    """What stands before the data of a file: its table, and the byte at which the vector begins."""

    table: TensorTable
    data_start: int

    @property
    def file_bytes(self) -> int:
        return self.data_start + _WORD_BYTES * self.table.size


def read_header(path: Path) -> Header:
    """Read and check a file's header against the file's real size, in memory bounded by HEADER_BYTES_MAX.

    Raises CosiloError, naming the tensor and what is wrong, for anything but the canonical form: a lying size, a gap or
    an overlap, a dtype other than F32, metadata, a repeated name, too many tensors, missing or trailing data.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise _read_error(path, f"{file_bytes} bytes are too few for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > HEADER_BYTES_MAX:
                raise _read_error(path, f"the header claims {length} bytes, allowed are {HEADER_BYTES_MAX}")
            if _LENGTH_BYTES + length > file_bytes:
                raise _read_error(path, f"the header claims {length} bytes, the file has {file_bytes}")
            raw = file.read(length)
    except OSError as error:
        raise _read_error(path, error.strerror or "unreadable") from None
    if len(raw) != length:
        raise _read_error(path, "the file shrank while it was read")
    table = _parse_entries(path, raw)
    if raw != table.header_bytes:
        raise _read_error(path, "the header is padded in another way than the canonical one")
    header = Header(table, _LENGTH_BYTES + length)
    if header.file_bytes != file_bytes:
        kind = "truncated" if file_bytes < header.file_bytes else "trailing data"
        raise _read_error(path, f"{kind}: the header describes {header.file_bytes} bytes, the file has {file_bytes}")
    return header


def open_vector(path: Path, table: TensorTable) -> Vector:
    """Map a file's vector, float32 (d,), read-only and without reading it.

    Raises CosiloError where the file is not canonical or its table is not `table`; the error names the first tensor
    that differs.
    """
    header = read_header(path)
    if header.table != table:
        raise _read_error(path, _difference(header.table, table), "these are the weights of another model; fetch them again")
    vector: Vector = np.memmap(path, dtype="<f4", mode="r", offset=header.data_start, shape=(table.size,))
    return vector


def write_weights(path: Path, table: TensorTable, blocks: Iterable[Vector]) -> None:
    """Write consecutive float32 blocks, (n_i,) with sum n_i = d, as the file of `table`: whole and on disk, or not at
    all.

    Raises CosiloError where the blocks hold a NaN or an infinity, too many or too few elements, or the disk is full.
    """
    with WeightsWriter(path, table) as writer:
        for block in blocks:
            writer.append(block)


class WeightsWriter:
    """A file in the making: blocks go to any place of the vector, and leaving the `with` block puts the whole file in
    place at once.

    The blocks must cover the vector exactly once. An exception, or a hole, leaves nothing behind. Files are made 0600.
    """

    def __init__(self, path: Path, table: TensorTable) -> None:
        self._path = path
        self._table = table
        self._partial = path.with_name(path.name + ".tmp")
        self._data_start = _LENGTH_BYTES + len(table.header_bytes)
        self._covered: dict[int, int] = {}  # start of a written run -> its end
        self._fd = -1

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            header = self._table.header_bytes
            self._write(len(header).to_bytes(_LENGTH_BYTES, "little") + header, 0)
        except OSError as error:
            self._discard()
            raise self._os_error(error) from None
        return self

    def append(self, block: Vector) -> None:
        """Write a block where the run that began at 0 ends."""
        self.put(self._covered.get(0, 0), block)

    def put(self, start: int, block: Vector) -> None:
        """Write float32 (n,) to elements start .. start + n; raises CosiloError for overlap, excess or a value that is
        not finite.
        """
        stop = start + block.size
        if block.dtype != np.float32 or block.ndim != 1:
            raise self._error(f"a block is {block.dtype} with {block.ndim} dimensions, not float32 with one")
        if start < 0 or stop > self._table.size:
            raise self._error(f"a block ends at element {stop}, the table has {self._table.size}")
        if block.size == 0:
            return
        if not np.isfinite(block).all():
            first = start + int(np.flatnonzero(~np.isfinite(block))[0])
            raise self._error(f"element {first} is not finite", "training diverged: lower the learning rate")
        self._cover(start, stop)
        try:
            self._write(np.ascontiguousarray(block).data.cast("B"), self._data_start + _WORD_BYTES * start)
        except OSError as error:
            raise self._os_error(error) from None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._discard()
            return
        if self._covered != {0: self._table.size}:
            covered = sum(stop - start for start, stop in self._covered.items())
            self._discard()
            raise self._error(f"{covered} of {self._table.size} elements were written")
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._partial.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            self._discard()
            raise self._os_error(error) from None

    def _cover(self, start: int, stop: int) -> None:
        # A pass writes at most three runs side by side, so this stays a handful of entries, or one a tensor that a step leaves out.
        if any(start < end and begin < stop for begin, end in self._covered.items()):
            raise self._error(f"elements {start} to {stop} were already written")
        if stop in self._covered:
            stop = self._covered.pop(stop)
        for begin, end in self._covered.items():
            if end == start:
                self._covered[begin] = stop
                return
        self._covered[start] = stop

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view = view[written:]
            offset += written

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._partial.unlink(missing_ok=True)

    def _error(self, reason: str, hint: str = "") -> CosiloError:
        return CosiloError(_WRITE, f"{self._path.name}: {reason}", hint)

    def _os_error(self, error: OSError) -> CosiloError:
        return self._error(error.strerror or "unwritable", "free space on that disk, then start the round again")


def _parse_entries(path: Path, raw: bytes) -> TensorTable:
    """One regular expression an entry, from left to right: nothing nests, and the first wrong byte ends it."""
    body = raw.rstrip(b" ")
    if not body.startswith(b"{") or not body.endswith(b"}"):
        raise _read_error(path, "the header is not a JSON object")
    entries: list[tuple[str, tuple[int, ...]]] = []
    position, offset, previous = 1, 0, b""
    while position < len(body) - 1:
        if len(entries) == TENSORS_MAX:
            raise _read_error(path, f"more than {TENSORS_MAX} tensors")
        match = _ENTRY.match(body, position)
        if match is None or match[1] == _METADATA:
            raise _read_error(path, _why_no_entry(body, position))
        name, dtype, extents, begin, end = match.groups()
        label = name.decode("ascii", "backslashreplace")
        if name <= previous:
            raise _read_error(path, f"tensor {label}: repeated, or not sorted by name")
        if dtype != _DTYPE.encode():
            raise _read_error(path, f"tensor {label}: dtype {dtype.decode()}, must be {_DTYPE}", "convert the weights to float32")
        shape = tuple(int(extent) for extent in extents.split(b",") if extent)
        if int(begin) != offset:
            kind = "overlaps the tensor before it" if int(begin) < offset else "leaves a gap before it"
            raise _read_error(path, f"tensor {label}: {kind} (begins at byte {int(begin)}, expected {offset})")
        offset += _WORD_BYTES * math.prod(shape)
        if int(end) != offset:
            raise _read_error(path, f"tensor {label}: shape {list(shape)} ends at byte {offset}, the header says {int(end)}")
        entries.append((label, shape))
        previous = name
        position = match.end()
        if position < len(body) - 1:
            if body[position : position + 1] != b",":
                raise _read_error(path, f"byte {position} of the header: a comma was expected")
            position += 1
    try:
        return TensorTable(tuple(entries))
    except CosiloError as error:
        raise _read_error(path, error.subject) from None


def _why_no_entry(body: bytes, position: int) -> str:
    if body.startswith(b'"%s"' % _METADATA, position):
        return "the header has metadata; canonical weights have none"
    return f"byte {position} of the header: not a tensor entry in canonical form"


def _difference(found: TensorTable, expected: TensorTable) -> str:
    for mine, theirs in zip(found.entries, expected.entries, strict=False):
        if mine != theirs:
            return f"has tensor {mine[0]} {list(mine[1])} where the run's model has {theirs[0]} {list(theirs[1])}"
    return f"has {len(found.entries)} tensors, the run's model has {len(expected.entries)}"


def _table_error(reason: str) -> CosiloError:
    return CosiloError("tensor table", reason)


def _read_error(path: Path, reason: str, hint: str = "") -> CosiloError:
    return CosiloError(_READ, f"{path.name}: {reason}", hint)


if sys.byteorder != "little":  # the vector is used as it lies in the file
    raise ImportError("cosilo_common.weights needs a little-endian machine")
