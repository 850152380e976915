"""What every method of the library keeps to: one table, one row a method."""

import collections
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_table import METHODS, VARIANTS
from tiny_simulations import assert_replayed, assert_same_bits, copy, joined

from zofl_jax import keys
from zofl_jax.core import Algorithm, Task
from zofl_jax.data import partition, sources
from zofl_jax.engine import simulation
from zofl_jax.models import mlp
from zofl_jax.runs import snapshots
from zofl_jax.tasks import quadratic, vision

BATCH_SIZE = 16
PIECES = (1, 2, 5)  # rounds of the dispatches that are checked bit by bit
TRACES = {"client": 2, "aggregate": 2, "server": 1}
"""Of the functions in a run: one is compiled; clients and aggregation are traced once more for the
shapes of the messages."""

OPTIMIZED = (
    "decomfl, local steps and momentum",
    "hiso, all local steps' curvature",
    "low-rank directions, local steps and momentum",
)
"""Rows of local steps, compiled with LLVM's optimisations, as users have them, to see that they are
replayed to the same bits: of each kind one. Without, rounds and replay may differ in the last bits
of a number (programs.py), so the other rows' replay is close here, and that of all methods and
variants exact in CI's run of users' programs."""


def each(table: dict[str, Any]) -> Any:
    """Returns the mark of a check of a table's rows."""
    rows = [
        pytest.param(name, marks=pytest.mark.optimized) if name in OPTIMIZED else name
        for name in table
    ]
    return pytest.mark.parametrize("name", rows)


rows = each(METHODS)
"""Every method; the tests of one share a process (grouping.py), and there its compiled rounds."""


@functools.cache
def digits(num_clients: int) -> Task:
    """Returns softmax regression, 650 params, on clients with different mixes of labels."""
    dataset = sources.digits()
    order, offsets = partition.dirichlet(
        keys.root(0).partition, dataset.train["label"], num_clients, 1.0, BATCH_SIZE
    )
    return vision.classification(dataset, mlp.Softmax(10), order, offsets)


def counted(algorithm: Algorithm, counts: collections.Counter) -> Algorithm:
    """Returns the algorithm, whose functions count how often they are traced."""

    def counting(name: str) -> Any:
        def function(*args: Any) -> Any:
            counts[name] += 1
            return getattr(algorithm, name)(*args)

        return function

    names = ("client", "aggregate", "server")
    return algorithm._replace(**{name: counting(name) for name in names})


class Ran(NamedTuple):
    """A few rounds of a method on the digits, in dispatches of different lengths."""

    algorithm: Algorithm
    simulator: simulation.Simulator
    initial: tuple[Any, Any]  # state and memory
    final: tuple[Any, Any]
    middle: tuple[Any, Any]  # before the last dispatch
    trace: simulation.Trace
    traced: list[dict[str, int]]  # counts after the first and after the last dispatch


@functools.cache
def ran(name: str) -> Ran:
    method, counts = METHODS[name], collections.Counter()
    num_clients, cohort = method.clients
    task = digits(num_clients)
    algorithm = method.on(task, method.rate)
    simulator = simulation.make_simulator(
        counted(algorithm, counts), task, clients_per_round=cohort, batch_size=BATCH_SIZE
    )
    start = simulator.start(None)
    initial = middle = copy(start.state), copy(start.memory)
    state, memory, traces, traced = start.state, start.memory, [], []
    for n in PIECES:
        middle = copy(state), copy(memory)
        state, memory, trace = simulator.advance(state, memory, n)
        traces.append(trace)
        traced.append(dict(counts))
    final = copy(state), copy(memory)
    return Ran(algorithm, simulator, initial, final, middle, joined(traces), traced)


@rows
def test_it_learns_the_digits(name):
    run, method = ran(name), METHODS[name]
    before = run.simulator.evaluate(run.initial[0].params)["loss"]
    progress = simulation.run(run.simulator, rounds=method.rounds)
    assert progress.history[-1].metrics["loss"] < 0.7 * before


@functools.cache
def client(name: str) -> Any:
    """Returns the client of a method's run, compiled."""
    return jax.jit(ran(name).algorithm.client)


@rows
def test_its_functions_are_traced_once_for_all_rounds(name):
    assert ran(name).traced == [TRACES] * len(PIECES)


@rows
def test_its_types_are_stable(name):
    """What a round and a client return has the types of what they are given."""
    run = ran(name)
    assert jax.tree.map(jax.typeof, run.final) == jax.tree.map(jax.typeof, run.initial)
    assert jax.tree.structure(run.final) == jax.tree.structure(run.initial)
    state = run.algorithm.init(run.initial[0].params)
    broadcast = jax.tree.map(lambda x: jnp.asarray(x[0]), run.trace.broadcasts)
    after = jax.eval_shape(run.algorithm.server, run.simulator.root.shared, state, broadcast)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@rows
