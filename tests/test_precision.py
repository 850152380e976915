"""Params that come in half precision are trained in float32."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_table import METHODS
from test_lora import MASK, TINY, TOKENS, apply
from tiny_simulations import assert_same_bits, copy, start
from tiny_tasks import softmax_task

from zofl_jax import precision
from zofl_jax.algorithms import decomfl
from zofl_jax.core import ServerState, Task
from zofl_jax.data import partition
from zofl_jax.directions import estimators
from zofl_jax.engine import simulation
from zofl_jax.models import lora, transformer
from zofl_jax.runs import recording
from zofl_jax.runs.directory import RunError, open_run

DIM, RATE, ROUNDS, DIRECTIONS = 64, 1e-5, 64, 4
SLOPE = np.linspace(0.5, 1.5, DIM, dtype=np.float32)
OPTIMIZER = optax.sgd(RATE, momentum=0.0)


def linear_task(dtype) -> Task:
    """Returns the task of lowering ⟨c, x⟩ from x = 1, whose steps are about 1e-5."""
    examples = {"c": np.tile(SLOPE, (4, 1))}

    def metrics(x, batch):
        return {"loss": batch["c"] @ x["x"]}

    return Task(
        "linear",
        lambda key: {"x": jnp.ones(DIM, dtype)},
        lambda x, batch: metrics(x, batch)["loss"].mean(),
        metrics,
        partition.client_data(examples, np.arange(4), np.arange(0, 5, 2)),
        examples,
    )


def make_simulator(dtype, narrow=False):
    task = linear_task(dtype)
    estimator = estimators.central_difference(DIRECTIONS, 0.1)
    algorithm = decomfl(task.loss, estimator, OPTIMIZER)
    if narrow:  # as a method that does not ask for float32
        zero = jnp.zeros((), jnp.int32)
        algorithm = algorithm._replace(init=lambda x: ServerState(x, OPTIMIZER.init(x), zero))
    return simulation.make_simulator(algorithm, task, clients_per_round=2, batch_size=1)


@pytest.fixture(scope="module")
def simulator():
    return make_simulator(jnp.bfloat16)


def rounds_of(simulator):
    return copy(simulation.run(simulator, rounds=ROUNDS).state)


def test_steps_too_small_for_bfloat16_have_their_mean(simulator):
    """A step is a hundredth of the spacing. The share of ⟨c, x⟩'s fall that is due has mean 1
    and variance 2 / (rounds · directions): 0.09 either way."""
    moved = rounds_of(simulator).params["x"] - 1
    due = -RATE * ROUNDS * float(SLOPE @ SLOPE)
    assert float(moved @ SLOPE) / due == pytest.approx(1, abs=4 * 0.09)


def test_a_run_has_the_bits_of_one_that_starts_from_float32(simulator):
    other = make_simulator(jnp.float32)
    assert_same_bits(rounds_of(simulator), rounds_of(other))
    # The first model is sent as it is stored.
    assert (simulator.sizes[0].params, other.sizes[0].params) == (2 * DIM, 4 * DIM)
    assert simulator.sizes[0]._replace(params=4 * DIM) == other.sizes[0]


def test_a_method_that_keeps_bfloat16_is_warned_of():
    with pytest.warns(UserWarning, match=r"keeps its params in bfloat16 \(x\).*precision.wide"):
        narrow = make_simulator(jnp.bfloat16, narrow=True)
    assert (rounds_of(narrow).params["x"] == 1).all()


def test_every_method_keeps_float32():
    task = softmax_task()
    given = jax.eval_shape(task.init, jax.random.key(0))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), given)
    for name, method in METHODS.items():
        algorithm = method.on(task, 0.1)
        for make in (algorithm.init, algorithm.init_memory):
            kept = jax.eval_shape(make, half)
            assert precision.narrow_leaves(kept) == {}, name
            assert kept == jax.eval_shape(make, given), name


def test_wide_params_are_left_alone(x64):
    params = {"w": jnp.ones(2), "d": jnp.ones(2, jnp.float64), "i": jnp.ones(2, jnp.int8)}
    assert all(precision.wide(params)[name] is leaf for name, leaf in params.items())


@pytest.mark.optimized
def test_replay_and_resume_give_the_same_bits(tmp_path, simulator):
    whole = copy(simulation.run(simulator, rounds=9).state)
    with open_run(tmp_path / "run", {}) as run:
        progress, _ = recording.restore(run, simulator)
        simulation.run(
            simulator,
            rounds=5,
            progress=progress,
            on_rounds=lambda *given: recording.write_rounds(run, *given),
        )
    with open_run(tmp_path / "run", {}) as run:
        progress, notice = recording.restore(run, simulator)  # by replay: no snapshot since
        assert (int(progress.state.round), notice) == (5, None)
        assert_same_bits(copy(simulation.run(simulator, rounds=9, progress=progress).state), whole)


def test_a_directory_with_params_of_bfloat16_is_refused(tmp_path, simulator):
    """As earlier releases left them."""
    state = start(simulator)
    old = state._replace(params={"x": jnp.ones(DIM, jnp.bfloat16)})
    with open_run(tmp_path / "run", {}) as run:
        run.save_snapshot(0, (old, ()))
        with pytest.raises(RunError, match=r"params/x is bfloat16\[64\] there and float32\[64\]"):
            recording.restore(run, simulator)


def decoder(dtype="float32"):
    """Returns the params of a small decoder."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * random.standard_normal(leaf.shape), dtype),
        transformer.shapes(TINY),
    )


