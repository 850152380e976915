"""Flags become what they say, or are refused with their name and value."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flag_lines import build, resolve
from tiny_tasks import BATCH_SIZE, softmax_task

import experiments
from experiments import flags as settings
from experiments.entry import UserError
from zofl_jax import keys
from zofl_jax.configuration import experiment as experiments_of
from zofl_jax.configuration import schedules, texts
from zofl_jax.configuration.config import Config, everything
from zofl_jax.configuration.phases import build_phases
from zofl_jax.configuration.schedules import Change
from zofl_jax.core import ClientData, Phase, Task
from zofl_jax.data.text import TextData
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import compilation, placement
from zofl_jax.engine.simulation import phase_at

FOLDER = Path(experiments.__file__).parent / "flagfiles"
COMPARISONS = {f for f in FOLDER.glob("*.flags") if "\n--method=" in f.read_text()}
FLAGFILES = sorted(set(FOLDER.glob("*.flags")) - COMPARISONS)
DIM = 7  # odd, so that no Rademacher direction is orthogonal to the diagonal


# Flags.


def test_defaults_are_a_run_on_digits():
    config = resolve()
    assert tuple(config.flat()) == tuple(everything())
    chosen = {name: config.get(name) for name in ("task", "model", "algorithm", "estimator")}
    assert chosen == {
        "task": "digits",
        "model": "softmax",
        "algorithm": "decomfl",
        "estimator": "central",
    }
    assert Config.from_flat(json.loads(json.dumps(config.flat()))) == config


def test_every_flag_of_the_run_is_kept_in_its_directory():
    # A flag that is not kept could change between a run and its resumption.
    run_flags = settings.FLAGS.flags_by_module_dict()[settings.__name__]
    assert {flag.name for flag in run_flags} == set(everything()) == set(resolve().flat())
    assert all(flag.help for flag in run_flags)


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flag_files_can_be_read_and_say_what_they_do(path):
    config = resolve(f"--flagfile={path}")
    assert config.rounds >= config.eval_every
    text = path.read_text()
    assert f"python -m experiments.train --flagfile=experiments/flagfiles/{path.name}" in text
    header = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert "accuracy" in header


def test_the_quadratic_has_one_example_a_client_unless_asked_for_more():
    config = resolve("--task=quadratic")
    assert (config.model, config.batch_size) == ("quadratic", 1)
    assert resolve("--task=quadratic", "--batch_size=32").batch_size == 32


def test_how_many_are_evaluated_at_once_is_left_to_the_device_for_large_models(tmp_path):
    """On a CPU convolutional models take one client and one perturbed model at a time."""
    left = resolve("--model=mnist_cnn")
    assert (left.clients_at_once, left.perturbations_at_once) == (None, None)
    root = keys.root(0)
    placed = experiments_of.for_devices(left, softmax_task(), root, placement.ONE_DEVICE)
    assert (placed.clients_at_once, placed.perturbations_at_once) == (1, 1)
    # Memory is estimated of what was chosen, not of what was asked for.
    small = left.replace(batch_size=BATCH_SIZE, clients_per_round=2)
    _, chosen = experiments_of._simulator(small, softmax_task(), None)
    assert (chosen.clients_at_once, chosen.perturbations_at_once) == (1, 1)
    told = resolve("--model=mnist_cnn", "--clients_at_once=4", "--perturbations_at_once=2")
    assert experiments_of.for_devices(told, softmax_task(), root, placement.ONE_DEVICE) == told
    plain = resolve("--model=mlp")
    assert (plain.clients_at_once, plain.perturbations_at_once) == (0, 0)
    # Runs from before that hold what their model alone said then, and go on with it.
    (tmp_path / "flags.json").write_text(json.dumps(left.flat() | {"clients_at_once": 1}))
    assert experiments_of.resumed(left, tmp_path)[0].clients_at_once == 1


def test_runs_from_before_bos_was_a_flag_go_on_with_it_before_every_text(tmp_path):
    recorded = tmp_path / "flags.json"
    texts = ("--task=text", "--data_dir=x.tsv", "--model=hf:x", "--verbalizers=0=bad,1=good")
    resumed = experiments_of.resumed
    assert resolve().bos is None
    config = resolve(*texts)
    assert resumed(config, tmp_path) == (config, config.flat())
    assert config.bos == "auto"
    for old, bos in [({}, None), ({"bos": "auto"}, "auto"), ({"bos": "always"}, "auto")]:
        recorded.write_text(json.dumps(config.flat() | {"bos": None} | old))
        later = config.replace(bos=bos)
        assert resumed(config, tmp_path) == (later, later.flat())
    recorded.write_text("{}")
    assert resumed(resolve(*texts, "--bos=auto"), tmp_path)[0].bos == "auto"  # open_run refuses it


def test_runs_go_on_when_a_setting_has_come_that_has_its_default(tmp_path):
    config = resolve()
    recorded = {n: v for n, v in config.flat().items() if n not in ("hiso_nu", "pool_size")}
    (tmp_path / "flags.json").write_text(json.dumps(recorded))
    assert experiments_of.resumed(config, tmp_path) == (config, recorded)
    hiso = resolve("--algorithm=hiso", "--hiso_nu=0.3")
    found = experiments_of.resumed(hiso, tmp_path)[1]
    assert "hiso_nu" in found and "pool_size" not in found


def test_texts_take_as_many_clients_at_a_time_as_memory_holds(monkeypatch):
    root, task = keys.root(0), softmax_task()
    config = resolve("--clients_per_round=5", f"--batch_size={BATCH_SIZE}")

    def chosen(available, **changes):
        monkeypatch.setattr(compilation, "memory_available", lambda where=None: available)
        return experiments_of._clients_at_once(config.replace(**changes), task, root)

    assert chosen(2**30) == 0  # all of them
    assert chosen(1) == 1
    between = [chosen(available) for available in range(200, 4000, 200)]
    assert {2, 3, 4} <= set(between) and between[-1] == 0
    assert chosen(0) == 0  # not known
    assert chosen(900) > chosen(900, estimator="projection") >= 1  # the gradient needs more


INTEGERS = (
    "num_clients",
    "clients_per_round",
    "local_steps",
    "num_perturbations",
    "batch_size",
    "rank",
    "rounds",
    "eval_every",
    "shards_per_client",
    "quadratic_dim",
)
FLOATS = (
    "smoothing",
    "learning_rate",
    "momentum",
    "weight_decay",
    "dirichlet_alpha",
    "effective_rank",
    "heterogeneity",
    "noise",
)
CHOICES = (
    "model",
    "algorithm",
    "estimator",
    "perturbation",
    "optimizer",
    "partition",
    "weighting",
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in INTEGERS for value in ("0", "-1", "1.5", "many")],
        *[(name, value) for name in FLOATS for value in ("nan", "inf", "-1.0", "much")],
        *[(name, value) for name in CHOICES for value in ("nonsense", "")],
        *[(name, "0.0") for name in ("smoothing", "learning_rate", "dirichlet_alpha")],
        ("momentum", "1.0"),
        ("momentum", "1.5"),
        ("clients_at_once", "-1"),
        ("perturbations_at_once", "-1"),
        ("seed", "-1"),
        ("seed", "4294967296"),
        ("prng_impl", "rbg"),
        ("prng_impl", "unsafe_rbg"),
        ("prng_impl", "philox4x32"),
        ("prng_impl", "mersenne"),
        ("task", "nonsense"),
        ("task", ""),
        ("task", "tfds"),
        ("effective_rank", "0.5"),
        ("effective_rank", "1001.0"),
    ],
)
def test_every_flag_is_checked_and_the_message_has_the_value(name, value):
    arguments = [f"--{name}={value}"]
    if name in ("effective_rank", "quadratic_dim", "heterogeneity", "noise"):
        arguments.append("--task=quadratic")
    with pytest.raises((flags.Error, UserError)) as caught:
        build(*arguments)
    message = str(caught.value)
    assert re.search(rf"{name}\b.*{re.escape(value)}", message, re.DOTALL), message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients_per_round=21"], "--clients_per_round=21 is more than --num_clients=20"),
        (["--task=quadratic", "--model=mlp"], "--model=mlp has no meaning with --task=quadratic"),
        (["--task=idx"], "--task=idx needs --data_dir=the folder with the IDX files"),
        (["--task=npz"], r"--task=npz needs --data_dir=the .npz file"),
        (["--task=npz", "--data_dir=/no/where.npz"], r"there is no file /no/where.npz: "),
        (["--task=idx", "--data_dir=/no/where"], r"there is no folder /no/where: "),
        (["--task=tfds:mnits", "--data_dir=/no"], "unknown TFDS name 'mnits'"),
        (["--partition=natural"], "--partition=natural: digits names no owners of its examples"),
        (["--prng_impl=rbg"], "'rbg' is refused: under vmap it takes the whole batch from"),
        (["--batch_size=73"], r"fewer examples than batch_size=73 \(the smallest, .* has 72\)"),
        (["--num_clients=2000"], r"num_clients must be in \[1, 1442\], .* got 2000"),
        (["--model=lenet"], "lenet needs images of at least 16 x 16 pixels, got 8 x 8"),
        (["--task=quadratic", "--quadratic_dim=5"], r"effective_rank must be in \[1, dim = 5\]"),
    ],
)
def test_flags_that_do_not_fit_each_other_or_the_data(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        build(*arguments)
    assert "\n" not in str(caught.value)


# What is built.


def test_low_rank_directions_say_where_they_save_nothing():
    low_rank = ["--perturbation=low_rank", "--rank=2", "--local_steps=2"]
    assert build(*low_rank).notices == ()
    assert build(*low_rank, "--optimizer=adam", "--local_steps=1").notices == ()
    (notice,) = build(*low_rank, "--optimizer=adam").notices
    assert "--optimizer=adam is not linear" in notice


def test_digits_are_shared_out_to_all_clients():
    for kind in ("iid", "dirichlet", "shards"):
        experiment = build(f"--partition={kind}", "--num_clients=10", "--batch_size=8")
        assert experiment.label_counts.shape == (10, 10)
        assert experiment.label_counts.sum() == 1442
        assert experiment.label_counts.sum(axis=1).min() >= 8
        assert experiment.task.train.num_clients == 10
        assert experiment.minimum is None
        classes = (experiment.label_counts > 0).sum(axis=1)
        assert classes.max() <= 4 if kind == "shards" else classes.max() > 4


def test_owners_of_a_file_are_its_natural_clients(tmp_path):
    images, labels = np.zeros((12, 4, 4), np.uint8), np.arange(12) % 3
    np.savez(
        tmp_path / "data.npz",
        x_train=images,
        y_train=labels,
        x_test=images,
        y_test=labels,
        client_ids=np.arange(12) % 4,
    )
    natural = [
        "--task=npz",
        f"--data_dir={tmp_path / 'data.npz'}",
        "--partition=natural",
        "--batch_size=3",
    ]
    experiment = build(*natural, "--clients_per_round=4")
    assert experiment.label_counts.tolist() == [[1, 1, 1]] * 4
    with pytest.raises(UserError, match=r"clients_per_round must be in \[1, num_clients = 4\]"):
        build(*natural)


def test_the_least_loss_of_the_quadratic_is_known():
    experiment = build("--task=quadratic", "--quadratic_dim=9", "--effective_rank=3")
    assert experiment.label_counts is None
    assert 0 < experiment.minimum < 10
    task = experiment.task
    assert task.loss({"x": jnp.zeros(9)}, task.test) > experiment.minimum


@pytest.mark.optimized
def test_the_seed_draws_directions_and_data_and_the_generator_directions_alone():
    def drawn(*arguments):
        experiment = build("--task=quadratic", "--quadratic_dim=20", *arguments)
        simulator = experiment.simulator
        data = np.asarray(experiment.task.train.examples["center"]).tobytes()
        cohorts = simulator.cohorts(np.arange(3)).tobytes()
        return simulator.seeds(np.arange(3)).tobytes(), (data, cohorts)

    base, other = drawn(), drawn("--seed=1")
    assert base[0] != other[0] and base[1] != other[1]
    longer = drawn("--prng_impl=threefry4x32")
    assert len(longer[0]) == 2 * len(base[0]) and longer[1] == base[1]


# The algorithm and its schedule, on a loss whose differences are known.


def bowl(params, batch):
    return jnp.sum(jnp.square(params["x"])) / 2 + 0 * jnp.sum(batch)


def phases_of(*arguments) -> list[Phase]:
    clients = ClientData((), np.arange(20), np.arange(21))
    task = Task("bowl", lambda key: {"x": jnp.zeros(DIM)}, bowl, lambda x, b: {}, clients, None)
    return build_phases(resolve("--task=quadratic", *arguments), task)


@jax.jit
def round_key(r):
    return keys.round_key(keys.root(0).shared, r)


def descend(phases, scalars, rounds, start):
    """Returns the params before each round, and after the last, if `scalars` are broadcast."""
    servers = [jax.jit(phase.algorithm.server) for phase in phases]
    state = phases[0].algorithm.init({"x": jnp.full(DIM, float(start))})
    states = [state]
    for r in range(rounds):
        state = servers[phase_at(phases, r)](round_key(r), state, scalars(r))
        states.append(state)
    return states


def test_a_schedule_is_followed_round_by_round():
    text = "2:lr=0.5,P=2;4:mu=0.1,P=1;5:P=1,lr=2"
    arguments = [
        "--estimator=forward",
        "--perturbation=sphere",
        "--local_steps=2",
        "--num_perturbations=3",
        "--learning_rate=0.1",
        "--smoothing=1e-2",
        "--momentum=0",
    ]
    phases = phases_of(*arguments, f"--schedule={text}")
    assert [phase.first_round for phase in phases] == [0, 2, 4]  # from 5 on P is the same
    counts = [3, 3, 6, 6, 3, 3, 3]
    rates = [0.1, 0.1, 0.05, 0.05, 0.1, 0.2, 0.2]
    smoothings = [1e-2, 1e-2, 1e-2, 1e-2, 1e-3, 1e-2, 1e-2]

    @functools.cache
    def direction(count):
        """Returns key -> the sum of both local steps' directions, for scalars of one."""
        expand = estimators.forward_difference(count, 1.0, perturbations.sphere()).expand
        params, ones = {"x": jnp.zeros(DIM)}, jnp.ones(count)
        return jax.jit(
            lambda key: sum(expand(keys.step_key(key, k), params, ones)["x"] for k in range(2))
        )

    states = descend(phases, lambda r: jnp.ones((2, counts[r])), 7, start=0)
    clients = [jax.jit(phase.algorithm.client) for phase in phases]
    for r, (count, rate, smoothing) in enumerate(zip(counts, rates, smoothings, strict=True)):
        moved = states[r + 1].params["x"] - states[r].params["x"]
        expected = -rate * direction(count)(round_key(r))
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)

        # At 0, (f(μ z) − f(0)) / μ = μ |z|² / 2 = μ d / 2 on the sphere.
        at_zero = states[r]._replace(params={"x": jnp.zeros(DIM)})
        result = clients[phase_at(phases, r)](
            round_key(r), at_zero, (), jnp.zeros((2, 1)), round_key(r)
        )
        assert result.upload.shape == (2, count)
        np.testing.assert_allclose(result.upload[0], smoothing * DIM / 2, rtol=1e-4)


