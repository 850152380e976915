"""Accuracy against costs for many methods: who is ahead, and where, drawn to be read.

    curve = fronts.Curve(bytes_spent, accuracies, accuracies, accuracies)
    fronts.pareto([fronts.Panel("bytes up and down", {"decomfl": curve, ...})], "digits")

The front is the best accuracy that any method has reached at a cost. The methods on it, in any of
the panels, are coloured and named at their lines, the others are grey.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from zofl_jax.observation.appearance import (
    COLOURS,
    INK,
    LINES,
    formatter,
    log_ticks,
    new_figure,
    per_cent,
    tidy,
)
from zofl_jax.observation.quantities import human_count

_GREY, _GREY_TEXT = "#C4C4C4", "#8C8C8C"
_NAMED_IF_FEW = 8  # methods in all; of more, those beside the front are named below the figure
_GAP = 5.0  # points between a line and its name


class Curve(NamedTuple):
    """Accuracies of a method over a cost, in the order of evaluations; arrays [n]."""

    x: np.ndarray
    mean: np.ndarray  # over seeds
    low: np.ndarray
    high: np.ndarray


class Panel(NamedTuple):
    """What one panel of a figure shows.

    Attributes:
      label: what the cost is.
      curves: name of a method -> its accuracies over this cost.
      number: how a cost is written.
    """

    label: str
    curves: Mapping[str, Curve]
    number: Callable[[float], str] = human_count


class Step(NamedTuple):
    """A step of a front: from this cost on a method has the best accuracy so far."""

    cost: float
    accuracy: float
    method: str


def front(curves: Mapping[str, Curve]) -> list[Step]:
    """Returns the best mean accuracy that any method has reached so far, cost by cost.

    Costs and accuracies of the steps increase. Points without cost are left out, as on a log axis;
    of equal accuracies the cheaper one is a step, of equals in both the one that was given first.

    Args:
      curves: name of a method -> its accuracies.

    >>> early, late = np.array([0.2, 0.5]), np.array([0.1, 0.8])
    >>> front({
    ...     "few": Curve(np.array([1.0, 2.0]), early, early, early),
    ...     "many": Curve(np.array([2.0, 9.0]), late, late, late),
    ... })
    [Step(cost=1.0, accuracy=0.2, method='few'), Step(cost=2.0, accuracy=0.5, method='few'), \
Step(cost=9.0, accuracy=0.8, method='many')]
    """
    points = [
        Step(float(x), float(y), name)
        for name, curve in curves.items()
        for x, y in zip(curve.x, curve.mean, strict=True)
        if 0 < x < math.inf and math.isfinite(y)
    ]
    steps: list[Step] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if not steps or point.accuracy > steps[-1].accuracy:
            steps.append(point)
    return steps


def pareto(panels: Sequence[Panel], title: str, targets: Sequence[float] = ()) -> Figure:
    """Returns test accuracy against costs, a panel each, side by side on log axes.

    Lines are means over seeds, the bands of those on the front go from the least to the most, and
    the broad line is the front itself. Points without cost are left out.

    Args:
      panels: what to draw, with the same methods in each.
      title: of the figure.
      targets: accuracies to mark.

    Raises:
      ValueError: without a panel.

    >>> rising = np.array([0.5, 0.9])
    >>> curve = Curve(np.array([1e3, 1e6]), rising, rising, rising)
    >>> pareto([Panel("forward passes", {"decomfl": curve})], "digits").axes[0].get_xlabel()
    'forward passes'
    """
    if not panels:
        raise ValueError("a figure of no panels was asked for: give at least one")
    methods = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    steps = [front(panel.curves) for panel in panels]
    ahead = list(dict.fromkeys(step.method for of_panel in steps for step in of_panel))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(ahead)}
    lines = {name: LINES[i // len(COLOURS) % len(LINES)] for i, name in enumerate(ahead)}
    behind = [name for name in methods if name not in colours]
    few = len(methods) <= _NAMED_IF_FEW

    size = (7.2 if len(panels) == 1 else 1.6 + 4.4 * len(panels), 4.8)
    figure = new_figure(title, size)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel, of_panel in zip(row, panels, steps, strict=True):
        _draw(axes, panel, of_panel, colours, lines)
        for target in targets:
            axes.axhline(target, color=INK, linewidth=0.6, linestyle=":", zorder=1)
    row[0].set_ylabel("test accuracy")
    _leave_room(row, max(len({step.method for step in of_panel}) for of_panel in steps))
    _explain(figure, [] if few else behind, bool(ahead))

    figure.draw_without_rendering()  # sizes of axes and texts are known from here on
    for axes, panel, of_panel in zip(row, panels, steps, strict=True):
        above = _held(axes, of_panel)
        ends = _ends(panel, [*(behind if few else ()), *(n for n in ahead if n not in above)])
        _widen(axes, ends)
        taken = _name_front(axes, of_panel, above, colours)
        _name_ends(axes, ends, {name: colours.get(name, _GREY_TEXT) for name in ends}, taken)
    return figure


def _draw(
    axes: Axes,
    panel: Panel,
    steps: Sequence[Step],
    colours: Mapping[str, str],
    lines: Mapping[str, str],
) -> None:
    """Draws the curves of a panel and its front on axes with the right limits."""
    tidy(axes)
    axes.set_xscale("log")
    axes.set_xlabel(panel.label)
    axes.yaxis.set_major_formatter(formatter(per_cent))
    for name, curve in panel.curves.items():
        x, mean, low, high = (values[curve.x > 0] for values in curve)
        marker = "o" if len(x) == 1 else ""
        if name not in colours:
            axes.plot(x, mean, "-", marker=marker, markersize=3, color=_GREY, linewidth=0.9)
            continue
        colour, line = colours[name], lines[name]
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, zorder=3)
        (drawn,) = axes.plot(x, mean, line, marker=marker, color=colour, linewidth=1.6, zorder=4)
        drawn.set(label=name, markersize=4)
    costs = [x for curve in panel.curves.values() for x in curve.x if x > 0]
    if costs:
        low, high = min(costs), max(costs)
        ratio = max(high / low, 3.0)
        # With room for the names of lines that start here.
        axes.set_xlim(low / ratio**0.12, low * ratio**1.04)
        log_ticks(axes.xaxis, ratio, panel.number)
        if steps:
            # To beyond the frame, which `_widen` moves.
            ends = [*(step.cost for step in steps), high * ratio**2]
            best = [*(step.accuracy for step in steps), steps[-1].accuracy]
            axes.step(
                *(ends, best),
                where="post",
                color=INK,
                alpha=0.2,
                linewidth=4,
                solid_joinstyle="miter",
                zorder=2,
            )


def _leave_room(row: Sequence[Axes], names: int) -> None:
    """Makes room for names above the front; the panels share the axis of accuracies."""
    low, high = row[0].get_ylim()
    ticks = [tick for tick in row[0].get_yticks() if low <= tick <= min(high, 1.0 + 1e-9)]
    row[0].set_ylim(low, high + (high - low) * min(0.06 + 0.02 * names, 0.3))
    row[0].set_yticks(ticks)


def _explain(figure: Figure, unnamed: Sequence[str], any_ahead: bool) -> None:
    """Says below the figure what the broad line is, and which methods are grey."""
    handles, words = [], []
    if any_ahead:
        handles.append(Line2D([], [], color=INK, alpha=0.2, linewidth=4))
        words.append("the front: the best accuracy of all so far")
    if unnamed:
        names = ", ".join(unnamed)
        handles.append(Line2D([], [], color=_GREY, linewidth=0.9))
        width = int(figure.get_figwidth() * 15)
        words.append("\n".join(textwrap.wrap(names, width, break_on_hyphens=False)))
    if handles:
        figure.legend(
            handles, words, loc="outside lower center", frameon=False, fontsize=7, labelcolor=INK
        )


def _held(axes: Axes, steps: Sequence[Step]) -> dict[str, Step]:
    """Returns where each method holds the front longest, of the places that its name fits beside.

    Methods whose name fits nowhere are left out.
    """
    ends = [*(step.cost for step in steps[1:]), axes.get_xlim()[1]]
    left = axes.get_window_extent().x0
    longest: dict[str, tuple[float, Step]] = {}
    for step, end in zip(steps, ends, strict=False):
        x, _ = axes.transData.transform((step.cost, step.accuracy))
        if x - _size(axes, step.method)[0] > left:
            found = (end / step.cost, step)
            longest[step.method] = max(longest.get(step.method, found), found, key=lambda f: f[0])
    return {name: step for name, (_, step) in longest.items()}


def _ends(panel: Panel, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Returns cost and accuracy of the last points of methods, the most accurate first."""
    found: dict[str, tuple[float, float]] = {}
    for name in panel.curves.keys() & set(names):
        curve = panel.curves[name]
        shown = (curve.x > 0) & np.isfinite(curve.mean)
        if shown.any():
            found[name] = float(curve.x[shown][-1]), float(curve.mean[shown][-1])
    return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def _widen(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Makes room for the names of lines to the right of where they end."""
    low, high = axes.get_xlim()
    room = axes.get_window_extent().width
    for name, (x, _) in ends.items():
        share = (_size(axes, name)[0] + 2 * _gap(axes)) / room
        high = max(high, low * (x / low) ** (1 / (1 - min(share, 0.5))))
    axes.set_xlim(low, high)


def _name_front(
    axes: Axes, steps: Sequence[Step], held: Mapping[str, Step], colours: Mapping[str, str]
) -> list[Bbox]:
    """Names methods above the front, where no line is; returns the boxes of the names."""
    to_pixels, gap = axes.transData.transform, _gap(axes)
    corners = [to_pixels((step.cost, step.accuracy)) for step in steps]
    taken: list[Bbox] = []
    for name, step in sorted(held.items(), key=lambda item: item[1].cost):
        x, y = to_pixels((step.cost, step.accuracy))
        width, height = _size(axes, name)
        # The line to the next step begins to rise at once.
        over = max(top for cost, top in corners if cost <= x + gap)
        box = _beside(Bbox.from_bounds(x - width, over + gap, width, height), taken, 1)
        taken.append(box)
        _write(axes, name, (step.cost, step.accuracy), box, colours[name], box.y0 > y + 2 * gap)
    return taken


def _name_ends(
    axes: Axes,
    ends: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    taken: list[Bbox],
) -> None:
    """Names methods to the right of where their lines end, from above down."""
    bottom = axes.get_window_extent().y0
    for name, end in ends.items():
        (x, y), (width, height) = axes.transData.transform(end), _size(axes, name)
        beside = Bbox.from_bounds(x + _gap(axes), y - height / 2, width, height)
        box = _beside(beside, taken, -1)
        box = box if box.y0 > bottom else _beside(beside, taken, 1)
        taken.append(box)
        _write(axes, name, end, box, colours[name], abs(box.y0 - beside.y0) > height / 2)


def _beside(box: Bbox, taken: Sequence[Bbox], direction: int) -> Bbox:
    """Returns the box moved up (1) or down (-1) until it covers none of those taken."""
    while any(other := [o for o in taken if o.overlaps(box)]):
        target = max(o.y1 for o in other) + 1 if direction > 0 else min(o.y0 for o in other) - 1
        moved = target - (box.y0 if direction > 0 else box.y1)
        box = box.translated(0, moved)
    return box


def _gap(axes: Axes) -> float:
    """Returns `_GAP` in pixels."""
    return _GAP * _pixels_per_point(axes)


def _pixels_per_point(axes: Axes) -> float:
    return axes.figure.dpi / 72


def _size(axes: Axes, name: str) -> tuple[float, float]:
    """Returns width and height of a name in pixels."""
    text = axes.text(0, 0, name, fontsize=8)
    box = text.get_window_extent()
    text.remove()
    return box.width, box.height


def _write(
    axes: Axes, name: str, at: tuple[float, float], box: Bbox, colour: str, led: bool
) -> None:
    """Writes a name into its box, with a line to its point if it stands apart from it."""
    (x, y), scale = axes.transData.transform(at), _pixels_per_point(axes)
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
    beside = box.x0 > x  # the line goes to the side that is next to the point
    text = axes.annotate(
        name,
        at,
        (((box.x0 if beside else box.x1) - x) / scale, (box.y0 - y) / scale),
        textcoords="offset points",
        ha="left" if beside else "right",
        va="bottom",
        fontsize=8,
        color=colour,
        zorder=6,
        arrowprops={**line, "relpos": (0, 0.5) if beside else (1, 0)} if led else None,
    )
    text.set_in_layout(False)
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
