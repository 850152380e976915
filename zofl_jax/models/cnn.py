"""Convolutional networks for small images, in the forms that XLA runs fast.

A convolution of few input channels is done as shifted slices and one matrix product; a
2 x 2 pool is the maximum of four strided slices, and bias and ReLU come after the pool,
where there are four times fewer values (both are monotonic, so the result is the same).
Dropout, which some of the published models have, is left out: its noise would be part of
every difference quotient.

Milliseconds for the MNIST CNN's loss on 10 x 32 images inside a scan over perturbations,
on 2 cores (float32 product: up to 290 GFLOP/s), best of 7 to 9, ~ median of 5; the forms
are those of `benchmarks/convolutions.py`; "own": params differ by client; "map": one
client at a time.
    conv1, conv2     shared   shared, map   own   own, map
    xla, xla             26            26   ~89         27
    im2col, xla          21            23   ~82         22
    blocks, blocks       19             -    21         21
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from zofl_jax.core import Array
from zofl_jax.models.mlp import dense, uniform_fan_in

FEW_CHANNELS = 4
"""Up to this many input channels a convolution is done as one matrix product."""


class MnistCnn(nn.Module):
    """The CNN of DeComFL's MNIST experiments: 28,938 params with one channel and 10 classes."""

    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Returns logits [B, num_classes] of images [B, H, W, C]."""
        check_size("mnist_cnn", images, 4)
        x = nn.relu(PooledConv(16, 5, "SAME", name="conv1")(images))
        x = nn.relu(PooledConv(32, 5, "SAME", name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        return dense(self.num_classes, x.shape[-1], "output")(x)


class FashionCnn(nn.Module):
    """The CNN of DeComFL's Fashion-MNIST experiments: 1,206,590 params with 62 outputs.

    Two 3 x 3 convolutions, one pool, two dense layers; the published code keeps the 62
    outputs of EMNIST, here there are as many as classes.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Returns logits [B, num_classes] of images [B, H, W, C]."""
        check_size("fashion_cnn", images, 6)
        x = nn.relu(Conv(32, 3, "VALID", name="conv1")(images))
        x = nn.relu(PooledConv(64, 3, "VALID", name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(128, x.shape[-1], "hidden")(x))
        return dense(self.num_classes, 128, "output")(x)


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max-pooling: 62,006 params on 32 x 32 x 3 images, 10 classes."""

    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Returns logits [B, num_classes] of images [B, H, W, C]."""
        check_size("lenet", images, 16)
        x = nn.relu(PooledConv(6, 5, "VALID", name="conv1")(images))
        x = nn.relu(PooledConv(16, 5, "VALID", name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(120, x.shape[-1], "hidden1")(x))
        x = nn.relu(dense(84, 120, "hidden2")(x))
        return dense(self.num_classes, 84, "output")(x)


class Conv(nn.Module):
    """A convolution with square kernels and stride 1; its params are those of `nn.Conv`."""

    features: int
    kernel_size: int
    padding: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [B, H', W', features] of x [B, H, W, C]."""
        kernel, bias = self._params(x.shape[-1])
        return convolve(x, kernel, self.padding) + bias

    def _params(self, channels: int) -> tuple[Array, Array]:
        init = uniform_fan_in(self.kernel_size**2 * channels)
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        return self.param("kernel", init, shape), self.param("bias", init, shape[-1:])


class PooledConv(Conv):
    """A convolution and a 2 x 2 max-pool of stride 2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [B, H' / 2, W' / 2, features] of x [B, H, W, C]."""
        kernel, bias = self._params(x.shape[-1])
        return max_pool(convolve(x, kernel, self.padding)) + bias


def convolve(x: Array, kernel: Array, padding: str) -> Array:
    """Returns the convolution of x [B, H, W, C] with kernel [h, w, C, F], stride 1.

    `padding` is "SAME" or "VALID". The same as `lax.conv_general_dilated` up to rounding.
    """
    few = kernel.shape[2] <= FEW_CHANNELS
    return _as_product(x, kernel, padding) if few else _as_convolution(x, kernel, padding)


def _as_product(x: Array, kernel: Array, padding: str) -> Array:
    height, width, _, features = kernel.shape
    if padding == "SAME":
        margins = [((size - 1) // 2, size // 2) for size in (height, width)]
        x = jnp.pad(x, ((0, 0), *margins, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    slices = [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(slices, axis=-1) @ kernel.reshape(-1, features)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _as_convolution(x: Array, kernel: Array, padding: str) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@_as_convolution.defjvp
def _as_convolution_jvp(padding: str, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # XLA's gradient of a convolution is a dozen times slower than that of a matrix product.
    x, kernel = primals
    dx, dkernel = tangents
    tangent = _as_product(dx, kernel, padding) + _as_product(x, dkernel, padding)
    return _as_convolution(x, kernel, padding), tangent


def max_pool(x: Array) -> Array:
    """Returns the maxima of 2 x 2 windows of x [B, H, W, C]; an odd last row is dropped."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    top = jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2])
    return jnp.maximum(top, jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2]))


def check_size(model: str, images: Array, least: int) -> None:
    """Checks that images [B, H, W, C] are large enough for a model.

    Raises:
      ValueError: if they have fewer than `least` rows or columns.
    """
    size: Sequence[int] = images.shape[1:3]
    if min(size) < least:
        raise ValueError(
            f"{model} needs images of at least {least} x {least} pixels, got {size[0]} x "
            f"{size[1]}; use softmax or mlp"
        )
