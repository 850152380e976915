"""Image classification data: the embedded digits, IDX files and NumPy archives.

Every source returns the same `Dataset` of bytes in host memory, or raises `DataError` with
the file and what is wrong with it. `tfds.py` is one more.
"""

import contextlib
import gzip
import importlib.metadata
import io
import math
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zofl_jax.data import cache

Examples = tuple[np.ndarray, np.ndarray]  # images [n, H, W] or [n, H, W, C], labels [n]

# Of the texts that pandas reads as no value.
_MISSING = frozenset(("", "nan", "NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>"))

_CHANNELS = (1, 3, 4)  # grey, colours, and these with transparency

_UBYTE = 0x08  # the IDX code of unsigned bytes


class DataError(ValueError):
    """Data are missing, malformed or contradict each other."""


class Dataset(NamedTuple):
    """A data set with its central test set, in host memory.

    Attributes:
      train: {"image": uint8 [n, H, W, C], "label": int32 [n]}, n >= 1.
      test: the same for the test set, with the same H, W and C.
      num_classes: labels are in [0, num_classes).
      max_value: the largest value a pixel can have: 255, or 16 for the digits.
      client_ids: the natural owner of each training example, int32 [n], numbered from 0 in the
        order of the source's ids, -1 where it is missing; None where the source knows no owners.
      name: for people.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int
    max_value: float
    client_ids: np.ndarray | None
    name: str


def digits() -> Dataset:
    """Returns scikit-learn's handwritten digits: 8x8 pixels of 0..16, 1,797 images, 10 classes.

    No random numbers: the 5th, 10th, ... image of each class is a test image, which makes
    1,442 for training and 355 for testing. They are kept in the user's cache folder, since
    scikit-learn takes a second to import.

    Ref: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI, 1998.

    >>> digits().train["image"].shape
    (1442, 8, 8, 1)
    """
    images, labels = _embedded_digits()
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    train, test = ((images[where], labels[where]) for where in (~is_test, is_test))
    return make_dataset("digits", train, test, max_value=16)


def idx(folder: str | Path) -> Dataset:
    """Reads MNIST, Fashion-MNIST, EMNIST or their like from IDX files, plain or gzipped.

    Looks for train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
    t10k-labels-idx1-ubyte; each may end in .gz, have a dot before `idx` and `test` for `t10k`.
    EMNIST's names begin with emnist-CONFIG-; its images are stored transposed and are transposed
    back. Where a folder has several configs, one is read as FOLDER/emnist-CONFIG.

    Args:
      folder: the folder, or folder/prefix for the files whose names begin with "prefix-".

    Raises:
      DataError: for missing, truncated, corrupt or contradictory files.
    """
    path = Path(folder).expanduser()
    parent, prefix = _idx_prefix(path)

    def read(split: str) -> Examples:
        images = _read_one_idx(_idx_files(parent, prefix, split, "images-idx3"), 3)
        labels = _read_one_idx(_idx_files(parent, prefix, split, "labels-idx1"), 1)
        return images.swapaxes(1, 2) if prefix.startswith("emnist-") else images, labels

    return make_dataset(path.resolve().name, read("train"), read("test"))


def npz(path: str | Path) -> Dataset:
    """Reads a NumPy archive with the arrays of Keras' mnist.npz, and owners if it has them.

    x_train and x_test are images [n, H, W] or [n, H, W, C]: bytes, or other integers of
    [0, 255]. Floats are taken when they are bytes divided by 255 and are turned back into those;
    any other floats are refused, for rounding them to bytes would lose what they say. y_train
    and y_test are integers >= 0, [n] or [n, 1]; client_ids, where present, are integers or
    strings [n], the owner of each training example.

    Raises:
      DataError: for a missing or malformed file, missing arrays or contradictory ones.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}: give the path of an .npz file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            repeated = {name for name in archive.files if archive.files.count(name) > 1}
            arrays = {name: archive[name] for name in archive.files}
    # np.load returns the array itself, which is no context manager, for an .npy file.
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error
    if repeated:
        raise DataError(f"{path} has several arrays called {min(repeated)}: keep one of them")
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks the arrays {', '.join(missing)}; it has {', '.join(arrays) or 'none'}"
        )
    train = arrays["x_train"], arrays["y_train"]
    test = arrays["x_test"], arrays["y_test"]
    return make_dataset(path.stem, train, test, client_ids=arrays.get("client_ids"))


def _embedded_digits() -> Examples:
    """Returns the digits from the user's cache folder, or else from scikit-learn."""
    file = cache.digits(importlib.metadata.version("scikit-learn"))
    # Damage is noticed by the archive's own checksums.
    damaged = EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error
    with contextlib.suppress(OSError, *damaged), np.load(io.BytesIO(file.read_bytes())) as kept:
        return kept["images"], kept["labels"]
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target
    with contextlib.suppress(OSError):  # a folder that can't be written keeps nothing
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            np.savez_compressed(Path(folder) / file.name, images=images, labels=labels)
            (Path(folder) / file.name).replace(file)
    return images, labels


