"""What a run needs, built from its config: task, simulator, and the fingerprints of its inputs."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from zofl_jax import keys, precision
from zofl_jax.algorithms import METHODS
from zofl_jax.configuration import choices, kinds, partitions, public, schedules, texts, wrapping
from zofl_jax.configuration.config import Config, Data, Quadratic, Rounds, Texts, everything
from zofl_jax.configuration.phases import batch_shapes, build_phases
from zofl_jax.core import ServerState, Task
from zofl_jax.data import partition, sources
from zofl_jax.directions import batching, local_models
from zofl_jax.engine import compilation, placement, simulation
from zofl_jax.engine.processes import Team
from zofl_jax.models import architectures
from zofl_jax.models.images import MODELS
from zofl_jax.planning import estimates
from zofl_jax.runs import fingerprints, recording
from zofl_jax.runs.directory import open_run, read_flags
from zofl_jax.settings import settings_of
from zofl_jax.tasks import objectives, quadratic, tokens, vision

if TYPE_CHECKING:
    from zofl_jax.tasks.language import LanguageTask

EVAL_BATCH, LANGUAGE_EVAL_BATCH = 512, 32  # examples at once
MEMORY_SHARE = 0.8  # of what is free, for a round


class Experiment(NamedTuple):
    """What a run needs, built from flags."""

    task: Task
    simulator: simulation.Simulator
    label_counts: np.ndarray | None  # [num_clients, num_classes]
    minimum: float | None  # the least test loss, where it is known
    inputs: Callable[[], fingerprints.Fingerprints]  # of data and base model, see `fingerprints`
    language: "LanguageTask | None" = None  # of texts
    notes: tuple[str, ...] = ()
    calibration: public.Calibration | None = None  # public data of a mask

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user."""
        own = texts.notices(self.language) if self.language else ()
        return (*self.notes, *own)


Devices = int | placement.Shape | Mesh | AbstractMesh | None
"""How many devices clients are shared out over, the shape of a mesh, or a mesh, whose devices need
not be there; None for what is usual."""


def build(config: Config, devices: Devices = None, team: Team | None = None) -> Experiment:
    """Returns the task and the simulator that flags describe.

    Args:
      config: from `resolve`.
      devices: how many devices the cohort is shared out over. Unless given, all accelerators;
        on a CPU as many as it has cores for convolutional models, which use one thread a
        device, and one for others, whose products use all cores. Of each process, where there
        are several. A shape gives the groups of clients, and the devices of a group, which hold
        the params together, over all processes.
      team: the processes that this one leads; None if there are no others.

    Raises:
      ValueError: for data that is missing or malformed, or settings that don't fit it.
      ImportError: where an extra of the package is missing.
    """
    mesh = _mesh(config, devices)
    with placement.Placement(mesh).starting():
        prepared = _prepare(config)
    simulator, placed = _simulator(config, prepared.task, mesh, prepared.calibration)
    expected = _expected_memory(placed, simulator)
    if team:
        simulator = team.lead(simulator)
    notes = (*prepared.notes, *_notes(config, simulator), *expected)
    return Experiment(
        prepared.task,
        simulator,
        prepared.label_counts,
        prepared.minimum,
        prepared.inputs,
        prepared.language,
        notes,
        prepared.calibration,
    )


def of_architecture(
    config: Config,
    architecture: architectures.Config,
    length: int,
    devices: Devices = None,
) -> simulation.Simulator:
    """Returns the simulator of a config of texts with a model that is known by its sizes alone.

    Clients have random tokens, as many examples as a batch has, and the weights are never made: for
    `planning.plans`.

    Args:
      config: from `resolve`, of a task of texts.
      architecture: in place of `--model`; `--dtype` and `--matmul_dtype` apply to it.
      length: tokens of an example.
      devices: as `build`.

    Raises:
      ValueError: for another kind of task, settings that need weights or texts, or too long
        sequences.
    """
    if config.kind != "texts":
        raise ValueError(f"--architecture is a language model, and --task={config.task} no texts")
    if config.mask != "none":
        raise ValueError(f"--mask={config.mask} needs weights, which --architecture has none of")
    model = dataclasses.replace(
        architecture,
        param_dtype=config.dtype,
        compute_dtype=config.dtype,
        matmul_dtype=config.matmul_dtype,
    )
    whole = config.objective != "cross_entropy"
    task = tokens.random_task(model, config.num_clients, config.batch_size, length, whole=whole)
    if config.lora_rank or config.train_only:
        root = keys.root(config.seed, config.prng_impl)
        task = tokens.partly_trained(task, functools.partial(texts.divided, config, root))
    return _simulator(config, task, _mesh(config, devices))[0]


