"""How well a written answer agrees with the right ones: exact match, token F1, ROUGE-L.

Every metric lies in [0, 1] and takes the best over the reference answers.
"""

import collections
import functools
import re
import string
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def normalise(text: str) -> str:
    """Returns a text as SQuAD compares it: in lower case, without punctuation and articles.

    Ref: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.

    >>> normalise("The  Eiffel-Tower, in an alley.")
    'eiffeltower in alley'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 1 if the normalised prediction equals a normalised reference, else 0.

    >>> exact_match("the Alps.", ["Alps", "the mountains"])
    1.0

    Raises:
      ValueError: if there are no references.
    """
    _check(references)
    return float(normalise(prediction) in {normalise(reference) for reference in references})


def token_f1(prediction: str, references: Sequence[str], match_numbers: bool = False) -> float:
    """Returns the F1 of the prediction's words, 2 p r / (p + r), each as often as it stands.

    p is the share of the prediction's words that the reference has, r the share of the
    reference's words that the prediction has. Two empty texts agree.

    Args:
      prediction: any text.
      references: the right answers, one or more.
      match_numbers: DROP's rule: a reference that has numbers scores 0 unless the prediction has
        one of them, so that "30 yards" is no half of "40 yards". "1,000.0" is the number 1000.
        DROP's own script also splits words at hyphens and pairs the spans of answers with
        several; TFDS keeps one span of an answer, so there is nothing to pair.

    Raises:
      ValueError: if there are no references.

    Ref: Rajpurkar et al. 2016, arXiv 1606.05250; Dua et al. 2019, arXiv 1903.00161, section 5.

    >>> round(token_f1("in the high Alps", ["the Alps"]), 3)
    0.5
    """
    _check(references)
    scores = [_f1(normalise(prediction).split(), normalise(r).split()) for r in references]
    if match_numbers:
        numbers = [_numbers(reference) for reference in references]
        found = _numbers(prediction)
        scores = [s if not n or n & found else 0.0 for s, n in zip(scores, numbers, strict=True)]
    return max(scores)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Returns ROUGE-L: the F1 of the longest common subsequence of stemmed words.

    Raises:
      ImportError: if the library rouge-score is missing.
      ValueError: if there are no references.

    Ref: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004 workshop.

    >>> round(rouge_l("the cats sat", ["the cat sat down"]), 3)
    0.857
    """
    _check(references)
    return float(_rouge().score_multi(list(references), prediction)["rougeL"].fmeasure)


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer  # here: it takes a second to import
    except ImportError as error:
        raise ImportError("ROUGE-L takes rouge-score: pip install zofl-jax[language]") from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _f1(ours: list[str], right: list[str]) -> float:
    if not ours or not right:
        return float(ours == right)
    common = (collections.Counter(ours) & collections.Counter(right)).total()
    return 2 * common / (len(ours) + len(right))


def _numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in _NUMBER.findall(text)}


def _check(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a list of one text or more, got {references!r}")
