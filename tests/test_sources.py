"""Data of files and of the embedded digits: read exactly, or refused with the reason."""

import gzip
import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from zofl_jax.data import sources

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (12, 4, 5), np.uint8), np.arange(12, dtype=np.uint8) % 3
TEST = RNG.integers(0, 256, (5, 4, 5), np.uint8), np.arange(5, dtype=np.uint8) % 3
MNIST_NAMES = {
    "train-images-idx3-ubyte": TRAIN[0],
    "train-labels-idx1-ubyte": TRAIN[1],
    "t10k-images-idx3-ubyte": TEST[0],
    "t10k-labels-idx1-ubyte": TEST[1],
}


def idx_bytes(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, arrays=MNIST_NAMES, rename=lambda name: name):
    for name, array in arrays.items():
        path = folder / rename(name)
        data = idx_bytes(array)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return folder


def write_npz(tmp_path, **changes):
    arrays = {"x_train": TRAIN[0], "y_train": TRAIN[1], "x_test": TEST[0], "y_test": TEST[1]}
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def check(data, train=TRAIN, test=TEST):
    """Checks a data set against the arrays it was made from, types included."""
    for found, (images, labels) in ((data.train, train), (data.test, test)):
        assert found["image"].dtype == np.uint8 and found["label"].dtype == np.int32
        assert found["image"].flags.c_contiguous
        np.testing.assert_array_equal(found["image"], images.reshape(found["image"].shape))
        np.testing.assert_array_equal(found["label"], labels)
        assert found["image"].shape[:3] == images.shape[:3]
    assert data.max_value == 255.0


def test_digits_are_a_fixed_stratified_split():
    data = sources.digits()
    assert data.train["image"].shape == (1442, 8, 8, 1)
    assert data.test["image"].shape == (355, 8, 8, 1)
    assert data.train["image"].dtype == np.uint8 and data.train["label"].dtype == np.int32
    assert data.max_value == 16.0 == data.train["image"].max()
    assert data.num_classes == 10 and data.client_ids is None
    counts = np.bincount(data.train["label"]) + np.bincount(data.test["label"])
    np.testing.assert_array_equal(np.bincount(data.test["label"]), counts // 5)
    assert data.train["image"].sum(dtype=int) == 450566
    assert data.test["image"].sum(dtype=int) == 111152
    assert data.test["label"][:10].tolist() == [5, 0, 9, 8, 7, 1, 2, 6, 3, 4]


def test_digits_are_kept_and_damage_is_made_good(tmp_path, monkeypatch):
    expected = sources.digits()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    same = [sources.digits()]
    (file,) = (tmp_path / "zofl_jax").iterdir()
    whole = file.read_bytes()
    for data in (whole[:-20], b"", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        file.write_bytes(data)
        same.append(sources.digits())
        assert file.read_bytes() == whole
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # none is needed any more
    same.append(sources.digits())
    for found in same:
        for split in ("train", "test"):
            for name, array in getattr(found, split).items():
                np.testing.assert_array_equal(array, getattr(expected, split)[name], strict=True)


def test_digits_need_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(sources.digits().train["label"]) == 1442


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name + ".gz",
        lambda name: name.replace("-idx", ".idx"),
        lambda name: name.replace("t10k", "test") + ".gz",
    ],
)
def test_idx_finds_the_files_by_any_of_their_names(tmp_path, rename):
    data = sources.idx(write_idx(tmp_path, rename=rename))
    check(data)
    assert data.num_classes == 3 and data.name == tmp_path.name and data.client_ids is None


def emnist_name(config):
    return lambda name: f"emnist-{config}-{name.replace('t10k', 'test')}.gz"


def test_emnist_images_are_transposed_back(tmp_path):
    transposed = {
        name: array.swapaxes(1, 2) if array.ndim == 3 else array
        for name, array in MNIST_NAMES.items()
    }
    check(sources.idx(write_idx(tmp_path, transposed, emnist_name("letters"))))


