"""Writes the tables of the README, docs/scaling.md and docs/methods.md from committed results.

    python -m benchmarks.tables

Text between `<!-- NAME -->` and `<!-- end NAME -->` is replaced.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import activations, cost_model, plans, speed, without_a_card
from experiments import theory
from zofl_jax.observation.quantities import human_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FASHION = (
    ("fashion_iid_k1", "IID, K=1, P=10"),
    ("fashion_dirichlet_k1", "Dirichlet α=1, K=1, P=10"),
    ("fashion_iid_k4", "IID, K=4, P=20"),
    ("fashion_dirichlet_k4", "Dirichlet α=1, K=4, P=20"),
)


def main() -> None:
    """Rewrites README.md, docs/scaling.md and docs/methods.md."""
    write(
        ROOT / "README.md",
        {"results": fashion_table(), "theory": theory_table(), "speed": speed.table(RESULTS)},
    )
    write(
        ROOT / "docs" / "scaling.md",
        {
            "plans": plans.table(RESULTS),
            "without a card": without_a_card.table(RESULTS),
            "cost model": cost_model.table(RESULTS),
        },
    )
    write(ROOT / "docs" / "methods.md", {"activations": activations.table(RESULTS)})


def write(path: Path, tables: dict[str, str]) -> None:
    """Puts tables where a page has their names."""
    text = path.read_text()
    for name, content in tables.items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        try:
            start, end = text.index(opening) + len(opening), text.index(closing)
        except ValueError:
            raise SystemExit(f"error: {path.name} lacks {opening} or {closing}") from None
        text = f"{text[:start]}\n{content}{text[end:]}"
    path.write_text(text)


def fashion_table() -> str:
    """Returns the accuracies and the bytes of the Fashion-MNIST runs as Markdown."""
    lines = [
        "| | round 100 | round 400 | last round | a client sent | and received "
        "| the model in as many rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in FASHION:
        run = json.loads((RESULTS / f"{name}.json").read_text())
        by_round = {row["round"]: row["test_accuracy"] for row in run["history"]}
        last = run["history"][-1]
        cells = [
            *(f"{by_round[r]:.3f}" if r in by_round else "" for r in (100, 400)),
            f"{last['test_accuracy']:.3f} ({last['round']})",
            *(human_bytes(run[f"bytes_{kind}_per_client"]) for kind in ("up", "down", "fedavg")),
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def theory_table() -> str:
    """Returns the table that `experiments.theory` wrote."""
    results: dict[str, Any] = json.loads((RESULTS / "theory.json").read_text())
    return theory.table(results["points"], results["slopes"])


if __name__ == "__main__":
    main()
