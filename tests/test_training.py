"""Runs from Python: the front door, the log and its resume, observers, and the command's bits."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tqdm
from absl.testing import flagsaver
from tiny_tasks import BATCH_SIZE, softmax_task

import zofl_jax as zofl
from experiments import train as command
from zofl_jax.configuration import schedules
from zofl_jax.directions import estimators
from zofl_jax.engine import rounds
from zofl_jax.runs.directory import RunError, open_run, read_flags
from zofl_jax.runs.run_log import RunLog
from zofl_jax.training import described, identity, loop, observers

PACKAGE = Path(zofl.__file__)
ROUNDS, EVERY = 40, 5


def own_loss(params, batch):
    """Mean squared error of the probabilities: no loss of the library's."""
    logits = batch["features"] @ params["kernel"] + params["bias"]
    hits = jax.nn.one_hot(batch["label"], 3)
    return jnp.mean((jax.nn.softmax(logits) - hits) ** 2)


def unbounded_loss(params, batch):
    return own_loss(params, batch) + jnp.sum(params["bias"] ** 2)


def make_simulator(rate=0.1, loss=own_loss, seed=0, cohort=3, task=None, **more):
    task = (task or softmax_task())._replace(loss=loss)
    estimator = estimators.central_difference(2, 1e-2)
    method = zofl.algorithms.decomfl(loss, estimator, optax.sgd(rate, momentum=0.9), local_steps=2)
    sizes = {"clients_per_round": cohort, "batch_size": BATCH_SIZE} | more
    return zofl.make_simulator(method, task, seed=seed, **sizes)


@pytest.fixture(scope="module")
def simulator():
    return make_simulator()


class Watcher(observers.Observer):
    """Notes what it hears; interrupts as Ctrl-C does once so many rounds are done."""

    def __init__(self, interrupt_at=None, wants=False):
        self.heard, self.done, self._at, self._wants = [], [], interrupt_at, wants

    def start(self, context):
        self.heard.append(("start", context.rounds_done))

    def wants_state(self, rounds_done):
        return self._wants

    def rounds(self, trace, counted, progress):
        self.heard.append("rounds")
        self.done.append(progress.ledger.num_rounds)
        assert len(trace.losses) == len(counted)
        if self._wants:
            assert int(progress.state.round) == self.done[-1]
        if self._at is not None and self.done[-1] >= self._at:
            raise KeyboardInterrupt

    def record(self, record):
        self.heard.append(("record", record.round))

    def close(self):
        self.heard.append("close")

    def end(self, summary):
        self.heard.append("end")
        return {"noted": summary["rounds"]}


def train(simulator, workdir, *, watching=(), rounds=ROUNDS, said=None, **options):
    """Trains quietly; what the user is told goes to `said`."""
    told = [] if said is None else said
    return zofl.train(
        simulator,
        workdir=workdir,
        rounds=rounds,
        eval_every=EVERY,
        observers=watching,
        tell=told.append,
        **options,
    )


def logged(workdir):
    """Returns the rows of the log, and its metrics but for times."""
    log = RunLog(workdir / "log.sqlite")
    try:
        metrics = {
            at: {name: value for name, value in found.items() if "seconds" not in name}
            for at, found in log.metrics().items()
        }
        return log.rounds(), metrics
    finally:
        log.close()


def snapshot(workdir, rounds):
    return (workdir / "snapshots" / f"{rounds:08d}.snapshot").read_bytes()


def evaluations(workdir):
    """Returns the metrics of evaluated rounds; checksums stand where dispatches ended."""
    rows, metrics = logged(workdir)
    return rows, {at: found for at, found in metrics.items() if "test_loss" in found}


# The front door.


