"""From the summaries of runs to the table and the curves of a comparison.

A method's cost to a target accuracy is that of its first evaluation at or above the target:
rounds, bytes and passes of all clients together, and the seconds of its rounds. A run that
diverged reaches no target, whatever it had reached before. Passes are of batches, and together
they are told as forward ones (`Passes`).
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from zofl_jax import core
from zofl_jax.engine import passes
from zofl_jax.observation import fronts
from zofl_jax.observation.quantities import human_bytes, human_count

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
    "batch_size",
    *("run_bytes_up", "run_bytes_down", "run_bytes_first_sync"),
    *("run_forward_passes", "run_backward_passes", "run_seconds"),
    *("trial_bytes_up", "trial_bytes_down", "trial_forward_passes", "trial_backward_passes"),
)
"""Of table.csv; `bytes_first_sync` is a part of `bytes_down`. Costs are empty where the target was
not reached; those of `run_` are of the whole run, those of `trial_` of its rounds as a trial of its
learning rate, empty where it was none. `chosen` marks the runs at the learning rate that the
method's row in the table is made of."""

COSTS = (*COLUMNS[3:6], "bytes_first_sync", *COLUMNS[6:9])
WHOLE = COSTS[1:]
TRIAL = ("bytes_up", "bytes_down", "forward_passes", "backward_passes")
MISSING = "–"
HEADINGS = (
    *("method", "learning rate", "best accuracy", "rounds", "bytes up", "bytes down"),
    *("of these, first model", "forward passes", "backward passes"),
)
FIRST_MODEL = (
    "The first model is what a client receives when it first takes part: from methods that send "
    "scalars the initial one, which clients may hold already (a pretrained one) or make from a "
    "seed; from methods that send models that of the round."
)


class Passes(NamedTuple):
    """How forward and backward passes are told as one number.

    Attributes:
      backward_cost: forward passes that a backward pass counts as.
      by_example: whether a pass counts as often as its batch has examples: for methods whose
        batches differ, and for budgets of such passes.
    """

    backward_cost: float = 2.0
    by_example: bool = False

    def together(self, forward: int, backward: int, batch_size: int) -> float:
        """Returns forward and backward passes of batches as one number.

        >>> Passes().together(10, 1, batch_size=32), Passes(1.5, True).together(2, 2, batch_size=8)
        (12.0, 40.0)
        """
        count = passes.in_forward_passes(core.Passes(forward, backward), self.backward_cost)
        return float(count * (batch_size if self.by_example else 1))

    @property
    def heading(self) -> str:
        """What stands over such numbers."""
        return "example-passes" if self.by_example else "in forward passes"

    @property
    def sentence(self) -> str:
        """How they are counted."""
        cost = "two forward ones" if self.backward_cost == 2 else f"{self.backward_cost:g} forward"
        if self.by_example:
            return (
                "Example-passes are forward passes times the examples of a batch; a backward pass "
                f"counts as {cost}."
            )
        return f"In forward passes, a backward pass counts as {cost}."


class Result(NamedTuple):
    """A run of a comparison."""

    method: str
    seed: int
    learning_rate: float
    summary: Mapping[str, Any]
    batch_size: int

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

    What it spent is that of its last evaluation there.

    >>> rows = [{"round": n, "test_accuracy": n / 10, "forward_passes": 5 * n} for n in (2, 4)]
    >>> summary = {"rounds": 4, "history": rows, "history_seconds": [1.0, 2.0], "diverged_round": 4}
    >>> found = cut(summary, 3)
    >>> found["best_test_accuracy"], found["forward_passes"], "diverged_round" in found
    (0.2, 10, False)
    """
    kept = [row["round"] <= rounds for row in summary["history"]]
    history = [row for row, keep in zip(summary["history"], kept, strict=True) if keep]
    seconds = [s for s, keep in zip(summary["history_seconds"], kept, strict=True) if keep]
    accuracies = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    last: Mapping[str, Any] = history[-1] if history else {}
    found = {**summary, "history": history, "history_seconds": seconds}
    found["best_test_accuracy"] = max(accuracies, default=None)
    found["test_accuracy"] = last.get("test_accuracy")
    found["rounds"] = min(summary["rounds"], rounds)
    found["forward_passes"] = last.get("forward_passes", 0)
    found["backward_passes"] = last.get("backward_passes", 0)
    for kind in ("up", "down", "first_sync"):
        spent = last.get(f"bytes_{kind}", None if last else 0)
        found[f"bytes_{kind}_per_client"] = spent and spent / summary["num_clients"]
    found["run_seconds"] = seconds[-1] if seconds else 0.0
    if found.get("diverged_round", 0) > rounds:
        del found["diverged_round"]
    return found


def whole_cost(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns `WHOLE`: what all clients together spent in a run, to its last round.

    None stands for what summaries of earlier versions lack.

    >>> per_client = {"bytes_up_per_client": 2.5, "bytes_down_per_client": 9.0}
    >>> per_client |= {"bytes_first_sync_per_client": 4.0, "num_clients": 4}
    >>> computed = {"forward_passes": 60, "backward_passes": 0, "run_seconds": 1.5}
    >>> spent = whole_cost(per_client | computed)
    >>> spent["bytes_up"], spent["bytes_down"], spent["forward_passes"], spent["seconds"]
    (10, 36, 60, 1.5)
    """
    found: dict[str, float | None] = {}
    for kind in ("up", "down", "first_sync"):
        mean = summary.get(f"bytes_{kind}_per_client")
        found[f"bytes_{kind}"] = None if mean is None else round(mean * summary["num_clients"])
    found |= {name: summary[name] for name in ("forward_passes", "backward_passes")}
    return {**found, "seconds": summary["run_seconds"]}


