"""From the summaries of runs to the table and the curves of a comparison.

A method's cost to a target accuracy is that of its first evaluation at or above the target:
rounds, bytes and passes of all clients together, and the seconds of its rounds. A run that
diverged reaches no target, whatever it had reached before.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from zofl_jax.core import Passes
from zofl_jax.engine import passes
from zofl_jax.observation import plots

COLUMNS = (
    "algorithm",
    "seed",
    "learning_rate",
    "rounds_to_target",
    "bytes_up",
    "bytes_down",
    "forward_passes",
    "backward_passes",
    "seconds",
    "best_accuracy",
    "target",
    "chosen",
    "final_accuracy",
    "rounds",
    "memory_bytes",
    "diverged_round",
    "bytes_first_sync",
)
"""Of table.csv; `bytes_first_sync` is a part of `bytes_down`. Costs are empty where the target was
not reached; `chosen` marks the runs at the learning rate that the method's row in the table is made
of."""

COSTS = (*COLUMNS[3:6], "bytes_first_sync", *COLUMNS[6:9])
MISSING = "–"
HEADINGS = (
    *("method", "learning rate", "best accuracy", "rounds", "bytes up", "bytes down"),
    *("of these, first model", "forward passes", "backward passes", "seconds", "memory"),
)
FIRST_MODEL = (
    "The first model is what a client receives when it first takes part: from methods that send "
    "scalars the initial one, which clients may hold already (a pretrained one) or make from a "
    "seed; from methods that send models that of the round."
)


class Result(NamedTuple):
    """A run of a comparison."""

    method: str
    seed: int
    learning_rate: float
    summary: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether it ended before its last round, or far above its start."""
        return self.summary.get("diverged_round") is not None

    @property
    def best_accuracy(self) -> float:
        """Of all evaluations; NaN if there was none."""
        best = self.summary["best_test_accuracy"]
        return math.nan if best is None else best


def best_rate(results: Sequence[Result]) -> float:
    """Returns the learning rate of the best accuracy; of equals, the one that was there first.

    Runs that diverged come last.

    Raises:
      ValueError: without a result.
    """
    if not results:
        raise ValueError("the best of no results was asked for: give at least one")

    def merit(result: Result) -> tuple[bool, float, float]:
        accuracy = result.best_accuracy
        history = result.summary["history"]
        at = [row["round"] for row in history if row["test_accuracy"] == accuracy]
        return not result.diverged, -1.0 if math.isnan(accuracy) else accuracy, -min(at, default=0)

    return max(results, key=merit).learning_rate


