"""Several processes on the loopback are one run: its bits, its stops, its refusals."""

import contextlib
import os
import signal
import socket
import sqlite3
import time

import jax
import numpy as np
import pytest
from commands import TIMEOUT_SECONDS, Commands, Ended, num_logged, stray_lines, summary_of

from experiments import launch_local
from zofl_jax.engine import processes

ROUNDS = 120
# Clients of unequal sizes, and a cohort that two devices can't share evenly.
TRAIN = (
    *("--task=digits", "--partition=dirichlet", "--num_clients=10", "--clients_per_round=3"),
    *("--local_steps=1", "--num_perturbations=2", "--batch_size=8", "--learning_rate=0.005"),
    *("--eval_every=5", f"--rounds={ROUNDS}", "--workdir=run"),
)
LAUNCH = ("-m", "experiments.launch_local", "--processes=2", "--", *TRAIN)
# The same, which writes down the ids of the processes that it starts.
LAUNCH_AND_TELL = """
import subprocess

from absl import app
from experiments import launch_local


class Told(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        with open("started", "a") as file:
            print(self.pid, file=file)


subprocess.Popen = Told
app.run(launch_local.main)
"""


@pytest.fixture
def commands(tmp_path, cache, processes):
    return Commands(tmp_path, cache, processes, quick=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run of two processes that nothing interrupted: its folder and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    ended = Commands(folder, cache, quick=True).run(*LAUNCH)
    assert ended.code == 0, ended.err
    return folder / "run", ended


@pytest.fixture(scope="module")
def here(tmp_path_factory, cache):
    """Folder of the run's first rounds in one process, with one device and with two."""
    folder = tmp_path_factory.mktemp("here")
    plain = [*TRAIN[:-2], "--rounds=40"]
    for end in Commands(folder, cache, quick=True).train_each(
        [[*plain, "--devices=2", "--workdir=two"], [*plain, "--devices=1", "--workdir=one"]]
    ):
        assert end.code == 0, end.err
    return folder


def logged(run):
    """Returns the rows of the log, and its metrics but the times."""
    with contextlib.closing(sqlite3.connect(run / "log.sqlite")) as connection:
        rows = connection.execute("SELECT * FROM rounds ORDER BY 1").fetchall()
        metrics = connection.execute("SELECT round, name, value FROM metrics").fetchall()
    return rows, {(r, name): value for r, name, value in metrics if name != "run_seconds"}


def broadcasts(run):
    with contextlib.closing(sqlite3.connect(run / "log.sqlite")) as connection:
        rows = connection.execute("SELECT broadcast FROM rounds ORDER BY round").fetchall()
    return np.stack([np.frombuffer(row[0], "<f4") for row in rows])


def pair(commands, other_commands, *arguments, others=()):
    """Returns how two processes ended; `others` are flags of the second one alone."""
    with launch_local.reserved_port() as port, contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                own.start(
                    *("-m", "experiments.train", "--distributed", "--devices=1", *arguments, *more),
                    *(f"--coordinator=127.0.0.1:{port}", "--num_processes=2"),
                    f"--process_id={index}",
                )
            )
            for index, (own, more) in enumerate([(commands, ()), (other_commands, others)])
        ]
        for process in started:
            stack.callback(process.kill)
        return [
            Ended(process.returncode, out, err)
            for process in started
            for out, err in [process.communicate(timeout=TIMEOUT_SECONDS)]
        ]


def test_two_processes_give_the_bits_of_two_devices_and_the_scalars_of_one(whole, here):
    run, ended = whole
    assert stray_lines(ended.err) == []
    assert f"{ROUNDS}/{ROUNDS}" in ended.err and "Figures, log and summary are in run" in ended.out
    assert summary_of(run)["device"] == "cpu x 2"
    assert {path.name for path in run.iterdir()} >= {"summary.json", "rounds.png", "labels.png"}

    rows, metrics = logged(here / "two")
    all_rows, all_metrics = logged(run)
    assert rows == all_rows[:40]
    common = metrics.keys() & all_metrics.keys()
    assert {"test_loss", "test_accuracy", "train_loss"} <= {name for _, name in common}
    assert {key: metrics[key] for key in common} == {key: all_metrics[key] for key in common}
    one = broadcasts(here / "one")
    np.testing.assert_allclose(broadcasts(run)[:40], one, atol=1e-3 * np.abs(one).max())


def stopped(commands, rounds, stop, launch=LAUNCH):
    """Returns how a launch ended that was stopped after so many more rounds."""
    run = commands.folder / "run"
    before = num_logged(run)
    with commands.start(*launch) as process:
        try:
            while num_logged(run) < before + rounds and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None, process.communicate()
            stop(process, int((run / "lock").read_text()))
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            process.terminate()  # which ends the processes it has started too
    assert before + rounds <= num_logged(run) < ROUNDS
    return Ended(process.returncode, out, err)