def test_factors_on_perturbations_are_rounded_and_never_below_one():
    phases = phases_of("--num_perturbations=3", "--schedule=1:P=0.1;2:P=1.5")
    spec, key = jnp.zeros((4, 1, 1)), round_key(0)
    state = phases[0].algorithm.init({"x": jnp.zeros(DIM)})
    shapes = [
        jax.eval_shape(phase.algorithm.client, key, state, (), spec, key).upload.shape
        for phase in phases
    ]
    assert shapes == [(4, 3), (4, 1), (4, 4)]


@pytest.mark.parametrize(
    ("estimator", "perturbation"),
    [
        ("forward", "gaussian"),
        ("central", "gaussian"),
        ("central", "rademacher"),
        ("central", "sphere"),
        ("projection", "gaussian"),
        ("jvp", "gaussian"),
    ],
)
def test_every_estimator_and_perturbation_measures_the_slope(estimator, perturbation):
    phases = phases_of(
        f"--estimator={estimator}",
        f"--perturbation={perturbation}",
        "--num_perturbations=2",
        "--local_steps=1",
    )
    algorithm = phases[0].algorithm
    state = algorithm.init({"x": jnp.full(DIM, 2.0)})
    sample = getattr(perturbations, perturbation)().sample

    @jax.jit
    def measured_and_exact(key):
        upload = algorithm.client(key, state, (), jnp.zeros((1, 1)), key).upload[0]
        directions = jax.vmap(lambda k: sample(k, state.params)["x"])(
            keys.direction_keys(keys.step_key(key, 0), 2)
        )
        return upload, directions @ state.params["x"]

    upload, slopes = measured_and_exact(jax.random.key(1))
    # The differences are of a loss of 12, known to a few ε · 12 / μ.
    np.testing.assert_allclose(
        upload, slopes, atol=1e-5 if estimator in ("projection", "jvp") else 2e-2
    )
    assert abs(slopes).min() > 0.01


