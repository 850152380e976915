"""Progress that comes back from a run directory is the progress that was lost."""

import copy
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from zofl_jax import keys
from zofl_jax.algorithms import decomfl
from zofl_jax.core import ClientResult, Phase
from zofl_jax.directions import estimators
from zofl_jax.engine import rounds, simulation
from zofl_jax.runs import recording
from zofl_jax.runs.directory import Run, RunError, open_run
from zofl_jax.tasks import quadratic

FLAGS = {"seed": 0}
EVAL_EVERY = 5


@functools.cache
def task():
    return quadratic.quadratic(
        jax.random.key(0),
        dim=12,
        effective_rank=4.0,
        num_clients=6,
        examples_per_client=2,
        noise=0.5,
    ).task


def make_algorithm(num_perturbations=3, local_steps=1, optimizer=None):
    estimator = estimators.central_difference(num_perturbations, 1e-2)
    return decomfl(
        task().loss,
        estimator,
        optimizer or optax.sgd(0.05, momentum=0.9),
        local_steps=local_steps,
    )


def make_simulator(algorithm=None, seed=0):
    return simulation.make_simulator(
        algorithm or make_algorithm(), task(), clients_per_round=3, batch_size=1, seed=seed
    )


@pytest.fixture(scope="module")
def simulator():
    return make_simulator(make_algorithm(local_steps=2))


class DeathError(Exception):
    """Stands for the end of a process."""


class Outcome(NamedTuple):
    progress: simulation.Progress
    notice: str | None
    restored: simulation.Progress
    rows: list


def drive(workdir, simulator, total, *, snapshot_at=(), die_at=None, die_before_record=False):
    """Does what an entry point does; `die_at` ends it once that many rounds are logged."""
    with open_run(workdir, FLAGS) as run:
        progress, notice = recording.restore(run, simulator)
        restored = copy.deepcopy(progress)

        def on_rounds(trace, counted, progress):
            recording.write_rounds(run, trace, counted, progress)
            done = int(progress.state.round)
            if done in snapshot_at:
                recording.save_snapshot(run, progress)
            if die_at is not None and done >= die_at and not die_before_record:
                raise DeathError(copy.deepcopy(progress))

        def on_record(record):
            if record.round == die_at and die_before_record:
                raise DeathError(None)
            recording.write_record(run, record)

        progress = simulation.run(
            simulator,
            rounds=total,
            eval_every=EVAL_EVERY,
            progress=progress,
            on_rounds=on_rounds,
            on_record=on_record,
        )
        return Outcome(progress, notice, restored, run.log.rounds())


def die(workdir, simulator, total, **how):
    """Returns the progress that was lost."""
    with pytest.raises(DeathError) as caught:
        drive(workdir, simulator, total, **how)
    return caught.value.args[0]


def opened(workdir) -> Run:
    return open_run(workdir, FLAGS)


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_progress(progress, other):
    assert_same_bits((progress.state, progress.memory), (other.state, other.memory))
    assert progress.history == other.history
    assert progress.losses == other.losses
    for name in ("totals", "participations", "dense_bytes", "num_rounds", "_replay_bytes"):
        assert getattr(progress.ledger, name) == getattr(other.ledger, name), name
    np.testing.assert_array_equal(progress.ledger.last_round, other.ledger.last_round)


def assert_same_outcome(outcome, other):
    assert_same_progress(outcome.progress, other.progress)
    assert outcome.rows == other.rows


@pytest.fixture(scope="module")
def whole(simulator, tmp_path_factory):
    """A run of 15 rounds that nothing interrupted."""
    return drive(tmp_path_factory.mktemp("whole") / "run", simulator, 15)


def test_a_fresh_run_starts_at_round_0(tmp_path, simulator):
    for _ in range(2):  # the second time as if the process died at once
        with opened(tmp_path / "run") as run:
            progress, notice = recording.restore(run, simulator)
            assert notice is None
            assert_same_progress(progress, simulator.start(None))
            assert run.snapshot_rounds == [0] and run.log.last_round == -1


