"""The tests of a file run in one process, whatever pytest and pytest-xdist do."""

import os
import subprocess
import sys
from pathlib import Path

from grouping import group

FILE = """
import os, pathlib, time, pytest

@pytest.mark.parametrize("i", range(6))
def test_of_this_file(i):
    time.sleep(0.05)
    with open(pathlib.Path(__file__).parent / "processes", "a") as file:
        print(__name__, os.getpid(), file=file)
"""


def test_the_tests_of_a_method_are_a_group_and_those_of_another_file_are_one():
    assert group("tests/test_contract.py::test_a[fedsgd]") == group(
        "tests/test_contract.py::test_b[fedsgd]"
    )
    assert group("tests/test_contract.py::test_a[hiso]") != group(
        "tests/test_contract.py::test_a[fedsgd]"
    )
    assert group("tests/test_keys.py::test_a[1]") == group("tests/test_keys.py::test_b")


def test_two_processes_share_the_files_out(tmp_path):
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / name).write_text(FILE)
    (tmp_path / "conftest.py").write_text(
        "import grouping\n\n\n"
        "def pytest_xdist_make_scheduler(config, log):\n"
        "    return grouping.make_scheduler(config, log)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = (tmp_path / "processes").read_text().split("\n")[:-1]
    assert len(lines) == 12
    assert len(set(lines)) == 2  # one process for each file
