"""The means of what a model's matrices are multiplied with, and directions at right angles to them.

In a product X W, with m the mean row of X, a step along Z changes the mean of the outputs by mᵀ Z.
Where activations are positive, as pixels are and what a ReLU leaves, most of a loss's curvature
lies there, since all examples feel such a step alike, and little of its gradient: a bias makes the
same change. With

    Π = I − m mᵀ / ‖m‖²,    Z = Π U,    mᵀ Z = 0

directions leave the mean outputs as they are, and bear a larger step. Centred activations do the
same for gradients (Schraudolph 1998, "Centering neural network gradient factors").
"""

from typing import Any

import jax
import jax.numpy as jnp

from zofl_jax import keys, platforms
from zofl_jax.core import Array, Batch, LossFn, Params, PRNGKey
from zofl_jax.directions import structured, sums
from zofl_jax.directions.perturbations import Perturbation, is_stacked

Means = dict[str, Array]
"""By the path of a matrix the mean of its inputs, [stack..., in...]."""


def means(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Array, Means]:
    """Returns the loss, and the mean of what each matrix among the params is multiplied with.

    One forward pass. Matrices are those of `perturbations.low_rank`; a mean is over examples and
    positions, padding too, and float32 or wider. Those that no product X W is found of, such as
    tables that rows are looked up in, are left out.

    >>> f = lambda x, batch: jnp.sum(batch @ x["w"])
    >>> x, batch = {"w": jnp.ones((2, 3))}, jnp.array([[1.0, 0.0], [3.0, 4.0]])
    >>> loss, found = means(f, x, batch)
    >>> float(loss), found["w"].tolist()
    (24.0, [2.0, 2.0])
    """
    watch = sums.Watch()

    def watched(path: Any, x: Array) -> Any:
        name = keys.path_name(path)
        lead = int(is_stacked(name))
        if x.ndim - lead < 2:
            return x
        factors = (*x.shape[:-1], 1), (*x.shape[:lead], x.shape[-1], 1)
        a, b = (jnp.zeros(shape, x.dtype) for shape in factors)
        sides = sums.matrix_sides(x.ndim, stacked=bool(lead))
        return sums.LowRank(x, (sums.Term(a, b, jnp.zeros(1, x.dtype)),), sides, watch, name)

    # In the forms of accelerators, where convolutions are JAX's own: so the same matrices have
    # means everywhere, which are sent.
    with platforms.tracing(platforms.current()._replace(platform="gpu")):
        loss = structured.evaluate(loss_fn, jax.tree.map_with_path(watched, params), batch)
    return loss, {
        name: mean.astype(jnp.promote_types(mean.dtype, jnp.float32))
        for name, mean in sorted(watch.seen.items())
    }


def away(found: Means, tree: Params) -> Params:
    """Returns Π x of each matrix with a mean, and the other leaves as they are.

    Args:
      found: what `means` found for params of these paths.
      tree: like the params, of arrays or of directions that stand for them.

    >>> away({"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([[3.0], [1.0]])})["w"].tolist()
    [[1.0], [-1.0]]
    """

    def leaf(path: Any, x: Any) -> Any:
        name = keys.path_name(path)
        if name not in found:
            return x
        if isinstance(x, sums.Factors):
            return x.replace(a=_projected(found, name, x.a))
        return _projected(found, name, sums.as_array(x))

    return jax.tree.map_with_path(leaf, tree, is_leaf=sums.is_value)


def _projected(found: Means, name: str, x: Array) -> Array:
    """Returns Π x for x [stack..., in..., columns], of the matrix of this name."""
    mean = found[name].astype(x.dtype)[..., None]
    inputs = tuple(range(int(is_stacked(name)), mean.ndim - 1))
    square = jnp.sum(jnp.square(mean), inputs, keepdims=True)
    along = jnp.sum(mean * x, inputs, keepdims=True) / jnp.where(square > 0, square, 1)
    return x - mean * along


def orthogonal(perturbation: Perturbation, found: Means) -> Perturbation:
    """Returns the directions Π u of each matrix with a mean, and u of the other params.

    Where a mean is 0 the directions are u. Low-rank directions stay so, for Π acts on A; others
    of stacked layers are formed as a whole.

    Args:
      perturbation: how u is drawn, with E[u uᵀ] = I, so that E[z zᵀ] = Π.
      found: what `means` found for params of these paths.

    >>> from zofl_jax.directions.perturbations import gaussian
    >>> directions = orthogonal(gaussian(), {"w": jnp.array([1.0, 1.0])})
    >>> z = directions.sample(jax.random.key(0), {"w": jnp.zeros((2, 3))})["w"]
    >>> abs(z.sum(0)).round(5).tolist()
    [0.0, 0.0, 0.0]
    """

    def sample(key: PRNGKey, params: Params) -> Params:
        return away(found, perturbation.sample(key, params))

    def accumulate(direction_keys: PRNGKey, params: Params, scalars: Array) -> Params:
        return away(found, perturbation.accumulate(direction_keys, params, scalars))

    combine = perturbation.combine
    if combine is None:
        return Perturbation(sample, perturbation.add, accumulate)

    def last_away(path: Any, x: Any) -> Any:
        """Returns a model with Π in its last term, which is of the directions."""
        name = keys.path_name(path)
        if name not in found:
            return x
        *before, last = x.terms
        return x.replace(terms=(*before, last.replace(a=_projected(found, name, last.a))))

    def combined(params: Params, direction_keys: PRNGKey, scalars: Params) -> Params:
        return jax.tree.map_with_path(
            last_away, combine(params, direction_keys, scalars), is_leaf=sums.is_value
        )

    return Perturbation(sample, perturbation.add, accumulate, combined)
