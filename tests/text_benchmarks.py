"""Small data sets with the features of GLUE, SuperGLUE, SQuAD, DROP and XSum, for TFDS.

TFDS' own builders define the features, so what is read back has the form of the real data; the
texts are made here, row by row from an index, and their labels can be told from them.
"""

import contextlib
import importlib
import io
import types

import numpy as np
import pytest

from zofl_jax.tasks.catalogue import CATALOGUE

NUM_TRAIN = 40
NUM_TEST = 12

_MODULES = {  # of TFDS, and the class in it
    "glue": ("text.glue", "Glue"),
    "super_glue": ("text.super_glue", "SuperGlue"),
    "squad": ("datasets.squad.squad_dataset_builder", "Builder"),
    "drop": ("text.drop.drop", "Drop"),
    "xsum": ("summarization.xsum", "Xsum"),
}
_PEOPLE = ("Mary", "Ivan", "Chidi", "Rosa", "Ahmed", "Linnea", "Tomas")
_PLACES = ("Oslo", "Lagos", "Turin", "Quito", "Busan")
_THINGS = ("a bicycle", "an old piano", "a red kite", "a clock")
_GOOD = ("warm and funny", "a joy from start to end", "clever and moving", "beautifully acted")
_BAD = ("dull and far too long", "a mess without a plot", "lazy and loud", "badly acted")
_FILMS = ("the film", "this comedy", "her new drama", "the sequel", "his first thriller")


def _pick(options, i):
    return options[i % len(options)]


def _fact(i):
    """Returns who bought what, where, and in which year."""
    return _pick(_PEOPLE, i), _pick(_THINGS, i), _pick(_PLACES, i), 1950 + 7 * i % 60


def _sst2(i):
    label = i % 2
    opinion = _pick((_BAD, _GOOD)[label], i // 2)
    # As in the real data, a space ends a sentence.
    return {"sentence": f"{_pick(_FILMS, i // 3)} is {opinion} ", "label": label, "idx": i}


def _qqp(i):
    who, thing, place, _ = _fact(i)
    other = _pick(_PLACES, i + 1)
    return {
        "question1": f"Where can {who} buy {thing} in {place}?",
        "question2": f"In {place if i % 2 else other}, which shop sells {thing} to {who}?",
        "label": i % 2,
        "idx": i,
    }


def _rte(i):
    who, thing, place, year = _fact(i)
    bought = f"{who} bought {thing}." if i % 2 == 0 else f"{who} sold {thing}."
    return {
        "premise": f"In {year} {who} bought {thing} in {place}.",
        "hypothesis": bought,
        "label": i % 2,  # entailment, not_entailment
        "idx": i,
    }


def _cb(i):
    who, _, place, year = _fact(i)
    said = (f"{who} knew that", f"{who} was wrong to think that", f"{who} asked whether")[i % 3]
    return {
        "premise": f"{said} it rained in {place} in the summer of {year}.",
        "hypothesis": f"it rained in {place} in the summer of {year}",
        "label": i % 3,  # entailment, contradiction, neutral
        "idx": i,
    }


def _boolq(i):
    who, thing, place, year = _fact(i)
    asked = place if i % 2 else _pick(_PLACES, i + 1)
    mark = "?" if i % 4 == 1 else ""  # few of the real questions have one
    return {
        "passage": f"{who} bought {thing} in {place} in {year} and kept it.",
        "question": f"did {who} buy {thing} in {asked}{mark}",
        "label": i % 2,
        "idx": i,
    }


def _wsc(i):
    first, second = _pick(("Mary", "Rosa", "Linnea"), i), _pick(("Ngozi", "Anna", "Yuki"), i // 3)
    _, thing, place, _ = _fact(i)
    text = f"{first} sold {thing} to {second} because she was about to leave {place}."
    referent = first if i % 2 else second
    words = text.split()
    return {
        "text": text,
        "span1_text": referent,
        "span1_index": words.index(referent),
        "span2_text": "she",
        "span2_index": words.index("she"),
        "label": i % 2,
        "idx": i,
    }


def _wic(i):
    who, _, place, year = _fact(i)
    same = (f"{who} rowed to the bank.", f"The bank lent {who} money.")
    return {
        "word": "bank",
        "sentence1": f"A bank in {place} closed in {year}.",
        "sentence2": same[i % 2],
        "start1": 2,
        "end1": 6,
        "start2": same[i % 2].index("bank"),
        "end2": same[i % 2].index("bank") + 4,
        "label": i % 2,
        "idx": i,
    }


def _multirc(i):
    who, thing, place, year = _fact(i)
    return {
        "paragraph": f"{who} moved to {place} in {year}. There {who} found {thing}.",
        "question": f"Where did {who} move?",
        "answer": place if i % 2 else _pick(_PLACES, i + 1),
        "label": i % 2,
        "idx": {"paragraph": i, "question": 0, "answer": 0},
    }


def _squad(i):
    who, thing, place, year = _fact(i)
    context = f"In {year} {who} moved to {place}. There {who} found {thing} in the street."
    answers = [place, f"to {place}"]
    return {
        "id": f"{i:024x}",
        "title": f"{who}_of_{place}",
        "context": context,
        "question": f"Where did {who} move?",
        "answers": {"text": answers, "answer_start": [context.index(a) for a in answers]},
    }


def _drop(i):
    who, thing, place, year = _fact(i)
    years = 2 + i % 9
    return {
        "passage": f"{who} moved to {place} in {year} and left in {year + years} with {thing}.",
        "question": f"How many years did {who} live in {place}?",
        "answer": str(years),
        "validated_answers": [str(years), f"{years} years"][: i % 3],
        "query_id": f"query-{i}",
    }


def _xsum(i):
    who, thing, place, year = _fact(i)
    return {
        "document": f"A crowd met in {place} on Sunday. {who}, who lives there since {year}, had "
        f'lost {thing}.\nNeighbours found it after an hour. "I am happy," said {who}.',
        "summary": f"Neighbours in {place} have found {thing} that {who} had lost.",
    }


_ROWS = {
    "sst2": _sst2,
    "qqp": _qqp,
    "rte": _rte,
    "cb": _cb,
    "boolq": _boolq,
    "wsc": _wsc,
    "wic": _wic,
    "multirc": _multirc,
    "squad": _squad,
    "drop": _drop,
    "xsum": _xsum,
}
NAMES = tuple(_ROWS)


def examples(name, split):
    """Returns what TFDS is given for a split ("train" or "test"), before it shuffles."""
    make = _ROWS[name]
    if split == "train":
        return [make(i) for i in range(NUM_TRAIN)]
    return [make(NUM_TRAIN + i) for i in range(NUM_TEST)]


def prepare(data_dir, name):
    """Prepares benchmark `name` of the catalogue at data_dir/NAME/CONFIG/VERSION, by TFDS."""
    datasets = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    entry = CATALOGUE[name]
    path, _, config = entry.tfds.partition("/")
    module_name, class_name = _MODULES[path]
    module = importlib.import_module(f"{datasets.__name__}.{module_name}")
    original = getattr(module, class_name)
    splits = {entry.train: examples(name, "train"), entry.test: examples(name, "test")}

    class Small(original, skip_registration=True):
        __module__ = original.__module__  # by which TFDS finds its README

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Small.name = path
    console = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(console),
        contextlib.redirect_stderr(console),
    ):
        if path == "super_glue":  # the only one that names types by TensorFlow
            patch.setattr(module, "tf", types.SimpleNamespace(int32=np.int32))
        chosen = {"config": config} if config else {}
        Small(data_dir=data_dir, file_format="array_record", **chosen).download_and_prepare()
