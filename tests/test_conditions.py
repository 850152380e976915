"""Rounds in which clients are absent, late or malicious: what is lost is theirs alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from test_rounds import counting
from tiny_simulations import COHORT, advance, assert_same_bits, copy, joined, start
from tiny_tasks import BATCH_SIZE, CLIENT_SIZES, poisoned_task, softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, fedsgd, feedsign, scaffold
from zofl_jax.conditions import aggregation, attacks, compression, participation, privacy
from zofl_jax.conditions.participation import Attendance
from zofl_jax.conditions.staleness import with_late_uploads
from zofl_jax.core import Algorithm, ClientResult, Phase, ServerState
from zofl_jax.data import batches
from zofl_jax.directions import estimators, perturbations
from zofl_jax.engine import simulation
from zofl_jax.engine.rounds import Conditions
from zofl_jax.runs import recording
from zofl_jax.runs.directory import RunError, open_run
from zofl_jax.tasks.quadratic import quadratic

POPULATION = len(CLIENT_SIZES)
ROUNDS = 8
EVERYONE = participation.everyone(POPULATION, COHORT)
BOTH = [1, 5]
TWO = jnp.isin(jnp.arange(POPULATION), jnp.array(BOTH))  # who is malicious, or absent


def gradients(task, aggregate=aggregation.mean) -> Algorithm:
    """SGD with momentum on the mean gradient, which clients upload as [2, 9]: quick to compile."""

    def flat(tree):
        return ravel_pytree(tree)[0].reshape(2, 9)

    def init(params):
        return ServerState(params, flat(params) * 0, jnp.zeros((), jnp.int32))

    def client(shared_key, state, memory, batches, own_key):
        batch = jax.tree.map(lambda b: b[0], batches)
        loss, gradient = jax.value_and_grad(task.loss)(state.params, batch)
        return ClientResult(flat(gradient), memory, {"loss": loss})

    def server(key, state, broadcast):
        momentum = 0.9 * state.opt_state + broadcast
        params, back = ravel_pytree(state.params)
        return ServerState(back(params - 0.05 * momentum.ravel()), momentum, state.round + 1)

    return Algorithm(init, client, aggregate, server, 1)


def scalars(task, aggregate=aggregation.mean) -> Algorithm:
    estimator = estimators.forward_difference(3, 1e-2, perturbations.rademacher())
    return decomfl(task.loss, estimator, optax.sgd(0.05), aggregate=aggregate)


def make(conditions, task=None, method=None, **options):
    task = task or softmax_task()
    options = {"clients_per_round": COHORT, "batch_size": BATCH_SIZE, **options}
    method = method or gradients(task)
    return simulation.make_simulator(method, task, conditions=conditions, **options)


def without(absent, attend=EVERYONE):
    """The participation in which uploads of some clients are lost."""

    def lossy(root, round_index):
        found = attend(root, round_index)
        kept = found.uploaded & ~absent[found.cohort]
        return Attendance(found.cohort, found.there, kept, found.in_time & kept)

    return lossy


def tampered(**what):
    return Conditions(adversary=attacks.Adversary(TWO, **what))


# Bad messages.


BAD = jnp.array([jnp.nan, jnp.inf, -1e4])  # one for each place in the cohort


def bad_numbers(key, uploads, malicious, present):
    bad = (malicious & present)[:, None, None]
    return jnp.where(bad, uploads.at[:, 0, :2].set(BAD[:, None]), uploads)


def test_a_bad_message_loses_nothing_but_its_sender():
    """The run has the bits of the run in which the sender's uploads never arrived."""
    simulator = make(tampered(attack=bad_numbers)._replace(max_message=1e3))
    state, (trace,) = advance(simulator, start(simulator), [ROUNDS])
    healthy = make(Conditions(attend=without(TWO)))
    expected, (other,) = advance(healthy, start(healthy), [ROUNDS])
    assert_same_bits(state, expected)
    np.testing.assert_array_equal(trace.broadcasts, other.broadcasts)
    np.testing.assert_array_equal(trace.losses, other.losses)
    present = np.isin(trace.cohorts, BOTH)
    assert present.any(axis=0).all(), "each kind of bad number is sent"
    assert trace.rejected.tolist() == present.sum(axis=1).tolist()
    assert not np.any(other.rejected)
    assert trace.failed_loss is None


