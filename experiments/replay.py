"""Rebuilds the model of any round of a run from its initial params and its log.

    python -m experiments.replay --workdir=runs/digits --round=100 --out=model.npz

`--round` counts rounds done: 0 is the initial model. The data is read once more to
evaluate the model; no client takes part. Of a private run it also tells the ε spent by then.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from zofl_jax import keys
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import build, rebuild
from zofl_jax.engine import rounds
from zofl_jax.runs import recording
from zofl_jax.runs.directory import open_run, read_flags

from . import devices, entry

flags.DEFINE_string("workdir", None, "Run directory.", required=True)
flags.DEFINE_integer("round", None, "Rounds done; the last logged one unless given.")
flags.DEFINE_string("out", None, "File for the params, as .npz with one array a leaf.")

FLAGS = flags.FLAGS


def main() -> None:
    """Rebuilds, checks, evaluates and saves a model."""
    workdir = Path(FLAGS.workdir)
    values = read_flags(workdir)
    with entry.user_errors():
        config = Config.from_flat(values)
        experiment = build(config, devices.chosen())
    state, done, same = rebuild(workdir, experiment, FLAGS.round, note=entry.note)
    metrics = experiment.simulator.evaluate(state.params)
    print(
        f"model after {done} rounds: " + ", ".join(f"test {k} {v:.4f}" for k, v in metrics.items())
    )
    print(
        f"fingerprint {int(rounds.fingerprint(state.params)):08x}: "
        + {
            True: "bit-identical to the run",
            False: "differs from the run in some bits (another machine or release of XLA?)",
            None: "the log holds none for this round",
        }[same]
    )
    with open_run(workdir, values) as run:
        spent = recording.epsilon(run, experiment.simulator, done)
    if spent is not None:
        print(f"privacy spent: epsilon {spent:.6g} at delta {config.dp_delta:g}")
    if FLAGS.out:
        paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(state.params)
        arrays: dict[str, Any] = {
            keys.path_name(path): np.asarray(leaf) for path, leaf in paths_and_leaves
        }
        try:
            with open(FLAGS.out, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise entry.UserError(f"--out={FLAGS.out} can't be written ({error})") from error
        print(f"saved {len(arrays)} arrays to {FLAGS.out}")


if __name__ == "__main__":
    entry.run(main)
