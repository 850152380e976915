"""Aggregation rules under attack: the test accuracy of every rule under every attack.

    python -m experiments.robustness

20 clients, all in every round; 0, 10 or 30 % of them malicious. The server counts on 30 %. The
rule, the attack and who is malicious are arguments of one compiled run, so that a table takes
one compilation. Writes benchmarks/results/robustness.json and docs/robustness.md; parts of the
table that were asked for replace those of the file, the others stay.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tqdm
from absl import flags

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, fedsgd
from zofl_jax.conditions import aggregation, attacks
from zofl_jax.core import Algorithm, Array, Batches, Broadcast, LossFn, PRNGKey, Task, Upload
from zofl_jax.data import batches as data_batches
from zofl_jax.data import partition, sources
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import rounds
from zofl_jax.models import mlp
from zofl_jax.tasks import vision

from . import entry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "robustness.json"
TABLE = ROOT / "docs" / "robustness.md"
FASHION = "/usr/share/datasets/fashion-mnist"

CLIENTS = 20
BATCH = 32
EXPECTED = 6  # bad clients that rules count on
MAX_MESSAGE = 1e6
SHARES = (0.1, 0.3)


class Settings(NamedTuple):
    """What suits a method on a data set where nobody is malicious."""

    learning_rate: float
    norm: float  # that the clipped mean clips to
    sign: float  # the size of a majority's sign


SETTINGS = {
    ("digits", "decomfl"): Settings(0.02, 2.0, 0.5),
    # Its scalars are ten times as large, about 30 in norm at the start.
    ("fashion", "decomfl"): Settings(0.0015, 20.0, 4.0),
    ("digits", "fedsgd"): Settings(0.05, 2.0, 0.1),
    ("fashion", "fedsgd"): Settings(0.05, 2.0, 0.1),
}

RULES: dict[str, Callable[[Settings], aggregation.Rule]] = {
    "mean": lambda _: aggregation.mean,
    "median": lambda _: aggregation.median,
    "trimmed mean": lambda _: aggregation.trimmed_mean(EXPECTED / CLIENTS),
    "Krum": lambda _: aggregation.krum(EXPECTED),
    "multi-Krum": lambda _: aggregation.multi_krum(EXPECTED, CLIENTS - EXPECTED - 2),
    "geometric median": lambda _: aggregation.geometric_median(),
    "clipped mean": lambda settings: aggregation.clipped_mean(settings.norm),
    "majority sign": lambda settings: aggregation.majority_sign(settings.sign),
}


def _honest(key: PRNGKey, uploads: Upload, malicious: Array, present: Array) -> Upload:
    return uploads


ATTACKS: dict[str, attacks.Attack] = {
    "none": _honest,
    "Gaussian": attacks.gaussian(),
    "sign flip": attacks.sign_flip(),
    "scaling": attacks.scaling(-10.0),
    "ALIE": attacks.alie(),
    "inner product": attacks.inner_product(),
    "trim": attacks.trim(),
    "Krum": attacks.krum(),
    "label flip": _honest,
    "NaN": attacks.constant(math.nan),
    "out of range": attacks.constant(1e30),
}

FLAGS = flags.FLAGS


class Cell(NamedTuple):
    """One run: an entry of the table."""

    dataset: str
    method: str
    rule: str
    attack: str
    share: float
    accuracy: float
    rejected: int  # messages
    rounds: int


def main() -> None:
    """Fills the parts of the table that flags ask for."""
    for flag, known in (("datasets", ("digits", "fashion")), ("methods", tuple(METHODS))):
        for name in getattr(FLAGS, flag):
            if name not in known:
                raise entry.UserError(f"--{flag}: {name!r} is not one of {', '.join(known)}")
    for dataset in FLAGS.datasets:
        task = make_task(dataset, FLAGS.seed)
        for method in FLAGS.methods:
            write(table(dataset, task, method, FLAGS.rounds, FLAGS.seed))
    print(TABLE.read_text())


def make_task(dataset: str, seed: int) -> Task:
    """Returns softmax regression on a data set, shared out evenly to the clients."""
    try:
        data = sources.digits() if dataset == "digits" else sources.idx(FASHION)
    except ValueError as error:
        raise entry.UserError(str(error)) from error
    labels = data.train["label"]
    order, offsets = partition.iid(keys.root(seed).partition, labels, CLIENTS)
    return vision.classification(data, mlp.Softmax(data.num_classes), order, offsets)


def _decomfl(loss_fn: LossFn, rule: aggregation.Rule, rate: float) -> Algorithm:
    estimator = estimators.central_difference(20, 1e-3, perturbations.rademacher())
    return decomfl(loss_fn, estimator, optax.sgd(rate, momentum=0.9), aggregate=rule)


def _fedsgd(loss_fn: LossFn, rule: aggregation.Rule, rate: float) -> Algorithm:
    return fedsgd(loss_fn, optax.sgd(rate, momentum=0.9), aggregate=rule)


METHODS: dict[str, Callable[[LossFn, aggregation.Rule, float], Algorithm]] = {
    "decomfl": _decomfl,
    "fedsgd": _fedsgd,
}


def table(dataset: str, task: Task, method: str, num_rounds: int, seed: int) -> list[Cell]:
    """Returns the accuracies of one method on one data set, under all rules and attacks."""
    root = keys.root(seed)
    run = jax.jit(make_run(task, method, SETTINGS[dataset, method], num_rounds))
    who = {share: attacks.drawn(root.adversary, CLIENTS, share) for share in (0.0, *SHARES)}
    wanted = [
        (rule, attack, share)
        for rule in RULES
        for attack in ATTACKS
        for share in ((0.0,) if attack == "none" else SHARES)
    ]
    cells = []
    for rule, attack, share in tqdm.tqdm(wanted, desc=f"{dataset} {method}", unit=" runs"):
        accuracy, rejected = run(
            list(RULES).index(rule), list(ATTACKS).index(attack), who[share], task.train, root
        )
        cells.append(
            Cell(
                dataset,
                method,
                rule,
                attack,
                share,
                round(float(accuracy), 4),
                int(rejected),
                num_rounds,
            )
        )
    return cells


def make_run(
    task: Task, method: str, settings: Settings, num_rounds: int
) -> Callable[..., tuple[Array, Array]]:
    """Returns (rule, attack, malicious, train, root) -> (test accuracy, messages rejected).

    `rule` and `attack` are indices of `RULES` and `ATTACKS`; `malicious` is bool [clients].
    """
    test, mask = data_batches.evaluation_batches(task.test, 512)
    num_classes = int(jnp.max(jnp.asarray(task.train.examples["label"]))) + 1
    flip = attacks.label_flip(num_classes)
    rules = [make_rule(settings) for make_rule in RULES.values()]
    flips_labels = list(ATTACKS).index("label flip")

    def run(rule: Array, attack: Array, malicious: Array, train: Any, root: Any) -> tuple:
        def aggregate(uploads: Upload, weights: Array) -> Broadcast:
            return jax.lax.switch(rule, rules, uploads, weights)

        def data_attack(batches: Batches) -> Batches:
            flipped = flip(batches)
            return jax.tree.map(
                lambda a, b: jnp.where(attack == flips_labels, a, b), flipped, batches
            )

        chosen = attacks.chosen(list(ATTACKS.values()), attack)
        adversary = attacks.Adversary(malicious, chosen, data_attack)
        algorithm = METHODS[method](task.loss, aggregate, settings.learning_rate)
        advance = rounds.make_advance(
            algorithm,
            task,
            CLIENTS,
            BATCH,
            "uniform",
            rounds_at_most=num_rounds,
            conditions=rounds.Conditions(adversary=adversary, max_message=MAX_MESSAGE),
        )
        state = algorithm.init(task.init(root.init))
        loop = advance(state, (), train, root, num_rounds)
        accuracy = rounds.make_evaluate(task)(loop.state.params, test, mask)["accuracy"]
        return accuracy, jnp.sum(loop.records.rejected)

    return run


def write(cells: list[Cell]) -> None:
    """Puts cells into the file of results, in place of those of the same part, and the table."""
    kept = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []
    new = [cell._asdict() for cell in cells]
    parts = {(cell["dataset"], cell["method"]) for cell in new}
    kept = [cell for cell in kept if (cell["dataset"], cell["method"]) not in parts]
    everything = sorted(kept + new, key=lambda cell: (cell["dataset"], cell["method"]))
    RESULTS.write_text(json.dumps({"cells": everything}, indent=1) + "\n")
    TABLE.write_text(markdown(everything))


def markdown(cells: list[dict[str, Any]]) -> str:
    """Returns the page of tables."""
    deviations = " and ".join(
        f"{float(attacks.alie_deviations(CLIENTS, round(share * CLIENTS))):.2f} at {share:.0%}"
        for share in SHARES
    )
    lines = [
        "# Robust aggregation under attack",
        "",
        "Written by `python -m experiments.robustness` from `benchmarks/results/robustness.json`: "
        f"the test accuracy of softmax regression, {CLIENTS} clients with IID data, all of them in "
        f"every round, one local step on {BATCH} examples. Rules count on {EXPECTED} bad clients. "
        "`decomfl` uploads 20 scalars, `fedsgd` gradients. Attacks: "
        "`zofl_jax/conditions/attacks.py` (scaling is by -10). NaN and numbers out of range are "
        "rejected before any rule sees them. ALIE stays z standard deviations from the honest "
        f"mean: by its paper's formula {deviations}, "
        "and with z = 0 it sends the honest mean itself and harms nobody.",
    ]
    parts = dict.fromkeys((cell["dataset"], cell["method"]) for cell in cells)
    for dataset, method in parts:
        part = [c for c in cells if (c["dataset"], c["method"]) == (dataset, method)]
        found = {(c["rule"], c["attack"], c["share"]): c["accuracy"] for c in part}
        for share in SHARES:
            names = [name for name in ATTACKS if name != "none"]
            lines += [
                "",
                f"## {dataset}, {method}, {share:.0%} malicious, {part[0]['rounds']} rounds",
                "",
                f"| | nobody malicious | {' | '.join(names)} |",
                "|---" * (len(names) + 2) + "|",
            ]
            for rule in RULES:
                values = [found[rule, "none", 0.0], *(found[rule, name, share] for name in names)]
                lines.append(f"| {rule} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def _define_flags() -> None:
    """Defines the flags of this command; those of `experiments.train` have some of the names."""
    flags.DEFINE_list("datasets", ["digits"], f"Of digits, fashion (IDX files in {FASHION}).")
    flags.DEFINE_list("methods", ["decomfl", "fedsgd"], "Of decomfl (scalars), fedsgd (gradients).")
    flags.DEFINE_integer("rounds", 100, "Rounds of a run.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Seed of everything random.", lower_bound=0, upper_bound=2**32 - 1
    )


if __name__ == "__main__":
    _define_flags()
    entry.run(main)
