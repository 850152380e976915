"""A comparison says what its runs say, goes on where it was stopped, and survives bad runs."""

import csv
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver
from commands import TIMEOUT_SECONDS, Commands

from experiments import compare, comparison
from experiments.entry import UserError
from zofl_jax.algorithms import METHODS
from zofl_jax.configuration import choices
from zofl_jax.configuration.config import everything
from zofl_jax.observation.quantities import human_bytes, human_count

FLAGFILES = Path(compare.__file__).parent / "flagfiles"
FIRST = [
    *("algorithm", "seed", "learning_rate", "rounds_to_target", "bytes_up", "bytes_down"),
    *("forward_passes", "backward_passes", "seconds", "best_accuracy"),
]
OF_A_WHOLE_RUN = {
    **{"best_test_accuracy": 1.0, "test_accuracy": 1.0, "rounds": 2, "memory_bytes": 8},
    **{"num_clients": 2, "bytes_up_per_client": 10.0, "bytes_down_per_client": 120.0},
    **{"forward_passes": 1, "backward_passes": 1, "run_seconds": 2.0},
}
BATCHES = comparison.Passes()
FLAGS = """
--task=digits
--local_steps=1
--num_perturbations=4
--estimator=projection
--momentum=0
--rounds=30
--eval_every=5
--method=decomfl
--method=two-points --algorithm=decomfl --estimator=forward --num_perturbations=2 --rounds=20
--learning_rate=0.05
--grid=0.4,1,1e37
--seeds=2
--targets=0.2,0.6,0.99
--noprogress
"""
WHOLE = ("--flagfile=compare.flags", "--workdir=all")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A comparison that nothing interrupted: its folder and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "compare.flags").write_text(FLAGS)
    ended = Commands(folder, cache, quick=True).run("-m", "experiments.compare", *WHOLE)
    assert ended.code == 0, ended.err
    return folder / "all", ended


def compared(quickly):
    return quickly.in_turn("compare", *WHOLE)