def inputs(config: Config, devices: Devices = None) -> fingerprints.Fingerprints:
    """Returns the fingerprints of what `build` reads, without building a simulator.

    Raises:
      ValueError, ImportError: as `build`.
    """
    _mesh(config, devices)  # before the backend is first used
    # Runs of a comparison differ in other settings, and share it.
    names = {n for group in (Data, Rounds, Texts, Quadratic) for n in settings_of(group)}
    names = (names | {"availability", "mask", "mask_data"}) - {"rounds", "eval_every"}
    return _inputs(Config(**{name: getattr(config, name) for name in names}))


@functools.lru_cache
def _inputs(config: Config) -> fingerprints.Fingerprints:
    return _prepare(config).inputs()


class _Prepared(NamedTuple):
    task: Task
    label_counts: np.ndarray | None
    minimum: float | None
    inputs: Callable[[], fingerprints.Fingerprints]
    language: "LanguageTask | None"
    notes: tuple[str, ...] = ()
    calibration: public.Calibration | None = None  # public data of a mask


def _prepare(config: Config) -> _Prepared:
    """Reads data and base model; the fields are those of `Experiment`."""
    root = keys.root(config.seed, config.prng_impl)
    if config.kind == "quadratic":
        built = quadratic.quadratic(
            root.partition,
            dim=config.quadratic_dim,
            effective_rank=config.effective_rank,
            num_clients=config.num_clients,
            examples_per_client=config.batch_size,
            heterogeneity=config.heterogeneity,
            noise=config.noise,
        )
        inputs = functools.partial(wrapping.inputs, config)
        return _Prepared(built.task, None, built.minimum, inputs, None)
    if config.kind == "texts":
        language, label_counts, text_inputs = texts.build(config, root)
        texts_of_mask = public.of_texts(config, language.model) if config.mask_data else None
        return _Prepared(
            language.task,
            label_counts,
            None,
            lambda: {
                **text_inputs(),
                **wrapping.inputs(config),
                **(texts_of_mask.inputs() if texts_of_mask else {}),
            },
            language,
            calibration=texts_of_mask,
        )
    dataset = _images(config.task, config.data_dir)
    dataset, (order, offsets) = _owned(config, dataset, root)
    model = MODELS[str(config.model)].make(dataset.num_classes)
    objective = objectives.CLASSIFICATION[str(config.objective)]
    task = vision.classification(dataset, model, order, offsets, objective)
    found = public.of_images(config, task, dataset.num_classes) if config.mask_data else None
    counts = partition.label_counts(dataset.train["label"], order, offsets, dataset.num_classes)

    def image_inputs() -> fingerprints.Fingerprints:
        return {
            **fingerprints.rows("training", dataset.train),
            **fingerprints.rows("test", dataset.test),
            "partition": fingerprints.arrays(order, offsets),
            **wrapping.inputs(config),
            **(found.inputs() if found else {}),
        }

    return _Prepared(task, counts, None, image_inputs, None, _of_classes(dataset), found)


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


def _notes(config: Config, simulator: simulation.Simulator) -> tuple[str, ...]:
    if config.perturbation not in choices.FACTORED or config.local_steps == 1:
        return ()
    if not config.method.coefficients or config.mask != "none":
        return ()
    params = jax.eval_shape(simulator.task.init, simulator.root.init)
    if local_models.is_linear(schedules.make_optimizer(config), params):
        return ()
    return (
        f"--optimizer={config.optimizer} is not linear, so at --local_steps={config.local_steps} "
        "every client has a copy of the params; sgd needs none",
    )