def cut(summary: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Returns the summary of a run as far as its first `rounds` rounds tell.

    >>> rows = [{"round": n, "test_accuracy": n / 10} for n in (2, 4)]
    >>> summary = {"rounds": 4, "history": rows, "history_seconds": [1.0, 2.0], "diverged_round": 4}
    >>> cut(summary, 3)["best_test_accuracy"], "diverged_round" in cut(summary, 3)
    (0.2, False)
    """
    kept = [row["round"] <= rounds for row in summary["history"]]
    history = [row for row, keep in zip(summary["history"], kept, strict=True) if keep]
    seconds = [s for s, keep in zip(summary["history_seconds"], kept, strict=True) if keep]
    accuracies = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    found = {**summary, "history": history, "history_seconds": seconds}
    found["best_test_accuracy"] = max(accuracies, default=None)
    found["test_accuracy"] = history[-1]["test_accuracy"] if history else None
    found["rounds"] = min(summary["rounds"], rounds)
    if found.get("diverged_round", 0) > rounds:
        del found["diverged_round"]
    return found


def cost_to(result: Result, target: float) -> dict[str, float | None]:
    """Returns `COSTS` of a run to its first evaluation at `target` or above, None if not reached.

    >>> row = {"round": 5, "test_accuracy": 0.8, "bytes_up": 10, "bytes_down": 20}
    >>> row |= {"bytes_first_sync": 15, "forward_passes": 50, "backward_passes": 0}
    >>> run = Result("decomfl", 0, 0.1, {"history": [row], "history_seconds": [2.0]})
    >>> list(cost_to(run, 0.7).values()), cost_to(run, 0.9)["seconds"]
    ([5, 10, 20, 15, 50, 0, 2.0], None)
    """
    summary = result.summary
    for row, seconds in zip(summary["history"], summary["history_seconds"], strict=True):
        accuracy = row["test_accuracy"]
        if not result.diverged and accuracy is not None and accuracy >= target:
            # Summaries of earlier versions lack the bytes of first synchronisation.
            found = (row["round"], *(row.get(name) for name in COSTS[1:-1]), seconds)
            return dict(zip(COSTS, found, strict=True))
    return dict.fromkeys(COSTS)


def rows(
    results: Sequence[Result], chosen: Mapping[str, float], targets: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns the rows of table.csv: one for each run and target.

    Args:
      results: all runs, those at other learning rates too.
      chosen: method -> its learning rate.
      targets: accuracies.
    """
    return [
        {
            "algorithm": result.method,
            "seed": result.seed,
            "learning_rate": result.learning_rate,
            **cost_to(result, target),
            "best_accuracy": result.best_accuracy,
            "target": target,
            "chosen": result.learning_rate == chosen.get(result.method),
            "final_accuracy": result.summary["test_accuracy"],
            "rounds": result.summary["rounds"],
            "memory_bytes": result.summary["memory_bytes"],
            "diverged_round": result.summary.get("diverged_round"),
        }
        for result in results
        for target in targets
    ]


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV; None and NaN are empty, truth is 1 and 0."""

    def plain(value: Any) -> Any:
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return "" if missing else int(value) if isinstance(value, bool) else value

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([plain(row[name]) for name in COLUMNS] for row in table)
    return file.getvalue()


def as_markdown(
    table: Sequence[Mapping[str, Any]], grids: Mapping[str, Sequence[float]], heading: str
) -> str:
    """Returns the table for people: a part for each target, mean ± standard deviation over seeds.

    Args:
      table: from `rows`.
      grids: method -> the learning rates it tried.
      heading: what all methods share.
    """
    targets = list(dict.fromkeys(row["target"] for row in table))
    methods = list(dict.fromkeys(row["algorithm"] for row in table))
    lines = [heading, ""]
    for target in targets:
        cells: list[Sequence[str]] = [HEADINGS]
        for method in methods:
            own = [
                row
                for row in table
                if (row["algorithm"], row["target"]) == (method, target) and row["chosen"]
            ]
            if own:
                cells.append(_cells(method, own))
        lines += [f"To a test accuracy of {100 * target:g} %:", "", *_aligned(cells), ""]
    lines += _remarks(table, grids)
    return "\n".join(lines).rstrip() + "\n"


def figures(
    results: Sequence[Result],
    chosen: Mapping[str, float],
    targets: Sequence[float],
    title: str,
) -> dict[str, Figure]:
    """Returns file name -> figure: accuracy against rounds, bytes, forward passes and seconds.

    `exchange.png` has what was sent and what was received apart, and their sum without the first
    model that a client receives.


    Lines are means over the seeds at the chosen learning rates, bands the least and the most.
    """
    taken: dict[str, list[Result]] = {}
    for result in results:
        if result.learning_rate == chosen.get(result.method):
            taken.setdefault(result.method, []).append(result)

    def curves(x: Callable[[Mapping[str, Any], float], float]) -> dict[str, plots.Curve]:
        found = {method: _curve(runs, x) for method, runs in taken.items()}
        return {method: curve for method, curve in found.items() if len(curve.x)}

    def drawn(name: str, x: Callable[[Mapping[str, Any], float], float], label: str) -> Figure:
        logarithmic = name != "rounds"
        return plots.comparison(
            curves(x),
            label,
            title,
            targets,
            logarithmic=logarithmic,
            number=plots.human_bytes if name == "bytes" else "{:g}".format,
        )

    def computed(row: Mapping[str, Any], seconds: float) -> float:
        del seconds
        return passes.in_forward_passes(Passes(row["forward_passes"], row["backward_passes"]))

    def beside_the_first_model(row: Mapping[str, Any], seconds: float) -> float:
        del seconds
        first = row.get("bytes_first_sync", math.nan)
        return row["bytes_up"] + row["bytes_down"] - first

    exchanged = {
        "sent, all clients": curves(lambda row, _: row["bytes_up"]),
        "received, all clients": curves(lambda row, _: row["bytes_down"]),
        "both, without the first model": curves(beside_the_first_model),
    }
    return {
        "exchange.png": plots.comparison_panels(exchanged, title, targets, plots.human_bytes),
        "rounds.png": drawn("rounds", lambda row, _: row["round"], "round"),
        "bytes.png": drawn(
            "bytes",
            lambda row, _: row["bytes_up"] + row["bytes_down"],
            "bytes exchanged, up and down, all clients",
        ),
        "forward_passes.png": drawn(
            "forward_passes", computed, "forward passes, all clients; a backward pass counts as two"
        ),
        "seconds.png": drawn("seconds", lambda row, seconds: seconds, "seconds of the rounds"),
    }


def _curve(runs: Sequence[Result], x: Callable[[Mapping[str, Any], float], float]) -> plots.Curve:
    """Returns the mean over runs, as far as all of them came."""
    points = [
        [
            (x(row, seconds), row["test_accuracy"])
            for row, seconds in zip(
                run.summary["history"], run.summary["history_seconds"], strict=True
            )
        ]
        for run in runs
    ]
    common = min(len(run) for run in points)
    values = np.array([run[:common] for run in points], float).reshape(len(points), common, 2)
    y = values[..., 1]
    return plots.Curve(values[..., 0].mean(axis=0), y.mean(axis=0), y.min(axis=0), y.max(axis=0))


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table, aligned so that a console shows it too.

    >>> _aligned([("method", "rounds"), ("decomfl", "7")])
    ['| method  | rounds |', '|---------|--------|', '| decomfl | 7      |']
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _cells(method: str, own: Sequence[Mapping[str, Any]]) -> list[str]:
    reached = [row for row in own if row["rounds_to_target"] is not None]
    formats: dict[str, Callable[[float], str]] = dict.fromkeys(COSTS, _count)
    formats |= {name: plots.human_bytes for name in COSTS if name.startswith("bytes_")}
    formats["seconds"] = "{:.3g}".format
    cells = [_mean([row[name] for row in reached], formats[name]) for name in COSTS]
    if 0 < len(reached) < len(own):
        cells[0] += f" ({len(reached)} of {len(own)} seeds)"
    accuracy = _mean([row["best_accuracy"] for row in own], "{:.3f}".format)
    memory = max(row["memory_bytes"] for row in own)
    return [method, f"{own[0]['learning_rate']:g}", accuracy, *cells, plots.human_bytes(memory)]


def _mean(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    finite = [value for value in values if value is not None and not math.isnan(value)]
    if not finite:
        return MISSING
    mean = text(float(np.mean(finite)))
    if len(finite) == 1 or not any(finite):
        return mean
    deviation = float(np.std(finite, ddof=1))
    return f"{mean} ± {text(deviation) if deviation else 0}"


def _count(value: float) -> str:
    """Returns a count in three figures.

    >>> _count(7), _count(43210), _count(2.5e6)
    ('7', '43.2 k', '2.5 M')
    """
    return plots.human_bytes(value).removesuffix("B").rstrip()


def _remarks(table: Sequence[Mapping[str, Any]], grids: Mapping[str, Sequence[float]]) -> list[str]:
    lines = []
    for method, rates in grids.items():
        own = {
            (row["learning_rate"], row["seed"]): row for row in table if row["algorithm"] == method
        }
        bad = [
            f"{rate:g} (seed {seed}, round {row['diverged_round']})"
            for (rate, seed), row in own.items()
            if row["diverged_round"] is not None
        ]
        if bad:
            lines.append(f"- {method} diverged at the learning rate {', '.join(bad)}.")
        chosen = {row["learning_rate"] for row in own.values() if row["chosen"]}
        ends = {min(rates), max(rates)} if len(rates) > 1 else set()
        lines += [
            f"- {method}: the best learning rate, {rate:g}, is at an end of its grid."
            for rate in chosen & ends
        ]
    return lines
