"""A run knows its data and its base model: what changes them is named, and nothing else counts."""

import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flag_lines import resolve

from experiments.entry import UserError
from zofl_jax.configuration import experiment
from zofl_jax.runs import fingerprints
from zofl_jax.runs.directory import RunError, open_run

# Library.


def test_an_array_is_its_dtype_shape_and_elements(monkeypatch):
    x = np.arange(60, dtype=np.int32).reshape(3, 20)
    whole = fingerprints.array(x)
    changed = x.copy()
    changed[2, 19] += 1
    others = (changed, x.T, x.reshape(20, 3), x.astype(np.float32), x[:2], x[::-1])
    assert len({whole, *map(fingerprints.array, others)}) == 7
    for same in (x.copy(order="F"), jnp.asarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        assert fingerprints.array(same) == whole
    assert fingerprints.array(jnp.ones(3, jnp.bfloat16)) != fingerprints.array(
        np.ones(3, np.float16)
    )
    assert fingerprints.array(np.float32(1)) != fingerprints.array(np.zeros((0, 3)))
    monkeypatch.setattr(fingerprints, "_CHUNK", 64)  # hashed by several threads
    pieces = fingerprints.array(x)
    assert pieces == fingerprints.array(x) != fingerprints.array(changed)
    swapped = np.concatenate([x.reshape(-1)[16:32], x.reshape(-1)[:16], x.reshape(-1)[32:]])
    assert fingerprints.array(swapped.reshape(3, 20)) != pieces


def test_digests_never_change():
    # They stand in the directories of runs: other ones would refuse these.
    x = np.arange(3, dtype=np.int32)

    def sha(data):
        return hashlib.sha256(data).digest()

    known = sha(sha(b"int32(3,)") + sha(sha(x.tobytes()))).hex()[:32]
    assert fingerprints.array(x) == known == "f6cf354df555242d4ef6efc5d5b7606c"
    assert fingerprints.rows("training", {"x": ["a", 1, None, [True, 0.5]]}) == {
        "number of training examples": 4,
        "training column 'x'": "ec89cc320247d557914d9ad293035f9c",
        "order of training column 'x'": "3253a545eb9091ac01244445f8ab3466",
    }


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b", "b", 1],
        np.array([3, 1, 2, 2]),
        np.arange(16, dtype=np.uint8).reshape(4, 2, 2),
    ],
    ids=["plain", "numbers", "images"],
)
def test_rows_in_another_order_and_other_rows_are_told_apart(values):
    def found(x):
        return fingerprints.changes(before, fingerprints.rows("test", {"x": x}))

    before = fingerprints.rows("test", {"x": values})
    kind = np.array if isinstance(values, np.ndarray) else list
    rows = list(values)
    assert found(kind(rows)) == []
    assert found(kind(rows[::-1])) == ["order of test column 'x'"]
    assert found(kind([*rows[:3], rows[0]])) == ["test column 'x'"]
    more = kind([*rows, rows[0], rows[0]])  # twice: they don't cancel
    assert found(more) == ["number of test examples (6, was 4)", "test column 'x'"]


def test_a_number_is_not_its_text():
    one, other = (fingerprints.rows("test", {"x": x}) for x in ([1], ["1"]))
    assert fingerprints.changes(one, other) == ["test column 'x'"]


# Flags.

ROWS = [
    f"{word} film {i}\t{mood}\tw{i % 3}"
    for i in range(8)
    for word, mood in (("lovely", "positive"), ("dull", "negative"))
]
HEADER = "sentence\tmood\towner"
FLAGS = (
    *("--task=text", "--data_dir=data", "--model=hf:model", "--batch_size=2"),
    *("--text_column=sentence", "--label_column=mood", "--client_column=owner"),
    *("--verbalizers=negative=bad,positive=good", "--partition=natural", "--clients_per_round=1"),
)


def write_table(path, rows, header=HEADER):
    path.write_text("\n".join([header, *rows]) + "\n")


