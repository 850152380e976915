"""The flags of a run, and what is built from them.

Flags end here: `resolve` turns them into a flat dict (the run directory's `flags.json`),
and the builders below turn that dict into library objects.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh

from experiments import language, partitions
from experiments.entry import UserError
from zofl_jax import (
    estimators,
    keys,
    local_models,
    perturbations,
    placement,
    recording,
    simulation,
)
from zofl_jax.algorithms import decomfl
from zofl_jax.core import LossFn, Phase, ServerState, Task
from zofl_jax.data import partition, sources, tfds
from zofl_jax.models import cnn, mlp
from zofl_jax.processes import Team
from zofl_jax.runs import open_run
from zofl_jax.tasks import benchmarks, objectives, quadratic, vision

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageTask

Values = Mapping[str, Any]

PERTURBATIONS = ("gaussian", "rademacher", "sphere", "low_rank")
MODELS = {
    "softmax": mlp.Softmax,
    "mlp": mlp.MLP,
    "mnist_cnn": cnn.MnistCnn,
    "fashion_cnn": cnn.FashionCnn,
    "lenet": cnn.LeNet,
}
CONVOLUTIONAL = ("mnist_cnn", "fashion_cnn", "lenet")
EVAL_BATCH, LANGUAGE_EVAL_BATCH = 512, 32  # examples at once
AUTHORS_SCHEDULE = "500:lr=0.8,P=2;1000:lr=0.5,P=4;2000:lr=0.3,P=8"

flags.DEFINE_string(
    "task",
    "digits",
    f"Images: digits, idx, npz, tfds:NAME. Texts: {', '.join(benchmarks.CATALOGUE)}, and text for "
    "data of one's own. Or quadratic.",
)
flags.DEFINE_string(
    "data_dir", None, "Folder (idx, tfds, texts) or file (npz, reviews, text) of the data."
)
flags.DEFINE_string(
    "model",
    None,
    f"Of images: {', '.join(MODELS)}; softmax unless given. Of texts: gguf:FILE or "
    "hf:FOLDER_OR_NAME; what make smollm2 fetched unless given.",
)
flags.DEFINE_enum("algorithm", "decomfl", ["decomfl"], "Federated algorithm.")
flags.DEFINE_enum(
    "estimator",
    "central",
    ["forward", "central", "projection", "jvp"],
    "Finite differences, or exact directional derivatives by one backward pass (projection) "
    "or by forward mode (jvp).",
)
flags.DEFINE_enum(
    "perturbation", "gaussian", list(PERTURBATIONS), "Distribution of the directions."
)
flags.DEFINE_integer("rank", 1, "Rank of low_rank directions.", lower_bound=1)
flags.DEFINE_integer("num_clients", 20, "Population.", lower_bound=1)
flags.DEFINE_integer("clients_per_round", 5, "Cohort, sampled uniformly.", lower_bound=1)
flags.DEFINE_integer("local_steps", 4, "K, local steps of a client in a round.", lower_bound=1)
flags.DEFINE_integer("num_perturbations", 20, "P, directions of a local step.", lower_bound=1)
flags.DEFINE_float("smoothing", 1e-3, "μ, the length of a perturbation in units of z.")
flags.DEFINE_integer("batch_size", 32, "Examples of a client in a local step.", lower_bound=1)
flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adam"], "Optimiser that everyone replays.")
flags.DEFINE_float("learning_rate", 0.02, "Learning rate.")
flags.DEFINE_float("momentum", 0.9, "Momentum of sgd.", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_float(
    "weight_decay",
    0.0,
    "Weight decay: added to the direction (sgd), decoupled (adam).",
    lower_bound=0.0,
)
flags.DEFINE_string(
    "schedule",
    "",
    "Factors on learning rate (lr), smoothing (mu) and perturbations (P) from a round on, "
    "relative to the start, as in '500:lr=0.8,P=2;1000:lr=0.5,P=4'; 'authors' is "
    f"'{AUTHORS_SCHEDULE}'.",
)
flags.DEFINE_integer("rounds", 400, "Rounds in all.", lower_bound=1)
flags.DEFINE_integer("eval_every", 50, "Rounds between evaluations.", lower_bound=1)
flags.DEFINE_enum(
    "partition",
    "iid",
    ["iid", "dirichlet", "shards", "natural"],
    "How examples are shared out to clients.",
)
flags.DEFINE_float("dirichlet_alpha", 1.0, "α of the Dirichlet partition.")
flags.DEFINE_integer("shards_per_client", 2, "Label shards a client gets.", lower_bound=1)
flags.DEFINE_enum("weighting", "uniform", ["uniform", "examples"], "Weights of the cohort's mean.")
flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_string(
    "prng_impl", "threefry2x32", f"Generator of the directions: {', '.join(keys.IMPLEMENTATIONS)}."
)
flags.DEFINE_integer(
    "clients_at_once",
    None,
    "Clients evaluated at once, 0 for all; 1 for convolutional models and all for others unless "
    "given.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "perturbations_at_once",
    None,
    "Perturbed models evaluated at once, 0 for as many as share their products: all of low_rank "
    "directions, one of others. 0 unless given, 1 for convolutional models.",
    lower_bound=0,
)
flags.DEFINE_integer("quadratic_dim", 1000, "Dimension of the quadratic.", lower_bound=1)
flags.DEFINE_float("effective_rank", 10.0, "Effective rank of the quadratic.")
flags.DEFINE_float(
    "heterogeneity", 1.0, "Distance between the clients' quadratics.", lower_bound=0.0
)
flags.DEFINE_float(
    "noise", 0.0, "Distance between the examples of a client's quadratic.", lower_bound=0.0
)

FLAGS = flags.FLAGS

NAMES = (*(flag.name for flag in FLAGS.flags_by_module_dict()[__name__]), *language.NAMES)
"""The flags that make a run what it is: all of this file and of `language.py`."""


class Experiment(NamedTuple):
    """What a run needs, built from flags."""

    task: Task
    simulator: simulation.Simulator
    label_counts: np.ndarray | None  # [num_clients, num_classes]
    minimum: float | None  # the least test loss, where it is known
    language: "LanguageTask | None" = None  # of texts
    notes: tuple[str, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user."""
        own = language.notices(self.language) if self.language else ()
        return (*self.notes, *own)


