"""The table of plans from the committed files, each written by `experiments.plan --out`."""

import json
from pathlib import Path

from zofl_jax.engine.exhaustion import in_words
from zofl_jax.planning.plans import UNKNOWN


def table(results: Path) -> str:
    """Returns what the files of a folder say, as Markdown.

    Args:
      results: whose folder "plans" holds them.
    """
    lines = [
        "| model | devices | clients x model | memory of a device | FLOPs of a round | traffic "
        "| sent by a device | at its peak: compute, memory, interconnect | first "
        "| clients a second at most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted((results / "plans").glob("*.json")):
        plan = json.loads(path.read_text())
        memory, mesh, times = plan["memory_bytes_a_device"], plan["mesh"], plan["seconds_at_peak"]
        estimated = "" if plan.get("compiled", True) else ", estimated, not compiled"
        clients = plan["clients_a_second_at_most"]
        cells = [
            plan["flags"]["architecture"],
            f"{mesh['clients'] * mesh['model']} {plan['device']}{estimated}",
            f"{mesh['clients']} x {mesh['model']}",
            f"{in_words(memory['needed'])} of {in_words(memory['limit'])}",
            f"{plan['flops_a_round']:.2e}",
            _size(plan["memory_traffic_bytes_a_device"]),
            _size(plan["sent_bytes_a_device"]),
            ", ".join(UNKNOWN if s is None else f"{1000 * s:.3g}" for s in times.values()) + " ms",
            plan["saturates_first"] or UNKNOWN,
            UNKNOWN if clients is None else f"{clients:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(size: int | None) -> str:
    return UNKNOWN if size is None else in_words(size)
