"""The convolution primitive against XLA's own, derivatives and vmaps included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax.models import cnn, convolution

MARGINS = ((1, 2), (0, 1))
SHAPES = (3, 6, 7, 2), (3, 2, 2, 4)  # images, kernel


def ours(x, kernel):
    return convolution.convolution(x, kernel, MARGINS)


def theirs(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), MARGINS, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def derivatives(convolve):
    """Returns a function with its tangent, its cotangents and a second derivative."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel)))

    def compute(x, kernel, dx, dkernel):
        _, tangent = jax.jvp(convolve, (x, kernel), (dx, dkernel))
        gradient = jax.grad(loss, (0, 1))
        cotangents, second = jax.jvp(gradient, (x, kernel), (dx, dkernel))
        return convolve(x, kernel), tangent, cotangents, second

    return compute


@pytest.mark.parametrize(
    "axes",
    [
        None,
        (0, None, None, None),
        (None, 0, None, 0),
        (0, 0, 0, 0),
        (0, None, None, 0),
        (1, 3, 0, 0),
    ],
    ids=["alone", "images", "kernels", "both", "images and tangents", "other axes"],
)
def test_it_and_its_derivatives_are_those_of_xla(x64, axes):
    shapes = [*SHAPES, *SHAPES]
    args = [normal(i, shape) for i, shape in enumerate(shapes)]
    functions = [derivatives(ours), derivatives(theirs)]
    if axes is not None:
        for i, axis in enumerate(axes):
            if axis is not None:
                args[i] = jnp.stack([args[i], -2 * args[i], args[i] + 1], axis)
        functions = [jax.vmap(f, in_axes=axes) for f in functions]
    found, expected = (jax.jit(f)(*args) for f in functions)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected
    )


def test_kernels_of_clients_make_no_grouped_convolution():
    """Which would take ten times as long."""
    if jax.default_backend() != "cpu":
        pytest.skip("accelerators use XLA's own rules")
    images, kernels = jnp.zeros((5, *SHAPES[0])), jnp.zeros((5, *SHAPES[1]))

    def gradient(convolve):
        return jax.jit(jax.vmap(jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), (0, 1))))

    groups = "batch_group_count = 1 : i64, feature_group_count = 1 : i64"
    for convolve, plain in ((ours, True), (theirs, False)):
        lines = gradient(convolve).lower(images, kernels).as_text().splitlines()
        convolutions = [line for line in lines if "stablehlo.convolution" in line]
        assert convolutions
        assert all(groups in line for line in convolutions) == plain


def test_equal_maxima_of_a_window_share_its_derivative():
    x = jnp.array([[3.0, 3.0, 1.0, 7.0, 9.0], [3.0, 3.0, 7.0, 2.0, 9.0]])[None, :, :, None]
    cotangent = jnp.array([8.0, 4.0]).reshape(1, 1, 2, 1)
    _, pullback = jax.vjp(cnn.max_pool, x)
    expected = [[2, 2, 0, 2, 0], [2, 2, 2, 0, 0]]
    np.testing.assert_array_equal(pullback(cotangent)[0][0, :, :, 0], expected)
