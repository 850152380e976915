"""Directions away from mean activations: what is measured, what is left alone, who has them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import build, resolve
from tiny_simulations import assert_replayed, copy, joined
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax import keys, platforms
from zofl_jax.algorithms import decomfl, fedkseed, feedsign
from zofl_jax.algorithms.centred import centred
from zofl_jax.core import Phase
from zofl_jax.directions import activations, estimators, perturbations, structured, sums
from zofl_jax.engine import simulation
from zofl_jax.models.images import MODELS
from zofl_jax.observation.diagnostics import hessian_product
from zofl_jax.planning import costs

KEY = keys.round_key(keys.root(7).shared, 2)
TASK = softmax_task()
PARAMS = {
    "w": jnp.zeros((5, 4)),
    "layers": {"w": jnp.zeros((2, 4, 3))},
    "conv": jnp.zeros((2, 2, 2, 3)),
    "b": jnp.zeros(2),
}


def random_means():
    random = np.random.default_rng(0)
    shapes = {"w": (5,), "layers/w": (2, 4), "conv": (2, 2, 2)}
    return {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}


def along(means, tree):
    """Returns mᵀ Z of each matrix that has a mean, of each layer."""
    w, layers, conv = tree["w"], tree["layers"]["w"], tree["conv"]
    return [
        np.einsum("i,ij->j", means["w"], w),
        np.einsum("li,lij->lj", means["layers/w"], layers),
        np.einsum("hwc,hwcf->f", means["conv"], conv),
    ]


DIRECTIONS = {
    "gaussian": perturbations.gaussian,
    "rademacher": perturbations.rademacher,
    "sphere": perturbations.sphere,
    "low_rank": lambda: perturbations.low_rank(2),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_sums_and_models_of_clients_are_at_right_angles_to_the_means(name):
    means, base = random_means(), DIRECTIONS[name]()
    directions = activations.orthogonal(base, means)
    direction_keys, scalars = keys.direction_keys(KEY, 3), jnp.asarray([0.5, -2.0, 1.0])

    @jax.jit
    def drawn():
        each = [sums.arrays(directions.sample(direction_keys[i], PARAMS)) for i in range(3)]
        plain = sums.arrays(base.sample(direction_keys[0], PARAMS))
        total = directions.accumulate(direction_keys, PARAMS, scalars)
        if directions.combine is None:
            return each, plain, total, total
        of_each = jax.tree.map(lambda _: scalars, PARAMS)
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        model = sums.arrays(directions.combine(ones, direction_keys, of_each))
        return each, plain, total, jax.tree.map(lambda x: x - 1, model)

    each, plain, total, model = drawn()
    for tree in (*each, total, model):
        for x in along(means, tree):
            np.testing.assert_allclose(x, 0, atol=1e-5)
    assert all(np.abs(x).max() > 0.1 for x in along(means, plain))
    expected = jax.tree.map(lambda *z: sum(s * x for s, x in zip(scalars, z, strict=True)), *each)
    for found in (total, model):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    np.testing.assert_array_equal(each[0]["b"], plain["b"])


def test_their_covariance_is_the_projection():
    """E[z zᵀ] = I − m mᵀ / ‖m‖² of a column, within 5 standard errors an entry."""
    mean, count = jnp.asarray([1.0, 2.0, -1.0]), 20_000
    directions = activations.orthogonal(perturbations.gaussian(), {"w": mean})
    drawn = jax.jit(jax.vmap(lambda key: directions.sample(key, {"w": jnp.zeros((3, 1))})["w"]))(
        jax.random.split(KEY, count)
    )[..., 0]
    products = np.einsum("ni,nj->nij", drawn, drawn)
    expected = np.eye(3) - np.outer(mean, mean) / 6
    error = 5 * products.std(0) / count**0.5
    assert np.all(np.abs(products.mean(0) - expected) <= error)


def test_without_means_directions_stay_as_they_are():
    nothing = jax.tree.map(jnp.zeros_like, random_means())
    directions = activations.orthogonal(perturbations.gaussian(), nothing)
    found, plain = jax.jit(
        lambda: [sums.arrays(z.sample(KEY, PARAMS)) for z in (directions, perturbations.gaussian())]
    )()
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_means_are_found_in_loops_over_layers_calls_and_branches():
    random = np.random.default_rng(1)
    x, w, v, u = (random.normal(size=s) for s in ((7, 5), (4, 5, 5), (5, 5), (5, 2)))
    params = jax.tree.map(jnp.asarray, {"layers": {"w": w}, "v": v, "u": u, "unused": v})

    def loss(p, batch):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, p["layers"]["w"])
        h = jax.lax.fori_loop(0, 3, lambda i, h: h @ p["v"], h)
        h = jax.lax.switch(h.size - 34, [jax.checkpoint(lambda h: h), jax.jit(lambda h: 2 * h)], h)
        out = jax.lax.cond(h.size > 0, lambda h: h @ p["u"], lambda h: h[:, :2], h)
        return jnp.sum(out)

    value, found = jax.jit(lambda p, x: activations.means(loss, p, x))(params, jnp.asarray(x))
    assert found.keys() == {"layers/w", "v", "u"}
    np.testing.assert_allclose(value, loss(params, jnp.asarray(x)), rtol=1e-5)
    h = x
    for layer in range(4):
        np.testing.assert_allclose(found["layers/w"][layer], h.mean(0), atol=1e-5)
        h = np.tanh(h @ w[layer])
    inputs = [h, h @ v, h @ v @ v]
    np.testing.assert_allclose(found["v"], sum(i.mean(0) for i in inputs), atol=1e-4)
    np.testing.assert_allclose(found["u"], 2 * (h @ v @ v @ v).mean(0), rtol=1e-4, atol=1e-4)


def test_a_loop_whose_turns_are_not_known_is_left_out():
    w = jnp.eye(3)

    def loss(p, x):
        return jnp.sum(jax.lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h @ p["w"] + 1, x))

    value, found = activations.means(loss, {"w": w}, jnp.ones((2, 3)))
    assert value == 12 and not found


@pytest.mark.parametrize("target", ["cpu", "tpu"])
def test_a_cnn_has_the_same_means_whatever_it_is_traced_for(target):
    """Those of a kernel are of the windows that it is moved over, zeros at the edges included."""
    model = MODELS["mnist_cnn"].make(3)
    images = jnp.asarray(np.random.default_rng(2).uniform(size=(4, 8, 8, 1)), jnp.float32)
    params = model.init(jax.random.key(0), images)["params"]

    def loss(p, x):
        return jnp.sum(model.apply({"params": p}, x))

    with platforms.tracing(platforms.Target(target)):
        _, found = activations.means(loss, params, images)
    assert {name: x.shape for name, x in found.items()} == {
        "conv1/kernel": (5, 5, 1),
        "conv2/kernel": (5, 5, 16),
        "output/kernel": (2 * 2 * 32,),
    }
    padded = np.pad(images[..., 0], ((0, 0), (2, 2), (2, 2)))
    expected = [[padded[:, i : i + 8, j : j + 8].mean() for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(found["conv1/kernel"][..., 0], expected, rtol=1e-4)


def test_the_mean_output_is_left_alone_and_most_of_the_curvature_with_it():
    """The point of it: of positive inputs, zᵀHz falls by more than half, and E⟨z, g⟩² hardly."""
    random = np.random.default_rng(3)
    x = jnp.asarray(random.uniform(size=(200, 12)), jnp.float32)
    batch = {"features": x, "label": jnp.asarray(random.integers(0, 3, 200))}
    params = {"kernel": jnp.zeros((12, 3)), "bias": jnp.zeros(3)}
    _, found = activations.means(TASK.loss, params, batch)
    np.testing.assert_allclose(found["kernel"], x.mean(0), rtol=1e-5)
    gradient = jax.grad(TASK.loss)(params, batch)

    def figures(directions):
        def one(key):
            z = {**directions.sample(key, params), "bias": jnp.zeros(3)}
            curvature = estimators.inner(z, hessian_product(TASK.loss, params, batch, z))
            return curvature, estimators.inner(z, gradient) ** 2, x.mean(0) @ z["kernel"]

        return jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000))

    plain = figures(perturbations.gaussian())
    away = figures(activations.orthogonal(perturbations.gaussian(), found))
    assert np.abs(away[2]).max() < 1e-5 < np.abs(plain[2]).max()
    assert away[0].mean() < 0.4 * plain[0].mean()
    assert away[1].mean() > 0.8 * plain[1].mean()


def make(count=5, **options):
    def inner(z):
        estimator = estimators.central_difference(count, 1e-2, z)
        return decomfl(TASK.loss, estimator, optax.sgd(0.02, momentum=0.5), **options)

    return inner


BATCH = jax.tree.map(lambda x: x[:BATCH_SIZE], TASK.train.examples)


def test_a_replay_has_the_means_and_their_bytes_are_counted():
    both = centred(make(local_steps=2), perturbations.gaussian(), TASK.loss, BATCH)
    phases = [Phase(0, both.measuring), Phase(1, both.method)]
    simulator = simulation.make_simulator(phases, TASK, clients_per_round=2, batch_size=BATCH_SIZE)
    start = simulator.start(None)
    initial, state, memory = copy(start.state), start.state, start.memory
    pieces = []
    for n in (1, 4):
        state, memory, trace = simulator.advance(state, memory, n)
        pieces.append(trace)
        if n == 1:
            jax.tree.map(np.testing.assert_array_equal, copy(state.params), initial.params)
    kept = copy(state)
    mean = kept.opt_state.means["kernel"]
    np.testing.assert_array_equal(mean, pieces[0].broadcasts["kernel"][0])
    changed = kept.params["kernel"] - initial.params["kernel"]
    np.testing.assert_allclose(mean @ changed, 0, atol=1e-5)
    assert np.abs(changed).max() > 0.01
    replayed = jax.tree.map(jnp.asarray, initial)
    for trace in pieces:
        replayed = simulator.replay(replayed, trace.seeds, trace.broadcasts)
    assert_replayed(copy(replayed), kept, exact=False)
    measuring, method = simulator.sizes
    assert (measuring.upload, measuring.broadcast) == (5 * 4, 5 * 4)
    assert (method.upload, method.broadcast) == (2 * 5 * 4, 2 * 5 * 4)
    assert joined(pieces[1:]).first_round == 1


def test_a_round_that_nobody_uploads_in_leaves_the_means():
    both = centred(make(), perturbations.gaussian(), TASK.loss, BATCH)
    state = both.measuring.init(TASK.init(KEY))
    means = {"kernel": jnp.arange(5.0)}
    known = both.measuring.server(KEY, state, means)
    after = both.measuring.server(KEY, known, jax.tree.map(jnp.zeros_like, means))
    np.testing.assert_array_equal(after.opt_state.means["kernel"], means["kernel"])
    assert int(after.round) == 2


def test_phases_of_one_algorithm_share_its_programs():
    both = centred(make(), perturbations.gaussian(), TASK.loss, BATCH)
    algorithms = (both.measuring, both.method) * 3
    phases = [Phase(r, algorithm) for r, algorithm in enumerate(algorithms)]
    simulator = simulation.make_simulator(phases, TASK, clients_per_round=2, batch_size=BATCH_SIZE)
    compiled = []
    progress = None
    for rounds in (2, 6):
        progress = simulation.run(simulator, rounds=rounds, progress=progress)
        compiled.append(simulator.compile_seconds())
    assert compiled[0] == compiled[1] > 0


def test_low_rank_directions_stay_so():
    directions = activations.orthogonal(perturbations.low_rank(), random_means())

    def both(key):
        moved = directions.add(PARAMS, directions.sample(key, PARAMS), 0.1)
        assert isinstance(moved["w"], sums.LowRank)
        product = structured.evaluate(lambda p: jnp.ones(5) @ p["w"], moved)
        return product, jnp.ones(5) @ moved["w"].array()

    found, expected = jax.jit(both)(KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_flags_choose_the_rounds():
    lines = ["--algorithm=decomfl_groups", "--num_perturbations=4", "--rounds=20"]
    phases = build("--centre_rounds=0,5", "--schedule=3:P=2;5:P=1;9:P=3", *lines).simulator.phases
    assert [phase.first_round for phase in phases] == [0, 1, 3, 5, 6, 9]
    assert phases[0].algorithm is phases[3].algorithm
    assert phases[1].algorithm is not phases[2].algorithm
    warmed = build("--centre_rounds=2,6", "--warmup_rounds=2", *lines).simulator.phases
    assert [phase.first_round for phase in warmed] == [0, 2, 3, 6, 7]
    assert [warmed[i].algorithm is warmed[i + 2].algorithm for i in (1, 2)] == [True, True]
    sizes = build("--centre_rounds=2", "--compression=int8", "--rounds=9").simulator.sizes
    assert [s.upload for s in sizes] == [84, 64 + 4, 84]


def test_what_can_not_hold_is_refused():
    for flags, message in [
        (["--centre_rounds=x"], "--centre_rounds=x is not a list of rounds"),
        (["--centre_rounds=5,5"], "--centre_rounds=5,5 must be rounds from 0 on in their order"),
        (["--centre_rounds=-1"], "--centre_rounds=-1 must be rounds from 0 on"),
        (["--centre_rounds=9", "--rounds=10"], "leaves no round of --rounds=10 after it"),
        (["--centre_rounds=0", "--warmup_rounds=5"], "take 5 or later ones"),
        (["--centre_rounds=0", "--dp=client"], "not possible with differential privacy"),
        (["--centre_rounds=0", "--mask=random"], "with --mask=random, which cuts its directions"),
        (["--centre_rounds=0", "--history=2"], "--centre_rounds=0 is not possible with --history"),
        (["--centre_rounds=0", "--algorithm=hiso"], "which stretches its directions"),
        (["--centre_rounds=0", "--algorithm=fedkseed"], "whose pool has the same directions"),
        (["--centre_rounds=0", "--algorithm=fedzo"], "sent the model without the means"),
        (["--centre_rounds=0", "--algorithm=ferret"], "has no effect with --algorithm=ferret"),
        (["--centre_rounds=0", "--task=quadratic"], "needs a model with products X W"),
        (
            ["--centre_rounds=0", "--aggregator=majority_sign", "--aggregator_size=1"],
            "which makes signs of means",
        ),
        (
            ["--centre_rounds=0", "--deadline=2", "--late_weight=0.5"],
            "--late_weight=0.5 is not possible with --centre_rounds",
        ),
    ]:
        with pytest.raises(Exception, match=message):
            resolve(*flags)
    pool = fedkseed(TASK.loss, estimators.central_difference(1, 1e-2), 0.1, pool_key=KEY)
    estimator = estimators.central_difference(1, 1e-2)
    private = feedsign(TASK.loss, estimator, optax.sgd(0.1), epsilon=2.0, delta=1e-5)
    for algorithm, message in [
        (pool, "whose late clients replay"),
        (private, "which the algorithm's ε does not count"),
    ]:
        with pytest.raises(ValueError, match=message):
            centred(lambda z, a=algorithm: a, perturbations.gaussian(), TASK.loss, BATCH)
    none = centred(make(), perturbations.gaussian(), lambda p, x: jnp.sum(p["w"]), BATCH)
    with pytest.raises(ValueError, match="no product X W"):
        none.measuring.init({"w": jnp.ones((2, 2))})


def test_a_plan_is_of_the_method_and_a_round_of_measuring_has_no_noise(quickly):
    flags = ["--centre_rounds=0,2", "--num_perturbations=2", "--model=softmax"]
    planned = quickly.in_turn("plan", *flags, "--out=plan.json")
    assert planned.code == 0, planned.err
    found = json.loads((quickly.folder / "plan.json").read_text())
    plain = costs.of(build(*flags[1:]).simulator.lowered().program)
    assert found["flops_a_round"] == pytest.approx(plain.products, rel=0.01)
    ran = quickly.in_turn(
        "train", *flags, "--rounds=6", "--eval_every=2", "--diagnose_every=2", "--workdir=run"
    )
    assert ran.code == 0, ran.err
    table = ran.out[ran.out.index("effective rank") :].splitlines()[1:5]
    assert [line.split()[3] == "–" for line in table] == [True, True, False, False]
