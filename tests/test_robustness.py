"""The table of rules under attack: complete, in step with its page, and one compilation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import robustness
from zofl_jax import keys
from zofl_jax.conditions import attacks

CELLS = json.loads(robustness.RESULTS.read_text())["cells"]
PARTS = [(dataset, method) for dataset in ("digits", "fashion") for method in robustness.METHODS]
ACCURACY = {
    tuple(cell[name] for name in robustness.Cell._fields[:5]): cell["accuracy"] for cell in CELLS
}


def test_the_page_is_that_of_the_results():
    assert robustness.TABLE.read_text() == robustness.markdown(CELLS)


def test_the_results_are_complete():
    """Every rule, every attack and every share, on both data sets, for scalars and gradients."""
    assert set(robustness.SETTINGS) == set(PARTS)
    expected = {
        (*part, rule, attack, share)
        for part in PARTS
        for rule in robustness.RULES
        for attack in robustness.ATTACKS
        for share in ((0.0,) if attack == "none" else robustness.SHARES)
    }
    assert len(ACCURACY) == len(CELLS)
    assert set(ACCURACY) == expected


def test_bad_numbers_were_rejected_and_nothing_else():
    """All clients are in every round, so each malicious one loses every message."""
    for cell in CELLS:
        bad = cell["attack"] in ("NaN", "out of range")
        malicious = round(cell["share"] * robustness.CLIENTS)
        assert cell["rejected"] == (malicious * cell["rounds"] if bad else 0), cell


@pytest.mark.parametrize("share", robustness.SHARES)
@pytest.mark.parametrize("part", PARTS, ids="-".join)
def test_the_results_are_in_the_order_that_theory_asks_for(part, share):
    def accuracy(rule, attack):
        return ACCURACY[(*part, rule, attack, 0.0 if attack == "none" else share)]

    # The mean follows whoever is loudest; the others don't.
    assert accuracy("mean", "scaling") < 0.2
    for rule in ("median", "trimmed mean", "multi-Krum", "geometric median", "clipped mean"):
        assert accuracy(rule, "scaling") > accuracy("mean", "scaling") + 0.4, rule
    # A message that is rejected costs its sender alone. Krum takes one upload, and is noisy.
    for rule in robustness.RULES:
        assert accuracy(rule, "NaN") == accuracy(rule, "out of range"), rule
        noise = 0.1 if rule == "Krum" else 0.04
        assert abs(accuracy(rule, "NaN") - accuracy(rule, "none")) < noise, rule
    # The median and the trimmed mean lose little while few are malicious.
    if share == 0.1:
        for rule in ("median", "trimmed mean", "geometric median"):
            for attack in robustness.ATTACKS:
                assert accuracy(rule, attack) > accuracy(rule, "none") - 0.08, (rule, attack)
        assert abs(accuracy("mean", "ALIE") - accuracy("mean", "none")) < 0.02
    else:
        others = [name for name in robustness.ATTACKS if name != "Krum"]
        assert accuracy("Krum", "Krum") < min(accuracy("Krum", name) for name in others) - 0.1


def test_one_compilation_serves_rules_and_attacks(monkeypatch):
    monkeypatch.setattr(
        robustness,
        "RULES",
        {name: robustness.RULES[name] for name in ("mean", "median")},
    )
    chosen = {"none": robustness.ATTACKS["none"], "scaling": attacks.scaling(-30.0)}
    chosen["label flip"] = robustness.ATTACKS["label flip"]
    monkeypatch.setattr(robustness, "ATTACKS", chosen)
    task = robustness.make_task("digits", 0)
    settings = robustness.SETTINGS["digits", "fedsgd"]
    run = jax.jit(robustness.make_run(task, "fedsgd", settings, 10))
    nobody = jnp.zeros(robustness.CLIENTS, bool)
    some = jnp.arange(robustness.CLIENTS) < 6

    def accuracy(rule, attack, malicious):
        found, rejected = run(rule, attack, malicious, task.train, keys.root(0))
        assert int(rejected) == 0
        return float(found)

    plain = accuracy(0, 0, nobody)
    assert accuracy(0, 1, nobody) == plain
    assert accuracy(0, 1, some) < 0.5 < 0.8 < plain
    assert accuracy(1, 1, some) > 0.6  # six bad of twenty pull a median too
    assert accuracy(0, 2, some) not in (plain, accuracy(0, 0, some))
    assert run._cache_size() == 1
    assert np.isfinite(plain)
