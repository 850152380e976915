"""Runs: compiled once, taken up again, evaluated, stopped, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_simulations import COHORT, advance, assert_same_bits, copy, joined, make_simulator, start
from tiny_tasks import BATCH_SIZE, CLIENT_SIZES, poisoned_task, softmax_task

from zofl_jax.algorithms import decomfl
from zofl_jax.core import Phase
from zofl_jax.directions import estimators
from zofl_jax.engine import rounds, simulation
from zofl_jax.tasks.quadratic import quadratic

ROUNDS = 12


class CountedTask:
    """The softmax task, whose loss and metrics count how often they are traced."""

    def __init__(self):
        self.traces = {"loss": 0, "metrics": 0}
        task = softmax_task()

        def loss(params, batch):
            self.traces["loss"] += 1
            return task.loss(params, batch)

        def metrics(params, batch):
            self.traces["metrics"] += 1
            return task.metrics(params, batch)

        self.task = task._replace(loss=loss, metrics=metrics)


COUNTED = CountedTask()


@functools.cache
def shared_simulator() -> simulation.Simulator:
    """One set of compiled functions for all tests that need no special one: K = 2."""
    return make_simulator("momentum and decay", "rademacher", 2, COUNTED.task)


@pytest.mark.optimized
@pytest.mark.parametrize("eval_every", [0, 1, 5, 100])
def test_evaluation_changes_no_bit_of_training(eval_every):
    simulator = shared_simulator()
    expected, _ = advance(simulator, start(simulator), [ROUNDS])
    progress = simulation.run(simulator, rounds=ROUNDS, eval_every=eval_every)
    assert_same_bits(progress.state, expected)
    marks = range(eval_every, ROUNDS, eval_every) if eval_every else ()
    assert [record.round for record in progress.history] == [*marks, ROUNDS]


def test_another_seed_is_another_run():
    shared, other = shared_simulator(), make_simulator("sgd", "rademacher", 1, seed=1)
    many = np.arange(9)
    assert not np.array_equal(other.cohorts(many), shared.cohorts(many))
    assert np.all(other.seeds(many) != shared.seeds(many))


def test_params_of_weak_types_are_trained():
    """jnp.full gives a weakly typed array, which one round of the loop would strengthen."""
    task = softmax_task()
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    weak = jax.tree.map(lambda x: jnp.full(x.shape, 0.25), shapes)
    assert weak["bias"].weak_type
    simulator = make_simulator("sgd", "rademacher", 1, task._replace(init=lambda key: weak))
    assert int(simulation.run(simulator, rounds=2).state.round) == 2


# Compilation.


def test_each_function_is_compiled_once():
    """Dispatches of all lengths, resumes, evaluations and replays share their functions."""
    simulator = shared_simulator()
    progress = simulation.run(simulator, rounds=ROUNDS, eval_every=5)
    initial = start(simulator)
    _, traces = advance(simulator, initial, [3])
    simulator.replay(initial, traces[0].seeds, traces[0].broadcasts)
    traced, seconds = dict(COUNTED.traces), simulator.compile_seconds()
    assert seconds > 0
    simulation.run(simulator, rounds=ROUNDS + 9, eval_every=2, progress=progress)
    _, traces = advance(simulator, initial, [1, 2, 6])
    simulator.replay(initial, joined(traces).seeds, joined(traces).broadcasts)
    simulator.evaluate(jax.tree.map(jnp.asarray, initial.params))
    assert COUNTED.traces == traced
    assert simulator.compile_seconds() == seconds


# Progress and history.


def test_history_has_the_figures_of_the_rounds():
    simulator = shared_simulator()
    traces, counted, seen, records = [], [], [], []

    def on_rounds(trace, bytes_of_rounds, progress):
        traces.append(trace)
        counted.extend(bytes_of_rounds)
        seen.append((int(progress.state.round), progress.ledger.num_rounds))

    progress = simulation.run(
        simulator, rounds=ROUNDS, eval_every=5, on_rounds=on_rounds, on_record=records.append
    )
    trace = joined(traces)
    assert [t.first_round for t in traces] == [0, *(done for done, _ in seen[:-1])]
    assert all(done == in_ledger for done, in_ledger in seen)
    assert records == progress.history
    assert [record.round for record in records] == [5, 10, 12]
    for record, (first, last) in zip(records, [(0, 5), (5, 10), (10, 12)], strict=True):
        np.testing.assert_allclose(record.train_loss, trace.losses[first:last].mean(), rtol=1e-6)
        assert record.bytes_up == sum(b.up for b in counted[:last])
        assert record.bytes_down == sum(b.down for b in counted[:last])
    state, _ = advance(simulator, start(simulator), [5])
    metrics = simulator.evaluate(jax.tree.map(jnp.asarray, state.params))
    assert records[0].metrics == metrics
    assert set(metrics) == {"loss", "accuracy"}
    np.testing.assert_array_equal(trace.cohorts, simulator.cohorts(np.arange(ROUNDS)))
    np.testing.assert_array_equal(trace.seeds, simulator.seeds(np.arange(ROUNDS)))
    assert progress.run_seconds > 0
    assert progress.losses == []
    assert progress.memory == ()
    assert trace.failed_loss is None


@pytest.mark.optimized
def test_a_run_goes_on_from_its_progress():
    simulator = shared_simulator()
    expected = simulation.run(simulator, rounds=ROUNDS, eval_every=4)
    first = simulation.run(simulator, rounds=6, eval_every=4)
    assert [record.round for record in first.history] == [4, 6]
    history = list(first.history)
    second = simulation.run(simulator, rounds=ROUNDS, eval_every=4, progress=first)
    assert_same_bits(second.state, expected.state)
    assert second.ledger.totals == expected.ledger.totals
    assert [record.round for record in second.history] == [4, 6, 8, 12]
    assert second.history[:2] == history
    assert second.history[-1] == expected.history[-1]
    assert second.run_seconds > first.run_seconds
    assert simulation.run(simulator, rounds=ROUNDS, progress=second) == second


def test_a_progress_that_lacks_its_last_record_is_evaluated_first():
    """As after a process that died between a dispatch and its evaluation."""
    simulator = shared_simulator()
    expected = simulation.run(simulator, rounds=ROUNDS, eval_every=4)
    kept = []

    def on_rounds(trace, counted, progress):
        if int(progress.state.round) == 8:
            state = jax.tree.map(jnp.copy, progress.state)
            kept.append((state, list(progress.history), list(progress.losses)))

    simulation.run(simulator, rounds=8, eval_every=4, on_rounds=on_rounds)
    (state, history, losses), book = kept[0], simulator.start(None).ledger
    for cohort in simulator.cohorts(np.arange(8)):
        book.record(cohort, simulator.sizes[0])
    assert [record.round for record in history] == [4]
    progress = simulation.Progress(state, (), book, history, losses)
    records = []
    resumed = simulation.run(
        simulator, rounds=ROUNDS, eval_every=4, progress=progress, on_record=records.append
    )
    assert records == expected.history[1:]
    assert resumed.history == expected.history
    assert_same_bits(resumed.state, expected.state)


def test_params_given_to_start_are_used_and_left_alone():
    simulator = shared_simulator()
    params = jax.tree.map(lambda x: x + 1, simulator.task.init(simulator.root.init))
    before = copy(params)
    progress = simulator.start(params)
    assert_same_bits(progress.state.params, before)
    simulation.run(simulator, rounds=1, progress=progress)
    assert_same_bits(params, before)


# Evaluation.


@pytest.mark.parametrize("eval_batch_size", [7, 36, 512])
def test_every_test_example_counts_once(eval_batch_size):
    """36 examples in batches of 7, of 36, or in a part of one."""
    task = softmax_task()
    assert sum(CLIENT_SIZES) == 36
    simulator = make_simulator("sgd", "rademacher", 1, task, eval_batch_size=eval_batch_size)
    params = task.init(jax.random.key(0))
    expected = {name: float(v.mean()) for name, v in task.metrics(params, task.test).items()}
    metrics = simulator.evaluate(params)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], expected["accuracy"], rtol=1e-6)


# Runs that go well, and runs that don't.


@pytest.mark.parametrize("local_steps", [1, 4])
def test_a_quadratic_descends_to_its_minimum(local_steps):
    task, _, _, minimum = quadratic(
        jax.random.key(0), dim=50, effective_rank=5.0, num_clients=8, heterogeneity=0.1
    )
    algorithm = decomfl(
        task.loss, estimators.central_difference(5, 1e-2), optax.sgd(0.1), local_steps=local_steps
    )
    simulator = simulation.make_simulator(algorithm, task, clients_per_round=4, batch_size=1)
    first = task.loss(task.init(jax.random.key(0)), task.test)
    progress = simulation.run(simulator, rounds=400 // local_steps)
    assert progress.history[-1].metrics["loss"] - minimum < 0.05 * (float(first) - minimum)


def test_a_cohort_that_is_not_a_number_stops_the_run():
    """At its first round, with the state before it; the rounds before are all reported."""
    healthy = make_simulator("adam", "rademacher", 1, clients_per_round=1)
    cohorts = healthy.cohorts(np.arange(100))
    absent = [int(np.argmax(np.any(cohorts == c, axis=1))) for c in range(len(CLIENT_SIZES))]
    client = int(np.argmax(absent))
    expected = absent[client]
    assert expected >= 1
    simulator = make_simulator("adam", "rademacher", 1, poisoned_task(client), clients_per_round=1)
    reported, records = [], []

    def on_rounds(trace, counted, progress):
        reported.extend(range(trace.first_round, trace.first_round + len(counted)))
        assert len(counted) == len(trace.losses)

    with pytest.raises(simulation.Diverged, match=f"round {expected} diverged.*nan") as failure:
        simulation.run(simulator, rounds=100, on_rounds=on_rounds, on_record=records.append)
    assert failure.value.round == expected
    assert np.isnan(failure.value.loss)
    assert reported == list(range(expected))
    assert records == []
    progress = failure.value.progress
    assert progress.ledger.num_rounds == len(progress.losses) == expected
    good, _ = advance(healthy, start(healthy), [expected])
    assert_same_bits(progress.state, good)
    with pytest.raises(simulation.Diverged) as again:
        simulation.run(simulator, rounds=100, progress=progress)
    assert again.value.round == expected


def test_a_run_that_grows_without_bound_stops_with_a_finite_model():
    task = quadratic(jax.random.key(0), dim=5, effective_rank=5.0, num_clients=4).task
    algorithm = decomfl(task.loss, estimators.central_difference(2, 1e-2), optax.sgd(1e30))
    simulator = simulation.make_simulator(algorithm, task, clients_per_round=2, batch_size=1)
    with pytest.raises(simulation.Diverged, match="Lower the learning rate") as failure:
        simulation.run(simulator, rounds=100)
    assert failure.value.round == 1
    assert not np.isfinite(failure.value.loss)
    assert int(failure.value.progress.state.round) == failure.value.round
    assert np.all(np.isfinite(failure.value.progress.state.params["x"]))


def test_broadcasts_that_are_not_finite_are_not_replayed():
    simulator = shared_simulator()
    initial = start(simulator)
    _, (trace,) = advance(simulator, initial, [5])
    broadcasts = trace.broadcasts.copy()
    broadcasts[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="the broadcast of round 3 is not finite"):
        simulator.replay(initial, trace.seeds, broadcasts)


# Host work.


class Watched:
    """A simulator that writes down what was given to the device, and what `run` told."""

    def __init__(self):
        self.events = []
        simulator = shared_simulator()

        def launch(state, memory, n):
            flight = simulator.launch(state, memory, n)
            self.events.append(("launch", flight.first_round))
            return flight

        def land(flight):
            state, memory, trace = simulator.land(flight)
            self.events.append(("land", flight.first_round + len(trace.losses)))
            return state, memory, trace

        self.simulator = simulator.wrapped(launch=launch, land=land)

    def run(self, reads_state):
        marks = []

        def on_rounds(trace, counted, progress):
            done = trace.first_round + len(counted)
            self.events.append(("rounds", done))
            assert progress.ledger.num_rounds == done
            marks.append((done, int(progress.fingerprint)))
            if reads_state(done):
                assert int(rounds.fingerprint(progress.state.params)) == marks[-1][1]

        progress = simulation.run(
            self.simulator,
            rounds=ROUNDS,
            eval_every=5,
            on_rounds=on_rounds,
            on_record=lambda record: self.events.append(("record", record.round)),
            reads_state=reads_state,
        )
        return progress, marks


def test_the_host_works_while_the_device_does(monkeypatch):
    monkeypatch.setattr(simulation, "DISPATCH_SECONDS", np.inf)  # dispatches grow on any machine
    patient, hasty = Watched(), Watched()
    expected, expected_marks = patient.run(lambda done: True)
    progress, marks = hasty.run(lambda done: done == 3)
    assert_same_bits(progress.state, expected.state)
    assert progress.history == expected.history
    assert progress.ledger.totals == expected.ledger.totals
    assert marks == expected_marks
    dispatches = [value for kind, value in hasty.events if kind == "land"]
    assert dispatches[:3] == [1, 3, 5]
    at = hasty.events.index
    for done in dispatches[:-1]:
        assert at(("land", done)) < at(("rounds", done)) < at(("land", dispatches[-1]))
        in_time = done == 3  # the state is read
        in_evaluation = done % 5 == 0
        assert (at(("rounds", done)) < at(("launch", done))) == (in_time or in_evaluation)
    for done in (5, 10):
        assert at(("rounds", done)) < at(("launch", done)) < at(("record", done))
    for done in dispatches[:-1]:
        assert patient.events.index(("rounds", done)) < patient.events.index(("launch", done))


def test_what_waited_is_told_before_an_error_ends_the_run():
    simulator, told, records = shared_simulator(), [], []

    def launch(state, memory, n):
        if int(state.round) == 6:
            raise KeyboardInterrupt
        return simulator.launch(state, memory, n)

    with pytest.raises(KeyboardInterrupt):
        simulation.run(
            simulator.wrapped(launch=launch),
            rounds=ROUNDS,
            eval_every=3,
            on_rounds=lambda trace, counted, progress: told.append(progress.ledger.num_rounds),
            on_record=lambda record: records.append(record.round),
            reads_state=lambda done: False,
        )
    assert told[-1] == 6
    assert records == [3, 6]


# Phases.


def phased_simulator() -> simulation.Simulator:
    task = softmax_task()

    def phase(first_round: int, num_perturbations: int) -> Phase:
        estimator = estimators.forward_difference(num_perturbations, 1e-2)
        return Phase(first_round, decomfl(task.loss, estimator, optax.sgd(0.05)))

    return simulation.make_simulator(
        [phase(0, 1), phase(3, 4)], task, clients_per_round=COHORT, batch_size=BATCH_SIZE
    )


def test_a_phase_begins_at_its_first_round():
    simulator = phased_simulator()
    shapes, params = [], {}

    def on_rounds(trace, counted, progress):
        shapes.extend(b.shape for b in trace.broadcasts)
        params[int(progress.state.round)] = copy(progress.state)

    progress = simulation.run(simulator, rounds=6, on_rounds=on_rounds)
    assert shapes == [(1, 1)] * 3 + [(1, 4)] * 3
    assert [size.broadcast for size in simulator.sizes] == [4, 16]
    assert [b.shape for b in simulator.broadcasts] == [(1, 1), (1, 4)]
    assert progress.ledger.totals.broadcast == COHORT * 3 * (4 + 16)
    assert 3 in params, "no dispatch crosses into a new phase"
    state, _ = advance(simulator, start(simulator), [2])
    with pytest.raises(ValueError, match="rounds 2 to 3 cross into a new phase"):
        advance(simulator, state, [2])
    seeds, broadcasts = simulator.seeds(np.arange(4)), np.zeros((4, 1, 1), np.float32)
    with pytest.raises(ValueError, match="rounds 0 to 3 cross into a new phase"):
        simulator.replay(start(simulator), seeds, broadcasts)


@pytest.mark.parametrize("first_rounds", [[], [1], [0, 0], [0, 5, 3]])
def test_phases_out_of_order_are_refused(first_rounds):
    task = softmax_task()
    algorithm = decomfl(task.loss, estimators.projection(1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="phases must start at round 0 and increase, got"):
        simulation.as_phases([Phase(r, algorithm) for r in first_rounds])


def test_the_phase_of_a_round():
    algorithm = decomfl(softmax_task().loss, estimators.projection(1), optax.sgd(0.1))
    phases = simulation.as_phases([Phase(r, algorithm) for r in (0, 3, 10)])
    assert [simulation.phase_at(phases, r) for r in (0, 2, 3, 9, 10, 99)] == [0, 0, 1, 1, 2, 2]
    assert simulation.as_phases(algorithm) == (Phase(0, algorithm),)


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients_per_round": 0}, r"clients_per_round must be in \[1, num_clients = 6\], got 0"),
        ({"clients_per_round": 7}, r"clients_per_round must be in \[1, num_clients = 6\], got 7"),
        ({"batch_size": 5}, "2 of 6 clients have fewer examples than batch_size=5"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"weighting": "size"}, "weighting must be 'uniform' or 'examples', got 'size'"),
        ({"prng_impl": "rbg"}, "prng_impl 'rbg' is refused"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"eval_batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_simulator("sgd", "gaussian", 1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"rounds": 5, "eval_every": -1}, "eval_every must be >= 0, got -1"),
    ],
)
def test_runs_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulation.run(shared_simulator(), **options)


@pytest.mark.parametrize("n", [0, rounds.CAPACITY + 1])
def test_dispatches_out_of_range_are_refused(n):
    simulator = shared_simulator()
    with pytest.raises(
        ValueError, match=f"a dispatch takes 1 to {rounds.CAPACITY} rounds, got {n}"
    ):
        simulator.advance(simulator.start(None).state, (), n)


def test_dense_broadcasts_make_shorter_dispatches(monkeypatch):
    """A run and its replay take as many rounds at once as their broadcasts fit the buffers."""
    monkeypatch.setattr(rounds, "BUFFER_BYTES", 100)
    simulator = make_simulator("sgd", "rademacher", 2)
    assert simulator.capacities == (100 // (2 * 2 * 4),)
    initial, lengths = start(simulator), []
    progress = simulation.run(
        simulator, rounds=20, on_rounds=lambda trace, *_: lengths.append(len(trace.losses))
    )
    assert max(lengths) == 6
    traces, state = [], jax.tree.map(jnp.asarray, initial)
    for n in (6, 6, 6, 2):
        state, _, trace = simulator.advance(state, (), n)
        traces.append(trace)
    assert_same_bits(state, progress.state)
    trace = joined(traces)
    assert_same_bits(simulator.replay(initial, trace.seeds, trace.broadcasts), progress.state)
    with pytest.raises(ValueError, match="a dispatch takes 1 to 6 rounds, got 7"):
        simulator.advance(state, (), 7)
