"""The flags of a run, and what is built from them.

Flags end here and in `methods.py`: `resolve` turns them into a flat dict (the run directory's
`flags.json`), and the builders turn that dict into library objects.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from experiments import conditions, language, methods, partitions, rates, schedules
from experiments.entry import UserError
from zofl_jax import keys, precision
from zofl_jax.core import ServerState, Task
from zofl_jax.data import partition, sources, tfds
from zofl_jax.directions import local_models
from zofl_jax.engine import compilation, placement, simulation
from zofl_jax.engine.processes import Team
from zofl_jax.models import cnn, mlp
from zofl_jax.runs import fingerprints, recording
from zofl_jax.runs.directory import open_run, read_flags
from zofl_jax.tasks import catalogue, objectives, quadratic, vision

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageTask

Values = Mapping[str, Any]

MODELS = {
    "softmax": mlp.Softmax,
    "mlp": mlp.MLP,
    "mnist_cnn": cnn.MnistCnn,
    "fashion_cnn": cnn.FashionCnn,
    "lenet": cnn.LeNet,
}
CONVOLUTIONAL = ("mnist_cnn", "fashion_cnn", "lenet")
EVAL_BATCH, LANGUAGE_EVAL_BATCH = 512, 32  # examples at once
MEMORY_SHARE = 0.8  # of what is free, for a round

flags.DEFINE_string(
    "task",
    "digits",
    f"Images: digits, idx, npz, tfds:NAME. Texts: {', '.join(catalogue.CATALOGUE)}, and text for "
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
flags.DEFINE_integer("num_clients", 20, "Population.", lower_bound=1)
flags.DEFINE_integer("clients_per_round", 5, "Cohort, sampled uniformly.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Examples of a client in a local step.", lower_bound=1)
flags.DEFINE_integer("rounds", 400, "Rounds in all.", lower_bound=1)
flags.DEFINE_integer("eval_every", 50, "Rounds between evaluations.", lower_bound=1)
flags.DEFINE_enum(
    "partition",
    "iid",
    ["iid", "dirichlet", "shards", "natural"],
    "How examples are shared out to clients.",
)
flags.DEFINE_enum(
    "missing_owner",
    None,
    ["error", "drop", "own"],
    "What a training example without an owner is with --partition=natural: an error (unless "
    "given), left out, or a client of its own.",
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
    "Clients evaluated at once, 0 for all. Unless given, 1 for convolutional models, for texts as "
    "many as the device's memory holds, for others all.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "perturbations_at_once",
    None,
    "Perturbed models evaluated at once, 0 for as many as share their products: all of low_rank "
    "directions, one of others. 0 unless given, 1 for convolutional and language models.",
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

NAMES = (
    *(flag.name for flag in FLAGS.flags_by_module_dict()[__name__]),
    *methods.NAMES,
    *conditions.NAMES,
    *language.NAMES,
)
"""The flags that make a run what it is: all of this file, `methods.py`, `conditions.py` and
`language.py`."""


_INPUT_FLAGS = (
    *(flag.name for flag in FLAGS.flags_by_module_dict()[__name__]),
    *language.NAMES,
    "availability",
)
"""What `_prepare` reads, and more."""


class Experiment(NamedTuple):
    """What a run needs, built from flags."""

    task: Task
    simulator: simulation.Simulator
    label_counts: np.ndarray | None  # [num_clients, num_classes]
    minimum: float | None  # the least test loss, where it is known
    inputs: Callable[[], fingerprints.Fingerprints]  # of data and base model, see `fingerprints`
    language: "LanguageTask | None" = None  # of texts
    notes: tuple[str, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user."""
        own = language.notices(self.language) if self.language else ()
        return (*self.notes, *own)


@contextlib.contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns the library's complaints about its arguments into messages for the user."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


