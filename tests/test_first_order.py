"""FedAvg and its family: their formulas, and what one of them repairs in another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofl_jax.algorithms import fedadagrad, fedadam, fedavg, fedsgd, fedyogi, scaffold
from zofl_jax.conditions import compression

KEY = jax.random.key(0)
CURVATURES = jnp.array([[1.0, 0.1], [0.1, 1.0], [0.5, 0.5]])
CENTERS = jnp.array([[4.0, 0.0], [0.0, -4.0], [2.0, 2.0]])
MINIMUM = (CURVATURES * CENTERS).sum(0) / CURVATURES.sum(0)


def loss(x, batch):
    """The quadratic of the client whose number is in the batch."""
    client = batch[0, 0]
    return jnp.sum(CURVATURES[client] * jnp.square(x - CENTERS[client])) / 2


def run(algorithm, rounds):
    """Returns the state after rounds of all three clients, and their memory."""
    batches = jnp.broadcast_to(jnp.arange(3)[:, None, None, None], (3, algorithm.local_steps, 1, 1))
    state = algorithm.init(jnp.zeros(2))
    memory = jax.tree.map(lambda m: jnp.stack([m] * 3), algorithm.init_memory(state.params))

    def body(_, carry):
        state, memory = carry
        clients = jax.vmap(algorithm.client, in_axes=(None, None, 0, 0, 0))
        results = clients(KEY, state, memory, batches, jax.random.split(KEY, 3))
        broadcast = algorithm.aggregate(results.upload, jnp.ones(3))
        return algorithm.server(KEY, state, broadcast), results.memory

    return jax.jit(lambda: jax.lax.fori_loop(0, rounds, body, (state, memory)))()


def test_fedavg_with_one_step_is_fedsgd():
    averaged, _ = run(fedavg(loss, optax.sgd(0.3)), 4)
    stepped, _ = run(fedsgd(loss, optax.sgd(0.3)), 4)
    np.testing.assert_allclose(averaged.params, stepped.params, rtol=1e-5)
    assert int(averaged.round) == 4


def test_fedavg_is_the_mean_of_the_clients_models():
    """Against local descents by hand."""
    after, _ = run(fedavg(loss, optax.sgd(0.3), local_steps=5), 1)
    models = CENTERS * (1 - (1 - 0.3 * CURVATURES) ** 5)
    np.testing.assert_allclose(after.params, models.mean(0), rtol=1e-5)


def test_fedprox_holds_clients_back():
    """With λ the local problem is ½ a (y − b)² + ½ λ y², solved by many steps."""
    after, _ = run(fedavg(loss, optax.sgd(0.3), local_steps=200, proximal=0.5), 1)
    models = CURVATURES * CENTERS / (CURVATURES + 0.5)
    np.testing.assert_allclose(after.params, models.mean(0), rtol=1e-4)


def test_scaffold_repairs_the_drift_of_fedavg():
    """Clients of different curvature: FedAvg stays away from the minimum, SCAFFOLD reaches it."""
    drifted, _ = run(fedavg(loss, optax.sgd(0.3), local_steps=10), 300)
    repaired, controls = run(scaffold(loss, 0.3, share=1.0, local_steps=10), 300)
    assert jnp.linalg.norm(drifted.params - MINIMUM) > 0.3
    np.testing.assert_allclose(repaired.params, MINIMUM, atol=1e-4)
    # The controls are the clients' gradients there, and their mean is that of all: zero.
    np.testing.assert_allclose(controls, CURVATURES * (MINIMUM - CENTERS), atol=1e-3)
    np.testing.assert_allclose(repaired.opt_state, 0, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda at_once: fedavg(loss, optax.sgd(0.3), local_steps=2, clients_at_once=at_once),
        lambda at_once: fedsgd(loss, optax.sgd(0.3), clients_at_once=at_once),
        lambda at_once: scaffold(loss, 0.3, share=1.0, local_steps=2, clients_at_once=at_once),
    ],
)
def test_how_many_clients_are_trained_at_once_changes_nothing(make):
    """One by one, as convolutional models are on CPU, or in groups that don't divide three."""
    together, _ = run(make(None), 2)
    for at_once in (1, 2):
        grouped, _ = run(make(at_once), 2)
        np.testing.assert_allclose(grouped.params, together.params, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "second_moment"),
    [
        (fedadam, lambda v, s: 0.9 * v + 0.1 * s),
        (fedyogi, lambda v, s: v - 0.1 * s * np.sign(v - s)),
        (fedadagrad, lambda v, s: v + s),
    ],
)
def test_adaptive_servers_follow_their_formulas(make, second_moment):
    """Three steps by hand: no bias correction, v starts at τ²."""
    decays = {} if make is fedadagrad else {"b2": 0.9}
    algorithm = make(loss, optax.sgd(0.3), 0.05, b1=0.5, tau=0.01, **decays)
    state = algorithm.init(jnp.zeros(2))
    x, m, v = np.zeros(2), np.zeros(2), np.full(2, 0.01**2)
    for change in ([1.0, -2.0], [0.1, 0.0], [-3.0, 0.5]):
        state = algorithm.server(KEY, state, jnp.array(change))
        m = 0.5 * m + 0.5 * np.array(change)
        v = second_moment(v, np.array(change) ** 2)
        x = x - 0.05 * m / (np.sqrt(v) + 0.01)
    np.testing.assert_allclose(state.params, x, rtol=1e-5)


