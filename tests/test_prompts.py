"""Prompts: templates, verbalizers, and the published benchmarks as TFDS gives them."""

import collections
import math
import pathlib
import re
import textwrap

import numpy as np
import pytest
import text_benchmarks

from zofl_jax.data.sources import DataError
from zofl_jax.data.text import SCORED
from zofl_jax.tasks import catalogue, prompts
from zofl_jax.tasks.catalogue import CATALOGUE
from zofl_jax.tasks.prompts import Prompt

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "prompts.md"
MOODS = Prompt("{text} It was", ("bad", "good"), "mood", ("negative", "positive"))
QUESTION = Prompt("{text}\nQuestion: {question}\nAnswer:", None, "answers")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for name in text_benchmarks.NAMES:
        text_benchmarks.prepare(folder, name)
    return folder


def test_a_template_names_columns_in_order():
    assert prompts.columns("{b} and {a}, {{c}} {b} {a-2} {my text}") == ["b", "a", "a-2", "my text"]
    assert prompts.columns("no columns") == []


def test_values_are_put_in_as_they_are():
    prompt = Prompt("{{{text}}} {n}: {text}", None, "answer")
    row = {"text": "a {b} {{c}} %s", "n": 2.5, "more": 1}
    assert prompts.render(prompt, row) == "{a {b} {{c}} %s} 2.5: a {b} {{c}} %s"


@pytest.mark.parametrize(
    "template", ["{", "}", "{text", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a:{b}}", "{ a}"]
)
def test_anything_but_plain_fields_is_refused(template):
    message = f"the template {template!r} must be text with {{column}} fields"
    for call in (prompts.columns, lambda t: prompts.render(Prompt(t, None, "x"), {"a": 1})):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(template)


def test_an_answer_follows_after_a_space_or_a_line():
    assert prompts.continuation("It was", "good") == " good"
    assert prompts.continuation("Yes or No?\n", "Yes") == "Yes"
    assert prompts.continuation("It was ", "good") == "good"
    assert prompts.continuation("", "good") == "good"


def test_demonstrations_stand_before_the_row_with_their_answers():
    row = {"text": "Fine"}
    shots = [{"text": "Dull", "mood": "negative"}, {"text": "A gem", "mood": "positive"}]
    expected = "Dull It was bad\n\nA gem It was good\n\nFine It was"
    assert prompts.in_context(MOODS, row, shots) == expected
    assert prompts.in_context(MOODS, row, []) == "Fine It was"
    asked = {"text": "Ann ran.", "question": "Who?"}
    shots = [{"text": "Bo sat.", "question": "Who?", "answers": ["Bo", "Mr Bo"]}]
    assert prompts.in_context(QUESTION, asked, shots).startswith(
        "Bo sat.\nQuestion: Who?\nAnswer: Bo\n\nAnn ran."
    )


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([1, 0, 1], None, [1, 0, 1]),
        (["1", "0"], None, [1, 0]),
        ([1.0, np.int64(0), True], None, [1, 0, 1]),
        (["negative", "positive"], ("positive", "negative"), [1, 0]),
        ([4, "0"], ("0", "4"), [1, 0]),
        ([True, False], ("true", "false"), [0, 1]),
    ],
)
def test_labels_become_classes(values, labels, expected):
    prompt = Prompt("{text}", ("bad", "good"), "y", labels)
    found = prompts.class_ids(prompt, [{"y": value} for value in values])
    assert found.dtype == np.int32 and found.tolist() == expected


@pytest.mark.parametrize(
    ("value", "labels", "message"),
    [
        (2, None, "row 1 has y=2, which is none of the classes 0, 1"),
        (0.5, None, "row 1 has y=0.5, which is none of the classes 0, 1"),
        (-1, None, "none of the classes 0, 1; -1 stands for a hidden label: use another split"),
        ("Good", ("bad", "good"), "row 1 has y='Good', which is none of the classes bad, good"),
        (None, None, "row 1 has y=None"),
    ],
)
def test_labels_that_are_no_classes_are_refused(value, labels, message):
    prompt = Prompt("{text}", ("bad", "good"), "y", labels)
    rows = [{"y": labels[0] if labels else 0, "text": "x"}, {"y": value, "text": "x"}]
    with pytest.raises(ValueError, match=re.escape(message)):
        prompts.class_ids(prompt, rows)
    with pytest.raises(ValueError, match=re.escape(f"my data, row 1 has y={value!r}")):
        prompts.check(prompt, rows, "my data")


def test_references_are_lists():
    rows = [{"answers": "one"}, {"answers": ["two", "2"]}]
    assert prompts.references(QUESTION, rows) == [["one"], ["two", "2"]]


@pytest.mark.parametrize("answer", ["", [], [""], 3, [3], None])
def test_references_must_be_text(answer):
    with pytest.raises(ValueError, match=r"row 0 has answers=.*: expected an answer, or a list"):
        prompts.references(QUESTION, [{"answers": answer}])


