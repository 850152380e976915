"""Functions of sums that are not formed: the right values, and no perturbed matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import shapes_in

from zofl_jax import keys
from zofl_jax.directions import generators, perturbations, structured, sums
from zofl_jax.models import cnn

KEY = keys.round_key(keys.root(11).shared, 0)
IN, OUT, LAYERS = 6, 5, 3


def params(dtype=np.float64) -> dict:
    random = np.random.default_rng(0)
    shapes = {
        "dense": (IN, OUT),
        "bias": (OUT,),
        "layers": {"kernel": (LAYERS, IN, IN), "scale": (LAYERS, IN)},
        "table": (9, IN),
        "conv": (3, 3, 2, 4),
        "few": (3, 3, 2, 4),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def stack(x, a):
    """Layers with a constant of the carry's shape, which must not be taken for the carry."""

    def layer(b, weights):
        return jnp.tanh(b @ weights["kernel"] + a) * weights["scale"], None

    return jax.lax.scan(layer, 2 * a, x["layers"])[0]


def conditional(x, a):
    return jax.lax.cond(a[0, 0] > 100, lambda: a @ x["dense"], lambda: 2 * a @ x["dense"])


def loop(x, a):
    return jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ x["layers"]["kernel"][1])), (0, a)
    )[1]


def images(a):
    return jnp.broadcast_to(a[:, 0, None, None, None], (4, 5, 5, 2))


A = np.random.default_rng(1).normal(size=(4, IN))
IDS = np.array([[0, 3, 8], [1, 1, 2]])
FUNCTIONS = {
    "product": lambda x, a: a @ x["dense"] + x["bias"],
    "from the left": lambda x, a: x["dense"].T @ a.T,
    "left operand": lambda x, a: jnp.einsum("io,bi->ob", x["dense"], a),
    "against the rows": lambda x, a: jnp.einsum("bi,vi->bv", a, x["table"]),
    "some rows": lambda x, a: a @ x["table"][jnp.array([2, 7])].T,
    "look-up": lambda x, a: x["table"][IDS],
    "tied": lambda x, a: x["table"][IDS] @ x["table"].T,
    "stack": stack,
    "conditional": conditional,
    "loop": loop,
    "jit": lambda x, a: jax.jit(lambda w: a @ w)(x["dense"]),
    "checkpoint": lambda x, a: jax.checkpoint(lambda w: a @ w)(x["dense"]),
    "convolution": lambda x, a: cnn._as_convolution(images(a), x["conv"], "SAME"),
    "few channels": lambda x, a: cnn.convolve(images(a), x["few"], "VALID"),
    "no rule": lambda x, a: jnp.sort(x["dense"], axis=0) * x["dense"] + jnp.sum(x["dense"]),
    "reshaped": lambda x, a: a @ x["dense"].reshape(2, 3, OUT).reshape(IN, OUT),
    "mixed": lambda x, a: x["dense"].reshape(-1) + x["table"].reshape(3, 18).sum(),
    "rounded": lambda x, a: (a.astype(jnp.float32) @ x["dense"].astype(jnp.float32)).sum(0),
    "returned": lambda x, a: x["dense"],
}


@pytest.mark.parametrize("rank", [1, 3])
def test_inner_products_with_factors_are_those_with_their_arrays(x64, rank):
    directions = jax.jit(perturbations.low_rank(rank).sample)(KEY, params())
    for x, z in zip(
        jax.tree.leaves(params()), jax.tree.leaves(directions, is_leaf=sums.is_value), strict=True
    ):
        if isinstance(z, sums.Factors):
            np.testing.assert_allclose(z.inner(x), jnp.sum(x * z.array()), rtol=1e-10)


@functools.cache
def low_rank_sums(rank: int) -> tuple:
    """Returns params + 4 directions of one client, of two clients, and the axes of the two.

    The clients share params, factors and the last term; the coefficients of the first are each
    one's own, as are leaves that have no factors.
    """
    x, directions = params(), perturbations.low_rank(rank)
    several = keys.direction_keys(KEY, 3)

    def near(c):
        combined = directions.combine(x, several, jax.tree.map(lambda _: c, x))
        return directions.add(combined, directions.sample(KEY, x), 0.2)

    def axes_of(value):
        if not isinstance(value, sums.LowRank):
            return 0
        shared = sums.Term(None, None, None)
        return value.replace(base=None, terms=(shared.replace(c=0), shared))

    one = jax.jit(near)(jnp.array([0.1, 0.0, -0.3]))
    axes = jax.tree.map(axes_of, one, is_leaf=sums.is_value)
    two = jax.tree.map(
        lambda axis, v: v if axis is None else jnp.stack([v, 2 * v]),
        axes,
        one,
        is_leaf=lambda v: v is None,
    )
    return one, two, axes


