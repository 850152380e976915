"""DeComFL's three functions: what they compute, and what they never do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import shapes_in
from tiny_tasks import softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.directions import estimators, perturbations

KEY = keys.round_key(keys.root(2).shared, 0)


def client_batches(num_clients: int, local_steps: int) -> dict[str, np.ndarray]:
    """Returns random batches of 4 examples, a tree [C, K, 4, ...]."""
    random = np.random.default_rng(1)
    shape = (num_clients, local_steps, 4)
    return {
        "features": random.normal(size=(*shape, 5)).astype(np.float32),
        "label": random.integers(0, 3, shape).astype(np.int32),
    }


def run_clients(algorithm, state, batches):
    return jax.jit(jax.vmap(algorithm.client, in_axes=(None, None, None, 0, None)))(
        KEY, state, (), batches, KEY
    )


def counted(perturbation: perturbations.Perturbation):
    """Returns the perturbation, and the lists that grow with each use in compiled code.

    A use with a key, or with scalars, of each client's own counts once a client.
    """
    sampled, accumulated = [], []

    def sample(key, params):
        jax.debug.callback(lambda _: sampled.append(1), jax.random.key_data(key))
        return perturbation.sample(key, params)

    def accumulate(keys, params, scalars):
        jax.debug.callback(lambda _: accumulated.append(1), scalars)
        return perturbation.accumulate(keys, params, scalars)

    return perturbations.Perturbation(sample, perturbation.add, accumulate), sampled, accumulated


@pytest.mark.parametrize("local_steps", [1, 3])
def test_the_update_after_the_last_step_is_never_computed(local_steps):
    """A client draws K·P directions to measure and expands K − 1 times; the server K times.

    Seven clients of a vmap share all directions.
    """
    perturbation, sampled, accumulated = counted(perturbations.rademacher())
    task = softmax_task()
    estimator = estimators.forward_difference(4, 1e-3, perturbation)
    algorithm = decomfl(task.loss, estimator, optax.sgd(0.1), local_steps=local_steps)
    state = algorithm.init(task.init(KEY))
    results = run_clients(algorithm, state, client_batches(7, local_steps))
    jax.block_until_ready(results)
    jax.effects_barrier()
    assert len(sampled) == 4 * local_steps
    assert len(accumulated) == (local_steps - 1) * 7
    accumulated.clear()
    jax.block_until_ready(jax.jit(algorithm.server)(KEY, state, jnp.ones((local_steps, 4))))
    jax.effects_barrier()
    assert len(accumulated) == local_steps


@pytest.mark.parametrize("clients_at_once", [None, 1])
@pytest.mark.parametrize("make", [estimators.forward_difference, estimators.central_difference])
def test_params_are_never_copied_for_each_client_at_the_first_step(make, clients_at_once):
    """No intermediate is [C, *shape of a leaf] at K = 1; at K = 2 clients' models are."""
    task = softmax_task()
    estimator = make(2, 1e-3, clients_at_once=clients_at_once)

    def shapes(local_steps: int) -> set[tuple[int, ...]]:
        algorithm = decomfl(task.loss, estimator, optax.sgd(0.1, 0.9), local_steps=local_steps)
        state = algorithm.init(task.init(KEY))
        run = jax.vmap(algorithm.client, in_axes=(None, None, None, 0, None))
        return shapes_in(
            jax.make_jaxpr(run)(KEY, state, (), client_batches(7, local_steps), KEY).jaxpr
        )

    assert not {(7, 5, 3), (7, 3)} & shapes(1)
    assert (7, 5, 3) in shapes(2)


@pytest.mark.parametrize(
    ("name", "clients_at_once"),
    [("forward_difference", 1), ("projection", 3), ("forward_gradient", 3)],
)
def test_how_many_clients_are_evaluated_at_once_changes_nothing(name, clients_at_once):
    """Seven clients, in groups that don't divide seven too; up to the order of sums."""
    task = softmax_task()
    smoothing = {"smoothing": 0.1} if name == "forward_difference" else {}

    def uploads(clients_at_once):
        make = getattr(estimators, name)
        estimator = make(2, **smoothing, clients_at_once=clients_at_once)
        algorithm = decomfl(task.loss, estimator, optax.sgd(0.1), local_steps=2)
        state = algorithm.init(task.init(KEY))
        return run_clients(algorithm, state, client_batches(7, 2)).upload

    grouped = uploads(clients_at_once)
    assert grouped.shape == (7, 2, 2)
    np.testing.assert_allclose(grouped, uploads(None), atol=1e-4)


