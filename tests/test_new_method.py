"""The guide to a new method: its blocks run, and the method keeps the contract."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import test_contract

GUIDE = Path(__file__).parent.parent / "docs" / "new_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
NAME = "ranked evolution"
CHECKS = [
    check
    for check in vars(test_contract).values()
    if any(
        marks.mark in getattr(check, "pytestmark", ())
        for marks in (test_contract.rows, test_contract.without_bits)
    )
]


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


@pytest.mark.parametrize("check", CHECKS)
def test_it_keeps_the_contract(names, check, request):
    fixtures = [name for name in inspect.signature(check).parameters if name != "name"]
    check(NAME, **{name: request.getfixturevalue(name) for name in fixtures})


def test_the_contract_is_whole():
    assert len(CHECKS) == 8
