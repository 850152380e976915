"""The models of images, one row each: a new one is one more row."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn

from zofl_jax.models import cnn, mlp


class Curvature(NamedTuple):
    """How a loss is curved, as far as learning rates go, see `configuration.rates`."""

    trace: float  # of the Hessian
    top: float  # its largest eigenvalue


class ImageModel(NamedTuple):
    """A model of images.

    Attributes:
      make: number of classes -> the module, images [B, H, W, C] -> logits [B, classes].
      convolutional: whether it is fastest on a CPU a client at a time, one thread a device.
      curvature: of its loss on Fashion-MNIST, 28 x 28; taken for all images but the digits.
      on_digits: the same on scikit-learn's digits, 8 x 8; that of other images if None.
    """

    make: Callable[[int], nn.Module]
    convolutional: bool = False
    curvature: Curvature = Curvature(4000, 30)
    on_digits: Curvature | None = None


MODELS: Mapping[str, ImageModel] = {
    "softmax": ImageModel(mlp.Softmax, False, Curvature(700, 60), Curvature(54, 4.4)),
    "mlp": ImageModel(mlp.MLP, False, Curvature(1500, 20), Curvature(700, 4)),
    "mnist_cnn": ImageModel(cnn.MnistCnn, True, Curvature(4000, 30), Curvature(1000, 27)),
    "fashion_cnn": ImageModel(cnn.FashionCnn, True, Curvature(10_000, 30)),
    "lenet": ImageModel(cnn.LeNet, True, Curvature(1200, 30)),
}
"""By name; the first is the default."""