def test_the_import_takes_nothing_with_it():
    code = """
import sys, time
began = time.process_time()
import zofl_jax
took = time.process_time() - began
heavy = {"jax", "jaxlib", "flax", "optax", "numpy", "matplotlib", "tqdm"} & set(sys.modules)
assert not heavy, heavy
assert took < 0.05, took
from zofl_jax import keys, perturbations
assert zofl_jax.perturbations is perturbations and "train" in dir(zofl_jax)
assert "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parents[1])


def test_every_name_is_what_type_checkers_think():
    tree = ast.parse(PACKAGE.read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(told) == sorted(zofl.__all__)
    for name, module in told.items():
        found = getattr(zofl, name)
        assert name in dir(zofl)
        if isinstance(found, type(zofl)):
            assert found.__name__ == f"{module}.{name}"
        else:
            assert found is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = zofl.nonsense


# The log and the resume.


@pytest.fixture(scope="module")
def whole(simulator, tmp_path_factory):
    """A run that nothing interrupted: its folder and how it ended."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train(simulator, workdir)


@pytest.mark.optimized
def test_an_interrupted_run_ends_with_the_same_bits(simulator, whole, tmp_path):
    workdir, said = tmp_path / "run", []
    done = []
    for at in (7, 23):
        stopping = Watcher(interrupt_at=at)
        with pytest.raises(KeyboardInterrupt):
            train(simulator, workdir, watching=(stopping,), said=said)
        assert stopping.heard[0] == ("start", done[-1] if done else 0)
        assert stopping.heard[-1] == "close"
        done.append(len(logged(workdir)[0]))
        assert at <= done[-1] < ROUNDS  # all that was done is kept
        assert not (workdir / "summary.json").exists()
    # As after a restart: everything is built anew.
    outcome = train(make_simulator(), workdir, said=said)
    assert said == [f"resuming {workdir} after round {n}" for n in done]

    uninterrupted, expected = whole
    assert snapshot(workdir, ROUNDS) == snapshot(uninterrupted, ROUNDS)
    assert evaluations(workdir) == evaluations(uninterrupted)
    fingerprint = rounds.fingerprint
    ours, theirs = (fingerprint(o.progress.state.params) for o in (outcome, expected))
    assert int(ours) == int(theirs)
    same = {name for name in expected.summary if "seconds" not in name} - {"memory_bytes"}
    assert {n: outcome.summary[n] for n in same} == {n: expected.summary[n] for n in same}


def test_the_summary_is_that_of_a_run_without_names(whole):
    workdir, outcome = whole
    written = json.loads((workdir / "summary.json").read_text())
    assert written == json.loads(json.dumps(outcome.summary))
    assert (written["algorithm"], written["task"], written["rounds"]) == ("", "softmax", ROUNDS)
    assert len(written["history"]) == len(written["history_seconds"]) == ROUNDS / EVERY
    assert outcome.failure is None
    lines = zofl.table(outcome.summary).splitlines()
    assert lines[0] == "softmax: 18 params, 6 clients"
    assert [int(line.split()[0]) for line in lines[2:10]] == list(range(5, 41, 5))


def test_names_are_in_the_summary_and_the_table(simulator, tmp_path):
    about = zofl.About("mine", "three labels", "gguf:folder/file.gguf", minimum_loss=0.1)
    outcome = train(simulator, tmp_path / "run", rounds=2, about=about)
    summary = outcome.summary
    assert (summary["task"], summary["minimum_loss"]) == ("three labels", 0.1)
    table = zofl.table(summary, "A remark.")
    assert table.startswith("mine on three labels: file, 18 params, 6 clients\n")
    assert "\nA remark.\n" in table


def test_a_complete_run_is_read_and_can_be_extended(simulator, tmp_path):
    workdir, said = tmp_path / "run", []
    first = train(simulator, workdir, rounds=5)
    watcher = Watcher()
    again = train(simulator, workdir, rounds=5, watching=(watcher,), said=said)
    assert (watcher.heard, said) == ([], [])
    assert again.summary == json.loads(json.dumps(first.summary))
    np.testing.assert_array_equal(
        again.progress.state.params["kernel"], first.progress.state.params["kernel"]
    )
    assert train(simulator, workdir, rounds=8).summary["rounds"] == 8
    with pytest.raises(RunError, match="holds 8 rounds already; give --rounds=8 or more"):
        train(simulator, workdir, rounds=5)


def other_data():
    task = softmax_task()
    features = task.train.examples["features"] + 1
    examples = {**task.train.examples, "features": features}
    return task._replace(train=task.train._replace(examples=examples))


