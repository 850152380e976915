"""Between a simulation and its run directory: rows out, and progress back in.

The log holds each round's seed and broadcast, so progress is restored from the last
snapshot by replaying the rounds after it. A checksum of the params logged with the rounds
says whether the replay gave the same bits; where it did not (another machine, another
release of XLA), the rounds after the snapshot are dropped from the log and run again.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import numpy as np

from zofl_jax.conditions import participation
from zofl_jax.core import Broadcast, ServerState
from zofl_jax.engine import ledger, rounds
from zofl_jax.engine.simulation import Progress, Record, Simulator, Trace, phase_at
from zofl_jax.observation.diagnostics import Diagnosis
from zofl_jax.runs.directory import RoundRow, Run, RunError

FINGERPRINT = "params_fingerprint"
RUN_SECONDS = "run_seconds"
REJECTED = "rejected"
EPSILON = "epsilon"
TEST = "test_"
DIAGNOSIS = "diagnosis_"


def write_rounds(
    run: Run, trace: Trace, counted: Sequence[ledger.RoundBytes], progress: Progress
) -> None:
    """Appends the rounds of one dispatch to the log, with a checksum of the params.

    Raises:
      RunError: if the log can't be written.
    """
    chex.assert_tree_shape_prefix((trace.broadcasts, trace.losses), (len(counted),))
    words = trace.seeds.astype("<u4")
    rows = [
        RoundRow(
            trace.first_round + i,
            words[i].tobytes(),
            _encode(jax.tree.map(lambda x, i=i: x[i], trace.broadcasts)),
            float(trace.losses[i]),
            sums.up,
            sums.seed,
            sums.broadcast,
            sums.catch_up,
            sums.first_sync,
        )
        for i, sums in enumerate(counted)
    ]
    marks = {RUN_SECONDS: progress.run_seconds}
    if progress.fingerprint is not None:
        marks[FINGERPRINT] = float(progress.fingerprint)
    # Of rounds in which messages were rejected, how many.
    metrics: dict[int, dict[str, float]] = {
        trace.first_round + i + 1: {REJECTED: float(count)}
        for i, count in enumerate(trace.rejected.tolist())
        if count
    }
    metrics.setdefault(trace.first_round + len(rows), {}).update(marks)
    run.log.append(rows, metrics)


def write_record(run: Run, record: Record) -> None:
    """Adds an evaluation to the log; the metrics of the test set are named test_*."""
    metrics = {f"{TEST}{name}": value for name, value in record.metrics.items()}
    spent = {} if record.epsilon is None else {EPSILON: record.epsilon}
    run.log.write_metrics(record.round, {"train_loss": record.train_loss, **metrics, **spent})


def write_diagnosis(run: Run, rounds_done: int, diagnosis: Diagnosis) -> None:
    """Adds a diagnosis to the log."""
    values = {f"{DIAGNOSIS}{name}": value for name, value in diagnosis._asdict().items()}
    run.log.write_metrics(rounds_done, values)


def diagnoses(run: Run) -> list[dict[str, float]]:
    """Returns the diagnoses in the log, {"round", "trace", ...} each, in the order of rounds."""
    rows = []
    for rounds_done, values in run.log.metrics().items():
        names = [name for name in Diagnosis._fields if f"{DIAGNOSIS}{name}" in values]
        if names:
            found = {name: values[f"{DIAGNOSIS}{name}"] for name in names}
            rows.append({"round": rounds_done, **found})
    return rows


def save_snapshot(run: Run, progress: Progress) -> None:
    """Saves state and memory; the snapshot of round 0 is the start of every replay."""
    run.save_snapshot(int(progress.state.round), (progress.state, progress.memory))


def restore(run: Run, simulator: Simulator) -> tuple[Progress, str | None]:
    """Returns the progress of a run, at round 0 if it is new, and a sentence for the user.

    Raises:
      RunError: if the log doesn't belong to this simulation.
    """
    start = simulator.start(None)
    done = run.log.last_round + 1
    _check_seeds(run, simulator, done)
    found = run.latest_snapshot((start.state, start.memory), at_most=done)
    if found is None:
        save_snapshot(run, start)
    first, (state, memory) = found or (0, (start.state, start.memory))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start.state)
    notice = None
    if first < done and jax.tree.leaves(memory):
        # What stateful clients keep is in no message.
        notice = f"rounds {first} to {done - 1} are run again: clients' memory is not in the log."
        done = first
    elif first < done and simulator.placement.splits_processes:
        notice = (
            f"rounds {first} to {done - 1} are run again: no process has the whole params to "
            "replay them."
        )
        done = first
    elif first < done:
        replayed = _replay(run, simulator, state, done)
        if _differs(run, replayed):
            notice = (
                f"the replay of rounds {first} to {done - 1} did not give the same bits here; "
                "they are run again."
            )
            done = first
        else:
            state = replayed
    run.log.truncate_after(done - 1)
    return _recount(run, simulator, Progress(state, memory, start.ledger, [], [])), notice


def rebuild(
    run: Run, simulator: Simulator, rounds_done: int, *, nearest: bool = False
) -> tuple[ServerState, bool | None]:
    """Returns the state after `rounds_done` rounds, from the initial params and the log.

    With `nearest` it starts from the nearest snapshot, which is sooner done and proves less. The
    second value says whether its params have the bits of the run: None where the log
    holds no checksum for that round.

    Raises:
      RunError: if the log doesn't hold that many rounds, or isn't of this simulation.
    """
    _check_logged(run, simulator, rounds_done)
    start = simulator.start(None)
    found = run.latest_snapshot((start.state, start.memory), at_most=rounds_done if nearest else 0)
    state = found[1][0] if found else start.state
    state = _replay(run, simulator, state, rounds_done)
    differs = _differs(run, state)
    return state, None if differs is None else not differs


def epsilon(run: Run, simulator: Simulator, rounds_done: int) -> float | None:
    """Returns the ε that the first `rounds_done` rounds of the log have spent, evaluated or not.

    None without differential privacy.

    Raises:
      RunError: if the log doesn't hold that many rounds, or isn't of this simulation.
    """
    if simulator.epsilon is None:
        return None
    _check_logged(run, simulator, rounds_done)
    book = ledger.Ledger(simulator.task.train.num_clients)
    for _ in _counted(run, simulator, book, rounds_done):
        pass
    return simulator.epsilon(book)


def _replay(run: Run, simulator: Simulator, state: ServerState, until: int) -> ServerState:
    first = int(state.round)
    starts = [phase.first_round for phase in simulator.phases if first < phase.first_round < until]
    for start, stop in zip([first, *starts], [*starts, until], strict=True):
        phase = phase_at(simulator.phases, start)
        spec, most = simulator.broadcasts[phase], simulator.capacities[phase]
        for at in range(start, stop, most):
            rows = run.log.rounds(at, min(at + most, stop))
            broadcasts = [_decode(row.broadcast, spec) for row in rows]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *broadcasts)
            state = simulator.replay(state, _seeds(rows), stacked)
    return state


def _differs(run: Run, state: ServerState) -> bool | None:
    logged = run.log.metrics().get(int(state.round), {}).get(FINGERPRINT)
    return None if logged is None else int(logged) != int(rounds.fingerprint(state.params))


def _recount(run: Run, simulator: Simulator, progress: Progress) -> Progress:
    """Returns progress with the ledger, the history and the losses of the logged rounds."""
    book, history, losses, seconds = progress.ledger, [], [], 0.0
    for row, values in _counted(run, simulator, book, run.log.last_round + 1):
        losses.append(row.train_loss)
        seconds = values.get(RUN_SECONDS, seconds)
        tests = {
            name.removeprefix(TEST): value
            for name, value in values.items()
            if name.startswith(TEST)
        }
        if tests:
            loss = values.get("train_loss", math.nan)
            totals = book.totals
            history.append(
                Record(
                    row.round + 1,
                    loss,
                    tests,
                    totals.up,
                    totals.down,
                    book.rejected,
                    values.get(EPSILON),
                )
            )
            losses = []
    return progress._replace(history=history, losses=losses, run_seconds=seconds)


def _counted(
    run: Run, simulator: Simulator, book: ledger.Ledger, until: int
) -> Iterator[tuple[RoundRow, dict[str, float]]]:
    """Counts the first `until` logged rounds; yields each with the metrics of the state after."""
    metrics, chunk = run.log.metrics(), rounds.CAPACITY
    for at in range(0, until, chunk):
        part = run.log.rounds(at, min(at + chunk, until))
        indices = np.resize(np.arange(at, at + len(part)), chunk)
        attended = participation.each_round(simulator.attendance(indices))
        for row, attendance in zip(part, attended, strict=False):
            values = metrics.get(row.round + 1, {})
            book.record_attendance(
                attendance,
                simulator.sizes[phase_at(simulator.phases, row.round)],
                int(values.get(REJECTED, 0)),
            )
            yield row, values


def _check_logged(run: Run, simulator: Simulator, rounds_done: int) -> None:
    logged = run.log.last_round + 1
    if not 0 <= rounds_done <= logged:
        raise RunError(f"round {rounds_done} is not in the log, which holds {logged} rounds")
    _check_seeds(run, simulator, rounds_done)


def _check_seeds(run: Run, simulator: Simulator, done: int) -> None:
    if done == 0:
        return
    row = run.log.rounds(done - 1, done)[0]
    expected = np.asarray(simulator.seeds(np.array([done - 1])))[0].astype("<u4").tobytes()
    if row.key != expected:
        raise RunError(
            f"the seed of round {done - 1} in {run.path} is not the one this run draws, so the "
            "log is of another run or another key schedule; use another --workdir"
        )


def _seeds(rows: Sequence[RoundRow]) -> np.ndarray:
    return np.stack([np.frombuffer(row.key, "<u4").astype(np.uint32) for row in rows])


def _encode(broadcast: Broadcast) -> bytes:
    parts = []
    for leaf in jax.tree.leaves(broadcast):
        array = np.asarray(leaf)
        parts.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return b"".join(parts)


def _decode(data: bytes, spec: Any) -> Broadcast:
    leaves, treedef = jax.tree.flatten(spec)
    if len(data) != ledger.tree_bytes(spec):
        raise RunError(
            f"a broadcast in the log has {len(data)} bytes where this run's have "
            f"{ledger.tree_bytes(spec)}; the log is of another run: use another --workdir"
        )
    arrays, at = [], 0
    for leaf in leaves:
        size = ledger.tree_bytes(leaf)
        raw = np.frombuffer(data[at : at + size], np.dtype(leaf.dtype).newbyteorder("<"))
        arrays.append(raw.astype(leaf.dtype).reshape(leaf.shape))
        at += size
    return jax.tree.unflatten(treedef, arrays)