def test_a_model_computes_in_its_dtype_with_params_of_float32():
    config = dataclasses.replace(TINY, param_dtype="bfloat16", compute_dtype="bfloat16")
    half = decoder("bfloat16")
    wide = precision.wide(half)
    features = jax.eval_shape(lambda x: transformer.hidden(config, x, TOKENS, MASK), wide)
    assert features.dtype == jnp.bfloat16
    # Where a product is fused with what follows, it may be rounded elsewhere.
    scores = (apply(config, params, TOKENS, MASK)[MASK] for params in (half, wide))
    np.testing.assert_allclose(*scores, atol=0.02)


def test_what_adapters_learnt_is_not_rounded_away(tmp_path):
    weights = pytest.importorskip("zofl_jax.models.weights")
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    adapters, frozen = lora.add(decoder("bfloat16"), "up", 2, 2.0, jax.random.key(1))
    learnt = jax.tree.map(lambda x: x + 1e-3, adapters)
    merged = lora.merge(lora.combine(learnt, frozen))
    up, factors = (tree["layers"]["mlp"]["up"] for tree in (frozen, learnt))
    moved = np.asarray(merged["layers"]["mlp"]["up"]["kernel"] - up["kernel"].astype(np.float32))
    np.testing.assert_allclose(moved, factors["lora_a"] @ factors["lora_b"], atol=1e-7)
    weights.save_hf(str(tmp_path / "merged"), config, merged)
    assert json.loads((tmp_path / "merged/config.json").read_text())["torch_dtype"] == "float32"
    _, loaded, _ = weights.load(f"hf:{tmp_path / 'merged'}")
    assert_same_bits(loaded, precision.wide(merged))


@pytest.mark.parametrize(
    ("factor", "dtype", "message"),
    [
        (1e7, "float16", r"holds numbers up to .*e\+0\d, above the largest of float16: .*bfloat16"),
        (1e-8, "float16", "holds no number above .*e-09, all of which are 0 in float16: load"),
        (1e7, "bfloat16", None),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, factor, dtype, message):
    weights = pytest.importorskip("zofl_jax.models.weights")
    params = decoder()
    params["layers"]["mlp"]["up"]["kernel"] *= factor
    weights.save_hf(str(tmp_path / "model"), TINY, params)
    if message is None:
        weights.load(f"hf:{tmp_path / 'model'}", dtype)
        return
    with pytest.raises(ValueError, match=rf"tensor model.decoder.layers.\d.fc1.weight {message}"):
        weights.load(f"hf:{tmp_path / 'model'}", dtype)
