"""Small simulations, and what tests do with them: advance, copy, compare bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax.algorithms import decomfl
from zofl_jax.core import Task
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import simulation

COHORT = 3

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum and decay": lambda: optax.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9)
    ),
    "adam": lambda: optax.adam(0.05),
}


def make_simulator(
    optimizer: str,
    perturbation: str,
    local_steps: int,
    task: Task | None = None,
    **options: Any,
) -> simulation.Simulator:
    task = task or softmax_task()
    estimator = estimators.forward_difference(2, 1e-2, getattr(perturbations, perturbation)())
    algorithm = decomfl(task.loss, estimator, OPTIMIZERS[optimizer](), local_steps=local_steps)
    options = {"clients_per_round": COHORT, "batch_size": BATCH_SIZE, **options}
    return simulation.make_simulator(algorithm, task, **options)


def copy(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes(), np.abs(a.astype(float) - b).max()


def assert_replayed(actual, expected, *, exact) -> None:
    """Checks a replay bit by bit, or closely where the programs are not those that users have."""
    if exact or programs.AS_USERS_RUN_THEM:
        assert_same_bits(actual, expected)
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), actual, expected)


def advance(simulator: simulation.Simulator, state, pieces) -> tuple[Any, list[simulation.Trace]]:
    """Returns the state after dispatches of these lengths, and their traces."""
    state, traces = jax.tree.map(jnp.asarray, state), []
    for n in pieces:
        state, _, trace = simulator.advance(state, (), n)
        traces.append(trace)
    return copy(state), traces


def joined(traces: list[simulation.Trace]) -> simulation.Trace:
    def concatenated(name: str) -> Any:
        return jax.tree.map(lambda *x: np.concatenate(x), *(getattr(t, name) for t in traces))

    return simulation.Trace(
        traces[0].first_round,
        *(concatenated(name) for name in ("seeds", "broadcasts", "losses")),
        traces[-1].failed_loss,
        *(concatenated(name) for name in ("attendance", "rejected")),
    )


def start(simulator: simulation.Simulator):
    return copy(simulator.start(None).state)
