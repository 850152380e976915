"""--auto_lr, --diagnose_every and the end of a run that stalled, as a user meets them."""

import json
import math
import re

import pytest
from commands import summary_of
from flag_lines import build, resolve

from experiments import tuning
from experiments.entry import UserError
from experiments.tuning import Trial
from zofl_jax.configuration.config import Config
from zofl_jax.configuration.experiment import at_learning_rate
from zofl_jax.observation.diagnostics import Diagnosis

QUADRATIC = [
    *("--task=quadratic", "--quadratic_dim=50", "--effective_rank=5", "--momentum=0"),
    *("--local_steps=1", "--num_perturbations=8", "--estimator=projection", "--eval_every=10"),
]


def built(*arguments):
    return resolve(*arguments), build(*arguments)


@pytest.mark.parametrize("first", [0.03, 30.0])
def test_the_rate_is_found_from_far_below_and_from_far_above(first):
    config, experiment = built(*QUADRATIC, f"--learning_rate={first}", "--rounds=40")
    found = tuning.probe(config, experiment)
    # The edge is 2 / (9 / 8 + 5 / 8) = 1.14, and a trial is at three times its rate.
    assert 1.14 / 3 / 4 < found.learning_rate < 1.14 / 2
    chosen = max(t for t in found.trials if t.good and t.learning_rate <= found.learning_rate)
    # Clients differ, so that the least loss is far above zero.
    start = chosen.losses[0]
    assert (start - chosen.end) / (start - experiment.minimum) > 0.5
    bad = [t for t in found.trials if not t.good]
    assert all(t.learning_rate > found.learning_rate for t in bad)
    assert (first == 30.0) <= bool(bad)
    assert all(t.rounds <= tuning.probe_rounds(config) for t in found.trials)
    assert found.sentence.startswith(f"--auto_lr chose {found.learning_rate:.3g}: ")
    assert found.sentence.endswith(f"; the probe took {found.rounds} rounds")


# What ends a demo's first change: the noise of the directions lets a multilayer model's weights
# walk, and a rate at which the loss falls for a while is lost later.
MLP = [
    *("--task=digits", "--model=mlp", "--local_steps=1", "--num_perturbations=5"),
    *("--clients_per_round=2", "--batch_size=16", "--rounds=120"),
]


def test_a_rate_that_is_lost_later_is_not_chosen():
    config, experiment = built(*MLP, "--learning_rate=0.004")

    def run(rate):
        """Returns the losses after a fifth of the rounds and after all."""
        simulator = at_learning_rate(experiment, config.replace(learning_rate=rate), None).simulator
        progress = simulator.start(None)
        losses = [simulator.evaluate(progress.state.params)["loss"]]
        state, memory = progress.state, progress.memory
        for n in (24, 96):
            state, memory, trace = simulator.advance(state, memory, n)
            if trace.failed_loss is not None:
                return [*losses, math.inf]
            losses.append(simulator.evaluate(state.params)["loss"])
        return losses

    start, early, end = run(0.004)
    assert early < start < end  # a short probe at the rate itself is content
    found = tuning.probe(config, experiment)
    start, early, end = run(found.learning_rate)
    assert found.learning_rate < 0.002 and end < early < start


def falling(by, rounds=10):
    return [1.0 - by * i / tuning.CHECKS for i in range(tuning.CHECKS + 1)], rounds


def landscape(edge, best=math.inf, late=False, least=0.1):
    """Returns an attempt that falls the further the larger the rate, up to the best one."""
    tried = []

    def attempt(rate):
        tried.append(rate)
        if rate > edge:
            return Trial(rate, [1.0] * (7 if late else 3) + [math.inf], 5, complete=False)
        return Trial(rate, *falling(least + 0.8 * min(rate, best**2 / rate) / edge))

    return attempt, tried


def test_the_search_doubles_a_good_rate_and_lowers_a_bad_one():
    for late, edge, chosen, last in (
        (False, 0.5, 0.4, []),
        (True, 0.5, 0.4, [0.566]),  # between them, which is bad too
        (True, 0.6, 0.566, [0.566]),
    ):
        attempt, tried = landscape(edge, late=late)
        assert tuning.search(attempt, 0.1, 1000)[0] == chosen
        assert tried == [0.1, 0.2, 0.4, 0.8, *last]
    attempt, tried = landscape(edge=0.5)  # bad from the start: a fourth, then between
    assert tuning.search(attempt, 1.6, 1000)[0] == 0.4 and tried == [1.6, 0.4, 0.8]
    attempt, tried = landscape(edge=0.6, late=True)
    assert tuning.search(attempt, 1.6, 1000)[0] == 0.566 and tried == [1.6, 0.8, 0.4, 0.566]
    attempt, tried = landscape(edge=9, best=0.2, least=0.2)  # good, but no better
    assert tuning.search(attempt, 0.1, 1000)[0] == 0.2 and tried == [0.1, 0.2, 0.4]
    attempt, tried = landscape(edge=9, least=0.2)  # as long as rounds are left
    assert tuning.search(attempt, 0.1, 20)[0] == 0.2 and tried == [0.1, 0.2]


