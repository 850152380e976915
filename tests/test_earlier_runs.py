"""Runs that earlier versions began go on with the code of today, to the same end.

`earlier_runs/make.py` says how they were made. Their bits are those of the machine that made them;
elsewhere the numbers are close, and programs are compiled as quickly as those of other tests. What
is counted is the same everywhere.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import earlier
import numpy as np
import programs
import pytest
from commands import Commands

NAMES = sorted(path.parent.name for path in earlier.RUNS.glob("*/expected.json"))
NOT_OF_THE_RUN = ("expected.json", "params.npz")


def logged(workdir):
    with closing(sqlite3.connect(workdir / "log.sqlite")) as log:
        return log.execute("SELECT * FROM rounds ORDER BY round").fetchall()


def test_there_are_runs():
    assert len(NAMES) >= 7


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_and_is_replayed(tmp_path, cache, processes, name):
    kept, workdir = earlier.RUNS / name, tmp_path / name
    expected = json.loads((kept / "expected.json").read_text())
    same_machine = expected["machine"] == earlier.machine()
    exact = same_machine or programs.AS_USERS_RUN_THEM
    commands = Commands(tmp_path, cache, processes, quick=not exact)
    shutil.copytree(kept, workdir, ignore=shutil.ignore_patterns(*NOT_OF_THE_RUN))
    before = logged(workdir)
    assert len(before) == earlier.STOPPED

    flags = [*expected["flags"], f"--rounds={earlier.ROUNDS}"]
    ended = commands.in_turn("train", f"--workdir={workdir}", *flags)
    assert ended.code == 0, ended.err
    found = earlier.facts(workdir)
    assert found["bytes"] == expected["bytes"]
    run_again = "run again" in ended.err
    if not run_again:
        assert f"after round {earlier.STOPPED}" in ended.err
        assert logged(workdir)[: earlier.STOPPED] == before

    replayed = commands.in_turn("replay", f"--workdir={workdir}", "--out=params.npz")
    assert replayed.code == 0, replayed.err
    params = arrays(commands.folder / "params.npz")
    theirs = arrays(kept / "params.npz")
    assert params.keys() == theirs.keys()
    if exact and (same_machine or run_again):
        assert "bit-identical to the run" in replayed.out
    if same_machine:
        assert not run_again, ended.err
        assert found == {name: expected[name] for name in found}
        for path, array in theirs.items():
            np.testing.assert_array_equal(params[path], array, err_msg=path)
    else:
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-3)
        for path, array in theirs.items():
            # As a whole: of two entries that are almost equal top-k may send the other one.
            apart = np.linalg.norm(params[path] - array) / np.linalg.norm(array)
            assert apart < 0.03, (path, apart)


def arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as opened:
        return dict(opened)