def test_without_anything_wrong_every_bit_is_that_of_a_plain_run():
    everything = Conditions(EVERYONE, attacks.Adversary(jnp.zeros(POPULATION, bool)), 1e6)
    plain, conditioned = make(Conditions()), make(everything)
    expected, _ = advance(plain, start(plain), [ROUNDS])
    state, _ = advance(conditioned, start(conditioned), [ROUNDS])
    assert_same_bits(state, expected)


def test_a_round_of_bad_messages_alone_has_diverged():
    everybody = attacks.Adversary(jnp.ones(POPULATION, bool), attacks.constant(np.nan))
    simulator = make(Conditions(adversary=everybody))
    with pytest.raises(simulation.Diverged, match="round 0 diverged") as failure:
        simulation.run(simulator, rounds=3)
    assert_same_bits(failure.value.progress.state, start(simulator))


@pytest.mark.parametrize("method", ["signs", "secure sum"])
def test_a_loss_that_is_not_finite_stops_nobody_else(method):
    """Where uploads can't say so; the loss is the mean of the others'."""
    methods = {
        "signs": lambda task: feedsign(
            task.loss, estimators.forward_difference(1, 1e-2), optax.sgd(0.05)
        ),
        "secure sum": lambda task: privacy.fixed_point(gradients(task), 16, 100.0, COHORT),
    }
    first = int(EVERYONE(keys.root(0), 0).cohort[0])
    task = poisoned_task(first)
    simulator = make(Conditions(), task, methods[method](task))
    _, (trace,) = advance(simulator, start(simulator), [ROUNDS])
    assert trace.failed_loss is None
    assert np.all(np.isfinite(trace.losses)) and len(trace.losses) == ROUNDS
    others = make(Conditions(attend=without(jnp.arange(POPULATION) == first)))
    _, (expected,) = advance(others, start(others), [1])
    np.testing.assert_allclose(trace.losses[0], expected.losses[0], rtol=1e-5)


def test_a_round_without_uploads_is_a_round_of_zeros():
    """The momentum of the rounds before goes on; the loss is that of the work in vain."""
    nobody = jnp.ones(POPULATION, bool)

    def attend(root, r):
        return jax.tree.map(
            lambda lost, kept: jnp.where(r == 2, lost, kept),
            without(nobody)(root, r),
            EVERYONE(root, r),
        )

    simulator = make(Conditions(attend=attend))
    state, traces = advance(simulator, start(simulator), [4])
    trace = joined(traces)
    assert not np.any(trace.broadcasts[2])
    assert np.all(trace.broadcasts[[0, 1, 3]] != 0)
    assert np.all(np.isfinite(trace.losses))
    assert int(state.round) == 4
    replayed = simulator.replay(start(simulator), trace.seeds, trace.broadcasts)
    assert_same_bits(copy(replayed), state)


def test_only_clients_that_counted_remember():
    """Absent and rejected ones alike have their memory as it was."""
    for conditions in (
        Conditions(attend=without(TWO)),
        tampered(attack=attacks.constant(np.nan)),
    ):
        simulator = make(conditions, method=counting())
        progress = simulator.start(jnp.zeros(()))
        _, memory, trace = simulator.advance(progress.state, progress.memory, ROUNDS)
        times = [int(np.sum(trace.cohorts == c)) for c in range(POPULATION)]
        assert memory.rounds.tolist() == [
            0 if client in BOTH else count for client, count in enumerate(times)
        ]
        assert sum(times[client] for client in BOTH) > 0


class HalfARound(NamedTuple):
    """An accountant of ε = 1/2 a round."""

    delta: float

    def __call__(self, exposure):
        return 0.5 * sum(exposure.contributors.values())