class Change(NamedTuple):
    """Factors relative to the start that hold from a round on."""

    first_round: int
    learning_rate: float = 1.0
    smoothing: float = 1.0
    num_perturbations: float = 1.0


@contextlib.contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns the library's complaints about its arguments into messages for the user."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


@_as_user_errors()
def resolve() -> dict[str, Any]:
    """Returns the flags of this process as a flat dict, defaults filled in.

    Raises:
      UserError: for values that no single flag's check can find.
    """
    values: dict[str, Any] = {name: FLAGS[name].value for name in NAMES}
    for name, value in values.items():
        # The bounds of absl's flags let NaN and, without an upper bound, infinity pass.
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be finite, got {value}")
    for name in ("smoothing", "learning_rate", "dirichlet_alpha"):
        if values[name] <= 0:
            raise ValueError(f"--{name} must be positive, got {values[name]}")
    if values["momentum"] == 1.0:
        raise ValueError("--momentum must be below 1, got 1.0")
    task = values["task"]
    if task == "quadratic":
        if values["model"] is not None:
            raise ValueError(f"--model={values['model']} has no meaning with --task=quadratic")
        values["model"] = "quadratic"
        if FLAGS["batch_size"].using_default_value:
            values["batch_size"] = 1
    elif language.is_language_task(task):
        language.fill_in(values, {n for n in NAMES if not FLAGS[n].using_default_value})
    else:
        values["model"] = "softmax" if values["model"] is None else values["model"]
        if values["model"] not in MODELS:
            raise ValueError(
                f"--model={values['model']} is no model of images: use one of {', '.join(MODELS)}"
            )
        values["objective"] = values["objective"] or "cross_entropy"
        if values["objective"] not in objectives.CLASSIFICATION:
            raise ValueError(f"--objective={values['objective']} is for texts, not for images")
    if values["objective"] in objectives.WITHOUT_GRADIENT and values["estimator"] in (
        "projection",
        "jvp",
    ):
        raise ValueError(
            f"--objective={values['objective']} has no useful gradient, which "
            f"--estimator={values['estimator']} needs: use forward or central"
        )
    for name in ("clients_at_once", "perturbations_at_once"):
        if values[name] is None:
            values[name] = 1 if values["model"] in CONVOLUTIONAL else 0
    if task in ("idx", "npz") and not values["data_dir"]:
        kind = "the folder with the IDX files" if task == "idx" else "the .npz file"
        raise ValueError(f"--task={task} needs --data_dir={kind}")
    if values["clients_per_round"] > values["num_clients"] and values["partition"] != "natural":
        raise ValueError(
            f"--clients_per_round={values['clients_per_round']} is more than "
            f"--num_clients={values['num_clients']}"
        )
    parse_schedule(values["schedule"])
    return values