def table_of(workdir):
    with open(workdir / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def summaries_of(workdir):
    """Returns (method, learning rate, seed) -> summary."""
    found = {}
    for path in workdir.glob("*/*/summary.json"):
        rate, seed = re.fullmatch(r"lr(.+)-seed(\d+)", path.parent.name).groups()
        key = (path.parent.parent.name, float(rate), int(seed))
        found[key] = json.loads(path.read_text())
    return found


def test_the_table_holds_what_the_runs_say(whole):
    workdir, _ = whole
    table, summaries = table_of(workdir), summaries_of(workdir)
    assert list(table[0])[: len(FIRST)] == FIRST
    # Three rates with the first seed, one of them with the second; three targets.
    assert len(summaries) == 2 * 4 and len(table) == 3 * len(summaries)
    reached = set()
    for row in table:
        key = (row["algorithm"], float(row["learning_rate"]), int(row["seed"]))
        summary, target = summaries[key], float(row["target"])
        rows = zip(summary["history"], summary["history_seconds"], strict=True)
        found = [(r, s) for r, s in rows if r["test_accuracy"] >= target]
        if not found or "diverged_round" in summary:
            assert {row[name] for name in (*FIRST[3:9], "bytes_first_sync")} == {""}
        else:
            first, seconds = found[0]
            reached.add((row["algorithm"], target))
            assert float(row["seconds"]) == seconds
            assert int(row["rounds_to_target"]) == first["round"]
            for name in (*FIRST[4:8], "bytes_first_sync"):
                assert int(row[name]) == first[name]
        assert int(row["batch_size"]) == 32
        for name in ("bytes_up", "bytes_down", "bytes_first_sync"):
            assert int(row[f"run_{name}"]) == round(20 * summary[f"{name}_per_client"])
        for name in ("forward_passes", "backward_passes"):
            assert int(row[f"run_{name}"]) == summary[name]
            tried = key[2] == 0  # for all rounds: trials are runs with the first seed
            assert row[f"trial_{name}"] == (row[f"run_{name}"] if tried else "")
        if summary["best_test_accuracy"] is not None:
            assert float(row["best_accuracy"]) == summary["best_test_accuracy"]
    assert {("decomfl", 0.2), ("two-points", 0.2)} <= reached
    assert ("decomfl", 0.99) not in reached


def test_passes_are_counted_by_method(whole):
    summaries = summaries_of(whole[0])
    ended = summaries["decomfl", 0.02, 0], summaries["two-points", 0.02, 0]
    # 5 clients: a value and a gradient in each of 30 rounds, three values in each of 20.
    assert [(s["forward_passes"], s["backward_passes"]) for s in ended] == [(150, 150), (300, 0)]


def test_the_best_rate_of_the_first_seed_is_taken_to_the_others(whole):
    table, summaries = table_of(whole[0]), summaries_of(whole[0])
    for method in ("decomfl", "two-points"):
        first = {
            rate: summary["best_test_accuracy"]
            for (name, rate, seed), summary in summaries.items()
            if (name, seed) == (method, 0) and "diverged_round" not in summary
        }
        best = max(first, key=first.get)
        chosen = {float(row["learning_rate"]) for row in table if row["chosen"] == "1"}
        assert best in chosen
        others = [rate for name, rate, seed in summaries if (name, seed) == (method, 1)]
        assert others == [best]


def test_a_run_that_diverges_is_told_and_reaches_nothing(whole):
    workdir, ended = whole
    bad = [key for key, summary in summaries_of(workdir).items() if "diverged_round" in summary]
    assert {rate for _, rate, _ in bad} == {5e35}
    assert re.search(r"note: decomfl, learning rate 5e\+35, seed 0: .*diverged", ended.err)
    assert re.search(r"- decomfl diverged at the learning rate 5e\+35 \(seed 0", ended.out)


def test_the_table_for_people_and_the_figures(whole):
    workdir, ended = whole
    text = (workdir / "table.md").read_text()
    assert text in ended.out
    line = next(line for line in text.splitlines() if line.startswith("| two-points"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    own = [
        row
        for row in table_of(workdir)
        if (row["algorithm"], row["target"], row["chosen"]) == ("two-points", "0.2", "1")
    ]
    accuracies = [float(row["best_accuracy"]) for row in own]
    mean, deviation = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert len(own) == 2 and cells[2] == f"{mean:.3f} ± {deviation:.3f}"
    assert "digits, softmax (650 params): 20 clients, 2 seeds; of 3 learning rates" in text
    assert "In forward passes, a backward pass counts as two forward ones." in text
    trials = [row for row in table_of(workdir) if row["algorithm"] == "two-points"]
    trials = [row for row in trials if (row["target"], row["seed"]) == ("0.2", "0")]
    sent = sum(int(row["trial_bytes_up"]) + int(row["trial_bytes_down"]) for row in trials)
    computed = sum(int(row["trial_forward_passes"]) for row in trials)
    assert len(trials) == 3
    assert cells[-2:] == [human_bytes(sent), human_count(computed)]
    assert text.index("In all rounds:") < text.index("To a test accuracy of 20 %:")
    lines = text[text.index("99 %") :].splitlines()
    unreachable = [line for line in lines if line.startswith(("| decomfl", "| two-points"))]
    assert len(unreachable) == 2
    for line in unreachable:
        assert [cell.strip() for cell in line.strip("|").split("|")][3:11] == ["–"] * 8
    for name in ("pareto", "exchange", "rounds", "seconds"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_comparison_goes_on(whole, quickly, tmp_path):
    (tmp_path / "compare.flags").write_text(FLAGS)
    process = quickly.start("-m", "experiments.compare", *WHOLE)
    workdir = tmp_path / "all"
    while process.poll() is None and len(list(workdir.glob("*/*/summary.json"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_SECONDS)
    done = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*/summary.json")}
    assert 2 <= len(done) < 8 and not (workdir / "rounds.png").exists()

    ended = compared(quickly)
    assert ended.code == 0, ended.err
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    tables = [table_of(workdir), table_of(whole[0])]
    for row in (row for table in tables for row in table):
        del row["seconds"], row["run_seconds"], row["memory_bytes"]
    assert tables[0] == tables[1]


def test_results_of_other_data_do_not_come_into_one_table(whole, quickly, tmp_path):
    """A run that is complete, as its data were before."""
    (tmp_path / "compare.flags").write_text(FLAGS)
    shutil.copytree(whole[0], tmp_path / "all")
    noted = sorted((tmp_path / "all").glob("*/*/inputs.json"))
    assert len(noted) == len(summaries_of(tmp_path / "all"))
    inputs = json.loads(noted[-1].read_text())
    noted[-1].write_text(json.dumps(inputs | {"training column 'label'": "0" * 32}))
    ended = compared(quickly)
    assert ended.code == 1 and ended.err.startswith("error: training column 'label' changed since")
    assert str(noted[-1].parent.relative_to(tmp_path)) in ended.err


def test_rates_are_tried_for_a_share_of_the_rounds(quickly):
    """The chosen one goes on to all of them, and the same command again chooses it again."""
    (quickly.folder / "compare.flags").write_text(
        "--task=digits\n--local_steps=1\n--num_perturbations=4\n--estimator=projection\n"
        "--momentum=0\n--rounds=30\n--eval_every=5\n--method=decomfl\n--learning_rate=0.05\n"
        "--grid=0.02,1\n--seeds=2\n--trial_share=0.3\n--noprogress\n"
    )
    ended = compared(quickly)
    assert ended.code == 0, ended.err
    assert "each tried for 30 % of the rounds" in ended.out
    workdir = quickly.folder / "all"
    rounds = {key[1:]: summary["rounds"] for key, summary in summaries_of(workdir).items()}
    assert rounds == {(0.001, 0): 10, (0.05, 0): 30, (0.05, 1): 30}
    chosen = {(float(row["learning_rate"]), row["chosen"]) for row in table_of(workdir)}
    assert chosen == {(0.001, "0"), (0.05, "1")}
    # Of the chosen rate the trial alone is tuning, not the rounds that came after it.
    spent = {
        (float(row["learning_rate"]), row["seed"]): (
            row["run_forward_passes"],
            row["trial_forward_passes"],
        )
        for row in table_of(workdir)
    }
    assert spent == {
        (0.001, "0"): ("50", "50"),
        (0.05, "0"): ("150", "50"),
        (0.05, "1"): ("150", ""),
    }
    line = next(line for line in ended.out.splitlines() if line.startswith("| decomfl"))
    assert line.strip("| ").split("|")[-1].strip() == "300"  # 100 of values, 100 of gradients
    before = (workdir / "table.csv").read_bytes()
    again = compared(quickly)
    assert again.code == 0, again.err
    assert (workdir / "table.csv").read_bytes() == before


BUDGET = """
--task=digits
--local_steps=1
--num_perturbations=4
--eval_every=5
--method=decomfl --dropout=0.3
--method=fedavg --batch_size=8
--grid=1
--seeds=2
--targets=0.2
--noprogress
"""


def test_runs_within_a_budget_spend_it_and_go_on_with_a_larger_one(quickly):
    (quickly.folder / "compare.flags").write_text(BUDGET)

    def within(amount, workdir):
        flags = ("--flagfile=compare.flags", f"--budget=bytes:{amount}", f"--workdir={workdir}")
        ended = quickly.in_turn("compare", *flags)
        assert ended.code == 0, ended.err
        assert f"Within {human_bytes(amount)} up and down:" in ended.out
        assert f"Table and runs are in {workdir}" in ended.out
        assert not list((quickly.folder / workdir).glob("*.png"))
        return table_of(quickly.folder / workdir)

    table = within(80_000, "one")
    assert {row["seed"] for row in table} == {"0", "1"}
    for row in table:
        rounds, cohort = int(row["rounds"]), 5
        spent = int(row["run_bytes_up"]) + int(row["run_bytes_down"])
        model = 650 * 4 + 8
        most = 2 * cohort * model if row["algorithm"] == "fedavg" else cohort * (model + 1000)
        assert 80_000 - most < spent <= 80_000 and rounds > 1
        assert row["trial_bytes_up"] == ""  # of one learning rate none was chosen
        # A plain run of so many rounds.
        folder = quickly.folder / "one" / row["algorithm"]
        (run,) = folder.glob(f"lr*-seed{row['seed']}")
        assert json.loads((run / "flags.json").read_text())["rounds"] == rounds
    within(160_000, "one")
    at_once = within(160_000, "two")
    gone_on = table_of(quickly.folder / "one")
    for row, other, before in zip(gone_on, at_once, table, strict=True):
        assert int(row["rounds"]) > int(before["rounds"])
        for name in ("rounds", "final_accuracy", "run_bytes_up", "run_bytes_down"):
            assert row[name] == other[name]
    # A smaller one is told from the evaluations of the larger one.
    again = within(80_000, "one")
    for row, before in zip(again, table, strict=True):
        assert int(row["rounds"]) == int(before["rounds"])
        assert row["run_bytes_up"] == before["run_bytes_up"]


def test_passes_of_batches_of_different_sizes_are_counted_by_example(quickly):
    (quickly.folder / "compare.flags").write_text(BUDGET)
    flags = ("--flagfile=compare.flags", "--backward_cost=1.5", "--workdir=all")
    ended = quickly.in_turn("compare", *flags, "--budget=example_passes:8000", "--figures")
    assert ended.code == 0, ended.err
    assert "Table, figures and runs are in all" in ended.out
    assert (quickly.folder / "all" / "pareto.png").exists()
    rows = {row["algorithm"]: row for row in table_of(quickly.folder / "all")}
    # 5 clients: eight values of 32 examples a round; one value and gradient of 8.
    assert int(rows["decomfl"]["rounds"]) == 8000 // (5 * 8 * 32)
    assert int(rows["fedavg"]["rounds"]) == 8000 // (5 * 2.5 * 8)
    assert "Within 8 k forward passes of an example:" in ended.out
    assert (
        "| example-passes |" in ended.out and "a backward pass counts as 1.5 forward" in ended.out
    )
    wrong = quickly.in_turn("compare", *flags, "--budget=passes:8000")
    assert wrong.code == 1
    assert "have batches of 8, 32 examples" in wrong.err and "give example_passes:" in wrong.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=hours:3"], "--budget: a budget is KIND:AMOUNT"),
        (["--budget="], "--budget: a budget is KIND:AMOUNT"),
        (["--budget=bytes:1e6", "--rounds=10"], "decomfl: --budget=bytes:1e6 says .* --rounds"),
        (
            ["--budget=bytes:100"],
            "decomfl: --budget: 100 bytes up and down don't pay",
        ),
        (["--budget=passes:1e12"], "decomfl: --budget: .* more than 1,000,000 rounds"),
        (["--backward_cost=inf"], "--backward_cost must be finite"),
        (["--backward_cost=nan"], "--backward_cost must be finite"),
    ],
)
def test_budgets_that_are_wrong(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver():
        compare.FLAGS(["compare", "--task=digits", "--method=decomfl", *flags])
        with pytest.raises(UserError, match=message):
            compare.main()
    assert not list(tmp_path.iterdir())


def test_a_run_with_a_budget_is_evaluated_forty_times_unless_told_otherwise():
    with flagsaver.flagsaver():
        compare.FLAGS(["compare", "--budget=rounds:600", "--task=digits"])
        budget = compare.budgets.parse(compare.FLAGS.budget)
        plain, told = parsed("decomfl", "often --algorithm=decomfl --eval_every=3")
        every = [compare.within(budget, each, range(3)).config.eval_every for each in (plain, told)]
        assert every == [15, 3]
        assert compare.within(budget, plain, range(3)).rounds == {0: 600, 1: 600, 2: 600}


def parsed(*lines, flagfile=None):
    with flagsaver.flagsaver():
        compare.FLAGS(["compare", *([f"--flagfile={flagfile}"] if flagfile else [])])
        return compare.parse_methods(compare.FLAGS.method if flagfile else lines)


@pytest.mark.parametrize(
    "name",
    [
        *("demo", "compare_digits", "compare_fashion", "ho_fl_small"),
        *("directions_digits", "directions_fashion", "client_groups"),
        *("centred", "centred_fashion"),
    ],
)
def test_flag_files_can_be_read_and_say_what_they_do(name):
    path = FLAGFILES / f"{name}.flags"
    found = parsed(flagfile=path)
    text = path.read_text()
    assert f"python -m experiments.compare --flagfile=experiments/flagfiles/{path.name}" in text
    assert "Takes about" in text
    assert all(method.config.rounds >= method.config.eval_every for method in found)


def test_the_digits_compare_every_method():
    values = [method.config for method in parsed(flagfile=FLAGFILES / "compare_digits.flags")]

    def chosen(flag):
        return {each.get(flag) for each in values}

    assert chosen("algorithm") == set(METHODS)
    assert chosen("compression") >= set(choices.CODECS) - {"int4"}
    assert chosen("mask") == {"none", "random", "magnitude", "sensitivity"}
    assert chosen("optimizer") == {"sgd", "adam"}
    assert any(each.get("feedsign_epsilon") for each in values)


def test_the_demo_sets_fedavg_beside_decomfl_at_rates_and_local_steps_of_its_own():
    decomfl, *others = (method.config for method in parsed(flagfile=FLAGFILES / "demo.flags"))
    assert decomfl.algorithm == "decomfl" and {v.algorithm for v in others} == {"fedavg"}
    assert {v.local_steps for v in others} > {decomfl.local_steps}
    assert decomfl.learning_rate not in {v.learning_rate for v in others}
    shared = ("model", "num_clients", "clients_per_round", "batch_size", "partition")
    for values in others:
        assert [values.get(name) for name in shared] == [decomfl.get(name) for name in shared]


def test_the_figure_of_what_was_exchanged_leaves_out_the_first_model_in_one_panel():
    rows = [
        {"bytes_up": 10 * n, "bytes_down": 200 + 20 * n, "bytes_first_sync": 150 + 50 * (n > 1)}
        for n in (1, 2)
    ]
    rows = [
        row | {"round": i, "test_accuracy": i / 2, "forward_passes": 1, "backward_passes": 0}
        for i, row in enumerate(rows, start=1)
    ]
    run = comparison.Result("m", 0, 0.1, {"history": rows, "history_seconds": [1.0, 2.0]}, 32)
    figure = comparison.figures([run], {"m": 0.1}, [0.9], "m", BATCHES)["exchange.png"]
    drawn = {axes.get_xlabel(): axes.lines[0].get_xdata().tolist() for axes in figure.axes}
    assert drawn == {
        "sent, all clients": [10, 20],
        "received, all clients": [220, 240],
        "both, without the first model": [80, 60],
    }
    # Summaries of earlier versions don't tell the first model.
    for row in rows:
        del row["bytes_first_sync"]
    figure = comparison.figures([run], {"m": 0.1}, [0.9], "m", BATCHES)["exchange.png"]
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [2, 2, 0]
    assert comparison.cost_to(run, 0.9)["bytes_first_sync"] is None
    table = comparison.rows([run._replace(summary=run.summary | OF_A_WHOLE_RUN)], {"m": 0.1}, [0.9])
    lines = comparison.as_markdown(table, {}, "", BATCHES).splitlines()
    for line in (line for line in lines if line.startswith("| m ")):
        assert [cell.strip() for cell in line.split("|")[5:8]] == ["20 B", "240 B", "–"]


def test_bytes_and_passes_stand_side_by_side_in_one_figure():
    def run(name, batch_size, passes):
        row = {"round": 1, "test_accuracy": 0.5, "bytes_up": 10, "bytes_down": 20}
        row |= {"bytes_first_sync": 5, "forward_passes": passes[0], "backward_passes": passes[1]}
        summary = {"history": [row], "history_seconds": [1.0]}
        return comparison.Result(name, 0, 0.1, summary, batch_size)

    runs = [run("few", 8, (10, 10)), run("many", 32, (50, 0))]
    for counted, costs in (
        (BATCHES, [30, 50]),
        (comparison.Passes(1.0, by_example=True), [160, 1600]),
    ):
        found = comparison.figures(runs, {"few": 0.1, "many": 0.1}, [], "m", counted)["pareto.png"]
        bytes_spent, computed = found.axes
        assert [line.get_xdata()[0] for line in bytes_spent.lines[:2]] == [30, 30]
        assert [line.get_xdata()[0] for line in computed.lines[:2]] == costs
        unit = "example-passes" if counted.by_example else "forward passes"
        assert computed.get_xlabel().startswith(unit)


def test_methods_have_flags_of_their_own_and_share_the_rest():
    plain, few = parsed("decomfl", "few --algorithm=decomfl --num_perturbations=3 --momentum=0.5")
    assert (plain.name, few.name) == ("decomfl", "few")
    changed = {name for name in everything() if plain.config.get(name) != few.config.get(name)}
    assert changed == {"num_perturbations", "momentum", "learning_rate"}  # whose default follows
    assert (few.config.num_perturbations, few.config.momentum) == (3, 0.5)


def test_what_all_methods_are_given_may_be_without_effect_on_some(tmp_path):
    """But not what a method is given on its own."""
    flags = ["--num_perturbations=4", "--smoothing=0.1", "--method=decomfl", "--method=fedavg"]
    flags += ["--method=projection --algorithm=decomfl --estimator=projection"]
    (tmp_path / "some.flags").write_text("\n".join(flags))
    found = parsed(flagfile=tmp_path / "some.flags")
    assert {method.config.num_perturbations for method in found} == {4}
    for line in ("fedavg --smoothing=0.1", "decomfl --estimator=projection --smoothing=0.1"):
        with pytest.raises(UserError, match="--smoothing has no effect"):
            parsed(line)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no method to compare: give --method=NAME"),
        (["nonsense"], "'nonsense': .*should be one of"),
        (["decomfl --num_perturbation=3"], "Unknown command line flag 'num_perturbation'"),
        (["decomfl --num_perturbations=0"], "--num_perturbations must be >= 1, got 0"),
        (["decomfl --seed=1"], "--seed is no flag of a single method"),
        (["decomfl --workdir=a"], "--workdir is no flag of a single method"),
        (["decomfl 3"], "3 is no flag of a single method"),
        (["decomfl '"], "can't be read: No closing quotation"),
        (["decomfl", "decomfl --momentum=0"], "two methods are named 'decomfl'"),
        (["decomfl --smoothing=0"], "--smoothing must be positive"),
        (["decomfl", "b --algorithm=decomfl --model=mlp"], "all methods share"),
    ],
)
def test_methods_that_are_wrong(lines, message):
    with pytest.raises((UserError, ValueError), match=message):
        parsed(*lines)


def result(rate, accuracies, diverged=False):
    history = [{"round": i, "test_accuracy": a} for i, a in enumerate(accuracies)]
    summary = {"history": history, "best_test_accuracy": max(accuracies, default=None)}
    diverging = {"diverged_round": 3} if diverged else {}
    return comparison.Result("m", 0, rate, summary | diverging, 32)


def test_the_best_rate_is_the_most_accurate_then_the_quickest_that_did_not_diverge():
    slow, quick = result(0.1, [0.1, 0.5, 0.8]), result(0.2, [0.1, 0.8, 0.3])
    assert comparison.best_rate([slow, quick]) == 0.2
    assert comparison.best_rate([slow, result(0.3, [0.9], diverged=True)]) == 0.1
    assert comparison.best_rate([result(0.4, [], diverged=True), slow]) == 0.1
    with pytest.raises(ValueError, match="no results"):
        comparison.best_rate([])
