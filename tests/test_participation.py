"""Cohorts: distinct clients, uniform, a function of (key, round)."""

import jax
import numpy as np
import pytest

from zofl_jax import keys, participation

KEY = keys.root(1).cohort
ROUNDS = 5_000


def cohorts(num_clients: int, clients_per_round: int, rounds: int = ROUNDS) -> np.ndarray:
    """Returns the cohorts of the first rounds, [rounds, M]."""
    draw = jax.jit(
        jax.vmap(lambda r: participation.uniform(KEY, r, num_clients, clients_per_round))
    )
    return np.asarray(draw(np.arange(rounds, dtype=np.int32)))


@pytest.mark.parametrize(("num_clients", "clients_per_round"), [(7, 3), (5, 1)])
def test_every_client_and_every_pair_is_equally_likely(num_clients, clients_per_round):
    """By 5 standard errors over 5,000 rounds."""
    drawn = cohorts(num_clients, clients_per_round)
    assert drawn.dtype == np.int32
    present = np.zeros((ROUNDS, num_clients))
    np.put_along_axis(present, drawn, 1, axis=1)
    assert np.all(present.sum(axis=1) == clients_per_round), "a client is there once"

    def check(indicator: np.ndarray, probability: float) -> None:
        standard_error = (probability * (1 - probability) / ROUNDS) ** 0.5
        assert abs(indicator.mean() - probability) <= 5 * standard_error

    one = clients_per_round / num_clients
    two = one * (clients_per_round - 1) / (num_clients - 1)
    for i in range(num_clients):
        check(present[:, i], one)
        for j in range(i):
            check(present[:, i] * present[:, j], two)
    # So do two rounds in a row.
    check(present[1:, 0] * present[:-1, 0], one**2)


def test_the_whole_population_is_in_order():
    assert cohorts(4, 4, rounds=3).tolist() == [[0, 1, 2, 3]] * 3


def test_a_cohort_is_a_function_of_key_and_round():
    batched = cohorts(50, 10, rounds=4)
    for r in range(4):
        assert participation.uniform(KEY, r, 50, 10).tolist() == batched[r].tolist()
    assert len({tuple(cohort) for cohort in batched.tolist()}) == 4
    other = participation.uniform(keys.root(2).cohort, 0, 50, 10)
    assert other.tolist() != batched[0].tolist()


def test_a_cohort_of_a_huge_population():
    cohort = participation.uniform(KEY, 0, 2**31 - 1, 100)
    assert len(set(cohort.tolist())) == 100
    assert cohort.min() >= 0
    assert cohort.max() > 2**30


@pytest.mark.parametrize("clients_per_round", [0, 5, -1])
def test_cohorts_out_of_range_are_refused(clients_per_round):
    with pytest.raises(
        ValueError, match=rf"must be in \[1, num_clients = 4\], got {clients_per_round}"
    ):
        participation.uniform(KEY, 0, 4, clients_per_round)


def test_nobody_has_taken_part_at_first():
    last = participation.first_last_round(3)
    assert last.dtype == np.int64
    assert last.tolist() == [participation.NEVER] * 3
