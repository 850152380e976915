"""The faults that are planted by hand fit the code as it is."""

from pathlib import Path

import planted_faults
import pytest

ROOT = Path(__file__).parents[1]


def test_each_fault_can_be_planted_and_names_tests_that_exist():
    planted_faults.check_texts(ROOT, planted_faults.FAULTS)
    names = [fault.name for fault in planted_faults.FAULTS]
    assert len(set(names)) == len(names) >= 60
    for fault in planted_faults.FAULTS:
        for name in fault.tests:
            assert (ROOT / "tests" / f"test_{name}.py").exists(), fault.name


def test_a_fault_of_other_code_is_stale(tmp_path):
    (tmp_path / "a.py").write_text("a = b - 1\n")
    fault = planted_faults.Fault("sign", "a.py", "b + 1", "b - 1", "a is too small.", ())
    with pytest.raises(ValueError, match=r"fault sign is stale: its text occurs 0 times in a\.py"):
        planted_faults.check_texts(tmp_path, [fault])
