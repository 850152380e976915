"""Lazily changed orthonormal subspaces: their directions, what is estimated, how long they stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import build, resolve
from jaxprs import shapes_in

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.algorithms.subspaces import in_subspaces
from zofl_jax.directions import estimators, perturbations, structured, sums

KEY = keys.round_key(keys.root(7).shared, 2)
PARAMS = {
    "w": jnp.zeros((5, 4)),
    "layers": {"w": jnp.zeros((2, 4, 3))},
    "conv": jnp.zeros((2, 2, 2, 3)),
    "b": jnp.zeros(2),
}
RANK = 2


@jax.jit
def bases_of(key):
    return perturbations.bases(key, PARAMS, RANK)


@functools.cache
def bases():
    return bases_of(jax.random.key(3))


def projections():
    """Returns (m n / r²) Π for all params, [d, d], formed of the bases by Kronecker products."""
    blocks = []
    for path, x in jax.tree_util.tree_leaves_with_path(PARAMS):
        basis = bases().get(keys.path_name(path))
        if basis is None:
            blocks.append(np.eye(x.size))
            continue
        stack = perturbations.is_stacked(keys.path_name(path))
        lefts, rights = (np.asarray(s) if stack else np.asarray(s)[None] for s in basis)
        for left, right in zip(lefts, rights, strict=True):
            u = left.reshape(-1, left.shape[-1])
            size = u.shape[0] * right.shape[0]
            factor = size / (u.shape[1] * right.shape[1])
            blocks.append(factor * np.kron(u @ u.T, right @ right.T))
    total = np.zeros((sum(map(len, blocks)),) * 2)
    at = 0
    for block in blocks:
        total[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return total


def flat(tree, count):
    return np.concatenate([np.asarray(x).reshape(count, -1) for x in jax.tree.leaves(tree)], 1)


def test_bases_are_orthonormal_and_those_of_other_keys_are_others():
    for name, (left, right) in jax.tree.map(np.asarray, bases()).items():
        for side in (left.reshape(*left.shape[: left.ndim - right.ndim + 1], -1, RANK)
                     if name == "layers/w" else left.reshape(-1, RANK), right):  # fmt: skip
            gram = np.swapaxes(side, -1, -2) @ side
            np.testing.assert_allclose(gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-5)
    other = bases_of(jax.random.key(4))["w"].left
    assert np.abs(np.asarray(other) - bases()["w"].left).max() > 0.1
    wide = jax.jit(lambda: perturbations.bases(KEY, {"w": jnp.zeros((3, 8))}, 5)["w"])()
    assert (wide.left.shape, wide.right.shape) == ((3, 3), (8, 5))


def test_covariance_is_the_projection_times_the_stated_factor():
    """E[z zᵀ] = (m n / r²) Π for each matrix, I for vectors: by 5 standard errors an entry."""
    count = 20_000
    directions = perturbations.subspace(bases())
    sample = jax.vmap(lambda key: sums.arrays(directions.sample(key, PARAMS)))
    z = flat(jax.jit(sample)(keys.direction_keys(KEY, count)), count)
    products = z[:, :, None] * z[:, None, :]
    error = products.mean(0) - projections()
    assert np.all(np.abs(error) <= 5.5 * products.std(0) / count**0.5 + 1e-5)
    # All of it lies in r² dimensions of each matrix.
    assert np.linalg.matrix_rank(z[:200], tol=1e-3) == RANK**2 * 4 + 2


def test_over_random_bases_covariance_is_the_identity():
    x = {"w": jnp.zeros((3, 2))}

    def sample(key):
        own, direction = jax.random.split(key)
        directions = perturbations.subspace(perturbations.bases(own, x, 1))
        return sums.arrays(directions.sample(direction, x))

    count = 20_000
    z = flat(jax.jit(jax.vmap(sample))(keys.direction_keys(KEY, count)), count)
    products = z[:, :, None] * z[:, None, :]
    error = products.mean(0) - np.eye(6)
    assert np.all(np.abs(error) <= 5.5 * products.std(0) / count**0.5)


def loss(x, batch):
    out = batch @ x["w"] + jnp.sum(x["conv"], (0, 1, 2, 3)) + x["b"].sum()
    return jnp.mean(jnp.square(jnp.concatenate([out, batch[:, :4] @ x["layers"]["w"][0]], 1)))


def network_params():
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), PARAMS)


def test_the_mean_estimate_is_the_projected_gradient_times_the_factor():
    x, batch = network_params(), jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)))
    estimator = estimators.central_difference(2, 1e-1, perturbations.subspace(bases()))
    count = 20_000

    def estimate(key):
        return estimator.expand(key, x, estimator.measure(loss, key, 0, x, batch).scalars)

    found = flat(jax.jit(jax.vmap(estimate))(keys.direction_keys(KEY, count)), count)
    gradient = flat(jax.tree.map(lambda g: g[None], jax.grad(loss)(x, batch)), 1)[0]
    expected = projections() @ gradient
    error = np.abs(found.mean(0) - expected)
    assert np.all(error <= 5.5 * found.std(0) / count**0.5 + 1e-4)
    assert np.abs(expected - gradient).max() > 10 * (found.std(0) / count**0.5).max()


def test_sums_and_structured_losses_are_those_of_formed_directions():
    x, batch = network_params(), jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)))
    directions = perturbations.subspace(bases())
    each = keys.direction_keys(KEY, 3)
    form = jax.jit(lambda key: sums.arrays(directions.sample(key, x)))
    formed = [form(key) for key in each]
    scalars = jnp.asarray([0.5, -1.0, 2.0])
    expected = jax.tree.map(lambda *z: sum(s * w for s, w in zip(scalars, z, strict=True)), *formed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.jit(directions.accumulate)(each, x, scalars), expected,
    )  # fmt: skip

    @jax.jit
    def near(x):
        return structured.evaluate(
            loss, directions.add(x, directions.sample(each[0], x), 0.1), batch
        )

    @jax.jit
    def with_many(x):
        coefficients = jax.tree.map(lambda _: 0.1 * scalars, x)
        return structured.evaluate(loss, directions.combine(x, each, coefficients), batch)

    plain = jax.jit(lambda z: loss(jax.tree.map(lambda a, z: a + 0.1 * z, x, z), batch))
    np.testing.assert_allclose(near(x), plain(formed[0]), 1e-4)
    np.testing.assert_allclose(with_many(x), plain(expected), 1e-4)


def test_a_perturbed_matrix_is_never_formed():
    """As with low-rank directions, also for many directions and local steps' coefficients."""
    x = {"w": jnp.zeros((40, 30))}
    directions = perturbations.subspace(perturbations.bases(KEY, x, 2))

    def one(x, batch):
        return jnp.mean(jnp.square(batch @ x["w"]))

    def evaluate(x, batch):
        estimator = estimators.central_difference(6, 1e-2, directions)
        return estimator.measure(one, KEY, 0, x, batch).scalars

    made = shapes_in(jax.make_jaxpr(evaluate)(x, jnp.ones((7, 40))).jaxpr)
    assert not {s for s in made if s[-2:] == (40, 30) and len(s) > 2}