@pytest.mark.parametrize("snapshot_at", [(), (5,), (5, 10)])
@pytest.mark.parametrize("die_at", [6, 10, 11])
def test_rounds_after_the_snapshot_are_replayed(tmp_path, simulator, whole, snapshot_at, die_at):
    lost = die(tmp_path / "run", simulator, 15, snapshot_at=snapshot_at, die_at=die_at)
    outcome = drive(tmp_path / "run", simulator, 15)
    assert outcome.notice is None
    assert_same_progress(outcome.restored, lost)
    assert 0 < outcome.restored.run_seconds == lost.run_seconds
    assert_same_outcome(outcome, whole)


def test_an_evaluation_that_was_lost_is_made_again(tmp_path, simulator, whole):
    die(tmp_path / "run", simulator, 15, die_at=10, die_before_record=True)
    outcome = drive(tmp_path / "run", simulator, 15)
    assert int(outcome.restored.state.round) == 10
    assert [record.round for record in outcome.restored.history] == [5]
    assert_same_outcome(outcome, whole)


def test_a_complete_run_is_restored_and_goes_on(tmp_path, simulator, whole):
    first = drive(tmp_path / "run", simulator, 10)
    outcome = drive(tmp_path / "run", simulator, 15)
    assert_same_progress(outcome.restored, first.progress)
    assert_same_outcome(outcome, whole)


def test_more_rounds_than_one_dispatch_are_replayed(tmp_path, simulator):
    total = rounds.CAPACITY + 12
    lost = die(tmp_path / "run", simulator, total, die_at=rounds.CAPACITY + 3)
    with opened(tmp_path / "run") as run:
        restored, notice = recording.restore(run, simulator)
    assert notice is None and int(restored.state.round) > rounds.CAPACITY
    assert_same_progress(restored, lost)


def test_other_bits_are_noticed_and_the_rounds_run_again(tmp_path, simulator, whole):
    lost = die(tmp_path / "run", simulator, 15, snapshot_at=(5,), die_at=8)
    done = int(lost.state.round)
    with opened(tmp_path / "run") as run:
        logged = run.log.metrics()[done][recording.FINGERPRINT]
        assert logged == int(rounds.fingerprint(lost.state.params))
        run.log.write_metrics(done, {recording.FINGERPRINT: logged + 1})
    outcome = drive(tmp_path / "run", simulator, 15)
    assert outcome.notice == (
        f"the replay of rounds 5 to {done - 1} did not give the same bits here; they are run again."
    )
    assert int(outcome.restored.state.round) == 5
    assert_same_outcome(outcome, whole)


def test_a_damaged_log_is_salvaged_and_the_rest_run_again(tmp_path, simulator, whole):
    die(tmp_path / "run", simulator, 15, snapshot_at=(10,), die_at=11)
    log = tmp_path / "run" / "log.sqlite"
    with opened(tmp_path / "run") as run:
        broadcast = run.log.rounds(7, 8)[0].broadcast
    data = log.read_bytes()
    assert data.count(broadcast) == 1
    log.write_bytes(data.replace(broadcast, broadcast[::-1]))
    with opened(tmp_path / "run") as run:
        assert "was damaged: the run resumes after round 6, the last good one" in run.notice
    outcome = drive(tmp_path / "run", simulator, 15)
    assert int(outcome.restored.state.round) == 7  # the snapshot of round 10 came too late
    assert_same_outcome(outcome, whole)


@pytest.mark.parametrize("how", ["damaged", "deleted"])
def test_without_snapshots_the_start_is_made_again(tmp_path, simulator, whole, how):
    lost = die(tmp_path / "run", simulator, 15, snapshot_at=(5,), die_at=8)
    paths = sorted((tmp_path / "run" / "snapshots").iterdir())
    assert len(paths) == 2
    for path in paths:
        path.unlink() if how == "deleted" else path.write_bytes(path.read_bytes()[:-1])
    outcome = drive(tmp_path / "run", simulator, 15)
    assert outcome.notice is None
    assert_same_progress(outcome.restored, lost)
    assert_same_outcome(outcome, whole)
    with opened(tmp_path / "run") as run:
        assert run.snapshot_rounds == [0]


