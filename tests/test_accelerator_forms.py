"""The forms that accelerators get compute what those of a CPU do; here they run on the CPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import shapes_in

from benchmarks import accelerator
from zofl_jax import keys, platforms
from zofl_jax.directions import estimators, perturbations, structured, sums
from zofl_jax.models import cnn
from zofl_jax.tasks import objectives

GPU = platforms.Target("gpu")


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return {
        "image": jnp.asarray(random.normal(size=(3, 8, 8, 1)), jnp.float32),
        "label": jnp.asarray([1, 0, 2]),
    }


@pytest.fixture
def model():
    made = cnn.MnistCnn(3)
    params = made.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]

    def loss(params, batch):
        return objectives.cross_entropy(
            made.apply({"params": params}, batch["image"]), batch["label"]
        )

    return loss, params


def test_nothing_told_the_target_is_the_default_backend():
    assert platforms.current() == platforms.Target(jax.default_backend())
    with platforms.tracing(GPU):
        assert platforms.current() == GPU
        with pytest.raises(ZeroDivisionError), platforms.tracing(platforms.Target("tpu")):
            raise ZeroDivisionError
        assert platforms.current() == GPU
    assert platforms.current() == platforms.Target(jax.default_backend())


@pytest.mark.parametrize("columns", [1, 24], ids=["narrow", "wide"])
def test_convolutions_of_low_rank_sums_are_those_of_the_kernels(model, images, columns):
    """Few columns beside the product, many in a kernel formed of them."""
    loss, params = model
    perturbation = perturbations.low_rank(1)
    directions = keys.direction_keys(jax.random.key(2), columns)
    scalars = jax.tree.map(lambda _: jnp.linspace(0.1, 0.2, columns), params)
    assert perturbation.combine is not None
    sum_of = perturbation.combine(params, directions, scalars)
    with platforms.tracing(GPU):
        found = jax.jit(lambda *given: structured.evaluate(loss, *given))(sum_of, images)
    expected = jax.jit(lambda x, images: loss(sums.arrays(x), images))(sum_of, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_no_perturbed_kernel_is_formed(model, images):
    """Seven perturbed models at once have the one kernel, and a column beside it each."""
    loss, params = model
    estimator = estimators.forward_difference(
        7, 1e-3, perturbations.low_rank(1), perturbations_at_once=7
    )

    def measure(params, images):
        return estimator.measure(loss, jax.random.key(0), jnp.int32(0), params, images).scalars

    with platforms.tracing(GPU):
        shapes = shapes_in(jax.make_jaxpr(measure)(params, images))
        scalars = jax.jit(measure)(params, images)
    kernel = params["conv2"]["kernel"].size
    assert not [
        shape for shape in shapes if shape[:1] in ((7,), (8,)) and kernel * 7 <= np.prod(shape)
    ]
    plain = jax.jit(lambda *given: measure(*given))(params, images)  # traced anew
    np.testing.assert_allclose(scalars, plain, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("make", [perturbations.gaussian, perturbations.rademacher])
def test_directions_are_the_same_numbers(make, monkeypatch):
    """Drawn as a whole or block by block, in one sum or one after the other."""
    monkeypatch.setattr(sums, "BLOCK", 64)
    params = {
        "layers": {"w": jnp.zeros((2, 6, 40))},
        "table": jnp.zeros((48, 8)),
        "b": jnp.zeros(5),
    }
    perturbation, key = make(), jax.random.key(3)
    scalars = jnp.asarray([0.5, -1.0, 2.0])

    def for_target(target):
        def both(params, scalars):
            drawn = sums.arrays(perturbation.sample(key, params))
            return drawn, perturbation.accumulate(keys.direction_keys(key, 3), params, scalars)

        with platforms.tracing(target):
            return jax.jit(both)(params, scalars)

    targets = (platforms.current(), GPU, platforms.Target("cpu", split=True))
    found = [for_target(target) for target in targets]
    # Signs to the bit; normals go through a polynomial, fused in one way or another.
    close = 0 if make is perturbations.rademacher else 1e-6
    for drawn, total in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=close), drawn, found[0][0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), total, found[0][1])


def row(name, code, ready=True):
    def command(folder):
        return ["-c", code, str(folder)]

    def read(folder):
        return json.loads((folder / "found.json").read_text())

    return accelerator.Row(name, "a goal", 30.0, command, read, lambda: ready)


def test_a_row_that_fails_costs_one_row(tmp_path):
    good = "import sys; open(sys.argv[1] + '/found.json', 'w').write('{\"ratio\": 1.5}')"
    given = [
        row("broken", "import sys; sys.exit('no memory')"),
        row("absent", good, ready=False),
        row("silent", ""),
        row("good", good),
        row("slow", "import time; time.sleep(60)")._replace(limit_s=0.2),
    ]
    found = {result["row"]: result for result in accelerator.measured(given, "", 60)}
    assert list(found) == ["broken", "absent", "silent", "good", "slow"]
    assert "no memory" in found["broken"]["failure"]
    assert "not installed" in found["absent"]["left_out"]
    assert "can't be read" in found["silent"]["failure"]
    assert found["good"]["ratio"] == 1.5 and "failure" not in found["good"]
    assert "ended after" in found["slow"]["failure"]
    late = list(accelerator.measured(given, "good|broken", 0.0))
    assert [result["left_out"] for result in late] == ["no time is left of 0 s"] * 2


def test_the_rows_are_commands_that_exist(tmp_path):
    for smoke in (True, False):
        for each in accelerator.rows(smoke):
            flag, module, *_ = each.command(tmp_path)
            assert flag == "-m" and module in (
                *("benchmarks.round", "benchmarks.compare_pytorch", "experiments.train"),
            )
            assert each.ready() in (True, False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pool_is_the_same_in_both_forms(dtype):
    """Values to the bit, of clients too, and derivatives, also where entries are equal."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 7, 6, 5)).round(1).astype(dtype)

    def both(x):
        pooled = jax.vmap(cnn.max_pool)(x)
        summed = lambda x: jnp.sum(jnp.sin(jax.vmap(cnn.max_pool)(x).astype(jnp.float32)))  # noqa: E731
        return pooled, jax.grad(summed)(x)

    here = jax.jit(both)(x)
    with platforms.tracing(platforms.Target("tpu")):
        there = jax.jit(lambda x: both(x))(x)
    assert here[0].shape == (2, 3, 3, 3, 5)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)
