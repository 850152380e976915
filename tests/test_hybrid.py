"""Hybrid order: the top moves by exact gradients, the rest by scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import resolve
from tiny_tasks import softmax_task

from experiments.entry import UserError
from zofl_jax import keys
from zofl_jax.algorithms import hybrid
from zofl_jax.algorithms.hybrid import Boundary, join, split
from zofl_jax.configuration.phases import build_phases
from zofl_jax.directions import estimators, perturbations
from zofl_jax.directions.estimators import inner

KEY = keys.round_key(keys.root(0).shared, 0)
RATE, P = 0.1, 3
RNG = np.random.default_rng(0)
X = {
    "layers": {"w": jnp.asarray(RNG.normal(size=(3, 4, 4)) / 2, jnp.float32)},
    "output": {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)},
}
BATCH = jnp.asarray(RNG.normal(size=(1, 5, 4)), jnp.float32)


def loss(x, batch):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, x["layers"]["w"])
    return jnp.mean(jnp.square(h @ x["output"]["w"] - 1))


def make(boundary=Boundary(), **options):  # noqa: B008 (a constant)
    pairs = estimators.projection(P)
    return hybrid(loss, pairs, optax.sgd(RATE), optax.sgd(RATE), boundary=boundary, **options)


@pytest.mark.parametrize("layers", [0, 1])
def test_a_client_sends_the_slopes_of_the_rest_and_the_step_of_the_top(layers):
    algorithm, boundary = make(Boundary(layers=layers), top_rate=2.0), Boundary(layers=layers)
    state = algorithm.init(X)
    upload = jax.jit(algorithm.client)(KEY, state, (), BATCH, KEY).upload
    _, rest = split(boundary, X)
    gradients = split(boundary, jax.grad(loss)(X, BATCH[0]))
    for sent, slope in zip(
        jax.tree.leaves(upload["top"]), jax.tree.leaves(gradients[0]), strict=True
    ):
        np.testing.assert_allclose(sent, 2 * RATE * slope, rtol=1e-4, atol=1e-6)
    z = [
        perturbations.gaussian().sample(key, rest)
        for key in keys.direction_keys(keys.step_key(KEY, 0), P)
    ]
    np.testing.assert_allclose(
        upload["scalars"][0], [inner(gradients[1], _arrays(each)) for each in z], rtol=1e-4
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(upload)) == P + 8 + 16 * layers
    # What everyone makes of it: the client's own model after the step.
    after = jax.jit(algorithm.server)(KEY, state, upload).params
    estimate = sum(_scaled(each, g / P) for each, g in zip(z, upload["scalars"][0], strict=True))
    moved = np.asarray(rest["layers"]["w"] - RATE * estimate)
    np.testing.assert_allclose(after["layers"]["w"][: 3 - layers], moved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        after["output"]["w"], X["output"]["w"] - 2 * RATE * gradients[0]["output"]["w"], rtol=1e-4
    )


def _arrays(z):
    return jax.tree.map(lambda x: x, {**z, "layers": {"w": z["layers"]["w"].array()}})


def _scaled(z, factor):
    return factor * z["layers"]["w"].array()


@pytest.mark.parametrize(
    ("boundary", "top"),
    [
        (Boundary(), {"output/w": 8}),
        (Boundary(layers=2), {"layers/w": 32, "output/w": 8}),
        (Boundary("^none$", 1), {"layers/w": 16}),
        (Boundary("layers"), {"layers/w": 48}),
    ],
)
def test_a_boundary_is_by_path_or_layer(boundary, top):
    sides = split(boundary, X)
    found = jax.tree_util.tree_leaves_with_path(sides[0])
    assert {keys.path_name(path): leaf.size for path, leaf in found} == top
    jax.tree.map(np.testing.assert_array_equal, join(*sides), X)


def test_without_names_of_its_own_the_top_is_the_last_layer_or_leaf():
    adapters = {"layers": {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 5))}}
    assert jax.tree.map(jnp.shape, split(Boundary(), adapters)[0]) == {
        "layers": {"a": (1, 2), "b": (1, 5)}
    }
    task = softmax_task()
    top, rest = split(Boundary(), task.init(KEY))
    assert (top["bias"], rest["kernel"]) == (None, None) and top["kernel"].size == 15


@pytest.mark.parametrize(
    ("boundary", "where"), [(Boundary("absent"), "below"), (Boundary("w"), "above")]
)
def test_a_boundary_with_all_params_on_one_side_is_refused(boundary, where):
    with pytest.raises(ValueError, match=rf"all params are {where} the boundary, hybrid_top='"):
        make(boundary).init(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 0}, "local_steps must be >= 1, got 0"),
        ({"top_rate": 0.0}, "top_rate must be positive and finite, got 0.0"),
        ({"boundary": Boundary(layers=-1)}, "the layers of the top must be >= 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask=random"], "--mask has no effect with --algorithm=hybrid"),
        (["--dp=client"], "uploads are more than one vector of numbers"),
        (["--dp=example"], "clips each example's scalars"),
        (["--step_rule=fzoo"], "--step_rule has no effect with --algorithm=hybrid"),
    ],
)
def test_what_it_does_not_read_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve("--algorithm=hybrid", *arguments)


def test_its_flags_are_its_arguments():
    config = resolve("--algorithm=hybrid", "--hybrid_top=bias", "--hybrid_rate=3")
    assert config.learning_rate == resolve("--momentum=0").learning_rate
    algorithm = build_phases(config, softmax_task())[0].algorithm
    shapes = jax.eval_shape(algorithm.init, softmax_task().init(KEY))
    batches = jax.tree.map(
        lambda x: x[:16].reshape(4, 4, *x.shape[1:]), softmax_task().train.examples
    )
    upload = jax.eval_shape(algorithm.client, KEY, shapes, (), batches, KEY).upload
    assert jax.tree.map(jnp.shape, upload["top"]) == {"bias": (3,), "kernel": None}
    with pytest.raises(ValueError, match=r"--hybrid_top=\( is no regular expression"):
        build_phases(config.replace(hybrid_top="("), softmax_task())