def make_dataset(
    name: str,
    train: Examples,
    test: Examples,
    max_value: int = 255,
    client_ids: np.ndarray | None = None,
    num_classes: int | None = None,
) -> Dataset:
    """Returns a `Dataset` of the arrays of a source, after checking what every source promises.

    Args:
      name: for people, and for the messages of errors.
      train: (images, labels). Images are [n, H, W] or [n, H, W, C], integers of [0, max_value]
        or floats that are such integers divided by max_value; labels are integers >= 0, [n] or
        [n, 1].
      test: the same for the test set.
      max_value: the largest value a pixel can have.
      client_ids: the owner of each training example, [n]: integers, also as floats, or text. NaN
        and blank text, or a word for them, say that it is missing.
      num_classes: the largest label + 1 unless given.

    Raises:
      DataError: for arrays that are malformed or contradict each other.

    >>> images, labels = np.zeros((2, 4, 4), np.uint8), np.array([0, 2])
    >>> make_dataset("zeros", (images, labels), (images, labels)).num_classes
    3
    """
    checked = {
        split: _examples(f"{name}, {split}", *arrays, max_value)
        for split, arrays in (("train", train), ("test", test))
    }
    shapes = [part["image"].shape[1:] for part in checked.values()]
    if shapes[0] != shapes[1]:
        raise DataError(f"{name}: training images are {shapes[0]}, test images are {shapes[1]}")
    largest = [int(part["image"].max()) for part in checked.values()]
    if min(largest) <= 1 < max(largest):
        raise DataError(
            f"{name}: pixels go to {largest[0]} in the training images and to {largest[1]} in the "
            "test images: give both in one scale"
        )
    found = 1 + max(int(part["label"].max()) for part in checked.values())
    if num_classes is not None and found > num_classes:
        raise DataError(f"{name}: there is a label {found - 1}, but only {num_classes} classes")
    if client_ids is not None:
        if client_ids.shape != train[1].shape[:1]:
            raise DataError(
                f"{name}: client_ids must have one entry for each of the {len(train[1])} "
                f"training examples, but their shape is {client_ids.shape}"
            )
        client_ids = _numbered(name, client_ids)
    return Dataset(
        **checked,
        num_classes=num_classes or found,
        max_value=float(max_value),
        client_ids=client_ids,
        name=name,
    )


def owner_name(text: str) -> str | None:
    """Returns a name as owners are compared by, None if it is blank or a word for no value.

    Whitespace around it doesn't count, nor whether an accent is a character of its own.

    >>> owner_name(" Ann "), owner_name("e\u0301") == "\u00e9", owner_name("NaN")
    ('Ann', True, None)
    """
    name = unicodedata.normalize("NFC", text.strip())
    return None if name in _MISSING else name


def _numbered(name: str, client_ids: np.ndarray) -> np.ndarray:
    """Returns owners numbered in their order, int32 [n], -1 where one is missing."""
    kind = client_ids.dtype.kind
    if kind == "f":
        missing = np.isnan(client_ids)
        known = client_ids[~missing]
        if not (abs(known) <= 2**53).all() or (known != np.rint(known)).any():
            raise DataError(f"{name}: client_ids that are floats must be whole and up to 2**53")
    elif kind in "iu":
        missing, known = np.zeros(len(client_ids), bool), client_ids
    elif kind in "SU" or (kind == "O" and all(isinstance(x, str | bytes) for x in client_ids)):
        try:
            texts = [x.decode() if isinstance(x, bytes) else str(x) for x in client_ids.tolist()]
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: client_ids must be UTF-8: {error}") from None
        names = [owner_name(x) for x in texts]
        missing = np.array([x is None for x in names], bool)
        known = np.array([x for x in names if x is not None])
    else:
        raise DataError(f"{name}: client_ids must be integers or text, but are {client_ids.dtype}")
    numbers = np.full(len(client_ids), -1, np.int32)
    numbers[~missing] = np.unique(known, return_inverse=True)[1]
    return numbers


