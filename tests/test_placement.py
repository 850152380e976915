"""Clients over devices: the same scalars as on one, in processes that see several."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax.engine import placement

TESTS = Path(__file__).parent

# Runs each simulation on one and on two devices and prints what both gave.
SIMULATIONS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from zofl_jax.engine import placement

assert placement.use_cpu_devices(2) == 2
import jax, numpy as np, optax
from tiny_tasks import softmax_task
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import rounds, simulation
from zofl_jax.algorithms import decomfl

task = softmax_task()
frozen = jax.numpy.arange(3.0)
loss = lambda params, batch: task.loss(params | {"bias": params["bias"] + frozen}, batch)
found = []
for at_once, local_steps, cohort in [(None, 1, 4), (1, 2, 3), (None, 2, 1)]:
    pair = []
    for mesh in (None, placement.clients_mesh()):
        estimator = estimators.forward_difference(
            3, 1e-3, perturbations.rademacher(), clients_at_once=at_once
        )
        algorithm = decomfl(loss, estimator, optax.sgd(0.1, 0.9), local_steps=local_steps)
        simulator = simulation.make_simulator(
            algorithm, task, clients_per_round=cohort, batch_size=4, mesh=mesh
        )
        traces = []
        progress = simulation.run(
            simulator, rounds=8, eval_every=4, on_rounds=lambda trace, *_: traces.append(trace)
        )
        state = simulator.start(None).state
        for trace in traces:
            state = simulator.replay(state, trace.seeds, trace.broadcasts)
        same = rounds.fingerprint(state.params) == rounds.fingerprint(progress.state.params)
        pair.append({
            "devices": len(progress.state.params["bias"].devices()),
            "scalars": np.concatenate([trace.broadcasts for trace in traces]).tolist(),
            "losses": np.concatenate([trace.losses for trace in traces]).tolist(),
            "test": progress.history[-1].metrics["loss"],
            "replayed": bool(same),
        })
    found.append(pair)
print(json.dumps(found))
"""


def test_two_devices_measure_the_scalars_of_one_and_are_replayed_bit_for_bit():
    """Also where the cohort can't be shared out evenly, and where it is one client."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SIMULATIONS, str(TESTS)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for one, two in json.loads(done.stdout):
        assert (one["devices"], two["devices"]) == (1, 2)
        assert one["replayed"] and two["replayed"]
        np.testing.assert_allclose(two["scalars"], one["scalars"], atol=2e-4)
        np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-5)
        assert two["test"] == pytest.approx(one["test"], abs=1e-5)


def test_one_device_is_no_mesh():
    assert placement.clients_mesh(jax.devices()[:1]) is None
    tree = {"x": jnp.ones(2)}
    assert placement.replicated(tree, None) is tree

    def fn(shared, each):
        return shared + each

    assert placement.over_devices(fn, None) is fn


def test_too_few_devices_are_refused():
    with pytest.raises(ValueError, match="at least 1 device, got 0"):
        placement.use_cpu_devices(0)
    here = len(jax.local_devices())
    assert placement.use_cpu_devices(here + 3) == here  # too late: JAX runs already