def test_a_rebuild_keeps_later_snapshots(tmp_path, simulator):
    drive(tmp_path / "run", simulator, 10, snapshot_at=(5,))
    (tmp_path / "run" / "snapshots" / "00000000.snapshot").write_bytes(b"")
    with opened(tmp_path / "run") as run:
        state, same = recording.rebuild(run, simulator, 5)
        assert same is True and int(state.round) == 5
        assert "Damaged and set aside" in run.notice
        assert run.snapshot_rounds == [5]


def test_the_log_of_another_seed_is_refused(tmp_path, simulator):
    drive(tmp_path / "run", simulator, 5)
    other = make_simulator(seed=1)
    with opened(tmp_path / "run") as run:
        for call in (
            lambda: recording.restore(run, other),
            lambda: recording.rebuild(run, other, 3),
        ):
            with pytest.raises(RunError, match=r"seed of round \d .* the log is of another run"):
                call()
        assert run.log.last_round == 4


def test_broadcasts_of_another_size_are_refused(tmp_path, simulator):
    drive(tmp_path / "run", simulator, 5)
    with opened(tmp_path / "run") as run:
        message = r"broadcast in the log has 24 bytes where this run's have 8; .*--workdir"
        with pytest.raises(RunError, match=message):
            recording.restore(run, make_simulator(make_algorithm(num_perturbations=2)))
        assert run.log.last_round == 4


def test_a_state_of_another_type_is_refused(tmp_path, simulator):
    drive(tmp_path / "run", simulator, 5)
    with (
        opened(tmp_path / "run") as run,
        pytest.raises(RunError, match=r"00000000.snapshot doesn't fit this run: leaf "),
    ):
        recording.restore(run, make_simulator(make_algorithm(optimizer=optax.adam(0.1))))


@pytest.fixture(scope="module")
def phased():
    return make_simulator([Phase(0, make_algorithm(3)), Phase(7, make_algorithm(5))])


def test_phases_are_replayed_each_with_its_perturbations(tmp_path, phased):
    whole = drive(tmp_path / "whole", phased, 15)
    assert [len(row.broadcast) for row in whole.rows] == [3 * 4] * 7 + [5 * 4] * 8
    for snapshot_at, die_at in (((), 7), ((), 11), ((5,), 11)):
        workdir = tmp_path / f"{snapshot_at}-{die_at}"
        lost = die(workdir, phased, 15, snapshot_at=snapshot_at, die_at=die_at)
        outcome = drive(workdir, phased, 15)
        assert outcome.notice is None
        assert_same_progress(outcome.restored, lost)
        assert_same_outcome(outcome, whole)


def test_any_round_is_rebuilt(tmp_path, phased):
    states = {0: phased.start(None).state}

    def keep(trace, counted, progress):
        states[int(progress.state.round)] = copy.deepcopy(progress.state)

    for total in range(1, 11):  # a dispatch a round
        simulation.run(phased, rounds=total, progress=None, on_rounds=keep)
    drive(tmp_path / "run", phased, 10)
    with opened(tmp_path / "run") as run:
        marked = {r for r, values in run.log.metrics().items() if recording.FINGERPRINT in values}
        for rounds_done in range(11):
            state, same = recording.rebuild(run, phased, rounds_done)
            assert_same_bits(state, states[rounds_done])
            assert same is (True if rounds_done in marked else None)
        run.log.write_metrics(10, {recording.FINGERPRINT: 1.0})
        assert recording.rebuild(run, phased, 10)[1] is False
        for missing in (-1, 11):
            message = f"round {missing} is not in the log, which holds 10 rounds"
            with pytest.raises(RunError, match=message):
                recording.rebuild(run, phased, missing)


