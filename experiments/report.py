"""What the commands tell people of a run."""

from typing import Any

from zofl_jax.algorithms import METHODS
from zofl_jax.observation.quantities import human_bytes
from zofl_jax.training import summaries


def print_table(summary: dict[str, Any]) -> None:
    """Prints the last evaluations, the diagnoses, and what was sent."""
    dense, remark = summary["bytes_fedavg_per_client"], ""
    exchanged = summary["bytes_up_per_client"] + summary["bytes_down_per_client"]
    if METHODS[summary["algorithm"]].order == 0 and exchanged < dense:
        remark = (
            "Exchanging the model in as many rounds would have cost it "
            f"{human_bytes(dense)}. FedAvg, which does, needs fewer rounds: "
            "`make demo` measures both to one accuracy."
        )
    print(summaries.table(summary, remark))