def test_the_history_tells_what_was_rejected_also_after_a_resume(tmp_path):
    conditions = tampered(attack=attacks.constant(np.nan))
    method = gradients(softmax_task())._replace(accountant=HalfARound(1e-5))
    simulator = make(conditions, method=method)
    with open_run(tmp_path / "run", {}) as run:
        progress, _ = recording.restore(run, simulator)
        whole = simulation.run(
            simulator,
            rounds=ROUNDS,
            eval_every=4,
            progress=progress,
            on_rounds=functools.partial(recording.write_rounds, run),
            on_record=functools.partial(recording.write_record, run),
        )
        restored, _ = recording.restore(run, simulator)
        spent = [recording.epsilon(run, simulator, n) for n in range(ROUNDS + 1)]
        logged = {n: m["rejected"] for n, m in run.log.metrics().items() if "rejected" in m}
        with pytest.raises(RunError, match="round 9 is not in the log, which holds 8 rounds"):
            recording.epsilon(run, simulator, ROUNDS + 1)
    # Of every round, evaluated or not.
    assert spent == [0.5 * n for n in range(ROUNDS + 1)]
    cohorts = simulator.cohorts(np.arange(ROUNDS))
    counts = [int(np.isin(cohorts[:n], BOTH).sum()) for n in (4, ROUNDS)]
    # With the state after the round.
    of_rounds = enumerate(np.isin(cohorts, BOTH).sum(axis=1).tolist())
    assert logged == {r + 1: count for r, count in of_rounds if count}
    assert [record.rejected for record in whole.history] == counts
    assert [record.row()["epsilon"] for record in whole.history] == [2.0, 4.0]
    assert restored.history == whole.history
    assert restored.ledger.totals == whole.ledger.totals
    assert restored.ledger.rejected == whole.ledger.rejected == counts[-1]
    assert restored.ledger.contributors == whole.ledger.contributors
    assert_same_bits(restored.state, whole.state)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_scaffold_s_control_is_the_mean_of_the_clients_whoever_is_absent(weighting):
    """c = Σ c_i / N over the population, also where some of a cohort are lost or too late."""
    task = softmax_task()
    attend = participation.partial(POPULATION, COHORT, dropout=0.3, deadline=1.5)
    method = scaffold(task.loss, 0.1, share=COHORT / POPULATION, local_steps=2)
    simulator = make(Conditions(attend=attend), task, method, weighting=weighting)
    progress = simulator.start(None)
    state, memory, trace = simulator.advance(progress.state, progress.memory, ROUNDS)
    counts = trace.attendance.in_time.sum(axis=1)
    assert counts.min() < counts.max() == COHORT
    for c, own in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(memory), strict=True):
        assert np.any(np.abs(c) > 1e-3)
        np.testing.assert_allclose(c, own.mean(axis=0), rtol=1e-4, atol=1e-6)


# Attacks.


