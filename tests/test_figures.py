"""Figures hold all that they show: bands inside the axes, numbers that no line crosses, words that are true."""

import pytest
from made_runs import make_run
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fdg_jax.figures import Bar, beta_bars, learning_curves
from fdg_jax.results import find
from fdg_jax.tally import Spread, grouped


def test_bands_are_inside_the_axes(tmp_path):
    for seed, first in enumerate((20.0, 22.0, 90.0)):
        make_run(tmp_path / f"{seed}", (first, 10.0), seed=seed)
    picture = learning_curves("curves", "a title", grouped(find([tmp_path])))
    error = picture.figure.axes[0]
    (band,) = error.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(90.0)
    assert error.get_ylim()[1] > 90.0


@pytest.mark.parametrize("bp", [0.4, 3.9, 7.9, 8.6])
def test_no_line_crosses_a_number(bp):
    """It lies under the number, or beside it."""
    bars = [
        Bar(0.2, Spread(8.0, 7.0, 8.5), 7.8, ""),
        Bar(0.5, None, 3.9, "not finished"),
        Bar(1.0, None, None, "not run"),
    ]
    figure = beta_bars("bars", "a title", bars, Spread(bp, bp, bp), bp + 0.1).figure
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["8.00", "not finished", "not run"]
    for text in axes.texts:
        over = [line for line in axes.lines if line.get_zorder() > text.get_zorder()]
        assert not over
        ground = text.get_bbox_patch()
        assert ground.get_facecolor()[3] == 1
        inside = ground.get_window_extent().transformed(axes.transData.inverted())
        assert inside.y0 >= 0
        assert inside.y1 < 8.0
        assert axes.get_xlim()[0] < inside.x0 < inside.x1 < axes.get_xlim()[1]


def test_what_is_not_finished_has_not_ended(tmp_path):
    make_run(tmp_path / "bp", (30.0, 12.0), method="bp", num_stages=1)
    make_run(tmp_path / "fdg", (40.0, 20.0), epochs=3)
    picture = learning_curves("curves", "a title", grouped(find([tmp_path])))
    assert "BP ends at 12.00 %" in picture.alt
    assert "FDG, beta 1, K = 2 is so far at 20.00 %" in picture.alt
    assert "medians over the finished seeds" in picture.caption
