"""A task small enough for every test: softmax regression with params of two leaves."""

import jax
import jax.numpy as jnp
import numpy as np

from zofl_jax.core import Task
from zofl_jax.data import partition

CLIENT_SIZES = (4, 5, 9, 6, 4, 8)
BATCH_SIZE = 4


def softmax_task(dtype: type = np.float32) -> Task:
    """Returns six clients with 4 to 9 examples of 5 features and 3 labels."""
    random = np.random.default_rng(0)
    n = sum(CLIENT_SIZES)
    examples = {
        "features": random.normal(size=(n, 5)).astype(dtype),
        "label": random.integers(0, 3, n).astype(np.int32),
    }
    offsets = np.concatenate([[0], np.cumsum(CLIENT_SIZES)])
    params = {
        "kernel": (random.normal(size=(5, 3)) / 2).astype(dtype),
        "bias": (random.normal(size=3) / 2).astype(dtype),
    }

    def metrics(x, batch):
        logits = batch["features"] @ x["kernel"] + x["bias"]
        chosen = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        return {
            "loss": jax.nn.logsumexp(logits, axis=1) - chosen,
            "accuracy": (jnp.argmax(logits, axis=1) == batch["label"]).astype(dtype),
        }

    return Task(
        "softmax",
        lambda key: jax.tree.map(jnp.asarray, params),
        lambda x, batch: metrics(x, batch)["loss"].mean(),
        metrics,
        partition.client_data(examples, random.permutation(n), offsets),
        examples,
    )


def poisoned_task(client: int) -> Task:
    """The softmax task with one feature of one client's examples not a number."""
    task = softmax_task()
    mine = task.train.order[task.train.offsets[client] : task.train.offsets[client + 1]]
    features = task.train.examples["features"].at[mine, 0].set(jnp.nan)
    examples = {**task.train.examples, "features": features}
    return task._replace(train=task.train._replace(examples=examples))
