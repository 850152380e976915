"""Who watches a run: small objects that show, warn, measure and draw.

    class Losses(observers.Observer):
        def rounds(self, trace, counted, progress):
            print(trace.losses)

    train(simulator, workdir="runs/mine", rounds=400, observers=(Losses(), observers.ProgressBar()))

An observer has the hooks of `Observer`, all of which do nothing unless it says otherwise. Their
host work is done while the device does the next rounds. What an observer hears of is in the log
already, so one that fails or is interrupted loses no round. One observer watches one run at a
time, and may watch another after it.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from zofl_jax.engine import ledger, simulation
from zofl_jax.observation import diagnostics, divergence
from zofl_jax.runs import recording
from zofl_jax.runs.directory import Run, RunError
from zofl_jax.training import summaries


def to_stderr(line: str) -> None:
    """Writes a line for the user, above a progress bar if there is one."""
    tqdm.tqdm.write(line, file=sys.stderr)


class Advice(NamedTuple):
    """What to do about a run that fails, as the end of a sentence; "" says nothing.

    Attributes:
      rate: where its loss rises, or it diverges.
      start: where its very first step fails, so that no learning rate is to blame.
    """

    rate: str = "try a tenth of the learning rate, with another workdir"
    start: str = "no step had been taken, so the learning rate is not the cause: check the data"


class Context(NamedTuple):
    """What an observer is told at the start of a run.

    Attributes:
      run: the open run directory.
      simulator: whose rounds these are.
      progress: where the run starts. Its state and memory are consumed by the first rounds, so
        only `Observer.start` may read them.
      rounds: rounds in all, those already done included.
      eval_every: rounds between evaluations, 0 for one at the end.
      advice: what to tell the user of a run that fails.
      tell: writes a line for the user.
    """

    run: Run
    simulator: simulation.Simulator
    progress: simulation.Progress
    rounds: int
    eval_every: int
    advice: Advice
    tell: Callable[[str], None]

    @property
    def rounds_done(self) -> int:
        """Rounds that were done before."""
        return self.progress.ledger.num_rounds


class Observer:
    """The hooks of one who watches a run, in the order in which they are called."""

    def start(self, context: Context) -> None:
        """Hears of a run before its first round; whatever it keeps of an earlier run goes."""

    def wants_state(self, rounds_done: int) -> bool:
        """Returns whether `rounds` reads the state or the memory after so many rounds.

        It is asked once after each dispatch, and the device waits where the answer is yes.
        """
        return False

    def rounds(
        self,
        trace: simulation.Trace,
        counted: Sequence[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        """Hears of the rounds of one dispatch.

        Args:
          trace: what is known of its n >= 1 rounds.
          counted: the bytes of each of them.
          progress: up to there. Its state and memory may be consumed, unless `wants_state` was
            asked of this round and said yes.
        """

    def record(self, record: simulation.Record) -> None:
        """Hears of an evaluation."""

    def close(self) -> None:
        """Hears that the rounds are over, however they ended, and lets go of what it holds.

        It is called if `start` has returned, once, with the last observer first.
        """

    def end(self, summary: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns what to add to the summary of a run that is complete or has diverged.

        Args:
          summary: so far, see `summaries.summarise`.
        """
        return {}


class Snapshots:
    """When to save a snapshot: once in so many seconds, and more seldom if saving one takes long.

    Args:
      seconds: between snapshots.
      share: the longest part of the time that saving them may take.

    >>> rule = Snapshots(seconds=60.0, share=0.01)
    >>> rule.start(0.0)
    >>> rule.due(59.0), rule.due(60.0)
    (False, True)
    >>> rule.saved(began=60.0, ended=63.0)  # of a large model
    >>> rule.due(362.0), rule.due(363.0)
    (False, True)
    """

    def __init__(self, seconds: float = 60.0, share: float = 0.01):
        if not (seconds >= 0 and 0 < share <= 1):
            raise ValueError(f"seconds must be >= 0 and share in (0, 1], got {seconds} and {share}")
        self._seconds, self._share = seconds, share
        self._next = 0.0

    def start(self, now: float) -> None:
        """Starts at a time, in seconds of any clock."""
        self._next = now + self._seconds

    def due(self, now: float) -> bool:
        """Returns whether it is time."""
        return now >= self._next

    def saved(self, began: float, ended: float) -> None:
        """Takes note of a snapshot."""
        self._next = ended + max(self._seconds, (ended - began) / self._share)