@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        (
            MOODS,
            {"body": "", "mood": "positive"},
            r"column 'text', which .* lacks; it has body, mood",
        ),
        (MOODS, {"text": "x", "label": 1}, r"has no label column 'mood': it has text, label"),
        (MOODS, {"text": None, "mood": "positive"}, r"row 0 has text=None: templates take text or"),
        (MOODS, {"text": ["a"], "mood": "positive"}, r"row 0 has text=\['a'\]: templates take"),
        (MOODS, {"text": math.nan, "mood": "positive"}, r"row 0 has text=nan: .* finite numbers"),
        (MOODS, {"text": " \n", "mood": "positive"}, r"row 0 has nothing in text: remove it or"),
        (MOODS._replace(answers=("good", "good")), {}, "two or more different words"),
        (MOODS._replace(answers=("good", "")), {}, "two or more different words"),
        (MOODS._replace(answers=("good",)), {}, "two or more different words"),
        (MOODS._replace(labels=("1",)), {}, "one label for each verbalizer"),
        (MOODS._replace(labels=("1", "1")), {}, "one label for each verbalizer"),
        (QUESTION, {"text": "x", "question": "", "answers": []}, r"row 0 has answers=\[\]"),
    ],
)
def test_a_prompt_that_does_not_fit_the_data_is_refused(prompt, row, message):
    with pytest.raises(ValueError, match=message):
        prompts.check(prompt, [row], "my data")


def test_a_prompt_that_fits_passes_and_no_rows_do_not():
    prompts.check(MOODS, [{"text": "a", "mood": "positive"}, {"text": 3, "mood": "negative"}], "x")
    with pytest.raises(ValueError, match="my data has no rows"):
        prompts.check(MOODS, [], "my data")


def test_verbalizers_are_parsed():
    found = prompts.parse_verbalizers(" 0 = very bad , 1=good,2=fine")
    assert found == (("0", "1", "2"), ("very bad", "good", "fine"))


@pytest.mark.parametrize("spec", ["", "a", "a=b", "a,b", "a=b,", "a=b,c=", "a=b,=c", "a=b=c,d=e"])
def test_malformed_verbalizers_are_refused(spec):
    with pytest.raises(ValueError, match=re.escape(f"'negative=bad,positive=good', got {spec!r}")):
        prompts.parse_verbalizers(spec)


@pytest.mark.parametrize(("spec", "what"), [("a=x,a=y", "label 'a'"), ("a=x,b=x", "word 'x'")])
def test_verbalizers_given_twice_are_refused(spec, what):
    with pytest.raises(ValueError, match=f"the {what} is given twice in the verbalizers"):
        prompts.parse_verbalizers(spec)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_is_consistent(name):
    entry = CATALOGUE[name]
    assert entry.name == name and entry.kind in ("classification", "generation")
    assert (entry.prompt.answers is None) == (entry.kind == "generation")
    assert set(prompts.columns(entry.prompt.template)) <= set(entry.columns)
    assert entry.source and entry.train != entry.test


def test_every_benchmark_but_the_scored_sentences_is_in_tfds():
    assert set(text_benchmarks.NAMES) == set(CATALOGUE) - set(SCORED)


@pytest.mark.parametrize("name", text_benchmarks.NAMES)
def test_benchmarks_are_read_with_every_row_and_class(data_dir, name):
    entry, data = CATALOGUE[name], catalogue.load(name, data_dir)
    assert (len(data.train), len(data.test), data.name) == (40, 12, name)
    for rows, split in ((data.train, "train"), (data.test, "test")):
        made = text_benchmarks.examples(name, split)
        if entry.kind == "classification":
            counts = np.bincount(prompts.class_ids(entry.prompt, rows))
            assert counts.tolist() == np.bincount([row["label"] for row in made]).tolist()
            assert len(counts) == len(entry.prompt.answers)
        else:
            assert all(prompts.references(entry.prompt, rows))
        first = prompts.columns(entry.prompt.template)[0]
        assert collections.Counter(row[first] for row in rows) == collections.Counter(
            row[first].strip() for row in made
        )


def test_the_three_classes_of_cb_are_in_the_order_of_their_words(data_dir):
    """Entailment is Yes, contradiction No and neutral Maybe."""
    words = CATALOGUE["cb"].prompt.answers
    for row in catalogue.load("cb", data_dir).train:
        verb = re.search(" (knew|was wrong|asked) ", row["premise"]).group(1)
        assert words[row["label"]] == {"knew": "Yes", "was wrong": "No", "asked": "Maybe"}[verb]


@pytest.mark.parametrize("name", ["qqp", "rte", "wic", "multirc", "wsc"])
def test_every_text_of_a_row_is_in_its_prompt(data_dir, name):
    entry = CATALOGUE[name]
    (row, *_) = catalogue.load(name, data_dir).train
    prompt = prompts.render(entry.prompt, row)
    assert all(row[column] in prompt for column in entry.columns if column != "label")


