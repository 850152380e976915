"""Random directions z with E[z zᵀ] = I, drawn from a key and never stored.

A `Perturbation` says how a direction is drawn, added to params and summed. Every leaf
draws from a key of its own path (`keys.leaf_keys`), so freezing, adding or resharding
other leaves changes nothing.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofl_jax import keys, platforms
from zofl_jax.core import Array, Params, PRNGKey
from zofl_jax.directions import generators, sums

Draw = Callable[[PRNGKey, tuple[int, ...], Any], Array]
"""(key, shape, dtype) -> an array of independent numbers."""


class Perturbation(NamedTuple):
    """A distribution of directions over the params.

    Attributes:
      sample: (key, params) -> a direction z for params of this structure. Its leaves are
        arrays or stand for them (`sums.arrays`): a stack of layers is drawn where it is used.
      add: (params, z, scale) -> params + scale · z, for `structured.evaluate`: leaves may
        stand for arrays, before and after.
      accumulate: (keys [P], params, scalars [P]) -> Σ_p scalars[p] · z_p, a tree of arrays like
        params; the directions are drawn anew.
      combine: (params, keys [P], scalars) -> params + Σ_p scalars[p] · z_p, for
        `structured.evaluate`, with scalars a tree like params of arrays [P]; None where that
        has to be formed.
    """

    sample: Callable[[PRNGKey, Params], Params]
    add: Callable[[Params, Params, Array | float], Params]
    accumulate: Callable[[PRNGKey, Params, Array], Params]
    combine: Callable[[Params, PRNGKey, Params], Params] | None = None


def gaussian() -> Perturbation:
    """Returns directions z ~ N(0, I), as in Nesterov & Spokoiny 2017 and DeComFL.

    >>> z = gaussian().sample(jax.random.key(0), {"w": jnp.zeros((2, 3))})
    >>> z["w"].shape
    (2, 3)
    """
    return _independent(generators.normal)


def rademacher() -> Perturbation:
    """Returns directions of independent signs, z_i = ±1 (Spall 1992).

    32 signs come from each random word, so they are the cheapest directions, and they
    are the same to the bit on every backend.

    >>> z = rademacher().sample(jax.random.key(0), {"w": jnp.zeros(100)})
    >>> float(jnp.abs(z["w"]).min()), float(jnp.abs(z["w"]).max())
    (1.0, 1.0)
    """
    return _independent(generators.signs)


def sphere() -> Perturbation:
    """Returns directions uniform on the sphere of radius √d over all d params together.

    Ref: Flaxman et al. 2005, scaled so that E[z zᵀ] = I. The radius is a sum over all params,
    so directions compiled in different ways may differ by rounding.

    >>> z = sphere().sample(jax.random.key(0), {"w": jnp.zeros(100)})
    >>> round(float(jnp.linalg.norm(z["w"])), 4)
    10.0
    """

    def sample(key: PRNGKey, params: Params) -> Params:
        normal = _sample_leaves(key, params, draw=generators.normal)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        square = sum(jnp.sum(jnp.square(_widen(leaf))) for leaf in jax.tree.leaves(normal))
        factor = math.sqrt(size) / jnp.sqrt(square)
        return jax.tree.map(lambda leaf: (factor * _widen(leaf)).astype(leaf.dtype), normal)

    return _dense(sample)


def low_rank(rank: int = 1) -> Perturbation:
    """Returns directions Z = A Bᵀ / √r for each matrix, A and B standard normal.

    E[z zᵀ] = I as for dense directions, at the cost of r (in + out) normals for in · out params,
    and x (W + μ Z) = x W + μ (x A) Bᵀ / √r needs no perturbed matrix (`structured.py`). Matrices
    are the leaves of two and more axes but the layers': [..., in, out], a convolution's kernel as
    [h · w · C, features]. Vectors have dense normal directions.

    Args:
      rank: r >= 1.

    Raises:
      ValueError: if `rank` < 1.

    Ref: Chen et al. 2024 (LOZO, arXiv 2410.07698); Sarkar et al. 2025 (EGGROLL, 2511.16652).

    >>> from zofl_jax.directions import sums
    >>> z = sums.arrays(low_rank().sample(jax.random.key(0), {"w": jnp.zeros((4, 3))}))
    >>> int(jnp.linalg.matrix_rank(z["w"]))
    1
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")

    def sample(key: PRNGKey, params: Params) -> Params:
        return _map_leaves(functools.partial(_draw_factors, rank), key, params)

    def combine(params: Params, direction_keys: PRNGKey, scalars: Params) -> Params:
        directions = draw_all(sample, direction_keys, params)
        return jax.tree.map(_plus_many, params, directions, scalars, is_leaf=sums.is_value)

    return _factored(sample, combine)


