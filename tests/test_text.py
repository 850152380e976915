"""Text sources: what they read, what they hold out, and what they say of malformed files."""

import csv
import gzip
import json
import random

import pytest

from zofl_jax.data import text
from zofl_jax.data.sources import DataError
from zofl_jax.tasks import prompts

MANY = 1000
COLUMNS = ["review", "mood", "stars"]
ROWS = [[f'text {i}, it\'s "so so"', "good" if i % 3 else "bad", str(i % 5)] for i in range(21)]


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def reviews_file(path, num_rows=MANY, ending="\r\n"):
    lines = [f"{i + 1}\t{(i % 9 - 4) / 2}\tsentence {i}" for i in range(num_rows)]
    return write(path, ending.join(lines))


def tsv(rows, columns=COLUMNS):
    return "".join("\t".join(fields) + "\n" for fields in [columns, *rows])


def csv_text(rows):
    def quoted(field):
        return '"' + field.replace('"', '""') + '"'

    return "".join(",".join(map(quoted, fields)) + "\r\n" for fields in [COLUMNS, *rows])


def jsonl(rows):
    return "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows)


WRITERS = {"tsv": tsv, "csv": csv_text, "jsonl": jsonl}


def test_reviews_are_labelled_shuffled_and_held_out_by_the_rule(tmp_path):
    reviews_file(tmp_path / "movie_reviews.tsv")
    data = text.scored(tmp_path, "reviews")
    # Scores are -2, -1.5, ... 2 in turn; of nine only the score 0 says neither.
    kept = [(f"sentence {i}", int(i % 9 > 4)) for i in range(MANY) if i % 9 != 4]
    random.Random(0).shuffle(kept)
    assert [(row["text"], row["label"]) for row in data.test] == kept[:872]
    assert [(row["text"], row["label"]) for row in data.train] == kept[872:]
    assert data.name == "reviews"
    assert text.scored(tmp_path / "movie_reviews.tsv", "reviews") == data


def test_only_a_line_feed_ends_a_review(tmp_path):
    path = reviews_file(tmp_path / "some.tsv", ending="\n")
    odd = b"x\t4\todd \x85 byte,\x0b \xe2\x80\xa8 \x1c 'quotes\" and a\ttab\n"
    path.write_bytes(odd + path.read_bytes())
    data = text.scored(path, "reviews")
    (row,) = (row for row in data.test + data.train if row["text"].startswith("odd"))
    assert row == {"text": "odd � byte,\x0b \u2028 \x1c 'quotes\" and a\ttab", "label": 1}


def test_missing_reviews_name_the_command_that_fetches_them(tmp_path):
    with pytest.raises(DataError, match=r"no file .*movie_reviews\.tsv: .* `make reviews`"):
        text.scored(tmp_path, "reviews")
    with pytest.raises(DataError, match=r"no file .*absent: .* `make reviews`"):
        text.scored(tmp_path / "absent", "reviews")


@pytest.mark.parametrize("score", ["nan", "inf", "4.5", "-40"])
def test_scores_out_of_range_are_no_opinions(tmp_path, score):
    path = write(tmp_path / "movie_reviews.tsv", f"1\t-4\tfine\n2\t{score}\tsentence\n")
    with pytest.raises(DataError, match=rf"line 2: the score {score} is not in \[-4, 4\]"):
        text.scored(path, "reviews")


@pytest.mark.parametrize("line", ["7\tgood\tsentence", "7\t1.5", "sentence"])
def test_malformed_reviews_are_named_by_line(tmp_path, line):
    path = write(tmp_path / "movie_reviews.tsv", f"1\t2\tfine\n\n{line}\n")
    with pytest.raises(DataError, match=r"movie_reviews\.tsv, line 3: expected an id, a score"):
        text.scored(path, "reviews")


