"""Clients over devices: the same scalars as on one, in processes that see several."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from zofl_jax.engine import placement

TESTS = Path(__file__).parent

# Runs each simulation on one and on two devices and prints what both gave. Bits of a replay are
# promised for the programs that users run, so these have LLVM's optimisations; the replay on one is
# that of test_replay.py.
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
for at_once, local_steps, cohort in [(None, 1, 4), (1, 2, 3), (None, 1, 1)]:
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
        same = None
        if mesh:
            state = simulator.start(None).state
            for trace in traces:
                state = simulator.replay(state, trace.seeds, trace.broadcasts)
            same = rounds.fingerprint(state.params) == rounds.fingerprint(progress.state.params)
        pair.append({
            "devices": len(progress.state.params["bias"].devices()),
            "scalars": np.concatenate([trace.broadcasts for trace in traces]).tolist(),
            "losses": np.concatenate([trace.losses for trace in traces]).tolist(),
            "test": progress.history[-1].metrics["loss"],
            "replayed": same is not None and bool(same),
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
        assert two["replayed"]
        np.testing.assert_allclose(two["scalars"], one["scalars"], atol=2e-4)
        np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-5)
        assert two["test"] == pytest.approx(one["test"], abs=1e-5)


def test_one_device_is_no_mesh():
    assert placement.clients_mesh(jax.devices()[:1]) is None
    tree = {"x": jnp.ones(2)}
    assert placement.Placement().replicated(tree) is tree

    def fn(shared, each):
        return shared + each

    assert placement.Placement().over_devices(fn, tree) is fn


def test_too_few_devices_are_refused():
    with pytest.raises(ValueError, match="at least 1 device, got 0"):
        placement.use_cpu_devices(0)
    here = len(jax.local_devices())
    assert placement.use_cpu_devices(here + 3) == here  # too late: JAX runs already


# Rounds of a perceptron and of a small decoder on eight devices, in meshes of every shape. The
# perceptron that is replayed to the bit is compiled as users have it, the rest as quickly as tests
# are; the decoder's replay is close then, and exact in CI's run of users' programs (programs.py).
MESHES = """
import json, sys
sys.path.insert(0, sys.argv[2])
from zofl_jax.engine import placement

assert placement.use_cpu_devices(8) == 8
import programs
import jax, numpy as np
from benchmarks import workloads
from zofl_jax.engine import rounds, simulation
from zofl_jax.models import mlp

perceptron = workloads.cnn_work(1, 2, smoke=True)._replace(
    task=workloads.image_task(mlp.MLP(10, (512,)), 30, 3, (8, 8, 1)),
    clients=3,
    clients_at_once=None,
)
decoder = workloads.decoder_work(
    "smollm2-135m", clients=3, length=4, num_perturbations=2, num_layers=1, vocab_size=64,
    width=32, mlp_width=64, head_dim=4, num_heads=8, num_kv_heads=4,
)
works = {"perceptron": (perceptron, "gaussian"), "decoder": (decoder, "low_rank")}

for name, shapes in json.loads(sys.argv[1]).items():
    work, variant = works[name]
    loss = jax.jit(work.task.loss)
    for shape in [None, *shapes]:
        replayed = shape == [2, 4]
        exact = replayed and (name == "perceptron" or programs.AS_USERS_RUN_THEM)
        quick = not exact and not programs.AS_USERS_RUN_THEM
        jax.config.update("jax_disable_most_optimizations", quick)
        made = simulation.make_simulator(
            workloads.algorithm(work, variant), work.task, clients_per_round=work.clients,
            batch_size=work.batch, mesh=shape and placement.make_mesh(*shape),
        )
        start = made.start(None)
        state, memory, trace = made.advance(start.state, start.memory, 3)
        mark = int(made.fingerprint(state.params))
        same = apart = None
        if replayed:
            again = made.replay(made.start(None).state, trace.seeds, trace.broadcasts)
            same = mark == int(rounds.fingerprint(again.params)) if exact else None
            pairs = zip(*map(jax.tree.leaves, (again.params, state.params)), strict=True)
            apart = max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        held = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state.params))
        test = float(loss(jax.tree.map(np.asarray, state.params), work.task.test))
        if shape is None:
            first = jax.tree.map(np.asarray, state)
        # Goes on from the state of one device, as a run does that is resumed on another mesh.
        _, _, later = made.advance(jax.tree.map(jax.numpy.asarray, first), memory, 2)
        print(json.dumps({
            "work": name, "shape": shape, "memory": made.memory_bytes(), "share": held / whole,
            "scalars": np.asarray(trace.broadcasts).tolist(), "losses": trace.losses.tolist(),
            "later": np.asarray(later.broadcasts).tolist(), "test": test,
            "replayed": same, "apart": apart,
        }), flush=True)
