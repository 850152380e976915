"""The measurements run in a tiny size and write what they promise; the table says what they say."""

import argparse
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    activations,
    cost_model,
    dispatch,
    generators,
    learning_rates,
    measuring,
    memory,
    precision,
    round,
    sketches,
    speed,
    without_a_card,
    workloads,
)
from experiments import tuning
from zofl_jax import keys
from zofl_jax.engine import compilation

KEYS = {
    "config",
    "variant",
    "seconds_per_round",
    "bound_seconds",
    "ratio_to_bound",
    "compile_seconds",
    "peak_memory_bytes",
    "device",
    "versions",
}


@pytest.fixture(autouse=True)
def keep_the_cache(monkeypatch):
    """The measurements turn the compilation cache off; the tests want it."""
    monkeypatch.setattr(measuring, "without_cache", lambda: None)


def run(module, tmp_path, *flags):
    out = tmp_path / "result.json"
    module.main(["--smoke", f"--out={out}", *flags])
    return json.loads(out.read_text())


def test_round_writes_what_it_promises(tmp_path):
    result = run(round, tmp_path, "--config=decoder-135m", "--variant=projection")
    assert result.keys() >= KEYS
    assert result["examples_per_round"] == 6 * 2 * 2
    assert result["seconds_per_round"] > 0
    assert result["speedup_over_differences"] > 0
    assert result["peak_memory_bytes"] > result["params_bytes"]


def test_a_plan_is_compared_with_a_round():
    row = cost_model.measured("perceptron on 8 x 8 images", repeats=1, smoke=True)
    # XLA counts other operations than products too.
    assert row["flops_predicted"] < 1.1 * row["flops_by_xla"]
    assert row["flops_by_xla"] < 1.5 * row["flops_predicted"]
    assert row["memory_by_check"] <= row["memory_by_compiler"]
    assert row["ratio_to_bound"] > 0 and row["memory_of_process"] > 0


def test_a_round_is_compared_with_as_many_examples():
    central = workloads.cnn_work(4, 20)
    assert central.examples == 4 * 20 * 2 * 10 * 32
    params = jax.eval_shape(central.task.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == 28_938


def test_the_bound_evaluates_all_the_examples():
    work = workloads.cnn_work(1, 1, smoke=True)
    assert work.examples == 2 * 2 * 4
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda labels: seen.extend(labels.tolist()), batch["label"])
        return jnp.zeros(())

    work = work._replace(task=work.task._replace(loss=loss))
    job, factor = workloads.bound(work, {}, batch=4, devices=1)
    job({})
    jax.effects_barrier()
    assert (len(seen), factor) == (work.examples, 1)
    half, factor = workloads.bound(work._replace(bound_share=2), {}, batch=4, devices=1)
    seen.clear()
    half({})
    jax.effects_barrier()
    assert len(seen) * factor == work.examples and factor == 2
    # That for an accelerator, whose turns are rounds.
    seen.clear()
    jax.jit(without_a_card.passes(work, 4))({}, work.task.test, 3)
    jax.effects_barrier()
    assert len(seen) == 3 * work.examples


def test_population_has_a_row_a_size(tmp_path):
    result = run(round, tmp_path, "--config=population")
    first, last = result["populations"]
    assert last["clients"] == 2 * first["clients"]
    assert last["peak_memory_bytes"] - first["peak_memory_bytes"] <= (
        last["index_bytes"] - first["index_bytes"]
    )


def test_memory_counts_params_and_temporaries(tmp_path):
    result = run(memory, tmp_path, "--variants=gaussian", "--clients=2", "--no-process")
    (row,) = result["rows"]
    assert row["peak_memory_bytes"] > row["params_bytes"] + row["activations_bytes"]
    assert result["multiples"]["gaussian_2"] > 1


def test_the_process_peak_is_that_of_its_arrays():
    options = argparse.Namespace(smoke=True, perturbations_at_once=None)
    work = memory.work_for(2, options, short=True)
    found = memory.process_peak(work, "rademacher", "threefry2x32")
    assert 0 < found["process_peak_bytes"] < 2**30


