"""Data sets of TFDS: prepared ones are read without TensorFlow, others refused at once."""

import io
import sys
import time
import warnings

import numpy as np
import pytest
import text_benchmarks

from zofl_jax.data import text, tfds
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


def prepare_features(data_dir, features, examples):
    """Prepares a data set "notes" of any features, with one split."""
    datasets = pytest.importorskip("tensorflow_datasets")

    class Notes(datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = datasets.core.Version("1.0.0")
        pkg_dir_path = None

        def _info(self):
            return datasets.core.DatasetInfo(
                builder=self, features=datasets.features.FeaturesDict(features(datasets.features))
            )

        def _split_generators(self, dl_manager):
            return {"some": enumerate(examples)}

        def _generate_examples(self):
            raise NotImplementedError

    Notes.name = "notes"
    Notes(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_rows_are_python_values_of_the_columns_asked_for(tmp_path):
    features = {
        "text": "Größe — 大",
        "label": 2,
        "weight": 0.5,
        "sure": True,
        "tags": ["a", "b"],
        "sizes": [3, 4, 5],
        "inner": {"deep": {"text": "d"}},
        "spans": {"text": ["x", "y"], "start": [0, 7]},
    }
    prepare_features(
        tmp_path,
        lambda f: {
            "text": f.Text(),
            "label": f.ClassLabel(num_classes=3),
            "weight": f.Scalar(np.float32),
            "sure": f.Scalar(np.bool_),
            "tags": f.Sequence(f.Text()),
            "sizes": f.Sequence(np.int32),
            "inner": {"deep": {"text": f.Text()}},
            "spans": f.Sequence({"text": f.Text(), "start": np.int32}),
        },
        [features, features | {"tags": []}],
    )
    columns = ["text", "label", "weight", "sure", "tags", "sizes", "inner/deep/text"]
    columns += ["spans/text", "spans/start"]
    rows = tfds.rows("notes", tmp_path, ["some"], columns)["some"]
    assert sorted(rows, key=lambda row: len(row["tags"]))[1] == {
        "text": "Größe — 大",
        "label": 2,
        "weight": 0.5,
        "sure": True,
        "tags": ["a", "b"],
        "sizes": [3, 4, 5],
        "inner/deep/text": "d",
        "spans/text": ["x", "y"],
        "spans/start": [0, 7],
    }
    places = [text.place(row, "") for row in rows]
    assert places == [f"{tmp_path}/notes/1.0.0, some, example {i}" for i in range(2)]
    kinds = [str, int, float, bool, list, list, str, list, list]
    assert [type(value) for value in rows[0].values()] == kinds
    assert {len(row["tags"]) for row in rows} == {0, 2}
    message = r"has no feature 'inner/text', only .*inner/deep/text"
    with pytest.raises(DataError, match=message):
        tfds.rows("notes", tmp_path, ["some"], ["inner/text"])


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(DataError, match=r"^notes, train, example 7 holds text that is not UTF-8: "):
        tfds._row({"text": [b"fine", b"m\xfcde"]}, ["text"], "notes, train, example", 7)


@pytest.mark.parametrize("name", ["sst2", "cb", "squad"])
def test_rows_of_benchmarks_are_read_without_tensorflow(tmp_path, monkeypatch, capfd, name):
    entry = text_benchmarks.CATALOGUE[name]
    text_benchmarks.prepare(tmp_path, name)
    capfd.readouterr()
    monkeypatch.setattr(tfds, "_CHUNK", 7)
    loaded = "tensorflow" in sys.modules
    found = tfds.rows(entry.tfds, tmp_path, [entry.test, entry.train], entry.columns)
    assert ("tensorflow" in sys.modules) == loaded
    assert capfd.readouterr() == ("", "")
    assert list(found) == [entry.test, entry.train]
    for split, part in ((entry.test, "test"), (entry.train, "train")):
        made = text_benchmarks.examples(name, part)
        column = entry.columns[0]
        assert sorted(row[column] for row in found[split]) == sorted(row[column] for row in made)
        assert all(tuple(row) == entry.columns for row in found[split])


@pytest.mark.parametrize("name", ["glue/sst2", "drop"])
def test_text_that_is_not_prepared_is_prepared_and_read(tmp_path, monkeypatch, name):
    """The download and TensorFlow itself, which these builders don't use, are left out."""
    module = pytest.importorskip(f"tensorflow_datasets.{tfds._MODULES[name.split('/')[0]]}")
    builder = getattr(module, {"glue/sst2": "Glue", "drop": "Drop"}[name])
    benchmark = name.removeprefix("glue/")
    entry = text_benchmarks.CATALOGUE[benchmark]

    def examples(self, dl_manager):
        parts = {entry.train: "train", entry.test: "test"}
        return {
            split: enumerate(text_benchmarks.examples(benchmark, part))
            for split, part in parts.items()
        }

    monkeypatch.setattr(builder, "_split_generators", examples)
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds, "_reachable", lambda host: True)
    plain_import = tfds._import_tfds
    monkeypatch.setattr(tfds, "_import_tfds", lambda with_tensorflow=False: plain_import())
    found = tfds.rows(name, tmp_path, [entry.train], entry.columns)
    assert len(found[entry.train]) == text_benchmarks.NUM_TRAIN
    assert tfds._prepared_folder(name, tmp_path)


def test_rows_name_the_splits_there_are(tmp_path):
    text_benchmarks.prepare(tmp_path, "drop")
    with pytest.raises(DataError, match=r"drop.2\.0\.0 has no split 'validation', only .*dev"):
        tfds.rows("drop", tmp_path, ["validation"], ["answer"])


def test_rows_without_data_say_so_at_once(tmp_path, monkeypatch):
    message = "unknown TFDS name 'imdb': use one of glue, super_glue, squad, drop, xsum, or one"
    with pytest.raises(DataError, match=message):
        tfds.rows("imdb", tmp_path, ["train"], ["text"])
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: False)
    with pytest.raises(DataError, match="takes TensorFlow: run pip install"):
        tfds.rows("glue/sst2", tmp_path, ["train"], ["sentence"])
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: True)
    monkeypatch.setitem(tfds._TEXT_HOSTS, "squad", "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"'squad/v1\.1' .* and http://127\.0\.0\.1:1 cannot be"):
        tfds.rows("squad/v1.1", tmp_path, ["train"], ["context"])


def test_what_tfds_does_not_download_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "_has_tensorflow", lambda: True)
    message = r"put xsum-extracts-from-downloads\.tar\.gz into .*downloads.manual, as TFDS' page"
    with pytest.raises(DataError, match=message):
        tfds.rows("xsum", tmp_path, ["train"], ["summary"])
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    (tmp_path / "downloads" / "manual" / "xsum-extracts-from-downloads.tar.gz").touch()
    monkeypatch.setitem(tfds._TEXT_HOSTS, "xsum", "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1 cannot be reached"):
        tfds.rows("xsum", tmp_path, ["train"], ["summary"])