def test_far_below_the_best_rate_the_search_goes_fourfold():
    attempt, tried = landscape(edge=9, least=0.0)
    assert tuning.search(attempt, 0.1, 20)[0] == 0.4 and tried == [0.1, 0.4]
    for late, chosen, last in ((False, 0.2, []), (True, 0.283, [0.283])):
        # Too far: the rate between, whatever that takes.
        attempt, tried = landscape(edge=0.3, least=-0.2, late=late)
        assert tuning.search(attempt, 0.1, 15)[0] == chosen and tried == [0.1, 0.4, 0.2, *last]
    attempt, tried = landscape(edge=9, best=0.15, least=0.1)  # good, but no better
    assert tuning.search(attempt, 0.1, 20)[0] == 0.2 and tried == [0.1, 0.4, 0.2]


def test_where_the_loss_rises_at_every_rate_the_search_says_so():
    attempt, tried = landscape(edge=0.0)
    with pytest.raises(UserError, match=r"rises at every learning rate tried, from \S+ to 1; type"):
        tuning.search(attempt, 1.0, 1000)
    assert len(tried) == tuning.MOST_TRIALS


@pytest.mark.parametrize(
    ("losses", "good"),
    [
        ([1.0, 0.8, 0.5], True),
        ([1.0, 0.5, 0.6], True),  # noise
        ([1.0, 0.5, 0.7], False),  # on its way up, though below the start
        ([1.0, 1.01, 1.01], True),  # nothing moved
        ([1.0, 1.1, 1.2], False),
        ([1.0, 0.5, math.inf], False),
        ([-5.0, -6.0, -7.0], True),  # losses may be negative
        ([-5.0, -6.0, -5.0], False),
    ],
)
def test_what_a_good_trial_is(losses, good):
    assert Trial(1.0, losses, 10).good is good
    assert not Trial(1.0, losses, 10, complete=False).good


def test_a_trial_is_as_long_as_the_run_at_its_rate():
    config = Config(momentum=0.0, local_steps=4)
    assert tuning.probe_rounds(config.replace(rounds=300)) == 100
    # Momentum 0.9 starts nine steps late, a third of which the run has at its own rate.
    assert tuning.probe_rounds(config.replace(momentum=0.9, rounds=300)) == 102
    assert tuning.probe_rounds(config.replace(algorithm="fedavg", rounds=300)) == 150
    assert tuning.probe_rounds(config.replace(rounds=3)) == 3


def test_a_run_keeps_the_rate_it_found_and_its_diagnoses(quickly):
    flags = [*QUADRATIC, "--workdir=run", "--noprogress", "--auto_lr", "--learning_rate=0.1"]
    flags.append("--schedule=40:lr=1e-3")
    first, more, other, wrong = (
        quickly.in_turn("train", *flags, *own)
        for own in (
            ["--rounds=20", "--diagnose_every=20"],
            ["--rounds=40", "--diagnose_every=20"],
            ["--rounds=40", "--noauto_lr"],
            ["--rounds=40", "--diagnose_every=15"],
        )
    )
    assert (first.code, more.code, other.code, wrong.code) == (0, 0, 1, 1)
    # In turn, commands are run with --nofigures.
    assert first.out.endswith("\nLog and summary are in run\n")
    assert not list((quickly.folder / "run").glob("*.png"))
    assert "note: --auto_lr tries learning rates for 7 rounds each, from 0.1 on\n" in first.err
    (chosen,) = re.findall(r"note: --auto_lr chose (\S+): tried at 3 times each rate", first.err)
    kept = json.loads((quickly.folder / "run" / "flags.json").read_text())["learning_rate"]
    assert float(chosen) == pytest.approx(kept, rel=1e-2) and kept != 0.1
    assert more.err == "resuming run after round 20\n"
    assert "--learning_rate is 0.1 but the run in run was started with" in other.err
    assert "--diagnose_every=15 must be a multiple of --eval_every=10" in wrong.err

    rows = summary_of(quickly.folder / "run")["diagnoses"]
    assert [row["round"] for row in rows] == [0, 20, 40]
    assert all(set(row) == {"round", *Diagnosis._fields} for row in rows)
    # The curvature of a quadratic is the same everywhere; the gradient vanishes.
    assert len({row["trace"] for row in rows}) == 1
    assert abs(rows[0]["effective_rank"] - 5) < 5 * rows[0]["trace_error"]
    assert rows[0]["gradient_norm"] > 2 * rows[2]["gradient_norm"]
    # The rate of the round that is diagnosed.
    assert abs(rows[2]["stability"]) < 0.1 * abs(rows[1]["stability"])
    assert "effective rank" in more.out


def test_a_run_that_stalls_far_above_its_start_has_diverged(quickly):
    flags = ["--local_steps=1", "--num_perturbations=2", "--rounds=30", "--eval_every=30"]
    flags = [*flags, "--learning_rate=1e5", "--workdir=run", "--noprogress"]
    ended, again = (quickly.in_turn("train", *flags) for _ in range(2))
    assert (ended.code, again.code) == (1, 1)
    warning, error = ended.err.splitlines()
    remedy = r"type --learning_rate=1e\+04 \(a tenth\), or --auto_lr, with another --workdir"
    climb = r"note: the training loss rises, to \S+ from \S+ near round 0: the run may diverge"
    assert re.fullmatch(f"{climb}; {remedy}", warning)
    assert re.fullmatch(
        r"error: the training loss ended at \S+, from \S+ at the start: the run diverged at round 1"
        rf"; {remedy}",
        error,
    )
    assert again.err == error + "\n"
    summary = summary_of(quickly.folder / "run")
    assert (summary["rounds"], summary["diverged_round"]) == (30, 1)
