"""The goals for speed and memory, and what the committed results say about them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

MISSING = "not measured"


class Goal(NamedTuple):
    """One figure to reach: at most, or at least, a limit."""

    result: str  # the file's name without .json
    path: tuple[str, ...]  # of keys in it
    limit: float
    at_least: bool = False
    of: str = "the bound"  # what the figure is a multiple of

    @property
    def wanted(self) -> str:
        """The goal in words."""
        if self.at_least:
            return f"≥ {self.limit:g}x faster than {self.of}"
        percent = self.of == "run time"
        figure = f"{100 * self.limit:g} %" if percent else f"{self.limit:g}x"
        return f"≤ {figure} of {self.of}" if percent else f"≤ {figure} {self.of}"

    def found(self, folder: Path) -> float | None:
        """Returns the figure, None if there is no result of that name or no such key in it."""
        file = folder / f"{self.result}.json"
        if not file.exists():
            return None
        value: Any = json.loads(file.read_text())
        for key in self.path:
            if key not in value:
                return None
            value = value[key]
        return float(value)

    def shown(self, figure: float) -> str:
        """Returns a figure as the table shows it, not rounded to a limit that it misses."""
        if self.of == "run time":
            return f"{100 * figure:.1f} %"
        short = f"{figure:.3g}"
        return f"{short if self.reached(float(short)) == self.reached(figure) else figure:.4}x"

    def reached(self, figure: float) -> bool:
        """Returns whether a figure is good enough."""
        return figure >= self.limit if self.at_least else figure <= self.limit


BOUND, PYTORCH = ("ratio_to_bound",), "the PyTorch form"


def _over_bound(config: str, variant: str, limit: float, prefix: str = "round") -> Goal:
    return Goal(f"{prefix}_{config}_{variant}", BOUND, limit)


def _over_pytorch(config: str, variant: str, limit: float) -> Goal:
    return Goal(f"compare_{config}", ("ratio", "plain", variant), limit, True, PYTORCH)


def _projection(config: str) -> Goal:
    path = ("speedup_over_differences",)
    return Goal(f"round_{config}_projection", path, 3, True, "central")


def _memory(variant: str, clients: int, limit: float) -> Goal:
    of = "params and the bound's activations"
    return Goal("memory", ("multiples", f"{variant}_{clients}"), limit, of=of)


CNN = "MNIST CNN, 10 clients, batch 32, central"
DECODER = "135M decoder, 2 clients × 16 × 40 tokens, forward, K=1, P=5"
GOALS: tuple[tuple[str, tuple[Goal, ...]], ...] = (
    (
        f"{CNN}, K=1, P=10",
        (_over_bound("cnn", "gaussian", 1.25), _over_pytorch("cnn", "gaussian", 2)),
    ),
    (
        "the same, K=4, P=20",
        (_over_bound("cnn-k4", "gaussian", 1.35), _over_pytorch("cnn-k4", "gaussian", 4.5)),
    ),
    ("projection instead of central, K=1, P=10", (_projection("cnn"),)),
    ("the same, K=4, P=20", (_projection("cnn-k4"),)),
    (
        f"{DECODER}: low rank 1",
        (
            _over_bound("decoder-135m", "low_rank", 1.10),
            _over_pytorch("decoder-135m", "low_rank", 4.5),
        ),
    ),
    ("… Rademacher", (_over_bound("decoder-135m", "rademacher", 1.35),)),
    (
        "… Gaussian",
        (
            _over_bound("decoder-135m", "gaussian", 1.7),
            _over_pytorch("decoder-135m", "gaussian", 3),
        ),
    ),
    (
        "… products of bfloat16 factors, low rank 1",
        (
            _over_bound("decoder-135m-bf16", "low_rank", 1.10),
            _over_pytorch("decoder-135m-bf16", "low_rank", 4.5),
        ),
    ),
    (
        "… the same, Gaussian",
        (
            _over_bound("decoder-135m-bf16", "gaussian", 1.7),
            _over_pytorch("decoder-135m-bf16", "gaussian", 3),
        ),
    ),
    (
        "… low rank 1, 100 clients in the population",
        (
            Goal(
                "compare_decoder-135m",
                ("population", "ratio", "plain", "low_rank"),
                20,
                True,
                PYTORCH,
            ),
        ),
    ),
    ("… low rank 1, K=4, 8 clients", (_over_bound("decoder-135m-k4", "low_rank", 1.3),)),
    *(
        (
            f"peak memory, 135M, {clients} clients: {name}",
            (_memory(variant, clients, limit),),
        )
        for name, variant, limit in (
            ("low rank 1", "low_rank", 1.2),
            ("Rademacher", "rademacher", 2.1),
            ("Gaussian", "gaussian", 2.1),
        )
        for clients in (2, 64)
    ),
    (
        "population of 10² → 10⁶ clients, 10 a round",
        (Goal("population", ("ratio_last_to_first",), 1.1, of="the round time"),),
    ),
    (
        "500 rounds of the digits demo: dispatch overhead",
        (Goal("dispatch", ("overhead",), 0.05, of="run time"),),
    ),
    (
        "GPU: CNN, K=4, P=20, low rank 1 / Gaussian",
        (
            _over_bound("cnn-k4", "low_rank", 1.15, "gpu"),
            _over_bound("cnn-k4", "gaussian", 1.5, "gpu"),
        ),
    ),
    (
        "GPU: OPT-1.3B shape, bfloat16, 8 clients × 16 × 64, P=5, low rank 1 / Gaussian",
        (
            _over_bound("opt-1.3b", "low_rank", 1.15, "gpu"),
            _over_bound("opt-1.3b", "gaussian", 1.5, "gpu"),
        ),
    ),
)
"""The rows of the table, each with its goals."""


def table(folder: Path) -> str:
    """Returns the goals and what was measured as Markdown."""
    lines = ["| | to reach | measured | reached |", "|---|---|---|---|"]
    for label, goals in GOALS:
        for goal in goals:
            figure = goal.found(folder)
            if figure is None:
                measured, reached = MISSING, ""
            else:
                measured, reached = goal.shown(figure), "yes" if goal.reached(figure) else "**no**"
            lines.append(f"| {label} | {goal.wanted} | {measured} | {reached} |")
            label = ""
    return "\n".join(lines) + "\n"
