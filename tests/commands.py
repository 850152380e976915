"""Runs the entry points as a user does, and reads what they leave behind."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import matplotlib
import programs

ROOT = Path(__file__).parents[1]

# Runs commands of one entry point one after the other, each as it would end in a process of its
# own. A line of the input holds folder and arguments; one of the output says how that ended.
IN_TURN = """
import gc, importlib, json, os, sys, tempfile, traceback
from absl.testing import flagsaver
from experiments import entry

name = sys.argv[1]
main = importlib.import_module(f"experiments.{name}").main
gc.set_threshold(100_000, 20, 20)  # as in conftest.py
answers, console = os.fdopen(os.dup(1), "w"), os.dup(2)
for line in sys.stdin:
    folder, arguments = json.loads(line)
    os.chdir(folder)
    sys.argv, code = [name, *arguments], 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            with flagsaver.flagsaver():
                entry.run(main)
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else end.code or 0
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(console, 1)
        os.dup2(console, 2)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    print(json.dumps([code, *said]), file=answers, flush=True)
"""

TIMEOUT_SECONDS = 1800.0  # ends what hangs; a command takes seconds on a machine of its own


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class InTurn:
    """A process in which commands of one entry point run one after the other."""

    def __init__(self, name, environment):
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_TURN, name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder, arguments):
        timer = threading.Timer(TIMEOUT_SECONDS, self._process.kill)
        timer.start()
        try:
            print(json.dumps([str(folder), arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the process ended with status {self._process.wait()} at {arguments}"
        return Ended(*json.loads(line))

    @property
    def ended(self):
        return self._process.poll() is not None

    def close(self):
        timer = threading.Timer(TIMEOUT_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.communicate()  # the end of its input ends it
        finally:
            timer.cancel()


class Processes:
    """The processes in which commands run in turn: one for each entry point and environment."""

    def __init__(self):
        self._started = {}

    def of(self, name, environment):
        key = (name, *sorted(environment.items()))
        if key in self._started and self._started[key].ended:  # a command has broken it
            self._started.pop(key).close()
        if key not in self._started:
            self._started[key] = InTurn(name, environment)
        return self._started[key]

    def close(self):
        for process in self._started.values():
            process.close()


class Commands:
    """Runs the entry points in a folder, with a cache of compiled functions.

    A command has a process of its own, as a user's has, except for those run `in_turn`: they
    start in a fraction of the time, in a process that has run others before. Each entry point,
    and whatever is promised of processes, needs a test with processes of its own.

    Args:
      folder: where the commands run.
      cache: the folder for what they compile.
      processes: those for commands in turn.
      quick: compile as the tests do, in half the time.
    """

    def __init__(self, folder: Path, cache: Path, processes: Processes | None = None, quick=False):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
            "MPLCONFIGDIR": matplotlib.get_cachedir(),  # where the list of fonts is
        }
        # With the last two no tests would share a process: pytest names the test there, and an
        # import sets the other.
        for name in ("JAX_COMPILATION_CACHE_DIR", "PYTEST_CURRENT_TEST", "CRC32C_SW_MODE"):
            self.environment.pop(name, None)
        if not quick:
            self.environment["XLA_FLAGS"] = programs.users_flags()
        self._processes = processes

    def start(self, *command):
        # A shell's background job ignores Ctrl-C, and what it starts would inherit that.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command):
        with self.start(*command) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_SECONDS)
            except BaseException:
                process.kill()
                raise
        return Ended(process.returncode, out, err)

    def in_turn(self, name, *arguments):
        """Runs a command of the entry point `name` in a process that others have run in.

        `train` and `compare` draw no figures, which take as long as many a test's rounds, unless
        --figures says.
        """
        return self._processes.of(name, self.environment).run(
            self.folder, _without_figures(name, arguments)
        )

    def train(self, *arguments):
        return self.run("-m", "experiments.train", *arguments)

    def replay(self, *arguments):
        return self.run("-m", "experiments.replay", *arguments)

    def evaluate(self, *arguments):
        return self.run("-m", "experiments.evaluate", *arguments)

    def export(self, *arguments):
        return self.run("-m", "experiments.export", *arguments)

    def train_each(self, list_of_arguments):
        """Runs commands of `train` in one process, which is new."""
        with contextlib.closing(InTurn("train", self.environment)) as process:
            return [
                process.run(self.folder, _without_figures("train", arguments))
                for arguments in list_of_arguments
            ]


def _without_figures(name, arguments):
    draws = name in ("train", "compare") and "--figures" not in arguments
    figures = ("--nofigures",) if draws else ()
    return (*arguments, *figures)


def stray_lines(err):
    """Returns what is on the console beside the states of the progress bar."""
    pieces = re.split(r"[\r\n]", err)
    return [
        p for p in pieces if p.strip() and not re.fullmatch(r" *\d+%\|.*\| \d+/\d+ \[.*\] *", p)
    ]


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def num_logged(workdir):
    """Returns the number of rounds in the log of a run that may be going on."""
    uri = f"{(workdir / 'log.sqlite').absolute().as_uri()}?mode=ro"
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(uri, uri=True)) as connection,
    ):
        return connection.execute("SELECT count(*) FROM rounds").fetchone()[0]
    return 0
