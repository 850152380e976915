"""Methods with dense uploads on the adapters of a language model: the base is never sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_texts

from zofl_jax import keys
from zofl_jax.algorithms import fedadam, fedavg, ferret, hybrid, scaffold
from zofl_jax.conditions import compression
from zofl_jax.data import partition
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import ledger, simulation
from zofl_jax.tasks import language, prompts

KEY = jax.random.key(5)
PROMPT = prompts.Prompt("{text} It was", ("bad", "good"), "label")


@pytest.fixture(scope="module")
def task():
    model = language.adapt(*tiny_texts.model(), lora_rank=2, lora_pattern="mlp", key=KEY)
    data = tiny_texts.data()
    shares = partition.iid(KEY, np.zeros(len(data.train)), 4)
    return language.classification(model, data, PROMPT, *shares).task


def test_adapters_are_trained_by_fedavg(task):
    simulator = simulation.make_simulator(
        fedavg(task.loss, optax.adam(0.02), local_steps=2),
        task,
        clients_per_round=2,
        batch_size=8,
        eval_batch_size=8,
    )
    before = simulator.evaluate(simulator.start(None).state.params)["loss"]
    progress = simulation.run(simulator, rounds=20)
    assert progress.history[-1].metrics["loss"] < before - 0.1


@pytest.mark.parametrize("name", ["fedadam", "scaffold", "top-k"])
def test_messages_hold_the_adapters_alone(task, name):
    algorithm, factor = {
        "fedadam": lambda: (fedadam(task.loss, optax.sgd(0.1), 0.1), 1),
        "scaffold": lambda: (scaffold(task.loss, 0.1, share=0.5), 2),
        "top-k": lambda: (
            compression.compressed(
                fedavg(task.loss, optax.sgd(0.1)), compression.top_k(0.25), error_feedback=True
            ),
            0.25 * (4 + 2) / 4,
        ),
    }[name]()
    root = keys.root(0)
    params = jax.eval_shape(task.init, root.init)
    batches = jax.tree.map(lambda x: jnp.asarray(x[None, :4]), task.train.examples)
    messages = ledger.message_shapes(algorithm, root.shared, params, batches)
    adapters = ledger.tree_bytes(params)
    assert ledger.tree_bytes(messages.upload) == pytest.approx(factor * adapters, rel=0.01)
    memory = ledger.tree_bytes(jax.eval_shape(algorithm.init_memory, params))
    assert memory == (0 if name == "fedadam" else adapters)


@pytest.mark.parametrize("name", ["ferret", "hybrid"])
def test_stacked_adapters_have_scalars_a_layer_and_a_top(task, name):
    """By block every layer of every adapter has a direction at least; the top is the last layer."""
    pairs = estimators.central_difference(3, 1e-2, perturbations.low_rank())
    algorithm = {
        "ferret": lambda: ferret(task.loss, optax.sgd(0.1), 1, perturbations.low_rank()),
        "hybrid": lambda: hybrid(task.loss, pairs, optax.sgd(0.1), optax.sgd(0.1)),
    }[name]()
    root = keys.root(0)
    params = task.init(root.init)
    batches = jax.tree.map(lambda x: jnp.asarray(x[None, :4]), task.train.examples)
    state = algorithm.init(params)
    upload = jax.jit(algorithm.client)(root.shared, state, (), batches, root.own).upload
    after = jax.jit(algorithm.server)(root.shared, state, upload)
    leaves = jax.tree.leaves(params)
    layers = {leaf.shape[0] for leaf in leaves}
    assert len(layers) == 1
    if name == "ferret":
        assert upload.shape == (len(leaves) * layers.pop(),)
    else:
        assert upload["scalars"].shape == (1, 3)
        top = jax.tree.leaves(upload["top"])
        assert [x.shape for x in top] == [(1, *leaf.shape[1:]) for leaf in leaves]
    for before, leaf in zip(leaves, jax.tree.leaves(after.params), strict=True):
        assert leaf.shape == before.shape and bool(jnp.isfinite(leaf).all())
    assert any(bool((a != b).any()) for a, b in zip(leaves, jax.tree.leaves(after.params)))  # noqa: B905
