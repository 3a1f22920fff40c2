"""Pictures of a comparison: every row has a line that can be told from the others, where its numbers are."""

import numpy as np
import pytest
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.toyworld import plots
from earlytom_compile.toyworld.evaluate import Arm, Cost, Result
from earlytom_compile.toyworld.installed import INNER, other_methods
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS

NAMES = [*METHODS, *other_methods()]


def result(name, ratio, flops, videos=40):
    rng = np.random.default_rng(round(flops))
    asked = np.ones((videos, 5), bool)
    return Result(Arm(name, ratio), Cost(13.0, 11.0, 0.5, flops), rng.random(asked.shape) < 0.7, asked)


RESULTS = [
    result(ALL_TOKENS, None, 8e8),
    *(result(name, ratio, 1e9 * ratio + place) for place, name in enumerate(NAMES) for ratio in (0.25, 0.1)),
]


@pytest.fixture(scope="module")
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@examples(50)
@given(st.lists(st.sampled_from(NAMES), unique=True))
def test_no_two_rows_look_alike_and_inner_merging_looks_like_the_row_without(names):
    styles = plots.line_styles([ALL_TOKENS, *names])
    assert list(styles) == [ALL_TOKENS, *names] and styles[ALL_TOKENS]["color"] == "black"
    assert len({tuple(sorted(style.items())) for style in styles.values()}) == len(styles)
    plain = [style for name, style in styles.items() if INNER not in name]
    assert len({style["color"] for style in plain}) == len(plain)
    for name in names:
        if INNER in name and (without := styles.get(name.removesuffix(INNER))):
            same = {**styles[name], **without}
            assert same == {**styles[name]} and styles[name]["linestyle"] == "--" and "linestyle" not in without


def test_accuracy_stands_over_operations_with_its_interval(pyplot):
    styles = plots.line_styles([ALL_TOKENS, *NAMES])
    figure = plots._cost_figure(pyplot, RESULTS, styles)
    (axes,) = figure.axes
    lines = {container.get_label(): container for container in axes.containers}
    assert list(lines) == [ALL_TOKENS, *NAMES]
    for name, container in lines.items():
        rows = sorted((row for row in RESULTS if row.arm.method == name), key=lambda row: row.cost.flops)
        line, _, (bars,) = container
        assert list(line.get_xdata()) == [row.cost.flops / 1e6 for row in rows]
        assert list(line.get_ydata()) == [row.accuracy() for row in rows]
        ends = [segment[:, 1] for segment in bars.get_segments()]
        assert np.allclose(ends, [row.interval() for row in rows])
    figure.canvas.draw()
    legend, box = axes.get_legend(), figure.get_window_extent()
    extent = legend.get_window_extent()
    assert len(legend.get_texts()) == 1 + len(NAMES)
    assert box.y0 <= extent.y0 and extent.y1 <= box.y1 and extent.x1 <= box.x1, "the legend is cut off"
    assert extent.x0 >= axes.get_window_extent().x1, "the legend hides points"
    pyplot.close(figure)


@pytest.mark.parametrize("rows", [RESULTS, RESULTS[:1], [result(ALL_TOKENS, None, 8e8, videos=1)]])
def test_every_picture_is_written(pyplot, rows, tmp_path):
    written = plots.write_plots(rows, tmp_path / "new")
    assert [path.stem for path in written] == ["cost", "accuracy", "categories", "encoder"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
