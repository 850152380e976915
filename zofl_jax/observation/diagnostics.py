"""What a run is up against: curvature, the noise of its updates, the spread of its clients.

All is measured on a fixed batch, with second derivatives as one `jvp` of a gradient, so no
Hessian is ever formed:

    trace, λ_max     tr(H) by Hutchinson's estimator, λ_max by power iteration
    effective rank   tr(H) / λ_max: it bounds the slow-down of zeroth-order methods in place of
                     the dimension (Malladi et al. 2023; Li et al. 2025)
    SNR              ‖E ĝ‖² / E ‖ĝ − E ĝ‖² of the estimate behind an update, as far as it
                     points along the gradient; what momentum adds across it counts as noise
    stability        ½ E ΔᵀHΔ / −E ⟨g, Δ⟩ of an update Δ: the loss falls on average while it is
                     below 1
    client variance  mean_c ‖g_c − ḡ‖² / ‖ḡ‖²

For gradient descent the stability number is η gᵀHg / 2‖g‖², at most η λ_max / 2, and 1 is the
edge of stability (Cohen et al. 2021). For P Gaussian directions it is
η (tr(H) + (P + 1) gᵀHg / ‖g‖²) / 2P: the trace decides, as in Song et al. 2026
(arXiv 2604.14669).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import (
    Algorithm,
    Array,
    Batch,
    Batches,
    ClientData,
    LossFn,
    Params,
    PRNGKey,
    ServerState,
    Task,
)
from zofl_jax.directions.estimators import central_difference, inner
from zofl_jax.directions.perturbations import Perturbation


class Trace(NamedTuple):
    """An estimate of tr(H)."""

    mean: Array  # []
    standard_error: Array  # []


class Updates(NamedTuple):
    """What an algorithm's updates of one state are worth."""

    snr: Array  # [], inf if all updates are the same multiple of the gradient, NaN if they are 0
    stability: Array  # [], negative if updates go uphill on average


class Diagnosis(NamedTuple):
    """All figures of one state of a run, as Python floats."""

    trace: float
    trace_error: float  # the standard error of `trace`
    top_eigenvalue: float
    effective_rank: float
    snr: float
    stability: float
    client_variance: float
    gradient_norm: float


def hessian_product(loss_fn: LossFn, params: Params, batch: Batch, vector: Params) -> Params:
    """Returns H v, with H the Hessian of the batch's loss at params.

    >>> f = lambda x, batch: 3.0 * x[0] ** 2 + x[0] * x[1]
    >>> hessian_product(f, jnp.ones(2), (), jnp.array([1.0, 0.0])).tolist()
    [6.0, 1.0]
    """
    return jax.jvp(lambda x: jax.grad(loss_fn)(x, batch), (params,), (vector,))[1]


def trace(
    loss_fn: LossFn, params: Params, batch: Batch, key: PRNGKey, num_probes: int = 32
) -> Trace:
    """Returns an unbiased estimate of tr(H): the mean of vᵀHv over random signs v.

    Its variance is twice the sum of the squares off the diagonal of H (Hutchinson 1990).

    Args:
      loss_fn: twice differentiable.
      params: floating point leaves.
      batch: of the loss.
      key: draws the probes.
      num_probes: >= 2.

    Raises:
      ValueError: if `num_probes` < 2.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes must be >= 2, got {num_probes}")

    def probe(key: PRNGKey) -> Array:
        v = _random_like(jax.random.rademacher, key, params)
        return inner(v, hessian_product(loss_fn, params, batch, v))

    values = jax.lax.map(probe, jax.random.split(key, num_probes))
    return Trace(jnp.mean(values), jnp.std(values, ddof=1) / num_probes**0.5)


def top_eigenvalue(
    loss_fn: LossFn, params: Params, batch: Batch, key: PRNGKey, num_iterations: int = 64
) -> Array:
    """Returns λ_max of the Hessian, [], by power iteration from a random start.

    The relative error is about (λ_2 / λ_1)^(2 num_iterations), from below. Where the eigenvalue of
    the largest magnitude is negative, a second iteration on the shifted Hessian finds λ_max.

    Args:
      loss_fn: twice differentiable.
      params: floating point leaves.
      batch: of the loss.
      key: draws the start.
      num_iterations: >= 1.

    Raises:
      ValueError: if `num_iterations` < 1.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be >= 1, got {num_iterations}")
    start = _normalised(_random_like(jax.random.normal, key, params))

    def iterate(shift: Array) -> Array:
        def product(v: Params) -> Params:
            return _add(hessian_product(loss_fn, params, batch, v), v, shift)

        def step(_: Array, v: Params) -> Params:
            return _normalised(product(v))

        v = jax.lax.fori_loop(0, num_iterations, step, start)
        return inner(v, product(v)) - shift

    largest = iterate(jnp.zeros(()))
    return jax.lax.cond(largest < 0, lambda: iterate(-largest), lambda: largest)