def test_clients_in_groups_of_none_are_refused():
    with pytest.raises(ValueError, match="clients_at_once must be >= 1, got 0"):
        estimators.projection(1, clients_at_once=0)


def test_one_step_of_the_mean_is_one_step_on_the_mean_loss():
    """At K = 1 scalars are linear in the loss: averaging them averages the objectives."""
    task = softmax_task()
    algorithm = decomfl(task.loss, estimators.projection(3), optax.sgd(0.1))
    state = algorithm.init(task.init(KEY))
    batches = client_batches(7, 1)
    uploads = run_clients(algorithm, state, batches).upload
    mean = algorithm.aggregate(uploads, jnp.ones(7))
    together = jax.tree.map(lambda x: x.reshape(1, 28, *x.shape[3:]), batches)
    alone = jax.jit(algorithm.client)(KEY, state, (), together, KEY).upload
    np.testing.assert_allclose(mean, alone, atol=1e-5)


def test_a_round_advances_the_optimiser_by_k_steps():
    task = softmax_task()
    algorithm = decomfl(task.loss, estimators.projection(2), optax.adam(0.1), local_steps=3)
    state = algorithm.init(task.init(KEY))
    assert int(state.round) == 0
    after = jax.jit(algorithm.server)(KEY, state, jnp.ones((3, 2)))
    assert int(after.round) == 1
    assert int(optax.tree.get(after.opt_state, "count")) == 3
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_a_client_reports_its_mean_loss_and_keeps_nothing(local_steps):
    task = softmax_task()
    # With a rate of nothing, all local steps are at the initial params.
    algorithm = decomfl(
        task.loss, estimators.projection(2), optax.sgd(0.0), local_steps=local_steps
    )
    params = task.init(KEY)
    batches = jax.tree.map(lambda x: x[0], client_batches(1, local_steps))
    result = jax.jit(algorithm.client)(KEY, algorithm.init(params), (), batches, KEY)
    losses = [
        task.loss(params, jax.tree.map(lambda x: x[k], batches))  # noqa: B023
        for k in range(local_steps)
    ]
    np.testing.assert_allclose(result.stats["loss"], np.mean(losses), rtol=1e-6)
    assert result.memory == algorithm.init_memory(params) == ()
    assert result.upload.shape == (local_steps, 2)
    assert algorithm.local_steps == local_steps


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "sphere"])
def test_params_of_bfloat16_are_kept_in_float32(name):
    """Through local steps and the server's; so is what is sent."""
    task = softmax_task()
    estimator = estimators.forward_difference(2, 0.1, getattr(perturbations, name)())
    algorithm = decomfl(task.loss, estimator, optax.sgd(0.1, 0.9), local_steps=2)
    state = algorithm.init(jax.tree.map(lambda x: x.astype(jnp.bfloat16), task.init(KEY)))
    batches = jax.tree.map(lambda x: x[0], client_batches(1, 2))
    upload = jax.eval_shape(algorithm.client, KEY, state, (), batches, KEY).upload
    assert upload.dtype == jnp.float32
    after = jax.eval_shape(algorithm.server, KEY, state, upload)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}


def test_another_mean_may_be_chosen():
    def median(uploads, weights):
        return jnp.median(uploads, axis=0)

    algorithm = decomfl(
        softmax_task().loss, estimators.projection(1), optax.sgd(0.1), aggregate=median
    )
    assert algorithm.aggregate is median


@pytest.mark.parametrize("local_steps", [0, -1])
def test_no_local_steps_are_refused(local_steps):
    with pytest.raises(ValueError, match=f"local_steps must be >= 1, got {local_steps}"):
        decomfl(
            softmax_task().loss, estimators.projection(1), optax.sgd(1.0), local_steps=local_steps
        )
