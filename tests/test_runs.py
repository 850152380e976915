"""The run directory: opened once, reopened for ever, whatever killed the last process."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

from zofl_jax.runs import directory, snapshots
from zofl_jax.runs.directory import RoundRow, RunError

FLAGS = {"task": "digits", "rounds": 100, "learning_rate": 0.1, "weighted": True, "data": None}


class State(NamedTuple):
    params: dict[str, dict[str, jax.Array]]
    opt_state: optax.OptState
    round: jax.Array


def make_state(scale=1, width=3, optimizer=None):
    optimizer = optimizer or optax.adam(1e-3)
    params = {
        "dense": {
            "kernel": jnp.full((2, width), scale, jnp.float32),
            "bias": jnp.arange(width) / 8,
        },
        "half": {"w": jnp.full(2, scale, jnp.bfloat16)},
    }
    return State(params, optimizer.init(params), jnp.int32(7))


def make_rows(start, stop):
    return [RoundRow(r, b"8 bytes!", b"x" * 20, 0.5, 1, 2, 3, 4, 5) for r in range(start, stop)]


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "deep" / "run"


def names(path):
    return sorted(entry.name for entry in path.iterdir())


# Flags and directories.


def test_new_run_is_created_and_reopened(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        assert (run.path, run.flags, run.notice) == (workdir, FLAGS, None)
        assert (run.log.last_round, run.snapshot_rounds, run.read_summary()) == (-1, [], None)
        run.log.append(make_rows(0, 3))
    assert (
        directory.read_flags(workdir) == json.loads((workdir / "flags.json").read_text()) == FLAGS
    )
    with directory.open_run(str(workdir), dict(reversed(FLAGS.items()))) as run:
        assert (run.log.last_round, run.notice) == (2, None)
    assert names(workdir) == ["flags.json", "lock", "log.sqlite", "snapshots"]


def test_changed_flag_is_refused_by_name(workdir):
    directory.open_run(workdir, FLAGS).close()
    before = (workdir / "flags.json").read_bytes()
    changed = {**FLAGS, "learning_rate": 0.2}
    with pytest.raises(
        RunError, match=r"--learning_rate is 0.2 but .* started with 0.1: choose another --workdir"
    ):
        directory.open_run(workdir, changed)
    with pytest.raises(
        RunError, match=r"--task is 'idx' .*'digits' \(also different: --weighted\)"
    ):
        directory.open_run(workdir, {**FLAGS, "task": "idx", "weighted": False})
    with pytest.raises(RunError, match=r"--momentum is 0.9 but .* started with not set"):
        directory.open_run(workdir, {**FLAGS, "momentum": 0.9})
    with pytest.raises(RunError, match=r"--task is not set but .* started with 'digits'"):
        directory.open_run(workdir, {k: v for k, v in FLAGS.items() if k != "task"})
    assert (workdir / "flags.json").read_bytes() == before
    directory.open_run(workdir, FLAGS).close()  # The refusals let go of the lock.
    directory.open_run(workdir, {**FLAGS, "of_a_later_release": None}).close()
    directory.open_run(workdir, FLAGS).close()


def test_flags_that_may_change_are_updated(workdir):
    directory.open_run(workdir, FLAGS).close()
    changed = {**FLAGS, "rounds": 200, "tensorboard": True}
    with directory.open_run(workdir, changed, may_change=("rounds", "tensorboard")) as run:
        assert run.flags == changed
    assert directory.read_flags(workdir) == changed


@pytest.mark.parametrize("value", [math.nan, math.inf, [1], np.float32(1), {"a": 1}])
def test_flags_must_be_plain(workdir, value):
    with pytest.raises(ValueError, match="flag rate must be a str, finite number, bool or None"):
        directory.open_run(workdir, {"rate": value})
    assert not workdir.exists()


def test_directories_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"holds files but no run \(it has no flags.json\)"):
        directory.open_run(tmp_path, FLAGS)
    with pytest.raises(RunError, match="is not a directory: choose another --workdir"):
        directory.open_run(tmp_path / "thesis.tex", FLAGS)
    with pytest.raises(RunError, match=r"can't be used .*Not a directory"):
        directory.open_run(tmp_path / "thesis.tex" / "run", FLAGS)
    with pytest.raises(RunError, match="--workdir is empty"):
        directory.open_run("", FLAGS)
    with pytest.raises(RunError, match=r"is not a run .*: choose the --workdir of a run"):
        directory.read_flags(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    directory.open_run(tmp_path / "empty", FLAGS).close()


@pytest.mark.parametrize("text", ["", '{"task": ', "[]"])
def test_unreadable_flags_are_refused(workdir, text):
    directory.open_run(workdir, FLAGS).close()
    (workdir / "flags.json").write_text(text)
    with pytest.raises(RunError, match=r"flags.json can't be read .*: restore it from a copy"):
        directory.open_run(workdir, FLAGS)


def test_one_process_at_a_time(workdir):
    run = directory.open_run(workdir, FLAGS)
    with pytest.raises(RunError, match=rf"in use by another process \(id {os.getpid()}\): wait"):
        directory.open_run(workdir, FLAGS)
    run.close()
    run.close()
    directory.open_run(workdir, FLAGS).close()


def test_home_directory_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with directory.open_run("~/run", FLAGS) as run:
        assert run.path == tmp_path / "run"


# What the run was made with.


def test_inputs_are_noted_once_and_changed_ones_refused_by_name(workdir):
    inputs = {"training data": "aa", "number of rows": 3, "rate": None}
    with directory.open_run(workdir, FLAGS) as run:
        run.check_inputs(inputs)
        assert run.notice is None
        run.log.append(make_rows(0, 1))
    noted = (workdir / "inputs.json").read_bytes()
    assert json.loads(noted) == inputs
    with directory.open_run(workdir, FLAGS) as run:
        run.check_inputs({"rate": None, "number of rows": 3})
        assert run.notice is None
        with pytest.raises(
            RunError,
            match=r"^number of rows \(4, was 3\), rate \(0, was None\) changed since the run in "
            r".* began: choose another --workdir for a new run, or restore",
        ):
            run.check_inputs({**inputs, "number of rows": 4, "rate": 0, "later": 1})
        assert (workdir / "inputs.json").read_bytes() == noted
        run.check_inputs({**inputs, "of a later release": "bb"})
        with pytest.raises(RunError, match=r"^of a later release \(cc, was bb\) changed"):
            run.check_inputs({"of a later release": "cc"})


def test_a_run_of_an_earlier_release_goes_on_and_says_so_once(workdir):
    for expected in (True, False):
        with directory.open_run(workdir, FLAGS) as run:
            if expected:
                run.log.append(make_rows(0, 1))
            run.check_inputs({})
            assert run.notice is None
            run.check_inputs({"training data": "aa"})
            assert bool(run.notice) == expected
            if expected:
                assert "no inputs.json, so whether its data and base model are" in run.notice


@pytest.mark.parametrize("text", ["", '{"task": ', "[]"])
def test_unreadable_inputs_are_refused(workdir, text):
    with directory.open_run(workdir, FLAGS) as run:
        (workdir / "inputs.json").write_text(text)
        with pytest.raises(RunError, match=r"inputs.json can't be read .*: restore .* or delete"):
            run.check_inputs({"training data": "aa"})


# The log and the directory.


def test_damaged_log_is_reported(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        run.log.append(make_rows(0, 500))
    data = (workdir / "log.sqlite").read_bytes()
    (workdir / "log.sqlite").write_bytes(data[: len(data) // 2])
    with directory.open_run(workdir, FLAGS) as run:
        last = run.log.last_round
        assert 150 < last < 300
        assert f"after round {last}, the last good one" in run.notice
    with directory.open_run(workdir, FLAGS) as run:
        assert run.notice is None


def test_missing_log_starts_again_from_the_initial_snapshot(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        run.save_snapshot(0, make_state(0))
        run.log.append(make_rows(0, 5))
        run.save_snapshot(5, make_state(5))
    (workdir / "log.sqlite").unlink()
    with directory.open_run(workdir, FLAGS) as run:
        assert "log.sqlite is missing: the run starts again from round 0" in run.notice
        assert run.latest_snapshot(make_state())[0] == 0


# Snapshots.


def test_snapshot_restores_every_leaf(workdir):
    state = make_state(3.25)
    with directory.open_run(workdir, FLAGS) as run:
        assert run.latest_snapshot(state) is None
        run.save_snapshot(0, state)
        for template in (make_state(), jax.eval_shape(make_state)):
            rounds_done, restored = run.latest_snapshot(template)
            assert rounds_done == 0
            assert_same(restored, state)
        assert run.notice is None


def test_numpy_leaves_stay_numpy(workdir):
    tree = {"counts": np.arange(3, dtype=np.int64), "mean": np.float64(1 / 3)}
    with directory.open_run(workdir, FLAGS) as run:
        run.save_snapshot(0, tree)
        _, restored = run.latest_snapshot(tree)
    assert {name: x.dtype for name, x in restored.items()} == {"counts": np.int64, "mean": float}
    assert restored["counts"].tolist() == [0, 1, 2]
    assert restored["mean"] == 1 / 3


def test_last_snapshots_and_the_first_are_kept(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        run.log.append(make_rows(0, 50))
        for rounds_done in (0, 10, 20, 30):
            run.save_snapshot(rounds_done, make_state(rounds_done))
        assert run.snapshot_rounds == [0, 20, 30]
        run.save_snapshot(40, make_state(40), keep=1)
        assert run.snapshot_rounds == [0, 40]
        run.save_snapshot(100_000_000, make_state())
        assert run.snapshot_rounds == [0, 40, 100_000_000]
        # The log ends at 50, so a later state can't be continued from ...
        assert run.latest_snapshot(make_state())[0] == 40
        assert run.latest_snapshot(make_state(), at_most=10**9)[0] == 100_000_000
        assert run.latest_snapshot(make_state(), at_most=39)[0] == 0
        # ... and doesn't outlive one that can.
        run.save_snapshot(45, make_state(45))
        assert run.snapshot_rounds == [0, 40, 45]
        run.save_snapshot(45, make_state(-1))
        assert_same(run.latest_snapshot(make_state())[1], make_state(-1))
        run.save_snapshot(0, make_state())
        assert run.snapshot_rounds == [0]


def test_snapshot_that_does_not_fit_names_the_leaf(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        run.save_snapshot(0, make_state())
        cases = [
            (make_state(width=4), r"params/dense/bias is float32\[3\] there and float32\[4\] here"),
            (
                make_state()._replace(round=jnp.float32(7)),
                r"leaf round is int32\[\] there and float32\[\] here",
            ),
            (
                make_state(optimizer=optax.sgd(0.1)),
                r"opt_state/0/count is int32\[\] there and absent here",
            ),
            (
                {"state": make_state()},
                r"state/params/dense/bias is absent there and float32\[3\] here",
            ),
        ]
        for template, message in cases:
            with pytest.raises(RunError, match=message):
                run.latest_snapshot(template)
        assert run.snapshot_rounds == [0]


@pytest.mark.parametrize("offset", [0, 8, 41, 44, 200, -1])
def test_damaged_snapshot_gives_way_to_the_one_before(workdir, offset):
    with directory.open_run(workdir, FLAGS) as run:
        run.log.append(make_rows(0, 50))
        for rounds_done in (0, 10, 20):
            run.save_snapshot(rounds_done, make_state(rounds_done))
    path = workdir / "snapshots" / "00000020.snapshot"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with directory.open_run(workdir, FLAGS) as run:
        rounds_done, state = run.latest_snapshot(make_state())
        assert rounds_done == 10
        assert_same(state, make_state(10))
        assert "00000020.snapshot; that of round 10 is used instead" in run.notice
        assert run.snapshot_rounds == [0, 10]
    assert "00000020.snapshot.damaged" in names(workdir / "snapshots")


def test_torn_snapshots_with_nothing_before_them(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        run.log.append(make_rows(0, 5))
        for rounds_done in (0, 5):
            run.save_snapshot(rounds_done, make_state())
        for name, size in (("00000000", 0), ("00000005", 100)):
            path = workdir / "snapshots" / f"{name}.snapshot"
            path.write_bytes(path.read_bytes()[:size])
        assert run.latest_snapshot(make_state()) is None
        assert "00000005.snapshot, 00000000.snapshot; there is no earlier one" in run.notice


def test_newer_snapshot_format_is_refused(workdir, monkeypatch):
    with directory.open_run(workdir, FLAGS) as run:
        with monkeypatch.context() as patch:
            patch.setattr(snapshots, "FORMAT_VERSION", 2)
            run.save_snapshot(0, make_state())
        with pytest.raises(RunError, match=r"format version 2 .* up to 1: update zofl_jax"):
            run.latest_snapshot(make_state())
        assert run.snapshot_rounds == [0]


def test_what_snapshots_cannot_hold(workdir):
    with directory.open_run(workdir, FLAGS) as run:
        for leaf, kind in ((jax.random.key(0), "key<fry>"), (0.5, "float"), (np.array("a"), "<U1")):
            with pytest.raises(
                ValueError, match=f"leaf a/b .* must be an array of numbers.*{kind}"
            ):
                run.save_snapshot(0, {"a": {"b": leaf}})
        with pytest.raises(ValueError, match="same path"):
            run.save_snapshot(0, {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})
        with pytest.raises(ValueError, match="must be >= 0, got -1"):
            run.save_snapshot(-1, make_state())
        with pytest.raises(ValueError, match="keep must be >= 1"):
            run.save_snapshot(0, make_state(), keep=0)
        assert run.snapshot_rounds == []


# Summary and figures.


def test_summary_is_strict_json(workdir):
    summary = {
        "test_loss": math.nan,
        "history": [{"round": 1, "test_loss": np.float32(math.inf)}, {"train": (1, jnp.ones(2))}],
        "bytes_up": np.int64(2**40),
        "ok": np.bool_(True),
        "name": None,
    }
    with directory.open_run(workdir, FLAGS) as run:
        run.write_summary({"old": 1})
        run.write_summary(summary)
        expected = {
            "test_loss": None,
            "history": [{"round": 1, "test_loss": None}, {"train": [1, [1.0, 1.0]]}],
            "bytes_up": 2**40,
            "ok": True,
            "name": None,
        }
        assert run.read_summary() == expected
        with pytest.raises(ValueError, match="summary/history/0 must be plain JSON, got set"):
            run.write_summary({"history": [{1}]})
        assert run.read_summary() == expected
        (workdir / "summary.json").write_text("{")
        assert run.read_summary() is None


def test_figures_are_saved(workdir):
    figure = Figure()
    with directory.open_run(workdir, FLAGS) as run:
        path = run.save_figure("accuracy.png", figure)
        assert path == workdir / "accuracy.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in run.save_figure("accuracy.svg", figure).read_bytes()
        with pytest.raises(ValueError, match=r"plain file name, got 'a/b.png'"):
            run.save_figure("a/b.png", figure)
    assert not [name for name in names(workdir) if name.endswith(".tmp")]


def test_full_disk_is_reported(workdir, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with directory.open_run(workdir, FLAGS) as run:
        run.write_summary({"rounds": 1})
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(RunError, match=r"No space left on device.*disk is not full"):
            run.write_summary({"rounds": 2})
        with pytest.raises(RunError, match="No space left on device"):
            run.save_snapshot(0, make_state())
        assert run.read_summary() == {"rounds": 1}


# Kills.

KILLED_AT_EVERY_STEP = textwrap.dedent("""
    import os, signal, sys
    import numpy as np
    from zofl_jax.runs import directory

    def row(r):
        return directory.RoundRow(r, b"8 bytes!", bytes([r] * 20), 0.5, 1, 2, 3, 4, 5)

    def work(path, damage):
        flags = {"seed": 1, "rounds": len(path)}
        with directory.open_run(path, flags, may_change=("rounds",)) as run:
            if not run.snapshot_rounds:
                run.save_snapshot(0, {"x": np.zeros(3)})
            for r in range(run.log.last_round + 1, 2):
                run.log.append([row(r)], {r + 1: {"loss": float(r)}})
                run.save_snapshot(r + 1, {"x": np.full(3, r + 1.0)}, keep=1)
            run.write_summary({"rounds": 2})
            if damage:
                with open(run.path / "log.sqlite", "r+b") as file:
                    file.write(bytes(50))
        if damage:
            work(path, False)

    def check(path):
        with directory.open_run(path, {"seed": 1, "rounds": 0}, may_change=("rounds",)) as run:
            logged = run.log.rounds()
            assert logged == [row(r) for r in range(len(logged))], logged
            assert run.log.metrics() == {r + 1: {"loss": float(r)} for r in range(len(logged))}
            found = run.latest_snapshot({"x": np.zeros(3)})
            assert found is not None or not logged
            if found:
                assert len(logged) - 1 <= found[0] <= len(logged), (found, len(logged))
                assert found[1]["x"].tolist() == [found[0]] * 3
                assert run.snapshot_rounds[0] == 0
            assert run.read_summary() in (None, {"rounds": 2})
            assert "damaged" in (run.notice or "damaged")
        left = [name for _, _, names in os.walk(path) for name in names]
        assert not [name for name in left if name.endswith((".tmp", "-journal"))], left
        work(path, False)

    def killing(function, countdown, before):
        def wrapped(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if countdown[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        return wrapped

    os.fsync = lambda descriptor: None  # a kill loses nothing that was written, and it is slow
    step, status = 0, 1
    while status:
        step += 1
        for before in (True, False):
            path = f"{sys.argv[1]}/{step}-{before}"
            child = os.fork()
            if not child:
                countdown = [step]
                for name in ("replace", "fsync", "unlink", "rename", "mkdir", "remove"):
                    setattr(os, name, killing(getattr(os, name), countdown, before))
                work(path, True)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
            if os.path.exists(path):
                check(path)
    print(step)
""")


def test_killed_at_every_step_it_opens_again(tmp_path):
    """Kills a run before and after each call that changes the directory, and goes on with it."""
    output = run_python(KILLED_AT_EVERY_STEP, tmp_path)
    assert int(output) > 30


ENDLESS = textwrap.dedent("""
    import itertools, sys
    from zofl_jax.runs import directory

    run = directory.open_run(sys.argv[1], {})
    for r in itertools.count(run.log.last_round + 1):
        run.log.append([directory.RoundRow(r, b"8 bytes!", b"x" * 20, 0.5, 1, 2, 3, 4, 5)])
        print(r, flush=True)
""")


def test_killed_while_writing_the_log(workdir):
    """What was appended is there after kill -9, the lock is free, and little else is left."""
    logged = -1
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(workdir)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        with process:
            for line in process.stdout:
                if int(line) >= logged + 30:
                    break
            with pytest.raises(RunError, match=rf"in use by another process \(id {process.pid}\)"):
                directory.open_run(workdir, {})
            process.send_signal(signal.SIGKILL)
            said = [int(line), *map(int, process.stdout.read().split())]
        with directory.open_run(workdir, {}) as run:
            assert run.notice is None
            assert run.log.rounds() == make_rows(0, run.log.last_round + 1)
            assert said[-1] <= run.log.last_round <= said[-1] + 1
            logged = run.log.last_round
            # A journal that was not begun may lie there until the next append.
            assert sum(entry.stat().st_size for entry in workdir.glob("log.*")) < 20_000
            run.log.append(make_rows(logged + 1, logged + 2))
        assert names(workdir) == ["flags.json", "lock", "log.sqlite", "snapshots"]


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}


def run_python(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout
