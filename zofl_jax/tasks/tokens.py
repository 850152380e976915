"""Random tokens in place of texts: a round takes as long on them as on real ones.

The task is to choose between two next words, or the whole vocabulary, after sequences of one length
without padding. Neither tokenizer nor weights are needed, so it serves to measure and to plan.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zofl_jax.core import Array, Batch, Params, PRNGKey, Task
from zofl_jax.data import partition
from zofl_jax.models import architectures, lora, transformer
from zofl_jax.tasks.objectives import cross_entropy

CANDIDATES = (1, 2)
"""The tokens to choose from."""


def even_shares(clients: int, each: int, count: int) -> partition.Partition:
    """Returns (order, offsets) that give every client `each` of `count` examples, in turn."""
    order = np.arange(clients * each, dtype=np.int32) % count
    return order, np.arange(clients + 1, dtype=np.int32) * each


def random_task(
    config: architectures.Config, clients: int, each: int, length: int, *, whole: bool = False
) -> Task:
    """Returns the task of choosing the next word after random tokens, none padding.

    Args:
      config: the model, whose weights `Task.init` draws.
      clients: of the population.
      each: examples of a client.
      length: tokens of an example.
      whole: whether to choose from the whole vocabulary.

    Raises:
      ValueError: for sequences longer than the model's positions.
    """
    transformer.check_length(config, length)
    random = np.random.default_rng(0)
    examples = {
        "tokens": random.integers(0, config.vocab_size, (clients * each, length), np.int32),
        "label": random.integers(0, len(CANDIDATES), clients * each, np.int32),
    }
    init = functools.partial(transformer.init, config)
    return choice_task(config, examples, examples, clients, init, whole=whole)


def choice_task(
    config: architectures.Config,
    train: Batch,
    test: Batch,
    clients: int,
    init: Callable[[PRNGKey], Params],
    *,
    whole: bool = False,
) -> Task:
    """Returns the task of choosing the next word, its examples shared out evenly.

    Args:
      config: the model.
      train: {"tokens": [n, T], "label": [n]}, none of the tokens padding.
      test: the same.
      clients: of the population.
      init: makes the params.
      whole: whether to choose from the whole vocabulary, not from `CANDIDATES` alone.
    """
    count = len(train["label"])
    order, offsets = even_shares(clients, count // clients, count)
    among = None if whole else CANDIDATES

    def scores(params: Params, batch: Batch) -> Array:
        mask = jnp.ones(batch["tokens"].shape, bool)
        features = transformer.hidden(config, params, batch["tokens"], mask)[:, -1]
        return transformer.logits(config, params, features, among)

    def loss(params: Params, batch: Batch) -> Array:
        return cross_entropy(scores(params, batch), batch["label"])

    def metrics(params: Params, batch: Batch) -> dict[str, Array]:
        found = scores(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(found, batch["label"])
        return {"loss": losses, "accuracy": jnp.argmax(found, axis=-1) == batch["label"]}

    data = partition.client_data(train, order, offsets)
    layout = functools.partial(transformer.layout, config)
    return Task("tokens", init, loss, metrics, data, test, layout)


def partly_trained(task: Task, divide: Callable[[Params], tuple[Params, Params]]) -> Task:
    """Returns the task in which some of the params are trained, and the others are all zero.

    The zeros are NumPy arrays without memory of their own, so that a round can be planned whose
    model is larger than this machine.

    Args:
      task: whose loss takes all params.
      divide: params -> (trained, frozen), as `lora.split` and `lora.add` do.

    >>> import jax
    >>> from zofl_jax.models import lora
    >>> from zofl_jax.models.architectures import named
    >>> whole = random_task(named("opt-66b"), clients=2, each=1, length=4)
    >>> biases = lambda params: lora.split(params, lambda path: path == "final_norm/bias")
    >>> jax.tree.map(jnp.shape, partly_trained(whole, biases).init(jax.random.key(0)))
    {'final_norm': {'bias': (9216,)}}
    """
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
    trained, frozen = divide(zeros)

    def whole(params: Params) -> Params:
        # Which makes JAX's values of NumPy's.
        return lora.combine(params, jax.lax.optimization_barrier(frozen))

    def loss(params: Params, batch: Batch) -> Array:
        return task.loss(whole(params), batch)

    def metrics(params: Params, batch: Batch) -> dict[str, Array]:
        return task.metrics(whole(params), batch)

    def init(key: PRNGKey) -> Params:
        return jax.tree.map(jnp.asarray, trained)

    return task._replace(init=init, loss=loss, metrics=metrics)
