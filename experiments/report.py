"""What the commands tell people of a run: its names, its table, what to do if it fails."""

from typing import Any

from experiments import config, methods
from zofl_jax.observation import plots
from zofl_jax.training import summaries
from zofl_jax.training.observers import Advice, to_stderr


def note(sentence: str) -> None:
    """Tells the user, above a progress bar if there is one."""
    to_stderr(f"note: {sentence}")


def about(values: config.Values, experiment: config.Experiment) -> summaries.About:
    """Returns what the summary says of a run beside its rounds."""
    return summaries.About(
        values["algorithm"],
        values["task"],
        values["model"],
        experiment.minimum,
        values["dp_delta"],
    )


def advice(values: config.Values, rate: str = "") -> Advice:
    """Returns what to do where a run fails.

    Args:
      values: its flags.
      rate: what to type where its learning rate is to blame, the end of a sentence.
    """
    start = Advice().start
    if values["attack"] != "none":
        start += f", or leave out --attack={values['attack']}"
    if values["estimator"] in ("forward", "central"):
        start += f", or type --smoothing={values['smoothing'] / 10:.3g} (a tenth)"
    return Advice(rate, start)


def print_table(summary: dict[str, Any]) -> None:
    """Prints the last evaluations, the diagnoses, and what was sent."""
    dense, remark = summary["bytes_fedavg_per_client"], ""
    exchanged = summary["bytes_up_per_client"] + summary["bytes_down_per_client"]
    if summary["algorithm"] in methods.ZEROTH_ORDER and exchanged < dense:
        remark = (
            "Exchanging the model in as many rounds would have cost it "
            f"{plots.human_bytes(dense)}. FedAvg, which does, needs fewer rounds: "
            "`make demo` measures both to one accuracy."
        )
    print(summaries.table(summary, remark))
