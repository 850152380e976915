"""Which tests `make test` leaves out: those that `thorough.txt` lists."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

THOROUGH = Path(__file__).parent / "thorough.txt"


def entries(text: str) -> list[str]:
    """Returns the lines of a list of tests, without comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def listed(node_id: str, lines: Iterable[str]) -> str | None:
    """Returns the line that a test falls under.

    >>> listed("tests/test_a.py::test_b[1-x]", ["tests/test_a.py::test_b"])
    'tests/test_a.py::test_b'
    >>> listed("tests/test_a.py::test_b[1-x]", ["tests/test_a.py::test_b[1"])
    'tests/test_a.py::test_b[1'
    >>> listed("tests/test_a.py::test_b[fedavg]", ["tests/test_a.py[fedavg]"])
    'tests/test_a.py[fedavg]'
    >>> listed("tests/test_a.py::test_bc", ["tests/test_a.py::test_b"])
    """
    file, _, name = node_id.partition("::")
    test, bracket, case = name.partition("[")
    whole = (f"{file}::{test}", f"{file}[{case}")
    for line in lines:
        if line in whole or (bracket and "::" in line and "[" in line and node_id.startswith(line)):
            return line
    return None


def mark(items: Sequence[Any]) -> None:
    """Marks the tests of the list as `thorough`."""
    lines = entries(THOROUGH.read_text())
    for item in items:
        if listed(item.nodeid, lines):
            item.add_marker("thorough")