@_as_user_errors()
def resolve(shared: Collection[str] = ()) -> dict[str, Any]:
    """Returns the flags of this process as a flat dict, defaults filled in.

    Args:
      shared: flags that the methods of a comparison were given together.

    Raises:
      UserError: for values that no single flag's check can find.
    """
    values: dict[str, Any] = {name: FLAGS[name].value for name in NAMES}
    for name, value in values.items():
        # The bounds of absl's flags let NaN and, without an upper bound, infinity pass.
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be finite, got {value}")
    if values["dirichlet_alpha"] <= 0:
        raise ValueError(f"--dirichlet_alpha must be positive, got {values['dirichlet_alpha']}")
    given = {name for name in NAMES if not FLAGS[name].using_default_value}
    methods.fill_in(values, given, shared)
    task = values["task"]
    for flag in language.NAMES:
        if flag in given - {"objective"} and not language.is_language_task(task):
            raise ValueError(
                f"--{flag} is for texts and has no effect with --task={task}: leave it out"
            )
    if task == "quadratic":
        if values["model"] is not None:
            raise ValueError(f"--model={values['model']} has no meaning with --task=quadratic")
        values["model"] = "quadratic"
        if FLAGS["batch_size"].using_default_value:
            values["batch_size"] = 1
    elif language.is_language_task(task):
        language.fill_in(values, given)
    else:
        values["model"] = "softmax" if values["model"] is None else values["model"]
        if values["model"] not in MODELS:
            raise ValueError(
                f"--model={values['model']} is no model of images: use one of {', '.join(MODELS)}"
            )
        values["objective"] = values["objective"] or "cross_entropy"
        if values["objective"] not in objectives.CLASSIFICATION:
            raise ValueError(f"--objective={values['objective']} is for texts, not for images")
    if values["objective"] in objectives.WITHOUT_GRADIENT:
        if values["algorithm"] in methods.FIRST_ORDER:
            raise ValueError(
                f"--objective={values['objective']} has no useful gradient, which "
                f"--algorithm={values['algorithm']} needs: use {', '.join(methods.ZEROTH_ORDER)}"
            )
        if values["estimator"] in ("projection", "jvp"):
            raise ValueError(
                f"--objective={values['objective']} has no useful gradient, which "
                f"--estimator={values['estimator']} needs: use forward or central"
            )
    convolutional, texts = values["model"] in CONVOLUTIONAL, language.is_language_task(task)
    if values["clients_at_once"] is None and not texts:
        values["clients_at_once"] = int(convolutional)
    if values["perturbations_at_once"] is None:
        values["perturbations_at_once"] = int(convolutional or texts)
    if task in ("idx", "npz") and not values["data_dir"]:
        kind = "the folder with the IDX files" if task == "idx" else "the .npz file"
        raise ValueError(f"--task={task} needs --data_dir={kind}")
    if values["missing_owner"] and values["partition"] != "natural":
        raise ValueError(
            f"--missing_owner={values['missing_owner']} has no effect with "
            f"--partition={values['partition']}: leave it out"
        )
    if values["clients_per_round"] > values["num_clients"] and values["partition"] != "natural":
        raise ValueError(
            f"--clients_per_round={values['clients_per_round']} is more than "
            f"--num_clients={values['num_clients']}"
        )
    conditions.fill_in(values, given)
    if values["learning_rate"] is None:
        values["learning_rate"] = rates.default(values)
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
    prepared = _prepare(values)
    simulator = _simulator(values, prepared.task, mesh)
    if team:
        simulator = team.lead(simulator)
    notes = (*prepared.notes, *_notes(values, simulator))
    return Experiment(
        prepared.task,
        simulator,
        prepared.label_counts,
        prepared.minimum,
        prepared.inputs,
        prepared.language,
        notes,
    )


@_as_user_errors()
def inputs(values: Values, devices: int | None = None) -> fingerprints.Fingerprints:
    """Returns the fingerprints of what `build` reads, without building a simulator.

    Raises:
      UserError: as `build`.
    """
    _mesh(values, devices)  # before the backend is first used
    # Runs of a comparison differ in other flags, and share it.
    names = [name for name in _INPUT_FLAGS if name not in ("rounds", "eval_every")]
    return _inputs(tuple((name, values.get(name)) for name in names))


@functools.lru_cache
def _inputs(values: tuple[tuple[str, Any], ...]) -> fingerprints.Fingerprints:
    return _prepare(dict(values)).inputs()


class _Prepared(NamedTuple):
    task: Task
    label_counts: np.ndarray | None
    minimum: float | None
    inputs: Callable[[], fingerprints.Fingerprints]
    language: "LanguageTask | None"
    notes: tuple[str, ...] = ()


def _prepare(values: Values) -> _Prepared:
    """Reads data and base model; the fields are those of `Experiment`."""
    root = keys.root(values["seed"], values["prng_impl"])
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
        inputs = functools.partial(conditions.inputs, values)
        return _Prepared(built.task, None, built.minimum, inputs, None)
    if language.is_language_task(values["task"]):
        texts, label_counts, text_inputs = language.build(values, root)
        return _Prepared(
            texts.task,
            label_counts,
            None,
            lambda: {**text_inputs(), **conditions.inputs(values)},
            texts,
        )
    dataset = _dataset(values["task"], values["data_dir"])
    dataset, (order, offsets) = _owned(values, dataset, root)
    model = MODELS[values["model"]](dataset.num_classes)
    objective = objectives.CLASSIFICATION[values["objective"]]
    task = vision.classification(dataset, model, order, offsets, objective)
    counts = partition.label_counts(dataset.train["label"], order, offsets, dataset.num_classes)

    def image_inputs() -> fingerprints.Fingerprints:
        return {
            **fingerprints.rows("training", dataset.train),
            **fingerprints.rows("test", dataset.test),
            "partition": fingerprints.arrays(order, offsets),
            **conditions.inputs(values),
        }

    return _Prepared(task, counts, None, image_inputs, None, _of_classes(dataset))


