"""Low-rank directions are the same algorithm: against the formed matrices A Bᵀ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import test_oracle
from jaxprs import shapes_in
from tiny_simulations import OPTIMIZERS

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.directions import estimators, local_models, perturbations, structured, sums
from zofl_jax.models import architectures, cnn, transformer

KEY = keys.round_key(keys.root(7).shared, 2)
CLIENTS, BATCH = 3, 4
SMALL = {
    "num_layers": 2,
    "width": 32,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "mlp_width": 48,
    "vocab_size": 60,
}


def formed(rank: int) -> perturbations.Perturbation:
    """Returns the same directions as arrays, added and summed like any others."""
    low_rank = perturbations.low_rank(rank)
    return perturbations._dense(lambda key, x: sums.arrays(low_rank.sample(key, x)))


def network(x, batch):
    """A loss with a tied embedding, stacked layers, a convolution and a dense matrix."""
    features = x["table"][batch["ids"]]

    def layer(a, weights):
        return jnp.tanh(a @ weights["kernel"] + weights["bias"]), None

    features, _ = jax.lax.scan(layer, features, x["layers"])
    scores = features @ x["table"].T
    grid = jnp.broadcast_to(scores[:, :, None, :2], (BATCH, 5, 5, 2))
    pooled = jnp.tanh(cnn._as_convolution(grid, x["conv"], "SAME")).mean((1, 2))
    return jnp.mean((pooled @ x["dense"] - batch["target"]) ** 2)


def network_params():
    random = np.random.default_rng(0)
    shapes = {
        "table": (11, 6),
        "layers": {"kernel": (3, 6, 6), "bias": (3, 6)},
        "conv": (3, 3, 2, 4),
        "dense": (4, 2),
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(random.normal(size=s) / 2), shapes, is_leaf=is_shape)


def cohort(local_steps):
    random = np.random.default_rng(1)
    lead = (CLIENTS, local_steps, BATCH)
    return {
        "ids": jnp.asarray(random.integers(0, 11, (*lead, 5))),
        "target": jnp.asarray(random.normal(size=(*lead, 2))),
    }


@pytest.mark.parametrize(
    ("make", "local_steps", "rank", "options"),
    [
        # Local steps take ten seconds to compile; with forward differences they are below.
        (estimators.forward_difference, 1, 1, {"perturbations_at_once": 2}),  # one is left over
        (estimators.central_difference, 3, 4, {"clients_at_once": 1, "perturbations_at_once": 2}),
    ],
)
def test_a_round_equals_that_of_formed_matrices(x64, make, local_steps, rank, options):
    """Uploads and the next params, to 1e-10 in float64, after a round that left momentum."""

    def round_with(perturbation, over_clients, **options):
        algorithm = decomfl(
            network,
            make(3, 1e-3, perturbation, **options),
            OPTIMIZERS["momentum and decay"](),
            local_steps=local_steps,
        )

        def play(state, r):
            key = keys.round_key(KEY, r)
            uploads = over_clients(
                lambda b: algorithm.client(key, state, (), b, key).upload, cohort(local_steps)
            )
            return algorithm.server(key, state, uploads.mean(0)), uploads

        state = algorithm.init(network_params())
        state, uploads = jax.jit(lambda s: jax.lax.scan(play, s, jnp.arange(2)))(state)
        return uploads, state.params

    # One client after the other: models of their own in a vmap take longer to compile.
    expected = round_with(formed(rank), jax.lax.map)
    found = round_with(
        perturbations.low_rank(rank), lambda fn, batches: jax.vmap(fn)(batches), **options
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("name", "local_steps"),
    [
        ("forward_difference", 3),  # one local step is above
        ("projection", 3),
        ("forward_gradient", 1),
    ],
)
def test_twenty_rounds_equal_the_reference(x64, name, local_steps):
    """Against the NumPy protocol with its real messages, as in test_oracle.py."""
    estimator, scalar_fn = test_oracle.ESTIMATORS[name]
    low_rank = perturbations.low_rank(2)
    simulator = test_oracle.make_softmax_simulator(
        estimator(2, perturbation=low_rank), test_oracle.sgd(), local_steps
    )
    agreement = test_oracle.agree(
        simulator,
        scalar_fn,
        test_oracle.oracle_sgd(),
        num_perturbations=2,
        local_steps=local_steps,
        perturbation=formed(2),
    )
    test_oracle.assert_agreement(simulator, agreement, oracle.softmax_regression())


@pytest.mark.parametrize("rank", [1, 4])
def test_the_mean_estimate_is_the_gradient(rank):
    """Within 5 standard errors a coordinate; the loss is quadratic, so there is no bias."""
    random = np.random.default_rng(0)
    x = {
        "w": jnp.asarray(random.normal(size=(4, 3)), jnp.float32),
        "layers": {"w": jnp.asarray(random.normal(size=(2, 3, 3)), jnp.float32)},
        "b": jnp.asarray(random.normal(size=3), jnp.float32),
    }
    inputs = jnp.asarray(random.normal(size=(5, 4)), jnp.float32)

    def loss(x, batch):
        return jnp.mean((batch @ x["w"] + x["b"] + x["layers"]["w"].sum(0)[0]) ** 2)

    estimator = estimators.central_difference(2, 1e-1, perturbations.low_rank(rank))
    count = 20_000

    def estimate(key):
        scalars = estimator.measure(loss, key, 0, x, inputs).scalars
        return estimator.expand(key, x, scalars)

    found = jax.jit(jax.vmap(estimate))(keys.direction_keys(KEY, count))
    gradient = jax.jit(jax.grad(loss))(x, inputs)
    for z, g in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        z = np.asarray(z, np.float64).reshape(count, -1)
        error = np.abs(z.mean(0) - np.asarray(g).reshape(-1))
        assert np.all(error <= 5 * z.std(0) / count**0.5)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
    smallest_error = max(np.asarray(z).std() for z in jax.tree.leaves(found)) / count**0.5
    assert 5 * smallest_error < 0.2 * largest, "a factor of 1.2 would be noticed"


@pytest.mark.parametrize("rank", [1, 3])
def test_covariance_is_the_identity(rank):
    """Each product of two entries has mean δ, by 5 standard errors; layers are independent."""
    x = {"w": jnp.zeros((3, 2)), "layers": {"w": jnp.zeros((2, 2, 2))}, "b": jnp.zeros(2)}
    sample = perturbations.low_rank(rank).sample
    draw = jax.jit(jax.vmap(lambda key: sums.arrays(sample(key, x))))
    drawn = jax.tree.map(np.asarray, draw(keys.direction_keys(KEY, 20_000)))
    z = np.concatenate([v.reshape(20_000, -1) for v in jax.tree.leaves(drawn)], axis=1)
    products = z[:, :, None] * z[:, None, :]
    error = products.mean(0) - np.eye(z.shape[1])
    assert np.all(np.abs(error) <= 5 * products.std(0) / 20_000**0.5 + 1e-6)
    assert np.linalg.matrix_rank(drawn["w"][0]) == min(rank, 2)


def drawn(shapes):
    """Returns params of a model, by NumPy, since `transformer.init` takes seconds to compile."""
    random = np.random.default_rng(0)

    def leaf(path, shape):
        scale = path[-1].key == "scale"
        return jnp.asarray(scale + 0.02 * random.standard_normal(shape.shape), shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def test_a_language_model_loses_nothing():
    """OPT and Llama shapes with tied tables: the loss of the formed sum, in float32.

    The direction's factors are drawn by NumPy, since a generator for each takes long to compile.
    """
    low_rank, random = perturbations.low_rank(1), np.random.default_rng(1)

    def normal(leaf):
        return jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype)

    for name in ("opt-125m", "smollm2-135m"):
        config = dataclasses.replace(architectures.named(name), **SMALL)
        x = drawn(transformer.shapes(config))
        tokens = jnp.arange(24).reshape(3, 8)
        mask = jnp.ones((3, 8), bool).at[0, :3].set(False)

        def loss(x):
            features = transformer.hidden(config, x, tokens, mask)[:, -1]  # noqa: B023
            scores = transformer.logits(config, x, features, [3, 7])  # noqa: B023
            return jax.nn.logsumexp(scores, -1) - scores[:, 0]

        direction = jax.tree.map(normal, jax.eval_shape(low_rank.sample, KEY, x))
        near = jax.jit(low_rank.add)(x, direction, 0.05)
        evaluate = jax.jit(lambda near: structured.evaluate(loss, near))
        found, compiled = evaluate(near), jax.jit(loss)
        expected, plain = (compiled(x) for x in (jax.jit(sums.arrays)(near), x))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(np.asarray(expected - plain)).max() > 1e-2
        matrix = (config.width, config.mlp_width)
        made = shapes_in(jax.make_jaxpr(evaluate)(near).jaxpr)
        slices = {(1, *matrix), matrix}  # a scan's own slice of the stack, nothing else
        assert config.vocab_size * config.width not in {int(np.prod(s)) for s in made - slices}


def test_clients_have_no_matrices_of_their_own():
    """At K = 3 nothing of a kernel's size has a clients axis; with Adam it has."""

    def shapes(optimizer):
        algorithm = decomfl(
            network,
            estimators.forward_difference(2, 1e-3, perturbations.low_rank()),
            optimizer,
            local_steps=3,
        )
        x = jax.tree.map(lambda p: p.astype(jnp.float32), network_params())
        clients = jax.vmap(algorithm.client, in_axes=(None, None, None, 0, None))
        args = (KEY, algorithm.init(x), (), cohort(3), KEY)
        return shapes_in(jax.make_jaxpr(clients)(*args).jaxpr)

    own = {(CLIENTS, 3, 6, 6), (CLIENTS, 11, 6)}
    assert own <= shapes(optax.adam(0.1))
    assert not own & shapes(OPTIMIZERS["momentum and decay"]())