def _examples(
    where: str, images: np.ndarray, labels: np.ndarray, max_value: int
) -> dict[str, np.ndarray]:
    if images.ndim == 3:
        images = images[..., None]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.ndim != 4 or labels.ndim != 1:
        raise DataError(
            f"{where}: images must be [n, H, W] or [n, H, W, C] and labels [n], got "
            f"{images.shape} and {labels.shape}"
        )
    if len(images) != len(labels):
        raise DataError(f"{where}: there are {len(images)} images but {len(labels)} labels")
    if images.size == 0:
        raise DataError(f"{where}: there are no images or no pixels, the shape is {images.shape}")
    if labels.dtype.kind not in "iu":  # to NumPy, differences of dates are integers too
        raise DataError(f"{where}: labels must be integers, got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= 2**31 - 1:
        raise DataError(
            f"{where}: labels must be class numbers from 0, but lie in "
            f"[{labels.min()}, {labels.max()}]"
        )
    channels, last = images.shape[1], images.shape[3]
    if channels in _CHANNELS and last not in (*_CHANNELS, 2):
        raise DataError(
            f"{where}: images of the shape {images.shape[1:]} have their channels first, but "
            "[n, H, W, C] is needed: move the axis with np.moveaxis(images, 1, -1)"
        )
    images = _to_bytes(where, images, max_value)
    return {"image": np.ascontiguousarray(images), "label": labels.astype(np.int32)}


def _to_bytes(where: str, images: np.ndarray, max_value: int) -> np.ndarray:
    if np.issubdtype(images.dtype, np.floating):
        with np.errstate(over="ignore"):  # an infinity is refused below
            scaled = images.astype(np.float32, copy=False) * max_value
        images = np.rint(scaled)
        # Half precision moves a byte / 255 by up to 0.07 / 255. NaN fails here as well.
        if not (
            images.min() >= 0 and images.max() <= max_value and (abs(scaled - images) < 0.1).all()
        ):
            raise DataError(
                f"{where}: float images must be bytes divided by {max_value}: store the bytes"
            )
    elif images.dtype.kind not in "iu":
        raise DataError(f"{where}: images must be bytes, got {images.dtype}")
    elif images.min() < 0 or images.max() > max_value:
        raise DataError(
            f"{where}: pixels must be in [0, {max_value}], but lie in "
            f"[{images.min()}, {images.max()}]"
        )
    return images.astype(np.uint8, copy=False)


def _idx_prefix(path: Path) -> tuple[Path, str]:
    """Returns the folder that holds the IDX files, and how their names begin."""
    if not path.is_dir():
        prefix = f"{path.name}-"
        if path.parent.is_dir() and any(p.name.startswith(prefix) for p in path.parent.iterdir()):
            return path.parent, prefix
        raise DataError(f"there is no folder {path}: give the folder of the IDX files")
    found = path.glob("*train-images[-.]idx3-ubyte*")
    prefixes = sorted({file.name.split("train-images")[0] for file in found})
    if len(prefixes) > 1 and "" not in prefixes:
        names = ", ".join(str(path / prefix.rstrip("-")) for prefix in prefixes)
        raise DataError(f"{path} holds several data sets: give one of {names}")
    return path, next(iter(prefixes), "")


def _idx_files(folder: Path, prefix: str, split: str, kind: str) -> list[Path]:
    names = [
        f"{prefix}{stem}-{spelling}-ubyte{ending}"
        for stem in {"train": ("train",), "test": ("t10k", "test")}[split]
        for spelling in (kind, kind.replace("-", "."))
        for ending in ("", ".gz")
    ]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise DataError(f"{folder} has no {split} {kind[:6]}: looked for {', '.join(names)}")
    return found


def _read_one_idx(paths: list[Path], ndim: int) -> np.ndarray:
    """Returns what is in all of the files: a packed one often stands beside what came out of it."""
    first, *rest = (_read_idx(path, ndim) for path in paths)
    for path, other in zip(paths[1:], rest, strict=True):
        if not np.array_equal(first, other):
            raise DataError(f"{paths[0]} and {path} differ: leave one of them there")
    return first


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Returns the array in an IDX file of unsigned bytes with `ndim` axes.

    The format: a big-endian magic number (0, 0, the type of the elements, the number of axes),
    the length of each axis as uint32, the elements.
    """
    data = _read_bytes(path)
    magic, header = _UBYTE << 8 | ndim, 4 + 4 * ndim
    if len(data) >= 4 and int.from_bytes(data[:4], "big") != magic:
        raise DataError(
            f"{path} has the magic number 0x{data[:4].hex()} instead of 0x{magic:08x}: it is not "
            f"an IDX file of unsigned bytes with {ndim} axes"
        )
    if len(data) < header:
        raise DataError(f"{path} is truncated: {header} bytes expected, found {len(data)}")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(data) != expected:
        problem = "is truncated" if len(data) < expected else "is too long"
        raise DataError(
            f"{path} {problem}: {expected} bytes expected for the shape {shape}, found {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    """Returns the bytes of a file, unpacked if it is gzipped; of a cut one, those there are."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        parts = []
        with gzip.open(path) as file, contextlib.suppress(EOFError):
            while part := file.read1(1 << 20):
                parts.append(part)
        return b"".join(parts)
    except (OSError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{path} cannot be read: {error}") from error