OTHERS = {
    "learning rate": ({"rate": 0.2}, "--algorithm is "),
    "loss": ({"loss": lambda p, b: 2 * own_loss(p, b)}, "--algorithm is "),
    "seed": ({"seed": 1}, "--seed is "),
    "cohort": ({"cohort": 2}, "--clients_per_round is 2 but the run in .* was started with 3"),
    "batch size": ({"batch_size": 2}, "--batch_size is 2 but the run in .* was started with "),
    "weighting": ({"weighting": "examples"}, "--weighting is 'examples'"),
    "data": ({"task": other_data()}, "training examples 'features' changed since the run"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_simulation_is_refused(what, whole):
    change, message = OTHERS[what]
    before = snapshot(whole[0], ROUNDS)
    with pytest.raises(RunError, match=message):
        train(make_simulator(**change), whole[0], rounds=ROUNDS + 1)
    assert snapshot(whole[0], ROUNDS) == before and len(logged(whole[0])[0]) == ROUNDS


def test_settings_of_ones_own_and_another_release_of_jax(simulator, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    train(simulator, workdir, rounds=1, settings={"malicious": 4})
    assert read_flags(workdir)["malicious"] == 4
    with pytest.raises(RunError, match="--malicious is 5"):
        train(simulator, workdir, rounds=2, settings={"malicious": 5})
    # Another release may trace the same functions to another program.
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    train(simulator, workdir, rounds=2, settings={"malicious": 4})
    assert read_flags(workdir)["algorithm"].startswith("jax 0.0.1, from round 0 ")


def test_what_identifies_a_simulation_does_not_depend_on_what_ran_before(simulator):
    first = identity.settings(simulator)
    jax.clear_caches()
    assert identity.settings(make_simulator()) == first


def test_a_diverging_run_says_what_to_do(tmp_path):
    said = []
    simulator = make_simulator(rate=1e30, loss=unbounded_loss)
    outcome = train(simulator, tmp_path / "run", said=said)
    assert outcome.failure.endswith("; try a tenth of the learning rate, with another workdir")
    assert said[-1] == f"note: {outcome.failure}"
    assert outcome.summary["diverged_round"] == outcome.progress.ledger.num_rounds < ROUNDS
    advice = observers.Advice(rate="", start="")
    again = train(simulator, tmp_path / "run", said=said, advice=advice)
    assert again.failure + "; try a tenth of the learning rate, with another workdir" == (
        outcome.failure
    )


def test_bad_arguments_make_no_directory(simulator, tmp_path):
    with pytest.raises(ValueError, match=r"rounds must be >= 1 .*, got 0 and 50"):
        zofl.train(simulator, workdir=tmp_path / "run", rounds=0)
    assert not (tmp_path / "run").exists()


# Observers.


def test_the_hooks_come_in_their_order(simulator, tmp_path):
    watcher, wanting = Watcher(), Watcher(wants=True)
    outcome = train(simulator, tmp_path / "run", watching=(watcher, wanting))
    assert watcher.heard == wanting.heard
    assert watcher.heard[0] == ("start", 0) and watcher.heard[-2:] == ["close", "end"]
    records = [what for what in watcher.heard if what[0] == "record"]
    assert records == [("record", n) for n in range(EVERY, ROUNDS + 1, EVERY)]
    assert watcher.done[-1] == ROUNDS and watcher.done == sorted(set(watcher.done))
    assert outcome.summary["noted"] == ROUNDS


def test_whoever_fails_the_others_are_closed(simulator, tmp_path):
    class Failing(observers.Observer):
        def start(self, context):
            raise ArithmeticError("no")

    before, after = Watcher(), Watcher()
    with pytest.raises(ArithmeticError):
        train(simulator, tmp_path / "run", watching=(before, Failing(), after))
    assert (before.heard, after.heard) == ([("start", 0), "close"], [])
    train(simulator, tmp_path / "run", rounds=1)  # the directory is free


def test_snapshots_come_when_they_are_due(simulator, tmp_path):
    seldom, often = tmp_path / "seldom", tmp_path / "often"
    for workdir, rule in ((seldom, None), (often, observers.Snapshots(seconds=0.0, share=1.0))):
        with pytest.raises(KeyboardInterrupt):
            train(simulator, workdir, watching=(Watcher(interrupt_at=20),), snapshots=rule)
    rounds = [
        sorted(int(path.stem) for path in (workdir / "snapshots").glob("*.snapshot"))
        for workdir in (seldom, often)
    ]
    assert rounds[0] == [0] and len(rounds[1]) == 3 and rounds[1][-1] >= 10
    with pytest.raises(ValueError, match=r"share in \(0, 1\], got 60.0 and 0"):
        observers.Snapshots(share=0)


def test_the_progress_bar(simulator, tmp_path, capsys):
    train(simulator, tmp_path / "run", rounds=10, watching=(observers.ProgressBar(),))
    shown = capsys.readouterr().err
    assert "10/10" in shown and "test accuracy=" in shown and "loss=" in shown
    train(simulator, tmp_path / "run", rounds=15, watching=(observers.ProgressBar(shown=False),))
    assert capsys.readouterr().err == ""
    with tqdm.tqdm(total=40) as bar:
        shared = observers.ProgressBar(bar)
        for name in ("run", "other"):
            train(simulator, tmp_path / name, rounds=20, watching=(shared,))
        assert (bar.n, bar.initial) == (40, 15)


def test_a_rising_loss_is_told_once(simulator, tmp_path):
    said = []
    train(
        simulator,
        tmp_path / "run",
        rounds=1,
        watching=(observers.DivergenceWarning(),),
        said=said,
    )
    warning = observers.DivergenceWarning()
    with open_run(tmp_path / "run", read_flags(tmp_path / "run")) as run:
        context = observers.Context(
            run, simulator, simulator.start(None), 100, 0, observers.Advice(), said.append
        )
        warning.start(context)
        trace = simulator.advance(*simulator.start(None)[:2], 1)[2]
        for loss in [1.0] * 40 + [3.0] * 40:
            warning.rounds(trace._replace(losses=np.array([loss])), [None], None)
    (sentence,) = said
    assert sentence.startswith("note: the training loss rises, to ")
    assert sentence.endswith("; try a tenth of the learning rate, with another workdir")


def test_diagnoses_are_those_of_an_uninterrupted_run(simulator, tmp_path):
    watch = observers.Diagnoses(2 * EVERY, BATCH_SIZE)
    with pytest.raises(KeyboardInterrupt):
        train(simulator, tmp_path / "stopped", watching=(watch, Watcher(interrupt_at=17)))
    found = [
        train(simulator, tmp_path / name, watching=(watch,)).summary
        for name in ("whole", "stopped")
    ]
    assert [row["round"] for row in found[0]["diagnoses"]] == [0, 10, 20, 30, 40]
    assert found[0]["diagnoses"] == found[1]["diagnoses"]
    assert "effective rank" in zofl.table(found[1])
    with pytest.raises(ValueError, match="every=7 must be a multiple of eval_every=5"):
        train(simulator, tmp_path / "no", watching=(observers.Diagnoses(7, BATCH_SIZE),))


def test_figures(simulator, tmp_path):
    counts = np.ones((6, 3), int)
    train(simulator, tmp_path / "run", rounds=5, watching=(observers.Figures(counts),))
    for name in ("labels.png", "rounds.png", "bytes.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_tensorboard_writes_events_and_its_absence_is_told(simulator, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    train(simulator, tmp_path / "run", rounds=5, watching=(observers.TensorBoard(),))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(RunError, match=r"need the package tensorboardX; pip install"):
        train(simulator, tmp_path / "run", rounds=10, watching=(observers.TensorBoard(),))


def test_the_usual_observers_draw_warn_and_show(simulator, tmp_path, capsys):
    zofl.train(simulator, workdir=tmp_path / "run", rounds=5, eval_every=5)
    assert "5/5" in capsys.readouterr().err
    assert (tmp_path / "run" / "rounds.png").exists()


# The command.


def test_the_command_and_the_library_make_the_same_run(tmp_path, capsys):
    flags = (
        *("--num_clients=10", "--clients_per_round=4", "--batch_size=8", "--local_steps=2"),
        *("--num_perturbations=3", "--learning_rate=0.05", "--momentum=0", "--seed=3"),
        *("--smoothing=0.001", "--estimator=central", "--perturbation=gaussian"),
        *("--rounds=20", "--eval_every=10", "--noprogress"),
    )
    with flagsaver.flagsaver():
        command.FLAGS(["train", *flags, f"--workdir={tmp_path / 'command'}"])
        command.main()
    assert f"Figures, log and summary are in {tmp_path / 'command'}" in capsys.readouterr().out

    dataset = zofl.sources.digits()
    root = zofl.keys.root(3)
    order, offsets = zofl.partition.iid(root.partition, dataset.train["label"], num_clients=10)
    model = zofl.mlp.Softmax(dataset.num_classes)
    task = zofl.vision.classification(dataset, model, order, offsets)
    # The flags' smoothing follows a schedule; as a constant it is rounded otherwise.
    smoothing = schedules.piecewise(schedules.parse_schedule(""), "smoothing", 1e-3)
    method = zofl.algorithms.decomfl(
        task.loss,
        zofl.estimators.central_difference(3, smoothing),
        optax.sgd(jnp.asarray(0.05)),
        local_steps=2,
    )
    simulator = zofl.make_simulator(
        method,
        task,
        clients_per_round=4,
        batch_size=8,
        seed=3,
        conditions=zofl.Conditions(max_message=1e6),
    )
    workdir = tmp_path / "library"
    outcome = zofl.train(
        simulator, workdir=workdir, rounds=20, eval_every=10, observers=[observers.Figures()]
    )
    assert snapshot(workdir, 20) == snapshot(tmp_path / "command", 20)
    assert evaluations(workdir) == evaluations(tmp_path / "command")
    theirs = json.loads((tmp_path / "command" / "summary.json").read_text())
    ours = json.loads(json.dumps(outcome.summary))
    own = ("algorithm", "model", "memory_bytes")
    assert list(ours) == list(theirs)
    for name in theirs:
        if "seconds" not in name and name not in own:
            assert ours[name] == theirs[name], name
    assert isinstance(outcome, loop.Outcome)


def test_a_run_of_the_command_is_gone_on_with_from_python_to_the_commands_bits(tmp_path, capsys):
    flags = ["--num_clients=10", "--batch_size=8", "--local_steps=2", "--num_perturbations=3"]
    flags += ["--algorithm=hiso", "--hiso_nu=0.05", "--learning_rate=0.05", "--eval_every=6"]

    def run(name, rounds):
        with flagsaver.flagsaver():
            workdir = f"--workdir={tmp_path / name}"
            command.FLAGS(["train", *flags, workdir, f"--rounds={rounds}", "--noprogress"])
            command.main()

    run("command", 18)
    run("both", 7)
    settings = {"num_clients": 10, "batch_size": 8, "local_steps": 2, "num_perturbations": 3}
    settings |= {"hiso_nu": 0.05, "learning_rate": 0.05, "eval_every": 6}
    stop = Watcher(interrupt_at=13)
    with pytest.raises(KeyboardInterrupt):
        zofl.simulate(
            "digits", "hiso", workdir=tmp_path / "both", rounds=18, observers=[stop], **settings
        )
    outcome = zofl.simulate(
        "digits", "hiso", workdir=tmp_path / "both", rounds=18, observers=(), **settings
    )
    assert snapshot(tmp_path / "both", 18) == snapshot(tmp_path / "command", 18)
    assert logged(tmp_path / "both")[0] == logged(tmp_path / "command")[0]
    assert outcome.summary["rounds"] == 18
    with pytest.raises(RunError, match=r"--learning_rate is 0.5 but"):
        zofl.simulate(
            "digits",
            "hiso",
            workdir=tmp_path / "both",
            rounds=18,
            **(settings | {"learning_rate": 0.5}),
        )


def test_advice_on_the_rate_can_be_left_out_as_a_comparison_does():
    config = zofl.resolve({"learning_rate": 0.5})
    assert described.advice(config).rate == "give learning_rate=0.05"
    assert described.advice(config, "").rate == ""
