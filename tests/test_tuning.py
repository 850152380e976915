"""--auto_lr, --diagnose_every and the end of a run that stalled, as a user meets them."""

import json
import re

import pytest
from absl.testing import flagsaver
from commands import summary_of

from experiments import config, tuning
from experiments.entry import UserError
from experiments.tuning import Trial
from zofl_jax.diagnostics import Diagnosis

QUADRATIC = [
    *("--task=quadratic", "--quadratic_dim=50", "--effective_rank=5", "--momentum=0"),
    *("--local_steps=1", "--num_perturbations=8", "--estimator=projection", "--eval_every=10"),
]


def built(*arguments):
    with flagsaver.flagsaver():
        config.FLAGS(["train", *QUADRATIC, *arguments])
        values = config.resolve()
    return values, config.build(values)


@pytest.mark.parametrize("middle", [0.01, 30.0])
def test_the_rate_is_below_two_over_the_top_eigenvalue(middle):
    values, experiment = built(f"--learning_rate={middle}")
    found = tuning.probe(values, experiment)
    assert 0.01 < found.learning_rate < 2  # the top eigenvalue is 1
    chosen = next(t for t in found.trials if t.learning_rate == found.learning_rate)
    # Clients differ, so that the least loss is far above zero.
    fall = (found.start - chosen.end) / (found.start - experiment.minimum)
    assert fall > 0.5
    if middle == 30.0:  # larger rates are left out once one is far off
        assert found.trials[-1].end > 2 * found.start and len(found.trials) < len(tuning.FACTORS)
    assert f"--auto_lr chose {found.learning_rate:.3g}: " in found.sentence


def test_the_largest_of_the_rates_that_do_as_well_is_chosen():
    assert tuning.choose([Trial(1, 0.6, 0.3), Trial(2, 0.5, 0.301), Trial(3, 0.5, 0.4)], 1.0) == 2
    # On its way up, though lower than the others.
    assert tuning.choose([Trial(1, 0.8, 0.7), Trial(2, 0.2, 0.5)], 1.0) == 1
    with pytest.raises(UserError, match=r"no learning rate from 1 to 2 lowers the loss; raise"):
        tuning.choose([Trial(1, 1.1, 1.2), Trial(2, 0.5, float("inf"))], 1.0)


def test_a_run_keeps_the_rate_it_found_and_its_diagnoses(commands):
    flags = [*QUADRATIC, "--workdir=run", "--noprogress", "--auto_lr", "--learning_rate=0.1"]
    flags.append("--schedule=40:lr=1e-3")
    first, more, other, wrong = commands.train_each(
        [
            [*flags, "--rounds=20", "--diagnose_every=20"],
            [*flags, "--rounds=40", "--diagnose_every=20"],
            [*flags, "--rounds=40", "--noauto_lr"],
            [*flags, "--rounds=40", "--diagnose_every=15"],
        ]
    )
    assert (first.code, more.code, other.code, wrong.code) == (0, 0, 1, 1)
    (chosen,) = re.findall(r"note: --auto_lr chose (\S+): the loss falls", first.err)
    kept = json.loads((commands.folder / "run" / "flags.json").read_text())["learning_rate"]
    assert float(chosen) == pytest.approx(kept, rel=1e-2) and kept != 0.1
    assert more.err == "resuming run after round 20\n"
    assert "--learning_rate is 0.1 but the run in run was started with" in other.err
    assert "--diagnose_every=15 must be a multiple of --eval_every=10" in wrong.err

    rows = summary_of(commands.folder / "run")["diagnoses"]
    assert [row["round"] for row in rows] == [0, 20, 40]
    assert all(set(row) == {"round", *Diagnosis._fields} for row in rows)
    # The curvature of a quadratic is the same everywhere; the gradient vanishes.
    assert len({row["trace"] for row in rows}) == 1
    assert abs(rows[0]["effective_rank"] - 5) < 5 * rows[0]["trace_error"]
    assert rows[0]["gradient_norm"] > 2 * rows[2]["gradient_norm"]
    # The rate of the round that is diagnosed.
    assert abs(rows[2]["stability"]) < 0.1 * abs(rows[1]["stability"])
    assert "effective rank" in more.out


def test_a_run_that_stalls_far_above_its_start_has_diverged(commands):
    flags = ["--local_steps=1", "--num_perturbations=2", "--rounds=30", "--eval_every=30"]
    flags = [*flags, "--learning_rate=1e5", "--workdir=run", "--noprogress"]
    ended, again = commands.train_each([flags, flags])
    assert (ended.code, again.code) == (1, 1)
    warning, error = ended.err.splitlines()
    assert re.fullmatch(r"note: the training loss rises, to \S+ from \S+ near round 0: .*", warning)
    assert re.fullmatch(
        r"error: the training loss ended at \S+, from \S+ at the start: the run diverged at round 1"
        r"\. Lower the learning rate, .*",
        error,
    )
    assert again.err == error + "\n"
    summary = summary_of(commands.folder / "run")
    assert (summary["rounds"], summary["diverged_round"]) == (30, 1)