def test_weight_decay_is_added_to_the_direction_of_sgd():
    phases = phases_of(
        "--local_steps=1",
        "--num_perturbations=2",
        "--learning_rate=0.1",
        "--momentum=0.5",
        "--weight_decay=0.2",
    )
    first, second, third = (
        float(state.params["x"][0]) for state in descend(phases, lambda r: jnp.zeros((1, 2)), 2, 1)
    )
    assert second == pytest.approx(first - 0.1 * 0.2 * first)
    assert third == pytest.approx(second - 0.1 * (0.2 * second + 0.5 * 0.2 * first))


def test_weight_decay_of_adam_is_decoupled():
    adam = ["--optimizer=adam", "--local_steps=1", "--num_perturbations=2", "--learning_rate=0.1"]
    phases = phases_of(*adam, "--weight_decay=0.2")
    first, second, third = (
        float(state.params["x"][0]) for state in descend(phases, lambda r: jnp.zeros((1, 2)), 2, 1)
    )
    assert second == pytest.approx(first * (1 - 0.1 * 0.2))
    assert third == pytest.approx(second * (1 - 0.1 * 0.2))
    # Adam's first step is the learning rate in each coordinate, whatever the direction's length.
    states = descend(phases_of(*adam), lambda r: jnp.full((1, 2), 100.0), 1, 0)
    np.testing.assert_allclose(abs(states[1].params["x"]), 0.1, rtol=1e-3)