@_as_user_errors()
def build(values: Values, devices: int | None = None, team: Team | None = None) -> Experiment:
    """Returns the task and the simulator that flags describe.

    Args:
      values: from `resolve`.
      devices: how many devices the cohort is shared out over. Unless given, all accelerators;
        on a CPU as many as it has cores for convolutional models, which use one thread a
        device, and one for others, whose products use all cores. Of each process, where there
        are several.
      team: the processes that this one leads; None if there are no others.

    Raises:
      UserError: for data that is missing or malformed, or flags that don't fit it.
    """
    mesh = _mesh(values, devices)
    root = keys.root(values["seed"], values["prng_impl"])
    label_counts, minimum, built_language = None, None, None
    if values["task"] == "quadratic":
        built = quadratic.quadratic(
            root.partition,
            dim=values["quadratic_dim"],
            effective_rank=values["effective_rank"],
            num_clients=values["num_clients"],
            examples_per_client=values["batch_size"],
            heterogeneity=values["heterogeneity"],
            noise=values["noise"],
        )
        task, minimum = built.task, built.minimum
    elif language.is_language_task(values["task"]):
        built_language, label_counts = language.build(values, root)
        task = built_language.task
    else:
        dataset = _dataset(values)
        order, offsets = _partition(values, dataset, root)
        model = MODELS[values["model"]](dataset.num_classes)
        objective = objectives.CLASSIFICATION[values["objective"]]
        task = vision.classification(dataset, model, order, offsets, objective)
        label_counts = partition.label_counts(
            dataset.train["label"], order, offsets, dataset.num_classes
        )
    simulator = simulation.make_simulator(
        build_phases(values, task.loss),
        task,
        clients_per_round=values["clients_per_round"],
        batch_size=values["batch_size"],
        seed=values["seed"],
        prng_impl=values["prng_impl"],
        weighting=values["weighting"],
        eval_batch_size=LANGUAGE_EVAL_BATCH if built_language else EVAL_BATCH,
        mesh=mesh,
    )
    if team:
        simulator = team.lead(simulator)
    notes = _notes(values, simulator)
    return Experiment(task, simulator, label_counts, minimum, built_language, notes)


def _notes(values: Values, simulator: simulation.Simulator) -> tuple[str, ...]:
    if values["perturbation"] != "low_rank" or values["local_steps"] == 1:
        return ()
    params = jax.eval_shape(simulator.task.init, simulator.root.init)
    if local_models.is_linear(_optimizer(values, parse_schedule(values["schedule"])), params):
        return ()
    return (
        f"--optimizer={values['optimizer']} is not linear, so at --local_steps="
        f"{values['local_steps']} every client has a copy of the params; sgd needs none",
    )


def rebuild(
    workdir: Path,
    values: Values,
    experiment: Experiment,
    round_index: int | None,
    *,
    nearest: bool = False,
) -> tuple[ServerState, int, bool | None]:
    """Returns the state of a run after a round, that round, and `recording.rebuild`'s check.

    Args:
      workdir: the run directory.
      values: the run's own flags.
      experiment: built from them.
      round_index: rounds done; the last logged one if None.
      nearest: whether to start from the nearest snapshot, not from round 0.

    Raises:
      RunError: if the run can't be opened or doesn't hold that round.
    """
    with open_run(workdir, values) as run:
        try:
            done = run.log.last_round + 1 if round_index is None else round_index
            state, same = recording.rebuild(run, experiment.simulator, done, nearest=nearest)
        finally:
            if run.notice:
                print(f"note: {run.notice}", file=sys.stderr)
    return state, done, same


def build_phases(values: Values, loss_fn: LossFn) -> list[Phase]:
    """Returns the algorithm of each phase of the schedule.

    Phases differ in their number of perturbations alone; learning rate and smoothing
    follow the round within them.
    """
    changes = parse_schedule(values["schedule"])
    optimizer = _optimizer(values, changes)
    smoothing = _piecewise(changes, "smoothing", values["smoothing"])
    perturbation = _perturbation(values)
    phases: list[Phase] = []
    previous = 0
    for change in changes:
        count = max(1, round(values["num_perturbations"] * change.num_perturbations))
        if count != previous:
            estimator = _estimator(values, count, smoothing, perturbation)
            algorithm = decomfl(loss_fn, estimator, optimizer, local_steps=values["local_steps"])
            phases.append(Phase(change.first_round, algorithm))
        previous = count
    return phases


