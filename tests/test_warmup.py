"""Phases of two methods: what a warm-up leaves to the method after it, its bytes and its flags."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flag_lines import build, resolve
from test_contract import TRACES, counted, serialised
from tiny_simulations import assert_replayed, assert_same_bits, copy, joined
from tiny_tasks import BATCH_SIZE, softmax_task

from zofl_jax import keys
from zofl_jax.algorithms import decomfl, fedavg, fedkseed, feedsign, hiso, scaffold
from zofl_jax.algorithms.warmup import warmed_up
from zofl_jax.conditions.compression import compressed, top_k
from zofl_jax.core import Phase
from zofl_jax.directions import estimators
from zofl_jax.engine import ledger, passes, simulation
from zofl_jax.runs import snapshots

TASK = softmax_task()
COHORT, WARM = 2, 4


def central(count=6):
    return estimators.central_difference(count, 1e-2)


def first_order():
    return fedavg(TASK.loss, optax.sgd(0.05), local_steps=2)


def pool():
    key = keys.pool_key(keys.root(0).shared)
    return fedkseed(TASK.loss, central(1), 0.01, pool_key=key, pool_size=32, local_steps=5)


def scalars(count=6):
    return decomfl(TASK.loss, central(count), optax.sgd(0.01, momentum=0.5), local_steps=2)


PAIRS = {
    "fedavg, decomfl": (first_order, scalars),
    "fedkseed, decomfl": (pool, scalars),
    "fedavg, hiso": (
        first_order,
        lambda: hiso(
            TASK.loss, lambda z: estimators.central_difference(6, 1e-2, z), optax.sgd(0.01)
        ),
    ),
    "fedavg, fedkseed": (first_order, pool),
    "scaffold, decomfl": (lambda: scaffold(TASK.loss, 0.05, share=1 / 3, local_steps=2), scalars),
    "what top-k left out, feedsign": (
        lambda: compressed(first_order(), top_k(0.2), error_feedback=True),
        lambda: feedsign(TASK.loss, central(), optax.sgd(0.01)),
    ),
}
"""The method of a warm-up, and the one after it."""

pairs = pytest.mark.parametrize("name", PAIRS)


@functools.cache
def make(method):
    """Returns the simulator of what a function returns, an algorithm or phases."""
    return simulation.make_simulator(
        method(), TASK, clients_per_round=COHORT, batch_size=BATCH_SIZE
    )


def play(simulator, pieces):
    """Returns state and memory before each dispatch and at the end, and the traces."""
    start = simulator.start(None)
    state, memory = start.state, start.memory
    kept, traces = [copy((state, memory))], []
    for n in pieces:
        state, memory, trace = simulator.advance(state, memory, n)
        kept.append(copy((state, memory)))
        traces.append(trace)
    return kept, traces


class Ran(NamedTuple):
    """A pair's rounds in dispatches of different lengths; the first two are the warm-up."""

    simulator: simulation.Simulator
    kept: list  # state and memory, before each dispatch and at the end
    traces: list
    traced: list  # how often each method's functions were


@functools.cache
def ran(name):
    traced = [collections.Counter(), collections.Counter()]
    pair = [counted(one(), count) for one, count in zip(PAIRS[name], traced, strict=True)]
    simulator = make(lambda: warmed_up(*pair, WARM))
    kept, traces = play(simulator, (1, WARM - 1, 2, 1))
    return Ran(simulator, kept, traces, [collections.Counter(count) for count in traced])


@functools.cache
def alone(method):
    """Returns what the rounds of a warm-up make of the initial model without anything after."""
    return play(make(method), (WARM,))[0][-1][0]


@pairs
def test_the_second_method_goes_on_from_the_model_of_the_first(name):
    """Both do what they do on their own: from the initial model, and from that of round W."""
    first, second = PAIRS[name]
    (middle, _), (end, _) = ran(name).kept[2], ran(name).kept[-1]
    assert_replayed(middle.params, alone(first).params, exact=False)
    after = make(second)
    start = after.start(jax.tree.map(jnp.asarray, middle.params))
    state, _, _ = after.advance(
        start.state._replace(round=jnp.asarray(WARM, jnp.int32)), start.memory, 3
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), end.params, copy(state.params)
    )


