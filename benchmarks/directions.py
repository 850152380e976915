"""Draws the accuracy by round of several kinds of directions, from comparisons.

    python -m experiments.compare --flagfile=experiments/flagfiles/directions_digits.flags \
        --workdir=runs/directions-digits
    python -m benchmarks.directions runs/directions-digits runs/directions-fashion

Each folder is the workdir of a comparison; it becomes a panel. The curves are saved in
`benchmarks/results/directions.json` and drawn in `docs/figures/directions.png`: the mean over the
seeds, and from the lowest to the highest of them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> None:
    """Reads the runs, saves their curves and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/directions.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/directions.png")
    options = parser.parse_args(argv)
    panels = [panel(workdir) for workdir in options.workdirs]
    options.out.write_text(json.dumps(panels, indent=1) + "\n")
    draw(panels).savefig(options.figure, format="png", dpi=120)


def panel(workdir: Path) -> dict[str, Any]:
    """Returns {"title", "curves": {method: {"round": [n], "accuracy": [seeds, n]}}}.

    Raises:
      SystemExit: for a folder without finished runs, or runs of different lengths.
    """
    paths = sorted(workdir.glob("*/*/summary.json"))
    if not paths:
        raise SystemExit(f"error: {workdir} holds no finished runs: give a comparison's workdir")
    curves: dict[str, dict[str, list]] = {}
    for path in paths:
        history = json.loads(path.read_text())["history"]
        curve = curves.setdefault(path.parts[-3], {"round": [], "accuracy": []})
        rounds = [row["round"] for row in history]
        if curve["round"] and curve["round"] != rounds:
            raise SystemExit(f"error: {path.parent} has other rounds than its seeds: finish it")
        curve["round"] = rounds
        curve["accuracy"].append([round(row["test_accuracy"], 4) for row in history])
    values = json.loads((paths[0].parent / "flags.json").read_text())
    data = Path(values["data_dir"]).name if values["data_dir"] else values["task"]
    title = f"{data}, {values['model']}, K={values['local_steps']}, P={values['num_perturbations']}"
    return {"title": title, "curves": curves}


def draw(panels: list[dict[str, Any]]) -> Figure:
    """Returns the figure of the panels side by side."""
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, one in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for name, curve in one["curves"].items():
            accuracy = np.array(curve["accuracy"])
            (line,) = axes.plot(curve["round"], accuracy.mean(0), label=name)
            low, high = accuracy.min(0), accuracy.max(0)
            axes.fill_between(curve["round"], low, high, alpha=0.15, color=line.get_color())
        axes.set(title=one["title"], xlabel="round", ylabel="test accuracy")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
