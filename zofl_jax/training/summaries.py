"""A run in numbers: the contents of `summary.json`, and the same as a table for people."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from zofl_jax.engine import passes, simulation
from zofl_jax.observation.quantities import human_bytes


class About(NamedTuple):
    """What a summary says of a run beside its rounds.

    Attributes:
      algorithm, model: their names, "" where they have none.
      task: its name, that of the simulator's task unless given.
      minimum_loss: the least test loss there can be, where it is known.
      delta: δ of differential privacy, where ε is accounted for.
    """

    algorithm: str = ""
    task: str = ""
    model: str = ""
    minimum_loss: float | None = None
    delta: float | None = None


def summarise(
    simulator: simulation.Simulator, progress: simulation.Progress, about: About | None = None
) -> dict[str, Any]:
    """Returns the contents of `summary.json`, but for what only the run directory knows.

    Args:
      simulator: of the run.
      progress: how far it is; its state must not be consumed.
      about: names and more.
    """
    about = about or About()
    book, history = progress.ledger, [record.row() for record in progress.history]
    phases = simulator.phases
    for row in history:
        spent = passes.total(phases, book.attended[: row["round"]])
        row |= {"forward_passes": spent.forward, "backward_passes": spent.backward}
        row["bytes_first_sync"] = sum(book.first_syncs[: row["round"]])
    last: dict[str, Any] = history[-1] if history else {}
    accuracies = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    rounds_done, computed = book.num_rounds, passes.total(phases, book.attended)
    return {
        "algorithm": about.algorithm,
        "task": about.task or simulator.task.name,
        "model": about.model,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(progress.state.params)),
        "rounds": rounds_done,
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "best_test_accuracy": max(accuracies, default=None),
        "minimum_loss": about.minimum_loss,
        "history": history,
        "messages_rejected": book.rejected,
        "epsilon": last.get("epsilon"),
        "delta": about.delta if last.get("epsilon") is not None else None,
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
        "memory_bytes": simulator.memory_bytes(),
        "compile_seconds": simulator.compile_seconds(),
        "run_seconds": progress.run_seconds,
        "seconds_per_round": progress.run_seconds / max(rounds_done, 1),
        "device": f"{jax.devices()[0].device_kind} x {simulator.placement.num_devices}",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Returns the releases that a result depends on."""
    names = ("zofl-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def model_name(model: str) -> str:
    """Returns a model's name for people: that of its file, where it is one.

    >>> model_name("gguf:models/SmolLM2-135M.gguf"), model_name("hf:org/name"), model_name("mlp")
    ('SmolLM2-135M', 'org/name', 'mlp')
    """
    kind, _, place = model.partition(":")
    return Path(place).stem if kind == "gguf" else place or kind


def title(summary: Mapping[str, Any], task_name: str) -> str:
    """Returns what to write over the figures of a run.

    >>> title({"algorithm": "decomfl", "model": "mlp"}, "digits")
    'decomfl on digits (mlp)'
    >>> title({"algorithm": "", "model": ""}, "digits")
    'digits'
    """
    method = f"{summary['algorithm']} on " if summary["algorithm"] else ""
    model = f" ({model_name(summary['model'])})" if summary["model"] else ""
    return f"{method}{task_name}{model}"


def table(summary: Mapping[str, Any], remark: str = "") -> str:
    """Returns the last evaluations, the diagnoses and what was sent, as lines of text.

    Args:
      summary: as in `summary.json`.
      remark: a line to put after what was sent.
    """
    method = f"{summary['algorithm']} on " if summary["algorithm"] else ""
    model = f"{model_name(summary['model'])}, " if summary["model"] else ""
    sent = [_sent(summary), remark] if remark else [_sent(summary)]
    lines = [
        f"{method}{summary['task']}: {model}{summary['num_params']:,} params, "
        f"{summary['num_clients']} clients",
        *_evaluations(summary["history"], summary["num_clients"]),
        *_diagnoses(summary.get("diagnoses", [])),
        *sent,
        f"{summary['seconds_per_round'] * 1e3:.3g} ms a round on {summary['device']}; "
        f"compilation took {summary['compile_seconds']:.1f} s.",
    ]
    if summary.get("messages_rejected"):
        lines.append(f"The server rejected {summary['messages_rejected']} messages.")
    if summary.get("epsilon") is not None:
        delta = summary.get("delta")
        at = "" if delta is None else f" at δ = {delta:g}"
        lines.append(f"Privacy spent: ε = {summary['epsilon']:.3g}{at}.")
    return "\n".join(lines)


def _evaluations(history: Sequence[Mapping[str, Any]], num_clients: int) -> list[str]:
    lines = [
        f"{'round':>7} {'train loss':>11} {'test loss':>10} {'accuracy':>9} {'up':>9} {'down':>9}"
    ]
    # Ten rows, evenly spread, the last one included.
    step = max(1, math.ceil(len(history) / 10))
    for row in history[::-1][::step][::-1]:
        loss = "" if row["test_loss"] is None else f"{row['test_loss']:.4g}"
        accuracy = "" if row["test_accuracy"] is None else f"{row['test_accuracy']:.4f}"
        lines.append(
            f"{row['round']:>7} {row['train_loss']:>11.4g} {loss:>10} "
            f"{accuracy:>9} {human_bytes(row['bytes_up'] / num_clients):>9} "
            f"{human_bytes(row['bytes_down'] / num_clients):>9}"
        )
    return lines


def _sent(summary: Mapping[str, Any]) -> str:
    up, down, catch_up, first_sync = (
        human_bytes(summary[f"bytes_{kind}_per_client"])
        for kind in ("up", "down", "catch_up", "first_sync")
    )
    return (
        f"A client sent {up} and received {down} (of these {catch_up} catching up and "
        f"{first_sync} for the initial model)."
    )


def _diagnoses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = {
        "effective_rank": "effective rank",
        "top_eigenvalue": "top eigenvalue",
        "snr": "SNR",
        "stability": "stability",
        "client_variance": "client variance",
    }
    if not rows:
        return []
    lines = [f"{'round':>7} " + " ".join(f"{name:>15}" for name in columns.values())]
    for row in rows:
        shown = [math.nan if row[name] is None else row[name] for name in columns]
        figures = ("–" if math.isnan(value) else f"{value:.4g}" for value in shown)
        lines.append(f"{row['round']:>7} " + " ".join(f"{figure:>15}" for figure in figures))
    return lines
