"""The guide to a new method: its blocks run, and the method keeps the contract."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_contract

GUIDE = Path(__file__).parent.parent / "docs" / "new_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
NAME = "ranked evolution"
CHECKS = [
    check
    for check in vars(test_contract).values()
    if test_contract.rows.mark in getattr(check, "pytestmark", ())
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


def test_it_trains_by_name_after_one_file_and_one_row(tmp_path):
    """The guide's method in a copy of the library: its file, and the row of `algorithms`."""
    root = GUIDE.parent.parent
    for package in ("zofl_jax", "experiments"):
        shutil.copytree(root / package, tmp_path / package)
    algorithms = tmp_path / "zofl_jax" / "algorithms"
    declared = next(block for block in BLOCKS if "METHOD = Method(" in block)
    (algorithms / "ranked.py").write_text(f"{BLOCKS[0]}\n\n{declared}")
    row = re.search(r"^    (from zofl_jax.algorithms.ranked import .*)$", GUIDE.read_text(), re.M)[
        1
    ]
    table = (algorithms / "__init__.py").read_text()
    table = table.replace("_ROWS = (\n", f"{row}\n\n_ROWS = (\n    RANKED,\n")
    (algorithms / "__init__.py").write_text(table)

    def said(*arguments):
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.train", *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(tmp_path),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # to compile in half the time
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return ended.returncode, ended.stdout + ended.stderr

    code, text = said("--help")
    assert code == 0 and "Of ranked alone" in text and "--sigma (default: 0.1)" in text
    train = ("--algorithm=ranked", "--rounds=4", "--eval_every=4", "--workdir=run")
    code, text = said(*train, "--sigma=0.2", "--noprogress", "--nofigures")
    assert code == 0 and "ranked on digits" in text, text
    code, text = said("--algorithm=ranked", "--compression=int8")
    assert code == 1 and "whose uploads are bits" in text


def test_the_contract_is_whole():
    assert len(CHECKS) == 7
