"""The figures a person wants after a run.

Each function returns a `matplotlib.figure.Figure` and touches no global state, so that
`Run.save_figure` can write it, or a notebook show it. A history is a list of
`{"round", "train_loss", "test_loss", "test_accuracy", "bytes_up", "bytes_down"}`, a row an
evaluation, as in `summary.json`; bytes are totals over all clients since round 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

History = Sequence[Mapping[str, Any]]

# Wong, "Points of view: Color blindness", Nature Methods 8, 441 (2011).
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_COLOURS = (
    *(_BLUE, _VERMILION, "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#8A7A00"),
)
_LINES = ("-", "--", ":", "-.")
_INK, _FAINT = "#333333", "#DDDDDD"
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
    figure = _new_figure(title)
    axes = figure.subplots()
    _tidy(axes)
    name, label = _quantity(history)
    x, y = _points(history, name, lambda row: row["round"])
    _draw(axes, x, y, _BLUE, "-")
    _scale_quantity(axes, name, label, y)
    axes.set_xlabel("round")
    _count_axis(axes.xaxis, 9)
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
    figure = _new_figure(title)
    axes = figure.subplots()
    _tidy(axes)
    name, label = _quantity(history)
    spent, y = _points(history, name, lambda row: row["bytes_up"] + row["bytes_down"])
    dense, _ = _points(history, name, lambda row: row["round"] * dense_bytes_per_round)
    labels = _totals(spent, dense)
    _draw(axes, spent[spent > 0], y[spent > 0], _BLUE, "-", labels[0])
    _draw(axes, dense[dense > 0], y[dense > 0], _VERMILION, "--", labels[1])
    _scale_quantity(axes, name, label, y[(spent > 0) | (dense > 0)])
    axes.set_xlabel("bytes exchanged, up and down, all clients")
    xs = np.concatenate([spent[spent > 0], dense[dense > 0]])
    low, high = (xs.min(), xs.max()) if xs.size else (1.0, 1e6)
    middle, half_width = math.sqrt(low * high), 1.3 * max(math.sqrt(high / low), math.sqrt(10))
    axes.set_xscale("log")
    axes.set_xlim(middle / half_width, middle * half_width)
    _log_ticks(axes.xaxis, half_width**2, human_bytes)
    if xs.size:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


class Curve(NamedTuple):
    """Accuracies of a method over a cost, in the order of evaluations; arrays [n]."""

    x: np.ndarray
    mean: np.ndarray  # over seeds
    low: np.ndarray
    high: np.ndarray


def comparison(
    curves: Mapping[str, Curve],
    x_label: str,
    title: str,
    targets: Sequence[float] = (),
    *,
    logarithmic: bool = False,
    number: Callable[[float], str] = "{:g}".format,
) -> Figure:
    """Returns test accuracy of several methods against one cost.

    Args:
      curves: name -> its curve.
      x_label: what the cost is.
      title: of the figure.
      targets: accuracies to mark.
      logarithmic: whether costs are on a log axis; points without cost are left out then.
      number: how a cost is written.
    """
    figure = _new_figure(title, (7.2, 4.8 + 0.18 * math.ceil(len(curves) / 4)))
    axes = figure.subplots()
    _compare(axes, curves, x_label, targets, logarithmic=logarithmic, number=number)
    axes.set_ylabel("test accuracy")
    if curves:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def comparison_panels(
    panels: Mapping[str, Mapping[str, Curve]],
    title: str,
    targets: Sequence[float] = (),
    number: Callable[[float], str] = "{:g}".format,
) -> Figure:
    """Returns test accuracy of several methods against several costs, side by side on log axes.

    Points without cost are left out.

    Args:
      panels: what the cost is -> name of a method -> its curve; the same methods in each.
      title: of the figure.
      targets: accuracies to mark.
      number: how a cost is written.

    Raises:
      ValueError: without a panel.
    """
    if not panels:
        raise ValueError("a figure of no panels was asked for: give at least one")
    count = max(len(curves) for curves in panels.values())
    figure = _new_figure(title, (3.4 * len(panels), 3.6 + 0.18 * math.ceil(count / 6)))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, curves) in zip(row, panels.items(), strict=True):
        _compare(axes, curves, label, targets, logarithmic=True, number=number)
    row[0].set_ylabel("test accuracy")
    handles, names = row[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=8
        )
    return figure


def _compare(
    axes: Axes,
    curves: Mapping[str, Curve],
    x_label: str,
    targets: Sequence[float],
    *,
    logarithmic: bool,
    number: Callable[[float], str],
) -> None:
    """Draws accuracies of several methods against one cost."""
    _tidy(axes)
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = _LINES[index // len(_COLOURS) % len(_LINES)]
        shown = curve.x > 0 if logarithmic else np.full(curve.x.shape, True)
        x = curve.x[shown]
        axes.plot(x, curve.mean[shown], line, color=colour, linewidth=1.5, label=name)
        axes.fill_between(
            x, curve.low[shown], curve.high[shown], color=colour, alpha=0.15, linewidth=0
        )
    for target in targets:
        axes.axhline(target, color=_INK, linewidth=0.6, linestyle=":")
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_formatter(_formatter(_per_cent))
    if logarithmic:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        _log_ticks(axes.xaxis, high / low, number)
    else:
        _count_axis(axes.xaxis, 9)


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

    figure = _new_figure(title, (7.2, 4.8))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    if ordered:  # thousands of bars would take seconds
        top.stairs(sizes, np.arange(num_clients + 1) - 0.5, fill=True, color=_BLUE)
    else:
        top.bar(np.arange(num_clients), sizes, color=_BLUE)
    _tidy(top)
    top.grid(visible=False, axis="x")
    top.tick_params(bottom=False)
    top.set_ylabel("examples")
    _count_axis(top.yaxis, 3)

    image = main.imshow(
        shares.T, aspect="auto", origin="lower", interpolation="nearest", cmap="Blues", vmin=0
    )
    _tidy(main)
    main.grid(visible=False)
    main.spines[:].set_visible(False)
    main.tick_params(length=0)
    main.set_ylabel("class")
    main.set_xlabel(
        f"{num_clients:,} clients, ordered by most frequent class" if ordered else "client"
    )
    _count_axis(main.xaxis, 10 if ordered else _MAX_NAMED_CLIENTS)
    _count_axis(main.yaxis, 11)
    if counts.size <= _MAX_LABELLED_CELLS:
        _write_counts(main, counts, shares)
    bar = figure.colorbar(image, ax=main, format=_formatter(_per_cent))
    bar.set_label("share of the client's examples", color=_INK)
    bar.ax.tick_params(color=_FAINT, labelcolor=_INK)
    bar.outline.set_visible(False)
    return figure


def human_bytes(count: float) -> str:
    """Returns a number of bytes as people write it, in powers of 1000.

    >>> human_bytes(0), human_bytes(1500), human_bytes(2e6)
    ('0 B', '1.5 kB', '2 MB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = 0
    # 999.5 would be written as 1e+03.
    while abs(count) >= 999.5 and power < len(units) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {units[power]}"


def _new_figure(title: str, size: tuple[float, float] = (6.4, 4.0)) -> Figure:
    figure = Figure(figsize=size, dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, color=_INK, fontsize=11)
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(which="both", color=_FAINT, labelcolor=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(_INK)


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
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", color=_INK, transform=axes.transAxes)
    elif name == "test_accuracy":
        axes.yaxis.set_major_formatter(_formatter(_per_cent))
    elif (y > 0).all():
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        _log_ticks(axes.yaxis, high / low, "{:g}".format)


def _count_axis(axis: Axis, max_ticks: int) -> None:
    axis.set_major_locator(MaxNLocator(max_ticks, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(_formatter("{:,.0f}".format))


def _log_ticks(axis: Axis, ratio: float, text: Callable[[float], str]) -> None:
    """Puts ticks on powers of ten, and on 2 and 5 times these where the axis is short."""
    subs: tuple[float, ...] = (1.0, 2.0, 5.0) if ratio < 300 else (1.0,)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if ratio < 8 else subs
    axis.set_major_locator(LogLocator(subs=subs, numticks=10))
    axis.set_major_formatter(_formatter(text))
    axis.set_minor_formatter(NullFormatter())


def _formatter(text: Callable[[float], str]) -> FuncFormatter:
    return FuncFormatter(lambda value, _: text(value))


def _per_cent(share: float) -> str:
    return f"{100 * share:g} %"


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for client, label in np.argwhere(counts):
        colour = "white" if shares[client, label] > 0.6 * shares.max() else _INK
        text = f"{counts[client, label]:,}"
        axes.text(client, label, text, ha="center", va="center", color=colour, fontsize=7)
