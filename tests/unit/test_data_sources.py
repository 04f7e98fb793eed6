"""The site's images from every kind of source, and every way in which they can be broken."""

import gzip
import io
import logging
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from cosilo_client.data import DataConfig, Picture, census, data_stamp, load_images, open_source, split_heldout
from cosilo_client.data.decoding import LocalImages, fit_picture
from cosilo_client.data.idx import read_idx
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError


def architecture(size: int = 8, planes: int = 1, classes: int = 2) -> Architecture:
    return Architecture(
        sample_size=size,
        in_channels=planes,
        num_classes=classes,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size), value, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    save(root / "cat" / "1.png", grey(10))
    save(root / "cat" / "2.jpg", grey(20))
    save(root / "dog" / "1.PNG", grey(200))
    (root / "dog" / "notes.txt").write_text("not an image")
    return root


# --- folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_counts_and_decodes_by_class(folder: Path) -> None:
    source = open_source(DataConfig(kind="folder", path=folder))
    assert census(source) == {"cat": 2, "dog": 1}
    local = load_images(source, architecture())
    assert (local.images.shape, local.images.dtype, local.full_scale) == ((3, 1, 8, 8), np.uint8, 255)
    assert local.labels.tolist() == [0, 0, 1]
    assert local.images[:, 0, 0, 0].tolist() == pytest.approx([10, 20, 200], abs=2)


def test_named_classes_number_the_folders_even_where_one_is_missing(folder: Path) -> None:
    config = DataConfig(kind="folder", path=folder, classes=("ant", "dog", "cat"))
    source = open_source(config)
    assert census(source) == {"ant": 0, "dog": 1, "cat": 2}
    assert sorted(load_images(source, architecture(classes=3)).labels.tolist()) == [1, 2, 2]


def test_a_folder_that_is_none_of_the_classes_is_refused(folder: Path) -> None:
    with pytest.raises(CosiloError, match="sub-folder 'dog' is none of the classes"):
        open_source(DataConfig(kind="folder", path=folder, classes=("cat",)))


@pytest.mark.parametrize("classes", [1, 3])
def test_a_model_with_other_classes_is_refused(folder: Path, classes: int) -> None:
    with pytest.raises(CosiloError, match=f"2 classes .cat, dog. for a model of {classes}; name all of the run's"):
        load_images(open_source(DataConfig(kind="folder", path=folder)), architecture(classes=classes))


def test_an_image_that_does_not_decode_is_skipped_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cat" / "0.png").write_bytes(b"not a png")
    whole = io.BytesIO()
    Image.fromarray(grey(50, 64)).save(whole, "JPEG")
    (folder / "dog" / "9.jpeg").write_bytes(whole.getvalue()[:-200])
    with caplog.at_level(logging.WARNING, "cosilo.data"):
        local = load_images(open_source(DataConfig(kind="folder", path=folder)), architecture())
    assert (len(local.images), local.skipped) == (3, 2)
    assert "cat/0.png: neither JPEG nor PNG" in caplog.text
    assert "dog/9.jpeg" in caplog.text
    assert "2 of 5 images skipped" in caplog.text


def test_a_folder_where_nothing_decodes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(CosiloError, match="none of 1 images decodes"):
        load_images(open_source(DataConfig(kind="folder", path=tmp_path)), architecture(classes=1))


