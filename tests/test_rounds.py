"""The traced functions: limits, buffers, memory, the evaluation's mask, the checksum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import shapes_in
from tiny_tasks import BATCH_SIZE, CLIENT_SIZES, softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.core import Algorithm, ClientResult, ServerState, Weighting
from zofl_jax.directions import estimators
from zofl_jax.engine import rounds

COHORT = 3


class Counts(NamedTuple):
    """What a client of `counting` remembers."""

    rounds: jax.Array  # how often it took part
    last: jax.Array  # the round it took part in last


def counting(fail_at: int = 1000) -> Algorithm:
    """A stateful algorithm without a model: the broadcast is NaN from round `fail_at` on."""

    def init(params):
        return ServerState(params, (), jnp.zeros((), jnp.int32))

    def client(shared_key, state, memory, batches, own_key):
        upload = jnp.where(state.round < fail_at, memory.rounds + 1.0, jnp.nan)
        memory = Counts(memory.rounds + 1, state.round)
        return ClientResult({"mean": upload}, memory, {"loss": jnp.zeros(())})

    def aggregate(uploads, weights):
        return {"mean": jnp.average(uploads["mean"], weights=weights)}

    def server(key, state, broadcast):
        return ServerState(state.params + broadcast["mean"], (), state.round + 1)

    def init_memory(params):
        return Counts(jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32))

    return Algorithm(init, client, aggregate, server, 1, init_memory)


def advance(algorithm: Algorithm, limit: int, weighting: Weighting = "uniform"):
    task, root = softmax_task(), keys.root(0)
    params = jnp.zeros(())
    memory = jax.tree.map(
        lambda m: jnp.repeat(m[None], len(CLIENT_SIZES), axis=0), algorithm.init_memory(params)
    )
    run = jax.jit(rounds.make_advance(algorithm, task, COHORT, BATCH_SIZE, weighting))
    return run(algorithm.init(params), memory, task.train, root, limit)


def expected_counts(cohorts: np.ndarray) -> tuple[list[int], list[int], list[float]]:
    """Returns how often each client was there, when last, and the mean of each broadcast."""
    counts, last, means = [0] * len(CLIENT_SIZES), [-1] * len(CLIENT_SIZES), []
    for r, cohort in enumerate(cohorts.tolist()):
        for client in cohort:
            counts[client] += 1
            last[client] = r
        means.append(np.mean([counts[client] for client in cohort]))
    return counts, last, means


def assert_it_stopped_before(r, loop):
    """Asserts that state, memory and count are those before round r."""
    assert not loop.healthy
    assert int(loop.done) == int(loop.state.round) == r
    counts, last, means = expected_counts(np.asarray(loop.records.attendance.cohort)[:r])
    assert loop.memory.rounds.tolist() == counts
    assert loop.memory.last.tolist() == last
    np.testing.assert_allclose(loop.state.params, sum(means), rtol=1e-6)


def test_memory_is_each_client_s_own():
    loop = advance(counting(), 20)
    assert int(loop.done) == int(loop.state.round) == 20
    cohorts = np.asarray(loop.records.attendance.cohort)
    counts, last, means = expected_counts(cohorts[:20])
    assert loop.memory.rounds.tolist() == counts
    assert loop.memory.last.tolist() == last
    np.testing.assert_allclose(loop.records.broadcast["mean"][:20], means, rtol=1e-6)
    np.testing.assert_allclose(loop.state.params, sum(means), rtol=1e-6)
    # Beyond the limit the buffers are untouched.
    assert cohorts.shape == (rounds.CAPACITY, COHORT)
    assert not np.any(cohorts[20:])
    assert not np.any(loop.records.broadcast["mean"][20:])


def test_a_round_that_is_not_finite_leaves_no_trace():
    """State, memory and count are those before it."""
    assert_it_stopped_before(7, advance(counting(fail_at=7), 20))


def test_a_round_without_a_finite_loss_leaves_no_trace():
    """Though every upload is good: clients forget it too."""
    algorithm = counting()

    def client(shared_key, state, memory, batches, own_key):
        result = algorithm.client(shared_key, state, memory, batches, own_key)
        return result._replace(stats={"loss": jnp.where(state.round < 7, 0.0, jnp.nan)})

    assert_it_stopped_before(7, advance(algorithm._replace(client=client), 20))


def test_each_client_is_given_the_round_s_key_and_one_of_its_own():
    """Clients that upload their keys' words: no stream of keys may stand in for another."""

    def client(shared_key, state, memory, batches, own_key):
        words = {"round": jax.random.key_data(shared_key), "own": jax.random.key_data(own_key)}
        return ClientResult(words, memory, {"loss": jnp.zeros(())})

    def server(key, state, broadcast):
        return ServerState(state.params, (), state.round + 1)

    algorithm = counting()._replace(
        client=client, aggregate=lambda uploads, weights: uploads, server=server
    )
    records, root = advance(algorithm, 3).records, keys.root(0)
    for r in range(3):
        cohort = records.attendance.cohort[r].tolist()
        shared = jax.random.key_data(keys.round_key(root.shared, r))
        own = [jax.random.key_data(keys.own_key(root.own, r, client)) for client in cohort]
        np.testing.assert_array_equal(records.broadcast["round"][r], [shared] * COHORT)
        np.testing.assert_array_equal(records.broadcast["own"][r], own)


def test_weights_are_the_clients_numbers_of_examples():
    loop = advance(counting(), 1, "examples")
    cohort = loop.records.attendance.cohort[0].tolist()
    weights = np.array([CLIENT_SIZES[client] for client in cohort])
    algorithm = counting()._replace(aggregate=lambda uploads, weights: {"mean": jnp.sum(weights)})
    assert len(set(weights.tolist())) > 1
    assert float(advance(algorithm, 1, "examples").state.params) == weights.sum()
    assert float(advance(algorithm, 1, "uniform").state.params) == COHORT


