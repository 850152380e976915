"""The guide to a new method: its blocks run, and the method keeps the contract."""

import ast
import re
from pathlib import Path

import pytest
import test_contract

GUIDE = Path(__file__).parent.parent / "docs" / "new_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
NAME = "ranked evolution"


@pytest.fixture(scope="module")
def names():
    """Returns what the guide's blocks define, run in order."""
    defined = {}
    for block in BLOCKS:
        exec(compile(block, str(GUIDE), "exec"), defined)
    yield defined
    del defined["METHODS"][NAME]


def test_the_method_takes_less_than_60_lines():
    assert len(BLOCKS[0].splitlines()) < 60
    assert [node.name for node in ast.parse(BLOCKS[0]).body if isinstance(node, ast.FunctionDef)]


def test_the_guides_run_descends(names):
    gap = names["problem"].minimum
    assert names["after"] - gap < 0.5 * (names["before"] - gap)
    assert names["simulator"].sizes[0].upload == 16
    with pytest.raises(ValueError, match=r"must be in \[2, 256\], got 1"):
        names["ranked_evolution"](None, 1, 0.1, None)


@pytest.mark.parametrize(
    "check",
    [
        test_contract.test_it_learns_the_digits,
        test_contract.test_its_functions_are_traced_once,
        test_contract.test_its_types_are_stable,
        test_contract.test_it_replays_to_the_same_bits,
    ],
)
def test_it_keeps_the_contract(names, check):
    check(NAME)