class Basis(NamedTuple):
    """Orthonormal columns on both sides of a matrix."""

    left: Array  # U, [stack..., in..., r]
    right: Array  # V, [stack..., out, r]


def bases(key: PRNGKey, params: Params, rank: int) -> dict[str, Basis]:
    """Returns random orthonormal bases U, V of each matrix among the params, by path.

    They have `rank` columns, or as many as a side is long where it is shorter. Matrices are those
    of `low_rank`.

    Raises:
      ValueError: if `rank` < 1.

    >>> basis = bases(jax.random.key(0), {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}, 2)["w"]
    >>> abs(basis.left.T @ basis.left).round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    found: dict[str, Basis] = {}

    def leaf(leaf_key: PRNGKey, path: str, x: Array) -> None:
        lead = int(is_stacked(path))
        if len(x.shape) - lead < 2:
            return
        wide, stack = jnp.promote_types(x.dtype, jnp.float32), x.shape[:lead]

        def side(i: int, axes: tuple[int, ...]) -> Array:
            size = math.prod(axes)
            shape = (*stack, size, min(rank, size))
            normal = generators.normal(keys.block_key(leaf_key, i), shape, wide)
            return jnp.linalg.qr(normal)[0].reshape(*stack, *axes, -1).astype(x.dtype)

        found[path] = Basis(side(0, x.shape[lead:-1]), side(1, x.shape[-1:]))

    _map_leaves(leaf, key, params)
    return found


def subspace(found: Mapping[str, Basis]) -> Perturbation:
    """Returns directions Z = √(m n) / r · U G Vᵀ for each matrix [m, n], G [r, r] standard normal.

    U and V, m x r and n x r, are given and don't change with the key, so all directions of a matrix
    lie in r² dimensions. With Π the projection on them E[z zᵀ] = (m n / r²) Π, so the mean
    estimate of a gradient g is (m n / r²) Π g. Over random bases that is g, and E[z zᵀ] = I as for
    other directions. A sum of P directions is one of r columns, at the cost of P r² normals, and
    x (W + μ Z) needs no perturbed matrix. Vectors have dense normal directions.

    Args:
      found: what `bases` found for these params.

    Ref: Yu et al. 2024 (SubZero, arXiv 2410.08989) and Chen et al. 2024 (LOZO, 2410.07698), whose
    directions are shorter, so that their rates are m n / r² times ours.

    >>> x = {"w": jnp.zeros((4, 3))}
    >>> perturbation = subspace(bases(jax.random.key(0), x, 1))
    >>> z = [sums.arrays(perturbation.sample(jax.random.key(i), x))["w"] for i in (1, 2)]
    >>> int(jnp.linalg.matrix_rank(jnp.stack(z).reshape(2, -1)))
    1
    """

    def small(key: PRNGKey, path: str, x: Any) -> Array:
        """Returns G times its factor, [stack..., r, r]; of a vector its whole direction."""
        lead = int(is_stacked(path))
        if path not in found:
            return sums.Seeded(key, generators.normal, x.shape, x.dtype, bool(lead)).array()
        left, right = found[path].left.shape[-1], found[path].right.shape[-1]
        factor = math.sqrt(math.prod(x.shape[lead:]) / (left * right))
        normal = generators.normal(key, (*x.shape[:lead], left, right), x.dtype)
        return normal * jnp.asarray(factor, x.dtype)

    def widened(path: str, x: Any, g: Array) -> Any:
        """Returns the direction that G stands for, A Bᵀ / √r with A = √r U G."""
        if path not in found:
            return g
        basis, lead = found[path], int(is_stacked(path))
        columns = g * jnp.asarray(math.sqrt(g.shape[-1]), g.dtype)
        middle = (1,) * (len(x.shape) - 2 - lead)
        a = jnp.matmul(basis.left, columns.reshape(*g.shape[:lead], *middle, *g.shape[lead:]))
        return sums.Factors(a, basis.right, sums.matrix_sides(len(x.shape), stacked=bool(lead)))

    def by_path(fn: Callable[..., Any], params: Params, *others: Params) -> Params:
        return jax.tree.map_with_path(
            lambda path, x, *rest: fn(keys.path_name(path), x, *rest),
            sums.shapes(params),
            *others,
        )

    def sample(key: PRNGKey, params: Params) -> Params:
        return by_path(widened, params, _map_leaves(small, key, params))

    def combine(params: Params, direction_keys: PRNGKey, scalars: Params) -> Params:
        shapes = sums.shapes(params)
        drawn = jax.lax.map(lambda key: _map_leaves(small, key, shapes), direction_keys)
        total = jax.tree.map(lambda g, s: jnp.tensordot(s.astype(g.dtype), g, 1), drawn, scalars)
        return _add(params, by_path(widened, params, total), 1.0)

    return _factored(sample, combine)


def _independent(draw: Draw) -> Perturbation:
    """Returns the perturbation whose directions have independent entries."""

    def seeded(leaf_key: PRNGKey, path: str, x: Array) -> Any:
        direction = sums.Seeded(leaf_key, draw, x.shape, x.dtype, is_stacked(path))
        # Without layers there is nothing to gain by drawing it later.
        return direction if direction.stacked else direction.array()

    def sample(key: PRNGKey, params: Params) -> Params:
        return _map_leaves(seeded, key, params)

    def accumulate(direction_keys: PRNGKey, params: Params, scalars: Array) -> Params:
        # By leaf and by block, so that the sum of a block stays in cache.
        def leaf(leaf_keys: PRNGKey, path: str, x: Array) -> Array:
            def block(block_keys: PRNGKey, shape: tuple[int, ...]) -> Array:
                def add_direction(total: Array, key_and_scalar: tuple[PRNGKey, Array]) -> tuple:
                    key, scalar = key_and_scalar
                    return total + jnp.asarray(scalar, x.dtype) * draw(key, shape, x.dtype), None

                if not platforms.current().cached:
                    # As one sum over generated numbers, which is a kernel without memory.
                    drawn = jax.vmap(lambda key: draw(key, shape, x.dtype))(block_keys)
                    beside = scalars.reshape(-1, *[1] * len(shape)).astype(x.dtype)
                    return jnp.sum(beside * drawn, axis=0)
                zeros = jnp.zeros(shape, x.dtype)
                return jax.lax.scan(add_direction, zeros, (block_keys, scalars))[0]

            return sums.in_blocks(block, leaf_keys, x.shape, is_stacked(path))

        derive = jax.vmap(keys.leaf_keys, in_axes=(0, None))
        return _map_leaves(leaf, direction_keys, params, derive)

    return Perturbation(sample, _add, accumulate)


def _factored(
    sample: Callable[[PRNGKey, Params], Params],
    combine: Callable[[Params, PRNGKey, Params], Params],
) -> Perturbation:
    """Returns the perturbation whose directions are factors, and their sums too."""

    def accumulate(direction_keys: PRNGKey, params: Params, scalars: Array) -> Params:
        same = jax.tree.map(lambda _: scalars, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return sums.arrays(combine(zeros, direction_keys, same))

    return Perturbation(sample, _add, accumulate, combine)


def _dense(sample: Callable[[PRNGKey, Params], Params]) -> Perturbation:
    """Returns the perturbation whose directions are trees of arrays like the params."""

    def accumulate(direction_keys: PRNGKey, params: Params, scalars: Array) -> Params:
        def add_direction(total: Params, key_and_scalar: tuple[PRNGKey, Array]) -> tuple:
            key, scalar = key_and_scalar
            return _add(total, sample(key, params), scalar), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add_direction, zeros, (direction_keys, scalars))[0]

    return Perturbation(sample, _add, accumulate)


def draw_all(
    sample: Callable[[PRNGKey, Params], Params], direction_keys: PRNGKey, params: Params
) -> Params:
    """Returns several directions, each leaf with a leading axis [P].

    They are drawn in a loop, whose results are stored. Otherwise the numbers of threefry4x32 may be
    fused into what takes them and drawn again for each entry of a matrix: 20 times the time.
    """
    shapes = sums.shapes(params)
    return jax.lax.map(lambda key: sample(key, shapes), direction_keys)


def is_stacked(path: str) -> bool:
    """Returns whether the first axis of a leaf is one of layers: its path names "layers".

    >>> is_stacked("layers/mlp/up/kernel"), is_stacked("Dense_0/kernel")
    (True, False)
    """
    return "layers" in path.split("/")


def _add(params: Params, direction: Params, scale: Array | float) -> Params:
    plus = functools.partial(_plus, scale=scale)
    return jax.tree.map(plus, params, direction, is_leaf=sums.is_value)


def _plus(x: Any, z: Any, scale: Array | float) -> Any:
    if isinstance(z, sums.Factors):
        return z.plus(x, scale)
    if isinstance(z, sums.Seeded):
        return sums.Drawn(x, z, jnp.asarray(scale))
    return x + jnp.asarray(scale, x.dtype) * z


def _plus_many(x: Any, z: Any, scalars: Array) -> Any:
    """Returns x + Σ_p scalars[p] z[p], z with a leading axis of directions [P]."""
    if not isinstance(z, sums.Factors):
        return x + jnp.tensordot(scalars.astype(x.dtype), z, axes=1)
    rank = z.a.shape[-1]
    # The directions' columns side by side.
    a, b = (jnp.moveaxis(f, 0, -2).reshape(*f.shape[1:-1], -1) for f in (z.a, z.b))
    scales = jnp.repeat(scalars / math.sqrt(rank), rank)
    return z.replace(a=a, b=b).combined(x, scales)


def _draw_factors(rank: int, leaf_key: PRNGKey, path: str, x: Array) -> Any:
    lead = int(is_stacked(path))
    if len(x.shape) - lead < 2:
        return sums.Seeded(leaf_key, generators.normal, x.shape, x.dtype, bool(lead)).array()
    sides: tuple[sums.Side, ...] = sums.matrix_sides(len(x.shape), stacked=bool(lead))
    shapes = ((*x.shape[:-1], rank), (*x.shape[:lead], x.shape[-1], rank))
    a, b = (
        sums.Seeded(
            keys.block_key(leaf_key, i), generators.normal, shape, x.dtype, bool(lead)
        ).array()
        for i, shape in enumerate(shapes)
    )
    return sums.Factors(a, b, sides)


def _sample_leaves(key: PRNGKey, params: Params, draw: Draw) -> Params:
    return _map_leaves(lambda leaf_key, path, x: draw(leaf_key, x.shape, x.dtype), key, params)


def _map_leaves(
    fn: Callable[[PRNGKey, str, Array], Any],
    key: PRNGKey,
    params: Params,
    derive: Callable[[PRNGKey, Params], Params] = keys.leaf_keys,
) -> Params:
    """Returns a tree of fn(keys of the leaf, its path, the leaf)."""

    def leaf(path: tuple[Any, ...], x: Array, leaf_key: PRNGKey) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"params must be real floating point to be perturbed, got a leaf of {x.dtype} "
                f"and shape {x.shape}; keep it outside the trained params"
            )
        return fn(leaf_key, keys.path_name(path), x)

    params = sums.shapes(params)
    return jax.tree.map_with_path(leaf, params, derive(key, params))


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