@pytest.mark.parametrize(("width", "height"), [(10_000, 8_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_never_decoded(folder: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    (folder / "cat" / "bomb.png").write_bytes(bomb)
    items = list(open_source(DataConfig(kind="folder", path=folder)).pictures())
    (skipped,) = [item for item in items if not isinstance(item, Picture)]
    assert skipped.name == "cat/bomb.png"
    assert "pixels" in skipped.reason


def test_another_format_under_a_good_name_is_not_opened(folder: Path) -> None:
    Image.fromarray(grey(1)).save(folder / "cat" / "3.png", "TIFF")
    items = list(open_source(DataConfig(kind="folder", path=folder)).pictures())
    assert [item.name for item in items if not isinstance(item, Picture)] == ["cat/3.png"]


def test_a_missing_unreadable_or_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="No such file or directory; check path in"):
        open_source(DataConfig(kind="folder", path=tmp_path / "absent"))
    with pytest.raises(CosiloError, match="no JPEG or PNG in any sub-folder"):
        open_source(DataConfig(kind="folder", path=tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CosiloError, match="Not a directory"):
        open_source(DataConfig(kind="folder", path=tmp_path / "file"))


def test_sixteen_bits_are_kept_and_mix_with_eight(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", grey(255))
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "a" / "2.png")
    save(tmp_path / "a" / "3.png", grey(1))
    local = load_images(open_source(DataConfig(kind="folder", path=tmp_path)), architecture(classes=1))
    assert (local.images.dtype, local.full_scale) == (np.uint16, 65_535)
    assert local.images[:, 0, 0, 0].tolist() == [65_535, 1000, 257]


def test_a_scanner_of_twelve_bits_reaches_white(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((16, 16), 4095, np.uint16)).save(tmp_path / "a" / "1.png")
    config = DataConfig(kind="folder", path=tmp_path, full_scale=4095)
    local = load_images(open_source(config), architecture(classes=1))
    assert local.images.min() == local.images.max() == 65_535


def test_the_stamp_changes_when_an_image_comes(folder: Path) -> None:
    config = DataConfig(kind="folder", path=folder)
    before = data_stamp(config)
    assert data_stamp(config) == before
    save(folder / "cat" / "new.png", grey(3))
    assert data_stamp(config) != before


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "planes", "expected"),
    [
        ((20, 10), 1, (1, 8, 8)),
        ((8, 8, 3), 1, (1, 8, 8)),
        ((8, 8), 3, (3, 8, 8)),
        ((9, 30, 4), 3, (3, 8, 8)),
        ((8, 8, 1), 1, (1, 8, 8)),
        ((8, 8, 5), 5, (5, 8, 8)),
        ((16, 16), 2, (2, 8, 8)),
    ],
)
def test_any_shape_becomes_the_models(shape: tuple[int, ...], planes: int, expected: tuple[int, ...]) -> None:
    pixels = np.full(shape, 77, np.uint8)
    fitted = fit_picture(Picture("x", 0, pixels, 255), 8, planes)
    assert fitted.shape == expected
    assert fitted.dtype == np.uint8
    assert (fitted[: min(planes, 3)] == 77).all()


def test_the_middle_of_a_wide_picture_is_kept() -> None:
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(fit_picture(Picture("x", 0, pixels, 255), 8, 1)[0], pixels[:, 8:16])


def test_planes_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(CosiloError, match="3 planes of uint16 for a model of 1"):
        fit_picture(Picture("x", 0, np.zeros((8, 8, 3), np.uint16), 65_535), 8, 1)


# --- idx --------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    images = np.arange(4 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(4, 28, 28)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([1, 0, 1, 1], np.uint8)))
    return tmp_path


def test_idx_reads_plain_and_gz(idx_folder: Path) -> None:
    source = open_source(DataConfig(kind="idx", path=idx_folder, classes=("shirt", "shoe")))
    assert census(source) == {"shirt": 1, "shoe": 3}
    assert load_images(source, architecture(size=16)).images.shape == (4, 1, 16, 16)


def test_an_index_file_chooses_the_sites_images(idx_folder: Path) -> None:
    (idx_folder / "mine").write_text("# site north\n3\n\n1\n")
    source = open_source(DataConfig(kind="idx", path=idx_folder, index_file=idx_folder / "mine"))
    assert census(source) == {"0": 1, "1": 1}
    assert load_images(source, architecture()).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4\n", "line 1: '4' is not a number below 4"),
        ("0\n-1\n", "line 2: '-1'"),
        ("one\n", "line 1: 'one'"),
        ("1\n1\n", "listed twice"),
        ("# none\n", "no image is listed"),
    ],
)
def test_a_wrong_index_file_names_its_line(idx_folder: Path, text: str, message: str) -> None:
    (idx_folder / "mine").write_text(text)
    with pytest.raises(CosiloError, match=message):
        open_source(DataConfig(kind="idx", path=idx_folder, index_file=idx_folder / "mine"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01" + bytes(8), "not an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x09" + bytes(40), "not an IDX file"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "its header declares 79228162458924105385300197375 bytes"),
        (idx(np.zeros(5, np.uint8))[:-1], "its length is not the 5 bytes"),
        (idx(np.zeros(5, np.uint8)) + b"x", "its length is not the 5 bytes"),
    ],
)
def test_an_idx_file_that_lies_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    for name, content in (("plain", data), ("packed.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CosiloError, match=message):
            read_idx(tmp_path / name)


def test_a_broken_gz_is_refused(idx_folder: Path) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CosiloError, match="copy the file again"):
        open_source(DataConfig(kind="idx", path=idx_folder))


def test_idx_labels_are_checked(idx_folder: Path) -> None:
    with pytest.raises(CosiloError, match="label 1 is not between 0 and 0"):
        open_source(DataConfig(kind="idx", path=idx_folder, classes=("shirt",)))
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(CosiloError, match=r"labels \(3,\) for 4 images"):
        open_source(DataConfig(kind="idx", path=idx_folder))
    with pytest.raises(CosiloError, match="no t10k-images-idx3-ubyte"):
        open_source(DataConfig(kind="idx", path=idx_folder, split="test"))


# --- npz --------------------------------------------------------------------------------------------------------------


def write_npz(path: Path, **arrays: Any) -> DataConfig:
    np.savez_compressed(path, **arrays)
    return DataConfig(kind="npz", path=path)


def test_npz_in_medmnists_layout(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)
    labels = np.array([[0], [1], [1], [0], [1]])
    config = write_npz(tmp_path / "m.npz", train_images=images, train_labels=labels)
    source = open_source(config)
    assert census(source) == {"0": 2, "1": 3}
    local = load_images(source, architecture(size=28, planes=3))
    assert np.array_equal(local.images, images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"val_images": np.zeros((1, 8, 8), np.uint8)}, "no array train_images"),
        (
            {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.zeros((2, 14), np.uint8)},
            "one whole-number class an image",
        ),
        (
            {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.array([0.0, 1.0])},
            "one whole-number class an image",
        ),
        (
            {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.array([0, -1])},
            "label -1 is not between",
        ),
        ({"train_images": np.zeros((2, 8, 8), np.float32), "train_labels": np.array([0, 1])}, "images are float32"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, np.int64)}, "no image"),
    ],
)
def test_an_npz_with_other_arrays_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    config = write_npz(tmp_path / "m.npz", **arrays)
    with pytest.raises(CosiloError, match=message):
        open_source(config)