@pairs
def test_it_keeps_the_contract(name, tmp_path):
    """Each method is traced as often as alone, types stay, it resumes from disk and replays."""
    simulator, kept, traces, traced = ran(name)
    assert traced == [TRACES, TRACES]
    initial, final = kept[0], kept[-1]
    assert jax.tree.map(jax.typeof, final) == jax.tree.map(jax.typeof, initial)
    snapshots.save(tmp_path, 1, kept[1])
    _, read = snapshots.load_latest(tmp_path, initial, 1)[0]
    state, memory = jax.tree.map(jnp.asarray, read)
    for n in (2, 1, 1, 2):
        state, memory, _ = simulator.advance(state, memory, n)
    assert_same_bits(copy((state, memory)), final)
    replayed = jax.tree.map(jnp.asarray, initial[0])
    for part in (joined(traces[:2]), joined(traces[2:])):
        replayed = simulator.replay(replayed, part.seeds, part.broadcasts)
    assert_replayed(copy(replayed), final[0], exact=False)


@pairs
def test_the_ledger_counts_the_bytes_of_both_methods_messages(name):
    simulator, kept, traces, _ = ran(name)
    key, (state, memory) = jax.random.key(1), kept[-1]
    own = jax.tree.map(lambda m: m[0], memory)
    for phase, sizes, trace in zip(simulator.phases, simulator.sizes, traces[1::2], strict=True):
        algorithm = phase.algorithm
        rows = np.zeros((algorithm.local_steps, BATCH_SIZE), np.int64)
        batches = jax.tree.map(lambda x: x[rows], TASK.train.examples)  # noqa: B023
        upload = jax.eval_shape(algorithm.client, key, state, own, batches, key).upload
        assert ledger.tree_bytes(upload) == sizes.upload
        assert len(serialised(jax.tree.map(lambda x: x[0], trace.broadcasts))) == sizes.broadcast
        sync = algorithm.sync
        assert sizes.sync == (None if sync is None else len(serialised(sync.message(state))))


@pairs
def test_it_descends_in_both_phases(name):
    simulator, kept, *_ = ran(name)
    state, memory = jax.tree.map(jnp.asarray, kept[2])
    last, _, _ = simulator.advance(state, memory, 100)
    found = [kept[0][0].params, kept[2][0].params, last.params]
    losses = [simulator.evaluate(params)["loss"] for params in found]
    assert losses[1] < losses[0] and losses[2] < losses[1]


def test_bytes_are_those_of_messages_that_bring_every_client_up_to_date():
    """Real messages: what the ledger says that a client was sent is enough for the state's bits.

    A client is brought to round W by the model of that round, and by the scalars from there.
    """
    simulator = ran("fedavg, decomfl").simulator
    kept, traces = play(simulator, (WARM, 1, 1, 1, 1, 1, 1))
    first, second = simulator.sizes
    boundary = jax.tree.map(jnp.asarray, kept[1][0])
    algorithm = simulator.phases[0].algorithm
    message = algorithm.sync.message(boundary)
    assert len(serialised(message)) == first.sync == first.params
    assert second.sync is None
    book, rounds = ledger.Ledger(TASK.train.num_clients), sum(len(t.losses) for t in traces)
    late = set(range(TASK.train.num_clients))
    for r in range(rounds):
        sizes = simulator.sizes[r >= WARM]
        cohort = simulator.cohorts(np.asarray([r]))[0]
        new = [c for c in cohort.tolist() if c in late]
        before = book.last_round.copy()
        counted = book.record(cohort, sizes)
        late -= set(cohort.tolist())
        if r < WARM:
            assert counted.broadcast == 0
            continue
        expected = 0
        for c in cohort.tolist():
            # The client's state: what it is sent, or what it had at its last round in this phase.
            held = max(int(before[c]) + 1, WARM)
            sent = [len(serialised(jax.tree.map(lambda x: x[0], traces[t - WARM + 1].broadcasts)))
                    + traces[t - WARM + 1].seeds[0].nbytes for t in range(held, r)]  # fmt: skip
            expected += sum(sent) + (len(serialised(message)) if before[c] < WARM else 0)
        assert counted.catch_up + counted.first_sync == expected
        assert counted.first_sync == len(new) * first.sync
    # What it was sent is the state.
    fresh = algorithm.init(TASK.init(simulator.root.init))._replace(round=boundary.round)
    restored = algorithm.sync.restore(fresh, message)
    scalars = joined(traces[1:])
    state = simulator.replay(restored, scalars.seeds, scalars.broadcasts)
    assert_replayed(copy(state), kept[-1][0], exact=False)


