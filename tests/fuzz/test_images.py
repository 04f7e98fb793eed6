"""A site's own files: whatever they hold, an image is decoded or named as unreadable, and nothing is held that was not checked before."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cosilo_client.data import DataConfig
from cosilo_client.data.arrays import ARRAY_BYTES_MAX
from cosilo_client.data.folder import FolderSource
from cosilo_client.data.idx import read_idx
from cosilo_client.data.npz import open_npz
from cosilo_client.data.sources import Picture, Unreadable
from cosilo_common.errors import CosiloError
from tests.fuzz.mutation import fuzzed, inputs, some, truncations


def picture(kind: str, mode: str = "L") -> bytes:
    shape = (9, 7) if mode == "L" else (9, 7, 3)
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape) + data


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, train_images=np.zeros((3, 4, 4), np.uint8), train_labels=np.zeros((3, 1), np.uint8))
    return out.getvalue()


IMAGES = {"png": picture("PNG"), "png in colour": picture("PNG", "RGB"), "jpeg": picture("JPEG"), "jpeg in colour": picture("JPEG", "RGB")}
IDX = {"idx": idx((2, 3, 3), bytes(18)), "idx.gz": gzip.compress(idx((2, 3, 3), bytes(18)), mtime=0)}


def look(folder: Path, name: str, data: bytes) -> None:
    inputs[name] += 1
    file = folder / "a" / f"x.{name[:3].strip().replace('jpe', 'jpg')}"
    file.write_bytes(data)
    source = FolderSource.open(DataConfig(kind="folder", path=folder))
    (seen,) = source.pictures()
    assert isinstance(seen, Picture | Unreadable)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", IMAGES)
def test_any_image_is_decoded_or_named(name: str, folder: Path) -> None:
    for data in truncations(IMAGES[name], 60):
        look(folder, name, data)

    @fuzzed()
    @given(some(IMAGES[name]))
    def try_some(data: bytes) -> None:
        look(folder, name, data)

    try_some()


def test_a_png_of_any_size_that_it_claims(folder: Path) -> None:
    """The header says how large, the data says something else: what is decoded is bounded before it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    @fuzzed()
    @given(
        st.integers(0, 2**31),
        st.integers(0, 2**31),
        st.sampled_from([1, 2, 4, 8, 16]),
        st.sampled_from([0, 2, 3, 4, 6]),
        st.integers(0, 20),
    )
    def try_one(width: int, height: int, depth: int, colour: int, body_kib: int) -> None:
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        body = zlib.compress(bytes(body_kib << 10))
        look(folder, "png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))

    try_one()


@pytest.mark.parametrize("name", IDX)
def test_any_idx_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"train-images.{name}"

    def look_at(data: bytes) -> None:
        inputs[name] += 1
        path.write_bytes(data)
        try:
            read_idx(path)
        except CosiloError:
            pass

    for data in truncations(IDX[name], 100):
        look_at(data)
    for shape in ((2**32 - 1,) * 4, (ARRAY_BYTES_MAX >> 10, 1025), (2**32 - 1,), (0, 2**32 - 1)):
        look_at(idx(shape, b""))

    @fuzzed()
    @given(some(IDX[name]))
    def try_some(data: bytes) -> None:
        look_at(data)

    try_some()


@pytest.mark.parametrize("name", IDX)
def test_a_header_that_lies_takes_no_memory(name: str, tmp_path: Path) -> None:
    """4 GiB are within what a file may hold, so only the bytes themselves are believed."""
    lie = idx((2**32 - 1,), bytes(100))
    path = tmp_path / f"train-images.{name}"
    path.write_bytes(gzip.compress(lie) if name.endswith("gz") else lie)
    tracemalloc.start()
    try:
        with pytest.raises(CosiloError, match="its length is not"):
            read_idx(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20


def read_npz(path: Path, data: bytes) -> None:
    inputs["npz"] += 1
    path.write_bytes(data)
    try:
        open_npz(DataConfig(kind="npz", path=path))
    except CosiloError:
        pass


def test_any_npz_file_is_read_or_refused(tmp_path: Path) -> None:
    for data in truncations(npz(), 100):
        read_npz(tmp_path / "x.npz", data)

    @fuzzed(100)
    @given(some(npz()))
    def try_some(data: bytes) -> None:
        read_npz(tmp_path / "x.npz", data)

    try_some()


@pytest.mark.parametrize("end", ["labels", "images"])
def test_any_array_header_is_read_or_refused(end: str, tmp_path: Path) -> None:
    """Within a zip file whose own checks hold: numpy's header is Python's syntax, and takes any."""
    arrays = {}
    for name in ("train_images", "train_labels"):
        out = io.BytesIO()
        np.lib.format.write_array(out, np.zeros((3, 4, 4) if "images" in name else 3, np.uint8))
        arrays[name] = out.getvalue()

    @fuzzed(100)
    @given(some(arrays[f"train_{end}"]))
    def try_some(data: bytes) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in {**arrays, f"train_{end}": data}.items():
                archive.writestr(f"{name}.npy", array)
        read_npz(tmp_path / "x.npz", packed.getvalue())

    try_some()
