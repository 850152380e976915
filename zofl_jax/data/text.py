"""Text data: sentences that people scored, and tables of one's own as TSV, CSV or JSON lines.

Every source returns rows, a column's name to its value, or raises `DataError` with the file,
the line and what is wrong with it. What the columns mean is the business of a prompt.
"""

import csv
import gzip
import io
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zofl_jax.data.sources import DataError, owner_name

Row = dict[str, Any]
"""A column's name -> str, int or float, or a list of str (answers that are all right)."""


class PlacedRow(Row):
    """A row that knows where it stands in the user's file, for messages.

    Attributes:
      file: the file and what is counted in it, such as "moods.csv, line".
      number: of the row there.
    """

    __slots__ = ("file", "number")

    def __init__(self, values: Row, file: str, number: int):
        super().__init__(values)
        self.file = file
        self.number = number


def place(row: Row, otherwise: str) -> str:
    """Returns where a row stands in the user's file, `otherwise` where that isn't known.

    >>> place(PlacedRow({"text": "x"}, "moods.csv, line", 4), "row 0"), place({}, "row 0")
    ('moods.csv, line 4', 'row 0')
    """
    return f"{row.file} {row.number}" if isinstance(row, PlacedRow) else otherwise


_Record = tuple[int, Row]  # the number of the line it begins on, from 1

_LARGEST_SCORE = 4
_NEUTRAL = 0.5  # reviews with scores nearer to 0 say neither


class Scored(NamedTuple):
    """A study's sentences with the mean score that 20 people gave them.

    Attributes:
      file: its name.
      what: it holds, for people.
      held_out: rows for testing, or the share of all.
      owner: the column that names the document a sentence is from; None where nothing does.
    """

    file: str
    what: str
    held_out: int | float
    owner: str | None = None


SCORED: dict[str, Scored] = {
    # 872 as SST-2's validation set has.
    "reviews": Scored("movie_reviews.tsv", "film reviews", 872),
    "product_reviews": Scored("product_reviews.tsv", "product reviews", 0.1, "document"),
    "editorials": Scored("editorials.tsv", "newspaper editorials", 0.1, "document"),
}
"""By the name of the task, which is that of `make` too."""


class TextData(NamedTuple):
    """Rows for training and rows held out, neither empty."""

    train: list[Row]
    test: list[Row]
    name: str  # for people


def owner(row: Row, column: str, otherwise: str) -> str | None:
    """Returns who owns a row, None if that is missing: null, NaN, blank, or a word for them.

    Names are those of `owner_name`, and 3.0 is 3.

    Args:
      row: of a table.
      column: that names its owner.
      otherwise: names the row in messages where it doesn't know its place.

    Raises:
      DataError: for a value that is neither text nor an integer.
    """
    value = row[column]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() and abs(value) <= 2**53 else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{place(row, otherwise)} has the owner {column}={value!r}: owners are text or integers"
        )
    return owner_name(str(value))


def scored(folder: str | Path, task: str) -> TextData:
    """Reads sentences, labelled by what people thought of their sentiment.

    A line is an id, the mean score of 20 people in [-4, 4] and the sentence; there is no header.
    Sentences with |score| < 0.5 are left out; the label is 1 where score > 0. The rest is shuffled
    by random.Random(0), and the first are held out. Of snippets the id is that of the document, "_"
    and a number: the documents are natural clients, and nearly all of them are in both parts.

    Ref: C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text", ICWSM 2014.

    Args:
      folder: the folder of the task's file, or a file like it.
      task: a key of `SCORED`.

    Returns:
      Rows {"text": str, "label": 0 or 1}, and {"document": str} where the ids tell it.

    Raises:
      DataError: for a missing or malformed file.
    """
    source = SCORED[task]
    path = Path(folder).expanduser()
    if path.is_dir():
        path = path / source.file
    if not path.is_file():
        raise DataError(f"there is no file {path}: fetch the {source.what} by `make {task}`")
    kept: list[Row] = []
    file = f"{path}, line"
    # The raters' files are not all UTF-8.
    for number, line in _lines(_read(path).decode("utf-8", errors="replace")):
        try:
            name, score, text = line.split("\t", 2)
            polarity = float(score)
        except ValueError:
            raise DataError(
                f"{path}, line {number}: expected an id, a score and a sentence, separated by tabs"
            ) from None
        if not -_LARGEST_SCORE <= polarity <= _LARGEST_SCORE:
            raise DataError(
                f"{path}, line {number}: the score {score} is not in "
                f"[-{_LARGEST_SCORE}, {_LARGEST_SCORE}]"
            )
        if abs(polarity) >= _NEUTRAL:
            row: Row = {"text": text, "label": int(polarity > 0)}
            if source.owner:
                row[source.owner] = _document(name, f"{file} {number}")
            kept.append(PlacedRow(row, file, number))
    random.Random(0).shuffle(kept)
    held_out = source.held_out
    count = held_out if isinstance(held_out, int) else math.ceil(held_out * len(kept))
    test, train = kept[:count], kept[count:]
    if not train:
        raise DataError(
            f"{path} has {len(kept)} sentences with |score| >= {_NEUTRAL}: none is left for "
            f"training when {count} are held out"
        )
    return TextData(train, test, task)