@pytest.mark.parametrize(
    ("optimizer", "linear"),
    [
        (optax.sgd(0.1), True),
        (optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9, nesterov=True), True),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.5)), True),
        (optax.adam(0.1), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), False),
        (optax.chain(optax.clip(10.0), optax.sgd(0.1)), False),
        (optax.sign_sgd(0.1), False),
        (optax.adamw(0.1), False),
    ],
)
def test_linear_optimizers_are_told_apart(optimizer, linear):
    assert local_models.is_linear(optimizer, network_params()) is linear


@pytest.mark.optimized
def test_a_resumed_and_a_replayed_run_have_the_same_bits():
    def simulator():
        return test_oracle.make_softmax_simulator(
            estimators.forward_difference(2, 1e-2, perturbations.low_rank()),
            test_oracle.sgd(), 3, np.float32,
        )  # fmt: skip

    whole = simulator()
    start = whole.start(None).state
    initial = jax.tree.map(np.array, start)
    state, _, trace = whole.advance(start, (), 8)
    replayed = whole.replay(jax.tree.map(jnp.asarray, initial), trace.seeds, trace.broadcasts)
    parts = jax.tree.map(jnp.asarray, initial)
    for n in (3, 5):
        parts, _, _ = whole.advance(parts, (), n)
    for a, b, c in zip(*map(jax.tree.leaves, (state, replayed, parts)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() == np.asarray(c).tobytes()


def test_bad_ranks_are_refused():
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        perturbations.low_rank(0)
    with pytest.raises(ValueError, match="perturbations_at_once must be >= 1, got 0"):
        estimators.forward_difference(2, 1e-3, perturbations_at_once=0)
