"""A loss that climbs is told from one that is noisy, and a stall from a descent."""

import numpy as np
import pytest

from zofl_jax.observation import divergence
from zofl_jax.observation.divergence import ended_above, rising


def noisy(mean, deviation, count, seed=0):
    return (mean + deviation * np.random.default_rng(seed).normal(size=count)).tolist()


def test_noise_around_a_constant_does_not_rise():
    for seed in range(20):
        losses = noisy(0.5, 0.2, 400, seed)
        assert [n for n in range(1, 401) if rising(losses[:n])] == []


def test_a_descent_to_almost_nothing_and_its_noise_do_not_rise():
    losses = [2.0 * 0.97**i for i in range(300)] + noisy(2e-4, 1e-5, 100)
    assert [n for n in range(1, 401) if rising(losses[:n])] == []


@pytest.mark.parametrize("start", [30, 200])
def test_growth_is_seen_while_it_is_small(start):
    losses = noisy(0.5, 0.02, start) + [0.5 * 1.1**i for i in range(100)]
    seen = next(n for n in range(1, len(losses)) if rising(losses[:n]))
    rise = rising(losses[:seen])
    assert losses[seen - 1] < 50 * 0.5
    assert 0.4 < rise.best < 0.6 and rise.best_round < start and rise.last > 2 * rise.best


def test_an_explosion_in_the_second_round_is_seen():
    assert rising([2.3]) is None
    assert rising([2.3, 2.4]) is None
    assert rising([2.3, 1e10]).last == 1e10


def test_where_a_run_stalled():
    stall = [2.3, 2.0, 500.0, 1e14] + [1e14] * 50
    assert ended_above(stall) == 2
    assert ended_above([2.3, 1e14]) == 1
    # It came down again; it never went up; there is nothing to compare.
    assert ended_above([*stall, *([2.0] * divergence.WINDOW)]) is None
    assert ended_above([2.3] * 30 + [22.0] * 30) is None
    assert ended_above([0.0] + [5.0] * 30) is None
    assert ended_above([]) is None and ended_above([1.0]) is None
