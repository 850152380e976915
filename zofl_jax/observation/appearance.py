"""How all figures look: colours and axes."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

# Wong, "Points of view: Color blindness", Nature Methods 8, 441 (2011).
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (
    *(BLUE, VERMILION, "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#8A7A00"),
)
LINES = ("-", "--", ":", "-.")
INK, FAINT = "#333333", "#DDDDDD"


def new_figure(title: str, size: tuple[float, float] = (6.4, 4.0)) -> Figure:
    """Returns a figure with its title, outside pyplot's state; `size` is in inches."""
    figure = Figure(figsize=size, dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def tidy(axes: Axes) -> None:
    """Gives axes a faint grid and frame, and takes the other lines away."""
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)


def count_axis(axis: Axis, max_ticks: int) -> None:
    """Puts whole numbers at the ticks of an axis."""
    axis.set_major_locator(MaxNLocator(max_ticks, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(formatter("{:,.0f}".format))


def log_ticks(axis: Axis, ratio: float, text: Callable[[float], str]) -> None:
    """Puts ticks on powers of ten, and on 2 and 5 times these where the axis is short."""
    subs: tuple[float, ...] = (1.0, 2.0, 5.0) if ratio < 300 else (1.0,)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if ratio < 8 else subs
    axis.set_major_locator(LogLocator(subs=subs, numticks=10))
    axis.set_major_formatter(formatter(text))
    axis.set_minor_formatter(NullFormatter())


def formatter(text: Callable[[float], str]) -> FuncFormatter:
    """Returns what writes the ticks of an axis as `text` does."""
    return FuncFormatter(lambda value, _: text(value))


def per_cent(share: float) -> str:
    """Returns a share as people write it.

    >>> per_cent(0.125)
    '12.5 %'
    """
    return f"{100 * share:g} %"
