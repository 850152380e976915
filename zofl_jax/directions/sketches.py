"""A change of the params as P numbers: its inner products with directions that everyone can draw.

    s = Vᵀ x / √P,   x̂ = f V s / √P,   V = [z_1 ... z_P], E[z zᵀ] = I

With f = 1 the mean of x̂ is x. For Gaussian directions in d dimensions

    E ‖x̂ − x‖² = ((1 − f)² + f² (d + 1) / P) ‖x‖²,

d / P about at f = 1, and least at f = P / (P + d + 1), where it is (d + 1) / (P + d + 1), less than
1 for every P. Of signs and of the sphere d + 1 is d − 1 in these, of a matrix of low rank k
d − 1 + 2 (in + out + k + 1) / k. E ‖s‖² = ‖x‖², so sketches are as far from each other as what
they are of: norms, distances and clipping mean the same.

But what counts of a step is the loss behind it. Where its Hessian has the trace t and the curvature
h along x, and x is as long as pays, the mean loss is least at f = P / (P + 1 + t / h). So the
effective rank r = t / h stands in for d, and is far smaller:

    f = P / (P + ρ (d + 1)),   ρ = min(1, r / d),

without bias at r = 0, and closest to x from r = d on.

By block, each leaf and each layer of a stack has directions of its own, in proportion to its share
of the params: P d_b / d of d_b numbers each. The error is the same, and of the P d random numbers a
share Σ_b (d_b / d)² is drawn.
Ref: Johnson & Lindenstrauss 1984; by block Shu et al. 2025 (arXiv 2409.06277), section 3.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofl_jax import keys
from zofl_jax.core import Array, Params, PRNGKey
from zofl_jax.directions import sums
from zofl_jax.directions.estimators import inner
from zofl_jax.directions.perturbations import Perturbation, is_stacked

TOGETHER = 64
"""How many directions are summed at once where the factors of all would be held in memory."""


class Sketch(NamedTuple):
    """A way to write a tree like the params as P numbers, and to read them.

    Attributes:
      measure: (key, x) -> s [P].
      expand: (key, params, s) -> x̂, a tree like params; linear in s.
    """

    measure: Callable[[PRNGKey, Params], Array]
    expand: Callable[[PRNGKey, Params, Array], Params]


class _Block(NamedTuple):
    """What has directions of its own: a leaf, or each layer of one."""

    layers: int  # 0 if it is not a stack
    like: jax.ShapeDtypeStruct  # a layer
    num_directions: int  # of each layer

    @property
    def size(self) -> int:
        """How many numbers of a sketch are its own."""
        return max(self.layers, 1) * self.num_directions


def sketch(
    count: int, perturbation: Perturbation, *, by_block: bool = True, rank: float = math.inf
) -> Sketch:
    """Returns the sketch along random directions.

    Args:
      count: P >= 1. By block each has its share, rounded, and one at least; so a sketch holds about
        P numbers, and never fewer than there are blocks.
      perturbation: the directions.
      by_block: whether each leaf and layer has directions of its own.
      rank: r >= 0 of f, in which P and d are those of the block, and ρ is that of all.

    Raises:
      ValueError: for numbers out of range.

    >>> from zofl_jax.directions.perturbations import gaussian
    >>> made, x = sketch(6, gaussian()), {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}
    >>> made.measure(jax.random.key(0), x).shape  # 4.5 and 1.5 of them
    (6,)
    """
    if count < 1:
        raise ValueError(f"num_perturbations must be >= 1, got {count}")
    if not rank >= 0:
        raise ValueError(f"rank must be >= 0, got {rank}")

    def measure_part(key: PRNGKey, own_count: int, x: Params) -> Array:
        def along(direction_key: PRNGKey) -> Array:
            return inner(x, perturbation.sample(direction_key, x))

        return jax.lax.map(along, keys.direction_keys(key, own_count)) / math.sqrt(own_count)

    def expand_part(key: PRNGKey, like: Params, scalars: Array, rho: float) -> Params:
        own_count = scalars.size
        factor = own_count / (own_count + rho * (_size(like) + 1))
        scaled = factor / math.sqrt(own_count) * scalars
        return _accumulated(perturbation, keys.direction_keys(key, scalars.size), like, scaled)

    def measure_block(key: PRNGKey, block: _Block, x: Array) -> Array:
        if not block.layers:
            return measure_part(key, block.num_directions, {"block": x})

        def layer(part: tuple[Array, Array]) -> Array:
            own_key = keys.block_key(key, part[0])
            return measure_part(own_key, block.num_directions, {"block": part[1]})

        return jax.lax.map(layer, (_layers(block), x)).reshape(-1)

    def expand_block(key: PRNGKey, block: _Block, scalars: Array, rho: float) -> Array:
        like = {"block": block.like}
        if not block.layers:
            return expand_part(key, like, scalars, rho)["block"]

        def layer(part: tuple[Array, Array]) -> Array:
            return expand_part(keys.block_key(key, part[0]), like, part[1], rho)["block"]

        return jax.lax.map(
            layer, (_layers(block), scalars.reshape(block.layers, block.num_directions))
        )

    def measure(key: PRNGKey, x: Params) -> Array:
        if not by_block:
            return measure_part(key, count, x)
        leaf_keys = jax.tree.leaves(keys.leaf_keys(key, x))
        blocks = jax.tree.leaves(_blocks(count, x), is_leaf=_is_block)
        parts = map(measure_block, leaf_keys, blocks, jax.tree.leaves(x))
        return jnp.concatenate(list(parts))

    def expand(key: PRNGKey, params: Params, scalars: Array) -> Params:
        like = sums.shapes(params)
        rho = min(1.0, rank / _size(like))
        if not by_block:
            return expand_part(key, like, scalars, rho)
        leaf_keys = jax.tree.leaves(keys.leaf_keys(key, like))
        blocks, treedef = jax.tree.flatten(_blocks(count, like), is_leaf=_is_block)
        made, at = [], 0
        for leaf_key, block in zip(leaf_keys, blocks, strict=True):
            made.append(expand_block(leaf_key, block, scalars[at : at + block.size], rho))
            at += block.size
        return jax.tree.unflatten(treedef, made)

    return Sketch(measure, expand)


def _blocks(count: int, params: Params) -> Params:
    """Returns a tree like params of blocks."""
    total = _size(params)

    def block(path: tuple[Any, ...], x: Array) -> _Block:
        stacked = is_stacked(keys.path_name(path))
        shape = x.shape[1:] if stacked else x.shape
        own_count = max(1, round(count * math.prod(shape) / total))
        like = jax.ShapeDtypeStruct(shape, x.dtype)
        return _Block(x.shape[0] if stacked else 0, like, own_count)

    return jax.tree.map_with_path(block, params)


def _accumulated(
    perturbation: Perturbation, direction_keys: PRNGKey, like: Params, scalars: Array
) -> Params:
    """Returns Σ_p scalars[p] z_p; directions of which each is held are summed in groups."""
    count = scalars.size
    if perturbation.combine is None or count <= TOGETHER:
        return perturbation.accumulate(direction_keys, like, scalars)
    groups = math.ceil(count / TOGETHER)
    index = jnp.arange(groups * TOGETHER)
    shares = jnp.where(index < count, scalars[jnp.minimum(index, count - 1)], 0)
    chosen = direction_keys[jnp.minimum(index, count - 1)]

    def add(total: Params, group: tuple[PRNGKey, Array]) -> tuple[Params, None]:
        part = perturbation.accumulate(group[0], like, group[1])
        return jax.tree.map(jnp.add, total, part), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    grouped = chosen.reshape(groups, TOGETHER), shares.reshape(groups, TOGETHER)
    return jax.lax.scan(add, zeros, grouped)[0]


def _size(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _layers(block: _Block) -> Array:
    return jnp.arange(block.layers, dtype=jnp.uint32)


def _is_block(x: Any) -> bool:
    return isinstance(x, _Block)
