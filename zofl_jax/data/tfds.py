"""Image classification data of TensorFlow Datasets, by name.

Data that is prepared is read without TensorFlow; preparing takes the `[tfds]` extra and a
network, and where they are missing the message comes at once.
"""

import contextlib
import importlib.util
import logging
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zofl_jax.data.sources import DataError, Dataset, make_dataset

_OWNER_FEATURES = ("client_id", "writer_id", "writer")
_HOSTS = {  # the data sets that can be prepared, and where TFDS downloads them from
    "mnist": "https://storage.googleapis.com",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "cifar10": "https://www.cs.toronto.edu",
    "emnist": "https://biometrics.nist.gov",
}
_NETWORK_TIMEOUT = 10  # seconds
_CHUNK = 4096  # examples read at a time


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Reads an image data set prepared by TensorFlow Datasets.

    mnist, fashion_mnist, cifar10 and emnist (emnist/letters, ...; byclass when no config is
    named) are prepared first if need be, which takes TensorFlow and a network. Any other data
    set is read if it is prepared and has the features `image` and `label`. No TensorFlow is
    needed to read the array_record format, which is the one prepared here. The first feature
    found of `client_id`, `writer_id` and `writer` says who owns an example. EMNIST's images are
    transposed back.

    Args:
      name: a name, or name/config.
      data_dir: where data sets are prepared: by default TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      DataError: at once for an unknown name, for data that are neither prepared nor can be, and
        for missing packages; later for data that cannot be read.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    full_name = {"emnist": "emnist/byclass"}.get(name, name)
    folder = _prepared_folder(full_name, root)
    if folder is None and full_name.split("/")[0] not in _HOSTS:
        raise DataError(
            f"unknown TFDS name {name!r}: use one of {', '.join(_HOSTS)}, or one that is "
            f"prepared in {root}"
        )
    with _quiet():
        folder = folder or _prepare(full_name, root)
        module = _import_tfds()
        try:
            builder = module.builder_from_directory(folder)
            train, test = (_read_split(builder, split, folder) for split in ("train", "test"))
        except DataError:
            raise
        except Exception as error:  # TFDS, array_record and Pillow raise anything
            raise DataError(f"{folder} cannot be read: {error}") from error
    if full_name.startswith("emnist/"):
        for part in (train, test):
            part["image"] = part["image"].swapaxes(1, 2)
    return make_dataset(
        name,
        (train["image"], train["label"]),
        (test["image"], test["label"]),
        client_ids=next((train[key] for key in _OWNER_FEATURES if key in train), None),
        num_classes=getattr(builder.info.features["label"], "num_classes", None),
    )


def _prepared_folder(name: str, root: Path) -> Path | None:
    """Returns root/name/VERSION of the newest prepared version, None if there is none."""
    if not re.fullmatch(r"\w+(/[\w.-]+)?", name):
        return None
    folders = [file.parent for file in (root / name).glob("*/dataset_info.json")]
    versions = {
        tuple(map(int, folder.name.split("."))): folder
        for folder in folders
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)
    }
    return versions[max(versions)] if versions else None


def _prepare(name: str, root: Path) -> Path:
    """Downloads and prepares a data set; returns its folder."""
    problem = f"TFDS has no prepared {name!r} in {root / name}"
    remedy = f"prepare it elsewhere with file_format='array_record' and copy {root / name} here"
    if not _has_tensorflow():
        raise DataError(
            f"{problem}, and preparing it takes TensorFlow: run pip install 'zofl-jax[tfds]', or "
            f"{remedy}"
        )
    host = _HOSTS[name.split("/")[0]]
    if not _reachable(host):  # TFDS itself would try for minutes
        raise DataError(f"{problem}, and {host} cannot be reached to download it: {remedy}")
    module = _import_tfds(with_tensorflow=True)
    try:
        builder = module.builder(name, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # TFDS and TensorFlow raise anything
        raise DataError(f"{problem}, and preparing it failed: {error}") from error
    return Path(builder.data_dir)


def _reachable(url: str) -> bool:
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_NETWORK_TIMEOUT).close()
    except urllib.error.HTTPError as error:  # an answer, if not a friendly one
        error.close()
    except OSError:
        return False
    return True


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _import_tfds(with_tensorflow: bool = False) -> Any:
    try:
        import array_record  # noqa: F401
        import importlib_resources  # noqa: F401  # TFDS needs it and doesn't declare it
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"reading TFDS data takes {error.name}, which is missing: run "
            "pip install tensorflow-datasets array_record importlib_resources"
        ) from error
    if with_tensorflow:
        import tensorflow

        with contextlib.suppress(RuntimeError):  # too late if it runs already
            tensorflow.config.set_visible_devices([], "GPU")  # it would take all their memory
    return tensorflow_datasets


def _read_split(builder: Any, split: str, folder: Path) -> dict[str, np.ndarray]:
    """Returns the images, labels and, where there are any, owners of a split."""
    if split not in builder.info.splits:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(builder.info.splits)}")
    wanted = [k for k in ("image", "label", *_OWNER_FEATURES) if k in builder.info.features]
    if wanted[:2] != ["image", "label"]:
        raise DataError(
            f"{folder} must have the features image and label, but has "
            f"{', '.join(builder.info.features)}"
        )
    chunks = list(_read_chunks(builder, split))
    return {k: np.concatenate([chunk[k] for chunk in chunks]) for k in wanted}


def _read_chunks(builder: Any, split: str) -> Iterator[dict[str, np.ndarray]]:
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError:  # another file format
        if not _has_tensorflow():
            raise DataError(
                f"{builder.data_dir} is in the {builder.info.file_format.value} format, which "
                "only TensorFlow reads: run pip install 'zofl-jax[tfds]', or prepare it again "
                "with file_format='array_record'"
            ) from None
        module = _import_tfds(with_tensorflow=True)
        yield from module.as_numpy(builder.as_dataset(split=split, batch_size=_CHUNK))
        return
    for start in range(0, len(source), _CHUNK):
        rows = source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
        yield {k: np.stack([row[k] for row in rows]) for k in rows[0]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the warnings of TFDS and what it imports from the console, whatever their channel."""
    logger = logging.getLogger("absl")

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(errors_only)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(errors_only)