def at_learning_rate(experiment: Experiment, config: Config, devices: Devices) -> Experiment:
    """Returns an experiment at what `config` says of learning and directions, with the same data.

    Both share compiled functions through the compilation cache.
    """
    simulator, _ = _simulator(
        config, experiment.task, _mesh(config, devices), experiment.calibration
    )
    return experiment._replace(simulator=simulator)


def resumed(config: Config, workdir: Path) -> tuple[Config, dict[str, Any]]:
    """Returns the config with which a command goes on with a run, and the flags to open it with.

    Runs from before `--bos` put the token first wherever there was one, whatever the model's files
    said. They go on so unless told otherwise, and then a flag differs from theirs. Settings that a
    run does not hold, since they came later, are left out where they have their default, which does
    what was done before there were any.

    Args:
      config: of the command.
      workdir: the run directory, which need not be there.

    Raises:
      RunError: if its flags can't be read.
    """
    if not (workdir / "flags.json").exists():
        return config, config.flat()
    recorded = read_flags(workdir)
    # Older runs hold what their model alone said of these.
    for name in ("clients_at_once", "perturbations_at_once"):
        if getattr(config, name) is None and recorded.get(name) is not None:
            config = config.replace(**{name: recorded[name]})
    told = config.bos != "auto" or "bos" in config.given
    if not told and not recorded.get("bos"):
        config = config.replace(bos=None)
    return config, {
        name: value
        for name, value in config.flat().items()
        if name in recorded or value != everything()[name].default
    }


def rebuild(
    workdir: Path,
    experiment: Experiment,
    round_index: int | None,
    *,
    nearest: bool = False,
    note: Callable[[str], None] = lambda sentence: None,
) -> tuple[ServerState, int, bool | None]:
    """Returns the state of a run after a round, that round, and `recording.rebuild`'s check.

    Args:
      workdir: the run directory.
      experiment: built from its flags.
      round_index: rounds done; the last logged one if None.
      nearest: whether to start from the nearest snapshot, not from round 0.
      note: is told what was found wrong with the run and mended.

    Raises:
      RunError: if the run can't be opened or doesn't hold that round, or if its data or base
        model have changed.
    """
    with open_run(workdir, read_flags(workdir)) as run:
        try:
            run.check_inputs(experiment.inputs())
            done = run.log.last_round + 1 if round_index is None else round_index
            state, same = recording.rebuild(run, experiment.simulator, done, nearest=nearest)
        finally:
            if run.notice:
                note(run.notice)
    return state, done, same


def _simulator(
    config: Config,
    task: Task,
    mesh: Mesh | AbstractMesh | None,
    calibration: public.Calibration | None = None,
) -> tuple[simulation.Simulator, Config]:
    """Returns the simulator, and the config with what was chosen for its devices."""
    of_texts = config.kind == "texts"
    root = keys.root(config.seed, config.prng_impl)
    where, unset = placement.Placement(mesh, task.layout), config.clients_at_once is None
    config = for_devices(config, task, root, where)
    smaller = None
    half = (config.clients_at_once or config.clients_per_round) // 2
    if unset and half:
        fewer = config.replace(clients_at_once=half)
        smaller = functools.partial(build_phases, fewer, task, calibration)
    made = simulation.make_simulator(
        build_phases(config, task, calibration),
        task,
        clients_per_round=config.clients_per_round,
        batch_size=config.batch_size,
        seed=config.seed,
        prng_impl=config.prng_impl,
        weighting=config.weighting,
        eval_batch_size=LANGUAGE_EVAL_BATCH if of_texts else EVAL_BATCH,
        mesh=mesh,
        conditions=wrapping.build(config, task, root),
        smaller=smaller,
    )
    return made, config


def for_devices(
    config: Config, task: Task, root: keys.RootKeys, where: placement.Placement
) -> Config:
    """Returns the config with how many clients and models are evaluated at once on devices."""
    if config.clients_at_once is None:
        one = where.platform == "cpu" and convolutional(config)
        config = config.replace(
            clients_at_once=1 if one else _clients_at_once(config, task, root, where)
        )
    if config.perturbations_at_once is None:
        params = jax.eval_shape(task.init, root.init)
        clients = config.clients_at_once or config.clients_per_round
        each = batching.rows_of_an_example(task.test, convolutional(config))
        shared, groups = config.perturbation in choices.FACTORED, config.groups
        at_once = batching.models_at_once(
            where.platform,
            rows=clients * config.batch_size * each // groups,
            params=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
            count=config.num_perturbations,
            shared=shared,
        )
        if shared:  # a pass over the batch at least
            at_once = max(at_once, groups)
        config = config.replace(perturbations_at_once=at_once)
    return config


