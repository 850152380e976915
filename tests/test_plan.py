"""What a round takes: FLOPs against arithmetic, and TPU pods without a TPU."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_tasks import softmax_task

from benchmarks import cost_model, without_a_card, workloads
from benchmarks import plans as committed
from zofl_jax.algorithms import decomfl
from zofl_jax.configuration import experiment
from zofl_jax.configuration.resolve import resolve
from zofl_jax.directions import estimators, jaxprs
from zofl_jax.engine import compilation, exhaustion, hardware, placement, simulation
from zofl_jax.models import architectures, transformer
from zofl_jax.planning import costs, estimates, paper, plans, programs, topologies

needs_libtpu = pytest.mark.skipif(
    not topologies.is_installed(), reason="needs the TPU's compiler: pip install 'zofl-jax[plan]'"
)

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

TINY = {"num_layers": 2, "vocab_size": 512, "width": 128, "mlp_width": 512, "head_dim": 32}
TINY |= {"num_heads": 4, "num_kv_heads": 4}
TOKENS = 16


def simulator(work, variant, mesh=None):
    return simulation.make_simulator(
        workloads.algorithm(work, variant),
        work.task,
        clients_per_round=work.clients,
        batch_size=work.batch,
        mesh=mesh,
    )


def decoder(clients=4):
    return workloads.decoder_work(
        "smollm2-135m", clients=clients, length=TOKENS, num_perturbations=2, **TINY
    )


# FLOPs


@functools.cache
def decoder_costs(variant):
    return costs.of(simulator(decoder(), variant).program()[0])


def test_a_decoder_s_flops_are_two_a_param_and_token():
    work, config = decoder(), architectures.named("smollm2-135m", **TINY)
    found = decoder_costs("gaussian")
    shapes = transformer.shapes(config)["layers"]
    matrices = sum(
        leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim == 3
    )  # norms are no products
    tokens = work.examples * TOKENS
    heads = config.num_layers * 2 * 2 * TOKENS * config.num_heads * config.head_dim
    expected = tokens * (2 * matrices + heads)
    assert found.notes == ()
    # The scores of two words and the rotations' angles are a little more.
    assert expected <= found.products < 1.02 * expected


def test_low_rank_directions_cost_little_more_than_the_passes():
    assert decoder_costs("low_rank").products < 1.1 * decoder_costs("gaussian").products


def test_the_flops_of_convolutions_are_those_of_their_windows():
    work = workloads.cnn_work(1, 2, smoke=True)
    # 5 x 5 windows to 16 channels at 8 x 8 places, and from 16 to 32 at 4 x 4; 2 x 2 x 32 to 10.
    first, second, last = 8 * 8 * 16 * 25, 4 * 4 * 32 * 25 * 16, 128 * 10
    expected = 2 * work.examples * (first + second + last)
    found = costs.of(simulator(work, "gaussian").program()[0])
    assert found.notes == ()
    # On CPUs the first layer is a product of 5 x 8 windows that makes four outputs.
    assert expected <= found.products <= expected + 2 * work.examples * 0.6 * first + 1000


def test_a_convolution_by_hand():
    from zofl_jax.models.convolution import convolution

    x, kernel = jnp.ones((3, 6, 6, 2)), jnp.ones((3, 3, 2, 5))
    fn = functools.partial(convolution, margins=((1, 1), (1, 1)))
    expected = 2 * 3 * 6 * 6 * 5 * (3 * 3 * 2)
    plain = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    for each in (fn, plain):
        assert costs.of(jaxprs.trace(each, x, kernel)[0]).products == expected


def test_loops_branches_and_groups_are_multiplied_out():
    w = jnp.ones((4, 4))
    product = 2 * 4**3

    def twice(x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, 2)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, twice, lambda x: x @ w, x)

    def forever(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, either, x)

    def nested(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, forever, x)

    def found(fn, **groups):
        return costs.of(jaxprs.trace(fn, w)[0], **groups)

    assert found(twice).products == found(either).products == 2 * product
    assert found(forever) == found(forever)._replace(products=2 * product, notes=())
    assert "without a fixed number of turns" in found(nested).notes[0]
    shared = found(twice, groups=3, split=2)
    assert (shared.products, shared.products_each) == (3 * 2 * product, product)


# The text of compiled programs


def test_a_plan_for_this_machine():
    task = softmax_task()
    algorithm = decomfl(task.loss, estimators.forward_difference(2, 1e-3), optax.sgd(0.1, 0.9))
    made = simulation.make_simulator(algorithm, task, clients_per_round=2, batch_size=4)
    plan = plans.make(made)
    assert plan.figures.notes == ()
    assert plan.figures.collectives == {} and plan.figures.sent == 0
    params = compilation.bytes_on_a_device(jax.eval_shape(task.init, jax.random.key(0)))
    assert plan.memory.params == params
    assert plan.memory.state == params + 4  # the momentum, and the number of rounds
    assert plan.memory.needed >= plan.memory.arguments > 2 * params
    assert plan.seconds == {"compute": None, "memory": None, "interconnect": None}
    assert plan.saturates is None and ("saturates first", "not known") in plan.rows()


def test_what_can_not_be_read_is_not_known():
    for text in ("", "HloModule x", "ENTRY %main (a: f32[2]) -> f32[2] {\n  nonsense\n}\n"):
        found = programs.figures(text)
        assert (found.traffic, found.sent, found.collectives) == (None, None, None)
        assert found.notes


LOOPS = """
%body (p: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p = (s32[], f32[256]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[256]{0} get-tuple-element(%p), index=1
  %sum = f32[256]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[256]) tuple(%i, %sum)
}