def updates(
    update: Callable[[PRNGKey], Params],
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    keys: PRNGKey,
) -> Updates:
    """Returns the signal-to-noise ratio and the stability number of random updates.

    An update Δ = −η ĝ of unknown η is taken apart along the gradient g: its signal is
    ⟨E Δ, g⟩ / ‖g‖, and all else is noise. With P Gaussian directions and plain descent
    SNR = P / (d + 1).

    Args:
      update: key -> Δ, a tree like params, such as `update_of` returns.
      loss_fn: twice differentiable; its gradient is the truth.
      params: where Δ starts.
      batch: of the loss.
      keys: [n], n >= 2, one an update.
    """
    gradient = jax.grad(loss_fn)(params, batch)

    def products(key: PRNGKey) -> tuple[Array, Array, Array]:
        delta = update(key)
        curved = hessian_product(loss_fn, params, batch, delta)
        return inner(gradient, delta), inner(delta, delta), inner(delta, curved)

    slopes, squares, curvatures = jax.lax.map(products, keys)
    # The square of a mean of n is too large by the n-th part of their variance.
    signal = jnp.square(jnp.mean(slopes)) - jnp.var(slopes, ddof=1) / len(slopes)
    signal = jnp.maximum(signal, 0) / inner(gradient, gradient)
    noise = jnp.mean(squares) - signal
    return Updates(
        jnp.where(noise > 1e-6 * signal, signal / noise, jnp.where(signal > 0, jnp.inf, jnp.nan)),
        jnp.mean(curvatures) / (-2 * jnp.mean(slopes)),
    )


def client_variance(loss_fn: LossFn, params: Params, batches: Batches) -> Array:
    """Returns mean_c ‖g_c − ḡ‖² / ‖ḡ‖², [], over the gradients of clients.

    0 if clients agree; grows without bound where their mean vanishes.

    Args:
      loss_fn: differentiable.
      params: a tree of arrays.
      batches: a batch of each client, a tree of arrays [C, B, ...].
    """
    count = jax.tree.leaves(batches)[0].shape[0]

    def mean(params: Params) -> Array:
        return jnp.mean(jax.lax.map(lambda batch: loss_fn(params, batch), batches))

    average = jax.grad(mean)(params)

    def distance(batch: Batch) -> Array:
        difference = _add(jax.grad(loss_fn)(params, batch), average, -1.0)
        return inner(difference, difference)

    return jnp.sum(jax.lax.map(distance, batches)) / count / inner(average, average)


