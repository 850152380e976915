"""From rows to prompts: templates, verbalizers and demonstrations."""

import math
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zofl_jax.data.text import Row, place


class Prompt(NamedTuple):
    """How a row becomes a question to a language model, and what answers it.

    Attributes:
      template: text in which {column} stands for a column's value, "{{" and "}}" for braces.
      answers: the verbalizers: the word for each class, by class id. None for generation, where
        the reference answer, or a list of them, stands in column `label`.
      label: the column with the class, or with the reference answers.
      labels: the classes' values in that column, by class id; None where they are 0, 1, ...
    """

    template: str
    answers: tuple[str, ...] | None
    label: str
    labels: tuple[str, ...] | None = None


def columns(template: str) -> list[str]:
    """Returns the columns that a template names, each once, in order.

    >>> columns("Review: {text} {{sic}} It was")
    ['text']

    Raises:
      ValueError: for a template that isn't text with {column} fields.
    """
    return list(dict.fromkeys(name for _, name in _parse(template) if name is not None))


def render(prompt: Prompt, row: Row) -> str:
    """Returns the prompt for a row, without an answer.

    >>> render(Prompt("{text} It was", ("bad", "good"), "label"), {"text": "A {gem}."})
    'A {gem}. It was'

    Raises:
      ValueError: for a malformed template, or a column that the row lacks.
    """
    parts = []
    for literal, name in _parse(prompt.template):
        if name is not None and name not in row:
            raise ValueError(_lacks(name, prompt.template, "the row", row))
        parts.append(literal if name is None else literal + str(row[name]))
    return "".join(parts)


def ends_in_words(template: str) -> bool:
    r"""Returns whether a template ends in more than a column or whitespace.

    >>> ends_in_words("{text} It was"), ends_in_words("It was {text}\n")
    (True, False)

    Raises:
      ValueError: for a template that isn't text with {column} fields.
    """
    parts = _parse(template)
    return bool(parts) and parts[-1][1] is None and not parts[-1][0].isspace()


def continuation(prompt_text: str, answer: str) -> str:
    r"""Returns an answer as it follows a prompt: after a space, unless that ends in whitespace.

    >>> continuation("It was", "good"), continuation("Yes or No?\n", "Yes")
    (' good', 'Yes')
    """
    return answer if not prompt_text or prompt_text[-1].isspace() else f" {answer}"


def in_context(prompt: Prompt, row: Row, shots: Sequence[Row]) -> str:
    r"""Returns the prompt for a row, after the prompts of other rows with their answers.

    >>> prompt = Prompt("{text} It was", ("bad", "good"), "label")
    >>> in_context(prompt, {"text": "Dull."}, [{"text": "A gem.", "label": 1}])
    'A gem. It was good\n\nDull. It was'

    Raises:
      ValueError: like `render` and `class_ids`.
    """
    return demonstrations(prompt, shots) + render(prompt, row)


def demonstrations(prompt: Prompt, shots: Sequence[Row]) -> str:
    """Returns what stands before a prompt in `in_context`, the same for every row."""
    parts = []
    for shot, answer in zip(shots, _answers(prompt, shots), strict=True):
        question = render(prompt, shot)
        parts.append(question + continuation(question, answer) + "\n\n")
    return "".join(parts)


def class_ids(prompt: Prompt, rows: Sequence[Row], where: str = "") -> np.ndarray:
    """Returns the class of each row, int32 [n], numbered like the verbalizers.

    Numbers may stand as text. A JSON boolean is 0 or 1, and called "false" or "true" in `labels`.
    A message names a row by its file and line, or by `where` and its index.

    >>> prompt = Prompt("{text} It was", ("bad", "good"), "mood", ("negative", "positive"))
    >>> class_ids(prompt, [{"mood": "positive"}, {"mood": "negative"}])
    array([1, 0], dtype=int32)

    Raises:
      ValueError: for a row without a label, or with one that isn't a class.
    """
    if prompt.answers is None:
        raise ValueError(f"the prompt {prompt.template!r} has no verbalizers, so no classes")
    names = prompt.labels or tuple(str(i) for i in range(len(prompt.answers)))
    found = {name: i for i, name in enumerate(names)}
    ids = np.empty(len(rows), np.int32)
    for i, row in enumerate(rows):
        if prompt.label not in row:
            raise ValueError(
                f"{place(row, f'{where}row {i}')} has no label column {prompt.label!r}: it has "
                f"{', '.join(row)}"
            )
        label = row[prompt.label]
        if isinstance(label, bool):
            label = str(label).lower() if prompt.labels else int(label)
        elif isinstance(label, float) and label.is_integer():
            label = int(label)
        if str(label) not in found:
            hidden = "; -1 stands for a hidden label: use another split" if label == -1 else ""
            raise ValueError(
                f"{place(row, f'{where}row {i}')} has {prompt.label}={label!r}, which is none of "
                f"the classes {', '.join(names)}{hidden}"
            )
        ids[i] = found[str(label)]
    return ids