def test_error_feedback_sends_everything_in_the_end():
    """What was sent and what is left add up to all that was to be sent."""
    inner = fedsgd(lambda x, batch: jnp.sum(x * batch[0]), optax.sgd(1.0))
    algorithm = compression.compressed(inner, compression.top_k(0.25), error_feedback=True)
    state, memory = algorithm.init(jnp.zeros(8)), algorithm.init_memory(jnp.zeros(8))
    slopes = jax.random.normal(KEY, (5, 1, 1, 8))
    client = jax.jit(algorithm.client)
    sent = np.zeros(8)
    for slope in slopes:
        result = client(KEY, state, memory, slope, KEY)
        cohort = jax.tree.map(lambda x: x[None], result.upload)
        broadcast = np.asarray(algorithm.aggregate(cohort, jnp.ones(1)))
        assert (broadcast != 0).sum() == 2
        sent, memory = sent + broadcast, result.memory
    np.testing.assert_allclose(sent + memory.residual, slopes.sum(0)[0, 0], atol=1e-5)


def test_error_feedback_is_refused_where_uploads_are_not_like_the_params():
    inner = scaffold(loss, 0.3, share=1.0)
    algorithm = compression.compressed(inner, compression.top_k(0.5), error_feedback=True)
    params = jnp.zeros(2)
    arguments = (KEY, algorithm.init(params), algorithm.init_memory(params))
    batches = jnp.zeros((1, 1, 1), jnp.int32)
    with pytest.raises(ValueError, match="error feedback needs uploads that are trees like"):
        jax.eval_shape(algorithm.client, *arguments, batches, KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedavg(loss, optax.sgd(1.0), local_steps=0), "local_steps must be >= 1, got 0"),
        (lambda: fedavg(loss, optax.sgd(1.0), proximal=-1.0), "proximal must be >= 0"),
        (lambda: fedadam(loss, optax.sgd(1.0), 0.0), "server_rate must be positive"),
        (lambda: fedyogi(loss, optax.sgd(1.0), 0.1, b2=1.0), r"b2 must be in \[0, 1\), got 1.0"),
        (lambda: fedadagrad(loss, optax.sgd(1.0), 0.1, tau=0.0), "tau must be positive"),
        (lambda: scaffold(loss, 0.1, share=0.0), r"share must be in \(0, 1\], got 0.0"),
        (lambda: scaffold(loss, 0.0, share=1.0), "learning_rate must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
