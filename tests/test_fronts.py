"""The figures of many methods: who is ahead is found, coloured and named where it can be read."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from zofl_jax.observation import fronts
from zofl_jax.observation.quantities import human_bytes

GREY = "#C4C4C4"


def curve(x, mean):
    mean = np.array(mean, float)
    return fronts.Curve(np.array(x, float), mean, mean - 0.01, mean + 0.01)


def random_curves(count, seed=0):
    rng, steps = np.random.default_rng(seed), np.arange(1, 13)
    found = {}
    for i in range(count):
        cost, top, pace = 10 ** rng.uniform(3, 6), rng.uniform(0.6, 0.98), rng.uniform(1, 6)
        rise = 0.1 + (top - 0.1) * (1 - np.exp(-steps / pace)) + rng.normal(0, 0.01, steps.size)
        found[f"method-{i}"] = curve(cost * steps, rise)
    return found


def many(count=30):
    passes = {name: c._replace(x=3e8 / c.x[::-1]) for name, c in random_curves(count).items()}
    return [
        fronts.Panel("bytes", random_curves(count), human_bytes),
        fronts.Panel("forward passes", passes),
    ]


def drawn(panels, *args):
    figure = fronts.pareto(panels, "digits", *args)
    figure.savefig(io.BytesIO(), format="png")
    return figure


def named(axes):
    return {text.get_text(): text for text in axes.texts}


def lines_of(axes):
    """Returns (costs, accuracies) -> colour of the curves; not of the front, nor of targets."""
    found = [line for line in axes.lines if line.get_linewidth() in (0.9, 1.6)]
    return {tuple(map(tuple, line.get_data())): line.get_color() for line in found}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_better_and_as_cheap_as_a_step_of_the_front(seed):
    curves = random_curves(9, seed)
    steps = fronts.front(curves)
    points = {(x, y, name) for name, c in curves.items() for x, y in zip(c.x, c.mean, strict=True)}
    assert set(steps) <= points and len({step.method for step in steps}) > 1
    for before, after in itertools.pairwise(steps):
        assert before.cost < after.cost and before.accuracy < after.accuracy
    for x, y, _ in points:
        best = max((step.accuracy for step in steps if step.cost <= x), default=None)
        assert best is not None and best >= y


def test_points_without_cost_or_accuracy_are_on_no_front():
    curves = {"a": curve([0, 1, 2], [0.9, np.nan, 0.5]), "b": curve([2, np.nan], [0.5, 0.8])}
    assert fronts.front(curves) == [(2.0, 0.5, "a")]
    assert fronts.front({}) == []


def test_methods_on_a_front_are_coloured_and_named_in_every_panel_the_others_are_grey():
    panels = many()
    figure = drawn(panels)
    ahead = {step.method for panel in panels for step in fronts.front(panel.curves)}
    assert 4 <= len(ahead) <= 20
    for axes, panel in zip(figure.axes, panels, strict=True):
        assert named(axes).keys() == ahead
        colours = lines_of(axes)
        assert len(colours) == 30
        for name, c in panel.curves.items():
            colour = colours[tuple(c.x), tuple(c.mean)]
            assert (colour == GREY) == (name not in ahead)
            assert name not in ahead or named(axes)[name].get_color() == colour
        assert axes.get_xlabel() == panel.label and axes.get_xscale() == "log"
    below = figure.legends[0].get_texts()[1].get_text().replace("\n", " ").split(", ")
    assert set(below) == set(panels[0].curves) - ahead


def test_names_lie_apart_inside_the_figure_and_on_no_line_of_the_front():
    panels = many()
    figure = drawn(panels)
    for axes, panel in zip(figure.axes, panels, strict=True):
        # Of the name alone, without the line that leads to it.
        boxes = {name: Text.get_window_extent(text) for name, text in named(axes).items()}
        for (_, a), (_, b) in itertools.combinations(boxes.items(), 2):
            assert not a.overlaps(b)
        steps = fronts.front(panel.curves)
        corners = [axes.transData.transform((step.cost, step.accuracy)) for step in steps]
        for name, text in named(axes).items():
            box, whole = boxes[name], figure.bbox
            assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1
            if text.get_ha() == "right":  # above the front
                assert name in {step.method for step in steps}
                assert all(not box.contains(x, y) for x, y in corners)
                assert box.y0 > max(y for x, y in corners if x <= box.x1)


def test_the_front_is_a_line_of_steps():
    curves = {"few": curve([1, 2, 4], [0.2, 0.5, 0.4]), "many": curve([2, 9], [0.1, 0.8])}
    (axes,) = drawn([fronts.Panel("bytes", curves)]).axes
    (front,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
    x, y = front.get_data()
    assert list(x[:-1]) == [1, 2, 9] and list(y) == [0.2, 0.5, 0.8, 0.8]
    assert x[-1] > axes.get_xlim()[1]


def test_of_few_methods_all_are_named():
    curves = {"ahead": curve([1, 2], [0.5, 0.6]), "behind": curve([2, 3], [0.1, 0.2])}
    figure = drawn([fronts.Panel("bytes", curves, human_bytes)], [0.55])
    assert named(figure.axes[0]).keys() == {"ahead", "behind"}
    assert GREY not in {text.get_color() for text in figure.axes[0].texts}  # too faint to read
    assert len(figure.legends[0].get_texts()) == 1
    targets = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [set(line.get_ydata()) for line in targets] == [{0.55}]


def test_accuracies_above_all_are_no_ticks():
    (axes,) = drawn([fronts.Panel("bytes", random_curves(30))]).axes
    assert max(axes.get_yticks()) <= 1 < axes.get_ylim()[1]


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"none": curve([], [])},
        {"free": curve([0.0], [0.5])},
        {"one": curve([5.0], [0.5])},
        {"unknown": curve([np.nan, np.nan], [0.5, 0.6]), "one": curve([5.0], [0.5])},
        {"flat": curve([5.0, 6.0], [0.5, 0.5]), "same": curve([5.0, 6.0], [0.5, 0.5])},
        {"a name of very many letters that is wider than most of the axes": curve([1], [0.5])},
    ],
)
def test_scanty_curves_are_drawn(curves):
    figure = drawn([fronts.Panel("bytes", curves), fronts.Panel("passes", {})])
    assert len(figure.axes) == 2


def test_a_figure_has_panels():
    with pytest.raises(ValueError, match="no panels"):
        fronts.pareto([], "digits")
