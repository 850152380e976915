"""What a classifier is trained to lower: cross-entropy, or what is really wanted.

The error rate and 1 − F1 are constant almost everywhere, so they have no useful gradient; the
forward and the central difference lower them all the same, given a smoothing that moves some
predictions (Malladi et al. 2023, arXiv 2305.17333, section 4.3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from zofl_jax.core import Array

Objective = Callable[[Array, Array], Array]  # (scores [B, C], labels int [B]) -> []


def cross_entropy(scores: Array, labels: Array) -> Array:
    """Returns the mean cross-entropy of softmax(scores), []."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def error_rate(scores: Array, labels: Array) -> Array:
    """Returns 1 − accuracy, [].

    >>> float(error_rate(jnp.eye(4), jnp.array([0, 1, 2, 0])))
    0.25
    """
    return 1 - jnp.mean(jnp.argmax(scores, axis=-1) == labels, dtype=scores.dtype)


def f1_loss(scores: Array, labels: Array) -> Array:
    """Returns 1 − macro F1 over the classes that are in the labels or predicted, [].

    >>> round(float(f1_loss(jnp.eye(3), jnp.array([0, 1, 1]))), 4)
    0.4444
    """
    classes = scores.shape[-1]
    predicted = jax.nn.one_hot(jnp.argmax(scores, axis=-1), classes, dtype=scores.dtype)
    actual = jax.nn.one_hot(labels, classes, dtype=scores.dtype)
    both = jnp.sum(predicted * actual, axis=0)
    either = jnp.sum(predicted + actual, axis=0)  # 2 TP + FP + FN
    f1 = 2 * both / jnp.maximum(either, 1)
    return 1 - jnp.sum(f1) / jnp.maximum(jnp.sum(either > 0), 1)


def token_f1_loss(written: Array, references: Array, fill: int) -> Array:
    """Returns 1 − the mean F1 of the tokens of two texts as bags, [].

    Args:
      written: int [B, N]; `fill` where there is no token.
      references: int [B, A], likewise.
      fill: no token of a text.

    >>> float(token_f1_loss(jnp.array([[5, 6]]), jnp.array([[6, 7]]), fill=-1))
    0.5
    """

    def f1(ours: Array, theirs: Array) -> Array:
        equal = (ours[:, None] == theirs[None, :]) & (ours != fill)[:, None]
        # A token that is written a third time is right only if it is there three times.
        occurrence = jnp.sum(jnp.tril(ours[:, None] == ours[None, :], -1), axis=1)
        common = jnp.sum(occurrence < jnp.sum(equal, axis=1))
        total = jnp.sum(ours != fill) + jnp.sum(theirs != fill)
        return 2.0 * common / jnp.maximum(total, 1)

    return 1 - jnp.mean(jax.vmap(f1)(written, references))


CLASSIFICATION: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "accuracy": error_rate,
    "f1": f1_loss,
}
"""By the name of what is improved."""

WITHOUT_GRADIENT = ("accuracy", "f1")
