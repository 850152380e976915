"""Metrics of written answers, against values worked out by hand."""

import sys

import pytest

from zofl_jax.tasks import answers


def test_normalising_follows_squad():
    assert answers.normalise("  The U.S. Army,\n a  theme; AN end!") == "us army theme end"
    assert answers.normalise("another, lathe") == "another lathe"  # no articles inside words
    assert answers.normalise("The") == ""


def test_an_exact_match_is_with_any_reference():
    assert answers.exact_match("in Paris", ["Paris", "In  Paris."]) == 1
    assert answers.exact_match("in Paris", ["Paris", "Lyon"]) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("a red red kite", ["red kite"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # one red too many
        ("kite red", ["a red kite"], 1.0),  # the order doesn't count
        ("blue", ["red kite"], 0.0),
        ("red", ["blue boat", "red kite", "red kite flying"], 2 / 3),  # the best of them
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),  # both are empty
    ],
)
def test_token_f1(prediction, references, expected):
    assert answers.token_f1(prediction, references) == pytest.approx(expected)


def test_numbers_must_agree_by_the_rule_of_drop():
    def f1(prediction, *references):
        return answers.token_f1(prediction, references, match_numbers=True)

    assert answers.token_f1("30 yards", ["40 yards"]) == 0.5
    assert f1("30 yards", "40 yards") == 0
    assert f1("40 metres", "40 yards") == 0.5
    assert f1("1,000 men", "1000.0 men") == pytest.approx(0.5)  # one number, two spellings
    assert f1("15 yards", "1.5 yards") == 0
    assert f1("30 yards", "yards") == pytest.approx(2 / 3)  # the reference has no number
    assert f1("30 yards", "40 yards", "30 feet") == 0.5


def test_rouge_l_counts_stems_in_order():
    pytest.importorskip("rouge_score")
    # "found it" is the longest common subsequence: p = 2/3, r = 2/4.
    assert answers.rouge_l("finds found it", ["it they found it"]) == pytest.approx(4 / 7)
    assert answers.rouge_l("cats sitting", ["no", "cat sits"]) == 1
    assert answers.rouge_l("", ["cat"]) == 0


def test_rouge_l_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    answers._rouge.cache_clear()
    with pytest.raises(ImportError, match=r"takes rouge-score: pip install zofl-jax\[language\]"):
        answers.rouge_l("a", ["a"])


@pytest.mark.parametrize("metric", [answers.exact_match, answers.token_f1, answers.rouge_l])
@pytest.mark.parametrize("references", [[], "a text"])
def test_references_are_a_list_that_is_not_empty(metric, references):
    with pytest.raises(ValueError, match="references must be a list of one text or more, got"):
        metric("a", references)