def test_too_few_reviews_leave_none_for_training(tmp_path):
    path = reviews_file(tmp_path / "few.tsv", num_rows=90)
    with pytest.raises(DataError, match=r"has 80 sentences .* none is left for training when 872"):
        text.scored(path, "reviews")


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("ending", WRITERS)
def test_a_folder_of_train_and_test(tmp_path, ending, packed):
    write(tmp_path / f"train.{ending}{packed}", WRITERS[ending](ROWS[:15]))
    write(tmp_path / f"test.{ending}{packed}", WRITERS[ending](ROWS[15:]))
    data = text.table(tmp_path)
    expected = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    assert data.train + data.test == expected and len(data.test) == 6
    assert data.name == tmp_path.name


@pytest.mark.parametrize("ending", WRITERS)
def test_one_file_is_shuffled_and_split(tmp_path, ending):
    path = write(tmp_path / f"moods.{ending}", WRITERS[ending](ROWS))
    data = text.table(path)
    expected = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    random.Random(0).shuffle(expected)
    assert data.test == expected[:3]  # 2.1, rounded up
    assert data.train == expected[3:]
    assert data.name == "moods"
    assert len(text.table(path, held_out=0.5).test) == 11


def test_tsv_knows_no_quotes_and_csv_does(tmp_path):
    write(tmp_path / "train.tsv", 'text\r\n"half\r\n\r\nx\u2028y\r\n')
    rows = '"two\nlines, ""quoted"", ",1\n" ""quoted""", 2\n'
    write(tmp_path / "test.csv", f"\ufefftext,label\n{rows}")
    data = text.table(tmp_path)
    assert data.train == [{"text": '"half'}, {"text": "x\u2028y"}]
    assert data.test == [
        {"text": 'two\nlines, "quoted", ', "label": "1"},
        {"text": ' "quoted"', "label": " 2"},
    ]


def test_json_keeps_types(tmp_path):
    row = {"text": "x", "label": 1, "score": 0.5, "answers": ["a", "b"], "ok": True}
    path = write(tmp_path / "rows.jsonl", f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert text.table(path).train == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.tsv",
            "a\tb\n1\t2\n1\t2\t3\n",
            r"x\.tsv, line 3: 3 fields, but the header has 2 \(a, b",
        ),
        ("x.csv", 'a,b\n"1\n1",2\n1\n', r"x\.csv, line 4: 1 fields, but the header has 2"),
        ("x.csv", 'a,b\n1,2\n"1"x,2\n', r"x\.csv, line 3: malformed CSV"),
        ("x.csv", "a,a\n1,2\n", "several columns called 'a'"),
        ("x.tsv", "a\ta \n1\t2\n", "several columns called 'a'"),
        # Python 3.14 reads what is 9,999 deep.
        ("x.jsonl", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "line 1: malformed JSON: "),
        ("x.csv", 'a,b\n1,2\n"a",b\n', r"x\.csv, line 3 repeats the header: remove it"),
        ("x.csv", "a,b\n1,2\n3,\0\n", r"x\.csv, line 3 holds a NUL character.*: convert"),
        ("x.tsv", "a\tb\n1\t2\n".encode("utf-16-le"), r"x\.tsv, line 1 holds a NUL character"),
        ("x.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"line 2: .* the name 'a' stands twice"),
        ("x.jsonl", '{"a": 1}\n{"a": "\\ud800"}\n', r"x\.jsonl, line 2: malformed JSON: .*surrog"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl, line 2: malformed JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"x\.jsonl, line 2: expected an object"),
        ("x.jsonl", '{"a": 1, "b": 2}\n\n{"a": 1}\n', r"line 3 lacks b, which line 1 has"),
        ("x.jsonl", '{"a": 1}\n{"a": 1, "b": 2}\n', r"line 1 lacks b, which line 2 has"),
        ("x.tsv", b"a\nfine\nm\xfcde\n", r"x\.tsv, line 3: the byte 0xfc is not UTF-8"),
        ("x.tsv", "", r"x\.tsv has no rows"),
        ("x.csv", "a,b\n", r"x\.csv has no rows"),
        ("x.jsonl.gz", "\n", r"x\.jsonl\.gz has no rows"),
        ("x.tsv", "a\n1\n", "has 1 row.*: none is left for training when 1 are held out"),
        ("x.json", "[]", r"x\.json is of no known kind: its name must end in one of \.tsv, "),
        ("x", "a", "x is of no known kind"),
    ],
)
def test_malformed_tables_are_named_by_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        text.table(path)


