"""Which tests `make test` leaves out: those that `thorough.txt` lists."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

THOROUGH = Path(__file__).parent / "thorough.txt"


def entries(text: str) -> list[str]:
    """Returns the lines of a list of tests, without comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def listed(node_id: str, lines: Iterable[str]) -> bool:
    """Returns whether a test falls under one of the lines.

    >>> listed("tests/test_a.py::test_b[1-x]", ["tests/test_a.py::test_b"])
    True
    >>> listed("tests/test_a.py::test_b[1-x]", ["tests/test_a.py::test_b[1"])
    True
    >>> listed("tests/test_a.py::test_b[fedavg]", ["tests/test_a.py[fedavg]"])
    True
    >>> listed("tests/test_a.py::test_bc", ["tests/test_a.py::test_b"])
    False
    """
    file, _, name = node_id.partition("::")
    test, _, case = name.partition("[")
    whole = (f"{file}::{test}", f"{file}[{case}")
    return any(line in whole or ("[" in line and node_id.startswith(line)) for line in lines)


def mark(items: Sequence[Any]) -> None:
    """Marks the tests of the list as `thorough`."""
    lines = entries(THOROUGH.read_text())
    for item in items:
        if listed(item.nodeid, lines):
            item.add_marker("thorough")