def references(prompt: Prompt, rows: Sequence[Row], where: str = "") -> list[list[str]]:
    """Returns the reference answers of each row, at least one, for a prompt without verbalizers.

    Raises:
      ValueError: for a row without an answer, or with one that isn't text.
    """
    found = []
    for i, row in enumerate(rows):
        answers = row.get(prompt.label)
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not all(
            isinstance(a, str) and a.strip() for a in answers
        ):
            answers = []
        if not answers:
            raise ValueError(
                f"{place(row, f'{where}row {i}')} has {prompt.label}={row.get(prompt.label)!r}: "
                "expected an answer, or a list of them, as text"
            )
        found.append(answers)
    return found


def check(prompt: Prompt, rows: Sequence[Row], name: str) -> None:
    """Raises ValueError, naming the data, unless every row has a prompt and an answer.

    Args:
      prompt: see `Prompt`.
      rows: of one split.
      name: of the split, for the message.
    """
    if not rows:
        raise ValueError(f"{name} has no rows")
    _check_words(prompt)
    named = columns(prompt.template)
    for i, row in enumerate(rows):
        for column in named:
            if column not in row:
                raise ValueError(_lacks(column, prompt.template, name, row))
            value = row[column]
            plain = isinstance(value, str | int | float)
            if not plain or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(
                    f"{place(row, f'{name}, row {i}')} has {column}={value!r}: templates take text "
                    "or finite numbers"
                )
        if named and not any(str(row[column]).strip() for column in named):
            raise ValueError(
                f"{place(row, f'{name}, row {i}')} has nothing in {', '.join(named)}: remove it or "
                "write its text"
            )
    if prompt.label not in rows[0]:
        raise ValueError(
            f"{name} has no label column {prompt.label!r}: it has {', '.join(rows[0])}"
        )
    _answers(prompt, rows, f"{name}, ")


def parse_verbalizers(spec: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the classes' labels in the data and their words, from "label=word,label=word".

    >>> parse_verbalizers("negative=bad,positive=good")
    (('negative', 'positive'), ('bad', 'good'))

    Raises:
      ValueError: for anything else, fewer than two classes, or a label or word given twice.
    """
    pairs = [tuple(part.strip() for part in item.split("=")) for item in spec.split(",")]
    if len(pairs) < 2 or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(
            f"verbalizers must be two or more LABEL=WORD between commas, as in "
            f"'negative=bad,positive=good', got {spec!r}"
        )
    labels, words = zip(*pairs, strict=True)
    for what, values in (("label", labels), ("word", words)):
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(
                f"the {what} {repeated[0]!r} is given twice in the verbalizers {spec!r}"
            )
    return labels, words


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Returns pairs of literal text and the column after it; None where the text ends."""
    problem = (
        f"the template {template!r} must be text with {{column}} fields, and {{{{ or }}}} for a "
        "brace itself"
    )
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not re.fullmatch(r"\w[\w /-]*", name)):
            raise ValueError(f"{problem}, not {{{name}}} with more in it" if name else problem)
    return [(literal, name) for literal, name, _, _ in parts]


def _lacks(column: str, template: str, where: str, row: Row) -> str:
    return (
        f"the template {template!r} names the column {column!r}, which {where} lacks; it has "
        f"{', '.join(row)}"
    )


def _check_words(prompt: Prompt) -> None:
    answers, labels = prompt.answers, prompt.labels
    if answers is not None and (len(set(answers)) < max(2, len(answers)) or not all(answers)):
        raise ValueError(f"verbalizers must be two or more different words, got {answers}")
    if labels is not None and (
        answers is None or len(labels) != len(answers) or len(set(labels)) != len(labels)
    ):
        raise ValueError(f"there must be one label for each verbalizer, got {labels} for {answers}")


def _answers(prompt: Prompt, rows: Sequence[Row], where: str = "") -> list[str]:
    """Returns the right answer of each row, the first of several."""
    if prompt.answers is None:
        return [answers[0] for answers in references(prompt, rows, where)]
    return [prompt.answers[i] for i in class_ids(prompt, rows, where)]