@pytest.mark.parametrize("ending", WRITERS)
def test_rows_know_the_lines_that_they_begin_on(tmp_path, ending):
    """After the shuffle too, in a file with empty lines and, in CSV, rows over several lines."""
    rows = {
        "tsv": "one\u2028two {0}\t{0}\n\n",
        "csv": '"one\n\ntwo {0}",{0}\r\n\r\n',
        "jsonl": '{{"review": "one\\ntwo {0}", "n": "{0}"}}\n\n',
    }
    content = {"tsv": "review\tn\n", "csv": "review,n\r\n", "jsonl": ""}[ending]
    lines = {}
    for i in range(8):
        lines[str(i)] = content.count("\n") + 1
        content += rows[ending].format(i)
    path = write(tmp_path / f"x.{ending}.gz", content)
    data = text.table(path, held_out=0.25)
    assert [row["n"] for row in data.train] != sorted(row["n"] for row in data.train)
    for row in data.train + data.test:
        assert text.place(row, "") == f"{path}, line {lines[row['n']]}"
    assert len(set(lines.values())) == 8
    wrong = data.train[3]
    known = tuple(n for n in lines if n != wrong["n"])
    prompt = prompts.Prompt("{review}", known, "n", known)
    with pytest.raises(ValueError, match=rf"^.*x\.{ending}\.gz, line {lines[wrong['n']]} has n="):
        prompts.check(prompt, data.train, "x, train")


def test_a_field_may_be_of_any_length(tmp_path):
    """Longer than csv's own limit, which is as before afterwards, also when reading fails."""
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    path = write(tmp_path / "x.csv", f'text,label\n"{long}",0\nshort,1\n')
    assert sorted(len(row["text"]) for row in text.table(path, 0.5).train) in ([5], [limit + 1])
    assert csv.field_size_limit() == limit
    with pytest.raises(DataError, match="malformed CSV"):
        text.table(write(path, f'text\n"{long}'))
    assert csv.field_size_limit() == limit


def test_owners_are_names_or_missing():
    def owner(value):
        return text.owner(text.PlacedRow({"who": value}, "x.csv, line", 3), "who", "row 1")

    for value in (None, float("nan"), "", " \t", "NaN", "null", "NA"):
        assert owner(value) is None, value
    for value, name in (
        (7, "7"),
        (7.0, "7"),
        ("7", "7"),
        (" Ann ", "Ann"),
        ("Nan", "Nan"),
        ("e\u0301", "\u00e9"),
    ):
        assert owner(value) == name
    for value in (True, 0.5, 2.0**54, ["Ann"], float("inf")):
        with pytest.raises(DataError, match=r"^x\.csv, line 3 has the owner who=.*: owners are"):
            owner(value)
    with pytest.raises(DataError, match=r"^row 1 has the owner"):
        text.owner({"who": {}}, "who", "row 1")


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain text"])
def test_a_damaged_gz_cannot_be_read(tmp_path, damage):
    path = write(tmp_path / "x.tsv.gz", tsv(ROWS))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"x\.tsv\.gz cannot be read: "):
        text.table(path)


def test_missing_splits_and_files(tmp_path):
    with pytest.raises(DataError, match=r"has no train split: looked for train\.tsv, train\.tsv\."):
        text.table(tmp_path)
    write(tmp_path / "train.tsv", tsv(ROWS))
    with pytest.raises(DataError, match="has no test split"):
        text.table(tmp_path)
    write(tmp_path / "train.csv.gz", csv_text(ROWS))
    with pytest.raises(DataError, match=r"has both train\.tsv and train\.csv\.gz"):
        text.table(tmp_path)
    with pytest.raises(DataError, match=r"there is no file .*absent\.tsv"):
        text.table(tmp_path / "absent.tsv")


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_the_share_held_out_is_checked(tmp_path, share):
    with pytest.raises(ValueError, match=r"held out must be in \(0, 1\), got"):
        text.table(tmp_path, held_out=share)