def test_it_resumes_to_the_same_bits(name, tmp_path):
    """From a snapshot on disk, and in dispatches of other lengths."""
    run = ran(name)
    snapshots.save(tmp_path, 3, run.middle)
    found, _ = snapshots.load_latest(tmp_path, run.initial, 3)
    state, memory = found[1]
    state, memory = jax.tree.map(jnp.asarray, (state, memory))
    for n in (2, 3):
        state, memory, _ = run.simulator.advance(state, memory, n)
    assert_same_bits(copy((state, memory)), run.final)


@rows
def test_it_is_replayed(name):
    """From the initial params, the seeds and the broadcasts alone."""
    run = ran(name)
    replayed = run.simulator.replay(run.initial[0], run.trace.seeds, run.trace.broadcasts)
    assert_replayed(copy(replayed), run.final[0], exact=name in OPTIMIZED)


@rows
def test_the_ledger_counts_the_bytes_of_its_messages(name):
    """The upload as a client makes it, the broadcast as it is logged, and the sync message."""
    run = ran(name)
    algorithm, (sizes,) = run.algorithm, run.simulator.sizes
    state, memory = jax.tree.map(jnp.asarray, run.final)
    key = jax.random.key(1)
    batches = first_batches(run)
    own = jax.tree.map(lambda m: m[0], memory)
    # JAX promises that what a function returns has the shapes and types of `eval_shape`.
    upload = jax.eval_shape(algorithm.client, key, state, own, batches, key).upload
    assert len(serialised(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), upload))) == (
        sizes.upload
    )
    assert len(run.trace.seeds[0].tobytes()) == sizes.seed
    logged = jax.tree.map(lambda x: x[0], run.trace.broadcasts)
    assert len(serialised(logged)) == sizes.broadcast
    assert len(serialised(state.params)) == sizes.params
    if algorithm.sync is None:
        assert sizes.sync is None
    else:
        assert len(serialised(algorithm.sync.message(state))) == sizes.sync


@rows
def test_a_client_that_was_sent_the_sync_message_is_up_to_date(name):
    """Restored from it, its upload is the one it makes in the present state."""
    run = ran(name)
    algorithm = run.algorithm
    if algorithm.sync is None:
        assert run.simulator.sizes[0].sync is None
        return
    state, memory = jax.tree.map(jnp.asarray, run.final)
    message = algorithm.sync.message(state)
    initial = algorithm.init(run.initial[0].params)._replace(round=state.round)
    restored = algorithm.sync.restore(initial, message)
    key, own = jax.random.key(1), jax.tree.map(lambda m: m[0], memory)
    batches = first_batches(run)
    expected = client(name)(key, state, own, batches, key).upload
    actual = client(name)(key, restored, own, batches, key).upload
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-3)


@each(VARIANTS)
def test_a_variant_keeps_the_contract_on_a_quadratic(name):
    """It descends, is traced once, keeps its types and replays. The params are a matrix."""
    method, counts = VARIANTS[name], collections.Counter()
    num_clients, cohort = method.clients
    problem = quadratic.quadratic(
        jax.random.key(0), dim=20, effective_rank=5.0, num_clients=num_clients, heterogeneity=0.3
    )
    task = of_a_matrix(problem.task)
    simulator = simulation.make_simulator(
        counted(method.on(task, method.rate), counts),
        task,
        clients_per_round=cohort,
        batch_size=1,
    )
    start = simulator.start(None)
    initial, state, memory, traces = copy(start.state), start.state, start.memory, []
    for n in (1, method.rounds - 1):
        state, memory, trace = simulator.advance(state, memory, n)
        traces.append(trace)
    assert counts == TRACES
    final = copy(state)
    assert jax.tree.map(jax.typeof, final) == jax.tree.map(jax.typeof, initial)
    trace = joined(traces)
    replayed = copy(simulator.replay(initial, trace.seeds, trace.broadcasts))
    assert_replayed(replayed, final, exact=name in OPTIMIZED)
    before, after = (float(task.loss(s.params, task.test)) for s in (initial, final))
    assert after - problem.minimum < 0.5 * (before - problem.minimum)


def of_a_matrix(task: Task) -> Task:
    """Returns the task with params [4, 5] in place of a vector."""

    def loss(params: Any, batch: Any) -> Any:
        return task.loss({"x": params["x"].reshape(-1)}, batch)

    return task._replace(init=lambda key: {"x": task.init(key)["x"].reshape(4, 5)}, loss=loss)


def first_batches(run: Ran) -> Any:
    """Returns the batches of a round, [K, B, ...]."""
    shape = run.algorithm.local_steps, BATCH_SIZE
    return jax.tree.map(
        lambda x: jnp.asarray(x[: shape[0] * shape[1]]).reshape(*shape, *x.shape[1:]),
        run.simulator.task.train.examples,
    )


def serialised(message: Any) -> bytes:
    """Returns a message as bytes, leaf after leaf."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(message))