def _of_classes(dataset: sources.Dataset) -> tuple[str, ...]:
    """Returns a sentence for the user where classes have no training example."""
    present = np.unique(dataset.train["label"])
    absent = dataset.num_classes - len(present)
    if not absent:
        return ()
    first = next((i for i, label in enumerate(present) if i != label), len(present))
    return (
        f"{absent} of the {dataset.num_classes} classes of {dataset.name} have no training "
        f"example, label {first} first; labels count from 0",
    )


def _notes(values: Values, simulator: simulation.Simulator) -> tuple[str, ...]:
    if values["perturbation"] != "low_rank" or values["local_steps"] == 1:
        return ()
    if values["algorithm"] != "decomfl" or values["mask"] != "none":
        return ()
    params = jax.eval_shape(simulator.task.init, simulator.root.init)
    if local_models.is_linear(schedules.make_optimizer(values), params):
        return ()
    return (
        f"--optimizer={values['optimizer']} is not linear, so at --local_steps="
        f"{values['local_steps']} every client has a copy of the params; sgd needs none",
    )


@_as_user_errors()
def at_learning_rate(experiment: Experiment, values: Values, devices: int | None) -> Experiment:
    """Returns an experiment at another learning rate, with the same data; `values` hold it.

    Both share compiled functions through the compilation cache.
    """
    simulator = _simulator(values, experiment.task, _mesh(values, devices))
    return experiment._replace(simulator=simulator)


def resumed(values: Values, workdir: Path) -> dict[str, Any]:
    """Returns the flags with which a command goes on with the run in `workdir`, if there is one.

    Raises:
      RunError: if its flags can't be read.
    """
    if not (workdir / "flags.json").exists():
        return dict(values)
    return language.resumed(values, read_flags(workdir))


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
      RunError: if the run can't be opened or doesn't hold that round, or if its data or base
        model have changed.
    """
    with open_run(workdir, values) as run:
        try:
            run.check_inputs(experiment.inputs())
            done = run.log.last_round + 1 if round_index is None else round_index
            state, same = recording.rebuild(run, experiment.simulator, done, nearest=nearest)
        finally:
            if run.notice:
                print(f"note: {run.notice}", file=sys.stderr)
    return state, done, same


def _simulator(values: Values, task: Task, mesh: Mesh | None) -> simulation.Simulator:
    texts = language.is_language_task(values["task"])
    root = keys.root(values["seed"], values["prng_impl"])
    if values["clients_at_once"] is None:
        values = {**values, "clients_at_once": _clients_at_once(values, task, root)}
    return simulation.make_simulator(
        methods.build_phases(values, task),
        task,
        clients_per_round=values["clients_per_round"],
        batch_size=values["batch_size"],
        seed=values["seed"],
        prng_impl=values["prng_impl"],
        weighting=values["weighting"],
        eval_batch_size=LANGUAGE_EVAL_BATCH if texts else EVAL_BATCH,
        mesh=mesh,
        conditions=conditions.build(values, task, root),
    )


def _clients_at_once(values: Values, task: Task, root: keys.RootKeys) -> int:
    """Returns how many clients' activations the device's memory holds, 0 for all of a round's."""
    available = compilation.memory_available()
    if values["clients_per_round"] == 1 or not available:
        return 0
    backward = values["algorithm"] in methods.FIRST_ORDER or values["estimator"] == "projection"
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((values["batch_size"], *x.shape[1:]), x.dtype),
        task.train.examples,
    )
    fitting = compilation.clients_that_fit(
        jax.value_and_grad(task.loss) if backward else task.loss,
        jax.eval_shape(lambda key: precision.wide(task.init(key)), root.init),
        batch,
        int(MEMORY_SHARE * available),
    )
    return 0 if fitting >= values["clients_per_round"] else fitting


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


@functools.lru_cache(maxsize=1)  # runs of a comparison share it
def _dataset(task: str, data_dir: Any) -> sources.Dataset:
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
        f"{', '.join(catalogue.CATALOGUE)}"
    )


def _owned(
    values: Values, dataset: sources.Dataset, root: keys.RootKeys
) -> tuple[sources.Dataset, partition.Partition]:
    """Returns the data set with the examples to keep, and whose they are."""
    client_ids = dataset.client_ids
    if values["partition"] == "natural":
        if client_ids is None:
            raise ValueError(f"--partition=natural: {dataset.name} names no owners of its examples")
        owners = [None if i < 0 else i for i in client_ids.tolist()]
        kept, client_ids = partition.known_owners(
            owners,
            values.get("missing_owner") or "error",
            lambda i: f"{dataset.name}, train, example {i} (from 0)",
        )
        if len(kept) < len(owners):
            train = {name: column[kept] for name, column in dataset.train.items()}
            dataset = dataset._replace(train=train)
    return dataset, partitions.share_out(values, dataset.train["label"], root, client_ids)