def test_the_pool_s_accumulators_bring_a_client_to_the_second_phase():
    """Of fedkseed in the warm-up: n accumulators and the initial params, then the scalars."""
    simulator, kept, traces, _ = ran("fedkseed, decomfl")
    boundary = jax.tree.map(jnp.asarray, kept[2][0])
    sync = simulator.phases[0].algorithm.sync
    fresh = simulator.phases[0].algorithm.init(TASK.init(simulator.root.init))
    restored = sync.restore(fresh._replace(round=boundary.round), sync.message(boundary))
    scalars = joined(traces[2:])
    state = simulator.replay(restored, scalars.seeds, scalars.broadcasts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-5),
        copy(state.params), kept[-1][0].params,
    )  # fmt: skip


def test_a_pool_after_the_warm_up_adds_to_its_last_model():
    """The accumulators say what came since round W, so a late client needs that model first."""
    simulator, kept, *_ = ran("fedavg, fedkseed")
    (middle, _), (end, _) = kept[2], kept[-1]
    sync = simulator.phases[1].algorithm.sync
    assert sync.since == WARM and not sync.alone
    message = sync.message(jax.tree.map(jnp.asarray, end))
    base = jax.tree.map(jnp.asarray, middle)._replace(round=jnp.asarray(end.round))
    restored = sync.restore(base, message)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-5),
        copy(restored.params), end.params,
    )  # fmt: skip
    book = ledger.Ledger(3)
    dense = ledger.MessageSizes(8, 100, 100, 100, sync=100, sync_alone=True)
    pairs = ledger.MessageSizes(8, 30, 60, 100, sync=128, sync_since=2)
    for cohort, sizes in (([0], dense), ([0, 1], dense)):
        book.record(cohort, sizes)
    # Of round 2, 100 bytes of the model each; client 2 is new.
    assert book.record([0, 2], pairs)[3:] == (100, 100)
    assert book.record([0], pairs)[3:] == (68, 0)  # it has the model of round 2
    assert book.record([0], pairs)[3:] == (68, 0)
    # Client 1: the model, and the accumulators in place of three broadcasts.
    assert book.record([1], pairs)[3:] == (100 + 128, 0)


def test_without_a_message_of_the_present_phase_the_one_of_the_last_phase_is_sent():
    book = ledger.Ledger(4)
    dense = ledger.MessageSizes(8, 100, 100, 100, sync=100, sync_alone=True)
    few = ledger.MessageSizes(8, 20, 20, 100)
    assert book.record([0, 1], dense) == ledger.RoundBytes(200, 16, 0, 0, 200)
    assert book.record([0], dense) == ledger.RoundBytes(100, 8, 0, 100, 0)
    assert book.record([0, 2], few) == ledger.RoundBytes(40, 16, 40, 100, 100)
    assert book.record([1, 0], few) == ledger.RoundBytes(40, 16, 40, 100 + 28, 0)
    assert book.record([3], few) == ledger.RoundBytes(20, 8, 20, 56, 100)


def test_phases_of_the_second_method_begin_with_it_or_later():
    phases = warmed_up(first_order(), [Phase(0, scalars(1)), Phase(3, scalars(2)),
                                       Phase(9, scalars(3))], WARM)  # fmt: skip
    assert [phase.first_round for phase in phases] == [0, WARM, 9]
    assert [phase.algorithm.passes.forward for phase in phases] == [2, 8, 12]
    assert passes.total(phases, [3] * 10) == (4 * 3 * 2 + 5 * 3 * 8 + 3 * 12, 4 * 3 * 2)
    with pytest.raises(ValueError, match="rounds of a warm-up must be >= 1, got 0"):
        warmed_up(first_order(), scalars(), 0)


JOIN = ("--late_joiners=0.2", "--join_by=5")
FLAGS = ("--warmup_rounds=3", "--rounds=8", "--num_clients=10", "--clients_per_round=4")


