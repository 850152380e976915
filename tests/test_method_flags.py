"""`--algorithm` and its flags: what they build, and where they are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flag_lines import resolve
from tiny_tasks import softmax_task

from experiments.entry import UserError
from zofl_jax import keys
from zofl_jax.algorithms import METHODS
from zofl_jax.configuration import needs
from zofl_jax.configuration.config import everything
from zofl_jax.configuration.phases import build_phases
from zofl_jax.engine import ledger
from zofl_jax.settings import settings_of

SCALARS = {
    *("decomfl", "decomfl_groups", "hiso", "mezo", "feedsign", "fedkseed", "fedkseed_pro"),
    "ferret",
}


def shapes(*arguments):
    """Returns the shapes of the messages of the first phase, on 18 params."""
    task, root = softmax_task(), keys.root(0)
    algorithm = build_phases(resolve(*arguments), task)[0].algorithm
    params = jax.eval_shape(task.init, root.init)
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((algorithm.local_steps, 4, *x.shape[1:]), x.dtype),
        task.train.examples,
    )
    return algorithm, ledger.message_shapes(algorithm, root.shared, params, batches, cohort=3)


@pytest.mark.parametrize("name", METHODS)
def test_every_algorithm_is_built_from_its_name(name):
    algorithm, messages = shapes(f"--algorithm={name}")
    sent = ledger.tree_bytes(messages.upload)
    if name in SCALARS:
        assert sent == {
            "decomfl": 4 * 20 * 4,
            "decomfl_groups": 4 * 20 * 4 + 1,
            "hiso": 4 * 20 * 4,
            "mezo": 4,
            "feedsign": 1,
            "ferret": 4 * (267 + 53),  # of 320, for 15 and 3 params
        }.get(name, 200 * (2 + 4))
    else:
        numbers = {"scaffold": 2 * 18, "hybrid": 4 * 20 + 15}  # of which 15 are the last leaf's
        assert sent == numbers.get(name, 18) * 4
    expected = {"local_steps": 4, **METHODS[name].defaults, **METHODS[name].fixed}
    assert algorithm.local_steps == expected["local_steps"]
    assert (messages.sync is None) == (name in SCALARS - {"fedkseed", "fedkseed_pro", "ferret"})


def test_what_methods_say_of_settings_names_settings():
    for name, method in METHODS.items():
        assert method.name == name and method.summary
        assert {*method.defaults, *method.fixed, *method.refuses} <= set(everything())
        for setting, declared in settings_of(method.options).items():
            assert everything()[setting] == declared, "two methods declare it differently"
    assert {*needs.NEEDS, *needs.MAY_BE_SHARED} <= set(everything())


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("float16", 36),
        ("bfloat16", 36),
        ("int8", 18 + 4),
        ("int4", 9 + 4),
        ("qsgd", 9 + 4),
        ("top_k", 2 * (4 + 2)),
        ("sign", 3 + 4),
    ],
)
def test_compressed_uploads_are_counted_as_they_are_sent(codec, expected):
    """18 numbers: codes are packed, scales and indices are counted."""
    fraction = ["--top_k_fraction=0.1"] if codec == "top_k" else []
    _, messages = shapes("--algorithm=fedavg", f"--compression={codec}", *fraction)
    assert ledger.tree_bytes(messages.upload) == expected


@pytest.mark.parametrize(
    ("codec", "expected"),
    [("float16", 36), ("bfloat16", 36), ("int8", 18 + 8), ("int4", 2 + 8 + 8)],
)
def test_compressed_broadcasts_are_counted_as_they_are_sent(codec, expected):
    """18 numbers in two leaves, each with a scale of its own; uploads stay as they are."""
    _, messages = shapes("--algorithm=fedavg", f"--broadcast_compression={codec}")
    assert ledger.tree_bytes(messages.broadcast) == expected
    assert ledger.tree_bytes(messages.upload) == 4 * 18


def test_directions_of_few_examples_are_as_many_as_come_out():
    """Of 20 by default, the next multiple of the 32 groups; at a rate for their noise."""
    config = resolve("--examples_per_direction=1")
    assert (config.groups, config.num_perturbations) == (32, 32)
    whole = resolve("--num_perturbations=32")
    assert whole.groups == 1
    assert config.learning_rate < whole.learning_rate
    assert resolve("--examples_per_direction=32") == whole.replace(
        examples_per_direction=32, num_perturbations=20, learning_rate=resolve().learning_rate
    )


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_the_scalars_of_fedkseed_are_compressed_and_their_seeds_are_not(codec):
    arguments = ["--algorithm=fedkseed", "--local_steps=10", f"--compression={codec}"]
    _, messages = shapes(*arguments)
    assert ledger.tree_bytes(messages.upload) == 10 * 2 + {"float16": 20, "int8": 10 + 4}[codec]
    assert ledger.tree_bytes(messages.broadcast) == 3 * (10 * (2 + 4) + 4)


def test_the_scalars_of_groups_are_compressed_both_ways_and_the_group_is_not():
    arguments = ["--algorithm=decomfl_groups", "--client_groups=3", "--compression=int8"]
    _, messages = shapes(*arguments, "--broadcast_compression=float16")
    assert ledger.tree_bytes(messages.upload) == 1 + 4 * 20 + 4
    assert ledger.tree_bytes(messages.broadcast) == 3 * 4 * 20 * 2


def test_late_clients_of_a_pool_are_sent_its_accumulators():
    algorithm, messages = shapes("--algorithm=ferret", "--ferret_pool=3", "--num_perturbations=6")
    assert messages.sync.shape == (3, 6) and not messages.sync_alone
    assert algorithm.init({"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}).opt_state.size == 18


def test_the_decay_of_the_servers_moments():
    """A step of the server from given moments, by the formulas of FedAdam and FedAdagrad."""

    def moments(*arguments):
        algorithm, _ = shapes(*arguments)
        start = algorithm.init(jnp.zeros(1))
        start = start._replace(opt_state=type(start.opt_state)(jnp.ones(1), jnp.ones(1)))
        after = algorithm.server(keys.root(0).shared, start, jnp.full(1, 3.0)).opt_state
        return float(after.first[0]), float(after.second[0])

    betas = ["--server_beta1=0.5", "--server_beta2=0.25"]
    assert moments("--algorithm=fedadam", *betas) == pytest.approx((2.0, 7.0))
    assert moments("--algorithm=fedyogi", *betas) == pytest.approx((2.0, 7.75))
    assert moments("--algorithm=fedadam") == pytest.approx((1.2, 1.08))
    assert moments("--algorithm=fedadagrad") == pytest.approx((3.0, 10.0))
    assert moments("--algorithm=fedadagrad", "--server_beta1=0.5") == pytest.approx((2.0, 10.0))


def player(algorithm):
    """Returns (start, rounds) -> state and memory after so many more rounds of three clients."""
    data = softmax_task().train.examples
    batches = jax.tree.map(
        lambda x: x[: 3 * 2 * 4].reshape(3, 2, 4, *x.shape[1:])[:, : algorithm.local_steps], data
    )

    def one_round(_, carry):
        state, memory = carry
        key = keys.round_key(keys.root(0).shared, state.round)
        clients = jax.vmap(algorithm.client, in_axes=(None, None, 0, 0, 0))
        results = clients(key, state, memory, batches, jax.random.split(key, 3))
        broadcast = algorithm.aggregate(results.upload, jnp.ones(3))
        return algorithm.server(key, state, broadcast), results.memory

    return jax.jit(lambda start, rounds: jax.lax.fori_loop(0, rounds, one_round, start))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--algorithm=decomfl", "--momentum=0.5"],
        ["--algorithm=fedkseed_pro", "--pool_size=16"],
        ["--algorithm=fedzo", "--mask=random", "--optimizer=adam"],
        ["--algorithm=fedprox", "--weight_decay=0.1", "--optimizer=adam"],
        ["--algorithm=fedyogi"],
        ["--algorithm=fedsgd"],
        ["--algorithm=scaffold"],
        ["--algorithm=ferret", "--num_perturbations=12"],
    ],
    ids=lambda arguments: arguments[0].partition("=")[2],
)
def test_a_scheduled_rate_is_the_rate_of_its_rounds(arguments):
    """As if from round 2 on the same run had been given the other rate."""
    task = softmax_task()

    def algorithm(*more):
        steps = [] if "fedsgd" in arguments[0] else ["--local_steps=2"]
        config = resolve(*arguments, *steps, "--learning_rate=0.1", *more)
        return build_phases(config, task)[0].algorithm

    def start(algorithm):
        params = task.init(keys.root(0).init)
        memory = jax.tree.map(lambda m: jnp.stack([m] * 3), algorithm.init_memory(params))
        return algorithm.init(params), memory

    constant, scheduled = algorithm(), algorithm("--schedule=2:lr=0.25")
    play = player(constant)
    half_way = play(start(constant), 2)
    expected, _ = player(algorithm("--learning_rate=0.025"))(half_way, 2)
    found, _ = player(scheduled)(start(scheduled), 4)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(assert_close, found.params, expected.params)
    unscheduled, _ = play(half_way, 2)
    moved = jnp.abs(unscheduled.params["kernel"] - expected.params["kernel"])
    assert jnp.max(moved) > 1e-3
    if constant.sync is not None:  # what brings a client up to date that missed all of it
        restored = scheduled.sync.restore(start(scheduled)[0], scheduled.sync.message(found))
        jax.tree.map(assert_close, restored.params, found.params)


@pytest.mark.parametrize("decay", [[], ["--weight_decay=0.1"]], ids=["plain", "decayed"])
@pytest.mark.parametrize("mask", ["random", "magnitude", "sensitivity"])
def test_masks_confine_the_step_to_their_share(mask, decay):
    task = softmax_task()
    config = resolve(f"--mask={mask}", "--mask_density=0.4", "--local_steps=1", *decay)
    algorithm = build_phases(config, task)[0].algorithm
    state = algorithm.init(task.init(keys.root(0).init))
    after = jax.jit(algorithm.server)(keys.root(0).shared, state, jnp.ones((1, 20)))
    moved = [
        np.asarray(a != b)
        for a, b in zip(*(s.params.values() for s in (after, state)), strict=True)
    ]
    total = sum(int(x.sum()) for x in moved)
    # Of the leaves of 15 and 3 params, 6 and 1; at random about 7 of 18.
    assert total == 7 if mask != "random" else 1 <= total <= 14


def test_defaults_follow_the_algorithm_unless_they_are_given():
    assert resolve("--algorithm=feedsign").get("num_perturbations") == 1
    assert resolve("--algorithm=feedsign", "--num_perturbations=8").get("num_perturbations") == 8
    assert resolve("--algorithm=fedavg").get("momentum") == 0
    assert resolve("--algorithm=fedavg", "--momentum=0.5").get("momentum") == 0.5
    assert resolve().get("momentum") == 0.9
    assert resolve("--algorithm=mezo").get("num_clients") == 1
    assert resolve("--algorithm=fedadagrad").get("server_learning_rate") == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--algorithm=fedavg", "--hiso_nu=0.1"],
            "--hiso_nu has no effect with --algorithm=fedavg",
        ),
        (["--proximal=0.1"], "choose fedprox$"),
        (["--algorithm=fedavg", "--mask=random"], "--mask has no effect"),
        (["--algorithm=fedavg", "--schedule=5:P=2"], "--schedule: P has no effect with --algo"),
        (["--algorithm=fedsgd", "--schedule=5:lr=0.5,mu=2"], "mu has no .* it out of '5:lr=0.5,mu"),
        (["--algorithm=fedkseed", "--schedule=5:P=2"], "--schedule: P has no effect with --algo"),
        (["--estimator=projection", "--schedule=5:mu=2"], "mu has no .* choose forward or central"),
        (["--algorithm=feedsign", "--compression=int8"], "--compression has no effect"),
        (
            ["--algorithm=fedkseed", "--compression=top_k"],
            "use float16, bfloat16, int8, int4 or qsgd",
        ),
        (["--algorithm=feedsign", "--local_steps=2"], "where it is always 1: leave it out"),
        (["--algorithm=fedkseed", "--num_perturbations=2"], "always 1"),
        (["--algorithm=scaffold", "--optimizer=adam"], "always sgd"),
        (["--algorithm=mezo", "--num_clients=2"], "--num_clients=2 is not possible .* always 1"),
        (
            ["--algorithm=mezo", "--partition=natural"],
            "natural is not .*mezo, which has all data in one place",
        ),
        (["--algorithm=fedavg", "--num_perturbations=3"], "--num_perturbations has no effect"),
        (["--algorithm=fedavg", "--estimator=jvp"], "--estimator has no effect with --algorithm"),
        (["--rank=4"], "--rank has no effect with --perturbation=gaussian: .* choose low_rank"),
        (["--estimator=projection", "--smoothing=0.1"], "--smoothing has no effect with --estim"),
        (["--estimator=jvp", "--perturbations_at_once=2"], "choose forward or central"),
        (["--optimizer=adam", "--momentum=0.5"], "--momentum has no effect with --optimizer=adam"),
        (["--algorithm=fedadagrad", "--server_beta2=0.5"], "--server_beta2 has no effect"),
        (["--algorithm=fedyogi", "--server_beta1=1"], r"--server_beta1 must be in \[0, 1\), got 1"),
        (["--top_k_fraction=0.1"], "--top_k_fraction has no effect with --compression=none"),
        (["--mask_density=0.1"], "--mask_density has no effect"),
        (["--algorithm=fedadam", "--server_learning_rate=0"], "must be positive, got 0"),
        (["--algorithm=fedavg", "--task=rte", "--objective=accuracy"], "has no useful gradient"),
        (
            ["--matmul_dtype=bfloat16"],
            "--matmul_dtype has no effect with --task=digits, it is for texts",
        ),
        (["--task=quadratic", "--train_examples=9"], "with --task=quadratic, it is for texts"),
        (["--examples_per_direction=5"], "does not divide --batch_size=32: take a divisor"),
        (
            ["--examples_per_direction=2", "--num_perturbations=20"],
            "=2 makes 16 groups of --batch_size=32, and 20 directions .* be a multiple of 16",
        ),
        (
            ["--examples_per_direction=2", "--num_perturbations=16", "--schedule=5:P=1.5"],
            "and 24 directions can't be shared out to them",
        ),
        (
            ["--examples_per_direction=1", "--algorithm=fedkseed"],
            "is not possible with --algorithm=fedkseed, which measures along 1",
        ),
        (["--examples_per_direction=1", "--dp=example"], "not possible with --dp=example"),
        (["--examples_per_direction=1", "--objective=f1"], "=f1, which is no mean over examples"),
        (["--examples_per_direction=1", "--algorithm=ferret"], "no effect with --algorithm=ferret"),
        (
            ["--algorithm=feedsign", "--broadcast_compression=int8"],
            "not possible with --algorithm=feedsign, whose broadcasts are no numbers",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve(*arguments)


def test_values_out_of_range_are_refused_by_the_library():
    for flag in ("hiso_nu=1", "hiso_epsilon=0"):
        with pytest.raises(ValueError, match=flag.partition("=")[0].removeprefix("hiso_")):
            shapes("--algorithm=hiso", f"--{flag}")
    with pytest.raises(ValueError, match="density must be"):
        shapes("--mask=random", "--mask_density=2")
