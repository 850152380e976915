"""Trains with a federated algorithm, from flags.

    python -m experiments.train --flagfile=experiments/flagfiles/digits.flags

The run directory (`--workdir`) holds the flags, the log, snapshots, `summary.json` and the
figures. The same command again resumes a stopped run, to the same bits.

With `--distributed` the same command runs on every host of a TPU pod or a GPU cluster, and
process 0 alone does all that is not rounds; `experiments.launch_local` tries it on one machine.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from experiments import config, distributed, entry
from zofl_jax import ledger, plots, recording, simulation
from zofl_jax.processes import Team
from zofl_jax.runs import Run, RunError, open_run

flags.DEFINE_string(
    "workdir", None, "Run directory; a name made from the flags under runs/ unless given."
)
flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events to WORKDIR/tensorboard.")
flags.DEFINE_bool("progress", True, "Show a progress bar.")
flags.DEFINE_integer(
    "devices",
    None,
    "Devices that the clients of a round are shared out over. Unless given, all accelerators; on a "
    "CPU its cores for convolutional models, 1 for others. With --distributed, of each process.",
    lower_bound=1,
)

MAY_CHANGE = ("rounds", "eval_every")
"""Flags that may differ when a run is resumed: they change no round already done."""

SNAPSHOT_SECONDS = 60.0

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the experiment that the flags describe."""
    values = config.resolve()
    if FLAGS.distributed:
        distributed.run(
            {**values, "devices": FLAGS.devices},
            lead=lambda team: _main(values, team),
            simulator=lambda: config.build(values, FLAGS.devices).simulator,
        )
    else:
        _main(values)


def _main(values: config.Values, team: Team | None = None) -> None:
    workdir = Path(FLAGS.workdir or default_workdir(values))
    # A new run is built before its directory is made, so that a mistake leaves nothing.
    build = team or not workdir.exists()
    experiment = config.build(values, FLAGS.devices, team) if build else None
    with open_run(workdir, values, MAY_CHANGE) as run:
        _train(run, values, experiment)


def default_workdir(values: config.Values) -> Path:
    """Returns a folder whose name tells the run and whose digest tells its flags."""
    fixed = {name: value for name, value in values.items() if name not in MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]
    task, model = (re.sub(r"[^\w.-]+", "_", name) for name in (values["task"], model_name(values)))
    return Path("runs") / f"{task}-{model}-{values['algorithm']}-{digest}"


def model_name(values: config.Values) -> str:
    """Returns the model's name for people: that of its file, where it is one."""
    kind, _, place = values["model"].partition(":")
    return Path(place).stem if kind == "gguf" else place or kind


