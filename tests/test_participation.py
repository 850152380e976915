"""Cohorts: distinct clients, uniform, a function of (key, round)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofl_jax import keys
from zofl_jax.conditions import participation

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


# Clients that come and go.

ROOT = keys.root(1)


def attended(attend: participation.Attend, rounds: int) -> participation.Attendance:
    """Returns the attendance of the first rounds, [rounds, M] each."""
    many = jax.jit(jax.vmap(attend, in_axes=(None, 0)))(ROOT, jnp.arange(rounds))
    return jax.tree.map(np.asarray, many)


def near(indicator: np.ndarray, probability: float) -> bool:
    """Returns whether a mean is the probability, by 5 standard errors."""
    error = (probability * (1 - probability) / indicator.size) ** 0.5
    return abs(indicator.mean() - probability) <= 5 * error


def test_by_default_the_uniform_cohort_is_there_in_whole():
    for attend in (participation.everyone(7, 3), participation.partial(7, 3)):
        found = attended(attend, 20)
        np.testing.assert_array_equal(found.cohort, cohorts(7, 3, 20))
        assert found.there.all()
        assert found.uploaded.all()
        assert found.in_time.all()


def test_dropouts_are_as_frequent_as_said_and_of_each_client_alike():
    found = attended(participation.partial(6, 3, dropout=0.3), 4000)
    assert found.there.all()
    np.testing.assert_array_equal(found.uploaded, found.in_time)
    assert near(~found.uploaded, 0.3)
    for client in range(6):
        assert near(~found.uploaded[found.cohort == client], 0.3)
    # Neither one client's next round nor its neighbour tells.
    assert near(found.uploaded[:, 0] & found.uploaded[:, 1], 0.49)
    assert near(found.uploaded[1:, 0] & found.uploaded[:-1, 0], 0.49)


def test_stragglers_miss_the_deadline_by_their_device_and_by_chance():
    """A deadline of the median is missed by half of all devices; slow ones miss it more often."""
    found = attended(participation.partial(400, 400, deadline=1.0, spread=0.7), 60)
    assert found.uploaded.all()
    often = found.in_time.mean(axis=0)  # of each client
    # P(a + b <= 0 | a) is uniform for two standard normals: mean 1/2, variance 1/12 over devices,
    # and 1/6 more over the rounds of a device.
    assert abs(often.mean() - 0.5) <= 5 * (1 / 12 / 400) ** 0.5
    assert abs(often.var() - (1 / 12 + 1 / 6 / 60)) <= 0.02
    same = attended(participation.partial(400, 400, deadline=1.0, spread=0.0), 3)
    assert same.in_time.all()


def test_the_cohort_is_drawn_from_those_who_are_there():
    trace = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    found = attended(participation.partial(5, 2, availability=trace), 3000)
    assert found.there.sum(axis=1).reshape(-1, 3).tolist() == [[2, 1, 0]] * 1000
    for r in range(30):
        assert len(set(found.cohort[r].tolist())) == 2
        assert trace[r % 3][found.cohort[r][found.there[r]]].all()
    for client in (0, 1, 4):
        assert near(np.any(found.cohort[::3] == client, axis=1), 2 / 3)
    assert not np.any(found.uploaded & ~found.there)


def test_late_joiners_are_never_there_before():
    joins = np.asarray(participation.late_joiners(ROOT.presence, 30, 0.5, 20))
    assert (joins > 0).sum() == 15
    assert len(set(joins.tolist())) > 5
    found = attended(participation.partial(30, 20, joins=joins), 40)
    rounds = np.arange(40)[:, None]
    np.testing.assert_array_equal(found.there, joins[found.cohort] <= rounds)
    assert (found.there.sum(axis=1)[:1] == 15).all()
    assert (found.there.sum(axis=1)[20:] == 20).all()


def test_day_and_night():
    trace = participation.day_and_night(8, 24, 1 / 3)
    assert trace.shape == (24, 8)
    assert (trace.sum(axis=0) == 8).all()
    np.testing.assert_array_equal(trace[:, 4], np.roll(trace[:, 0], 12))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"deadline": 0.0}, "deadline must be positive, got 0.0"),
        ({"spread": -1.0}, "must be >= 0, got -1.0"),
        ({"availability": np.ones((3, 4))}, r"num_clients = 5\], got shape \(3, 4\)"),
        ({"availability": np.ones((0, 5))}, r"got shape \(0, 5\)"),
        ({"joins": np.zeros(4)}, r"one round a client, \[5\], got shape \(4,\)"),
    ],
)
def test_participation_out_of_range_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        participation.partial(5, 2, **options)


def test_joiners_and_traces_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"late joiners must be in \[0, 1\], got 2"):
        participation.late_joiners(KEY, 5, 2, 3)
    with pytest.raises(ValueError, match="last round must be >= 1, got 0"):
        participation.late_joiners(KEY, 5, 0.5, 0)
    with pytest.raises(ValueError, match="period of an availability trace must be >= 1, got 0"):
        participation.day_and_night(5, 0, 0.5)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0.0"):
        participation.day_and_night(5, 4, 0.0)
