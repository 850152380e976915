"""How many examples a direction is measured on, where the noise of examples chooses."""

import json
import math

import pytest
from commands import summary_of

from experiments import few_examples
from zofl_jax.configuration import phases
from zofl_jax.configuration.experiment import build
from zofl_jax.configuration.resolve import resolve


def cost(**given):
    config = resolve({"model": "softmax", **given})
    return few_examples.cost_of_a_direction(
        config, build(config).task, phases.perturbation_of(config)
    )


def test_the_cost_of_a_direction():
    """650 numbers, three times, over the 2 * 640 FLOPs of an example; signs cost a twelfth."""
    dense = 3 * 250 * 650 / 1280
    assert cost() == pytest.approx(dense)
    assert cost(perturbation="rademacher") == pytest.approx(dense * 20 / 250)
    low_rank = 3 * 250 * (64 + 10 + 10) + 2 * 64 * 10
    assert cost(perturbation="low_rank") == pytest.approx(low_rank / 1280)


@pytest.mark.parametrize("perturbation", ["gaussian", "rademacher", "low_rank"])
def test_the_choice_follows_its_formula(perturbation):
    config = resolve({"model": "softmax", "perturbation": perturbation, "local_steps": 1})
    choice = few_examples.choose(config, build(config).task)
    assert 10 < choice.noise_scale < 1000
    wanted = math.sqrt(choice.cost * choice.noise_scale / 5)
    assert choice.examples == few_examples.nearest(32, wanted)


def test_a_run_keeps_what_was_chosen(quickly):
    """In its flags, with as many directions as the groups need; the command goes on with them."""
    flags = [
        *("--model=softmax", "--perturbation=low_rank", "--num_perturbations=5", "--auto_examples"),
        *("--local_steps=1", "--eval_every=2", "--workdir=run", "--noprogress"),
    ]
    first, again, given, useless = quickly.train_each(
        [
            [*flags, "--rounds=2"],
            [*flags, "--rounds=4"],
            [*flags, "--rounds=4", "--examples_per_direction=32"],
            ["--auto_examples", "--algorithm=fedavg", "--workdir=other"],
        ]
    )
    assert (first.code, again.code, given.code, useless.code) == (0, 0, 1, 1)
    assert "note: --auto_examples chose " in first.err
    kept = json.loads((quickly.folder / "run" / "flags.json").read_text())
    groups = 32 // kept["examples_per_direction"]
    assert kept["num_perturbations"] == math.ceil(5 / groups) * groups
    assert again.err == "resuming run after round 2\n"
    assert summary_of(quickly.folder / "run")["rounds"] == 4
    assert "--auto_examples chooses --examples_per_direction, which is given" in given.err
    assert "--examples_per_direction has no effect with --algorithm=fedavg" in useless.err
    assert not (quickly.folder / "other").exists()
