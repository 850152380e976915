"""What is taken from JAX without its promise, see WORKSPACE.md: each test says what changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import shapes_in

from zofl_jax import keys
from zofl_jax.directions import jaxprs, perturbations, structured, sums
from zofl_jax.engine import compilation, placement
from zofl_jax.models import convolution
from zofl_jax.planning import costs, programs, topologies

W, X = np.ones((3, 4, 4), np.float32), np.ones((2, 4), np.float32)


@jax.custom_jvp
def with_own_tangent(w):
    return jnp.sin(w)


with_own_tangent.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), tangents[0]))


@jax.custom_vjp
def with_own_cotangent(w):
    return jnp.sin(w)


with_own_cotangent.defvjp(lambda w: (jnp.sin(w), w), lambda w, cotangent: (cotangent,))


OPERATIONS = {
    "jit": lambda w, x: x @ jax.jit(lambda w: w[0])(w),
    "checkpoint": lambda w, x: x @ jax.checkpoint(lambda w: w[0])(w),
    "custom_jvp_call": lambda w, x: with_own_tangent(w),
    "custom_vjp_call": lambda w, x: with_own_cotangent(w),
    "scan": lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
    "while": lambda w, x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w[0], x),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: x),
    "copy": lambda w, x: x @ jnp.copy(w)[0],
    "convert_element_type": lambda w, x: x @ w.astype(jnp.bfloat16)[0],
    "transpose": lambda w, x: x @ w[0].T,
    "reshape": lambda w, x: x @ w.reshape(12, 4)[:4],
    "gather": lambda w, x: w.reshape(12, 4)[jnp.array([0, 2])],
    "dot_general": lambda w, x: x @ w.reshape(4, 12),
    "conv_general_dilated": lambda w, x: jax.lax.conv_general_dilated(
        x[None, ..., None],
        w[:2, :2, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
}
"""For each primitive that has a rule, a function that is made of it."""

SYNONYMS = {"checkpoint": "remat2"}
"""Names of primitives before and after a release that renamed them."""

BEFORE = {"closed_call"}
"""Primitives of releases before those that the tests run with."""


def equations(program):
    """Yields the equations of a program and of all programs inside it."""
    for equation in program.jaxpr.eqns:
        yield equation
        for inside in jaxprs.inner(equation):
            yield from equations(inside)


@pytest.mark.parametrize("name", OPERATIONS)
def test_primitives_have_the_names_and_params_that_rules_know(name):
    program, _ = jaxprs.trace(OPERATIONS[name], W, X)
    names = {name, SYNONYMS.get(name, name)}
    found = [e for e in equations(program) if e.primitive.name in names]
    assert found, (
        f"JAX calls the primitive of {name} by another name now: add it to structured._RULES"
    )
    for equation in found:
        rule = structured._RULES[equation.primitive.name]
        assert rule.fits(equation), (
            f"the params of {equation.primitive.name} are {sorted(equation.params)} now, its rule "
            f"reads {sorted(rule.reads)} and ignores {sorted(rule.ignores)}: see what the others do"
        )


def test_every_rule_is_of_a_primitive_that_is_tried():
    tried = {*OPERATIONS, *(SYNONYMS[name] for name in OPERATIONS if name in SYNONYMS), *BEFORE}
    assert set(structured._RULES) == tried


def scanned(consts, carry, xs):
    """A loop with two constants, two carries, two scanned inputs and three outputs."""

    def step(carry, x):
        a, n = carry
        return (a @ x[0] + consts[0], n + x[1]), (a, n, consts[1] * n)

    return jax.lax.scan(step, carry, xs)


CASES = {
    "all kinds": (scanned, ((X, 2.0), (X, 0.0), (W, np.ones(3, np.float32)))),
    "no constants": (lambda x, w: jax.lax.scan(lambda x, w: (x @ w, x), x, w), (X, W)),
    "nothing scanned": (
        lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=3),
        (X, W[0]),
    ),
    "no carry": (lambda w: jax.lax.scan(lambda _, w: (None, w.sum()), None, w), (W,)),
    "a loop over vectors of one": (
        lambda x, w: jax.lax.scan(lambda x, w: (x + w[0], w), x, w),
        (np.float32(1), np.ones((1, 1), np.float32)),
    ),
}
COUNTS = {
    "all kinds": (2, 2),
    "no constants": (0, 1),
    "nothing scanned": (1, 1),
    "no carry": (0, 0),
    "a loop over vectors of one": (0, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_how_a_loop_s_inputs_are_shared_out_follows_from_shapes(name):
    fn, args = CASES[name]
    program, _ = jaxprs.trace(fn, *args)
    (scan,) = [e for e in equations(program) if e.primitive.name == "scan"]
    found = jaxprs.loop(scan)
    assert found is not None, (
        "the inputs of a scan no longer come as constants, carry, scanned, or its outputs as "
        "carry, stacked: see jaxprs.loop"
    )
    assert (found.num_consts, found.num_carry) == COUNTS[name]
    body = jaxprs.run(
        found.body,
        [
            x if i < sum(COUNTS[name]) else x[0]
            for i, x in enumerate(jnp.ones(v.aval.shape, v.aval.dtype) for v in scan.invars)
        ],
    )
    inside = [v.aval.shape for v in scan.outvars]
    assert [x.shape for x in body] == [
        shape if i < COUNTS[name][1] else shape[1:] for i, shape in enumerate(inside)
    ]


@pytest.mark.parametrize("unknown", ["scan", "while", "cond", "dot_general", "gather", "reshape"])
def test_an_equation_that_a_rule_does_not_know_gets_the_sum(unknown, monkeypatch):
    """With a warning, and with the numbers of the plain function."""
    rule = structured._RULES[unknown]
    monkeypatch.setitem(
        structured._RULES, unknown, rule._replace(reads=rule.reads | {"a param of tomorrow"})
    )
    shape = {"dot_general": (4, 12), "gather": (12, 4)}.get(unknown, W.shape)  # no layers there
    x, fn = {"w": jnp.ones(shape)}, lambda x, a: OPERATIONS[unknown](x["w"], a)
    directions = perturbations.low_rank(1)
    key = keys.round_key(keys.root(3).shared, 0)
    near = directions.add(x, directions.sample(key, x), 0.1)
    with pytest.warns(UserWarning, match=f"writes {unknown} with params .* newer zofl_jax"):
        found = structured.evaluate(fn, near, jnp.asarray(X))
    np.testing.assert_allclose(found, fn(sums.arrays(near), jnp.asarray(X)), rtol=1e-5)


def test_a_primitive_without_a_rule_gets_the_sum_without_a_word(monkeypatch):
    """As if it had been renamed: the product itself, and the call that it stands in."""
    for name in ("dot_general", "jit"):
        monkeypatch.delitem(structured._RULES, name)
    x = {"w": jnp.asarray(W)}
    directions = perturbations.low_rank(1)
    near = directions.add(x, directions.sample(keys.round_key(keys.root(3).shared, 0), x), 0.1)
    found = structured.evaluate(lambda x, a: OPERATIONS["jit"](x["w"], a), near, jnp.asarray(X))
    expected = OPERATIONS["jit"](sums.arrays(near)["w"], jnp.asarray(X))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_program_runs_with_other_arrays_than_it_closed_over():
    program, _ = jaxprs.trace(lambda x: (x @ W[0], W[1]), X)
    assert len(program.consts) == 2, "make_jaxpr no longer keeps what a function closes over apart"
    found = jaxprs.run(program._replace(consts=[2 * c for c in program.consts]), (X,))
    np.testing.assert_array_equal(found[0], 2 * X @ W[0])
    np.testing.assert_array_equal(found[1], 2 * W[1])


def test_convolutions_have_rules_of_their_own(monkeypatch):
    assert convolution._own is not None, (
        "the registries of jax.interpreters have changed: convolutions fall back to XLA's own "
        "rules, which are slow on CPUs, see models/convolution.py"
    )
    images, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))
    convolve = functools.partial(convolution.convolution, margins=((1, 1), (0, 0)))
    expected = convolve(images, kernel)
    monkeypatch.setattr(convolution, "_own", None)
    np.testing.assert_allclose(convolve(images, kernel), expected, rtol=1e-6)


def test_without_the_registries_convolutions_are_plain(monkeypatch):
    monkeypatch.delattr("jax.interpreters.ad.defbilinear")
    assert convolution._with_rules() is None


def test_the_compiler_says_how_much_memory_it_needs(monkeypatch):
    add_one = compilation.compiled(lambda x: x + 1, (jnp.ones(1000),))
    assert compilation.memory_bytes(add_one) == 8000, (
        "memory_analysis() no longer has the sizes of arguments, results and temporaries: see "
        "compilation.memory_bytes"
    )


def test_without_the_compiler_s_account_memory_is_unknown(monkeypatch):
    class Silent:
        def __call__(self):
            pass

        def memory_analysis(self):
            return None

    assert compilation.memory_bytes(functools.partial(Silent())) == 0
    monkeypatch.setattr(compilation, "memory_bytes", lambda function: 0)
    x = jax.ShapeDtypeStruct((10,), jnp.float32)
    assert compilation.clients_that_fit(lambda w, x: (w * x).sum(), x, x, 10**9) == 1


def test_the_text_of_compiled_programs_is_read():
    """`planning.programs` reads a loop of rounds, in which another one turns five times."""

    def found(turns):
        weights = jnp.ones((turns, 64, 64))

        def one(at):
            x, rounds = at
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0], rounds + 1

        def rounds(x, limit):
            return jax.lax.while_loop(lambda at: at[1] < limit, one, (x, 0))

        compiled = jax.jit(rounds).lower(jnp.ones((8, 64)), 3).compile()
        return programs.figures(compiled.as_text())

    few, more = found(5), found(15)
    assert few.notes == more.notes == (), (
        "the text of compiled programs is another now: planning.programs gives no traffic and no "
        "collectives"
    )
    layer = 64 * 64 * 4
    assert 5 * layer <= few.traffic < 20 * layer
    assert few.traffic + 10 * layer <= more.traffic <= 3.1 * few.traffic
    assert few.collectives == {}


def test_a_mesh_may_be_of_devices_that_are_known_by_their_kind():
    """`planning.topologies` makes one for GPUs, and `Placement` asks for the kind."""
    mesh = topologies.mesh("h100:4", placement.Shape(2, 2))
    where = placement.Placement(mesh)
    assert (where.platform, where.is_there, where.split) == ("gpu", False, 2), (
        "an abstract mesh tells its devices in another way: see planning.topologies"
    )
    spread = where.shapes({"w": X}, {"w": X})["w"]
    assert spread.sharding.shard_shape(spread.shape) == (2, 2)
    fn = where.over_devices(lambda shared, each: shared["w"].sum() * each, {"w": X})
    program, _ = jaxprs.trace(fn, {"w": X}, jnp.ones(2))
    assert "shard_map" in [equation.primitive.name for equation in program.jaxpr.eqns]


def test_the_flops_of_products_are_read():
    """`planning.costs` knows products, convolutions, scans and `shard_map` by name and params."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("clients",))
    spec = jax.sharding.PartitionSpec("clients")

    def fn(x, w):
        spread = jax.shard_map(lambda x: x @ W[0], mesh=mesh, in_specs=spec, out_specs=spec)
        images = jax.lax.conv(w[None], w[None], (1, 1), "VALID")
        return spread(x), images, jax.lax.scan(lambda x, _: (x @ W[0], None), x, None, 7)

    x = jnp.ones((3, W.shape[1]))
    program, _ = jaxprs.trace(fn, x, jnp.ones((2, 4, 4)))
    found = costs.of(program, groups=2)
    one = 2 * 3 * W.shape[1] * W.shape[2]
    assert found.products_each == one * (1 + 7) + 2 * 2 * 4 * 4, (
        "a primitive or its params have another name: see planning.costs"
    )
    assert found.notes == ()


def test_the_jaxpr_of_a_transformed_function_shows_its_shapes():
    """`tests/jaxprs.py` finds the intermediates of inner functions, on which other tests rely."""
    made = shapes_in(jaxprs.trace(OPERATIONS["scan"], W, X)[0].jaxpr)
    assert made == {(2, 4)}
    inside = jax.make_jaxpr(
        jax.jit(lambda x: jax.lax.scan(lambda x, _: (x.T @ x, None), x, None, 2))
    )
    assert (4, 4) in shapes_in(inside(np.ones((4, 4))).jaxpr)