def noise_scale(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    *,
    perturbation: Perturbation | None = None,
    num_directions: int = 32,
    smoothing: float = 1e-3,
) -> Array:
    """Returns σ² / ‖∇f‖², [], the noise of an example's gradient, by forward passes alone.

    Of n examples' central differences along P directions, s²_p is the variance and ḡ_p the mean:

        E s²_p = σ²,   E (ḡ_p² − s²_p / n) = ‖∇f‖²

    so the ratio of their means over the directions is an estimate, off by about √(2 / P) of itself.
    It is infinite where the examples' noise leaves nothing of the gradient: take more of them.

    Args:
      loss_fn: (params, batch) -> mean loss over examples.
      params: a tree of arrays.
      batch: n >= 2 examples.
      key: draws the directions.
      perturbation: the directions, Gaussian unless given.
      num_directions: P >= 1.
      smoothing: μ > 0.

    Raises:
      ValueError: for numbers out of range, or fewer than two examples.

    Ref: McCandlish et al. 2018 (arXiv 1812.06162), the simple noise scale.

    >>> f = lambda x, batch: jnp.mean(batch @ x)  # each example is its own gradient
    >>> batch = 3.0 + jax.random.normal(jax.random.key(0), (64, 100))
    >>> round(float(noise_scale(f, jnp.zeros(100), batch, jax.random.key(1))), 1)  # 1 / 9
    0.1
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if count < 2:
        raise ValueError(f"a noise is that of two examples or more, got {count}")
    singly = jax.tree.map(lambda x: x[:, None], batch)
    estimator = central_difference(num_directions, smoothing, perturbation, perturbations_at_once=1)

    def scalars(example: Batch) -> Array:
        return estimator.measure(loss_fn, key, jnp.zeros((), jnp.int32), params, example).scalars

    found = jax.vmap(scalars)(singly)
    variance = jnp.var(found, axis=0, ddof=1)
    signal = jnp.mean(jnp.square(jnp.mean(found, axis=0)) - variance / count)
    return jnp.where(signal > 0, jnp.mean(variance) / signal, jnp.inf)


def update_of(
    algorithm: Algorithm, state: ServerState, batch: Batch
) -> Callable[[PRNGKey], Params]:
    """Returns key -> Δ: what a round from `state` does to its params with one client, the batch
    at each step.

    The state's round, curvature and optimiser are used as they are; a client that remembers
    something takes part for the first time.
    """

    def update(key: PRNGKey) -> Params:
        shared_key, own_key = jax.random.split(key)
        memory = algorithm.init_memory(state.params)
        batches = jax.tree.map(lambda x: jnp.stack([x] * algorithm.local_steps), batch)
        upload = algorithm.client(shared_key, state, memory, batches, own_key).upload
        broadcast = algorithm.aggregate(jax.tree.map(lambda x: x[None], upload), jnp.ones(1))
        after = algorithm.server(shared_key, state, broadcast)
        return _add(after.params, state.params, -1.0)

    return update


def make_diagnose(
    algorithm: Algorithm,
    task: Task,
    batch_size: int,
    *,
    num_examples: int = 256,
    num_clients: int = 16,
    num_probes: int = 32,
    num_iterations: int = 32,
    num_updates: int = 32,
) -> Callable[[ServerState, PRNGKey], Diagnosis]:
    """Returns (state, key) -> Diagnosis, compiled at its first call.

    Args:
      algorithm: whose updates are looked at.
      task: its training examples are the batch, its clients the spread.
      batch_size: examples of a client.
      num_examples: of the batch, evenly from all clients' examples.
      num_clients: whose gradients are compared, evenly from all.
      num_probes: of the trace.
      num_iterations: of power iteration.
      num_updates: rounds of one client that are tried.
    """
    data = task.train
    batch = spread_examples(data, num_examples)
    starts = np.asarray(data.offsets)[_evenly(data.num_clients, num_clients)]
    own = np.asarray(data.order)[starts[:, None] + np.arange(batch_size)]
    batches = _examples_at(data.examples, own)

    @jax.jit
    def measure(state: ServerState, key: PRNGKey, batch: Batch, batches: Batches) -> tuple:
        params = state.params
        trace_key, power_key, update_key = jax.random.split(key, 3)
        gradient = jax.grad(task.loss)(params, batch)
        found = trace(task.loss, params, batch, trace_key, num_probes)
        top = top_eigenvalue(task.loss, params, batch, power_key, num_iterations)
        worth = updates(
            update_of(algorithm, state, batch),
            task.loss,
            params,
            batch,
            jax.random.split(update_key, num_updates),
        )
        spread = client_variance(task.loss, params, batches)
        norm = jnp.sqrt(inner(gradient, gradient))
        return *found, top, found.mean / top, *worth, spread, norm

    return lambda state, key: Diagnosis(*map(float, measure(state, key, batch, batches)))


def spread_examples(data: ClientData, count: int) -> Batch:
    """Returns `count` of the clients' examples, evenly from all; all where there are fewer.

    >>> data = ClientData(np.arange(8), np.arange(8), np.array([0, 4, 8]))
    >>> spread_examples(data, 3).tolist()
    [0, 3, 7]
    """
    rows = _evenly(int(data.offsets[-1]), count)
    return _examples_at(data.examples, np.asarray(data.order)[rows])


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, wanted)).astype(int)


def _examples_at(examples: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[rows]), examples)


def _random_like(draw: Callable[..., Array], key: PRNGKey, tree: Params) -> Params:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def _add(a: Params, b: Params, scale: Array | float) -> Params:
    return jax.tree.map(lambda x, y: (x + scale * y).astype(x.dtype), a, b)


def _normalised(v: Params) -> Params:
    norm = jnp.sqrt(inner(v, v))
    return jax.tree.map(lambda x: (x / jnp.maximum(norm, 1e-30)).astype(x.dtype), v)