def cost_to(result: Result, target: float) -> dict[str, float | None]:
    """Returns `COSTS` of a run to its first evaluation at `target` or above, None if not reached.

    >>> row = {"round": 5, "test_accuracy": 0.8, "bytes_up": 10, "bytes_down": 20}
    >>> row |= {"bytes_first_sync": 15, "forward_passes": 50, "backward_passes": 0}
    >>> run = Result("decomfl", 0, 0.1, {"history": [row], "history_seconds": [2.0]}, 32)
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
    results: Sequence[Result],
    chosen: Mapping[str, float],
    targets: Sequence[float],
    trials: Sequence[Result] = (),
) -> list[dict[str, Any]]:
    """Returns the rows of table.csv: one for each run and target.

    Args:
      results: all runs, those at other learning rates too.
      chosen: method -> its learning rate.
      targets: accuracies.
      trials: those of them that tried a learning rate, as far as they went then.
    """
    tried = {(trial.method, trial.seed, trial.learning_rate): trial for trial in trials}
    table = []
    for result in results:
        spent = whole_cost(result.summary)
        trial = tried.get((result.method, result.seed, result.learning_rate))
        as_trial = whole_cost(trial.summary) if trial else {}
        of_run = {
            **{f"run_{name}": spent[name] for name in WHOLE},
            **{f"trial_{name}": as_trial.get(name) for name in TRIAL},
        }
        table += [
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
                "batch_size": result.batch_size,
                **of_run,
            }
            for target in targets
        ]
    return table


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
    table: Sequence[Mapping[str, Any]],
    grids: Mapping[str, Sequence[float]],
    heading: str,
    counted: Passes,
    within: str = "",
) -> str:
    """Returns the table for people: whole runs, then a part for each target.

    Cells are mean ± standard deviation over seeds. What tuning took is the sum over all trials of
    a method, that of the rate that was chosen included.

    Args:
      table: from `rows`.
      grids: method -> the learning rates it tried.
      heading: what all methods share.
      counted: how passes are told together.
      within: the budget of each run, "" without one.
    """
    targets = list(dict.fromkeys(row["target"] for row in table))
    methods = list(dict.fromkeys(row["algorithm"] for row in table))
    whole = f"Within {within}:" if within else "In all rounds:"
    tuning = ("tuning: bytes", f"tuning: {counted.heading}")
    headings = (*HEADINGS, counted.heading, "seconds")
    cells: list[Sequence[str]] = [(*headings, "memory", *tuning)]
    for method in methods:
        of_method = [
            row for row in table if (row["algorithm"], row["target"]) == (method, targets[0])
        ]
        if any(row["chosen"] for row in of_method):
            cells.append(_whole_cells(method, of_method, counted))
    lines = [heading, "", whole, "", *_aligned(cells), ""]
    for target in targets:
        cells = [(*headings, "memory")]
        for method in methods:
            own = [
                row
                for row in table
                if (row["algorithm"], row["target"]) == (method, target) and row["chosen"]
            ]
            if own:
                cells.append(_cells(method, own, counted))
        lines += [f"To a test accuracy of {100 * target:g} %:", "", *_aligned(cells), ""]
    lines += _remarks(table, grids)
    return "\n".join(lines).rstrip() + "\n"


def figures(
    results: Sequence[Result],
    chosen: Mapping[str, float],
    targets: Sequence[float],
    title: str,
    counted: Passes,
) -> dict[str, Figure]:
    """Returns file name -> figure, see `fronts.pareto`: who is ahead at which cost.

    `pareto.png` has bytes and passes, `exchange.png` what was sent and what was received apart, and
    their sum without the first model that a client receives; `rounds.png` and `seconds.png` these.

    Lines are means over the seeds at the chosen learning rates, bands the least and the most.
    """
    taken: dict[str, list[Result]] = {}
    for result in results:
        if result.learning_rate == chosen.get(result.method):
            taken.setdefault(result.method, []).append(result)

    def panel(label: str, x: Cost, number: Callable[[float], str]) -> fronts.Panel:
        found = {method: _curve(runs, x) for method, runs in taken.items()}
        shown = {method: curve for method, curve in found.items() if len(curve.x)}
        return fronts.Panel(label, shown, number)

    def computed(row: Mapping[str, Any], seconds: float, batch_size: int) -> float:
        del seconds
        return counted.together(row["forward_passes"], row["backward_passes"], batch_size)

    def beside_the_first_model(row: Mapping[str, Any], *rest: float) -> float:
        del rest
        first = row.get("bytes_first_sync", math.nan)
        return row["bytes_up"] + row["bytes_down"] - first

    def both_ways(row: Mapping[str, Any], *rest: float) -> float:
        del rest
        return row["bytes_up"] + row["bytes_down"]

    unit = "example-passes" if counted.by_example else "forward passes"
    cost = "two" if counted.backward_cost == 2 else f"{counted.backward_cost:g}"
    panels = {
        "pareto.png": (
            panel("bytes up and down, all clients", both_ways, human_bytes),
            panel(f"{unit}, a backward one as {cost}, all clients", computed, human_count),
        ),
        "exchange.png": (
            panel("sent, all clients", lambda row, *_: row["bytes_up"], human_bytes),
            panel("received, all clients", lambda row, *_: row["bytes_down"], human_bytes),
            panel("both, without the first model", beside_the_first_model, human_bytes),
        ),
        "rounds.png": (panel("round", lambda row, *_: row["round"], human_count),),
        "seconds.png": (
            panel("seconds of the rounds", lambda row, seconds, _: seconds, "{:g}".format),
        ),
    }
    return {name: fronts.pareto(row, title, targets) for name, row in panels.items()}


Cost = Callable[[Mapping[str, Any], float, int], float]
"""(evaluation, seconds to it, batch size) -> what it had cost until then."""


def _curve(runs: Sequence[Result], x: Cost) -> fronts.Curve:
    """Returns the mean over runs, as far as all of them came."""
    points = [
        [
            (x(row, seconds, run.batch_size), row["test_accuracy"])
            for row, seconds in zip(
                run.summary["history"], run.summary["history_seconds"], strict=True
            )
        ]
        for run in runs
    ]
    common = min(len(run) for run in points)
    values = np.array([run[:common] for run in points], float).reshape(len(points), common, 2)
    y = values[..., 1]
    return fronts.Curve(values[..., 0].mean(axis=0), y.mean(axis=0), y.min(axis=0), y.max(axis=0))


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


def _cells(method: str, own: Sequence[Mapping[str, Any]], counted: Passes) -> list[str]:
    """Returns the cells of a method's costs to a target."""
    reached = [row for row in own if row["rounds_to_target"] is not None]
    cells = _cost_cells(reached, counted)
    if 0 < len(reached) < len(own):
        cells[0] += f" ({len(reached)} of {len(own)} seeds)"
    return [*_first_cells(method, own), *cells, _memory(own)]


