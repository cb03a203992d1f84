"""Pictures: what is in a schedule's, whether it can be read, and that its files hold nothing but the picture."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from matplotlib.collections import PolyCollection
from PIL import Image

from fdg_jax import schedule as schedules
from fdg_jax.plots import (
    FAINT,
    PALETTE,
    TINT,
    colour,
    contrast,
    draw_schedule,
    fill,
    ink_on,
    new_figure,
    save,
    usual_ticks,
)
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Op, row

SCHEDULES = {
    "fdg": schedules.fdg,
    "bp": schedules.bp,
    "gpipe": lambda k: schedules.gpipe(k, 4),
    "1f1b": lambda k: schedules.one_f_one_b(k, 4),
    "ddg": schedules.ddg,
    "pipedream": schedules.pipedream,
    "dgl": schedules.local,
    "dni": schedules.dni,
}
TICKS = 9


def drawn(figure):
    """Of every lane: boxes from left to right as (left, right, colour), and numbers as (place, text)."""
    (axes,) = figure.axes
    boxes, numbers = {}, {}
    for shape in axes.collections:
        assert isinstance(shape, PolyCollection)
        (path,) = shape.get_paths()
        extent = path.get_extents()
        face = "#" + "".join(f"{round(255 * part):02X}" for part in shape.get_facecolor()[0][:3])
        if face != FAINT:
            boxes.setdefault(round((extent.y0 + extent.y1) / 2), []).append((extent.x0, extent.x1, face))
    for text in axes.texts:
        numbers.setdefault(round(text.get_position()[1]), []).append((text.get_position()[0], text.get_text()))
    return boxes, numbers


@pytest.mark.parametrize("num_stages", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_box_an_operation_in_order_within_its_tick(name, num_stages):
    schedule = SCHEDULES[name](num_stages)
    boxes, numbers = drawn(draw_schedule(schedule, TICKS))
    for k in range(num_stages):
        ops = [(tick, op) for tick in range(TICKS) for op in row(schedule, tick)[k]]
        shown = boxes.get(k, [])
        assert len(shown) == len(ops)
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(shown))
        for (left, right, face), (tick, op) in zip(shown, ops, strict=True):
            assert tick <= left < right <= tick + 1
            assert face == fill(op.kind, op.batch)
        labelled = [(box, str(op.batch)) for box, (_, op) in zip(shown, ops, strict=True) if op.kind != UPDATE]
        for ((left, right, _), batch), (place, text) in zip(labelled, numbers.get(k, []), strict=True):
            assert left < place < right
            assert text == batch


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_the_usual_picture_shows_an_answer_of_every_stage(name, num_stages):
    schedule = SCHEDULES[name](num_stages)
    rows = [row(schedule, tick) for tick in range(usual_ticks(schedule))]
    assert all(any(Op(BACKWARD, 0) in visits[k] for visits in rows) for k in range(num_stages))


def test_the_usual_picture_is_drawn_by_default():
    (axes,) = draw_schedule(schedules.bp(2)).axes
    assert axes.get_xlim() == (0, usual_ticks(schedules.bp(2)))


def test_titles_lanes_and_ticks():
    (axes,) = draw_schedule(schedules.gpipe(3, 4), 6).axes
    assert axes.get_title(loc="left") == "gpipe, K = 3, M = 4"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stage 0", "stage 1", "stage 2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "4", "5"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # stage 0 above
    assert draw_schedule(schedules.fdg(2), 3, title="mine").axes[0].get_title(loc="left") == "mine, K = 2"


@pytest.mark.parametrize(("schedule", "named"), [(schedules.fdg(2), False), (schedules.dni(2), True)])
def test_the_legend_tells_of_what_is_drawn(schedule, named):
    (legend,) = draw_schedule(schedule, 4).legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["forward", "backward", "update", *(["synthesis"] if named else []), "waits"]


def test_every_number_can_be_read_on_its_box():
    for batch in range(len(PALETTE)):
        for kind in TINT:
            assert contrast(ink_on(fill(kind, batch)), fill(kind, batch)) >= 4.5
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


def dichromat(rgb, cut):
    """What is left of a colour without one kind of cones: about, by dropping red against green, or blue."""
    red, green, blue = (int(rgb[i : i + 2], 16) for i in (1, 3, 5))
    return ((red + green) / 2, blue) if cut == "red-green" else (red, green)


@pytest.mark.parametrize("cut", ["red-green", "blue"])
def test_batches_that_follow_one_another_are_told_apart_by_everybody(cut):
    for one, other in pairwise([*PALETTE, PALETTE[0]]):
        a, b = dichromat(one, cut), dichromat(other, cut)
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 30
    assert colour(len(PALETTE) + 2) == colour(2)


def test_operations_differ_by_shade_also_in_print_without_colours():
    for batch in range(len(PALETTE)):
        assert contrast(fill(FORWARD, batch), fill(BACKWARD, batch)) > 1.15
    assert len({fill(kind, 0) for kind in (FORWARD, BACKWARD, UPDATE, SYNTHESIS)}) == 4


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files_are_valid_and_the_same_bytes_again(suffix, tmp_path):
    paths = [save(draw_schedule(schedules.dni(3), 5), tmp_path / str(n) / f"x.{suffix}") for n in range(2)]
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert str(tmp_path).encode() not in first
    if suffix == "png":
        with Image.open(paths[0]) as image:
            image.verify()
            assert image.size[0] > 900
            assert set(image.info) <= {"dpi"}
    else:
        root = ElementTree.fromstring(first)
        assert root.tag.endswith("svg")
        assert b"<dc:date>" not in first


def test_other_suffixes_are_refused_in_a_line(tmp_path):
    with pytest.raises(ValueError, match=r"^a picture is written as \.png or \.svg; got 'x\.pdf'$"):
        save(new_figure(1, 1), tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


def test_a_picture_needs_a_tick():
    with pytest.raises(ValueError, match="at least one tick; got ticks=0"):
        draw_schedule(schedules.fdg(2), 0)


def test_matplotlib_comes_with_the_first_picture_and_pyplot_never():
    script = (
        "import sys, fdg_jax.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from fdg_jax import schedule\n"
        "plots.draw_schedule(schedule.fdg(2))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
