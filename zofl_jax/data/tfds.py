"""Image classification data and tables of text of TensorFlow Datasets, by name.

Data that is prepared is read without TensorFlow; preparing takes the `[tfds]` extra and a
network, and where they are missing the message comes at once.
"""

import contextlib
import importlib
import importlib.util
import itertools
import logging
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofl_jax.data.sources import DataError, Dataset, make_dataset
from zofl_jax.data.text import PlacedRow, Row

_OWNER_FEATURES = ("client_id", "writer_id", "writer")
_HOSTS = {  # the images that can be prepared, and where TFDS downloads them from
    "mnist": "https://storage.googleapis.com",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "cifar10": "https://www.cs.toronto.edu",
    "emnist": "https://biometrics.nist.gov",
}
_TEXT_HOSTS = {  # the same for text
    "glue": "https://dl.fbaipublicfiles.com",
    "super_glue": "https://dl.fbaipublicfiles.com",
    "squad": "https://rajpurkar.github.io",
    "drop": "https://s3-us-west-2.amazonaws.com",
    "xsum": "https://raw.githubusercontent.com",
}
_MODULES = {  # of TFDS; it knows these data sets only once their module is imported
    "glue": "text.glue",
    "super_glue": "text.super_glue",
    "drop": "text.drop",
    "xsum": "summarization.xsum",
}
_BY_HAND = {"xsum": "xsum-extracts-from-downloads.tar.gz"}  # what TFDS does not download itself
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
    full_name = {"emnist": "emnist/byclass"}.get(name, name)
    with _opened(full_name, data_dir, _HOSTS) as builder:
        train, test = (_read_images(builder, split) for split in ("train", "test"))
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


def rows(
    name: str, data_dir: str | Path | None, splits: Sequence[str], columns: Sequence[str]
) -> dict[str, list[Row]]:
    """Reads columns of a data set prepared by TensorFlow Datasets: text, numbers, lists of them.

    glue, super_glue, squad and drop (with their configs: glue/sst2, squad/v1.1) are prepared
    first if need be, and xsum once its articles are downloaded by hand, which takes TensorFlow
    and a network. Any other data set is read if it is prepared. No TensorFlow is needed to read
    the array_record format, which is the one prepared here.

    Args:
      name: a name, or name/config.
      data_dir: as in `load`.
      splits: TFDS' names, such as "train" and "validation".
      columns: names of features; "answers/text" is the feature text inside answers.

    Returns:
      The rows of each split, which know their index in it. Values are str, int, float, or a list
      of them for a sequence.

    Raises:
      DataError: as in `load`; for splits or columns that the data lack.
    """
    with _opened(name, data_dir, _TEXT_HOSTS) as builder:
        found = _feature_paths(builder.info.features)
        if lacking := [column for column in columns if column not in found]:
            raise DataError(
                f"{builder.data_dir} has no feature {lacking[0]!r}, only {', '.join(found)}"
            )
        read: dict[str, list[Row]] = {}
        for split in splits:
            examples = itertools.chain.from_iterable(_read_examples(builder, split))
            read[split] = [
                _row(example, columns, f"{builder.data_dir}, {split}, example", i)
                for i, example in enumerate(examples)
            ]
        return read


def _row(example: dict[str, Any], columns: Sequence[str], file: str, index: int) -> Row:
    try:
        return PlacedRow({name: _plain(_at(example, name)) for name in columns}, file, index)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} {index} holds text that is not UTF-8: {error}") from None


@contextlib.contextmanager
def _opened(name: str, data_dir: str | Path | None, hosts: Mapping[str, str]) -> Iterator[Any]:
    """Gives TFDS' builder of a data set; what TFDS raises inside comes out as a `DataError`.

    Args:
      name: a name, or name/config.
      data_dir: as in `load`.
      hosts: the data sets that are prepared if need be, and where they come from.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    folder = _prepared_folder(name, root)
    if folder is None and name.split("/")[0] not in hosts:
        raise DataError(
            f"unknown TFDS name {name!r}: use one of {', '.join(hosts)}, or one that is "
            f"prepared in {root}"
        )
    with _quiet():
        folder = folder or _prepare(name, root, hosts[name.split("/")[0]])
        module = _import_tfds()
        try:
            yield module.builder_from_directory(folder)
        except DataError:
            raise
        except Exception as error:  # TFDS, array_record and Pillow raise anything
            raise DataError(f"{folder} cannot be read: {error}") from error


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


def _prepare(name: str, root: Path, host: str) -> Path:
    """Downloads and prepares a data set; returns its folder."""
    base = name.split("/")[0]
    problem = f"TFDS has no prepared {name!r} in {root / name}"
    remedy = f"prepare it elsewhere with file_format='array_record' and copy {root / name} here"
    if not _has_tensorflow():
        raise DataError(
            f"{problem}, and preparing it takes TensorFlow: run pip install 'zofl-jax[tfds]', or "
            f"{remedy}"
        )
    if (by_hand := _BY_HAND.get(base)) and not (root / "downloads/manual" / by_hand).is_file():
        raise DataError(
            f"{problem}, and TFDS does not download its texts itself: put {by_hand} into "
            f"{root / 'downloads/manual'}, as TFDS' page on {name} says, or {remedy}"
        )
    if not _reachable(host):  # TFDS itself would try for minutes
        raise DataError(f"{problem}, and {host} cannot be reached to download it: {remedy}")
    module = _import_tfds(with_tensorflow=True)
    try:
        if base in _MODULES:
            importlib.import_module(f"{module.__name__}.{_MODULES[base]}")
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


def _read_images(builder: Any, split: str) -> dict[str, np.ndarray]:
    """Returns the images, labels and, where there are any, owners of a split."""
    wanted = [k for k in ("image", "label", *_OWNER_FEATURES) if k in builder.info.features]
    if wanted[:2] != ["image", "label"]:
        raise DataError(
            f"{builder.data_dir} must have the features image and label, but has "
            f"{', '.join(builder.info.features)}"
        )
    chunks = [
        {k: np.stack([example[k] for example in examples]) for k in wanted}
        for examples in _read_examples(builder, split)
    ]
    return {k: np.concatenate([chunk[k] for chunk in chunks]) for k in wanted}


def _read_examples(builder: Any, split: str) -> Iterator[Sequence[dict[str, Any]]]:
    """Yields the examples of a split, up to `_CHUNK` at a time."""
    if split not in builder.info.splits:
        raise DataError(
            f"{builder.data_dir} has no split {split!r}, only {', '.join(builder.info.splits)}"
        )
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
        examples = iter(module.as_numpy(builder.as_dataset(split=split)))
        while chunk := list(itertools.islice(examples, _CHUNK)):
            yield chunk
        return
    for start in range(0, len(source), _CHUNK):
        yield source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))


def _feature_paths(features: Any) -> list[str]:
    """Returns the names of features, those inside others as "outer/inner"."""
    paths = []
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a sequence
        nested = _feature_paths(inner) if hasattr(inner, "items") else [""]
        paths += [f"{name}/{path}" if path else name for path in nested]
    return paths


def _at(example: Any, path: str) -> Any:
    for name in path.split("/"):
        example = example[name]
    return example


def _plain(value: Any) -> Any:
    """Returns Python's own text, number or list for what TFDS reads."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


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