def _whole_cells(method: str, runs: Sequence[Mapping[str, Any]], counted: Passes) -> list[str]:
    """Returns the cells of a method's whole runs, and of what tuning took."""
    own = [row for row in runs if row["chosen"]]
    whole = [
        {"batch_size": row["batch_size"], "rounds_to_target": row["rounds"]}
        | {name: row[f"run_{name}"] for name in WHOLE}
        for row in own
    ]
    trials = [row for row in runs if row["trial_bytes_up"] is not None]
    tuning = [MISSING, MISSING]
    if trials:
        spent = {name: sum(row[f"trial_{name}"] for row in trials) for name in TRIAL}
        together = counted.together(
            spent["forward_passes"], spent["backward_passes"], trials[0]["batch_size"]
        )
        tuning = [human_bytes(spent["bytes_up"] + spent["bytes_down"]), human_count(together)]
    return [*_first_cells(method, own), *_cost_cells(whole, counted), _memory(own), *tuning]


def _first_cells(method: str, own: Sequence[Mapping[str, Any]]) -> list[str]:
    accuracy = _mean([row["best_accuracy"] for row in own], "{:.3f}".format)
    return [method, f"{own[0]['learning_rate']:g}", accuracy]


def _memory(own: Sequence[Mapping[str, Any]]) -> str:
    return human_bytes(max(row["memory_bytes"] for row in own))


def _cost_cells(costs: Sequence[Mapping[str, Any]], counted: Passes) -> list[str]:
    """Returns `COSTS` as cells, mean ± deviation, passes together before the seconds."""
    formats: dict[str, Callable[[float], str]] = dict.fromkeys(COSTS, human_count)
    formats |= {name: human_bytes for name in COSTS if name.startswith("bytes_")}
    together = [
        counted.together(row["forward_passes"], row["backward_passes"], row["batch_size"])
        for row in costs
    ]
    cells = [_mean([row[name] for row in costs], formats[name]) for name in COSTS[:-1]]
    seconds = [row["seconds"] for row in costs]
    return [*cells, _mean(together, human_count), _mean(seconds, "{:.3g}".format)]


def _mean(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    finite = [value for value in values if value is not None and not math.isnan(value)]
    if not finite:
        return MISSING
    mean = text(float(np.mean(finite)))
    if len(finite) == 1 or not any(finite):
        return mean
    deviation = float(np.std(finite, ddof=1))
    return f"{mean} ± {text(deviation) if deviation else 0}"


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