@pytest.mark.parametrize("local_steps", [1, 3])
def test_within_t_rounds_a_matrix_moves_in_one_subspace(local_steps):
    """After T = 3 rounds its change has rank r; with the next subspace twice that."""
    x = {"w": jnp.zeros((9, 8))}

    def make(z):
        one = lambda x, batch: jnp.mean(jnp.square(batch @ x["w"] - 1))  # noqa: E731
        estimator = estimators.central_difference(8, 1e-2, z)
        return decomfl(one, estimator, optax.sgd(0.01), local_steps=local_steps)

    algorithm = in_subspaces(make, jax.random.key(5), RANK, 3)
    state, changes = algorithm.init(x), []
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(local_steps, 4, 9)))
    client, server = jax.jit(algorithm.client), jax.jit(algorithm.server)
    start = algorithm.init(x)
    for r in range(6):
        key = keys.round_key(KEY, r)
        upload = client(key, state, (), batches, key).upload
        state = server(key, state, upload)
        changes.append(np.asarray(state.params["w"] - start.params["w"]))
    ranks = [np.linalg.matrix_rank(c, tol=1e-4 * np.abs(c).max()) for c in changes]
    assert ranks == [RANK, RANK, RANK, 2 * RANK, 2 * RANK, 2 * RANK]
    assert loss_of(changes[-1], batches) < loss_of(0 * changes[-1], batches)


def loss_of(w, batches):
    return float(jnp.mean(jnp.square(batches[0] @ w - 1)))


def test_the_flags_choose_it_and_what_can_not_hold_is_refused():
    flags = ("--perturbation=subspace", "--rank=3", "--subspace_rounds=7")
    simulator = build(*flags, "--num_perturbations=2", "--mask=random").simulator
    assert simulator.sizes[0].upload == 4 * 2 * 4
    for more, message in [
        (["--algorithm=fedkseed"], "--perturbation=subspace is not possible .* whose pool"),
        (["--algorithm=hybrid"], "--perturbation=subspace is not possible .* use --perturbation=l"),
        (["--algorithm=ferret"], "--perturbation=subspace is not possible .* use --perturbation=l"),
        (["--deadline=2", "--late_weight=0.5"], "--late_weight=0.5 is not possible with --pertu"),
        (["--history=3"], "--history=3 is not possible with --perturbation=subspace"),
    ]:
        with pytest.raises(Exception, match=message):
            resolve("--perturbation=subspace", *more)
    with pytest.raises(Exception, match="--subspace_rounds has no effect with --perturbation=gau"):
        resolve("--subspace_rounds=7")
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        perturbations.bases(KEY, PARAMS, 0)
    with pytest.raises(ValueError, match="rounds of a subspace must be >= 1, got 0"):
        in_subspaces(lambda z: None, KEY, 1, 0)