def _train(run: Run, values: config.Values, experiment: config.Experiment | None) -> None:
    began = time.perf_counter()
    logged = run.log.last_round + 1
    if logged > values["rounds"]:
        raise RunError(
            f"{run.path} holds {logged} rounds already; give --rounds={logged} or more, or "
            "another --workdir"
        )
    if run.notice:
        print(f"note: {run.notice}", file=sys.stderr)
    summary = run.read_summary()
    if summary and logged == summary.get("rounds") == values["rounds"]:
        print(f"The run in {run.path} is complete; give more --rounds to go on.\n")
        _print_table(summary)
        return

    experiment = experiment or config.build(values, FLAGS.devices)
    simulator = experiment.simulator
    repaired = run.notice
    progress, notice = recording.restore(run, simulator)
    for sentences in (run.notice if run.notice != repaired else None, notice):
        if sentences:
            print(f"note: {sentences}", file=sys.stderr)
    for sentence in experiment.notices:
        print(f"note: {sentence}", file=sys.stderr)
    writer = _event_writer(run) if FLAGS.tensorboard else None
    done = int(progress.state.round)
    if done:
        print(f"resuming {run.path} after round {done}", file=sys.stderr)
    if experiment.label_counts is not None:
        title = f"{experiment.task.name}, {values['partition']} partition"
        run.save_figure("labels.png", plots.label_distribution(experiment.label_counts, title))

    bar = tqdm.tqdm(
        total=values["rounds"],
        initial=done,
        unit=" rounds",
        dynamic_ncols=True,
        disable=not FLAGS.progress,
    )
    shown: dict[str, str] = {}
    saved_at = time.perf_counter()

    def on_rounds(
        trace: simulation.Trace,
        counted: list[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        nonlocal saved_at
        recording.write_rounds(run, trace, counted, progress)
        if time.perf_counter() - saved_at > SNAPSHOT_SECONDS:
            recording.save_snapshot(run, progress)
            saved_at = time.perf_counter()
        shown["loss"] = f"{trace.losses[-1]:.4g}"
        bar.set_postfix(shown, refresh=False)
        bar.update(len(counted))
        if writer:
            for i, loss in enumerate(trace.losses):
                writer.add_scalar("train/loss", loss, trace.first_round + i + 1)

    def on_record(record: simulation.Record) -> None:
        recording.write_record(run, record)
        name = "accuracy" if "accuracy" in record.metrics else "loss"
        shown[f"test {name}"] = f"{record.metrics[name]:.4g}"
        bar.set_postfix(shown)
        if writer:
            for name, value in record.metrics.items():
                writer.add_scalar(f"test/{name}", value, record.round)
            writer.add_scalar("bytes/up", record.bytes_up, record.round)
            writer.add_scalar("bytes/down", record.bytes_down, record.round)

    diverged = None
    try:
        progress = simulation.run(
            simulator,
            rounds=values["rounds"],
            eval_every=values["eval_every"],
            progress=progress,
            on_rounds=on_rounds,
            on_record=on_record,
        )
    except simulation.Diverged as error:
        diverged, progress = error, error.progress
    finally:
        bar.close()
        if writer:
            writer.close()
    recording.save_snapshot(run, progress)
    summary = summarise(values, experiment, progress)
    summary["total_seconds"] = time.perf_counter() - began
    if diverged:
        summary["diverged_round"] = diverged.round
    _save_figures(run, experiment.task.name, summary)
    run.write_summary(summary)
    _print_table(summary)
    print(f"\nFigures, log and summary are in {run.path}")
    if diverged:
        raise entry.UserError(str(diverged)) from diverged


def summarise(
    values: config.Values, experiment: config.Experiment, progress: simulation.Progress
) -> dict[str, Any]:
    """Returns the contents of `summary.json`."""
    book, history = progress.ledger, [record.row() for record in progress.history]
    last: dict[str, Any] = history[-1] if history else {}
    accuracies = [row["test_accuracy"] for row in history if row["test_accuracy"] is not None]
    rounds_done = book.num_rounds
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
        "num_clients": book.num_clients,
        "bytes_up_per_client": book.per_client(book.totals.up),
        "bytes_down_per_client": book.per_client(book.totals.down),
        "bytes_seed_per_client": book.per_client(book.totals.seed),
        "bytes_broadcast_per_client": book.per_client(book.totals.broadcast),
        "bytes_catch_up_per_client": book.per_client(book.totals.catch_up),
        "bytes_first_sync_per_client": book.per_client(book.totals.first_sync),
        "bytes_fedavg_per_client": book.per_client(book.dense_bytes),
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


def _save_figures(run: Run, task_name: str, summary: dict[str, Any]) -> None:
    if not summary["history"]:
        return
    title = f"{summary['algorithm']} on {task_name} ({model_name(summary)})"
    run.save_figure("rounds.png", plots.accuracy_against_rounds(summary["history"], title))
    dense = summary["bytes_fedavg_per_client"] * summary["num_clients"] / summary["rounds"]
    run.save_figure("bytes.png", plots.accuracy_against_bytes(summary["history"], dense, title))


def _print_table(summary: dict[str, Any]) -> None:
    """Prints the last evaluations and what was sent."""
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
    up, down = summary["bytes_up_per_client"], summary["bytes_down_per_client"]
    dense = summary["bytes_fedavg_per_client"]
    print(
        f"A client sent {plots.human_bytes(up)} and received {plots.human_bytes(down)} (of these "
        f"{plots.human_bytes(summary['bytes_catch_up_per_client'])} catching up and "
        f"{plots.human_bytes(summary['bytes_first_sync_per_client'])} for the initial model).\n"
        f"Exchanging the model instead (FedAvg) would have cost it {plots.human_bytes(dense)}: "
        f"{dense / max(up + down, 1):.1f} times as much.\n"
        f"{summary['seconds_per_round'] * 1e3:.3g} ms a round on {summary['device']}; "
        f"compilation took {summary['compile_seconds']:.1f} s."
    )


def _event_writer(run: Run) -> Any:
    try:
        import tensorboardX
    except ImportError:
        raise RunError(
            "--tensorboard needs the package tensorboardX; pip install 'zofl-jax[tensorboard]'"
        ) from None
    return tensorboardX.SummaryWriter(str(run.path / "tensorboard"))


if __name__ == "__main__":
    entry.run(main, interrupted="stopped; the same command goes on from here")
