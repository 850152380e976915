"""Quadratic objectives whose gradients and minimum are known exactly.

    f_i(x) = ½ (x − b_i)ᵀ A (x − b_i)        the objective of client i, b_i the mean of its centres
    f(x)   = mean over all examples          minimal at b̄, the mean of all centres

A = H diag(λ) H with a reflection H = I − (2/d) 1 1ᵀ, so A is dense and a product with it
costs O(d). The spectrum λ_j = exp(−c j) has λ_max = 1 and a chosen effective rank
Σλ/λ_max, apart from the dimension: the quantity that bounds the convergence of
zeroth-order methods in place of d (Malladi et al. 2023; Li et al. 2025, Theorem 2).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array, Batch, Params, PRNGKey, Task
from zofl_jax.data import partition


class Quadratic(NamedTuple):
    """A quadratic task and what is known about it.

    Attributes:
      task: params {"x": [d]}; an example is {"center": [d]}.
      gradient: (params, batch) -> the exact gradient of the batch's loss, like params.
      minimizer: b̄, the params of the least mean loss over all examples.
      minimum: that least mean loss.
    """

    task: Task
    gradient: Callable[[Params, Batch], Params]
    minimizer: Params
    minimum: float


def quadratic(
    key: PRNGKey,
    *,
    dim: int,
    effective_rank: float,
    num_clients: int,
    examples_per_client: int = 1,
    heterogeneity: float = 1.0,
    noise: float = 0.0,
) -> Quadratic:
    """Returns a quadratic task of `num_clients` clients.

    The centres are b* + heterogeneity · N(0, I) for each client, plus noise · N(0, I) for
    each of its examples, with b* ~ N(0, I); training starts from zero, so the initial gap
    is about effective_rank / 2 whatever the dimension.

    Args:
      key: draws the centres.
      dim: d >= 1.
      effective_rank: Σλ / λ_max, in [1, d]; d makes A the identity.
      num_clients: clients, >= 1.
      examples_per_client: >= 1.
      heterogeneity: how far clients' minima differ, in units of the distance to b*.
      noise: how far examples of one client differ.

    Raises:
      ValueError: for arguments out of range.

    >>> q = quadratic(jax.random.key(0), dim=8, effective_rank=2.0, num_clients=3)
    >>> g = q.gradient(q.minimizer, q.task.train.examples)["x"]
    >>> bool(jnp.abs(g).max() < 1e-6)
    True
    """
    for name, value in [
        ("dim", dim),
        ("num_clients", num_clients),
        ("examples_per_client", examples_per_client),
    ]:
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    rate = decay_rate(dim, effective_rank)

    def scale(x: Array) -> Array:
        """Returns A x for x [..., d]."""
        spectrum = jnp.exp(-rate * jnp.arange(dim)).astype(x.dtype)
        return _reflect(spectrum * _reflect(x))

    def errors(params: Params, batch: Batch) -> tuple[Array, Array]:
        error = params["x"] - batch["center"]
        return error, scale(error)

    def metrics(params: Params, batch: Batch) -> dict[str, Array]:
        error, scaled = errors(params, batch)
        return {"loss": jnp.sum(error * scaled, axis=-1) / 2}

    def loss(params: Params, batch: Batch) -> Array:
        return jnp.mean(metrics(params, batch)["loss"])

    def gradient(params: Params, batch: Batch) -> Params:
        _, scaled = errors(params, batch)
        return {"x": jnp.mean(scaled, axis=0)}

    def init(key: PRNGKey) -> Params:
        del key
        return {"x": jnp.zeros(dim)}

    n = num_clients * examples_per_client
    star_key, client_key, noise_key = jax.random.split(key, 3)
    centers = jax.random.normal(star_key, (dim,)) + heterogeneity * jnp.repeat(
        jax.random.normal(client_key, (num_clients, dim)), examples_per_client, axis=0
    )
    if noise:
        centers += noise * jax.random.normal(noise_key, (n, dim))
    examples = {"center": centers}
    offsets = np.arange(num_clients + 1) * examples_per_client
    train = partition.client_data(examples, np.arange(n), offsets)
    minimizer = {"x": jnp.mean(centers, axis=0)}
    task = Task("quadratic", init, loss, metrics, train, examples)
    return Quadratic(task, gradient, minimizer, float(loss(minimizer, examples)))


def decay_rate(dim: int, effective_rank: float) -> float:
    """Returns c >= 0 with Σ_{j<d} exp(−c j) = effective_rank.

    Raises:
      ValueError: unless 1 <= effective_rank <= dim.

    >>> round(decay_rate(10, 10.0), 6)
    0.0
    """
    if not 1 <= effective_rank <= dim:
        raise ValueError(f"effective_rank must be in [1, dim = {dim}], got {effective_rank}")
    if effective_rank == dim:
        return 0.0

    def rank(rate: float) -> float:
        return math.expm1(-rate * dim) / math.expm1(-rate)

    low, high = 1e-12, 50.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if rank(middle) > effective_rank else (low, middle)
    return high


def _reflect(x: Array) -> Array:
    return x - 2 * jnp.mean(x, axis=-1, keepdims=True)
