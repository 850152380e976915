"""From the uploads of a cohort to one broadcast: the mean, and rules that survive bad uploads.

A rule is (uploads [C, ...], weights [C]) -> broadcast. A weight of zero says that the client
is absent: nothing of its upload enters, whatever it holds. With everybody absent the
broadcast is zero. Mean, clipped mean, geometric median and majority take the other weights as
they are; the rules that sort or choose uploads only ask who is there.

`krum`, `multi_krum`, `geometric_median` and `clipped_mean` measure distances and norms over a
whole upload, all its leaves together; the other rules go number by number.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Array, Broadcast, Upload

Rule = Callable[[Upload, Array], Broadcast]


def mean(uploads: Upload, weights: Array) -> Broadcast:
    """Returns the weighted mean Σ_i w_i u_i / Σ_i w_i over the cohort.

    Args:
      uploads: a tree of arrays [C, ...].
      weights: [C], non-negative.

    >>> mean(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).item()
    2.0
    >>> mean(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0])).item()
    1.0
    """
    _check_cohort(uploads, weights)

    def leaf(u: Array) -> Array:
        wide = jnp.promote_types(u.dtype, jnp.float32)
        total = jnp.sum(weights.astype(wide))
        shares = weights.astype(wide) / jnp.where(total > 0, total, 1)
        return jnp.tensordot(shares, present_only(u, weights).astype(wide), axes=1).astype(u.dtype)

    return jax.tree.map(leaf, uploads)


def median(uploads: Upload, weights: Array) -> Broadcast:
    """Returns the median of each number over the clients that are there.

    Ref: Yin et al., ICML 2018 (arXiv 1803.01498), Algorithm 1, option I.

    >>> median(jnp.array([1.0, 2.0, 9.0]), jnp.ones(3)).item()
    2.0
    """
    count = jnp.sum(weights > 0)

    def leaf(u: Array) -> Array:
        ordered = _sorted(u, weights)
        low = jnp.take(ordered, jnp.maximum(count - 1, 0) // 2, axis=0)
        high = jnp.take(ordered, jnp.minimum(count // 2, len(u) - 1), axis=0)
        # Halves before the sum: that of two large numbers may overflow.
        return jnp.where(count > 0, low / 2 + high / 2, 0).astype(u.dtype)

    return jax.tree.map(leaf, _floating(uploads, weights))


def trimmed_mean(share: float) -> Rule:
    """Returns the rule that drops the largest and the smallest numbers and averages the rest.

    Of the n clients that are there, floor(share · n) are dropped at each end, number by number.
    Ref: Yin et al., ICML 2018 (arXiv 1803.01498), Algorithm 1, option II.

    Args:
      share: β in [0, 1/2).

    Raises:
      ValueError: for a share out of range.

    >>> trimmed_mean(0.25)(jnp.array([1.0, 2.0, 4.0, 99.0]), jnp.ones(4)).item()
    3.0
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"the share trimmed at each end must be in [0, 0.5), got {share}")

    def rule(uploads: Upload, weights: Array) -> Broadcast:
        size = len(weights)
        # A table, since 0.29 · 100 is below 29 in floating point.
        dropped_of = np.array([math.floor(share * n + 1e-9) for n in range(size + 1)])
        count = jnp.sum(weights > 0)
        dropped = jnp.asarray(dropped_of)[count]
        rank = jnp.arange(size)
        kept = ((rank >= dropped) & (rank < count - dropped)).astype(jnp.float32)

        def leaf(u: Array) -> Array:
            return mean(_sorted(u, weights), kept)

        return jax.tree.map(leaf, _floating(uploads, weights))

    return rule


def krum(num_byzantine: int) -> Rule:
    """Returns the rule that takes the upload nearest to its neighbours, and no other.

    The score of an upload is the sum of its squared distances to the n − f − 2 uploads nearest
    to it; the lowest score wins. It withstands f bad clients among n > 2f + 2.
    Ref: Blanchard et al., NeurIPS 2017 (arXiv 1703.02757).

    Args:
      num_byzantine: f >= 0.

    Raises:
      ValueError: for a negative f.

    >>> krum(1)(jnp.array([1.0, 1.5, 9.0, 0.9, 1.1]), jnp.ones(5)).item()
    1.0
    """
    return multi_krum(num_byzantine, 1)


