"""Says what a round takes on a TPU pod that isn't there, or on this machine, without running it.

    python -m experiments.plan --topology=v5e:4x4 --mesh=clients:8,model:2 --task=digits
    python -m experiments.plan --topology=v5p:4x4x8 --mesh=clients:32,model:4 \
        --architecture=opt-13b --task=sst2 --dtype=bfloat16 --num_clients=64 --clients_per_round=32

The round of these flags is compiled for the devices of --topology by the TPU's own compiler (extra
`[plan]`), or for this machine's. Memory, FLOPs, traffic and the times that peak rates allow are
printed. What doesn't fit is refused. A run with a warm-up has a plan of that first, and then one of
the rounds after it. The compiler for GPUs needs one, so --topology=h100:64 is estimated from the
traced round instead, and says so.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from zofl_jax.configuration import schedules
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import build, of_architecture
from zofl_jax.configuration.resolve import resolve
from zofl_jax.engine import placement
from zofl_jax.engine.simulation import Simulator
from zofl_jax.models import architectures
from zofl_jax.planning import paper, plans, topologies

from . import devices, entry
from . import flags as settings

flags.DEFINE_string(
    "topology",
    None,
    "TPUs to compile for, as v5e:4x4, v5p:4x4x8 or v6e:16x16, or GPUs to estimate for, as h100:64; "
    "this machine's devices unless given.",
)
flags.DEFINE_string(
    "architecture",
    None,
    "Language model by its published sizes in place of --model: "
    f"{', '.join(architectures.PUBLISHED)}. Its clients have random tokens.",
)
flags.DEFINE_integer(
    "sequence_length", 64, "Tokens of an example, with --architecture.", lower_bound=1
)
flags.DEFINE_string("out", None, "JSON file to write the plan to as well.")

FLAGS = flags.FLAGS

PLAIN_TASK = "sst2"
"""What gives the settings of texts their defaults where --architecture stands without --task."""


def main() -> None:
    """Prints the plan of the round that the flags describe."""
    if FLAGS.topology:
        topologies.prepare()
    with entry.user_errors():
        config = _config()
        simulator = _simulator(config)
        narrow = config.kind == "texts" and (config.matmul_dtype or config.dtype) != "float32"
        factors = "bfloat16" if narrow else "float32"
        make = paper.make if _on_paper() else plans.make
        warmup = make(simulator, factors=factors) if config.warmup_rounds else None
        plan = make(simulator, phase=_first_of_the_method(config, simulator), factors=factors)
    for title, made in ((config.warmup, warmup), (config.algorithm, plan)):
        if made is None:
            continue
        if warmup:
            print(f"{title}:")
        width = max(len(name) for name, _ in made.rows())
        for name, value in made.rows():
            print(f"{name:<{width}}  {value}")
        for sentence in made.notes:
            entry.note(sentence)
    if FLAGS.out:
        told = {"flags": _given(), **plan.as_json()}
        if warmup:
            told["warmup"] = warmup.as_json()
        Path(FLAGS.out).expanduser().write_text(json.dumps(told, indent=1) + "\n")


def _first_of_the_method(config: Config, simulator: Simulator) -> int:
    """Returns the first phase that is neither a warm-up nor measures activations."""
    measuring = schedules.parse_rounds(config.centre_rounds)
    firsts = [phase.first_round for phase in simulator.phases]
    return next(i for i, r in enumerate(firsts) if r >= config.warmup_rounds and r not in measuring)


def _config() -> Config:
    """Returns the config of the flags, of texts where there is an architecture."""
    given = settings.given()
    if FLAGS.architecture:
        given = {"task": PLAIN_TASK, **given}
        if "model" in given:
            raise entry.UserError("--architecture stands in place of --model: leave one out")
    return resolve(given)


def _simulator(config: Config) -> Simulator:
    chosen: Any = devices.chosen()
    if FLAGS.topology:
        shape = placement.Shape(chosen) if isinstance(chosen, int) else chosen
        chosen = topologies.mesh(FLAGS.topology, shape or placement.Shape())
    if not FLAGS.architecture:
        return build(config, chosen).simulator
    architecture = architectures.named(FLAGS.architecture)
    return of_architecture(config, architecture, FLAGS.sequence_length, chosen)


def _on_paper() -> bool:
    return bool(FLAGS.topology) and topologies.is_abstract(FLAGS.topology)


def _given() -> dict[str, object]:
    """Returns the flags that tell this plan from others."""
    own = ("topology", "mesh", "devices", "architecture")
    told = {name: FLAGS[name].value for name in own if FLAGS[name].value is not None}
    if FLAGS.architecture:
        told["sequence_length"] = FLAGS.sequence_length
    return told | settings.given()


if __name__ == "__main__":
    entry.run(main)