# Schedules as text.


def test_schedules_are_read():
    assert schedules.parse_schedule("") == [Change(0)]
    assert schedules.parse_schedule("5:lr=0.5") == [Change(0), Change(5, learning_rate=0.5)]
    text = " 5 : lr=0.5 , mu=1e-1,P=2; 7:P=3;"
    assert schedules.parse_schedule(text) == [Change(0), Change(5, 0.5, 0.1, 2), Change(7, 1, 1, 3)]


def test_the_authors_schedule():
    assert schedules.parse_schedule("authors") == [
        Change(0),
        Change(500, learning_rate=0.8, num_perturbations=2),
        Change(1000, learning_rate=0.5, num_perturbations=4),
        Change(2000, learning_rate=0.3, num_perturbations=8),
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nonsense", "nonsense"),
        ("5", "5"),
        ("5:", "5:"),
        ("5:lr", "5:lr"),
        ("5:lr=", "5:lr="),
        ("5:rate=0.5", "5:rate=0.5"),
        ("5:lr=0.5;x:lr=1", "x:lr=1"),
        ("5.5:lr=0.5", "5.5:lr=0.5"),
        (":lr=0.5", ":lr=0.5"),
        ("5:lr=0", "5:lr=0"),
        ("5:P=-1", "5:P=-1"),
        ("5:mu=nan", "5:mu=nan"),
        ("5:lr=inf", "5:lr=inf"),
        ("0:lr=0.5", "0:lr=0.5"),
        ("-1:lr=0.5", "-1:lr=0.5"),
        ("5:lr=0.5;5:P=2", "5:P=2"),
        ("5:lr=0.5;4:P=2", "4:P=2"),
    ],
)
def test_a_part_that_is_no_schedule_is_named(text, part):
    with pytest.raises(UserError, match=rf"^--schedule: .*{re.escape(repr(part))}"):
        resolve(f"--schedule={text}")


