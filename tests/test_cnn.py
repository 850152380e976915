from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import convolutions
from zofl_jax.models import cnn, mlp

MODELS = [  # model, image shape, number of params
    (mlp.Softmax(10), (8, 8, 1), 650),
    (mlp.MLP(10), (28, 28, 1), 199_210),
    (mlp.MLP(3, hidden=(5,)), (2, 2, 1), 43),
    (cnn.MnistCnn(10), (28, 28, 1), 28_938),
    (cnn.FashionCnn(62), (28, 28, 1), 1_206_590),
    (cnn.LeNet(10), (32, 32, 3), 62_006),
]
CONVOLUTIONS = [
    (padding, channels, size)
    for padding in ("SAME", "VALID")
    for channels in (1, cnn.FEW_CHANNELS, cnn.FEW_CHANNELS + 1)  # both sides of the choice
    for size in (2, 5)
]


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize(("model", "shape", "expected"), MODELS)
def test_param_count_and_logits_shape(model, shape, expected):
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, model.num_classes)
    assert logits.dtype == jnp.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize(("padding", "channels", "size"), CONVOLUTIONS)
def test_convolution_and_its_derivatives_equal_flax(padding, channels, size):
    x, dx = normal(0, (2, 7, 6, channels)), normal(1, (2, 7, 6, channels))
    ours = cnn.Conv(4, size, padding)
    theirs = nn.Conv(4, (size, size), padding=padding)
    params = jax.jit(ours.init)(jax.random.key(2), x)  # the same layout, so it serves both
    dparams = jax.tree.map(lambda leaf: normal(3, leaf.shape), params)

    def derivatives(model):
        def compute(params, x):
            out, pullback = jax.vjp(model.apply, params, x)
            _, tangent = jax.jvp(model.apply, (params, x), (dparams, dx))
            return out, tangent, pullback(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        return jax.jit(compute)(params, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5),
        derivatives(ours),
        derivatives(theirs),
    )


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 7, 5, 2), (3, 2, 3, 1)])
def test_max_pool_equals_flax(shape):
    x, cotangent = normal(0, shape), normal(1, (shape[0], shape[1] // 2, shape[2] // 2, shape[3]))
    ours, pullback = jax.vjp(cnn.max_pool, x)
    theirs, reference = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(pullback(cotangent)[0], reference(cotangent)[0])


def test_pool_before_bias_and_relu_changes_nothing():
    x = normal(0, (2, 8, 8, 1))
    layer = cnn.PooledConv(4, 3, "SAME")
    params = layer.init(jax.random.key(1), x)
    plain = nn.Conv(4, (3, 3)).apply(params, x)
    expected = nn.max_pool(nn.relu(plain), (2, 2), (2, 2))
    np.testing.assert_allclose(nn.relu(layer.apply(params, x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(cnn.MnistCnn(10), (12, 12, 1)), (cnn.LeNet(3), (16, 16, 3))],
)
def test_own_params_under_vmap_equal_a_loop(model, shape):
    images = normal(0, (3, 2, *shape))
    own = jax.jit(jax.vmap(lambda key: model.init(key, images[0])))
    params = own(jax.random.split(jax.random.key(1), 3))
    together = jax.jit(jax.vmap(model.apply))(params, images)
    apply = jax.jit(model.apply)
    for i in range(3):
        alone = apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), images[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(mlp.MLP(3), (4, 4, 1)), (cnn.MnistCnn(3), (8, 8, 1)), (cnn.LeNet(3), (16, 16, 3))],
)
def test_float64(x64, model, shape):
    images = normal(0, (1, *shape), jnp.float64)
    params = jax.jit(model.init)(jax.random.key(1), images)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    apply = jax.jit(model.apply)
    logits = apply(params, images)
    assert logits.dtype == jnp.float64
    single = apply(half, images.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, logits, rtol=1e-3, atol=1e-5)
    assert not np.array_equal(single, logits)  # float64 all the way through


@pytest.mark.parametrize(
    ("model", "name", "least"),
    [(cnn.MnistCnn, "mnist_cnn", 4), (cnn.FashionCnn, "fashion_cnn", 6), (cnn.LeNet, "lenet", 16)],
)
def test_least_image_size(model, name, least):
    def init(height, width):
        images = jax.ShapeDtypeStruct((1, height, width, 1), jnp.float32)
        return jax.eval_shape(model(10).init, jax.random.key(0), images)

    assert all(leaf.size for leaf in jax.tree.leaves(init(least, least)))
    message = f"{name} needs images of at least {least} x {least} pixels, got {least} x {least - 1}"
    with pytest.raises(ValueError, match=message):
        init(least, least - 1)


def test_digits_are_too_small_for_lenet():
    with pytest.raises(ValueError, match="got 8 x 8; use softmax or mlp"):
        cnn.LeNet(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


@pytest.mark.parametrize("fan_in", [4, 400])
def test_initial_values_are_uniform_within_fan_in(fan_in):
    values = mlp.uniform_fan_in(fan_in)(jax.random.key(0), (20_000,)) * fan_in**0.5
    assert float(jnp.abs(values).max()) <= 1
    quantiles = jnp.quantile(values, jnp.linspace(0, 1, 5))
    np.testing.assert_allclose(quantiles, [-1, -0.5, 0, 0.5, 1], atol=5 * 0.5 / 20_000**0.5)


def test_layers_scale_by_their_own_fan_in():
    init = jax.jit(cnn.LeNet(10).init)
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    fans = [params[name]["kernel"].size // params[name]["bias"].size for name in sorted(params)]
    for name, fan_in in zip(sorted(params), fans, strict=True):
        for leaf in params[name].values():
            assert float(np.abs(leaf).max()) <= fan_in**-0.5
        assert float(np.abs(params[name]["kernel"]).max()) > 0.9 * fan_in**-0.5
    assert all(a != b for a, b in pairwise(sorted(fans)))  # so the bounds do differ


@pytest.mark.parametrize("form", sorted(set(convolutions.STAGES) - {"xla", "im2col, hoisted"}))
def test_benchmarked_forms_compute_the_same_stage(form):
    x, kernel, bias = normal(0, (2, 8, 8, 3)), normal(1, (5, 5, 3, 4)), normal(2, (4,))
    expected = jax.jit(convolutions.STAGES["xla"])(x, kernel, bias)
    got = jax.jit(convolutions.STAGES[form])(x, kernel, bias)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_hoisted_patches_compute_the_same_stage():
    x, kernel, bias = normal(0, (2, 8, 8, 1)), normal(1, (5, 5, 1, 4)), normal(2, (4,))
    windows = convolutions.patches(convolutions.pad(x, kernel), 5, 5)
    expected = convolutions.STAGES["xla"](x, kernel, bias)
    got = convolutions.STAGES["im2col, hoisted"](windows, kernel, bias)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