def with_feedback(inner):
    """Clients that add half of what they measured last time to their upload."""

    def client(shared_key, state, memory, batches, own_key):
        result = inner.client(shared_key, state, (), batches, own_key)
        upload = {"scalars": result.upload + memory["last"] / 2, "turn": memory["turn"]}
        new = {"last": result.upload, "turn": memory["turn"] + 1}
        return ClientResult(upload, new, result.stats)

    def aggregate(uploads, weights):
        scalars = inner.aggregate(uploads["scalars"], weights)
        return {"scalars": scalars, "turns": jnp.sum(uploads["turn"]), "half": scalars[0, 0:1]}

    def server(key, state, broadcast):
        return inner.server(key, state, broadcast["scalars"])

    def init_memory(params):
        return {"last": jnp.zeros((1, 3)), "turn": jnp.zeros((), jnp.int32)}

    return inner._replace(
        client=client, aggregate=aggregate, server=server, init_memory=init_memory
    )


def test_rounds_of_clients_with_memory_are_run_again(tmp_path):
    simulator = make_simulator(with_feedback(make_algorithm()))
    whole = drive(tmp_path / "whole", simulator, 15)
    assert int(whole.progress.memory["turn"].sum()) == 15 * 3
    for snapshot_at, die_at, first in (((), 8, 0), ((5,), 8, 5), ((5, 10), 10, 10)):
        workdir = tmp_path / f"{snapshot_at}"
        lost = die(workdir, simulator, 15, snapshot_at=snapshot_at, die_at=die_at)
        done = int(lost.state.round)
        outcome = drive(workdir, simulator, 15)
        if first == done:
            assert outcome.notice is None
            assert_same_progress(outcome.restored, lost)
        else:
            assert outcome.notice.startswith(f"rounds {first} to {done - 1} are run again: ")
        assert int(outcome.restored.state.round) == first
        assert_same_outcome(outcome, whole)
    # A replay takes the broadcasts alone, a tree of several types here.
    with opened(tmp_path / "whole") as run:
        state, same = recording.rebuild(run, simulator, 15)
    assert same is True
    assert_same_bits(state, whole.progress.state)


def test_broadcasts_of_any_tree_and_type_are_logged_as_documented():
    broadcast = {
        "b": (np.array([[1.5, -0.0], [np.pi, 1e-40]], np.float32), np.array([], np.float32)),
        "a": np.array([1.5, -3.0], ml_dtypes.bfloat16),
        "c": [np.array(2**31 + 1, np.uint32), np.array([True, False]), np.array([-7], np.int8)],
        "d": np.array([0.1], np.float16),
    }
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), broadcast)
    data = recording._encode(jax.tree.map(jnp.asarray, broadcast))
    # In the order of jax.tree.leaves: by the names a, b, c, d; little-endian; without padding.
    assert data[:4] == bytes.fromhex("c03f40c0")
    assert data[4:8] == bytes.fromhex("0000c03f")
    assert data[20:] == bytes.fromhex("01000080" + "0100" + "f9" + "662e")
    assert_same_bits(recording._decode(data, spec), broadcast)
    for wrong in (data[:-1], data + b"\0", b""):
        message = re.escape(f"has {len(wrong)} bytes where this run's have {len(data)}")
        with pytest.raises(RunError, match=message):
            recording._decode(wrong, spec)


@pytest.mark.optimized
def test_seeds_are_logged_as_the_words_of_the_round_keys(tmp_path):
    simulator = simulation.make_simulator(
        make_algorithm(), task(), clients_per_round=2, batch_size=1, prng_impl="threefry4x32"
    )
    outcome = drive(tmp_path / "run", simulator, 5)
    for row in outcome.rows:
        key = keys.round_key(simulator.root.shared, row.round)
        words = np.frombuffer(row.key, "<u4")
        np.testing.assert_array_equal(words, jax.random.key_data(key))
    with opened(tmp_path / "run") as run:
        assert recording.rebuild(run, simulator, 5)[1] is True
