"""What algorithms declare to compute is what they do compute."""

from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from method_table import METHODS

from zofl_jax.algorithms import decomfl
from zofl_jax.core import Passes, Phase
from zofl_jax.directions import estimators
from zofl_jax.engine import passes

P = 3
ESTIMATORS = {
    "forward": lambda: estimators.forward_difference(P, 1e-2),
    "central": lambda: estimators.central_difference(P, 1e-2),
    "projection": lambda: estimators.projection(P),
    "jvp": lambda: estimators.forward_gradient(P),
}


def evaluations(make_algorithm, forward_mode: bool = False) -> tuple[Passes, Passes]:
    """Returns what an algorithm declares, and how often a client evaluates the loss and its
    gradient in reverse.
    """
    counts: Counter[str] = Counter()

    def value(x, batch):
        # Of both, so that each element of a vmap is counted; of a group of examples its share.
        jax.debug.callback(lambda x, batch: counts.update({"forward": batch.size}), x, batch)
        return 0.5 * jnp.sum(jnp.square(x - batch))

    def backward(difference, cotangent):
        jax.debug.callback(lambda d: counts.update({"backward": 4}), difference)
        return cotangent * difference, None

    loss = jax.custom_vjp(value)
    loss.defvjp(lambda x, batch: (value(x, batch), x - batch), backward)
    algorithm = make_algorithm(value if forward_mode else loss)
    state, memory = algorithm.init(jnp.zeros(4)), algorithm.init_memory(jnp.zeros(4))
    batches, key = jnp.ones((algorithm.local_steps, 4)), jax.random.key(0)
    jax.block_until_ready(jax.jit(algorithm.client)(key, state, memory, batches, key))
    jax.effects_barrier()
    return algorithm.passes, Passes(counts["forward"] / 4, counts["backward"] / 4)


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_client_computes_what_is_declared(name, local_steps):
    def make(loss):
        return decomfl(loss, ESTIMATORS[name](), optax.sgd(0.1), local_steps=local_steps)

    declared, seen = evaluations(make, name == "jvp")
    # Forward mode carries a tangent with each value.
    assert declared == (Passes(2 * seen.forward, 0) if name == "jvp" else seen)
    assert seen.backward == (local_steps if name == "projection" else 0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_what_it_computes(name):
    method = METHODS[name]
    mask = () if method.mask is None else (jnp.arange(4) < 2,)
    declared, seen = evaluations(lambda loss: method.make(loss, 0.1, *mask))
    assert declared == seen and seen.forward > 0


def test_the_total_follows_the_phases():
    def phase(first_round, count):
        estimator = estimators.forward_difference(count, 1e-3)
        return Phase(first_round, decomfl(abs, estimator, optax.sgd(0.1), local_steps=2))

    phases = [phase(0, 1), phase(4, 2), phase(10, 5)]
    for rounds, expected in [(0, 0), (3, 3 * 4), (4, 4 * 4), (7, 16 + 3 * 6), (12, 16 + 36 + 24)]:
        assert passes.total(phases, [3] * rounds) == Passes(3 * expected, 0)
    # Rounds 3, 4 and 5 have one client less each.
    assert passes.total(phases, [3, 3, 3, 2, 2, 2]) == Passes((9 + 2) * 4 + 4 * 6, 0)
    assert passes.in_forward_passes(Passes(7, 2)) == 11