def test_an_npz_with_pickled_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    array = np.empty(1, object)
    array[0] = Trap()
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive, archive.open("train_images.npy", "w") as stream:
        np.lib.format.write_array(stream, array, allow_pickle=True)
    with pytest.raises(CosiloError, match="train_images declares object"):
        open_source(DataConfig(kind="npz", path=tmp_path / "m.npz"))
    assert not (tmp_path / "sprung").exists()


def test_an_npz_header_that_lies_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("train_images.npy", stream.getvalue() + bytes(64))
    with pytest.raises(CosiloError, match="and does not hold that"):
        open_source(DataConfig(kind="npz", path=tmp_path / "m.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(CosiloError, match=r"read data: .*m\.npz"):
        open_source(DataConfig(kind="npz", path=tmp_path / "m.npz"))


# --- digits, the held-out part, config --------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    local = load_images(open_source(DataConfig(kind="digits")), architecture(classes=10))
    assert np.array_equal(local.images[:, 0], np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    assert np.array_equal(local.labels, bunch.target)


def local_images(values: Sequence[int]) -> LocalImages:
    images = np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    return LocalImages(images, np.zeros(len(values), np.int64), 255, 0)


def test_the_heldout_part_is_chosen_by_content() -> None:
    local = local_images(range(100))
    split = split_heldout(local, 0.1)
    assert (len(split.train), len(split.heldout)) == (90, 10)
    assert sorted([*split.train, *split.heldout]) == list(range(100))
    backwards = split_heldout(local_images(range(99, -1, -1)), 0.1)
    assert [99 - index for index in backwards.heldout] == split.heldout.tolist()


def test_copies_of_an_image_fall_on_one_side() -> None:
    split = split_heldout(local_images([*range(50), *range(50)]), 0.2)
    assert {index % 50 for index in split.heldout}.isdisjoint({index % 50 for index in split.train})


@pytest.mark.parametrize(("count", "fraction", "heldout"), [(2, 0.01, 1), (2, 0.5, 1), (3, 0.5, 2), (10, 0.01, 1)])
def test_at_least_one_image_is_held_out_and_never_all(count: int, fraction: float, heldout: int) -> None:
    split = split_heldout(local_images(range(count)), fraction)
    assert len(split.heldout) == heldout
    assert len(split.train) == count - heldout


@pytest.mark.parametrize("values", [[5], [5, 5, 5]])
def test_too_few_images_are_refused(values: list[int]) -> None:
    with pytest.raises(CosiloError, match="too few to train on and hold one out"):
        split_heldout(local_images(values), 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "folder"}, "needs a path"),
        ({"kind": "digits", "path": "/x"}, "takes no path"),
        ({"kind": "folder", "path": "/x", "index_file": "/y"}, "takes no index_file"),
        ({"kind": "folder", "path": "/x", "classes": ["a", "a"]}, "stands twice"),
        ({"kind": "folder", "path": "/x", "classes": ["../a"]}, "name of one sub-folder"),
        ({"kind": "dicom", "path": "/x"}, "Input should be"),
        ({"kind": "digits", "shuffle": True}, "Extra inputs"),
    ],
)
def test_a_wrong_data_table_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(values)
