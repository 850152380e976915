"""Training and replaying as a user meets them: commands, messages, files."""

import json
import re
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from commands import TIMEOUT_SECONDS, Commands, num_logged, stray_lines, summary_of

from experiments import report

ROUNDS = 1000
# One local step and five directions: 20 bytes of broadcast a round.
QUADRATIC = """
# The run that most tests look at.
--task=quadratic
--learning_rate=0.02
--quadratic_dim=100
--effective_rank=5
--local_steps=1
--num_perturbations=5
--eval_every=20
"""
PROMISED = [
    "algorithm",
    "task",
    "model",
    "num_params",
    "rounds",
    "test_accuracy",
    "test_loss",
    "best_test_accuracy",
    "history",
    "bytes_up_per_client",
    "bytes_down_per_client",
    "bytes_fedavg_per_client",
    "compile_seconds",
    "run_seconds",
    "seconds_per_round",
    "device",
    "versions",
]
MORE = [
    "minimum_loss",
    "messages_rejected",
    "epsilon",
    "delta",
    "num_clients",
    "bytes_seed_per_client",
    "bytes_broadcast_per_client",
    "bytes_catch_up_per_client",
    "bytes_first_sync_per_client",
    "forward_passes",
    "backward_passes",
    "memory_bytes",
    "history_seconds",
    "total_seconds",
]
ROW = [
    *("round", "train_loss", "test_loss", "test_accuracy", "bytes_up", "bytes_down"),
    *("rejected", "epsilon"),
    *("forward_passes", "backward_passes", "bytes_first_sync"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nothing interrupted: its folder and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "quadratic.flags").write_text(QUADRATIC)
    ended = Commands(folder, cache).train(
        "--flagfile=quadratic.flags", f"--rounds={ROUNDS}", "--workdir=run"
    )
    assert ended.code == 0, ended.err
    return folder, ended


@pytest.fixture
def copied(whole, commands):
    """A folder of the test's own with the same run in it."""
    shutil.copytree(whole[0], commands.folder, dirs_exist_ok=True)
    return commands.folder / "run"


def test_the_console_shows_the_progress_and_a_table(whole):
    folder, (_, out, err) = whole
    assert stray_lines(err) == []
    assert f"{ROUNDS}/{ROUNDS}" in err and "rounds/s" in err and "test loss=" in err
    lines = out.splitlines()
    assert lines[0] == "decomfl on quadratic: quadratic, 100 params, 20 clients"
    assert lines[1].split() == [
        *("round", "train", "loss", "test", "loss", "accuracy", "up", "down")
    ]
    assert [int(line.split()[0]) for line in lines[2:12]] == list(range(100, 1001, 100))
    assert "Exchanging the model in as many rounds would have cost it 200 kB. FedAvg, which" in out
    assert lines[-1] == "Figures, log and summary are in run"
    assert sorted(path.name for path in folder.iterdir()) == ["quadratic.flags", "run"]


def test_the_table_sets_the_exchange_of_models_beside_scalars_where_it_costs_more(whole, capsys):
    summary = summary_of(whole[0] / "run")
    spent = summary["bytes_up_per_client"] + summary["bytes_down_per_client"]
    for change, told in (
        ({}, True),
        ({"algorithm": "fedavg"}, False),
        ({"bytes_fedavg_per_client": spent + 1}, True),
        ({"bytes_fedavg_per_client": spent}, False),
    ):
        report.print_table(summary | change)
        assert ("Exchanging the model" in capsys.readouterr().out) == told, change


def test_the_summary_holds_what_is_promised(whole):
    summary = summary_of(whole[0] / "run")
    assert sorted(summary) == sorted(PROMISED + MORE)
    assert (summary["algorithm"], summary["task"], summary["model"]) == (
        *("decomfl", "quadratic", "quadratic"),
    )
    assert (summary["num_params"], summary["rounds"], summary["num_clients"]) == (100, ROUNDS, 20)
    assert summary["test_accuracy"] is None and summary["best_test_accuracy"] is None

    history = summary["history"]
    assert [row["round"] for row in history] == list(range(20, ROUNDS + 1, 20))
    assert all(list(row) == ROW for row in history)
    assert summary["test_loss"] == history[-1]["test_loss"]
    assert summary["minimum_loss"] < summary["test_loss"] < 1.2 * summary["minimum_loss"]
    assert history[0]["train_loss"] > 1.2 * history[-1]["train_loss"] > 0

    # 5 of 20 clients a round; 5 float32 each way; keys of 8 bytes; 100 float32 of params.
    participations = 5 * ROUNDS
    assert summary["bytes_up_per_client"] == participations * 20 / 20
    assert summary["bytes_seed_per_client"] == participations * 8 / 20
    assert summary["bytes_broadcast_per_client"] == participations * 20 / 20
    assert summary["bytes_first_sync_per_client"] == 400
    assert summary["bytes_fedavg_per_client"] == participations * 2 * 400 / 20
    # In the end every client has been sent each round but those after its last.
    caught_up = summary["bytes_catch_up_per_client"] + participations * 28 / 20
    assert 0.98 * ROUNDS * 28 < caught_up <= ROUNDS * 28
    parts = ("seed", "broadcast", "catch_up", "first_sync")
    down = sum(summary[f"bytes_{part}_per_client"] for part in parts)
    assert summary["bytes_down_per_client"] == pytest.approx(down)
    assert history[-1]["bytes_up"] == 20 * summary["bytes_up_per_client"]
    assert history[-1]["bytes_first_sync"] == 20 * 400
    # 5 clients are new in the first round; 20 rounds leave hardly one that never took part.
    assert 5 * 400 <= history[0]["bytes_first_sync"] <= 20 * 400
    assert history[-1]["bytes_down"] == pytest.approx(20 * down)

    # Central differences along 5 directions by 5 clients.
    assert summary["forward_passes"] == history[-1]["forward_passes"] == ROUNDS * 5 * 10
    assert history[0]["forward_passes"] == 20 * 5 * 10
    assert summary["backward_passes"] == history[-1]["backward_passes"] == 0
    assert summary["memory_bytes"] > 100 * 4
    seconds = summary["history_seconds"]
    assert len(seconds) == len(history) and seconds[0] > 0 and sorted(seconds) == seconds
    assert seconds[-1] == summary["run_seconds"]

    assert summary["compile_seconds"] > 0 and summary["run_seconds"] > 0
    assert summary["seconds_per_round"] == summary["run_seconds"] / ROUNDS
    assert summary["total_seconds"] > summary["run_seconds"]
    assert re.fullmatch(r".+ x \d+", summary["device"])
    assert {"python", "zofl-jax", "jax", "jaxlib", "flax", "optax", "numpy"} == set(
        summary["versions"]
    )


def test_a_thousand_rounds_are_a_small_log(whole):
    workdir = whole[0] / "run"
    assert num_logged(workdir) == ROUNDS
    assert (workdir / "log.sqlite").stat().st_size < 200_000
    snapshots = sorted(path.name for path in (workdir / "snapshots").iterdir())
    assert snapshots[0] == "00000000.snapshot" and snapshots[-1] == "00001000.snapshot"
    for name in ("rounds.png", "bytes.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_a_complete_run_is_left_alone_and_can_be_extended(copied, commands):
    def content():
        return {
            path.name: path.read_bytes()
            for path in copied.rglob("*")
            if path.is_file() and path.name != "lock"
        }

    before, summary = content(), summary_of(copied)
    flags = ["--flagfile=quadratic.flags", "--workdir=run"]
    ended = commands.in_turn("train", *flags, f"--rounds={ROUNDS}")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(
        "The run in run is complete; give more --rounds to go on.\n\ndecomfl on quadratic"
    )
    assert content() == before

    # Without the last snapshot, and those that a slow run has saved each minute, all rounds are
    # replayed.
    for path in sorted((copied / "snapshots").iterdir())[1:-1]:
        path.unlink()
    (copied / "snapshots" / f"{ROUNDS:08d}.snapshot").write_bytes(b"damaged")
    ended = commands.in_turn("train", *flags, f"--rounds={ROUNDS + 50}")
    assert ended.code == 0
    assert stray_lines(ended.err) == [
        "note: Damaged and set aside in run/snapshots: 00001000.snapshot; that of round 0 is used "
        "instead.",
        f"resuming run after round {ROUNDS}",
    ]
    extended = summary_of(copied)
    assert extended["rounds"] == num_logged(copied) == ROUNDS + 50
    assert extended["history"][:-3] == summary["history"]
    assert [row["round"] for row in extended["history"][-3:]] == [1020, 1040, 1050]
    assert extended["run_seconds"] > summary["run_seconds"]
    assert json.loads((copied / "flags.json").read_text())["rounds"] == ROUNDS + 50


def test_any_round_is_replayed(copied, commands):
    ended = commands.replay("--workdir=run", "--round=500", "--out=model.npz")
    assert (ended.code, ended.err) == (0, "")
    row = summary_of(copied)["history"][24]
    assert row["round"] == 500
    model, fingerprint, saved = ended.out.splitlines()
    assert model == f"model after 500 rounds: test loss {row['test_loss']:.4f}"
    assert re.fullmatch(r"fingerprint [0-9a-f]{8}: bit-identical to the run", fingerprint)
    assert saved == "saved 1 arrays to model.npz"
    with np.load(commands.folder / "model.npz") as arrays:
        assert {name: array.shape for name, array in arrays.items()} == {"x": (100,)}
        assert np.abs(arrays["x"]).max() > 0


def wait_for_rounds(process, workdir, count):
    """Returns how many rounds are logged, once they are at least `count`."""
    while process.poll() is None:
        logged = num_logged(workdir)
        if logged >= count:
            return logged
        time.sleep(0.005)
    raise AssertionError(process.communicate())


def test_a_stopped_run_goes_on_to_the_same_bits(whole, commands):
    """Ctrl-C first, then kill -9; the params and the optimiser's state are compared."""
    workdir = commands.folder / "stopped"
    (commands.folder / "quadratic.flags").write_text(QUADRATIC)
    flags = ["--flagfile=quadratic.flags", f"--rounds={ROUNDS}", "--workdir=stopped"]
    logged = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        process = commands.start("-m", "experiments.train", *flags)
        wait_for_rounds(process, workdir, logged + 60)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
        before, logged = logged, num_logged(workdir)
        assert before + 60 <= logged < ROUNDS
        assert not (workdir / "summary.json").exists()
        strays = [f"resuming stopped after round {before}"] if before else []
        if number == signal.SIGINT:
            assert process.returncode == 130
            strays.append("stopped; the same command goes on from here")
        else:
            assert process.returncode == -signal.SIGKILL
        assert stray_lines(err) == strays

    ended = commands.in_turn("train", *flags)
    assert ended.code == 0
    assert stray_lines(ended.err) == [f"resuming stopped after round {logged}"]
    uninterrupted = whole[0] / "run"
    snapshot = Path("snapshots") / f"{ROUNDS:08d}.snapshot"
    assert (workdir / snapshot).read_bytes() == (uninterrupted / snapshot).read_bytes()
    same = [key for key in PROMISED if "seconds" not in key]
    summaries = summary_of(workdir), summary_of(uninterrupted)
    assert [summaries[0][key] for key in same] == [summaries[1][key] for key in same]

    replays = [
        commands.in_turn("replay", f"--workdir={path}", f"--out={name}.npz")
        for path, name in ((workdir, "stopped"), (uninterrupted, "whole"))
    ]
    assert [ended.code for ended in replays] == [0, 0]
    assert "bit-identical to the run" in replays[0].out
    assert replays[0].out.splitlines()[:2] == replays[1].out.splitlines()[:2]
    with (
        np.load(commands.folder / "stopped.npz") as stopped,
        np.load(commands.folder / "whole.npz") as params,
    ):
        assert stopped["x"].tobytes() == params["x"].tobytes()


def test_mistakes_end_with_one_sentence_and_leave_nothing(copied, commands):
    (commands.folder / "notes").mkdir()
    (commands.folder / "notes" / "thesis.tex").touch()
    same = ["--flagfile=quadratic.flags", "--workdir=run"]
    cases = [
        (["--task=nonsense"], r"--task=nonsense is unknown; use digits, idx, npz, tfds:NAME, "),
        (["--task=npz"], r"--task=npz needs --data_dir="),
        (["--task=npz", "--data_dir=no.npz"], r"there is no file no\.npz: "),
        (["--clients_per_round=30"], r"--clients_per_round=30 is more than --num_clients=20"),
        (["--smoothing=0"], r"--smoothing must be positive, got 0\.0"),
        (["--prng_impl=rbg"], r"prng_impl 'rbg' is refused: .*; use one of threefry2x32, "),
        (["--schedule=nonsense"], r"--schedule: can't read 'nonsense'; write "),
        (["--batch_size=100"], r"20 of 20 clients have fewer examples than batch_size=100 "),
        (["seed=1"], r"unknown argument 'seed=1'; options are flags, as in --seed=1"),
        (["--workdir=notes"], r"notes holds files but no run"),
        (
            [*same, f"--rounds={ROUNDS}", "--learning_rate=0.5"],
            r"--learning_rate is 0\.5 but the run in run was started with 0\.02: ",
        ),
        ([*same, "--rounds=10"], rf"run holds {ROUNDS} rounds already; give --rounds={ROUNDS} or"),
    ]
    kept = (copied / "log.sqlite").read_bytes()
    for case, message in cases:
        elsewhere = [] if any("--workdir" in flag for flag in case) else ["--workdir=new"]
        ended = commands.in_turn("train", *elsewhere, *case)
        assert (ended.code, ended.out) == (1, ""), case
        assert re.fullmatch(rf"error: .*{message}.*\n", ended.err), ended.err
    assert not (commands.folder / "new").exists() and not (commands.folder / "runs").exists()
    assert (copied / "log.sqlite").read_bytes() == kept


def test_mistakes_in_a_command_by_itself(commands):
    ended = commands.in_turn("train", "--num_clients=0", "--workdir=new")
    assert ended.code == 1 and ended.out == ""
    assert ended.err == "error: --num_clients must be >= 1, got 0\n"
    ended = commands.train("--num_clients=many", "--workdir=new")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("FATAL Flags parsing error: flag --num_clients=many: ")
    assert "Traceback" not in ended.err
    ended = commands.in_turn("replay", "--workdir=nowhere")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        "error: nowhere is not a run (it has no flags.json): choose the --workdir of a run\n"
    )
    assert list(commands.folder.iterdir()) == []


def test_a_diverging_run_says_so_and_keeps_what_it_has(quickly):
    flags = [
        "--task=quadratic",
        "--quadratic_dim=20",
        "--effective_rank=5",
        "--local_steps=1",
        "--learning_rate=0.5",
        "--schedule=12:lr=1e30",
        "--rounds=40",
        "--eval_every=5",
        "--workdir=run",
        "--figures",
    ]
    ended = quickly.in_turn("train", *flags)
    assert ended.code == 1
    (sentence,) = stray_lines(ended.err)
    found = re.fullmatch(
        r"error: round (\d+) diverged \(training loss (nan|inf)\); the model after (\d+) rounds is "
        r"kept; type --learning_rate=0\.05 \(a tenth\), or --auto_lr, with another --workdir",
        sentence,
    )
    diverged = int(found[1])
    assert found[1] == found[3] and 13 <= diverged < 20
    workdir = quickly.folder / "run"
    summary = summary_of(workdir)
    assert sorted(summary) == sorted([*PROMISED, *MORE, "diverged_round", "failure"])
    assert f"error: {summary['failure']}" == sentence
    assert summary["rounds"] == summary["diverged_round"] == num_logged(workdir) == diverged
    assert [row["round"] for row in summary["history"]] == [5, 10]
    assert (workdir / "rounds.png").exists()
    assert "Figures, log and summary are in run" in ended.out

    again = quickly.in_turn("train", *flags)
    assert again.code == 1
    assert stray_lines(again.err) == [f"resuming run after round {diverged}", sentence]
    assert {**summary_of(workdir), **times(summary)} == summary


def times(summary):
    return {key: value for key, value in summary.items() if "seconds" in key}


def events(folder):
    """Returns tag -> [(step, value)] of TensorBoard's files."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        at = 0
        while at < len(data):  # length, its checksum, the event, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += size + 16
    return found


def test_real_data_with_tensorboard_in_a_folder_named_by_the_flags(quickly):
    pytest.importorskip("tensorboardX")
    ended = quickly.in_turn(
        "train",
        "--num_clients=10",
        "--local_steps=1",
        "--num_perturbations=5",
        "--rounds=40",
        "--eval_every=20",
        "--learning_rate=0.05",
        "--partition=dirichlet",
        "--weighting=examples",
        "--tensorboard",
        "--noprogress",
        "--figures",
    )
    assert (ended.code, ended.err) == (0, "")
    (workdir,) = (quickly.folder / "runs").iterdir()
    assert re.fullmatch(r"digits-softmax-decomfl-[0-9a-f]{8}", workdir.name)
    assert f"Figures, log and summary are in runs/{workdir.name}\n" in ended.out

    summary = summary_of(workdir)
    assert sorted(summary) == sorted(PROMISED + MORE)
    assert (summary["model"], summary["num_params"]) == ("softmax", 650)
    accuracies = [row["test_accuracy"] for row in summary["history"]]
    assert 0.3 < summary["test_accuracy"] == accuracies[-1] <= 1
    assert summary["best_test_accuracy"] == max(accuracies)
    assert summary["minimum_loss"] is None
    # Five scalars and the number of examples.
    assert summary["bytes_up_per_client"] == 40 * 5 * 24 / 10
    for name in ("labels.png", "rounds.png", "bytes.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")

    logged = events(workdir / "tensorboard")
    assert [step for step, _ in logged["train/loss"]] == list(range(1, 41))
    for tag, key in (
        ("test/accuracy", "test_accuracy"),
        ("test/loss", "test_loss"),
        ("bytes/up", "bytes_up"),
        ("bytes/down", "bytes_down"),
    ):
        rows = [(row["round"], pytest.approx(row[key])) for row in summary["history"]]
        assert logged[tag] == rows, tag
