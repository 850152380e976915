"""FZOO, MEAZO and R-AdaZO: steps whose length the scalars tell, as their papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import resolve
from tiny_tasks import softmax_task

from experiments.entry import UserError
from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.algorithms.step_rules import WithRule, normalized, radazo, second_moment
from zofl_jax.configuration.phases import build_phases
from zofl_jax.directions import estimators, perturbations, sums

KEY = keys.round_key(keys.root(0).shared, 0)
TASK = softmax_task()
BATCHES = jax.tree.map(lambda x: x[:24].reshape(3, 2, 4, *x.shape[1:]), TASK.train.examples)
MU, RATE, P = 1e-2, 0.1, 5


def after_a_round(algorithm, batches=BATCHES):
    """Returns (broadcast, state before, state after) of three clients."""

    @jax.jit
    def whole():
        state = algorithm.init(TASK.init(KEY))
        clients = jax.vmap(algorithm.client, in_axes=(None, None, None, 0, None))
        steps = jax.tree.map(lambda b: b[:, : algorithm.local_steps], batches)
        broadcast = algorithm.aggregate(clients(KEY, state, (), steps, KEY).upload, jnp.ones(3))
        return broadcast, state, algorithm.server(KEY, state, broadcast)

    return whole()


def test_fzoo_divides_by_the_spread_of_the_cohort_s_perturbed_losses():
    """σ of the mean losses at x + μ z_p, which nobody sends: it is μ times that of the scalars."""
    estimator = estimators.forward_difference(P, MU)
    rule = decomfl(TASK.loss, estimator, optax.sgd(RATE), step_rule=normalized())
    _, before, after = after_a_round(rule)
    gaussian, x = perturbations.gaussian(), before.params

    @jax.jit
    @jax.vmap
    def mean_loss(key):
        moved = sums.arrays(gaussian.add(x, gaussian.sample(key, x), MU))
        firsts = jax.tree.map(lambda b: b[:, 0], BATCHES)
        return jnp.mean(jax.vmap(TASK.loss, (None, 0))(moved, firsts))

    drawn = keys.direction_keys(keys.step_key(KEY, 0), P)
    losses = np.asarray(mean_loss(drawn), np.float64)
    plain = decomfl(TASK.loss, estimator, optax.sgd(RATE))
    _, _, straight = after_a_round(plain)
    for name, start in x.items():
        step = MU * (start - straight.params[name]) / losses.std(ddof=1)
        # Differences of losses in float32 over μ.
        np.testing.assert_allclose(start - after.params[name], step, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("rule", [normalized(), second_moment(0.9)])
def test_a_step_is_as_long_whatever_the_loss_is_multiplied_by(rule):
    def made(factor):
        def loss(x, batch):
            return factor * TASK.loss(x, batch)

        estimator = estimators.central_difference(P, MU)
        return decomfl(loss, estimator, optax.sgd(RATE), local_steps=2, step_rule=rule)

    (_, start, one), (_, _, other) = after_a_round(made(1.0)), after_a_round(made(64.0))
    for name, x in one.params.items():
        np.testing.assert_allclose(x, other.params[name], atol=2e-3 * RATE)
        assert abs(x - start.params[name]).max() > 1e-2 * RATE


def test_meazo_keeps_one_running_second_moment_of_the_mean_scalar():
    """Three steps by hand, of rounds and local steps alike."""
    estimator, beta = estimators.projection(P), 0.75
    algorithm = decomfl(TASK.loss, estimator, optax.sgd(RATE), step_rule=second_moment(beta))
    plain = decomfl(TASK.loss, estimator, optax.sgd(RATE))
    state, v = algorithm.init(TASK.init(KEY)), 0.0
    assert isinstance(state.opt_state, WithRule)
    for t, scalars in enumerate(np.random.default_rng(0).normal(size=(3, 1, P)), start=1):
        sent = jnp.asarray(scalars, jnp.float32)
        v = beta * v + (1 - beta) * scalars.mean() ** 2
        scaled = sent / np.sqrt(v / (1 - beta**t))
        same = plain.init(state.params)
        expected = jax.jit(plain.server)(KEY, same, scaled.astype(jnp.float32))
        state = jax.jit(algorithm.server)(KEY, state, sent)
        for name, x in state.params.items():
            np.testing.assert_allclose(x, expected.params[name], rtol=1e-4, atol=1e-5)
    assert float(state.opt_state.rule.mean_square) == pytest.approx(v, rel=1e-5)


def test_clients_of_shared_coefficients_follow_the_rule_too():
    """Low-rank directions: as coefficients, and with params of each client's own."""
    shared = perturbations.low_rank()
    uploads = [
        after_a_round(
            decomfl(
                TASK.loss,
                estimators.central_difference(P, MU, perturbation),
                optax.sgd(RATE, momentum=0.5),
                local_steps=2,
                step_rule=second_moment(),
            )
        )[0]
        for perturbation in (shared, shared._replace(combine=None))
    ]
    np.testing.assert_allclose(*uploads, rtol=1e-2, atol=1e-3)
    assert abs(uploads[0]).max() > 0.1


def test_r_adazo_s_second_moment_is_of_the_first():
    optimizer, x = radazo(RATE, b1=0.5, b2=0.75, eps=1e-4), jnp.zeros(2)
    state, m, v, expected = optimizer.init(x), np.zeros(2), np.zeros(2), np.zeros(2)
    for slope in ([1.0, -2.0], [0.1, 0.0], [-3.0, 0.5]):
        updates, state = optimizer.update(jnp.array(slope), state, x)
        x = optax.apply_updates(x, updates)
        m = 0.5 * m + 0.5 * np.array(slope)
        v = 0.75 * v + 0.25 * m**2
        expected = expected - RATE * m / np.sqrt(v + 1e-4)
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_settings_make_the_rule_and_its_rate():
    rates = {}
    for rule in ("plain", "fzoo", "meazo"):
        config = resolve(f"--step_rule={rule}", "--num_perturbations=4")
        state = build_phases(config, TASK)[0].algorithm.init(TASK.init(KEY))
        assert isinstance(state.opt_state, WithRule) == (rule != "plain")
        rates[rule] = config.learning_rate
    # At a gradient of norm 1/2 a step is as long: scalars have a spread of 1/2, a mean of 1/4.
    assert rates["fzoo"] == pytest.approx(rates["plain"] / 2, rel=0.05)
    assert rates["meazo"] == pytest.approx(rates["plain"] / 4, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--algorithm=fedavg", "--step_rule=fzoo"],
            "--step_rule has no .* choose decomfl or mezo",
        ),
        (
            ["--step_rule=fzoo", "--optimizer=adam"],
            "--step_rule has no effect with --optimizer=adam",
        ),
        (
            ["--step_rule=fzoo", "--step_decay=0.5"],
            "--step_decay has no effect with .* choose meazo",
        ),
        (["--step_rule=meazo", "--deadline=1", "--late_weight=0.5"], "whatever an upload weighs"),
        (
            ["--optimizer=radazo", "--momentum=0.5"],
            "--momentum has no effect with --optimizer=radazo",
        ),
    ],
)
def test_what_does_not_go_with_a_rule_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve(*arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: second_moment(1.0), r"must be in \[0, 1\), got 1.0"),
        (lambda: radazo(0.1, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: radazo(0.1, eps=0.0), "eps must be positive, got 0.0"),
        (
            lambda: decomfl(
                TASK.loss, estimators.projection(1), optax.sgd(0.1), step_rule=normalized()
            ),
            "the step rule needs num_perturbations >= 2, got 1",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