@pytest.mark.parametrize("method", [scalars, gradients])
def test_attacks_and_rules_are_for_scalars_and_for_models(method):
    """A round's broadcast is the rule on the attacked uploads, whatever they are."""
    task, rule = softmax_task(), aggregation.krum(0)
    seen = {}

    def spy(key, uploads, malicious, present):
        sent = attacks.inner_product(3.0)(key, uploads, malicious, present)
        jax.debug.callback(lambda **kw: seen.update(kw), before=uploads, sent=sent)
        return sent

    simulator = make(tampered(attack=spy), task, method(task, rule))
    _, (trace,) = advance(simulator, start(simulator), [1])
    jax.effects_barrier()
    malicious = np.isin(trace.cohorts[0], BOTH)
    expected = attacks.inner_product(3.0)(None, seen["before"], malicious, np.ones(COHORT, bool))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(seen["sent"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    broadcast = rule(jax.tree.map(jnp.asarray, seen["sent"]), jnp.ones(COHORT))
    for a, b in zip(jax.tree.leaves(broadcast), jax.tree.leaves(trace.broadcasts), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-5)


@functools.cache
def voted(flipping):
    """Returns the broadcast of six clients with the same loss, of whom so many flip their signs."""
    task = quadratic(
        jax.random.key(0), dim=8, effective_rank=4.0, num_clients=POPULATION, heterogeneity=0.0
    ).task
    method = feedsign(task.loss, estimators.central_difference(5, 1e-2), optax.sgd(1e-3))
    adversary = attacks.Adversary(jnp.arange(POPULATION) < flipping, attacks.sign_flip())
    conditions = Conditions(adversary=adversary) if flipping else Conditions()
    simulator = make(conditions, task, method, clients_per_round=POPULATION, batch_size=1)
    _, (trace,) = advance(simulator, start(simulator), [1])
    return 1 - 2 * compression.unpack(jnp.asarray(trace.broadcasts[0]), 1, 5).astype(int)


@pytest.mark.parametrize(("flipping", "sign"), [(2, 1), (4, -1)])
def test_a_majority_of_signs_withstands_a_minority_that_flips_them(flipping, sign):
    """The broadcast is the honest one, or its opposite."""
    sent, received = voted(0), voted(flipping)
    assert len(set(sent.tolist())) == 2
    np.testing.assert_array_equal(received, sign * sent)


def test_flipped_labels_are_those_of_a_client_that_holds_them():
    task = softmax_task()
    owners = np.repeat(np.arange(POPULATION), CLIENT_SIZES)
    labels = np.array(task.train.examples["label"])
    mine = np.asarray(task.train.order)[np.isin(owners, BOTH)]
    labels[mine] = 2 - labels[mine]
    examples = {**task.train.examples, "label": jnp.asarray(labels)}
    liar = task._replace(train=task.train._replace(examples=examples))
    honest = make(Conditions(), liar)
    expected, _ = advance(honest, start(honest), [ROUNDS])
    simulator = make(tampered(data_attack=attacks.label_flip(3)))
    state, _ = advance(simulator, start(simulator), [ROUNDS])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# Participation.


def test_the_ledger_counts_what_was_sent():
    """Those not there neither send nor receive; a lost upload isn't sent, a late one is."""
    trace = np.ones((3, POPULATION), bool)
    trace[1, :4] = False
    attend = participation.partial(
        POPULATION, COHORT, dropout=0.3, deadline=1.0, availability=trace
    )
    simulator = make(Conditions(attend=attend))
    progress = simulation.run(simulator, rounds=30)
    found = simulator.attendance(np.arange(30))
    assert found.there.sum() > found.uploaded.sum() > found.in_time.sum() > 0
    totals, sizes = progress.ledger.totals, simulator.sizes[0]
    assert totals.upload == found.uploaded.sum() * sizes.upload
    assert totals.seed == found.there.sum() * sizes.seed
    assert totals.broadcast == found.there.sum() * sizes.broadcast
    seen = np.unique(found.cohort[found.there])
    assert totals.first_sync == len(seen) * sizes.params
    counts = found.in_time.sum(axis=1)
    assert progress.ledger.contributors == {
        int(n): int(np.sum(counts == n)) for n in np.unique(counts)
    }
    times = [int(np.sum(found.cohort[found.there] == c)) for c in range(POPULATION)]
    assert progress.ledger.times.tolist() == times


def late_setup(make_method):
    task = softmax_task()
    attend = participation.partial(POPULATION, COHORT, deadline=1.0, spread=1.0)
    method = make_method(task)
    delayed = with_late_uploads(method, 0.5)
    return method, make(Conditions(attend=attend), task, delayed)


def test_late_uploads_move_the_model_along_their_own_directions():
    """x − lr · the mean of all uploads' directions, in which a late one weighs a half."""
    method, simulator = late_setup(scalars)
    progress = simulator.start(None)
    state, memory = progress.state, progress.memory
    estimator = estimators.forward_difference(3, 1e-2, perturbations.rademacher())
    late_directions, seen = [], set()
    client_part, expand = jax.jit(method.client), jax.jit(estimator.expand)
    for r in range(5):
        before = copy(state)
        inner = before._replace(opt_state=before.opt_state.inner)
        state, memory, trace = simulator.advance(state, memory, 1)
        key = jax.random.wrap_key_data(jnp.asarray(trace.seeds[0]))
        fresh, late = [], []
        for client, in_time in zip(
            trace.cohorts[0].tolist(), trace.attendance.in_time[0], strict=True
        ):
            mine = one_batch(simulator, r, client)
            upload = client_part(key, inner, (), mine, key).upload[0]
            step_key = jax.random.fold_in(key, 0)
            direction = expand(step_key, inner.params, upload)
            (fresh if in_time else late).append(direction)
        parts = [(1.0, d) for d in fresh] + [(0.5, d) for d in late_directions]
        seen.add((bool(fresh), bool(late_directions)))
        total = sum(w for w, _ in parts)
        expected = before.params
        for weight, direction in parts:
            expected = jax.tree.map(
                lambda x, z, share=weight / total: x - 0.05 * share * z, expected, direction
            )
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
        late_directions = late
    assert (True, True) in seen


def one_batch(simulator, r, client):
    key = keys.batch_key(simulator.root.batches, r, client)
    return batches.sample(key, simulator.task.train, client, BATCH_SIZE, 1)


def test_clients_remember_what_they_uploaded_late():
    """It will be used, so it is not to be sent again; what was lost is."""
    attend = participation.partial(POPULATION, COHORT, deadline=1.0, spread=1.0, dropout=0.3)
    method = with_late_uploads(counting()._replace(aggregate=aggregation.mean), 0.5)
    simulator = make(Conditions(attend=attend), method=method)
    progress = simulator.start(jnp.zeros(()))
    _, memory, trace = simulator.advance(progress.state, progress.memory, ROUNDS)
    found = trace.attendance
    assert np.sum(found.there) > np.sum(found.uploaded) > np.sum(found.in_time)
    times = [int(np.sum(found.cohort[found.uploaded] == c)) for c in range(POPULATION)]
    assert memory.clients.rounds.tolist() == times


def test_a_schedule_of_the_learning_rate_follows_the_rounds_with_late_uploads():
    """A slope of one along the ones: each round is a step of that round's rate."""
    rates = jnp.array([1.0, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0])
    method = fedsgd(None, optax.sgd(lambda count: rates[count]))
    algorithm = with_late_uploads(method, 1.0)
    state, half = algorithm.init(jnp.zeros(2)), jnp.full(2, 0.5)
    for r in range(4):
        state = algorithm.server(keys.round_key(keys.root(0).shared, r), state, (half, half))
        np.testing.assert_allclose(state.params, -np.sum(rates[: r + 1]))
    assert int(state.round) == 4


def test_late_uploads_replay_and_resume_to_the_same_bits(tmp_path):
    _, simulator = late_setup(gradients)
    with open_run(tmp_path / "run", {}) as run:
        progress, _ = recording.restore(run, simulator)
        whole = simulation.run(
            simulator,
            rounds=ROUNDS,
            progress=progress,
            on_rounds=functools.partial(recording.write_rounds, run),
        )
        final = copy(whole.state)
        rebuilt, same = recording.rebuild(run, simulator, ROUNDS)
        assert same
        assert_same_bits(copy(rebuilt), final)
        # What was late is in no log, so a resume runs the rounds again.
        restored, notice = recording.restore(run, simulator)
        assert "run again" in notice
        again = simulation.run(simulator, rounds=ROUNDS, progress=restored)
    assert_same_bits(copy(again.state), final)
    assert simulator.sizes[0].broadcast == 2 * simulator.sizes[0].upload


def test_what_late_uploads_need_is_said():
    task = softmax_task()
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        with_late_uploads(scalars(task), 0)

    def phase(first, count):
        estimator = estimators.forward_difference(count, 1e-2)
        method = decomfl(task.loss, estimator, optax.sgd(0.1))
        return Phase(first, with_late_uploads(method, 0.5))

    with pytest.raises(ValueError, match="late uploads can't be used where phases differ"):
        make(Conditions(), task, [phase(0, 1), phase(3, 2)])
    simulator = make(Conditions(), task, phase(0, 1).algorithm, prng_impl="threefry4x32")
    with pytest.raises(ValueError, match=r"given prng_impl='threefry2x32', and the run's.*4x32"):
        simulation.run(simulator, rounds=1)