%until (p: (s32[], f32[256])) -> pred[] {
  %p = (s32[], f32[256]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%round (p: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p = (s32[], f32[256]) parameter(0)
  ROOT %w = (s32[], f32[256]) while(%p), condition=%until, body=%body
}

%healthy (p: (s32[], f32[256])) -> pred[] {
  %p = (s32[], f32[256]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %i), direction=LT
}

ENTRY %main (a: (s32[], f32[256])) -> (s32[], f32[256]) {
  %a = (s32[], f32[256]) parameter(0)
  ROOT %w = (s32[], f32[256]) while(%a), condition=%healthy, body=%round
}
"""


def test_collectives_are_counted_as_often_as_their_loop_turns():
    found = programs.figures(LOOPS)
    assert found.collectives == {"all-reduce": 5 * 1024}
    assert found.sent == 5 * 1024  # 2 (n - 1) / n of two
    assert found.traffic == 5 * 2 * 1024
    told = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    assert programs.figures(LOOPS.replace("body=%body", told)).sent == 7 * 1024
    endless = programs.figures(LOOPS.replace("constant(5)", "parameter(1)"))
    assert endless.sent is None and endless.collectives is None
    assert "no fixed number of turns" in endless.notes[0]


# TPU pods


@functools.lru_cache
def planned(name, shape):
    work, variant = {
        "decoder": (decoder(), "gaussian"),
        "cnn": (workloads.cnn_work(1, 2, smoke=True), "gaussian"),
    }[name]
    mesh = topologies.mesh("v5e:4x4", placement.Shape(*shape))
    made = simulator(work, variant, mesh)
    assert not made.placement.is_there and made.placement.platform == "tpu"
    return work, made, plans.make(made)


@needs_libtpu
def test_a_round_is_compiled_for_a_pod_and_clients_exchange_a_few_scalars():
    """Without a model axis: scalars, and the batches, which come from who holds them."""
    work, _, plan = planned("cnn", (8, 1))
    assert plan.figures.notes == ()
    groups = 8
    batches = work.clients * work.batch * (8 * 8 + 4)  # not padded to 128 pixels a row
    assert plan.figures.collectives == {
        "all-gather": 4 * groups * work.num_perturbations,  # scalars
        "all-reduce": batches + 4 * groups,  # losses
    }
    assert plan.chip.name == "v5e" and plan.saturates in plan.seconds
    assert 0 < plan.memory.needed < plan.memory.limit


@needs_libtpu
def test_a_cnn_is_split_over_two_devices():
    work, _, plan = planned("cnn", (4, 2))
    assert plan.mesh == {"clients": 4, "model": 2}
    assert plan.figures.notes == ()
    # Half of both kernels and of the dense layer; biases are whole.
    kernels, biases = 4 * (25 * 16 + 25 * 16 * 32 + 128 * 10), 4 * (16 + 32 + 10)
    assert plan.memory.params == kernels // 2 + biases
    # The first layer's outputs, once a pass for each of a group's clients, are more than all sent.
    passes, largest = 2 * work.num_perturbations, work.batch * 8 * 8 * 16 * 4
    batches = work.clients * work.batch * (8 * 8 + 4)
    assert 0 < plan.figures.sent < passes * largest + 2 * batches


@needs_libtpu
def test_groups_exchange_a_layer_s_activations_and_no_param():
    work, _, plan = planned("decoder", (4, 2))
    passes = work.num_perturbations + 1
    activations = work.batch * TOKENS * TINY["width"] * 4  # of a client
    widest = work.batch * TOKENS * TINY["mlp_width"] * 4
    layers = TINY["num_layers"]
    batches = work.clients * work.batch * (TOKENS + 2) * 4
    assert plan.figures.notes == ()
    bound = passes * (layers * (4 * activations + 2 * widest) + 4 * activations) + 4 * batches
    shapes = transformer.shapes(architectures.named("smollm2-135m", **TINY))
    layer = sum(x.size for x in jax.tree.leaves(shapes["layers"])) // layers
    found = dict(plan.figures.collectives)
    # Some direction may be moved to where the params are, a layer's at a time.
    assert found.pop("all-to-all", 0) <= 4 * layer * passes
    assert sum(found.values()) < bound


@needs_libtpu
def test_the_more_devices_hold_the_params_the_less_each_needs():
    plans_by_split = {split: planned("decoder", (4, split))[2] for split in (2, 4)}
    two, four = plans_by_split[2], plans_by_split[4]
    assert four.memory.params < 0.6 * two.memory.params
    assert four.memory.needed - four.memory.code < two.memory.needed - two.memory.code
    assert two.costs.products == four.costs.products
    assert four.costs.products_each == two.costs.products_each // 2


@needs_libtpu
def test_what_does_not_fit_is_refused_with_the_number_and_the_knob():
    plan = planned("decoder", (4, 2))[2]
    small = dataclasses.replace(plan.memory, limit=plan.memory.needed - 1)
    with pytest.raises(plans.DoesNotFitError, match=r"needs .* MB .* --clients_at_once .*model:4"):
        plans.check(small, plan.memory.needed, split=2)
    config = resolve({"task": "sst2", "dtype": "bfloat16", "clients_at_once": 1})
    mesh = topologies.mesh("v5e:4x4", placement.Shape(8, 2))
    huge = experiment.of_architecture(config, architectures.named("opt-66b"), 64, mesh)
    with pytest.raises(plans.DoesNotFitError, match=r"take 1\d\d GB .* --mesh=model:32"):
        plans.make(huge)


@needs_libtpu
def test_a_topology_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"--topology=v9:4x4 is none .*use one such as"):
        topologies.devices("v9:4x4")
    with pytest.raises(ValueError, match=r"--mesh on --topology=v5e:2x2: .* needs 8 devices"):
        topologies.mesh("v5e:2x2", placement.Shape(4, 2))


def test_without_the_compiler_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(topologies, "is_installed", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'zofl-jax\[plan\]'"):
        topologies.devices("v6e:2x2")


@needs_libtpu
def test_a_round_is_held_against_its_bound_without_a_card():
    row = without_a_card.counted("cnn", "gaussian", single=False, smoke=True)
    for found in (row["gpu_by_trace"], row["tpu_by_compiler"]):
        assert found["round"]["flops"] >= found["bound"]["flops"] > 0
        # Of so few images the bound reads more than the round makes.
        assert min(found["round"]["traffic"], found["bound"]["traffic"]) > 0
    assert row["tpu_by_compiler"]["round"]["params"] > 0


@needs_libtpu
def test_the_command_plans_the_digits(tmp_path):
    """As a user types it; and one that doesn't fit ends with status 1 and a sentence."""
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "experiments.plan", "--topology=v5e:4x4"]
    flags = ["--mesh=clients:5,model:2", f"--out={out}", "--num_perturbations=2"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "saturates first" in done.stdout
    plan = json.loads(out.read_text())
    assert plan["mesh"] == {"clients": 5, "model": 2}
    assert plan["flags"]["num_perturbations"] == 2
    refused = subprocess.run(
        [*command, "--architecture=opt-13b", "--mesh=clients:16", "--clients_at_once=1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: params, state and data take")


def test_the_page_s_table_is_that_of_the_committed_plans():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for each in (committed, cost_model, without_a_card):
        assert each.table(RESULTS) in page
    kept = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "plans").glob("*.json")}
    assert {"smollm2-135m_v5e-16", "opt-13b_v5e-256", "llama-3-8b_v5e-256"} <= set(kept)
    large = {
        f"{model}_{pod}" for model in ("opt-66b", "llama-3-70b") for pod in ("v5p-128", "h100-64")
    }
    assert large <= set(kept)
    for name, plan in kept.items():
        assert plan.get("compiled", True) == ("h100" not in name)
        needed = plan["memory_bytes_a_device"]
        assert needed["needed"] < needed["limit"], name
    opt = kept["opt-13b_v5e-256"]
    assert opt["mesh"]["model"] > 1 and opt["mesh"]["clients"] * opt["mesh"]["model"] == 256
    memory = opt["memory_bytes_a_device"]
    assert 12_853_473_280 * 4 / 8 < memory["needed"] < memory["limit"]
    # Passes of 32 clients, 16 texts of 64 tokens each, through all but the tables.
    layers = 40 * 12 * 5120**2
    assert opt["flops_a_round"] == pytest.approx(2 * layers * 6 * 32 * 16 * 64, rel=0.02)


# Estimates without a compiler


def on_paper(work, variant, name, shape):
    return paper.make(simulator(work, variant, topologies.mesh(name, placement.Shape(*shape))))


def test_what_devices_of_a_group_send_is_two_sums_a_layer():
    """By the formula of docs/scaling.md, and one for the words, whose table is split too."""
    work = decoder()
    plan = on_paper(work, "gaussian", "h100:8", (4, 2))
    assert not plan.compiled and paper.NOTE in plan.notes
    assert (plan.chip.name, plan.mesh) == ("H100", {"clients": 4, "model": 2})
    passes = work.num_perturbations + 1
    features = 4 * work.batch * TOKENS * TINY["width"]
    sums = passes * (2 * TINY["num_layers"] + 1)  # 2 (M - 1) / M of two devices is 1
    found = plan.figures.collectives["all-reduce of a group"]
    assert features * sums <= found < 1.02 * features * sums  # and the scores of two words
    alone = on_paper(work, "gaussian", "h100:4", (4, 1))
    assert "all-reduce of a group" not in alone.figures.collectives
    assert plan.costs.products == alone.costs.products
    assert plan.memory.params < 0.6 * alone.memory.params


def test_an_estimate_is_within_a_tenth_of_what_the_compiler_says():
    """Of the memory, for a round that was compiled for TPUs; both take a copy in bfloat16."""
    kept = json.loads((RESULTS / "plans" / "opt-1.3b_v5e-16.json").read_text())
    given = {"task": "sst2", **kept["flags"]}
    given.pop("topology")
    mesh = topologies.mesh("h100:16", placement.parse(given.pop("mesh")))
    model, length = architectures.named(given.pop("architecture")), given.pop("sequence_length")
    plan = paper.make(experiment.of_architecture(resolve(given), model, length, mesh))
    compiled = kept["memory_bytes_a_device"]
    assert plan.memory.params == compiled["params"]
    assert plan.memory.needed == pytest.approx(compiled["needed"], rel=0.1)
    assert plan.costs.products == pytest.approx(kept["flops_a_round"], rel=0.02)


@functools.cache
def architecture_plan(*, devices=2, **given):
    config = resolve(
        {
            "task": "sst2",
            "clients_at_once": 1,
            "clients_per_round": 2,
            "num_perturbations": 2,
            **given,
        }
    )
    model = architectures.named("smollm2-135m", **TINY)
    mesh = topologies.mesh(f"h100:{devices}", placement.Shape())
    return paper.make(experiment.of_architecture(config, model, TOKENS, mesh))


def test_half_precision_takes_a_copy_of_the_params():
    wide, narrow = architecture_plan(), architecture_plan(dtype="bfloat16")
    assert wide.memory.params == narrow.memory.params
    copy = narrow.memory.params // 2
    assert copy < narrow.memory.temporaries < wide.memory.temporaries + copy


def test_an_architecture_is_planned_with_adapters_and_with_a_part_of_it_trained():
    whole = architecture_plan().memory.params
    width, layers = TINY["width"], TINY["num_layers"]
    adapters = architecture_plan(lora_rank=4, perturbation="gaussian")
    rows = 2 * layers * 4 * (width + width)  # A and B of q and v, of rank 4
    assert adapters.memory.params == 4 * rows
    assert whole <= adapters.memory.frozen < whole + 1000
    norms = architecture_plan(train_only="norm")
    assert norms.memory.params == 4 * width * (2 * layers + 1)
    with pytest.raises(ValueError, match=r"no leaf would be trained"):
        architecture_plan(train_only="nothing")
    with pytest.raises(ValueError, match=r"--mask=random needs weights"):
        architecture_plan(mask="random")


def test_a_round_that_does_not_fit_is_refused_on_paper_too():
    config = resolve({"task": "sst2", "dtype": "bfloat16", "clients_at_once": 1})
    mesh = topologies.mesh("h100:16", placement.Shape(8, 2))
    huge = experiment.of_architecture(config, architectures.named("opt-66b"), 64, mesh)
    with pytest.raises(plans.DoesNotFitError, match=r"take 1\d\d GB of a device that has 80 GB"):
        paper.make(huge)


@pytest.mark.parametrize("name", ["h100", "h100:none", "h100:0"])
def test_a_chip_is_given_with_a_number(name):
    with pytest.raises(ValueError, match=rf"--topology={name}: .* as h100:64"):
        topologies.mesh(name, placement.Shape())


def test_a_program_that_xla_can_not_write_down_is_not_known():
    class Silent:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    found = programs.figures(plans._text(Silent()))
    assert found.traffic is None and found.notes


# Too little memory for a run


MESSAGE = "RESOURCE_EXHAUSTED: Out of memory allocating 1.5GiB for a buffer"


def failing(monkeypatch, times):
    """Lets the rounds fail that often as if the memory were full."""
    call = compilation.Compiler.call
    left = [times]

    def fails(self, name, *rest, **more):
        if "advance" in name and left[0]:
            left[0] -= 1
            raise jax.errors.JaxRuntimeError(MESSAGE)
        return call(self, name, *rest, **more)

    monkeypatch.setattr(compilation.Compiler, "call", fails)


def test_a_run_that_exhausts_the_memory_names_the_knob(monkeypatch):
    failing(monkeypatch, 1)
    task = softmax_task()
    algorithm = decomfl(task.loss, estimators.forward_difference(1, 1e-3), optax.sgd(0.1))
    made = simulation.make_simulator(algorithm, task, clients_per_round=2, batch_size=4)
    with pytest.raises(exhaustion.OutOfMemoryError, match=r"1.61 GB more.*--clients_at_once"):
        simulation.run(made, rounds=1)
    assert not made.fell_back


def test_the_automatic_choice_falls_back_once(monkeypatch):
    failing(monkeypatch, 1)
    task = softmax_task()

    def algorithm(at_once):
        estimator = estimators.forward_difference(2, 1e-3, clients_at_once=at_once)
        return decomfl(task.loss, estimator, optax.sgd(0.1))

    made = simulation.make_simulator(
        algorithm(None),
        task,
        clients_per_round=4,
        batch_size=4,
        smaller=lambda: algorithm(2),
    )
    progress = simulation.run(made, rounds=2)
    assert made.fell_back
    plain = simulation.make_simulator(algorithm(2), task, clients_per_round=4, batch_size=4)
    expected = simulation.run(plain, rounds=2).state.params
    jax.tree.map(np.testing.assert_array_equal, progress.state.params, expected)
    failing(monkeypatch, 2)
    with pytest.raises(exhaustion.OutOfMemoryError):
        simulation.run(made, rounds=3, progress=progress)


def test_a_config_has_half_as_many_clients_to_fall_back_on():
    config = resolve({"clients_per_round": 4})
    assert experiment.build(config).simulator._smaller is None  # chosen: all, by default
    automatic = config.replace(clients_at_once=None, batch_size=4)
    made, _ = experiment._simulator(automatic, softmax_task(), None)
    assert made._smaller is not None and len(made._smaller()) == 1


def test_errors_of_other_kinds_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"), exhaustion.told():
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no")
    with pytest.raises(exhaustion.OutOfMemoryError, match="too little memory"), exhaustion.told():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: said in other words")


def test_a_run_that_can_not_fit_is_refused_and_one_that_may_not_is_noted(monkeypatch):
    work = decoder()
    made = simulator(work, "low_rank")
    batch = {
        "tokens": jax.ShapeDtypeStruct((work.batch, TOKENS), jnp.int32),
        "label": jax.ShapeDtypeStruct((work.batch,), jnp.int32),
    }
    kept = compilation.bytes_on_a_device(made.shapes().state)

    def with_free(size):
        monkeypatch.setattr(compilation, "memory_available", lambda where=None: size)
        return estimates.check(made, batch)

    assert with_free(10**12) == with_free(0) == ()
    (sentence,) = with_free(kept + 1000)
    assert "--clients_at_once" in sentence
    with pytest.raises(ValueError, match=r"params, state .* MB, and .* are free: .*--mesh=model:M"):
        with_free(kept - 1)


# Peak rates


def test_devices_are_found_in_the_table():
    class Device:
        def __init__(self, kind, *coords):
            self.device_kind, self.coords, self.id = kind, coords, 0

    assert hardware.of([Device("TPU v5 lite", 0, 0)]).name == "v5e"
    assert hardware.of([Device("TPU v5", 0, 0)]).name == "v5p"
    assert hardware.of([Device("NVIDIA H100 80GB HBM3")]).name == "H100"
    assert hardware.of([Device("cpu")]) is None
    cores = hardware.of([Device("TPU v4", 0), Device("TPU v4", 0)])
    assert cores.memory == hardware.named("v4").memory // 2
