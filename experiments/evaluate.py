"""Evaluates a language model, as it is or as a run has trained it.

    python -m experiments.evaluate --task=reviews --model=gguf:model.gguf --out=zero_shot.json
    python -m experiments.evaluate --workdir=runs/reviews --out=tuned.json

Without `--workdir` this is zero-shot evaluation, or with `--shots=8` in-context evaluation.
With it, task and model are the run's, and flags given beside it (`--shots`, `--test_examples`,
`--max_length` ...) replace the run's for the evaluation.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from zofl_jax import keys
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import Experiment, build, rebuild
from zofl_jax.configuration.texts import without_encoding
from zofl_jax.core import Params
from zofl_jax.runs.directory import read_flags

from . import devices, entry
from . import flags as settings

flags.DEFINE_string("workdir", None, "Run directory; the untrained model unless given.")
flags.DEFINE_integer("round", None, "Rounds done; the last logged one unless given.")
flags.DEFINE_string("out", None, "File for the figures, as JSON.")
flags.DEFINE_float(
    "temperature", 0.0, "Of written answers; 0 takes the likeliest token.", lower_bound=0.0
)
flags.DEFINE_integer("eval_batch_size", 32, "Texts at once.", lower_bound=1)
flags.DEFINE_bool("progress", True, "Show a progress bar.")

EVALUATION_FLAGS = (
    "max_length",
    "max_new_tokens",
    "shots",
    "test_examples",
    "template",
    "verbalizers",
)
"""Flags that may differ from the run's: they change no trained parameter."""

FLAGS = flags.FLAGS


def main() -> None:
    """Evaluates and reports."""
    began = time.perf_counter()
    if FLAGS.out and not Path(FLAGS.out).absolute().parent.is_dir():
        raise entry.UserError(f"--out={FLAGS.out}: there is no folder {Path(FLAGS.out).parent}")
    experiment, params, source = _trained() if FLAGS.workdir else _untrained()
    for sentence in experiment.notices:
        print(f"note: {sentence}", file=sys.stderr)
    found: dict[str, Any]
    if experiment.language is None:
        metrics = experiment.simulator.evaluate(params)
        found = {"accuracy": metrics.get("accuracy"), "accuracy_median_threshold": None}
        found |= {"loss": metrics["loss"]}
        num_examples = len(jax.tree.leaves(experiment.task.test)[0])
    else:
        found, num_examples = _of_language(experiment.language, params)
    result = {**found, "num_examples": num_examples, "seconds": time.perf_counter() - began}
    print(f"{source}, {experiment.task.name}, {num_examples} test examples")
    for name, value in found.items():
        if value is not None:
            print(f"  {name.replace('_', ' '):<26} {value:.4f}")
    if FLAGS.out:
        temporary = Path(f"{FLAGS.out}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
            temporary.replace(FLAGS.out)
        except OSError as error:
            raise entry.UserError(f"--out={FLAGS.out} can't be written ({error})") from error


def _untrained() -> tuple[Experiment, Params, str]:
    config = settings.config()
    if config.kind != "texts":
        raise entry.UserError(
            f"--task={config.task} starts from random params, so there is nothing to evaluate "
            "before a run: give --workdir"
        )
    with entry.user_errors():
        experiment = build(config, devices.chosen())
    params = experiment.task.init(keys.root(config.seed, config.prng_impl).init)
    shots = f"{config.shots} shots" if config.shots else "zero-shot"
    return experiment, params, f"{config.model}, {shots}"


def _trained() -> tuple[Experiment, Params, str]:
    workdir = Path(FLAGS.workdir)
    values = read_flags(workdir)
    given = settings.given()
    for name in sorted(set(given) - set(EVALUATION_FLAGS)):
        if given[name] != values.get(name):
            raise entry.UserError(
                f"--{name}={given[name]} differs from {values.get(name)} in {workdir}: the "
                f"flags of a run are its own, but for {', '.join(EVALUATION_FLAGS)}"
            )
    with entry.user_errors():
        own = Config.from_flat(values)
        changed = own.replace(**{name: given[name] for name in EVALUATION_FLAGS if name in given})
        experiment = build(changed, devices.chosen())
    if changed != own:
        known = experiment.inputs
        experiment = experiment._replace(inputs=lambda: without_encoding(known()))
    state, done, _ = rebuild(workdir, experiment, FLAGS.round, nearest=True, note=entry.note)
    return experiment, state.params, f"{workdir} after {done} rounds"


def _of_language(built: Any, params: Params) -> tuple[dict[str, Any], int]:
    from zofl_jax.tasks import evaluation

    num_examples = len(built.task.test["length"])
    with tqdm.tqdm(
        total=num_examples, unit=" texts", dynamic_ncols=True, disable=not FLAGS.progress
    ) as bar:

        def watch(n: int) -> None:
            bar.update(n)

        size = FLAGS.eval_batch_size
        if built.scores is not None:
            found = evaluation.classification(built, params, batch_size=size, watch=watch)
            return found, num_examples
        found, _ = evaluation.generation(
            built,
            params,
            rouge=built.task.name == "xsum",
            match_numbers=built.task.name == "drop",
            key=jax.random.key(FLAGS.seed),
            temperature=FLAGS.temperature,
            batch_size=size,
            watch=watch,
        )
        return found, num_examples


if __name__ == "__main__":
    entry.run(main)