def test_no_rounds_change_nothing():
    loop = advance(counting(), 0)
    assert loop.healthy
    assert int(loop.done) == int(loop.state.round) == 0
    assert not np.any(loop.memory.rounds)


def test_replay_stops_before_a_broadcast_that_is_not_finite():
    algorithm, root = counting(), keys.root(0)
    replay = jax.jit(rounds.make_replay(algorithm, "threefry2x32"))
    seeds = np.stack([jax.random.key_data(keys.round_key(root.shared, r)) for r in range(4)])
    state = algorithm.init(jnp.zeros(()))
    broadcasts = {"mean": jnp.array([1.0, 2.0, jnp.inf, 4.0])}
    after = replay(state, seeds, broadcasts, 4)
    assert (int(after.round), float(after.params)) == (2, 3.0)
    after = replay(state, seeds, broadcasts, 1)
    assert (int(after.round), float(after.params)) == (1, 1.0)


def test_replay_is_given_the_keys_of_the_rounds():
    """A server that sums the words of its keys."""

    def server(key, state, broadcast):
        words = jax.random.key_data(key).astype(jnp.uint32).sum()
        return ServerState(state.params + words, (), state.round + 1)

    algorithm = counting()._replace(server=server)
    seeds = np.arange(12, dtype=np.uint32).reshape(3, 4)
    replay = jax.jit(rounds.make_replay(algorithm, "threefry4x32"))
    state = ServerState(jnp.zeros((), jnp.uint32), (), jnp.zeros((), jnp.int32))
    assert int(replay(state, seeds, {"mean": jnp.zeros(3)}, 3).params) == seeds.sum()


def test_evaluation_leaves_out_what_fills_up_the_last_batch():
    """Seven examples in batches of three, the last filled up with huge values."""
    values = np.full(9, 1e6, np.float32)
    values[:7] = np.arange(7)
    mask = (np.arange(9) < 7).reshape(3, 3)
    task = softmax_task()._replace(
        metrics=lambda params, batch: {"loss": batch * params, "square": batch**2}
    )
    means = jax.jit(rounds.make_evaluate(task))(jnp.array(2.0), values.reshape(3, 3), mask)
    assert float(means["loss"]) == 6.0
    assert float(means["square"]) == 13.0


@pytest.mark.parametrize(("local_steps", "copies"), [(1, False), (2, True)])
def test_a_round_of_one_local_step_has_one_model(local_steps, copies):
    """Whole rounds: no leaf is [C, 5, 3] at K = 1, where [C, 4, 5] features are."""
    task, root = softmax_task(), keys.root(0)
    algorithm = decomfl(
        task.loss, estimators.forward_difference(2, 1e-3), optax.adam(0.1), local_steps=local_steps
    )
    run = rounds.make_advance(algorithm, task, COHORT, BATCH_SIZE, "uniform")
    state = algorithm.init(task.init(root.init))
    shapes = shapes_in(jax.make_jaxpr(run)(state, (), task.train, root, 1).jaxpr)
    assert ((COHORT, 5, 3) in shapes) == copies
    assert (COHORT, local_steps, 4, 5) in shapes


PARAMS = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": {"c": jnp.array([0.5, -0.5])}}


def test_the_checksum_is_of_bits_and_names():
    checksum = int(rounds.fingerprint(PARAMS))
    assert int(rounds.fingerprint(jax.tree.map(np.asarray, PARAMS))) == checksum
    others = [
        {"A": PARAMS["a"], "b": PARAMS["b"]},
        {"a": PARAMS["a"][::-1], "b": PARAMS["b"]},
        {"a": PARAMS["a"]},
        {"a": jnp.nextafter(PARAMS["a"], jnp.inf), "b": PARAMS["b"]},
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS),
    ]
    checksums = [int(rounds.fingerprint(other)) for other in others]
    assert len({checksum, *checksums}) == 1 + len(others)
    assert int(rounds.fingerprint(jnp.array([0.0]))) != int(rounds.fingerprint(jnp.array([-0.0])))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_any_one_bit_changes_the_checksum(dtype):
    x = jnp.linspace(-1, 1, 6).astype(dtype)
    width = x.dtype.itemsize * 8
    word = jnp.dtype(f"uint{width}")
    words = jax.lax.bitcast_convert_type(x, word)

    @jax.jit
    def flipped(i, bit):
        changed = words.at[i].set(words[i] ^ (jnp.ones((), word) << bit.astype(word)))
        return rounds.fingerprint({"x": jax.lax.bitcast_convert_type(changed, dtype)})

    index = jnp.arange(6 * width)
    checksums = jax.vmap(flipped)(index // width, index % width)
    assert int(rounds.fingerprint({"x": x})) not in checksums.tolist()
    assert len(set(checksums.tolist())) == 6 * width


def test_the_checksum_sees_all_of_float64(x64):
    x = jnp.array([1.0, 2.0])
    assert x.dtype == jnp.float64
    assert int(rounds.fingerprint(x)) != int(rounds.fingerprint(x + 1e-15))
    assert int(rounds.fingerprint(x)) != int(rounds.fingerprint(x * 2.0**100))


def test_exchanged_signs_change_the_checksum():
    """Two params that swap their signs, as a wrong direction of signs would do."""
    one, other = jnp.array([0.5, -0.5, 2.0]), jnp.array([-0.5, 0.5, 2.0])
    assert int(rounds.fingerprint(one)) != int(rounds.fingerprint(other))