@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_rank_sums_act_as_their_arrays(x64, name, rank):
    """Narrow and wide terms; alone, and with clients' own coefficients on shared directions.

    Convolutions, whose form hangs on the width, have all four pairs. Any other function has both
    widths and both ways, and which are together alternates from one to the next: the ways differ in
    `vmap` alone.
    """
    fn, (one, many, axes) = FUNCTIONS[name], low_rank_sums(rank)
    all_pairs = name in ("convolution", "few channels")
    is_even = list(FUNCTIONS).index(name) % 2 == 0

    def both(near):
        return structured.evaluate(fn, near, A), fn(sums.arrays(near), A)

    tolerance = 1e-5 if name == "rounded" else 1e-12
    if all_pairs or (rank == 1) == is_even:
        (found, expected), plain = jax.jit(lambda near, x: (both(near), fn(x, A)))(one, params())
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
        assert np.abs(np.asarray(expected) - np.asarray(plain)).max() > 1e-3, "it changes something"
    if all_pairs or (rank == 1) != is_even:
        found, expected = jax.jit(jax.vmap(both, in_axes=(axes,)))(many)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["stack", "product", "loop", "returned"])
@pytest.mark.parametrize("make", [perturbations.gaussian, perturbations.rademacher])
def test_drawn_sums_act_as_their_arrays(make, name):
    fn, directions = FUNCTIONS[name], make()

    @jax.jit
    def both(x, a):
        near = directions.add(x, directions.sample(KEY, x), 0.2)
        assert isinstance(near["layers"]["kernel"], sums.Drawn)
        return structured.evaluate(fn, near, a), fn(sums.arrays(near), a)

    found, expected = both(params(np.float32), A.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_no_perturbed_matrix_is_formed():
    x = {"kernel": jnp.zeros((40, 30)), "layers": {"kernel": jnp.zeros((7, 40, 40))}}
    directions = perturbations.low_rank(2)

    def fn(x, a):
        return jax.lax.scan(lambda a, w: (a @ w, None), a, x["layers"]["kernel"])[0] @ x["kernel"]

    def loss(a):
        return structured.evaluate(fn, directions.add(x, directions.sample(KEY, x), 0.1), a)

    made = shapes_in(jax.make_jaxpr(loss)(jnp.zeros((3, 40))).jaxpr)
    assert (3, 30) in made
    assert not made & {(40, 30), (40, 40), (7, 40, 40)}

    def dense(a):
        return fn(sums.arrays(directions.add(x, directions.sample(KEY, x), 0.1)), a)

    assert {(40, 30), (7, 40, 40)} <= shapes_in(jax.make_jaxpr(dense)(jnp.zeros((3, 40))).jaxpr)


def test_only_one_layer_of_a_dense_perturbation_is_alive():
    """[7, 200, 200] params are never drawn or added as a whole, nor summed up as directions."""
    x = {"layers": {"kernel": jnp.zeros((7, 200, 200))}}
    directions = perturbations.gaussian()

    def fn(x, a):
        return jax.lax.scan(lambda a, w: (a @ w, None), a, x["layers"]["kernel"])[0]

    def loss(a):
        return structured.evaluate(fn, directions.add(x, directions.sample(KEY, x), 0.1), a)

    made = shapes_in(jax.make_jaxpr(loss)(jnp.zeros((3, 200))).jaxpr)
    assert (200, 200) in made
    assert (7, 200, 200) not in made


def test_a_large_leaf_is_drawn_in_blocks(monkeypatch):
    """The blocks change with `BLOCK`; what a block holds depends on its key alone."""
    monkeypatch.setattr(sums, "BLOCK", 8)
    x = {"w": jnp.zeros((6, 4)), "layers": {"w": jnp.zeros((2, 6, 4))}}
    sample = jax.jit(lambda key: sums.arrays(perturbations.rademacher().sample(key, x)))
    z, leaf_keys = sample(KEY), keys.leaf_keys(KEY, x)

    def blocks(key):
        return [generators.signs(keys.block_key(key, i), (2, 4), jnp.float32) for i in range(3)]

    np.testing.assert_array_equal(z["w"], jnp.concatenate(blocks(leaf_keys["w"])))
    layers = [keys.block_key(leaf_keys["layers"]["w"], i) for i in range(2)]
    expected = jnp.stack([jnp.concatenate(blocks(key)) for key in layers])
    np.testing.assert_array_equal(z["layers"]["w"], expected)
    scalars = jnp.array([0.5, -2.0])
    several = keys.direction_keys(KEY, 2)
    accumulate = jax.jit(lambda *given: perturbations.rademacher().accumulate(*given))
    total = accumulate(several, x, scalars)
    each = [jax.tree.map(np.asarray, sample(key)) for key in several]
    expected = jax.tree.map(lambda a, b: 0.5 * a - 2 * b, *each)
    for found, right in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((2, 3, 4, 5), (24, 5), ("left", "right")),
        ((24, 5), (2, 3, 4, 5), ("left", "left", "left", "right")),
        ((4, 6), (24,), None),
        ((4, 6), (2, 12), None),
        ((4, 6), (4, 1, 6), "any"),
    ],
)
def test_sides_of_a_reshaped_matrix(old, new, expected):
    sides = sums.matrix_sides(len(old), stacked=False)
    found = structured._reshaped_sides(old, sides, new)
    if expected == "any":
        assert found is None or (found[0] == "left" and found[-1] == "right")
    else:
        assert found == expected