class ProgressBar(Observer):
    """Shows rounds, the last training loss and the last evaluation.

    Args:
      bar: one that several runs share, which goes on with the rounds of this one; a new one
        unless given.
      shown: whether a new one is shown.
    """

    def __init__(self, bar: tqdm.tqdm | None = None, *, shown: bool = True):
        self._given, self._shown = bar, shown

    def start(self, context: Context) -> None:
        """Shows the bar at the rounds that were done before."""
        self._facts: dict[str, str] = {}
        if self._given is not None:
            self._bar = self._given
            skip(self._bar, context.rounds_done)
        else:
            self._bar = tqdm.tqdm(
                total=context.rounds,
                initial=context.rounds_done,
                unit=" rounds",
                dynamic_ncols=True,
                disable=not self._shown,
            )

    def rounds(
        self,
        trace: simulation.Trace,
        counted: Sequence[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        """Moves the bar on."""
        self._facts["loss"] = f"{trace.losses[-1]:.4g}"
        if progress.ledger.rejected:
            self._facts["rejected"] = str(progress.ledger.rejected)
        self._bar.set_postfix(self._facts, refresh=False)
        self._bar.update(len(counted))

    def record(self, record: simulation.Record) -> None:
        """Shows the accuracy, or the loss where there is none."""
        name = "accuracy" if "accuracy" in record.metrics else "loss"
        if name in record.metrics:
            self._facts[f"test {name}"] = f"{record.metrics[name]:.4g}"
        if record.epsilon is not None:
            self._facts["ε"] = f"{record.epsilon:.3g}"
        self._bar.set_postfix(self._facts)

    def close(self) -> None:
        """Leaves a bar of its own as it stands."""
        if self._given is None:
            self._bar.close()


def skip(bar: tqdm.tqdm, rounds: int) -> None:
    """Moves a bar on by rounds that were done before, without counting them for the speed."""
    if not bar.disable:
        bar.initial += rounds
        bar.update(rounds)


class DivergenceWarning(Observer):
    """Tells once, as a note, of a training loss that climbs; see `divergence.rising`."""

    def start(self, context: Context) -> None:
        """Reads the losses of the rounds that were done before."""
        self._context, self._warned = context, False
        self._losses = context.run.log.train_losses()

    def rounds(
        self,
        trace: simulation.Trace,
        counted: Sequence[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        """Looks at the losses so far."""
        self._losses.extend(trace.losses.tolist())
        if not self._warned and (rise := divergence.rising(self._losses)):
            self._context.tell(
                f"note: the training loss rises, to {rise.last:.3g} from {rise.best:.3g} near "
                f"round {rise.best_round}: the run may diverge{remedied(self._context.advice.rate)}"
            )
            self._warned = True


def remedied(advice: str) -> str:
    """Returns advice as the end of a sentence, "" for none.

    >>> "round 3 diverged" + remedied("check the data")
    'round 3 diverged; check the data'
    """
    return f"; {advice}" if advice else ""


class Diagnoses(Observer):
    """Measures curvature, noise and stability every so many rounds, see `diagnostics`.

    They go into the log and into the summary, and need a loss with two derivatives.

    Args:
      every: rounds between diagnoses, >= 1, a multiple of the run's `eval_every`.
      batch_size: examples a client uses in a local step, as given to `make_simulator`.

    Raises:
      ValueError: for less than 1, and at the start of a run that it doesn't fit.
    """

    def __init__(self, every: int, batch_size: int):
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self._every, self._batch_size = every, batch_size

    def start(self, context: Context) -> None:
        """Diagnoses the state that the run starts from, where that is due."""
        if not context.eval_every or self._every % context.eval_every:
            raise ValueError(
                f"every={self._every} must be a multiple of eval_every={context.eval_every}: a run "
                "stops at evaluations only"
            )
        self._context = context
        self._logged = {row["round"] for row in recording.diagnoses(context.run)}
        simulator = context.simulator
        self._diagnose = functools.cache(
            lambda phase: diagnostics.make_diagnose(
                simulator.phases[phase].algorithm, simulator.task, self._batch_size
            )
        )
        self._look_at(context.progress)

    def wants_state(self, rounds_done: int) -> bool:
        """Returns whether a diagnosis is due."""
        return rounds_done % self._every == 0

    def rounds(
        self,
        trace: simulation.Trace,
        counted: Sequence[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        """Diagnoses the state, where that is due."""
        self._look_at(progress)

    def end(self, summary: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns all diagnoses of the run."""
        return {"diagnoses": recording.diagnoses(self._context.run)}

    def _look_at(self, progress: simulation.Progress) -> None:
        done, simulator = progress.ledger.num_rounds, self._context.simulator
        if not self.wants_state(done) or done in self._logged:
            return
        phase = simulation.phase_at(simulator.phases, done)
        state = jax.tree.map(np.asarray, progress.state)
        # The same probes each time, so that only the run makes a difference.
        found = self._diagnose(phase)(state, simulator.root.init)
        recording.write_diagnosis(self._context.run, done, found)


class TensorBoard(Observer):
    """Writes losses, evaluations and bytes as TensorBoard's events, to WORKDIR/tensorboard."""

    def start(self, context: Context) -> None:
        """Opens the file.

        Raises:
          RunError: without the package tensorboardX.
        """
        try:
            import tensorboardX
        except ImportError:
            raise RunError(
                "TensorBoard's events need the package tensorboardX; "
                "pip install 'zofl-jax[tensorboard]'"
            ) from None
        self._writer = tensorboardX.SummaryWriter(str(context.run.path / "tensorboard"))

    def rounds(
        self,
        trace: simulation.Trace,
        counted: Sequence[ledger.RoundBytes],
        progress: simulation.Progress,
    ) -> None:
        """Writes the training losses."""
        for i, loss in enumerate(trace.losses):
            self._writer.add_scalar("train/loss", loss, trace.first_round + i + 1)

    def record(self, record: simulation.Record) -> None:
        """Writes the metrics of an evaluation, and the bytes so far."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(f"test/{name}", value, record.round)
        self._writer.add_scalar("bytes/up", record.bytes_up, record.round)
        self._writer.add_scalar("bytes/down", record.bytes_down, record.round)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Figures(Observer):
    """Draws accuracy against rounds and against bytes at the end, which takes about a second.

    Args:
      label_counts: examples by client and class, [num_clients, num_classes], drawn at the start.
      labels_title: of that figure; the task's name unless given.
    """

    def __init__(self, label_counts: np.ndarray | None = None, labels_title: str = ""):
        self._label_counts, self._labels_title = label_counts, labels_title

    def start(self, context: Context) -> None:
        """Draws who has which labels, `labels.png`."""
        self._run, self._task_name = context.run, context.simulator.task.name
        if self._label_counts is not None:
            from zofl_jax.observation import plots  # here: matplotlib is imported with it

            title = self._labels_title or self._task_name
            figure = plots.label_distribution(self._label_counts, title)
            self._run.save_figure("labels.png", figure)

    def end(self, summary: Mapping[str, Any]) -> Mapping[str, Any]:
        """Draws `rounds.png` and `bytes.png`; nothing before the first evaluation."""
        history = summary["history"]
        if history:
            from zofl_jax.observation import plots

            title = summaries.title(summary, self._task_name)
            dense = summary["bytes_fedavg_per_client"] * summary["num_clients"] / summary["rounds"]
            self._run.save_figure("rounds.png", plots.accuracy_against_rounds(history, title))
            self._run.save_figure("bytes.png", plots.accuracy_against_bytes(history, dense, title))
        return {}


def usual() -> tuple[Observer, ...]:
    """Returns those who watch a run unless others are named: figures, warning, progress bar."""
    return Figures(), DivergenceWarning(), ProgressBar()
