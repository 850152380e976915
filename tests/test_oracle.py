"""The compiled rounds against the NumPy reference of `oracle.py`: numbers and bytes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import oracle
import pytest
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, decomfl_groups, ferret, hybrid
from zofl_jax.algorithms.centred import centred
from zofl_jax.algorithms.hybrid import Boundary
from zofl_jax.core import Phase, Task
from zofl_jax.data import batches as data_batches
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import ledger, simulation
from zofl_jax.tasks.quadratic import decay_rate, quadratic

ROUNDS = 20
COHORT = 3  # of 6 clients, so that some stay away for several rounds
MOST = 4  # directions of a local step; their keys do not depend on their number
MU = 1e-3
RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01

GAUSSIAN, RADEMACHER = perturbations.gaussian(), perturbations.rademacher()
SPHERE = perturbations.sphere()

ESTIMATORS = {
    "forward_difference": (
        functools.partial(estimators.forward_difference, smoothing=MU),
        oracle.forward_difference,
    ),
    "central_difference": (
        functools.partial(estimators.central_difference, smoothing=MU),
        oracle.central_difference,
    ),
    "projection": (estimators.projection, oracle.projection),
    "forward_gradient": (estimators.forward_gradient, oracle.projection),
}


def sgd(rate: float | optax.Schedule = RATE) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, MOMENTUM))


def oracle_sgd(rate: float | Callable[[int], float] = RATE) -> Callable[[], oracle.SGD]:
    return lambda: oracle.SGD(rate, MOMENTUM, DECAY)


def make_softmax_simulator(
    estimator: estimators.Estimator,
    optimizer: optax.GradientTransformation,
    local_steps: int,
    dtype: type = np.float64,
    client_groups: int = 0,
    **options: Any,
) -> simulation.Simulator:
    task = softmax_task(dtype)
    method = functools.partial(decomfl_groups, groups=client_groups) if client_groups else decomfl
    algorithm = method(task.loss, estimator, optimizer, local_steps=local_steps)
    return simulation.make_simulator(
        algorithm, task, clients_per_round=COHORT, batch_size=BATCH_SIZE, **options
    )


class Run(NamedTuple):
    """What a run left behind, of the library or of the oracle."""

    broadcasts: list[Any]  # of each round, [K, P] where they are scalars alone
    params: dict[int, oracle.Tree]  # by the number of rounds done
    bytes: list[dict[str, int]]  # of each round, by column


class Schedule(NamedTuple):
    """What both sides are told beside the seeds."""

    cohorts: np.ndarray  # [R, M]
    seeds: np.ndarray  # uint32 [R, words]


def run_library(
    simulator: simulation.Simulator,
) -> tuple[Run, Schedule, ledger.Ledger]:
    traces, columns, params = [], [], {}

    def on_rounds(trace, counted, progress):
        traces.append(trace)
        columns.extend({name: getattr(b, name) for name in oracle.COLUMNS} for b in counted)
        done = trace.first_round + len(trace.losses)
        params[done] = jax.tree.map(np.array, progress.state.params)

    progress = simulation.run(simulator, rounds=ROUNDS, eval_every=7, on_rounds=on_rounds)
    assert set(params) >= {7, 14, ROUNDS}
    schedule = Schedule(
        np.concatenate([t.cohorts for t in traces]), np.concatenate([t.seeds for t in traces])
    )
    broadcasts = [
        jax.tree.map(lambda x: x[i], t.broadcasts)  # noqa: B023
        for t in traces
        for i in range(len(t.losses))
    ]
    return Run(broadcasts, params, columns), schedule, progress.ledger


def run_oracle(
    task: Task,
    root: keys.RootKeys,
    agreement: oracle.Agreement,
    objective: oracle.Objective,
    schedule: Schedule,
) -> tuple[Run, oracle.Server, list[oracle.Client]]:
    def draw_batches(client: int, r: int) -> Sequence[oracle.Batch]:
        steps = agreement.local_steps(r)
        drawn = draw_client_batches(root.batches, task.train, r, client, steps)
        return [jax.tree.map(lambda x: np.asarray(x)[k], drawn) for k in range(steps)]  # noqa: B023

    def draw_group(client: int, r: int) -> int:
        if not agreement.client_groups:
            return 0
        key = jax.random.fold_in(keys.own_key(root.own, r, client), keys.name_id("group"))
        return int(jax.random.randint(key, (), 0, agreement.client_groups, np.int32))

    clients = [
        oracle.Client(
            agreement,
            objective,
            functools.partial(draw_batches, i),
            size,
            functools.partial(draw_group, i),
        )
        for i, size in enumerate(np.diff(np.asarray(task.train.offsets)).tolist())
    ]
    channel = oracle.Channel()
    server = oracle.Server(agreement, jax.tree.map(np.asarray, task.init(root.init)))
    params = {}
    for r, (cohort, seed) in enumerate(zip(schedule.cohorts.tolist(), schedule.seeds, strict=True)):
        server.run_round(cohort, clients, seed.tobytes(), channel)
        params[r + 1] = server.replica.params
        for i in cohort:
            assert_same_tree(clients[i].replica.params, server.replica.params)
    broadcasts = [
        np.frombuffer(message, agreement.dtype).reshape(shape_of(agreement, r))
        for r, (_, message) in enumerate(server.log)
    ]
    return Run(broadcasts, params, channel.rounds), server, clients


def shape_of(agreement: oracle.Agreement, r: int) -> tuple[int, ...]:
    """Returns the shape of a broadcast."""
    if r in agreement.measuring:
        return (agreement.shapes[agreement.measured[0]][0],)
    groups = (agreement.client_groups,) if agreement.client_groups else ()
    return *groups, agreement.local_steps(r), agreement.num_perturbations(r)


@functools.partial(jax.jit, static_argnums=4)
def draw_client_batches(batches, train, r, client, steps):
    key = keys.batch_key(batches, r, client)
    return data_batches.sample(key, train, client, BATCH_SIZE, steps)


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_direction(perturbation, impl, words, k, p, like):
    key = keys.step_key(jax.random.wrap_key_data(words, impl=impl), k)
    return perturbation.sample(keys.direction_keys(key, MOST)[p], like)


def agree(
    simulator: simulation.Simulator,
    scalar: oracle.ScalarFn,
    optimizer: Callable[[], oracle.Optimizer],
    *,
    num_perturbations: int | Callable[[int], int],
    local_steps: int,
    smoothing: Callable[[int], float] = lambda r: MU,
    perturbation: perturbations.Perturbation = GAUSSIAN,
    weighted: bool = False,
    groups: int = 1,
    client_groups: int = 0,
    measuring: tuple[int, ...] = (),
) -> oracle.Agreement:
    like = simulator.task.init(simulator.root.init)
    impl = str(jax.random.key_impl(simulator.root.shared))

    @functools.cache
    def direction(seed: bytes, k: int, p: int) -> oracle.Tree:
        z = draw_direction(perturbation, impl, np.frombuffer(seed, np.uint32), k, p, like)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), z)

    def group_seed(seed: bytes, group: int) -> bytes:
        key = jax.random.wrap_key_data(np.frombuffer(seed, np.uint32), impl=impl)
        return np.asarray(jax.random.key_data(keys.group_key(key, group))).tobytes()

    return oracle.Agreement(
        scalar=scalar,
        smoothing=smoothing,
        local_steps=lambda r: local_steps,
        num_perturbations=(
            num_perturbations if callable(num_perturbations) else lambda r: num_perturbations
        ),
        optimizer=optimizer,
        direction=direction,
        shapes={name: x.shape for name, x in like.items()},
        dtype=jax.tree.leaves(like)[0].dtype,
        weighted=weighted,
        groups=groups,
        client_groups=client_groups,
        group_seed=functools.cache(group_seed),
        measuring=measuring,
    )


def assert_same_tree(actual: oracle.Tree, expected: oracle.Tree) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Compares arrays relative to their largest entry."""
    difference = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert difference <= tolerance * np.max(np.abs(expected)), difference