def _document(name: str, where: str) -> str:
    """Returns the document of a snippet, 12 of 12_3."""
    document, found, _ = name.partition("_")
    if not found or not document:
        raise DataError(f"{where} has the id {name!r}: expected DOCUMENT_SNIPPET, as in 12_3")
    return document


def table(path: str | Path, held_out: float = 0.1) -> TextData:
    """Reads rows from files of one's own: .tsv, .csv or .jsonl, plain or with .gz after it.

    TSV and CSV begin with a line of column names. TSV knows no quotes: a line is a row and a tab
    separates fields; CSV's fields may be quoted. Their values are text. JSON lines hold one
    object each, all with the same names. Files are UTF-8; empty lines are skipped. Rows know their
    lines, those of CSV the line they begin on.

    Args:
      path: a folder with train.ENDING and test.ENDING; or one file, whose rows are shuffled by
        random.Random(0) before the first are held out.
      held_out: the share of one file's rows that is held out, rounded up.

    Raises:
      DataError: for missing, malformed or empty files.
      ValueError: unless 0 < held_out < 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the share of rows held out must be in (0, 1), got {held_out}")
    path = Path(path).expanduser()
    if path.is_dir():
        train, test = (_read_table(_split_file(path, split)) for split in ("train", "test"))
        return TextData(train, test, path.resolve().name)
    if not path.is_file():
        raise DataError(f"there is no file {path}: give a file, or a folder with train and test")
    rows = _read_table(path)
    random.Random(0).shuffle(rows)
    count = math.ceil(held_out * len(rows))
    if count == len(rows):
        raise DataError(
            f"{path} has {len(rows)} row(s): none is left for training when {count} are held out"
        )
    return TextData(rows[count:], rows[:count], path.name.split(".")[0])


def _split_file(folder: Path, split: str) -> Path:
    names = [f"{split}{ending}{packed}" for ending in _READERS for packed in ("", ".gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise DataError(f"{folder} has no {split} split: looked for {', '.join(names)}")
    if len(found) > 1:
        raise DataError(
            f"{folder} has both {found[0].name} and {found[1].name}: leave one of them there"
        )
    return found[0]


def _read_table(path: Path) -> list[Row]:
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if ending not in _READERS:
        raise DataError(
            f"{path} is of no known kind: its name must end in one of {', '.join(_READERS)}, and "
            ".gz may follow"
        )
    data = _read(path)
    try:
        text = data.decode("utf-8-sig")  # spreadsheets begin files with a byte-order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8: convert the "
            "file to UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line} holds a NUL character, as UTF-16 does: convert the file to UTF-8"
        )
    records = list(_READERS[ending](path, text))
    if not records:
        raise DataError(f"{path} has no rows")
    (first, columns), *rest = records
    for line, row in rest:
        for one, other, here, there in ((row, columns, line, first), (columns, row, first, line)):
            if lacking := [name for name in other if name not in one]:
                raise DataError(
                    f"{path}, line {here} lacks {', '.join(lacking)}, which line {there} has"
                )
    file = f"{path}, line"
    return [PlacedRow(row, file, line) for line, row in records]


def _tsv(path: Path, text: str) -> Iterator[_Record]:
    return _with_header(path, ((number, line.split("\t")) for number, line in _lines(text)))


def _csv(path: Path, text: str) -> Iterator[_Record]:
    # The limit is csv's own and of the whole process: 131,072 characters unless set.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        fields = list(_csv_fields(path, text))
    finally:
        csv.field_size_limit(limit)
    return _with_header(path, iter(fields))


def _csv_fields(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1  # a quoted field may go over many lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {number}: malformed CSV: {error}") from None
        if fields:
            yield number, fields


def _with_header(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[_Record]:
    _, header = next(lines, (0, []))
    names = [name.strip() for name in header]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path} has several columns called {min(repeated)!r}: rename them")
    for number, fields in lines:
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields, but the header has "
                f"{len(header)} ({', '.join(header)})"
            )
        if fields == header and len(header) > 1:
            raise DataError(f"{path}, line {number} repeats the header: remove it")
        yield number, dict(zip(header, fields, strict=True))


def _jsonl(path: Path, text: str) -> Iterator[_Record]:
    for number, line in _lines(text):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
            if "\\u" in line:  # half of a pair of surrogates is no character
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
            raise DataError(f"{path}, line {number}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number}: expected an object like {{"text": ...}}, found {line!r}'
            )
        yield number, row


def _without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {repeated!r} stands twice in one object")
    return found


_READERS: dict[str, Callable[[Path, str], Iterator[_Record]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that aren't empty, each with its number.

    Only a line feed ends one, with or without a carriage return: `str.splitlines` would also
    break at characters that stand inside sentences.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.removesuffix("\r"):
            yield number, line


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
