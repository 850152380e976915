"""The figures: what they show, and that they show something for any history."""

import io
import math
import sys

import numpy as np
import pytest

from zofl_jax.observation import plots


def row(round_index, accuracy=None, loss=None, spent=0):
    return {
        "round": round_index,
        "train_loss": None,
        "test_loss": loss,
        "test_accuracy": accuracy,
        "bytes_up": spent // 4,
        "bytes_down": spent - spent // 4,
    }


HISTORY = [row(10 * n, 1 - 0.9**n, 0.9**n, 4000 * n) for n in range(20)]
LOSSES = [row(10 * n, None, 10.0**-n, 4000 * n) for n in range(6)]


def rendered(figure):
    """Draws the figure; returns its tick labels on the first axes, x and y."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    axes = figure.axes[0]
    return [
        [tick.get_text() for tick in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)
    ]


def curves(figure):
    return [np.stack(line.get_data(), axis=1).tolist() for line in figure.axes[0].lines]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_against_rounds():
    figure = plots.accuracy_against_rounds(HISTORY, "digits")
    assert curves(figure) == [[[r["round"], r["test_accuracy"]] for r in HISTORY]]
    x, y = rendered(figure)
    assert {"0", "50", "100"} <= set(x)
    assert {"20 %", "80 %"} <= set(y)
    assert figure.get_suptitle() == "digits"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("round", "test accuracy")


def test_accuracy_against_bytes():
    figure = plots.accuracy_against_bytes(HISTORY, 1e6, "digits")
    accuracies = [r["test_accuracy"] for r in HISTORY[1:]]  # no bytes were spent before
    assert curves(figure) == [
        [[4000.0 * n, a] for n, a in enumerate(accuracies, start=1)],
        [[1e7 * n, a] for n, a in enumerate(accuracies, start=1)],
    ]
    x, _ = rendered(figure)
    assert {"10 kB", "1 MB", "100 MB"} <= set(x)
    assert figure.axes[0].get_xscale() == "log"
    assert legend(figure) == ["this run: 76 kB", "the model exchanged in as many rounds: 190 MB"]


def test_loss_on_a_log_axis_where_there_is_no_accuracy():
    for figure in (
        plots.accuracy_against_rounds(LOSSES, "quadratic"),
        plots.accuracy_against_bytes(LOSSES, 5000, "quadratic"),
    ):
        _, y = rendered(figure)
        assert {"1", "0.01"} <= set(y)
        assert figure.axes[0].get_yscale() == "log"
        assert figure.axes[0].get_ylabel() == "test loss"


def test_missing_values_are_left_out():
    history = [
        row(0, None, 2.0),
        row(1, math.nan, 1.0, 9),
        row(2, 0.5, None, 20),
        row(3, 0.75, 0, 30),
    ]
    figure = plots.accuracy_against_rounds(history, "gaps")
    assert curves(figure) == [[[2, 0.5], [3, 0.75]]]
    figure = plots.accuracy_against_bytes(history, 100, "gaps")
    assert curves(figure) == [[[20, 0.5], [30, 0.75]], [[200, 0.5], [300, 0.75]]]
    rendered(figure)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [row(0)],
        [row(0, 0.1)],
        [row(0, 0.1, 1.0, 10)],
        [row(5, 0.1, 1.0, 10)],
        [row(5, None, 0.0, 10)],
        [row(5, None, -1.0, 10), row(6, None, 1.0, 11)],
        [row(5, None, 1e-30, 10), row(6, None, math.inf, 11)],
        [row(5, 0.5, None, 10), row(6, 0.5, None, 10)],
        [{"round": 3, "train_loss": 0.5, "bytes_up": 1, "bytes_down": 2}],
    ],
)
@pytest.mark.parametrize("dense", [0, 1e9])
def test_scanty_histories_are_drawn(history, dense):
    for figure in (
        plots.accuracy_against_rounds(history, "scanty"),
        plots.accuracy_against_bytes(history, dense, "scanty"),
    ):
        rendered(figure)
        axes = figure.axes[0]
        drawn = any(len(points) for points in curves(figure))
        assert drawn != any(text.get_text() == "no evaluation yet" for text in axes.texts)
        assert all(line.get_marker() == "o" for line in axes.lines)


def test_label_distribution_of_few_clients_has_the_counts():
    counts = np.array([[3, 0, 1], [0, 4, 4], [0, 0, 0]])
    figure = plots.label_distribution(counts, "labels")
    rendered(figure)
    top, main, _ = figure.axes
    assert [bar.get_height() for bar in top.patches] == [4, 8, 0]
    assert {(*text.get_position(), text.get_text()) for text in main.texts} == {
        (client, label, str(counts[client, label])) for client, label in np.argwhere(counts)
    }
    np.testing.assert_array_equal(
        main.images[0].get_array(), [[0.75, 0, 0], [0, 0.5, 0], [0.25, 0.5, 0]]
    )
    assert main.get_xlabel() == "client"


def test_label_distribution_of_many_clients_is_ordered():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(50, rng.dirichlet(np.ones(10), size=1000))
    figure = plots.label_distribution(counts, "labels")
    rendered(figure)
    top, main, _ = figure.axes
    shares = np.asarray(main.images[0].get_array()).T
    assert (np.diff(shares.argmax(axis=1)) >= 0).all()
    np.testing.assert_array_equal(np.sort(shares, axis=0), np.sort(counts / 50, axis=0))
    assert top.patches[0].get_data().values.tolist() == [50] * 1000
    assert not main.texts
    assert main.get_xlabel() == "1,000 clients, ordered by most frequent class"


@pytest.mark.parametrize("shape", [(1, 1), (25, 62), (26, 2)])
def test_label_distribution_of_any_shape(shape):
    for counts in (np.zeros(shape, int), np.ones(shape, np.int32)):
        rendered(plots.label_distribution(counts, "labels"))


@pytest.mark.parametrize("shape", [(3,), (0, 10), (2, 0), (2, 2, 2)])
def test_label_distribution_needs_a_table(shape):
    with pytest.raises(ValueError, match=r"counts must be \[num_clients, num_classes\], got shape"):
        plots.label_distribution(np.zeros(shape), "labels")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (115_752, "116 kB"),
        (999_999, "1 MB"),
        (2.5e9, "2.5 GB"),
        (1e12, "1 TB"),
    ],
)
def test_human_bytes(count, text):
    assert plots.human_bytes(count) == text


def test_no_global_state():
    rendered(plots.accuracy_against_rounds(HISTORY, "digits"))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
