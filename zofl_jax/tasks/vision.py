"""Image classification: a flax model, softmax cross-entropy or another objective, accuracy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zofl_jax.core import Array, Batch, Params, PRNGKey, Task
from zofl_jax.data import partition
from zofl_jax.data.sources import Dataset
from zofl_jax.tasks.objectives import Objective, cross_entropy


def classification(
    dataset: Dataset,
    model: nn.Module,
    order: np.ndarray,
    offsets: np.ndarray,
    objective: Objective = cross_entropy,
) -> Task:
    """Returns the task of classifying the images of `dataset` with `model`.

    Images stay bytes in memory; a batch is scaled to zero mean and unit variance by each
    channel's statistics over the training images as it is used.

    Args:
      dataset: images uint8 [n, H, W, C] and labels int32 [n], train and test.
      model: `model.apply({"params": params}, images float [B, H, W, C])` -> logits.
      order: int32 [n], examples sorted by client, see `core.ClientData`.
      offsets: int32 [num_clients + 1], where each client's begin.
      objective: (logits [B, C], labels [B]) -> what the clients lower, []. The metrics are the
        cross-entropy and the accuracy, whatever it is.

    Raises:
      ValueError: if the model's outputs are not as many as the classes.
    """
    mean, deviation = channel_statistics(dataset.train["image"])
    shape = dataset.train["image"].shape[1:]

    def logits(params: Params, batch: Batch) -> Any:
        images = (batch["image"].astype(jnp.result_type(float)) - mean) / deviation
        return model.apply({"params": params}, images)

    def init(key: PRNGKey) -> Params:
        return model.init(key, jnp.zeros((1, *shape)))["params"]

    def metrics(params: Params, batch: Batch) -> dict[str, Array]:
        outputs = logits(params, batch)
        labels = batch["label"]
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(outputs, labels),
            "accuracy": jnp.argmax(outputs, axis=-1) == labels,
        }

    def loss(params: Params, batch: Batch) -> Array:
        return objective(logits(params, batch), batch["label"])

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), dataset.train)
    outputs = jax.eval_shape(lambda k, b: logits(init(k), b), jax.random.key(0), one).shape[-1]
    if outputs != dataset.num_classes:
        raise ValueError(
            f"the model has {outputs} outputs and {dataset.name} has {dataset.num_classes} "
            "classes; build it with as many outputs as classes"
        )
    train = partition.client_data(dataset.train, order, offsets)
    return Task(dataset.name, init, loss, metrics, train, dataset.test)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and standard deviation of each channel, float32 [C] each.

    >>> channel_statistics(np.array([0, 2], np.uint8).reshape(2, 1, 1, 1))
    (array([1.], dtype=float32), array([1.], dtype=float32))
    """
    # Counts of the 256 values give exact moments without a float copy of the images.
    values = np.arange(256)
    moments = []
    for channel in np.moveaxis(images, -1, 0):
        share = np.bincount(channel.reshape(-1), minlength=256) / channel.size
        mean = share @ values
        moments.append((mean, np.sqrt(share @ (values - mean) ** 2)))
    means, deviations = np.array(moments, np.float32).T
    return means, np.where(deviations > 0, deviations, 1)
