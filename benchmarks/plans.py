"""The table of plans from the committed files, each written by `experiments.plan --out`."""

import json
from pathlib import Path

from zofl_jax.engine.exhaustion import in_words


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
        cells = [
            plan["flags"]["architecture"],
            f"{mesh['clients'] * mesh['model']} {plan['device']}",
            f"{mesh['clients']} x {mesh['model']}",
            f"{in_words(memory['needed'])} of {in_words(memory['limit'])}",
            f"{plan['flops_a_round']:.2e}",
            in_words(plan["memory_traffic_bytes_a_device"]),
            in_words(plan["sent_bytes_a_device"]),
            ", ".join(f"{1000 * seconds:.3g}" for seconds in times.values()) + " ms",
            plan["saturates_first"],
            f"{plan['clients_a_second_at_most']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