def multi_krum(num_byzantine: int, num_kept: int) -> Rule:
    """Returns the rule that averages the `num_kept` uploads of the lowest score, see `krum`.

    Where fewer clients are there, all that are there are averaged.

    Args:
      num_byzantine: f >= 0.
      num_kept: m >= 1; the published guarantee asks for m <= n − f − 2.

    Raises:
      ValueError: for numbers out of range.

    >>> multi_krum(1, 3)(jnp.array([1.0, 1.5, 9.0, 0.5, 5.0]), jnp.ones(5)).item()
    1.0
    """
    if num_byzantine < 0:
        raise ValueError(f"num_byzantine must be >= 0, got {num_byzantine}")
    if num_kept < 1:
        raise ValueError(f"num_kept must be >= 1, got {num_kept}")

    def rule(uploads: Upload, weights: Array) -> Broadcast:
        scores = krum_scores(_floating(uploads, weights), weights, num_byzantine)
        rank = jnp.argsort(jnp.argsort(scores, stable=True))
        return mean(uploads, ((rank < num_kept) & (weights > 0)).astype(jnp.float32))

    return rule


def krum_scores(uploads: Upload, weights: Array, num_byzantine: Array | int) -> Array:
    """Returns each upload's sum of squared distances to its n − f − 2 nearest, [C].

    At least one neighbour counts; absent clients have an infinite score. See `krum`.
    """
    size = len(weights)
    here = weights > 0
    cleared = present_only(uploads, weights)

    def distances(one: Upload) -> Array:
        return _squares(jax.tree.map(lambda u, x: u - x, cleared, one))

    squares = jax.lax.map(distances, cleared)
    others = here[None, :] & ~jnp.eye(size, dtype=bool)
    ordered = jnp.sort(jnp.where(others, squares, jnp.inf), axis=1)
    count = jnp.sum(here)
    neighbours = jnp.clip(count - num_byzantine - 2, 1, jnp.maximum(count - 1, 1))
    near = jnp.where(jnp.arange(size) < neighbours, ordered, 0.0)
    # One client alone has no neighbour.
    near = jnp.where(count > 1, near, 0.0)
    return jnp.where(here, jnp.sum(near, axis=1), jnp.inf)


def geometric_median(iterations: int = 10, smoothing: float = 1e-6) -> Rule:
    """Returns the rule that minimises Σ_i w_i ‖v − u_i‖ by the smoothed Weiszfeld algorithm.

    From the mean on, each iteration averages with the weights w_i / max(ν, ‖v − u_i‖).
    Ref: Pillutla, Kakade, Harchaoui, IEEE TSP 2022 (arXiv 1912.13445), Algorithm 2.

    Args:
      iterations: >= 1.
      smoothing: ν > 0, in units of the upload.

    Raises:
      ValueError: for numbers out of range.

    >>> geometric_median(100)(jnp.array([0.0, 1.0, 100.0]), jnp.ones(3)).round(3).item()
    1.0
    """
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing must be positive and finite, got {smoothing}")

    def rule(uploads: Upload, weights: Array) -> Broadcast:
        cleared = present_only(_floating(uploads, weights), weights)

        def closer(_: Array, center: Broadcast) -> Broadcast:
            apart = _squares(jax.tree.map(lambda u, v: u - v, cleared, center))
            return mean(cleared, weights / jnp.maximum(jnp.sqrt(apart), smoothing))

        return jax.lax.fori_loop(0, iterations, closer, mean(cleared, weights))

    return rule


