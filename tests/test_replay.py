"""From the broadcasts alone, or from any round on: a run again, bit for bit."""

import functools

import numpy as np
import pytest
from tiny_simulations import advance, assert_same_bits, copy, joined, make_simulator, start

from zofl_jax.engine import rounds, simulation

ROUNDS = 12

pytestmark = pytest.mark.optimized


made = functools.cache(make_simulator)


@pytest.fixture
def simulator() -> simulation.Simulator:
    return made("momentum and decay", "sphere", 3)


@pytest.mark.parametrize(
    ("optimizer", "perturbation", "local_steps"),
    [
        ("sgd", "gaussian", 1),
        ("sgd", "rademacher", 3),
        ("momentum and decay", "rademacher", 1),
        ("momentum and decay", "sphere", 3),
        ("adam", "sphere", 1),
        ("adam", "gaussian", 3),
    ],
)
def test_replay_has_the_bits_of_the_run(optimizer, perturbation, local_steps):
    """From the seeds and broadcasts alone: params, optimiser state and round number."""
    simulator = made(optimizer, perturbation, local_steps)
    initial = start(simulator)
    ran, traces = advance(simulator, initial, [1, 4, ROUNDS - 5])
    trace = joined(traces)
    replayed = simulator.replay(initial, trace.seeds, trace.broadcasts)
    assert_same_bits(replayed, ran)
    middle = simulator.replay(initial, trace.seeds[:7], trace.broadcasts[:7])
    assert int(middle.round) == 7
    rest = simulator.replay(middle, trace.seeds[7:], trace.broadcasts[7:])
    assert_same_bits(rest, ran)
    assert np.any(ran.params["kernel"] != initial.params["kernel"])
    assert np.any(ran.params["bias"] != initial.params["bias"])


def test_a_run_taken_up_from_any_round_has_the_bits_of_one_in_a_piece(simulator):
    states, memory = [simulator.start(None).state], ()
    expected = []
    kept = [copy(states[0])]
    for _ in range(ROUNDS):
        state, memory, trace = simulator.advance(states.pop(), memory, 1)
        states.append(state)
        kept.append(copy(state))
        expected.append(trace)
    whole = joined(expected)
    for r in range(ROUNDS):
        resumed, traces = advance(simulator, kept[r], [ROUNDS - r])
        assert_same_bits(resumed, kept[-1])
        np.testing.assert_array_equal(traces[0].broadcasts, whole.broadcasts[r:])
        np.testing.assert_array_equal(traces[0].seeds, whole.seeds[r:])
        np.testing.assert_array_equal(traces[0].cohorts, whole.cohorts[r:])
        np.testing.assert_array_equal(traces[0].losses, whole.losses[r:])
        assert traces[0].first_round == r


def test_more_rounds_than_a_dispatch_takes(simulator):
    initial, n = start(simulator), rounds.CAPACITY + 5
    ran, traces = advance(simulator, initial, [rounds.CAPACITY, 5])
    trace = joined(traces)
    assert len(trace.losses) == int(ran.round) == n
    assert_same_bits(simulator.replay(initial, trace.seeds, trace.broadcasts), ran)
    progress = simulation.run(simulator, rounds=n)
    assert_same_bits(progress.state, ran)
