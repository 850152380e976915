"""The lists of tests name tests, and no test is both quick and left out by `make test`."""

import re
from pathlib import Path

import extent
import pytest

ROOT = Path(__file__).parents[1]
QUICK = ROOT / "tests" / "quick.txt"


@pytest.mark.parametrize("path", [QUICK, extent.THOROUGH], ids=lambda path: path.stem)
def test_listed_tests_exist(path):
    lines = extent.entries(path.read_text())
    table = (ROOT / "tests" / "method_table.py").read_text()
    assert len(set(lines)) == len(lines) > 50
    for line in lines:
        file, _, test = line.partition("::")
        file, _, case = file.partition("[")
        text = (ROOT / file).read_text()
        name = test.split("[")[0]
        assert not name or re.search(rf"^def {re.escape(name)}\(", text, re.M), line
        assert not case or f'"{case.removesuffix("]")}"' in text + table, line


def test_quick_tests_are_in_the_short_run():
    thorough = extent.entries(extent.THOROUGH.read_text())
    files = {re.match(r"[^:\[]+", line)[0] for line in thorough}
    for line in extent.entries(QUICK.read_text()):
        assert not extent.listed(line, thorough)
        assert "::" in line or line not in files, f"{line} has tests that make test leaves out"
