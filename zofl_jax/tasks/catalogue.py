"""The published benchmarks of texts: where TFDS keeps them, and their prompts.

The templates are those of MeZO (Malladi et al. 2023, arXiv 2305.17333), which come from GPT-3
and PromptSource (Bach et al. 2022, arXiv 2202.01279), or of their kind. docs/prompts.md prints
each of them for an example.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from zofl_jax.data import text, tfds
from zofl_jax.data.sources import DataError
from zofl_jax.data.text import Row, TextData
from zofl_jax.tasks.prompts import Prompt, check, columns


class Benchmark(NamedTuple):
    """A published data set, where TFDS keeps it, and its prompt.

    Attributes:
      name: its name in `CATALOGUE`.
      tfds: its name in TFDS; "" if it isn't there.
      train: TFDS' name of the split to train on.
      test: the same of the split to test on. It is the validation set where the test set's
        labels are hidden.
      prompt: see `Prompt`.
      columns: TFDS' features that are read; "a/b" is feature b inside a.
      kind: what the metrics are.
      source: the paper.
    """

    name: str
    tfds: str
    train: str
    test: str
    prompt: Prompt
    columns: tuple[str, ...]
    kind: Literal["classification", "generation"]
    source: str


def load(name: str, data_dir: str | Path | None = None) -> TextData:
    """Reads a benchmark of `CATALOGUE`, ready for its prompt.

    Args:
      name: a key of `CATALOGUE`.
      data_dir: of `text.SCORED` the folder of the task's file, else where TFDS prepares data, see
        `tfds.load`.

    Raises:
      DataError: like `text.scored` and `tfds.rows`.
      ValueError: for an unknown name, or rows whose labels are hidden.
    """
    if name not in CATALOGUE:
        raise ValueError(f"unknown benchmark {name!r}: use one of {', '.join(CATALOGUE)}")
    entry = CATALOGUE[name]
    if entry.tfds:
        splits = tfds.rows(entry.tfds, data_dir, (entry.train, entry.test), entry.columns)
        train, test = (_tidy(entry, splits[split]) for split in (entry.train, entry.test))
        data = TextData(train, test, name)
    elif data_dir is None:
        what = text.SCORED[name].what
        raise DataError(f"give the folder of the {what}; `make {name}` fetches them")
    else:
        data = text.scored(data_dir, name)
    check(entry.prompt, data.train, f"{name}, train")
    check(entry.prompt, data.test, f"{name}, test")
    return data


def _tidy(entry: Benchmark, rows: Sequence[Row]) -> list[Row]:
    """Returns rows without whitespace around texts, and what else their template expects."""
    change = _CHANGES.get(entry.name, lambda row: row)
    tidied: list[Row] = []
    for row in rows:
        stripped = {k: v.strip() if isinstance(v, str) else v for k, v in row.items()}
        changed = change(stripped)
        if changed[entry.prompt.label] not in ("", []):
            if isinstance(row, text.PlacedRow):
                changed = text.PlacedRow(changed, row.file, row.number)
            tidied.append(changed)
    return tidied


def _boolq(row: Row) -> Row:
    return row | {"question": row["question"].rstrip("? ")}  # the template ends the question


def _drop(row: Row) -> Row:
    """Gathers the answers of all annotators, without those that TFDS could not express."""
    answers = [row["answer"], *row["validated_answers"]]
    return row | {"answers": list(dict.fromkeys(a.strip() for a in answers if a.strip()))}


_CHANGES: dict[str, Callable[[Row], Row]] = {"boolq": _boolq, "drop": _drop}

_YES_NO = ("Yes", "No")
_NO_YES = ("No", "Yes")  # where class 0 is false
_SUPER_GLUE = "Wang et al. 2019, arXiv 1905.00537"


def _benchmark(
    name: str,
    path: str,
    template: str,
    answers: tuple[str, ...] | None = None,
    *,
    label: str = "label",
    read: tuple[str, ...] | None = None,
    test: str = "validation",
    source: str = _SUPER_GLUE,
) -> Benchmark:
    """Returns an entry of the catalogue; `read` are the columns that `label` is made of."""
    return Benchmark(
        name=name,
        tfds=path,
        train="train",
        test=test,
        prompt=Prompt(template, answers, label),
        columns=(*columns(template), *(read or (label,))),
        kind="generation" if answers is None else "classification",
        source=source,
    )


_ENTRIES = [
    _benchmark(
        "sst2",
        "glue/sst2",
        "{sentence} It was",
        ("terrible", "great"),
        source="Socher et al. 2013, EMNLP",
    ),
    _benchmark(
        "qqp",
        "glue/qqp",
        "Question 1: {question1}\nQuestion 2: {question2}\n"
        "Do these two questions convey the same meaning? Yes or No?\n",
        _NO_YES,
        source="Iyer et al. 2017, First Quora Dataset Release: Question Pairs",
    ),
    _benchmark(
        "rte",
        "super_glue/rte",
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        _YES_NO,
    ),
    _benchmark(
        "cb",
        "super_glue/cb",
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
    ),
    _benchmark("boolq", "super_glue/boolq", "{passage} {question}?\n", _NO_YES),
    _benchmark(
        "wsc",
        "super_glue/wsc.fixed",
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
        "{span1_text}? Yes or No?\n",
        _NO_YES,
    ),
    _benchmark(
        "wic",
        "super_glue/wic",
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        _NO_YES,
    ),
    _benchmark(
        "multirc",
        "super_glue/multirc",
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\n",
        _NO_YES,
    ),
    _benchmark(
        "squad",
        "squad/v1.1",
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        label="answers/text",
        source="Rajpurkar et al. 2016, arXiv 1606.05250",
    ),
    _benchmark(
        "drop",
        "drop",
        "Passage: {passage}\nQuestion: {question}\nAnswer:",
        label="answers",
        read=("answer", "validated_answers"),
        test="dev",
        source="Dua et al. 2019, arXiv 1903.00161",
    ),
    _benchmark(
        "xsum",
        "xsum",
        "Article: {document}\nSummary of the article in one sentence:",
        label="summary",
        test="test",
        source="Narayan et al. 2018, arXiv 1808.08745",
    ),
    *(
        _benchmark(
            name,
            "",
            "{text} It was",
            ("bad", "good"),
            test="test",
            source="Hutto and Gilbert 2014, ICWSM",
        )
        for name in text.SCORED
    ),
]

CATALOGUE: dict[str, Benchmark] = {entry.name: entry for entry in _ENTRIES}
"""The benchmarks by name."""
