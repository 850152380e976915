"""Runs the entry points as a user does, and reads what they leave behind."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

ROOT = Path(__file__).parents[1]

# Runs commands of `train` one after the other in one process, as each would end on its own.
SEVERAL_COMMANDS = """
import contextlib, io, json, sys
from absl.testing import flagsaver
from experiments import entry, train

for arguments in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["train", *arguments]
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry.run(train.main)
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else end.code or 0
            err.write(end.code + "\\n" if isinstance(end.code, str) else "")
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Commands:
    """Runs the entry points in a folder, with a cache of compiled functions."""

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "MPLCONFIGDIR": matplotlib.get_cachedir(),  # where the list of fonts is
        }
        self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start(self, *command, stdin=subprocess.DEVNULL):
        # A shell's background job ignores Ctrl-C, and what it starts would inherit that.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command, stdin=None):
        process = self.start(*command, stdin=subprocess.PIPE)
        out, err = process.communicate(stdin, timeout=300)
        return Ended(process.returncode, out, err)

    def train(self, *arguments):
        return self.run("-m", "experiments.train", *arguments)

    def replay(self, *arguments):
        return self.run("-m", "experiments.replay", *arguments)

    def evaluate(self, *arguments):
        return self.run("-m", "experiments.evaluate", *arguments)

    def export(self, *arguments):
        return self.run("-m", "experiments.export", *arguments)

    def train_each(self, list_of_arguments):
        ended = self.run("-c", SEVERAL_COMMANDS, stdin=json.dumps(list_of_arguments))
        assert ended.code == 0, ended.err
        return [Ended(*json.loads(line)) for line in ended.out.splitlines()]


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
