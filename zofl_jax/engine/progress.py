"""What the host learns of a run: the trace of a dispatch, the history, how far the run is."""

from typing import Any, NamedTuple

import numpy as np

from zofl_jax.conditions import participation
from zofl_jax.core import Array, Broadcast, ServerState
from zofl_jax.engine import ledger


class Trace(NamedTuple):
    """What the host learns of the n rounds of one dispatch; NumPy arrays."""

    first_round: int
    seeds: np.ndarray  # uint32 [n, words], the raw words of the shared keys
    broadcasts: Broadcast  # a tree of arrays [n, ...]
    losses: np.ndarray  # [n], the cohort's mean training loss
    failed_loss: float | None  # the loss of the round after these, if it was not healthy
    attendance: participation.Attendance  # [n, clients_per_round] each
    rejected: np.ndarray  # int32 [n], messages the server rejected

    @property
    def cohorts(self) -> np.ndarray:
        """Who was asked, int32 [n, clients_per_round]."""
        return np.asarray(self.attendance.cohort)


class Record(NamedTuple):
    """One evaluation: a row of the history. Bytes are totals since round 0."""

    round: int  # rounds done
    train_loss: float  # mean over the rounds since the last record
    metrics: dict[str, float]  # means over the test set
    bytes_up: int
    bytes_down: int
    rejected: int = 0  # messages, since round 0
    epsilon: float | None = None  # of differential privacy, where it is accounted for

    def row(self) -> dict[str, Any]:
        """Returns the record as figures and summaries take it; None for metrics it lacks."""
        return {
            "round": self.round,
            "train_loss": self.train_loss,
            "test_loss": self.metrics.get("loss"),
            "test_accuracy": self.metrics.get("accuracy"),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "rejected": self.rejected,
            "epsilon": self.epsilon,
        }


class Progress(NamedTuple):
    """How far a run is: all that is needed to go on.

    It is not a snapshot: going on consumes `state` and `memory` and counts in `ledger`.
    """

    state: ServerState
    memory: Any  # of the population's stateful clients, (), or arrays [num_clients, ...]
    ledger: ledger.Ledger
    history: list[Record]
    losses: list[float]  # training losses since the last record
    run_seconds: float = 0.0  # rounds alone, without compilation and evaluation
    fingerprint: Array | None = None  # of the params, see `rounds.fingerprint`; for `on_rounds`


class Diverged(ArithmeticError):  # noqa: N818 (the name says what happened)
    """A round's broadcast or all its losses were not finite, or every message of it was rejected;
    the round was not applied.

    Attributes:
      round: the one that was not applied.
      loss: the mean training loss of its clients.
      progress: up to there.
      finding: what happened, a sentence without full stop; the message goes on to a remedy.
    """

    def __init__(self, round_index: int, loss: float, progress: Progress):
        self.finding = (
            f"round {round_index} diverged (training loss {loss}); the model after "
            f"{round_index} rounds is kept"
        )
        super().__init__(
            f"{self.finding}. Lower the learning rate to a tenth, raise the number of "
            "perturbations, or clip the scalars"
        )
        self.round = round_index
        self.loss = loss
        self.progress = progress