"""


@pytest.fixture(scope="module")
def on_meshes():
    """What each work and shape of a mesh gave."""
    shapes = {"perceptron": [(4, 2), (2, 4), (8, 1), (1, 8)], "decoder": [(2, 4)]}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MESHES, json.dumps(shapes), str(TESTS)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["work"], tuple(row["shape"] or ())): row for row in rows}


def test_every_mesh_measures_the_scalars_of_one_device(on_meshes):
    assert len(on_meshes) == 7
    for (work, shape), row in on_meshes.items():
        one = on_meshes[work, ()]
        np.testing.assert_allclose(row["scalars"], one["scalars"], atol=2e-3, err_msg=str(shape))
        np.testing.assert_allclose(row["losses"], one["losses"], atol=1e-5)
        assert row["test"] == pytest.approx(one["test"], abs=1e-5)


def test_on_a_mesh_a_replay_gives_the_bits_of_the_rounds(on_meshes):
    replayed = [row["replayed"] for row in on_meshes.values() if row["replayed"] is not None]
    assert replayed == [True] * (2 if programs.AS_USERS_RUN_THEM else 1)
    apart = [row["apart"] for row in on_meshes.values() if row["apart"] is not None]
    assert len(apart) == 2 and max(apart) < 1e-5


def test_a_run_goes_on_on_another_mesh(on_meshes):
    for (work, _), row in on_meshes.items():
        one = on_meshes[work, ()]
        np.testing.assert_allclose(row["later"], one["later"], atol=2e-3)


def test_a_device_holds_less_of_the_model_the_more_share_it(on_meshes):
    for (_, shape), row in on_meshes.items():
        share = 1 / (shape[1] if shape else 1)
        assert share <= row["share"] < share + 0.02  # norms are on every device
    memory = {
        shape: row["memory"] for (work, shape), row in on_meshes.items() if work == "perceptron"
    }
    assert memory[1, 8] < memory[2, 4] < memory[4, 2]


def test_what_lies_like_the_params_is_split_like_them():
    """By the path and the shape: momentum, messages and buffers of messages."""
    devices = np.array([jax.devices()[0]] * 2, object)
    mesh = jax.sharding.Mesh(devices.reshape(1, 2), ("clients", "model"))
    where = placement.Placement(mesh)
    params = {"a": {"w": jnp.zeros((4, 6))}, "b": jnp.zeros(4)}
    state = {"params": params, "trace": [params], "buffer": {"a": {"w": jnp.zeros((9, 3, 4, 6))}}}
    specs = where.specs(state | {"w": jnp.zeros((4, 6)), "round": jnp.zeros(())}, params)
    P = jax.sharding.PartitionSpec
    assert specs["params"] == {"a": {"w": P(None, "model")}, "b": P()}
    assert specs["trace"] == [specs["params"]]
    assert specs["buffer"]["a"]["w"] == P(None, None, None, "model")
    assert (specs["w"], specs["round"]) == (P(), P())


def test_a_layout_that_does_not_fit_is_refused():
    devices = np.array([jax.devices()[0]] * 3, object)
    mesh = jax.sharding.Mesh(devices.reshape(1, 3), ("clients", "model"))
    where = placement.Placement(mesh, lambda params, size: {"w": 0})
    with pytest.raises(ValueError, match=r"w \(4, 6\) can't be split evenly over 3 devices"):
        where.specs({"w": jnp.zeros((4, 6))}, {"w": jnp.zeros((4, 6))})


@pytest.mark.parametrize("text", ["clients:2,clients:2", "rows:2", "model:0", "model:two", ""])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"a mesh is given as|must have a whole number"):
        placement.parse(text)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    here = len(jax.local_devices())
    with pytest.raises(ValueError, match=f"needs {4 * here} devices, and there are {here}"):
        placement.make_mesh(here, 4)
