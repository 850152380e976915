"""All rows for a machine with an accelerator, the most telling first, in a few minutes.

    python -m benchmarks.accelerator --out=FILE.jsonl

Each row is a program of its own (`benchmarks.round`, `benchmarks.compare_pytorch`, a run of
`experiments.train`), so that one that fails, or hangs, costs one row. Its result is printed as a
line of JSON, and appended to the file, as soon as it is there. Rows that can't begin within
`--budget_s` are told as left out. Nothing needs a network: the row of SmolLM2 is left out where
`make smollm2 reviews` has not fetched its files, and that of PyTorch where it isn't installed.

Compilation is timed without the persistent cache. The bound is the fastest of several batches of
forward passes, up to 4,096 images or all texts of a round, with the same products.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measuring
from zofl_jax.data import cache
from zofl_jax.data.text import SCORED

ROOT = Path(__file__).parent.parent
SMOLLM2_ROUNDS = 1000


class Row(NamedTuple):
    """A measurement.

    Attributes:
      name: of the row.
      goal: what it should reach, in words.
      limit_s: after which it is ended.
      command: arguments of the Python interpreter, for a folder to write to.
      read: what stands in the folder afterwards -> the row's figures.
      ready: whether what it needs is there.
    """

    name: str
    goal: str
    limit_s: float
    command: Callable[[Path], Sequence[str]]
    read: Callable[[Path], dict[str, Any]]
    ready: Callable[[], bool] = lambda: True


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures row by row."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="a file to append a line of JSON a row to")
    made.add_argument("--budget_s", type=float, default=345.0, help="seconds for all rows")
    made.add_argument("--rows", default="", help="a regular expression: only rows that match")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    options = made.parse_args(argv)
    found = []
    for result in measured(rows(options.smoke), options.rows, options.budget_s):
        line = json.dumps(result)
        print(line, flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(line + "\n")
        found.append(result)
    return found


def measured(all_rows: Sequence[Row], pattern: str, budget_s: float) -> Iterator[dict[str, Any]]:
    """Yields the result of each row whose name matches, as soon as it is there."""
    began = time.monotonic()
    for row in all_rows:
        if not re.search(pattern, row.name):
            continue
        left = budget_s - (time.monotonic() - began)
        result: dict[str, Any] = {"row": row.name, "goal": row.goal}
        if not row.ready():
            yield result | {"left_out": "what it needs is not installed"}
        elif left <= 0:
            yield result | {"left_out": f"no time is left of {budget_s:g} s"}
        else:
            yield result | _run(row, min(left, row.limit_s))


def _run(row: Row, limit_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                [sys.executable, *row.command(folder)],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"ended after {limit_s:.0f} s"}
        wall = {"wall_s": round(time.monotonic() - began, 1)}
        if done.returncode:
            return wall | {"failure": done.stderr.strip()[-500:]}
        try:
            return wall | row.read(folder)
        except (OSError, ValueError, KeyError) as error:
            return wall | {"failure": f"its result can't be read: {error!r}"}


def rows(smoke: bool) -> list[Row]:
    """Returns the rows, the most telling first."""
    decoder, opt = "decoder-135m", "opt-1.3b"
    return [
        _round("cnn-k4", "low_rank", "<= 1.15 of the bound", smoke),
        _round(decoder, "low_rank", "<= 1.10 of the bound, compiled in 15 s", smoke),
        _round("cnn-k4", "gaussian", "<= 1.4 of the bound", smoke),
        _pytorch("cnn-k4", "low_rank,gaussian", smoke),
        _round("cnn", "gaussian", "<= 1.4 of the bound", smoke),
        _round(opt, "low_rank", "<= 1.08 of the bound, memory <= 1.3 of the params + bound", smoke),
        _smollm2(smoke),
        _round(decoder, "gaussian", "<= 1.5 of the bound", smoke),
        _round(opt, "gaussian", "<= 1.3 of the bound", smoke),
    ]


def _round(config: str, variant: str, goal: str, smoke: bool) -> Row:
    flags = (f"--config={config}", f"--variant={variant}")
    return Row(f"round {config} {variant}", goal, 120, _benchmark("round", flags, smoke), _json)


def _pytorch(config: str, variants: str, smoke: bool) -> Row:
    flags = (f"--config={config}", f"--variants={variants}")
    command = _benchmark("compare_pytorch", flags, smoke)

    def ready() -> bool:
        return importlib.util.find_spec("torch") is not None

    goal = ">= 100 times the authors' form"
    return Row(f"PyTorch {config}", goal, 120, command, _json, ready)


def _benchmark(name: str, flags: Sequence[str], smoke: bool) -> Callable[[Path], Sequence[str]]:
    """Returns the command of a benchmark whose result `_json` reads."""
    size = "--smoke" if smoke else f"--repeats={measuring.LEAST_REPEATS}"
    return lambda folder: [
        *("-m", f"benchmarks.{name}", *flags, size, f"--out={folder / 'found.json'}")
    ]


def _smollm2(smoke: bool) -> Row:
    """The reviews by all eight clients along 32 directions, 1,000 rounds."""

    def command(folder: Path) -> list[str]:
        rounds = 1 if smoke else SMOLLM2_ROUNDS
        size = ["--max_length=8", "--test_examples=8", "--batch_size=1"] if smoke else []
        return [
            *("-m", "experiments.train", "--task=reviews", "--perturbation=low_rank"),
            *("--clients_per_round=8", "--num_perturbations=32", "--learning_rate=6e-4"),
            *(f"--rounds={rounds}", f"--eval_every={max(1, rounds // 10)}", "--noprogress"),
            *("--matmul_dtype=bfloat16", f"--workdir={folder / 'run'}", *size),
        ]

    def read(folder: Path) -> dict[str, Any]:
        summary = json.loads((folder / "run" / "summary.json").read_text())
        names = ("rounds", "total_seconds", "seconds_per_round", "compile_seconds", "device")
        return {name: summary[name] for name in (*names, "test_accuracy")}

    def ready() -> bool:
        texts = cache.reviews() / SCORED["reviews"].file
        return cache.language_model().is_file() and texts.is_file()

    goal = "1,000 rounds in 3 minutes, compilation included"
    return Row("SmolLM2 reviews", goal, 200, command, read, ready)


def _json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


if __name__ == "__main__":
    main()
