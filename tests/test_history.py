"""Directions that lean towards the last updates: what is estimated, and who has the updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import build, resolve
from tiny_simulations import assert_replayed, copy, joined
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, fedkseed
from zofl_jax.algorithms.history import leaning, with_history
from zofl_jax.directions import estimators, perturbations, sums
from zofl_jax.engine import simulation

KEY = keys.round_key(keys.root(7).shared, 2)
SHARE, SIZE = 0.4, 8
TASK = softmax_task()


def updates():
    """Returns two updates of length 1, not orthogonal, and an empty place; and their matrix."""
    random = np.random.default_rng(0)
    q = random.normal(size=(2, SIZE))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    padded = jnp.asarray(np.concatenate([q, np.zeros((1, SIZE))]), jnp.float32)
    return {"a": padded[:, :6].reshape(3, 2, 3), "b": padded[:, 6:]}, q


def covariance(q):
    return (1 - SHARE) * np.eye(SIZE) + SHARE * SIZE / len(q) * q.T @ q


@pytest.mark.parametrize("base", ["gaussian", "low_rank"])
def test_the_mean_estimate_is_what_is_stated(base):
    """(1 − ρ) g + ρ (d / m) Σ_h ⟨q_h, g⟩ q_h, within 5 standard errors a coordinate."""
    tree, q = updates()
    directions = leaning(getattr(perturbations, base)(), tree, jnp.asarray(2), SHARE, SIZE)
    random = np.random.default_rng(1)
    slope = {"a": jnp.asarray(random.normal(size=(2, 3))), "b": jnp.asarray(random.normal(size=2))}
    x = jax.tree.map(jnp.zeros_like, slope)

    def loss(x, batch):
        return sum(jnp.sum(s * v) for s, v in zip(slope.values(), x.values(), strict=True))

    estimator, count = estimators.central_difference(2, 1e-1, directions), 20_000

    def estimate(key):
        return estimator.expand(key, x, estimator.measure(loss, key, 0, x, ()).scalars)

    found = jax.jit(jax.vmap(estimate))(keys.direction_keys(KEY, count))
    found = np.concatenate([np.asarray(v).reshape(count, -1) for v in found.values()], 1)
    gradient = np.concatenate([np.asarray(s).reshape(-1) for s in slope.values()])
    expected = covariance(q) @ gradient
    error = np.abs(found.mean(0) - expected)
    assert np.all(error <= 5 * found.std(0) / count**0.5)
    assert np.abs(expected - gradient).max() > 10 * (found.std(0) / count**0.5).max()
    assert gradient @ expected > 0


def test_without_updates_directions_are_isotropic():
    tree, _ = updates()
    nothing = jax.tree.map(jnp.zeros_like, tree)
    directions = leaning(perturbations.gaussian(), nothing, jnp.asarray(0), SHARE, SIZE)
    x = jax.tree.map(lambda t: t[0], tree)
    leant, plain = jax.jit(
        lambda: [sums.arrays(z.sample(KEY, x)) for z in (directions, perturbations.gaussian())]
    )()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), leant, plain)


def make(count=5, **options):
    def inner(z):
        estimator = estimators.central_difference(count, 1e-2, z)
        return decomfl(TASK.loss, estimator, optax.sgd(0.02, momentum=0.5), **options)

    return inner


def test_the_state_holds_the_last_updates_of_length_one_and_a_replay_rebuilds_them():
    algorithm = with_history(make(local_steps=2), perturbations.gaussian(), 3, SHARE)
    simulator = simulation.make_simulator(
        algorithm, TASK, clients_per_round=2, batch_size=BATCH_SIZE
    )
    start = simulator.start(None)
    initial, state, memory = copy(start.state), start.state, start.memory
    params, traces = [initial.params], []
    for _ in range(5):
        state, memory, trace = simulator.advance(state, memory, 1)
        params.append(copy(state.params))
        traces.append(trace)
    kept = copy(state.opt_state)
    for r in (2, 3, 4):
        change = jax.tree.map(lambda a, b: b - a, params[r], params[r + 1])
        norm = float(optax.tree_utils.tree_norm(change))
        jax.tree.map(
            lambda q, c, r=r, norm=norm: np.testing.assert_allclose(q[r % 3], c / norm, atol=2e-4),
            kept.updates, change,
        )  # fmt: skip
    assert int(kept.rounds) == 5
    trace = joined(traces)
    replayed = simulator.replay(jax.tree.map(jnp.asarray, initial), trace.seeds, trace.broadcasts)
    assert_replayed(copy(replayed), copy(state), exact=False)
    # No byte more than without.
    plain = simulation.make_simulator(
        make(local_steps=2)(perturbations.gaussian()), TASK, clients_per_round=2,
        batch_size=BATCH_SIZE,
    )  # fmt: skip
    assert simulator.sizes == plain.sizes


def test_a_round_without_a_step_is_none_to_lean_towards():
    algorithm = with_history(make(), perturbations.gaussian(), 2, SHARE)
    state = algorithm.init({"w": jnp.ones((4, 2)), "b": jnp.zeros(2)})
    after = jax.jit(algorithm.server)(KEY, state, jnp.zeros((1, 5)))
    assert int(after.opt_state.rounds) == 0
    assert not any(np.asarray(q).any() for q in jax.tree.leaves(after.opt_state.updates))


def test_it_follows_a_slope_that_stays_better_than_isotropic_directions():
    """On a linear loss the span comes to hold the gradient: the cosine of a step grows."""
    d = 400
    slope = jnp.asarray(np.random.default_rng(0).normal(size=d) / d**0.5, jnp.float32)

    def loss(x, batch):
        return jnp.vdot(slope, x)

    def inner(z):
        return decomfl(loss, estimators.central_difference(8, 1e-1, z), optax.sgd(0.01))

    def cosines(algorithm):
        def play(state, r):
            key = keys.round_key(KEY, r)
            batch = jnp.zeros((1, 1))
            after = algorithm.server(
                key, state, algorithm.client(key, state, (), batch, key).upload
            )
            step = state.params - after.params
            return after, jnp.vdot(step, slope) / jnp.linalg.norm(step) / jnp.linalg.norm(slope)

        state = algorithm.init(jnp.zeros(d))
        return np.asarray(jax.jit(lambda s: jax.lax.scan(play, s, jnp.arange(60)))(state)[1])

    gaussian = perturbations.gaussian()
    leant = cosines(with_history(inner, gaussian, 8, 0.5))[30:].mean()
    plain = cosines(inner(gaussian))[30:].mean()
    assert plain < 0.2 and leant > 1.5 * plain


def test_the_flags_choose_it_and_what_can_not_hold_is_refused():
    experiment = build("--history=4", "--history_share=0.3", "--num_perturbations=2")
    state = experiment.simulator.start(None).state
    assert {x.shape[0] for x in jax.tree.leaves(state.opt_state.updates)} == {4}
    build("--history=4", "--mask=random", "--algorithm=hiso", "--num_perturbations=2")
    for flags, message in [
        (["--algorithm=fedkseed"], "--history=4 is not possible .* whose pool has the same"),
        (["--algorithm=fedzo"], "--history=4 is not possible .* whose late clients are sent"),
        (["--algorithm=ferret"], "--history has no effect with --algorithm=ferret"),
        (["--deadline=2", "--late_weight=0.5"], "--late_weight=0.5 is not possible with --histo"),
    ]:
        with pytest.raises(Exception, match=message):
            resolve("--history=4", *flags)
    with pytest.raises(Exception, match="--history_share has no effect without a --history"):
        resolve("--history_share=0.2")
    for arguments, message in [
        ((0, 0.5), "length of the history must be >= 1, got 0"),
        ((2, 1.0), r"share of the history must be in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_history(make(), perturbations.gaussian(), *arguments)
    pool = fedkseed(TASK.loss, estimators.central_difference(1, 1e-2), 0.1, pool_key=KEY)
    with pytest.raises(ValueError, match="whose late clients replay"):
        with_history(lambda z: pool, perturbations.gaussian(), 2, 0.5)
