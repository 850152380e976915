"""Data sets of TFDS: prepared ones are read without TensorFlow, others refused at once."""

import io
import sys
import time
import warnings

import numpy as np
import pytest

from zofl_jax.data import tfds
from zofl_jax.data.sources import DataError

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (12, 4, 5), np.uint8), np.arange(12, dtype=np.uint8) % 3
TEST = RNG.integers(0, 256, (5, 4, 5), np.uint8), np.arange(5, dtype=np.uint8) % 3


def png(image):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    file.seek(0)
    return file


def prepare(data_dir, name="mnist", *, config=None, num_classes=3, owner=None, transposed=False):
    """Prepares TRAIN and TEST with TFDS; `owner` is the name of one more feature."""
    datasets = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Images(datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = datasets.core.Version("3.0.1")
        BUILDER_CONFIGS = [datasets.core.BuilderConfig(name=config)] if config else []
        pkg_dir_path = None  # it is not a package with a README and checksums

        def _info(self):
            height, width = TRAIN[0].shape[1:]
            columns = {
                "image": datasets.features.Image(
                    shape=(width, height, 1) if transposed else (height, width, 1)
                ),
                "label": datasets.features.ClassLabel(num_classes=num_classes),
            }
            if owner:
                columns[owner] = datasets.features.Scalar(np.int64)
            return datasets.core.DatasetInfo(
                builder=self, features=datasets.features.FeaturesDict(columns)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

        def _generate_examples(self, arrays):
            for i, (image, label) in enumerate(zip(*arrays, strict=True)):
                extra = {owner: 7 * (i % 4)} if owner else {}
                yield i, {"image": png(image.T if transposed else image), "label": label, **extra}

    Images.name = name
    Images(data_dir=data_dir, file_format="array_record").download_and_prepare()


def sort_rows(part):
    """TFDS shuffles when it prepares: sorts examples by their pixels."""
    order = np.lexsort(part[0].reshape(len(part[0]), -1).T)
    return tuple(column[order] for column in part)


def check_shuffled(data):
    for found, made in ((data.train, TRAIN), (data.test, TEST)):
        images, labels = sort_rows((found["image"], found["label"]))
        np.testing.assert_array_equal(images[..., 0], sort_rows(made)[0])
        np.testing.assert_array_equal(labels, sort_rows(made)[1])


def test_tfds_reads_prepared_data_without_tensorflow(tmp_path, monkeypatch, capfd, recwarn):
    prepare(tmp_path)
    capfd.readouterr()
    monkeypatch.setattr(tfds, "_CHUNK", 5)  # so that 12 examples are three chunks
    loaded = "tensorflow" in sys.modules  # by another test's imports
    warnings.simplefilter("always")
    data = tfds.load("mnist", tmp_path)
    check_shuffled(data)
    assert data.num_classes == 3 and data.name == "mnist" and data.client_ids is None
    assert ("tensorflow" in sys.modules) == loaded
    assert capfd.readouterr() == ("", "") and not recwarn.list
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    np.testing.assert_array_equal(tfds.load("mnist").train["image"], data.train["image"])


def test_tfds_transposes_emnist_back(tmp_path):
    prepare(tmp_path, "emnist", config="byclass", num_classes=62, transposed=True)
    for name in ("emnist", "emnist/byclass"):
        data = tfds.load(name, tmp_path)
        check_shuffled(data)
        assert data.num_classes == 62


def test_tfds_reads_any_prepared_images_with_their_owners(tmp_path):
    prepare(tmp_path, "my_letters", owner="writer")
    data = tfds.load("my_letters", tmp_path)
    check_shuffled(data)
    _, owners = sort_rows((data.train["image"], data.client_ids))
    np.testing.assert_array_equal(owners, sort_rows((TRAIN[0], np.arange(12) % 4))[1])
    assert data.client_ids.dtype == np.int32


def test_tfds_takes_the_newest_version(tmp_path):
    for version in ("9.0.0", "10.0.0", "incomplete.ABC_11.0.0"):
        folder = tmp_path / "mnist" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    assert tfds._prepared_folder("mnist", tmp_path).name == "10.0.0"


def test_tfds_says_what_is_wrong_with_prepared_data(tmp_path):
    prepare(tmp_path)
    folder = tmp_path / "mnist" / "3.0.1"
    features = (folder / "features.json").read_text()
    (folder / "features.json").write_text(features.replace('"label"', '"digit"'))
    with pytest.raises(DataError, match=r"features image and label, but has .*digit"):
        tfds.load("mnist", tmp_path)
    (folder / "features.json").write_text(features)
    (folder / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"3\.0\.1 cannot be read: "):
        tfds.load("mnist", tmp_path)
    (folder / "features.json").write_text(features)
    (record,) = folder.glob("*-test.array_record*")
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"3\.0\.1 cannot be read: "):
        tfds.load("mnist", tmp_path)


def test_tfds_says_when_only_tensorflow_reads_the_format(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: False)
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="in the tfrecord format, which only TensorFlow"):
        tfds.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnits", "mnits/letters", "../mnist", "mnist:3.0.1", ""])
def test_an_unknown_tfds_name_is_refused(tmp_path, name):
    message = f"unknown TFDS name '{name}': use one of mnist, fashion_mnist, cifar10, emnist, or"
    with pytest.raises(DataError, match=message):
        tfds.load(name, tmp_path)


@pytest.mark.parametrize("name", ["mnist", "emnist/letters"])
def test_tfds_without_data_or_tensorflow_says_so_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: False)
    start = time.monotonic()
    with pytest.raises(DataError, match="takes TensorFlow: run pip install") as caught:
        tfds.load(name, tmp_path)
    assert time.monotonic() - start < 5
    assert str(tmp_path / name) in str(caught.value)


def test_tfds_without_data_or_network_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: True)
    monkeypatch.setitem(tfds._HOSTS, "cifar10", "http://127.0.0.1:1")  # nobody listens
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1 cannot be reached") as caught:
        tfds.load("cifar10", tmp_path)
    assert str(tmp_path / "cifar10") in str(caught.value)


def test_tfds_names_the_package_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "mnist" / "1.0.0").mkdir(parents=True)
    (tmp_path / "mnist" / "1.0.0" / "dataset_info.json").touch()
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(DataError, match="takes array_record, which is missing"):
        tfds.load("mnist", tmp_path)