def parse_schedule(text: str) -> list[Change]:
    """Returns the changes of a `--schedule`, the start included.

    Raises:
      ValueError: for text that is not a schedule.

    >>> parse_schedule("500:lr=0.8,P=2")[1].num_perturbations
    2.0
    """
    text = AUTHORS_SCHEDULE if text == "authors" else text
    fields = {"lr": "learning_rate", "mu": "smoothing", "P": "num_perturbations"}
    changes = [Change(0)]
    for part in filter(None, text.split(";")):
        try:
            start, _, assignments = part.partition(":")
            factors = {}
            for assignment in assignments.split(","):
                name, _, value = assignment.partition("=")
                factors[fields[name.strip()]] = float(value)
            changes.append(Change(int(start), **factors))
        except (KeyError, ValueError):
            raise ValueError(
                f"--schedule: can't read {part!r}; write 'ROUND:lr=F,mu=F,P=F' with factors "
                "relative to the start, parts separated by ';'"
            ) from None
        in_order = changes[-2].first_round < changes[-1].first_round
        if not in_order or not all(0 < factor < math.inf for factor in changes[-1][1:]):
            raise ValueError(
                "--schedule: factors must be positive and finite, and rounds increase from 1 on, "
                f"got {part!r}"
            )
    return changes


def _mesh(values: Values, devices: int | None) -> Mesh | None:
    one = devices is None and values["model"] not in CONVOLUTIONAL
    placement.use_cpu_devices(1 if one else devices)
    found = jax.local_devices()  # as many in each process, see `processes.join`
    if one and found[0].platform == "cpu":
        devices = 1
    if devices is not None and devices > len(found):
        raise ValueError(f"--devices={devices}: there are only {len(found)}")
    wanted = len(found) if devices is None else devices
    busy = math.ceil(values["clients_per_round"] / jax.process_count())
    return placement.clients_mesh(placement.devices_of_each_process(min(wanted, busy)))


def _piecewise(changes: list[Change], field: str, start: float) -> optax.Schedule:
    """Returns round -> start · factor."""
    rounds = np.array([change.first_round for change in changes])
    values = np.array([start * getattr(change, field) for change in changes])

    def value(round_index: Any) -> Any:
        at = jnp.sum(jnp.asarray(round_index) >= rounds) - 1
        return jnp.asarray(values, jnp.result_type(float))[at]

    return value


def _optimizer(values: Values, changes: list[Change]) -> optax.GradientTransformation:
    by_round = _piecewise(changes, "learning_rate", values["learning_rate"])

    def by_step(count: Any) -> Any:
        # The optimiser counts local steps, K a round.
        return by_round(count // values["local_steps"])

    rate: Any = by_step if len(changes) > 1 else values["learning_rate"]
    decay = values["weight_decay"]
    if values["optimizer"] == "adam":
        return optax.adamw(rate, weight_decay=decay) if decay else optax.adam(rate)
    sgd = optax.sgd(rate, momentum=values["momentum"] or None)
    return optax.chain(optax.add_decayed_weights(decay), sgd) if decay else sgd


def _perturbation(values: Values) -> perturbations.Perturbation:
    if values["perturbation"] == "low_rank":
        return perturbations.low_rank(values["rank"])
    return getattr(perturbations, values["perturbation"])()


def _estimator(
    values: Values,
    count: int,
    smoothing: optax.Schedule,
    perturbation: perturbations.Perturbation,
) -> estimators.Estimator:
    at_once = values["clients_at_once"] or None
    if values["estimator"] == "projection":
        return estimators.projection(count, perturbation, at_once)
    if values["estimator"] == "jvp":
        return estimators.forward_gradient(count, perturbation, at_once)
    kinds = {"forward": estimators.forward_difference, "central": estimators.central_difference}
    together = values["perturbations_at_once"] or None
    return kinds[values["estimator"]](count, smoothing, perturbation, at_once, together)


def _dataset(values: Values) -> sources.Dataset:
    task, data_dir = values["task"], values["data_dir"]
    if task == "digits":
        return sources.digits()
    if task == "idx":
        return sources.idx(data_dir)
    if task == "npz":
        return sources.npz(data_dir)
    if task.startswith("tfds:"):
        return tfds.load(task.removeprefix("tfds:"), data_dir)
    raise ValueError(
        f"--task={task} is unknown; use digits, idx, npz, tfds:NAME, quadratic, text, or one of "
        f"{', '.join(benchmarks.CATALOGUE)}"
    )


def _partition(
    values: Values, dataset: sources.Dataset, root: keys.RootKeys
) -> partition.Partition:
    if values["partition"] == "natural" and dataset.client_ids is None:
        raise ValueError(f"--partition=natural: {dataset.name} names no owners of its examples")
    return partitions.share_out(values, dataset.train["label"], root, dataset.client_ids)
