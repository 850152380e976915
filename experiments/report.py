"""What a run leaves for people: its summary, its figures, its table on the console."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import config, methods
from zofl_jax.engine import passes, simulation
from zofl_jax.observation import plots
from zofl_jax.runs.directory import Run


def model_name(values: config.Values) -> str:
    """Returns the model's name for people: that of its file, where it is one."""
    kind, _, place = values["model"].partition(":")
    return Path(place).stem if kind == "gguf" else place or kind


def summarise(
    values: config.Values, experiment: config.Experiment, progress: simulation.Progress
) -> dict[str, Any]:
    """Returns the contents of `summary.json`."""
    book, history = progress.ledger, [record.row() for record in progress.history]
    phases = experiment.simulator.phases
    for row in history:
        spent = passes.total(phases, book.attended[: row["round"]])
        row |= {"forward_passes": spent.forward, "backward_passes": spent.backward}
        row["bytes_first_sync"] = sum(book.first_syncs[: row["round"]])
    last: dict[str, Any] = history[-1] if history else {}
    accuracies = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    rounds_done, computed = book.num_rounds, passes.total(phases, book.attended)
    params = progress.state.params
    return {
        "algorithm": values["algorithm"],
        "task": values["task"],
        "model": values["model"],
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "rounds": rounds_done,
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "best_test_accuracy": max(accuracies, default=None),
        "minimum_loss": experiment.minimum,
        "history": history,
        "messages_rejected": book.rejected,
        "epsilon": last.get("epsilon"),
        "delta": values["dp_delta"] if last.get("epsilon") is not None else None,
        "num_clients": book.num_clients,
        "bytes_up_per_client": book.per_client(book.totals.up),
        "bytes_down_per_client": book.per_client(book.totals.down),
        "bytes_seed_per_client": book.per_client(book.totals.seed),
        "bytes_broadcast_per_client": book.per_client(book.totals.broadcast),
        "bytes_catch_up_per_client": book.per_client(book.totals.catch_up),
        "bytes_first_sync_per_client": book.per_client(book.totals.first_sync),
        "bytes_fedavg_per_client": book.per_client(book.dense_bytes),
        "forward_passes": computed.forward,
        "backward_passes": computed.backward,
        "memory_bytes": experiment.simulator.memory_bytes(),
        "compile_seconds": experiment.simulator.compile_seconds(),
        "run_seconds": progress.run_seconds,
        "seconds_per_round": progress.run_seconds / max(rounds_done, 1),
        "device": f"{jax.devices()[0].device_kind} x {experiment.simulator.num_devices}",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Returns the releases that a result depends on."""
    names = ("zofl-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def save_figures(run: Run, task_name: str, summary: dict[str, Any]) -> None:
    """Draws accuracy against rounds and bytes; nothing before the first evaluation."""
    if not summary["history"]:
        return
    title = f"{summary['algorithm']} on {task_name} ({model_name(summary)})"
    run.save_figure("rounds.png", plots.accuracy_against_rounds(summary["history"], title))
    dense = summary["bytes_fedavg_per_client"] * summary["num_clients"] / summary["rounds"]
    run.save_figure("bytes.png", plots.accuracy_against_bytes(summary["history"], dense, title))


def print_table(summary: dict[str, Any]) -> None:
    """Prints the last evaluations, the diagnoses, and what was sent."""
    print(
        f"{summary['algorithm']} on {summary['task']}: {model_name(summary)}, "
        f"{summary['num_params']:,} params, {summary['num_clients']} clients"
    )
    print(
        f"{'round':>7} {'train loss':>11} {'test loss':>10} {'accuracy':>9} {'up':>9} {'down':>9}"
    )
    history = summary["history"]
    # Ten rows, evenly spread, the last one included.
    step = max(1, math.ceil(len(history) / 10))
    for row in history[::-1][::step][::-1]:
        accuracy = "" if row["test_accuracy"] is None else f"{row['test_accuracy']:.4f}"
        clients = summary["num_clients"]
        print(
            f"{row['round']:>7} {row['train_loss']:>11.4g} {row['test_loss']:>10.4g} "
            f"{accuracy:>9} {plots.human_bytes(row['bytes_up'] / clients):>9} "
            f"{plots.human_bytes(row['bytes_down'] / clients):>9}"
        )
    _print_diagnoses(summary.get("diagnoses", []))
    up, down = summary["bytes_up_per_client"], summary["bytes_down_per_client"]
    dense = summary["bytes_fedavg_per_client"]
    print(
        f"A client sent {plots.human_bytes(up)} and received {plots.human_bytes(down)} (of these "
        f"{plots.human_bytes(summary['bytes_catch_up_per_client'])} catching up and "
        f"{plots.human_bytes(summary['bytes_first_sync_per_client'])} for the initial model)."
    )
    if summary["algorithm"] in methods.ZEROTH_ORDER and up + down < dense:
        print(
            "Exchanging the model in as many rounds would have cost it "
            f"{plots.human_bytes(dense)}. FedAvg, which does, needs fewer rounds: "
            "`make demo` measures both to one accuracy."
        )
    print(
        f"{summary['seconds_per_round'] * 1e3:.3g} ms a round on {summary['device']}; "
        f"compilation took {summary['compile_seconds']:.1f} s."
    )
    if summary.get("messages_rejected"):
        print(f"The server rejected {summary['messages_rejected']} messages.")
    if summary.get("epsilon") is not None:
        print(f"Privacy spent: ε = {summary['epsilon']:.3g} at δ = {summary['delta']:g}.")


def _print_diagnoses(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = {
        "effective_rank": "effective rank",
        "top_eigenvalue": "top eigenvalue",
        "snr": "SNR",
        "stability": "stability",
        "client_variance": "client variance",
    }
    if rows:
        print(f"{'round':>7} " + " ".join(f"{title:>15}" for title in columns.values()))
    for row in rows:
        shown = [math.nan if row[name] is None else row[name] for name in columns]
        print(f"{row['round']:>7} " + " ".join(f"{value:>15.4g}" for value in shown))