def inputs(*arguments):
    """Returns what the run of these flags would be known by, as a new process finds it."""
    experiment._inputs.cache_clear()
    experiment._images.cache_clear()
    return experiment.inputs(resolve(*arguments))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and a table, and what a run with them is known by."""
    tiny_texts = pytest.importorskip("tiny_texts")
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    write_table(folder / "data" / "train.tsv", ROWS)
    write_table(folder / "data" / "test.tsv", ROWS[:4])
    tiny_texts.save(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, {lora: inputs(*FLAGS, f"--lora_rank={lora}") for lora in (0, 2)}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_json(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def other_weight():
    from zofl_jax.models import weights

    model, params, tokenizer = weights.load("hf:model")
    scale = params["final_norm"]["scale"]
    params["final_norm"]["scale"] = scale.at[3].set(np.nextafter(scale[3], 2))
    weights.save_hf("model", model, params, tokenizer)


def drop_a_merge(fields):
    merges = fields["model"]["merges"]
    merges[:] = [merge for merge in merges if "".join(merge) != "Ġfilm"]


# What is changed, and how the refusal begins.
CHANGED = {
    "a value": (
        lambda data, model: edit(data / "train.tsv", "lovely film 3", "lovely film 33"),
        r"training column 'sentence', tokens of the training texts changed",
    ),
    "a label": (
        lambda data, model: edit(data / "train.tsv", "film 3\tpositive", "film 3\tnegative"),
        r"training column 'mood', tokens of the training texts changed",
    ),
    "the order of rows": (
        lambda data, model: write_table(data / "train.tsv", ROWS[::-1]),
        r"order of training column 'sentence', order of training column 'mood', order of training "
        r"column 'owner' and 2 more changed",
    ),
    "a row more": (
        lambda data, model: write_table(data / "train.tsv", [*ROWS, ROWS[0]]),
        r"number of training examples \(17, was 16\), ",
    ),
    "the test split": (
        lambda data, model: edit(data / "test.tsv", "dull film 1", "dull film 9"),
        r"test column 'sentence', tokens of the test texts changed",
    ),
    "an owner": (
        lambda data, model: edit(data / "train.tsv", "w1", "w2"),
        r"training column 'owner', partition changed",
    ),
    "a weight": (lambda data, model: other_weight(), "base model's weights final_norm/scale chan"),
    "the model's configuration": (
        lambda data, model: edit_json(
            model / "config.json", lambda fields: fields.update(rms_norm_eps=1e-6)
        ),
        r"base model's norm_eps \(1e-06, was 1e-05\) changed",
    ),
    "merges": (
        lambda data, model: edit_json(model / "tokenizer.json", drop_a_merge),
        r"tokens of the training texts, tokens of the test texts changed",
    ),
    "the token that starts a text": (
        lambda data, model: edit(model / "tokenizer_config.json", '"<s>"', '"</s>"'),
        r"tokenizer's bos_id \(1, was 0\) changed",
    ),
}


@pytest.mark.parametrize(("what", "lora"), [*((what, 0) for what in CHANGED), ("a weight", 2)])
def test_a_changed_input_is_refused_by_its_name(made, tmp_path, monkeypatch, what, lora):
    change, message = CHANGED[what]
    shutil.copytree(made[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    change(tmp_path / "copy/data", tmp_path / "copy/model")
    with open_run(tmp_path / "run", {}) as run:
        run.check_inputs(made[1][lora])
        with pytest.raises(RunError, match=f"^{message}"):
            run.check_inputs(inputs(*FLAGS, f"--lora_rank={lora}"))


def test_moved_files_and_other_formats_are_the_same_inputs(made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path / "copy", copy_function=shutil.copy)  # with new times
    monkeypatch.chdir(tmp_path / "copy")
    (tmp_path / "copy/data").rename("moved")
    lines = [f"{line}\t{i}".split("\t") for i, line in enumerate(ROWS)]
    (tmp_path / "copy/moved/train.tsv").unlink()
    names = ("sentence", "mood", "owner", "id")  # a column that the run doesn't use
    with open("moved/train.jsonl", "w") as file:
        for row in lines:
            print(json.dumps(dict(zip(names, row, strict=True))), file=file)
    shutil.move("model", "elsewhere")
    found = inputs(*FLAGS, "--data_dir=moved", "--model=hf:elsewhere")
    assert fingerprints.changes(made[1][0], found) == []
    assert set(made[1][0]) <= set(found)


def test_images_and_traces_are_known(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (12, 4, 4), np.uint8),
        "y_train": np.arange(12) % 2,
        "x_test": random.integers(0, 256, (4, 4, 4), np.uint8),
        "y_test": np.arange(4) % 2,
        "client_ids": np.arange(12) % 3,
    }
    trace = np.ones((2, 3), bool)
    flags = (
        *("--task=npz", f"--data_dir={tmp_path / 'x.npz'}", "--partition=natural"),
        *("--clients_per_round=1", "--batch_size=2", f"--availability={tmp_path / 'trace.npy'}"),
    )

    def found(**changes):
        np.savez(tmp_path / "x.npz", **{**arrays, **changes})
        return inputs(*flags)

    np.save(tmp_path / "trace.npy", trace)
    before = found()
    for name, expected in {
        "x_train": ["training column 'image'"],
        "y_test": ["test column 'label'"],
        "client_ids": ["partition"],
    }.items():
        other = arrays[name].copy()
        other[(3,) + (0,) * (other.ndim - 1)] ^= 1
        assert fingerprints.changes(before, found(**{name: other})) == expected
    trace[1, 1] = False
    np.save(tmp_path / "trace.npy", trace)
    assert fingerprints.changes(before, found()) == ["availability"]
    np.save(tmp_path / "trace.npy", np.full((2, 3), 0.3))  # chances are no booleans
    with pytest.raises(
        UserError, match=r"trace\.npy can't be read \(it holds float64 beside 0 and"
    ):
        found()