def test_missing_owners_of_images_and_texts(tmp_path):
    images = np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2)
    split = {"x_train": images, "y_train": np.arange(12) % 3 + 1}
    split |= {"x_test": images, "y_test": np.arange(12) % 3 + 1}
    owners = np.array([5, np.nan, 2, 5, np.nan, *[2] * 7])
    np.savez(tmp_path / "x.npz", **split, client_ids=owners)
    flags = ("--task=npz", f"--data_dir={tmp_path / 'x.npz'}", "--partition=natural")
    flags += ("--batch_size=1", "--clients_per_round=2")
    with pytest.raises(UserError, match=r"^x, train, example 1 \(from 0\) names no owner, as 2 of"):
        build(*flags)
    for choice, kept, clients in (
        ("drop", [0, 2, 3, *range(5, 12)], [[1, *range(3, 10)], [0, 2]]),
        ("own", [*range(12)], [[2, *range(5, 12)], [0, 3], [1], [4]]),
    ):
        experiment = build(*flags, f"--missing_owner={choice}")
        train = experiment.task.train
        np.testing.assert_array_equal(train.examples["image"][..., 0], images[kept])
        np.testing.assert_array_equal(train.examples["label"], split["y_train"][kept])
        parts = np.split(np.asarray(train.order), train.offsets[1:-1])
        assert [part.tolist() for part in parts] == clients
        assert experiment.notices == (
            "1 of the 4 classes of x have no training example, label 0 first; labels count from 0",
        )
    rows = [{"who": who} for who in ("b", None, 3, " b", "")]
    data = TextData(rows, rows, "x")
    config = Config(partition="natural", client_column="who", missing_owner="own")
    kept_data, ids = texts._owned(config, data)
    assert kept_data == data and ids.tolist() == [1, 2, 0, 1, 3]
    kept_data, ids = texts._owned(config.replace(missing_owner="drop"), data)
    assert kept_data.train == [rows[0], rows[2], rows[3]] and ids.tolist() == [1, 0, 1]
    assert kept_data.test == rows
    with pytest.raises(ValueError, match=r"^x, train, row 1 names no owner, as 2 of 5"):
        texts._owned(config.replace(missing_owner=None), data)  # of old runs