def assert_agreement(
    simulator: simulation.Simulator, agreement: oracle.Agreement, objective: oracle.Objective
) -> None:
    """Runs both sides: numbers to 1e-9 and bytes exactly; then everyone catches up."""
    library, schedule, book = run_library(simulator)
    reference, server, clients = run_oracle(
        simulator.task, simulator.root, agreement, objective, schedule
    )
    assert len(library.broadcasts) == len(reference.broadcasts) == ROUNDS
    for actual, expected in zip(library.broadcasts, reference.broadcasts, strict=True):
        if isinstance(actual, dict):  # means
            (actual,) = actual.values()
        assert actual.dtype == np.float64
        assert actual.shape == expected.shape
        assert_close(actual, expected)
    for done, params in library.params.items():
        for name, expected in reference.params[done].items():
            assert_close(params[name], expected)
    assert_bytes_agree(library, reference, book)
    assert_everyone_catches_up(server, clients)


def assert_bytes_agree(library: Run, reference: Run, book: ledger.Ledger) -> None:
    assert library.bytes == reference.bytes
    for name in oracle.COLUMNS:
        assert getattr(book.totals, name) == sum(sent[name] for sent in reference.bytes)
    assert book.totals.up == sum(sent["upload"] for sent in reference.bytes)
    assert book.totals.up + book.totals.down == sum(sum(s.values()) for s in reference.bytes)


