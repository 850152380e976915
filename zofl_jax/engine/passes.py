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


def total(phases: Sequence[Phase], attended: Sequence[int]) -> Passes:
    """Returns what all clients have computed in the rounds done.

    Args:
      phases: in the order of their first rounds from 0 on.
      attended: of each round, how many clients were there, see `ledger.Ledger.attended`. They
        compute whether or not their upload arrives.

    >>> from zofl_jax.directions import estimators
    >>> from zofl_jax.algorithms import decomfl
    >>> import optax
    >>> method = decomfl(abs, estimators.central_difference(5, 1e-3), optax.sgd(1.0), local_steps=2)
    >>> total([Phase(0, method)], [3] * 10)
    Passes(forward=600, backward=0)
    """
    forward = backward = 0
    ends = [*(phase.first_round for phase in phases[1:]), len(attended)]
    for phase, end in zip(phases, ends, strict=True):
        spent = phase.algorithm.passes.times(sum(attended[phase.first_round : end]))
        forward, backward = forward + spent.forward, backward + spent.backward
    return Passes(forward, backward)


def in_forward_passes(passes: Passes, backward_cost: float = 2) -> float:
    """Returns the cost in forward passes, a backward pass as two unless another cost is given.

    The gradient by the weights and that by the activations cost a forward pass each
    (Kaplan et al. 2020, section 2.1).

    >>> in_forward_passes(Passes(3, 1)), in_forward_passes(Passes(3, 1), backward_cost=1.5)
    (5, 4.5)
    """
    return passes.forward + backward_cost * passes.backward