def test_the_flags_make_both_phases():
    simulator = build(*FLAGS, "--local_steps=2", "--num_perturbations=5").simulator
    first, second = simulator.phases
    assert (first.first_round, second.first_round) == (0, 3)
    assert (first.algorithm.local_steps, second.algorithm.local_steps) == (2, 2)
    assert simulator.sizes[0].upload == simulator.sizes[0].params
    assert simulator.sizes[1].upload == 4 * 2 * 5
    config = resolve(*FLAGS, "--warmup=fedkseed", "--warmup_learning_rate=0.25")
    assert config.warmup_learning_rate == 0.25
    assert config.flat()["warmup_rounds"] == 3
    assert resolve(*FLAGS).warmup_learning_rate == resolve("--algorithm=fedavg").learning_rate


def test_the_schedule_of_the_learning_rate_counts_the_rounds_of_the_warm_up():
    """A factor from round 4 on: the fifth round's step is half of that without it."""
    flags = (*FLAGS, "--momentum=0", "--local_steps=1", "--learning_rate=0.01")

    def steps(*more):
        simulator = build(*flags, *more).simulator
        kept, _ = play(simulator, (3, 1, 1))
        leaves = [jax.tree.leaves(state.params)[0] for state, _ in kept]
        return leaves[2] - leaves[1], leaves[3] - leaves[2]

    plain, halved = steps(), steps("--schedule=4:lr=0.5")
    np.testing.assert_allclose(halved[0], plain[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(halved[1], plain[1] / 2, rtol=1e-3, atol=1e-6)


def test_clients_that_can_not_afford_it_join_after_the_warm_up():
    simulator = build(*FLAGS, "--warmup_share=0.5").simulator
    found = simulator.attendance(np.arange(40))
    asked = [set(c[t].tolist()) for c, t in zip(found.cohort, found.there, strict=True)]
    able, everyone = set.union(*asked[:3]), set.union(*asked[3:])
    assert len(able) <= 5 and everyone == set(range(10))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup_share=0.5"], "--warmup_share has no effect without --warmup_rounds"),
        (["--warmup=fedkseed"], "--warmup has no effect without --warmup_rounds"),
        (["--warmup_rounds=8", "--rounds=8"], "--warmup_rounds=8 leaves none of --rounds=8"),
        ([*FLAGS, "--algorithm=feedsign", "--feedsign_epsilon=1"], "the privacy of --algorithm=f"),
        ([*FLAGS, "--deadline=2", "--late_weight=0.5"], "--late_weight=0.5 is not possible with"),
        ([*FLAGS, "--mask=random"], "--mask=random is not possible with --warmup=fedavg, whose g"),
        ([*FLAGS, "--dp=example"], "in the rounds of --warmup=fedavg: --dp=example clips each"),
        ([*FLAGS, "--dp=client", "--warmup_share=0.5"], "--warmup_share=0.5 is not possible with"),
        ([*FLAGS, "--objective=accuracy"], "in the rounds of --warmup=fedavg: --objective=accur"),
        (
            [*FLAGS, "--warmup=fedkseed", "--aggregator=median"],
            "in the rounds of --warmup=fedkseed: --aggregator=median is not possible with",
        ),
        (
            [*FLAGS, "--warmup=fedkseed", "--compression=top_k"],
            "in the rounds of --warmup=fedkseed: --compression=top_k is not possible",
        ),
    ],
    ids=lambda each: str(each)[-30:],
)
def test_what_one_of_the_methods_can_not_do_is_refused(flags, message):
    with pytest.raises(Exception, match=message):
        resolve(*flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--aggregator=median", "--attack=sign_flip", "--malicious_share=0.2", "--schedule=4:P=2"],
        ["--dp=client", "--dp_noise=0.5"],
        ["--secure_sum"],
        ["--compression=int8", "--dropout=0.3", "--warmup_share=0.6", *JOIN],
        ["--compression=top_k"],
        ["--warmup=fedkseed", "--warmup_local_steps=3", "--mask=random"],
    ],
    ids=lambda each: each[0],
)
def test_conditions_hold_in_both_phases(flags):
    simulator = build(*FLAGS, "--num_perturbations=2", "--local_steps=1", *flags).simulator
    progress = simulation.run(simulator, rounds=6)
    assert np.isfinite(progress.history[-1].metrics["loss"])
    if flags[0] == "--dp=client":
        assert 0 < progress.history[-1].epsilon < 1e4