def clipped_mean(norm: float) -> Rule:
    """Returns the rule that scales each upload down to a norm and averages.

    Ref: Sun et al. 2019 (arXiv 1911.07963), "norm thresholding".

    Args:
      norm: the largest norm of an upload, over all its leaves; positive.

    Raises:
      ValueError: for a norm that is not positive and finite.

    >>> clipped_mean(2.0)(jnp.array([1.0, -8.0]), jnp.ones(2)).item()
    -0.5
    """
    if not 0 < norm < math.inf:
        raise ValueError(f"the norm uploads are clipped to must be positive, got {norm}")

    def rule(uploads: Upload, weights: Array) -> Broadcast:
        cleared = present_only(_floating(uploads, weights), weights)
        return mean(jax.vmap(lambda upload: clip_norm(upload, norm))(cleared), weights)

    return rule


def majority_sign(size: float = 1.0) -> Rule:
    """Returns the rule that sends the sign most clients sent, number by number, times `size`.

    Weights are votes; zero where they are even. Ref: Bernstein et al., ICLR 2019
    (arXiv 1810.05291).

    Args:
      size: the magnitude of each number of the broadcast, positive.

    Raises:
      ValueError: for a size that is not positive and finite.

    >>> majority_sign(0.5)(jnp.array([-1.0, 7.0, 1e-3]), jnp.ones(3)).item()
    0.5
    """
    if not 0 < size < math.inf:
        raise ValueError(f"the size of a majority's sign must be positive, got {size}")

    def rule(uploads: Upload, weights: Array) -> Broadcast:
        def leaf(u: Array) -> Array:
            votes = jnp.tensordot(weights, jnp.sign(u).astype(weights.dtype), axes=1)
            return (jnp.sign(votes) * size).astype(u.dtype)

        return jax.tree.map(leaf, present_only(_floating(uploads, weights), weights))

    return rule


def clip_norm(tree: Any, norm: Array | float) -> Any:
    """Returns the tree scaled down to a norm over all its leaves, as it is if it is shorter.

    >>> clip_norm(jnp.array([3.0, 4.0]), 1.0).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    length = jnp.sqrt(_squares(jax.tree.map(lambda x: x[None], tree))[0])
    factor = jnp.where(length > norm, norm / length, 1.0)
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def present_only(uploads: Upload, weights: Array) -> Upload:
    """Returns the uploads with zeros in place of those of absent clients."""
    return jax.tree.map(lambda u: jnp.where(beside(weights > 0, u), u, jnp.zeros_like(u)), uploads)


def beside(mask: Array, u: Array) -> Array:
    """Returns a mask over clients [C] in a shape that goes with u [C, ...]: [C, 1, ...]."""
    return mask.reshape(-1, *(1,) * (u.ndim - 1))


def check_floating(uploads: Upload, need: str, remedy: str) -> Upload:
    """Returns the uploads.

    Raises:
      ValueError: "`need` of floating point numbers, got ...; `remedy`" for any others.
    """
    for leaf in jax.tree.leaves(uploads):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{need} of floating point numbers, got a leaf of {leaf.dtype}; {remedy}"
            )
    return uploads


def _squares(uploads: Upload) -> Array:
    """Returns the squared norm of each upload over all its leaves, [C]."""

    def leaf(u: Array) -> Array:
        wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        return jnp.sum(jnp.square(wide), axis=tuple(range(1, u.ndim)))

    return sum(jax.tree.leaves(jax.tree.map(leaf, uploads)), jnp.zeros(()))


def _sorted(u: Array, weights: Array) -> Array:
    """Returns the numbers of those who are there in ascending order, then infinities."""
    return jnp.sort(jnp.where(beside(weights > 0, u), u, jnp.inf), axis=0)


def _check_cohort(uploads: Upload, weights: Array) -> None:
    """A row for each client, a weight for each row: anything else is a mistake of a caller."""
    chex.assert_rank(weights, 1)
    chex.assert_tree_shape_prefix(uploads, weights.shape)


def _floating(uploads: Upload, weights: Array) -> Upload:
    _check_cohort(uploads, weights)
    return check_floating(
        uploads,
        "this rule needs uploads",
        "use the aggregation that the algorithm brings with it",
    )