def test_a_question_of_boolq_ends_in_one_mark(data_dir):
    entry = CATALOGUE["boolq"]
    assert any(row["question"].endswith("?") for row in text_benchmarks.examples("boolq", "train"))
    for row in catalogue.load("boolq", data_dir).train:
        prompt = prompts.render(entry.prompt, row)
        assert prompt.endswith("?\n") and not prompt.endswith("??\n")


def test_drop_takes_the_answers_of_all_annotators(data_dir):
    rows = catalogue.load("drop", data_dir).train
    assert {len(row["answers"]) for row in rows} == {1, 2}
    assert all(row["answers"][0] == row["answer"] for row in rows)


def test_rows_without_any_answer_are_left_out():
    row = {"passage": "p", "question": "q", "answer": "", "validated_answers": [""]}
    rows = [row, row | {"validated_answers": ["", "3 "]}]
    assert [found["answers"] for found in catalogue._tidy(CATALOGUE["drop"], rows)] == [["3"]]


def test_hidden_labels_are_refused(data_dir, monkeypatch):
    monkeypatch.setattr(
        catalogue.tfds,
        "rows",
        lambda *args: {split: [{"sentence": "x", "label": -1}] for split in args[2]},
    )
    with pytest.raises(ValueError, match=r"sst2, train, row 0 has label=-1, .* hidden label"):
        catalogue.load("sst2", data_dir)


def test_the_reviews_are_in_the_catalogue(tmp_path):
    lines = [f"{i}\t{i % 2 * 2 - 1}\tsentence {i}" for i in range(900)]
    (tmp_path / "movie_reviews.tsv").write_text("\n".join(lines))
    data = catalogue.load("reviews", tmp_path)
    assert len(data.test) == 872 and len(data.train) == 28
    with pytest.raises(DataError, match="`make reviews` fetches them"):
        catalogue.load("reviews")


def test_snippets_know_their_document(tmp_path):
    lines = [f"{i // 3 + 1}_{i % 3 + 1}\t{i % 2 * 2 - 1}\tsentence {i}" for i in range(30)]
    (tmp_path / "editorials.tsv").write_text("\r\n".join(lines))
    data = catalogue.load("editorials", tmp_path)
    assert len(data.test) == 3 and len(data.train) == 27 and data.name == "editorials"
    for row in (*data.train, *data.test):
        i = int(row["text"].split()[1])
        assert row == {"text": f"sentence {i}", "label": i % 2, "document": str(i // 3 + 1)}
    with pytest.raises(
        DataError, match=r"give the folder of the newspaper edit.*`make editorials`"
    ):
        catalogue.load("editorials")
    (tmp_path / "editorials.tsv").write_text("7\t1.0\tsentence")
    with pytest.raises(DataError, match=r"line 1 has the id '7': expected DOCUMENT_SNIPPET"):
        catalogue.load("editorials", tmp_path)


def test_unknown_benchmarks_and_missing_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown benchmark 'sst3': use one of sst2, qqp, rte"):
        catalogue.load("sst3", tmp_path)
    with pytest.raises(DataError, match="TFDS has no prepared 'glue/sst2' in"):
        catalogue.load("sst2", tmp_path)


def document() -> str:
    """Returns docs/prompts.md: every template with the prompt of one example."""
    parts = [
        "# Prompts",
        "The prompt of each task, the words that stand for its classes, and what becomes of one "
        "example. An arrow (⟶) stands before the right answer. The examples are made up; their "
        "features are those of the data set in TFDS.",
        "This file is written by `python tests/test_prompts.py` from `zofl_jax/tasks/prompts.py`; "
        "a test compares the two.",
    ]
    for entry in CATALOGUE.values():
        row, prompt = example(entry), entry.prompt
        if entry.kind == "generation":
            kind = f"Written answer, in column `{prompt.label}`"
            answer = prompts.references(prompt, [row])[0][0]
        else:
            words = ", ".join(f"{i} `{word}`" for i, word in enumerate(prompt.answers))
            kind = f"Classes: {words}"
            answer = prompt.answers[row["label"]]
        place = f"TFDS `{entry.tfds}`" if entry.tfds else f"`make {entry.name}`"
        rendered = prompts.render(prompt, row)
        parts += [
            f"## {entry.name}",
            f"{entry.source}. {place}, trained on `{entry.train}`, tested on `{entry.test}`. "
            f"{kind}.",
            fenced(prompt.template),
            fenced(f"{rendered}⟶{prompts.continuation(rendered, answer)}"),
        ]
    paragraphs = (part if "```" in part else textwrap.fill(part, 100) for part in parts)
    return "\n\n".join(paragraphs) + "\n"


def example(entry):
    """Returns a row as `catalogue.load` would."""
    if entry.name in SCORED:
        return {"text": "A joy from start to end.", "label": 1}
    row = text_benchmarks.examples(entry.name, "train")[1]
    if entry.name == "squad":
        row["answers/text"] = row["answers"]["text"]
    return catalogue._tidy(entry, [row])[0]


def fenced(content):
    return f"```\n{content.removesuffix(chr(10))}\n```"


def test_the_document_of_prompts_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
