"""The figures a person wants after a run.

Each function returns a `matplotlib.figure.Figure` and touches no global state, so that
`Run.save_figure` can write it, or a notebook show it. A history is a list of
`{"round", "train_loss", "test_loss", "test_accuracy", "bytes_up", "bytes_down"}`, a row an
evaluation, as in `summary.json`; bytes are totals over all clients since round 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zofl_jax.observation.appearance import (
    BLUE,
    FAINT,
    INK,
    VERMILION,
    count_axis,
    formatter,
    log_ticks,
    new_figure,
    per_cent,
    tidy,
)
from zofl_jax.observation.quantities import human_bytes

__all__ = [
    "History",
    "accuracy_against_bytes",
    "accuracy_against_rounds",
    "human_bytes",
    "label_distribution",
]

History = Sequence[Mapping[str, Any]]

_IN_AS_MANY_ROUNDS = "the model exchanged in as many rounds"
_MAX_MARKERS = 30
_MAX_LABELLED_CELLS = 200
_MAX_NAMED_CLIENTS = 25


def accuracy_against_rounds(history: History, title: str) -> Figure:
    """Returns test accuracy against rounds; test loss on a log axis where there is none.

    Args:
      history: evaluations in the order of rounds; None and NaN are left out.
      title: of the figure.
    """
    figure = new_figure(title)
    axes = figure.subplots()
    tidy(axes)
    name, label = _quantity(history)
    x, y = _points(history, name, lambda row: row["round"])
    _draw(axes, x, y, BLUE, "-")
    _scale_quantity(axes, name, label, y)
    axes.set_xlabel("round")
    count_axis(axes.xaxis, 9)
    return figure


def accuracy_against_bytes(history: History, dense_bytes_per_round: float, title: str) -> Figure:
    """Returns test accuracy against the bytes exchanged, in both directions by all clients.

    A second curve has the same accuracies at the bytes that exchanging the whole model in as many
    rounds would have cost; the legend gives both totals. It is no measurement of FedAvg, which
    needs fewer rounds. Bytes are on a log axis, so evaluations before the first byte are left
    out. Where there is no accuracy the test loss is drawn.

    Args:
      history: evaluations in the order of rounds; None and NaN are left out.
      dense_bytes_per_round: bytes of a round of dense exchange, both directions, all clients.
      title: of the figure.
    """
    figure = new_figure(title)
    axes = figure.subplots()
    tidy(axes)
    name, label = _quantity(history)
    spent, y = _points(history, name, lambda row: row["bytes_up"] + row["bytes_down"])
    dense, _ = _points(history, name, lambda row: row["round"] * dense_bytes_per_round)
    labels = _totals(spent, dense)
    _draw(axes, spent[spent > 0], y[spent > 0], BLUE, "-", labels[0])
    _draw(axes, dense[dense > 0], y[dense > 0], VERMILION, "--", labels[1])
    _scale_quantity(axes, name, label, y[(spent > 0) | (dense > 0)])
    axes.set_xlabel("bytes exchanged, up and down, all clients")
    xs = np.concatenate([spent[spent > 0], dense[dense > 0]])
    low, high = (xs.min(), xs.max()) if xs.size else (1.0, 1e6)
    middle, half_width = math.sqrt(low * high), 1.3 * max(math.sqrt(high / low), math.sqrt(10))
    axes.set_xscale("log")
    axes.set_xlim(middle / half_width, middle * half_width)
    log_ticks(axes.xaxis, half_width**2, human_bytes)
    if xs.size:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def label_distribution(counts: np.ndarray, title: str) -> Figure:
    """Returns how the classes are spread over the clients, and how many examples each has.

    The colour of a cell is the share of the class among the client's examples. Small tables
    have the counts written in; more than 25 clients are ordered by their most frequent
    class, so that their structure shows.

    Args:
      counts: examples by client and class, [num_clients, num_classes].
      title: of the figure.

    Raises:
      ValueError: if counts isn't a table with at least one client and one class.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or not counts.size:
        raise ValueError(f"counts must be [num_clients, num_classes], got shape {counts.shape}")
    num_clients = len(counts)
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None]
    ordered = num_clients > _MAX_NAMED_CLIENTS
    if ordered:
        order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
        counts, sizes, shares = counts[order], sizes[order], shares[order]

    figure = new_figure(title, (7.2, 4.8))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    if ordered:  # thousands of bars would take seconds
        top.stairs(sizes, np.arange(num_clients + 1) - 0.5, fill=True, color=BLUE)
    else:
        top.bar(np.arange(num_clients), sizes, color=BLUE)
    tidy(top)
    top.grid(visible=False, axis="x")
    top.tick_params(bottom=False)
    top.set_ylabel("examples")
    count_axis(top.yaxis, 3)

    image = main.imshow(
        shares.T, aspect="auto", origin="lower", interpolation="nearest", cmap="Blues", vmin=0
    )
    tidy(main)
    main.grid(visible=False)
    main.spines[:].set_visible(False)
    main.tick_params(length=0)
    main.set_ylabel("class")
    main.set_xlabel(
        f"{num_clients:,} clients, ordered by most frequent class" if ordered else "client"
    )
    count_axis(main.xaxis, 10 if ordered else _MAX_NAMED_CLIENTS)
    count_axis(main.yaxis, 11)
    if counts.size <= _MAX_LABELLED_CELLS:
        _write_counts(main, counts, shares)
    bar = figure.colorbar(image, ax=main, format=formatter(per_cent))
    bar.set_label("share of the client's examples", color=INK)
    bar.ax.tick_params(color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def _quantity(history: History) -> tuple[str, str]:
    """Returns what there is to draw, and its label."""
    choices = (
        ("test_accuracy", "test accuracy"),
        ("test_loss", "test loss"),
        ("train_loss", "training loss"),
    )
    for name, label in choices:
        if any(_is_finite(row.get(name)) for row in history):
            return name, label
    return choices[0]


def _points(
    history: History, name: str, x: Callable[[Mapping[str, Any]], float]
) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in history if _is_finite(row.get(name))]
    return (
        np.array([x(row) for row in rows], np.float64),
        np.array([row[name] for row in rows], np.float64),
    )


def _totals(spent: np.ndarray, dense: np.ndarray) -> tuple[str, str]:
    """Returns the legend: what each curve cost in the end."""
    if not spent.size:
        return "this run", _IN_AS_MANY_ROUNDS
    return (
        f"this run: {human_bytes(spent[-1])}",
        f"{_IN_AS_MANY_ROUNDS}: {human_bytes(dense[-1])}",
    )


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _draw(
    axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, line: str, label: str = ""
) -> None:
    marker = "o" if x.size <= _MAX_MARKERS else ""
    axes.plot(x, y, line, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)


def _scale_quantity(axes: Axes, name: str, label: str, y: np.ndarray) -> None:
    """Labels the y axis: per cent for an accuracy, logarithmic for a positive loss."""
    axes.set_ylabel(label)
    if not y.size:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", color=INK, transform=axes.transAxes)
    elif name == "test_accuracy":
        axes.yaxis.set_major_formatter(formatter(per_cent))
    elif (y > 0).all():
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        log_ticks(axes.yaxis, high / low, "{:g}".format)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for client, label in np.argwhere(counts):
        colour = "white" if shares[client, label] > 0.6 * shares.max() else INK
        text = f"{counts[client, label]:,}"
        axes.text(client, label, text, ha="center", va="center", color=colour, fontsize=7)