def _clients_at_once(
    config: Config,
    task: Task,
    root: keys.RootKeys,
    where: placement.Placement = placement.ONE_DEVICE,
) -> int:
    """Returns how many clients' activations a device's memory holds, 0 for all of a round's."""
    available = compilation.memory_available(where)
    if config.clients_per_round == 1 or not available:
        return 0
    first = METHODS[config.warmup].order if config.warmup_rounds else 0
    backward = 1 in (config.method.order, first) or config.estimator == "projection"
    fitting = compilation.clients_that_fit(
        jax.value_and_grad(task.loss) if backward else task.loss,
        jax.eval_shape(lambda key: precision.wide(task.init(key)), root.init),
        batch_shapes(config, task),
        int(MEMORY_SHARE * available),
        where if where.split > 1 or not where.is_there else placement.ONE_DEVICE,
    )
    return 0 if fitting >= config.clients_per_round else fitting


def _expected_memory(config: Config, simulator: simulation.Simulator) -> tuple[str, ...]:
    """Returns a sentence for the user where the memory may not suffice.

    Raises:
      ValueError: where it can't.
    """
    if not simulator.placement.is_there:
        return ()
    return estimates.check(
        simulator, batch_shapes(config, simulator.task), config.clients_at_once or 0
    )


def _mesh(config: Config, devices: Devices) -> Mesh | AbstractMesh | None:
    if isinstance(devices, Mesh | AbstractMesh):
        return devices
    if isinstance(devices, placement.Shape):
        return _mesh_of(devices)
    one = devices is None and not convolutional(config)
    placement.use_cpu_devices(1 if one else devices)
    found = jax.local_devices()  # as many in each process, see `processes.join`
    if one and found[0].platform == "cpu":
        devices = 1
    if devices is not None and devices > len(found):
        raise ValueError(f"--devices={devices}: there are only {len(found)}")
    wanted = len(found) if devices is None else devices
    busy = math.ceil(config.clients_per_round / jax.process_count())
    return placement.clients_mesh(placement.devices_of_each_process(min(wanted, busy)))


def _mesh_of(shape: placement.Shape) -> Mesh | None:
    """Returns the mesh of a shape, over the devices of all processes."""
    placement.use_cpu_devices(None if shape.clients is None else shape.clients * shape.model)
    devices = placement.devices_of_each_process(len(jax.local_devices()))
    try:
        return placement.make_mesh(*shape, devices)
    except ValueError as error:
        raise ValueError(f"--mesh: {error}") from error


def convolutional(config: Config) -> bool:
    """Returns whether the model is one of convolutions."""
    return config.kind == "images" and MODELS[str(config.model)].convolutional


@functools.lru_cache(maxsize=1)  # runs of a comparison share it
def _images(task: str, data_dir: str | None) -> sources.Dataset:
    return kinds.load_images(task, data_dir)


def _owned(
    config: Config, dataset: sources.Dataset, root: keys.RootKeys
) -> tuple[sources.Dataset, partition.Partition]:
    """Returns the data set with the examples to keep, and whose they are."""
    client_ids = dataset.client_ids
    if config.partition == "natural":
        if client_ids is None:
            raise ValueError(f"--partition=natural: {dataset.name} names no owners of its examples")
        owners = [None if i < 0 else i for i in client_ids.tolist()]
        kept, client_ids = partition.known_owners(
            owners,
            config.missing_owner or "error",
            lambda i: f"{dataset.name}, train, example {i} (from 0)",
            config.least_examples,
        )
        if len(kept) < len(owners):
            train = {name: column[kept] for name, column in dataset.train.items()}
            dataset = dataset._replace(train=train)
    return dataset, partitions.share_out(config, dataset.train["label"], root, client_ids)