def test_a_killed_run_goes_on_with_the_same_bits_and_stops_together(whole, commands):
    def kill_the_follower(process, leader):
        first, follower = map(int, (commands.folder / "started").read_text().split())
        assert first == leader
        os.kill(follower, signal.SIGKILL)

    ended = stopped(commands, 7, kill_the_follower, ("-c", LAUNCH_AND_TELL, *LAUNCH[2:]))
    assert ended.code == 1
    assert "the same command goes on from the last logged round" in ended.err

    ended = stopped(commands, 8, lambda process, leader: process.send_signal(signal.SIGINT))
    assert ended.code == 130
    assert [line for line in stray_lines(ended.err) if "resuming" not in line] == [
        "stopped; the same command goes on from here"
    ]
    rows, metrics = logged(commands.folder / "run")
    all_rows, all_metrics = logged(whole[0])
    assert rows == all_rows[: len(rows)]
    common = metrics.keys() & all_metrics.keys()
    assert "params_fingerprint" in {name for _, name in common}
    assert {key: metrics[key] for key in common} == {key: all_metrics[key] for key in common}


def test_flags_that_differ_are_refused_by_both(commands):
    for ended in pair(commands, commands, *TRAIN, others=["--seed=1"]):
        assert ended.code == 1 and ended.out.count("\n") <= 1
        assert ended.err == (
            "error: --seed differs between process 0 and process 1: give every process the same\n"
        )
    assert not (commands.folder / "run").exists()


def test_what_one_process_lacks_ends_both(commands, tmp_path_factory, cache):
    """The hosts share no file system: the data are missing on the second."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 255, (40, 4, 4), np.uint8), np.arange(40) % 2
    np.savez(
        commands.folder / "data.npz",
        **{"x_train": images, "y_train": labels, "x_test": images, "y_test": labels},
    )
    elsewhere = Commands(tmp_path_factory.mktemp("elsewhere"), cache, quick=True)
    arguments = ("--task=npz", "--data_dir=data.npz", "--num_clients=4", "--batch_size=4")
    leader, follower = pair(
        commands, elsewhere, *arguments, "--clients_per_round=2", "--workdir=run"
    )
    assert (leader.code, follower.code) == (1, 1)
    assert "data.npz" in follower.err and "error: process 1: " in leader.err
    assert "data.npz" in stray_lines(leader.err)[-1]
    assert list(elsewhere.folder.iterdir()) == []


def test_a_process_waits_for_the_others_no_longer_than_told(commands):
    with launch_local.reserved_port() as port:
        ended = commands.train(
            *("--distributed", f"--coordinator=127.0.0.1:{port}", "--wait_seconds=1"),
            *("--num_processes=2", "--process_id=0"),
        )
    assert ended.code == 1
    assert ended.err.startswith("error: the processes have not come together within 1 seconds")


def test_a_launch_ends_with_the_status_of_what_failed(commands):
    ended = commands.run("-m", "experiments.launch_local", "--processes=1", "--", "--task=nonsense")
    assert ended.code == 1 and "--task=nonsense" in ended.err
    assert list(commands.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, None), "num_processes and process_id must be given too"),
        (("h", 2, 0), "must be HOST:PORT, got 'h'"),
        (("h:1", 2, 2), r"process_id must be in \[0, num_processes = 2\), got 2"),
        (("h:1", 0, 0), "num_processes must be >= 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_joining_is_refused_once_jax_is_used():
    jax.devices()
    with pytest.raises(processes.ProcessError, match="before JAX is used for the first time"):
        processes.join("127.0.0.1:1", 2, 0, wait_seconds=1)


def test_the_port_is_nobody_elses():
    with launch_local.reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        assert port > 0


def test_params_split_over_processes_are_trained_evaluated_and_resumed(commands, here):
    """Two processes of two devices, the weights over all four: no process has them all."""
    mesh = "--mesh=clients:1,model:4"
    launch = ("-m", "experiments.launch_local", "--processes=2", "--devices_per_process=2", "--")
    flags = (*TRAIN[:-2], mesh, "--workdir=split", "--nofigures")
    for rounds in (4, 10):
        ended = commands.run(*launch, *flags, f"--rounds={rounds}")
        assert ended.code == 0, ended.err
    assert "no process has the whole params" not in ended.err  # the last snapshot was of round 4
    split, one = commands.folder / "split", here / "one"
    assert summary_of(split)["device"] == "cpu x 4"
    np.testing.assert_allclose(broadcasts(split), broadcasts(one)[:10], atol=2e-3)
    values, expected = (
        {name: value for (r, name), value in logged(run)[1].items() if r == 10 and "test" in name}
        for run in (split, one)
    )
    assert values["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-4)
