"""Forward and backward passes of a run: what its clients compute, beside the bytes they send.

The unit is the loss of one batch of `batch_size` examples, evaluated once. A client's part of a
round costs

    forward difference     P + 1 forward a local step
    central difference     2 P forward
    projection             1 forward, 1 backward
    forward mode (jvp)     2 P forward: each carries a value and a tangent
    a step of gradients    1 forward, 1 backward

`Algorithm.passes` holds it for all its local steps.
"""

from collections.abc import Sequence

from zofl_jax.core import Passes, Phase


def total(phases: Sequence[Phase], rounds_done: int, clients_per_round: int) -> Passes:
    """Returns what all clients have computed after `rounds_done` rounds.

    Args:
      phases: in the order of their first rounds from 0 on.
      rounds_done: >= 0.
      clients_per_round: the cohort, all of which is taken to compute.

    >>> from zofl_jax import estimators
    >>> from zofl_jax.algorithms import decomfl
    >>> import optax
    >>> method = decomfl(abs, estimators.central_difference(5, 1e-3), optax.sgd(1.0), local_steps=2)
    >>> total([Phase(0, method)], 10, clients_per_round=3)
    Passes(forward=600, backward=0)
    """
    forward = backward = 0
    ends = [*(phase.first_round for phase in phases[1:]), rounds_done]
    for phase, end in zip(phases, ends, strict=True):
        rounds = max(0, min(end, rounds_done) - phase.first_round)
        spent = phase.algorithm.passes.times(rounds * clients_per_round)
        forward, backward = forward + spent.forward, backward + spent.backward
    return Passes(forward, backward)


def in_forward_passes(passes: Passes) -> int:
    """Returns the cost in forward passes, a backward pass as two.

    The gradient by the weights and that by the activations cost a forward pass each
    (Kaplan et al. 2020, section 2.1).

    >>> in_forward_passes(Passes(3, 1))
    5
    """
    return passes.forward + 2 * passes.backward
