"""The table of rules under attack: complete, in step with its page, and one compilation."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments import robustness
from zofl_jax import aggregation, attacks, keys

CELLS = json.loads(robustness.RESULTS.read_text())["cells"]


def test_the_page_is_that_of_the_results():
    assert robustness.TABLE.read_text() == robustness.markdown(CELLS)


def test_the_results_are_complete():
    """Every rule, every attack and every share, for scalars and for gradients."""
    parts = {(cell["dataset"], cell["method"]) for cell in CELLS}
    assert {("digits", "decomfl"), ("digits", "fedsgd")} <= parts
    expected = {
        (*part, rule, attack, share)
        for part in parts
        for rule in robustness.RULES
        for attack in robustness.ATTACKS
        for share in ((0.0,) if attack == "none" else robustness.SHARES)
    }
    found = [tuple(cell[name] for name in robustness.Cell._fields[:5]) for cell in CELLS]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_bad_numbers_were_rejected_and_nothing_else():
    """All clients are in every round, so each malicious one loses every message."""
    for cell in CELLS:
        bad = cell["attack"] in ("NaN", "out of range")
        malicious = round(cell["share"] * robustness.CLIENTS)
        assert cell["rejected"] == (malicious * cell["rounds"] if bad else 0), cell


def test_one_compilation_serves_rules_and_attacks(monkeypatch, quick_compile):
    monkeypatch.setattr(
        robustness,
        "RULES",
        {"mean": aggregation.mean, "median": aggregation.median},
    )
    chosen = {"none": robustness.ATTACKS["none"], "scaling": attacks.scaling(-30.0)}
    chosen["label flip"] = robustness.ATTACKS["label flip"]
    monkeypatch.setattr(robustness, "ATTACKS", chosen)
    task = robustness.make_task("digits", 0)
    run = jax.jit(robustness.make_run(task, "fedsgd", 10))
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
