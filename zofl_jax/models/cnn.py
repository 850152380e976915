"""Convolutional networks for small images, in the forms that XLA runs fast on a CPU.

A convolution of few input channels is done as one matrix product for tiles of outputs, others as
`convolution` says; a 2 x 2 pool is the maximum of four strided slices, and bias and ReLU come
after the pool, where there are four times fewer values (both are monotonic, so the result is the
same). Dropout, which some of the published models have, is left out: its noise would be part of
every difference quotient.

Milliseconds for the MNIST CNN on 10 x 32 images, on 2 cores, medians of 7, from
`benchmarks/convolutions.py`; "own": params differ by client, "map": one client at a time; before:
windows side by side as one product for the first layer, XLA's own convolution and gradient:
                  shared   shared, map   own   own, map   gradient   gradient, map
    before            29            30   126         30        314            1114
    now               22            24    23         23         89              81
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from zofl_jax import platforms
from zofl_jax.core import Array
from zofl_jax.models.convolution import Margins, convolution, outputs
from zofl_jax.models.mlp import dense, uniform_fan_in

FEW_CHANNELS = 4
"""Up to this many input channels a convolution is done as one matrix product."""

TILE = 4
"""Outputs in a row that such a product makes at once."""


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
    few = kernel.shape[2] <= FEW_CHANNELS and platforms.current().platform == "cpu"
    return _in_tiles(x, kernel, padding) if few else _as_convolution(x, kernel, padding)


def _in_tiles(x: Array, kernel: Array, padding: str) -> Array:
    """Returns the convolution as one product for tiles of `TILE` outputs, neighbours in a row.

    A tile's inputs are a few long slices, h of (TILE + w - 1) C numbers, where a window each for
    the outputs would be h w short ones; for that the kernel of a tile is part zeros.
    """
    height, width, channels, features = kernel.shape
    margins = _margins(kernel, padding)
    rows, columns = outputs(x, kernel, margins)
    tiles = -(-columns // TILE)
    right = margins[1][1] + tiles * TILE - columns
    x = jnp.pad(x, ((0, 0), margins[0], (margins[1][0], right), (0, 0)))
    x = x.reshape(*x.shape[:2], -1)
    inputs, step = (TILE + width - 1) * channels, TILE * channels
    windows = [
        jnp.concatenate([x[:, i : i + rows, at : at + inputs] for i in range(height)], axis=-1)
        for at in range(0, tiles * step, step)
    ]
    kernel = kernel.reshape(height, width * channels, features)
    shifts = [(i * channels, (TILE - 1 - i) * channels) for i in range(TILE)]
    shifted = [jnp.pad(kernel, ((0, 0), shift, (0, 0))) for shift in shifts]
    out = jnp.stack(windows, axis=2) @ jnp.stack(shifted, axis=2).reshape(height * inputs, -1)
    return out.reshape(-1, rows, tiles * TILE, features)[:, :, :columns]


def _margins(kernel: Array, padding: str) -> Margins:
    """Returns the zeros above and below, left and right of the images."""
    if padding == "VALID":
        return (0, 0), (0, 0)
    height, width = kernel.shape[:2]
    return ((height - 1) // 2, height // 2), ((width - 1) // 2, width // 2)


def _as_convolution(x: Array, kernel: Array, padding: str) -> Array:
    return convolution(x, kernel, _margins(kernel, padding))


def max_pool(x: Array) -> Array:
    """Returns the maxima of 2 x 2 windows of x [B, H, W, C]; an odd last row is dropped."""
    return _max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


@jax.custom_jvp
def _max_pool(x: Array) -> Array:
    if platforms.current().platform == "cpu":
        return functools.reduce(jnp.maximum, _quarters(x))
    # By the TPU's compiler, slices of clients under a vmap take seven times as many cycles.
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


@_max_pool.defjvp
def _max_pool_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # Equal maxima of a window share its derivative. Strided slices are slow in reverse, so the
    # tangent is that of windows as axes.
    (x,), (dx,) = primals, tangents
    largest = _max_pool(x)
    batch, height, width, channels = largest.shape
    windows = (batch, height, 2, width, 2, channels)
    repeated = jnp.broadcast_to(largest[:, :, None, :, None], windows).reshape(x.shape)
    is_largest = (x == repeated).astype(x.dtype)
    among = sum(_quarters(is_largest))
    return largest, jnp.sum((is_largest * dx).reshape(windows), axis=(2, 4)) / among


def _quarters(x: Array) -> list[Array]:
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


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