@pytest.mark.filterwarnings("ignore:this algorithm keeps its params in bfloat16")
def test_params_rounded_at_random_move_further_than_those_rounded_to_the_nearest():
    rounded, at_random = (precision.curve(way, 0, smoke=True) for way in ("rounded", "stochastic"))
    assert rounded["round"] == at_random["round"] == list(range(1, precision.RECORDS + 1))
    assert np.all(np.isfinite(at_random["loss"])) and max(at_random["loss"]) < 2
    assert 0 <= rounded["params_moved"] < at_random["params_moved"] <= rounded["num_params"]
    assert rounded["distance"] < at_random["distance"]


@pytest.mark.parametrize(("name", "size"), [("words", 22_688), ("small_rate", 28_768)])
def test_the_decoders_whose_precision_is_measured(name, size):
    case = precision.CASES[name]
    task = precision.words_task("float32", case)
    shapes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes) == size
    marks = task.test["tokens"] < case.marks
    assert (marks.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(task.test["tokens"][marks] >= case.marks // 2, task.test["label"])


def test_mean_activations_hold_more_of_the_curvature_than_of_the_gradient(tmp_path):
    (row,) = run(activations, tmp_path)["rows"]
    assert 0 < row["gradient"] < row["curvature"] < 1
    assert row["inside"] < 1 < row["gain"]
    (tmp_path / "result.json").rename(tmp_path / "activations.json")
    assert "| digits, mlp | 0 | 0.23 | " in activations.table(tmp_path)


def test_sketches_cost(tmp_path):
    rows = run(sketches, tmp_path)["rows"]
    assert {row["kind"] for row in rows} == set(sketches.KINDS)
    assert all(row["microseconds_a_direction"] > 0 for row in rows)
    assert {row["directions"] for row in rows if not row["by_block"]} == {sketches.SMOKE_COUNT}


@pytest.mark.optimized  # threefry4x32, of which else nothing is left but recomputation
def test_generators_rates(tmp_path):
    result = run(generators, tmp_path)
    assert result["rates"].keys() == set(keys.IMPLEMENTATIONS)
    for rates in result["rates"].values():
        assert all(rate["million_per_second"] > 0 for rate in rates.values())
        assert rates.keys() == generators.DRAWS.keys()


def test_dispatch_compares_a_run_with_its_rounds(tmp_path):
    result = run(dispatch, tmp_path)
    assert result["run_seconds"] > 0
    assert result["overhead"] < 1


@pytest.fixture
def accuracies(monkeypatch):
    """Puts runs of known accuracy in place of real ones; {} holds them by rate."""
    by_rate = {}
    probe = tuning.Probe(0.09, 3.0, [tuning.Trial(0.09, [2.3, 1.0], 50)])
    monkeypatch.setattr(tuning, "probe_with", lambda *given: probe)
    monkeypatch.setattr(
        learning_rates, "build", lambda *given: SimpleNamespace(task=None, simulator=None)
    )
    monkeypatch.setattr(learning_rates, "use_cache", lambda: None)
    monkeypatch.setattr(learning_rates, "run", lambda config, at, rate: {"accuracy": by_rate[rate]})
    return by_rate


def test_the_grid_of_rates_goes_on_while_that_helps(accuracies, tmp_path):
    accuracies |= {0.0003: 0.3, 0.0011: 0.7, 0.01: 0.5, 0.03: 0.6, 0.09: 0.8, 0.27: 0.85, 0.81: 0.0}
    out = tmp_path / "result.json"
    command = [f"--out={out}", "--cells=digits,softmax,K=1,P=1", "--seeds=1"]
    learning_rates.main(command)
    result = json.loads(out.read_text())
    rates = [row["rate"] for row in result["rows"] if row["cell"] == "digits,softmax,K=1,P=1"]
    assert rates == [0.0011, 0.03, 0.09, 0.27, 0.81]  # the first is the default
    assert result.keys() >= {"device", "versions"}
    accuracies.clear()  # what is there is not measured again
    learning_rates.main(command)
    line = learning_rates.table(result["rows"]).splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == [
        *("digits,softmax,K=1,P=1", "1", "0.09", "0.800", "0.850", "0.050", "0"),
        *("0.333", "0.0011", "0.700"),
    ]


def test_few_repeats_are_refused():
    with pytest.raises(SystemExit):
        round.main(["--config=cnn", "--repeats=3"])


def test_a_round_without_the_memory_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(compilation, "memory_available", lambda: 2**20)
    with pytest.raises(SystemExit):
        round.main(["--config=decoder-135m"])
    assert "needs about" in capsys.readouterr().err


def test_turns_interleave():
    calls = []
    times = measuring.by_turns([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert calls == ["a", "b"] * 3
    assert [len(each.seconds) for each in times] == [2, 2]


def test_the_table_tells_which_goals_are_reached(tmp_path):
    (tmp_path / "round_cnn_gaussian.json").write_text('{"ratio_to_bound": 1.2}')
    (tmp_path / "compare_cnn.json").write_text('{"ratio": {"plain": {"gaussian": 1.5}}}')
    lines = speed.table(tmp_path).splitlines()
    assert lines[2].endswith("| ≤ 1.25x the bound | 1.2x | yes |")
    assert lines[3].endswith("| ≥ 2x faster than the PyTorch form | 1.5x | **no** |")
    assert all(speed.MISSING in line for line in lines[4:])


def test_the_table_rounds_no_miss_away():
    goal = speed.Goal("round", speed.BOUND, 1.1)
    assert [goal.shown(figure) for figure in (1.0404, 1.1, 1.1021)] == ["1.04x", "1.1x", "1.102x"]


def test_the_pytorch_client_measures_the_same_scalars():
    torch = pytest.importorskip("torch")
    from benchmarks import compare_pytorch

    work = workloads.cnn_work(2, 3, smoke=True)
    algorithm = workloads.algorithm(work, "gaussian")
    params = work.task.init(jax.random.key(0))
    key = jax.random.key(1)
    rows = np.arange(work.local_steps * work.batch).reshape(work.local_steps, work.batch)
    batches = jax.tree.map(lambda x: jnp.asarray(x[rows]), work.task.test)
    ours = jax.jit(algorithm.client)(key, algorithm.init(params), (), batches, key).upload

    def vector(tree):
        """Returns the leaves in PyTorch's order and layout, [d]."""
        side = int((tree["output"]["kernel"].shape[0] // 32) ** 0.5)
        output = tree["output"]["kernel"].reshape(side, side, 32, 10)
        leaves = [
            tree["conv1"]["kernel"].transpose(3, 2, 0, 1),
            tree["conv1"]["bias"],
            tree["conv2"]["kernel"].transpose(3, 2, 0, 1),
            tree["conv2"]["bias"],
            output.transpose(3, 2, 0, 1),
            tree["output"]["bias"],
        ]
        return torch.tensor(np.concatenate([np.ravel(leaf) for leaf in leaves]))

    model, loss = compare_pytorch.image_model(work)
    torch.nn.utils.vector_to_parameters(vector(params), model.parameters())
    client = compare_pytorch.TorchClient(model, work, loss)

    @jax.jit
    def drawn(step, index):
        chosen = keys.direction_keys(keys.step_key(key, step), work.num_perturbations)[index]
        return workloads.perturbation("gaussian").sample(chosen, params)

    def direction(step, index):
        return vector(drawn(step, index))

    draw = compare_pytorch.torch_batches(work)
    theirs = compare_pytorch.measure(client, direction, [draw() for _ in range(work.local_steps)])
    np.testing.assert_allclose(ours, theirs.numpy(), atol=3e-3, rtol=3e-3)
    assert np.abs(ours).max() > 0.1


def test_a_pytorch_client_that_missed_rounds_catches_up():
    torch = pytest.importorskip("torch")
    from benchmarks import compare_pytorch

    work = workloads.cnn_work(2, 3, smoke=True)
    model, loss = compare_pytorch.image_model(work)
    client = compare_pytorch.TorchClient(model, work, loss)
    missed = [compare_pytorch.Round(seed, torch.ones(2, 3) * seed) for seed in (1, 2)]
    with torch.no_grad():
        before = torch.nn.utils.parameters_to_vector(model.parameters())
        client.rejoin(missed)
        once = torch.nn.utils.parameters_to_vector(model.parameters())
        steps = [
            client.direction(each.seed, k, p) * each.seed / 3
            for each in missed
            for k in range(2)
            for p in range(3)
        ]
    expected = before - workloads.LEARNING_RATE * sum(steps)
    torch.testing.assert_close(once, expected)
