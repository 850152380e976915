"""Signs of divergence in the training losses of a run, before and without an infinity.

A loss that overflows ends a run at once (`simulation.Diverged`). Often it only climbs; and with
central differences at a huge step size it may stall at a finite height, where both evaluations
round to the same number and nothing moves any more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 20
"""Rounds that a loss is averaged over."""

FACTOR = 10.0
"""A run that ends at this multiple of its first loss has diverged."""


class Rise(NamedTuple):
    """A loss that climbs: means over a window of rounds."""

    best: float  # the least so far
    best_round: int  # where its window starts
    last: float


def rising(losses: Sequence[float]) -> Rise | None:
    """Returns how the last losses stand above the best before them, None if they don't.

    They do if their mean is twice the best one and five of its standard deviations above it. In
    the first 2 `WINDOW` rounds windows are shorter, and it must be ten times the first loss too.

    Args:
      losses: of all rounds so far, finite.

    >>> rising([1.0] * 40 + [3.0] * 20)
    Rise(best=1.0, best_round=0, last=3.0)
    >>> rising([1.0] * 40 + [1.5] * 20) is None
    True
    """
    values = np.asarray(losses, np.float64)
    window = min(WINDOW, len(values) // 2)
    if not window:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    earlier = windows[: len(values) - 2 * window + 1]
    means = earlier.mean(axis=1)
    at = int(np.argmin(means))
    best, last = float(means[at]), float(values[-window:].mean())
    least = abs(best) if len(values) >= 2 * WINDOW else FACTOR * max(abs(best), abs(values[0]))
    above = last - best > max(least, 5 * float(earlier[at].std()))
    return Rise(best, at, last) if above else None


def ended_above(losses: Sequence[float]) -> int | None:
    """Returns the round from which on the loss stayed above `FACTOR` times the first, if it did.

    None where the last losses are below on average, and for a first loss that isn't positive.

    >>> ended_above([2.0, 1.0, 50.0, 40.0]), ended_above([2.0, 50.0, 1.0, 1.0])
    (2, None)
    """
    values = np.asarray(losses, np.float64)
    if len(values) < 2 or not values[0] > 0:
        return None
    limit = FACTOR * values[0]
    if values[-min(WINDOW, len(values) // 2) :].mean() <= limit:
        return None
    return int(np.flatnonzero(values <= limit)[-1]) + 1