def test_one_of_several_emnist_configs_is_read_by_its_prefix(tmp_path):
    write_idx(tmp_path, rename=emnist_name("letters"))
    write_idx(tmp_path, rename=emnist_name("digits"))
    data = sources.idx(tmp_path / "emnist-digits")
    assert data.name == "emnist-digits" and data.train["image"].shape == (12, 5, 4, 1)
    with pytest.raises(
        sources.DataError, match=r"several data sets: give one of .*emnist-digits, "
    ):
        sources.idx(tmp_path)
    with pytest.raises(sources.DataError, match=r"no folder .*emnist-byclass"):
        sources.idx(tmp_path / "emnist-byclass")
    write_idx(tmp_path)  # plain names beside them go first
    check(sources.idx(tmp_path))


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", MNIST_NAMES)
def test_a_missing_idx_file_is_named(tmp_path, name, ending):
    write_idx(tmp_path, rename=lambda name: name + ending)
    (tmp_path / (name + ending)).unlink()
    with pytest.raises(sources.DataError, match=f"looked for {name}, {name}.gz, ") as caught:
        sources.idx(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_idx_folder_is_named(tmp_path):
    with pytest.raises(sources.DataError, match=r"there is no folder .*nothing"):
        sources.idx(tmp_path / "nothing" / "here")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kept", [0, 3, 10, 200])
def test_a_truncated_idx_file_says_how_many_bytes_there_are(tmp_path, kept, ending):
    name = "train-images-idx3-ubyte"
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    data = idx_bytes(TRAIN[0])[:kept]
    (tmp_path / (name + ending)).write_bytes(gzip.compress(data) if ending else data)
    expected = 256 if kept >= 16 else 16
    message = f"{name}{ending} is truncated: {expected} bytes expected.* found {kept}$"
    with pytest.raises(sources.DataError, match=message):
        sources.idx(tmp_path)


def test_a_cut_gzip_file_is_truncated_too(tmp_path):
    write_idx(tmp_path, rename=lambda name: name + ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(sources.DataError, match=r"256 bytes expected for the shape \[12, 4, 5\]"):
        sources.idx(tmp_path)
    path.write_bytes(b"not gzip")
    with pytest.raises(sources.DataError, match=r"images-idx3-ubyte\.gz cannot be read"):
        sources.idx(tmp_path)


def test_an_idx_file_with_bytes_to_spare_is_refused(tmp_path):
    path = write_idx(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(sources.DataError, match=r"is too long: 13 bytes expected .* found 14"):
        sources.idx(tmp_path)


def test_a_wrong_magic_number_is_given_in_hex(tmp_path):
    path = write_idx(tmp_path) / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(TRAIN[0]))
    with pytest.raises(sources.DataError, match="0x00000803 instead of 0x00000801"):
        sources.idx(tmp_path)


def test_counts_of_images_and_labels_must_agree(tmp_path):
    write_idx(tmp_path, {**MNIST_NAMES, "train-labels-idx1-ubyte": TRAIN[1][:-2]})
    with pytest.raises(sources.DataError, match="train: there are 12 images but 10 labels"):
        sources.idx(tmp_path)


def test_a_packed_file_beside_another_must_hold_the_same(tmp_path):
    write_idx(tmp_path)
    write_idx(tmp_path, rename=lambda name: name + ".gz")
    check(sources.idx(tmp_path))
    write_idx(
        tmp_path,
        {"t10k-labels-idx1-ubyte": TEST[1][::-1]},
        lambda name: name.replace("t10k", "test").replace("-idx", ".idx") + ".gz",
    )
    with pytest.raises(
        sources.DataError,
        match=r"t10k-labels-idx1-ubyte and .*test-labels\.idx1-ubyte\.gz differ: leave one",
    ):
        sources.idx(tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist isn't installed")
def test_fashion_mnist():
    data = sources.idx(FASHION)
    assert data.train["image"].shape == (60000, 28, 28, 1)
    assert data.test["image"].shape == (10000, 28, 28, 1)
    assert data.name == "fashion-mnist" and data.num_classes == 10
    assert np.all(np.bincount(data.train["label"]) == 6000)


def test_npz_reads_the_arrays_of_keras(tmp_path):
    data = sources.npz(write_npz(tmp_path))
    check(data)
    assert data.num_classes == 3 and data.name == "data" and data.client_ids is None


def test_npz_takes_colours_columns_and_wide_integers(tmp_path):
    train = RNG.integers(0, 256, (12, 4, 5, 3)), TRAIN[1]
    test = RNG.integers(0, 256, (5, 4, 5, 3)), TEST[1]
    path = write_npz(
        tmp_path,
        x_train=train[0],
        x_test=test[0],
        y_train=train[1][:, None].astype(np.int64),
        y_test=test[1][:, None],
    )
    check(sources.npz(path), train, test)


@pytest.mark.parametrize("ids", [np.arange(12) * 10**10 % 7, np.array([*"bbcaabbcaabb"])])
def test_npz_numbers_the_owners(tmp_path, ids):
    owners = sources.npz(write_npz(tmp_path, client_ids=ids)).client_ids
    assert owners.dtype == np.int32
    np.testing.assert_array_equal(np.unique(ids)[owners], ids)
    np.testing.assert_array_equal(np.unique(owners), np.arange(len(np.unique(ids))))


@pytest.mark.parametrize(
    "ids",
    [
        np.array([3, np.nan, 7, np.nan] * 3),
        np.array(["b", "", "c", "NaN"] * 3),
        np.array([b"b", b" ", b" c", b"null"] * 3),
    ],
)
def test_an_owner_that_is_missing_is_none(tmp_path, ids):
    owners = sources.npz(write_npz(tmp_path, client_ids=ids)).client_ids
    assert owners.tolist() == [0, -1, 1, -1] * 3


def test_npz_reads_any_order_of_memory_and_bytes(tmp_path):
    check(
        sources.npz(
            write_npz(
                tmp_path,
                x_train=np.asfortranarray(TRAIN[0].astype(">u2")),
                y_train=TRAIN[1].astype(">i4"),
                x_test=TEST[0].astype(">f8") / 255,
            )
        )
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_turns_scaled_bytes_back(tmp_path, dtype):
    every_byte = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    scaled = every_byte.astype(dtype) / dtype(255)
    data = sources.npz(
        write_npz(tmp_path, x_train=scaled, y_train=TRAIN[1][:4], x_test=scaled, y_test=TEST[1][:4])
    )
    np.testing.assert_array_equal(data.train["image"][..., 0], every_byte)


def with_value(value, dtype=np.float32):
    images = np.zeros((12, 4, 5), dtype)
    images[3, 2, 1] = value
    return images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks the arrays y_test; it has x_train, y_train, x_test"),
        ({"x_train": with_value(0.5)}, "train: float images must be bytes divided by 255"),
        ({"x_train": with_value(np.nan)}, "train: float images must be bytes divided by 255"),
        ({"x_train": with_value(1e300, np.float64)}, "train: float images must be bytes"),
        ({"x_train": with_value(255)}, "train: float images must be bytes divided by 255"),
        ({"x_train": with_value(-3, np.int64)}, r"in \[0, 255\], but lie in \[-3, 0\]"),
        ({"x_train": with_value(256, np.int16)}, r"in \[0, 255\], but lie in \[0, 256\]"),
        ({"x_train": with_value(True, bool)}, "images must be bytes, got bool"),
        ({"x_train": TRAIN[0][0]}, r"got \(4, 5\) and \(12,\)"),
        ({"x_train": TRAIN[0][:0], "y_train": TRAIN[1][:0]}, "train: there are no images"),
        ({"x_test": TEST[0][:0], "y_test": TEST[1][:0]}, "test: there are no images"),
        ({"x_test": TEST[0][:, :3]}, r"images are \(4, 5, 1\), test images are \(3, 5, 1\)"),
        ({"x_train": with_value(1, "m8[s]")}, r"images must be bytes, got timedelta64\[s\]"),
        ({"y_train": TRAIN[1].astype("m8[s]")}, r"labels must be integers, got timedelta64\[s\]"),
        ({"y_train": TRAIN[1] - 1.0}, "labels must be integers, got float64"),
        ({"y_train": TRAIN[1].astype(int) - 1}, r"from 0, but lie in \[-1, 1\]"),
        ({"y_test": np.eye(5, 3, dtype=int)}, r"labels \[n\], got .* and \(5, 3\)"),
        ({"y_test": TEST[1][:3]}, "test: there are 5 images but 3 labels"),
        (
            {"x_train": np.zeros((12, 3, 5, 6), int), "x_test": np.zeros((5, 3, 5, 6), int)},
            r"the shape \(3, 5, 6\) have their channels first, .*moveaxis\(images, 1, -1\)",
        ),
        (
            {"x_train": (TRAIN[0] > 9).astype(int), "x_test": TEST[0]},
            r"pixels go to 1 in the training images and to 2\d\d in the test images: give both",
        ),
        ({"client_ids": np.arange(12) + 0.5}, r"client_ids that are floats must be whole"),
        ({"client_ids": np.arange(12) * 2.0**54}, r"client_ids that are floats must be whole"),
        ({"client_ids": np.arange(12) > 5}, r"client_ids must be integers or text, but are bool"),
        ({"client_ids": np.array([b"\xff"] * 12)}, r"client_ids must be UTF-8"),
        ({"client_ids": np.arange(5)}, r"each of the 12 training examples, .* is \(5,\)"),
    ],
)
def test_npz_refuses_malformed_arrays(tmp_path, changes, message):
    with pytest.raises(sources.DataError, match=message):
        sources.npz(write_npz(tmp_path, **changes))


def test_npz_refuses_files_that_are_none(tmp_path):
    with pytest.raises(sources.DataError, match=r"no file .*data.npz: give the path"):
        sources.npz(tmp_path / "data.npz")
    path = write_npz(tmp_path)
    whole = path.read_bytes()
    npy = io.BytesIO()
    np.save(npy, TRAIN[0])
    pickled = io.BytesIO()
    np.savez(pickled, x_train=np.array([{}]))
    for content in (b"", b"text", whole[: len(whole) // 2], npy.getvalue(), pickled.getvalue()):
        path.write_bytes(content)
        with pytest.raises(sources.DataError, match=r"data.npz is not a readable .npz file: "):
            sources.npz(path)


def test_an_archive_with_two_arrays_of_a_name_is_refused(tmp_path):
    path = write_npz(tmp_path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x_train.npy", archive.read("x_train.npy"))
    with pytest.raises(sources.DataError, match="has several arrays called x_train"):
        sources.npz(path)


def test_heavy_packages_are_imported_only_when_needed():
    code = (
        "import sys, zofl_jax.data.sources, zofl_jax.data.tfds; "
        "print(*{'tensorflow_datasets', 'array_record', 'sklearn'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