def assert_everyone_catches_up(server: oracle.Server, clients: Sequence[oracle.Client]) -> None:
    """Sends the late clients what they missed: their models become the server's."""
    late = [i for i in range(len(clients)) if server.last_round.get(i) != ROUNDS - 1]
    assert late
    channel = oracle.Channel()
    channel.new_round()
    for i in late:
        server.bring_up_to_date(i, clients[i], channel)
    assert channel.rounds[0]["catch_up"] > 0
    for client in clients:
        assert client.replica.round == ROUNDS
        assert_same_tree(client.replica.params, server.replica.params)


@pytest.mark.parametrize(
    ("name", "num_perturbations", "local_steps"),
    [
        # Four perturbations in three local steps are below, of every estimator in float32.
        ("forward_difference", 1, 1),
        ("central_difference", 4, 1),
        ("projection", 1, 3),
        ("forward_gradient", 4, 3),
    ],
)
def test_rounds_agree_in_float64(x64, name, num_perturbations, local_steps):
    make_estimator, scalar = ESTIMATORS[name]
    simulator = make_softmax_simulator(make_estimator(num_perturbations), sgd(), local_steps)
    agreement = agree(
        simulator,
        scalar,
        oracle_sgd(),
        num_perturbations=num_perturbations,
        local_steps=local_steps,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_of_examples_with_directions_of_their_own_agree(x64, name):
    make_estimator, scalar = ESTIMATORS[name]
    groups = BATCH_SIZE // 2
    count = 2 * groups
    simulator = make_softmax_simulator(make_estimator(count, groups=groups), sgd(), 2)
    agreement = agree(
        simulator, scalar, oracle_sgd(), num_perturbations=count, local_steps=2, groups=groups
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


@pytest.mark.parametrize("local_steps", [1, 2])
def test_groups_of_clients_with_directions_of_their_own_agree(x64, local_steps):
    """Three clients in two groups: some rounds have both, and some one."""
    make, scalar = ESTIMATORS["central_difference"]
    simulator = make_softmax_simulator(make(3), sgd(), local_steps, client_groups=2)
    agreement = agree(
        simulator,
        scalar,
        oracle_sgd(),
        num_perturbations=3,
        local_steps=local_steps,
        client_groups=2,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_directions_away_from_means_that_are_measured_twice_agree(x64, weighting):
    """Isotropic ones at first; some clients miss both rounds of measuring."""
    make, scalar = ESTIMATORS["central_difference"]
    task, measuring = softmax_task(np.float64), (2, 9)

    def along(directions):
        estimator = make(3, perturbation=directions)
        return decomfl(task.loss, estimator, sgd(), local_steps=2)

    batch = jax.tree.map(lambda x: x[:BATCH_SIZE], task.train.examples)
    both = centred(along, GAUSSIAN, task.loss, batch)
    phases = [Phase(0, both.method)]
    for r in measuring:
        phases += [Phase(r, both.measuring), Phase(r + 1, both.method)]
    simulator = simulation.make_simulator(
        phases, task, clients_per_round=COHORT, batch_size=BATCH_SIZE, weighting=weighting
    )
    agreement = agree(
        simulator,
        scalar,
        oracle_sgd(),
        num_perturbations=3,
        local_steps=2,
        weighted=weighting == "examples",
        measuring=measuring,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


def test_adam_agrees(x64):
    estimator = estimators.central_difference(4, MU)
    simulator = make_softmax_simulator(estimator, optax.adam(RATE), local_steps=3)
    agreement = agree(
        simulator,
        oracle.central_difference,
        lambda: oracle.Adam(RATE),
        num_perturbations=4,
        local_steps=3,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


def test_means_weighted_by_examples_agree(x64):
    estimator = estimators.forward_difference(4, MU, RADEMACHER)
    simulator = make_softmax_simulator(estimator, sgd(), local_steps=3, weighting="examples")
    agreement = agree(
        simulator,
        oracle.forward_difference,
        oracle_sgd(),
        num_perturbations=4,
        local_steps=3,
        perturbation=RADEMACHER,
        weighted=True,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


def test_schedules_of_rate_smoothing_and_perturbations_agree(x64):
    """After 10 rounds P doubles, and μ and the learning rate shrink."""
    local_steps = 2
    rate = optax.piecewise_constant_schedule(RATE, {10 * local_steps: 0.5})
    smoothing = optax.piecewise_constant_schedule(1e-2, {10: 0.1})
    task = softmax_task(np.float64)
    phases = [
        Phase(
            first_round,
            decomfl(
                task.loss,
                estimators.forward_difference(num_perturbations, smoothing, RADEMACHER),
                sgd(rate),
                local_steps=local_steps,
            ),
        )
        for first_round, num_perturbations in [(0, 2), (10, 4)]
    ]
    simulator = simulation.make_simulator(
        phases, task, clients_per_round=COHORT, batch_size=BATCH_SIZE
    )
    agreement = agree(
        simulator,
        oracle.forward_difference,
        oracle_sgd(lambda step: RATE if step < 10 * local_steps else RATE / 2),
        num_perturbations=lambda r: 2 if r < 10 else 4,
        local_steps=local_steps,
        smoothing=lambda r: 1e-2 if r < 10 else 1e-3,
        perturbation=RADEMACHER,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


@pytest.mark.optimized
def test_generator_with_longer_seeds_agrees(x64):
    """threefry4x32 has seeds of 16 bytes, threefry2x32 of 8."""
    estimator = estimators.forward_difference(2, MU, RADEMACHER)
    simulator = make_softmax_simulator(estimator, sgd(), 1, prng_impl="threefry4x32")
    assert simulator.sizes[0].seed == 16
    agreement = agree(
        simulator,
        oracle.forward_difference,
        oracle_sgd(),
        num_perturbations=2,
        local_steps=1,
        perturbation=RADEMACHER,
    )
    assert_agreement(simulator, agreement, oracle.softmax_regression())


def test_quadratic_agrees(x64):
    """The task's loss against ½ (x − b)ᵀ A (x − b) with the matrix written out."""
    dim, effective_rank = 6, 3.0
    task = quadratic(
        jax.random.key(1),
        dim=dim,
        effective_rank=effective_rank,
        num_clients=6,
        examples_per_client=5,
        noise=0.1,
    ).task
    algorithm = decomfl(
        task.loss, estimators.central_difference(2, MU, SPHERE), sgd(), local_steps=2
    )
    simulator = simulation.make_simulator(
        algorithm, task, clients_per_round=COHORT, batch_size=BATCH_SIZE
    )
    agreement = agree(
        simulator,
        oracle.central_difference,
        oracle_sgd(),
        num_perturbations=2,
        local_steps=2,
        perturbation=SPHERE,
    )
    reflection = np.eye(dim) - 2 / dim
    spectrum = np.exp(-decay_rate(dim, effective_rank) * np.arange(dim))
    matrix = reflection @ np.diag(spectrum) @ reflection
    assert_agreement(simulator, agreement, oracle.quadratic(matrix))


@pytest.mark.parametrize(
    ("by_block", "rank", "remainder"), [(True, 18.0, True), (False, 2.0, False)]
)
def test_ferret_agrees(x64, by_block, rank, remainder):
    """Local SGD, sketches, what is left of them, and the shorter of two ways to catch up."""
    count, steps, server_rate = 6, 3, 0.5
    task = softmax_task(np.float64)
    algorithm = ferret(
        task.loss,
        optax.sgd(RATE),
        count,
        RADEMACHER,
        local_steps=steps,
        server_rate=server_rate,
        by_block=by_block,
        effective_rank=rank,
        remainder=remainder,
    )
    simulator = simulation.make_simulator(
        algorithm, task, clients_per_round=COHORT, batch_size=BATCH_SIZE
    )
    params = jax.tree.map(np.asarray, task.init(simulator.root.init))
    draw = functools.partial(draw_lines, count, by_block, RADEMACHER, params)
    agreement = oracle.Ferret(
        steps,
        RATE,
        server_rate,
        rank,
        functools.cache(draw),
        {name: x.shape for name, x in params.items()},
        np.dtype(np.float64),
    )
    server = oracle.ModelServer(agreement, params, task.train.num_clients, remainder)
    assert_agreement_of_models(simulator, server)
    assert server.sent == {
        ("first_sync", "model"),
        ("catch_up", "model"),
        ("catch_up", "missed rounds"),
    }


@pytest.mark.parametrize("top", ["bias", "kernel"])
def test_hybrid_agrees(x64, top):
    """Gradients above the boundary and scalars below it, of which everyone keeps the momentum."""
    count, steps, top_rate, top_momentum = 2, 3, 2.0, 0.5
    task = softmax_task(np.float64)
    algorithm = hybrid(
        task.loss,
        estimators.central_difference(count, MU),
        sgd(),
        optax.sgd(RATE, top_momentum),
        boundary=Boundary(top),
        top_rate=top_rate,
        local_steps=steps,
    )
    simulator = simulation.make_simulator(
        algorithm, task, clients_per_round=COHORT, batch_size=BATCH_SIZE
    )
    params = jax.tree.map(np.asarray, task.init(simulator.root.init))
    rest = {name: x for name, x in params.items() if name != top}

    @functools.cache
    def direction(seed: bytes, k: int, p: int) -> oracle.Tree:
        z = draw_direction(GAUSSIAN, "threefry2x32", np.frombuffer(seed, np.uint32), k, p, rest)
        return jax.tree.map(np.asarray, z)

    agreement = oracle.Hybrid(
        scalar=oracle.central_difference,
        smoothing=MU,
        local_steps=steps,
        num_perturbations=count,
        optimizer=oracle_sgd(),
        top_optimizer=lambda: oracle.SGD(RATE, top_momentum),
        top_rate=top_rate,
        direction=direction,
        top=(top,),
        shapes={name: x.shape for name, x in params.items()},
        dtype=np.dtype(np.float64),
    )
    server = oracle.ModelServer(agreement, params, task.train.num_clients)
    assert_agreement_of_models(simulator, server)
    ways = {("first_sync", "missed rounds"), ("first_sync", "model"), ("catch_up", "model")}
    # Of a small top the scalars of a round are fewer than what all hold.
    assert server.sent == ways | ({("catch_up", "missed rounds")} if top == "bias" else set())


def assert_agreement_of_models(simulator: simulation.Simulator, server: oracle.ModelServer) -> None:
    """Runs both sides: numbers to 1e-9, and bytes exactly."""
    task, steps = simulator.task, server.agreement.local_steps
    library, schedule, book = run_library(simulator)
    channel = oracle.Channel()
    for r, (cohort, seed) in enumerate(zip(schedule.cohorts.tolist(), schedule.seeds, strict=True)):

        def batches(client: int) -> list[oracle.Batch]:
            drawn = draw_client_batches(simulator.root.batches, task.train, r, client, steps)  # noqa: B023
            return [jax.tree.map(lambda x: np.asarray(x)[k], drawn) for k in range(steps)]  # noqa: B023

        server.run_round(cohort, oracle.softmax_regression(), batches, seed.tobytes(), channel)
        sent = np.concatenate([x.ravel() for x in jax.tree.leaves(library.broadcasts[r])])
        assert_close(sent, np.frombuffer(server.log[r][1]))
        for name, actual in library.params.get(r + 1, {}).items():
            assert_close(actual, server.state[name])
    assert_bytes_agree(library, Run([], {}, channel.rounds), book)


def draw_lines(
    count: int, by_block: bool, perturbation: Any, params: oracle.Tree, seed: bytes
) -> list[oracle.Line]:
    """Returns the lines of a round: 15 and 3 params have 5 and 1 of 6, leaves by their names."""
    drawn = draw_blocks(count, by_block, perturbation, params, np.frombuffer(seed, np.uint32))
    if not by_block:
        rows = [dict(zip(drawn, z, strict=True)) for z in zip(*drawn.values(), strict=True)]
        return [oracle.Line(jax.tree.map(np.asarray, z), count, 18) for z in rows]
    zeros = {name: np.zeros_like(x) for name, x in params.items()}
    return [
        oracle.Line({**zeros, name: np.asarray(z)}, len(block), params[name].size)
        for name, block in drawn.items()
        for z in block
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw_blocks(count, by_block, perturbation, params, words):
    key = jax.random.wrap_key_data(words)

    def draw(key, count, like):
        return jax.vmap(lambda k: perturbation.sample(k, like))(keys.direction_keys(key, count))

    if not by_block:
        return draw(key, count, params)
    own = {"bias": 1, "kernel": 5}
    leaf_keys = keys.leaf_keys(key, params)
    return {
        name: draw(leaf_keys[name], own[name], {"block": params[name]})["block"] for name in own
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_float32_stays_within_the_rounding_of_the_difference_quotient(name):
    """In every round |ḡ32 − ḡ64| <= 2 ε|f|/μ for differences, and 8 ε|ḡ| for derivatives.

    Directions and messages are float32 on both sides; the reference computes in float64.
    """
    make_estimator, scalar = ESTIMATORS[name]
    simulator = make_softmax_simulator(make_estimator(4), sgd(), 3, dtype=np.float32)
    agreement = agree(simulator, scalar, oracle_sgd(), num_perturbations=4, local_steps=3)
    library, schedule, book = run_library(simulator)
    softmax = oracle.softmax_regression()
    losses = []

    def value(x: oracle.Tree, batch: oracle.Batch) -> float:
        losses.append(softmax.value(x, batch))
        return losses[-1]

    objective = oracle.Objective(value, softmax.gradient)
    reference, server, clients = run_oracle(
        simulator.task, simulator.root, agreement, objective, schedule
    )
    epsilon = float(np.finfo(np.float32).eps)
    errors = []
    for actual, expected in zip(library.broadcasts, reference.broadcasts, strict=True):
        assert actual.dtype == np.float32
        error, largest = np.abs(actual - expected).max(), np.abs(expected).max()
        bound = 2 * epsilon * max(losses) / MU if losses else 8 * epsilon * largest
        assert bound < largest / 100, "a bound that says nothing"
        assert error <= bound
        errors.append(error)
    assert bool(losses) == ("difference" in name)
    # Step by step the errors of the scalars move the params by lr/(1 − m) · |z| each at most.
    reach = ROUNDS * 3 * RATE / (1 - MOMENTUM) * 4 * max(errors)
    for name, expected in reference.params[ROUNDS].items():
        assert np.abs(library.params[ROUNDS][name] - expected).max() <= reach
    assert_bytes_agree(library, reference, book)
    assert_everyone_catches_up(server, clients)
