"""Softmax regression and multilayer perceptrons."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from zofl_jax.core import Array, PRNGKey


def uniform_fan_in(fan_in: int) -> Initializer:
    """Returns the initialiser U(−1/√fan_in, 1/√fan_in), for kernels and biases alike.

    It is PyTorch's default for dense and convolutional layers, with which the published
    figures that we compare with were obtained.

    >>> bool(jnp.abs(uniform_fan_in(4)(jax.random.key(0), (100,))).max() <= 0.5)
    True
    """

    def init(key: PRNGKey, shape: Sequence[int], dtype: jnp.dtype | None = None) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype or jnp.result_type(float), -bound, bound)

    return init


def dense(features: int, fan_in: int, name: str) -> nn.Dense:
    """Returns a dense layer with `uniform_fan_in` initial values."""
    init = uniform_fan_in(fan_in)
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)


class Softmax(nn.Module):
    """Softmax regression: one dense layer on the flattened image."""

    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Returns logits [B, num_classes] of images [B, H, W, C]."""
        x = images.reshape(images.shape[0], -1)
        return dense(self.num_classes, x.shape[-1], "output")(x)


class MLP(nn.Module):
    """A multilayer perceptron with ReLU: 784-200-200-10 on MNIST, as McMahan et al. 2017."""

    num_classes: int
    hidden: Sequence[int] = (200, 200)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Returns logits [B, num_classes] of images [B, H, W, C]."""
        x = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, x.shape[-1], f"hidden{i + 1}")(x))
        return dense(self.num_classes, x.shape[-1], "output")(x)
