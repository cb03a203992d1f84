"""Hand-made timelines whose shares are plain, the trace file, the picture."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax import schedule as schedules
from fdg_jax.plots import save
from fdg_jax.schedule import Op
from fdg_jax.timeline import Box, Link, Message, StageCost, plan
from fdg_jax.trace import Timeline, by_device, chrome_trace, shares, table, title
from fdg_jax.trace_picture import EDGED, LETTERS, MOST, NARROWEST, draw


def box(stage, tick, start, end, *ops, device=None):
    return Box(stage, stage if device is None else device, tick, tuple(Op(o[0], int(o[1:])) for o in ops), start, end)


# Device 0 is late by a message in the second visit, device 1 has less to do than device 0 and waits besides.
HAND_MADE = Timeline(
    "measured",
    (
        box(0, 5, 0.0, 3.0, "B3", "U3", "F5"),
        box(1, 5, 0.0, 2.0, "F4", "B4", "U4"),
        box(0, 6, 5.0, 9.0, "B4", "U4", "F6"),
        box(1, 6, 4.0, 6.0, "F5", "B5", "U5"),
    ),
    (
        Message(1, 0, Op("B", 4), 2.0, 4.0),  # while device 0 works until 3, then for one second
        Message(None, 0, Op("F", 6), 3.5, 4.5),  # of which half a second together with the other
        Message(0, 1, Op("F", 5), 3.0, 3.5),
    ),
    {0: -1.0, 1: -4.0},
)


def test_where_the_time_goes():
    """Of 10 s of device 0 are 7 compute, 1 transfer, and half a second is for its batch alone; of those of device 1 are
    4 compute and half a second transfer, and it has 30 % less to do.
    """
    found = shares(HAND_MADE)
    assert found[0] == pytest.approx((70, 10, 5, 15, 0))
    assert found[1] == pytest.approx((40, 5, 0, 25, 30))


def test_input_takes_nothing_from_imbalance():
    """Both devices wait for 6 s of 10 for the host; the second has 2 s less to do, and idles for 8."""
    boxes = (box(0, 0, 0, 1, "F0"), box(1, 0, 0, 1, "F9"), box(0, 1, 7, 10, "F1"), box(1, 1, 9, 10, "F0"))
    batch = [Message(None, stage, Op("F", i), 1.0, end) for stage, i, end in ((0, 1, 7.0), (1, 0, 9.0))]
    parts = shares(Timeline("measured", boxes, tuple(batch)))
    assert parts[0] == pytest.approx((40, 0, 60, 0, 0))
    assert parts[1] == pytest.approx((20, 0, 60, 0, 20))


def test_the_table_and_what_machines_read_are_the_shares():
    assert table([HAND_MADE]).splitlines() == [
        "          device  stages      compute   transfer      input    waiting  imbalance",
        "measured  0       0              70.0       10.0        5.0       15.0        0.0",
        "measured  1       1              40.0        5.0        0.0       25.0       30.0",
    ]
    first, second = by_device(HAND_MADE)
    assert (first["device"], first["stages"], first["input"]) == (0, [0], pytest.approx(5))
    assert (second["device"], second["imbalance"]) == (1, pytest.approx(30))


def test_stages_that_share_a_device_are_one_lane():
    boxes = (box(0, 0, 0, 1, "F0"), box(1, 1, 1, 3, "F0", "B0", "U0", device=0), box(0, 2, 4, 6, "B0", "U0"))
    assert shares(Timeline("measured", boxes)) == {0: pytest.approx((100 * 5 / 6, 0, 0, 100 / 6, 0))}


def test_imbalance_is_no_more_than_what_is_idle():
    """Device 1 would lose 50 % to imbalance, but for 60 % it waits for a message."""
    boxes = (box(0, 0, 0, 9, "F1"), box(1, 0, 0, 1, "F0"), box(1, 1, 7, 10, "F1"))
    parts = shares(Timeline("measured", boxes, (Message(0, 1, Op("F", 1), 1.0, 7.0),)))
    assert parts[1] == pytest.approx((40, 60, 0, 0, 0))


def planned_timeline(schedule, costs, num_batches=12, transfer=1.0, devices=None):
    messages = []
    boxes = tuple(plan(schedule, costs, num_batches, Link(bandwidth=1 / transfer), devices, messages=messages))
    return Timeline("planned", boxes, tuple(messages))


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4), st.booleans(), st.sampled_from("abc"))
def test_shares_add_up(costs, shares_devices, name):
    maker = {"a": schedules.fdg, "b": schedules.bp, "c": schedules.pipedream}[name]
    costs = [StageCost(f, b, 0.5, activations=size, cotangents=size) for f, b, size in costs]
    devices = [k // 2 for k in range(len(costs))] if shares_devices else None
    for parts in shares(planned_timeline(maker(len(costs)), costs, 8, devices=devices)).values():
        assert sum(parts) == pytest.approx(100)
        assert min(parts) >= -1e-9


def test_bp_waits_and_is_not_out_of_balance():
    parts = shares(planned_timeline(schedules.bp(2), [StageCost(1, 2)] * 2))
    for part in parts.values():  # but for the ends of the windows, where one device waits less
        assert part.compute == pytest.approx(50, abs=3)
        assert part.imbalance == pytest.approx(0, abs=3)


def test_messages_of_a_plan_leave_their_senders_and_reach_their_readers():
    costs = [StageCost(1, 2, activations=2, cotangents=1)] * 3
    timeline = planned_timeline(schedules.fdg(3), costs)
    arrows = list(timeline.arrows())
    assert len(arrows) == len(timeline.messages) == 2 * 2 * 12
    for message, sender, reader in arrows:
        assert sender.end <= message.sent < message.arrived <= reader.start
        assert message.arrived - message.sent == (2 if message.op.kind == "F" else 1)
    assert planned_timeline(schedules.fdg(3), costs, devices=[0, 0, 0]).messages == ()


def test_a_trace_is_what_chrome_reads():
    """Every event has what its phase needs; flows are pairs whose ends lie in the slices that they join."""
    plan_ = planned_timeline(schedules.fdg(2), [StageCost(1, 2, activations=1, cotangents=1)] * 2)
    events = json.loads(json.dumps(chrome_trace([plan_, HAND_MADE])))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X" and event["cat"] == "visit"]
    assert len(slices) == len(plan_.boxes) + len(HAND_MADE.boxes)
    for event in slices:
        assert {"name", "pid", "tid", "ts", "dur"} <= set(event)
        assert event["dur"] > 0
    assert [e["name"] for e in slices if e["pid"] == 1] == [title(each.ops) for each in HAND_MADE.boxes]
    assert (slices[-1]["ts"], slices[-1]["dur"], slices[-1]["tid"]) == (4e6, 2e6, 1)
    assert slices[-1]["args"] == {"stage": 1, "tick": 6, "batches": [5]}
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(pid, device): f"device {device}" for pid in (0, 1) for device in (0, 1)} | {(1, 2): "host"}
    (made,) = (event for event in events if event.get("cat") == "input")
    assert (made["name"], made["pid"], made["tid"], made["ts"], made["dur"]) == ("batch 6", 1, 2, 3.5e6, 1e6)
    slices.append(made)
    begins, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert set(begins) == set(ends)
    assert len(begins) == len([e for e in events if e["ph"] == "s"]) == len(plan_.messages) + 3

    def covering(flow):
        return [
            s
            for s in slices
            if (s["pid"], s["tid"]) == (flow["pid"], flow["tid"]) and s["ts"] <= flow["ts"] < s["ts"] + s["dur"]
        ]

    for number, begin in begins.items():
        assert begin["ts"] < ends[number]["ts"]
        assert begin["args"]["sent_us"] <= begin["args"]["arrived_us"]
        (sender,), (reader,) = covering(begin), covering(ends[number])
        assert begin["args"]["batch"] in sender["args"]["batches"]
        assert begin["args"]["batch"] in reader["args"]["batches"]
        assert sender["tid"] != reader["tid"]


def test_a_host_that_is_at_the_next_batch_before_one_arrives_has_no_slice_in_another():
    sends = [
        Message(None, stage, Op("F", i), sent, end)
        for stage, i, sent, end in ((0, 3, 1, 4), (1, 3, 1, 6), (0, 4, 5, 7))
    ]
    events = chrome_trace([Timeline("measured", (box(0, 0, 4, 5, "F3"),), tuple(sends))])["traceEvents"]
    found = [(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") == "input"]
    assert found == [("batch 3", 1e6, 4e6), ("batch 4", 5e6, 2e6)]


def test_the_picture_has_both_timelines_on_one_scale(tmp_path):
    figure = draw([planned_timeline(schedules.fdg(2), [StageCost(1, 2)] * 2, 3), HAND_MADE])
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim() == (0, 1e3 * 12)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["planned, 12,000.0 ms", "measured, 9,000.0 ms"]
    texts = [text.get_text() for text in below.texts]
    for expected in ("B3", "F5", "F4", "B4"):
        assert expected in texts
    assert "70 % compute\n10 % transfer\n5 % input\n15 % waiting\n0 % imbalance" in texts
    arrows = [text for text in below.texts if getattr(text, "arrow_patch", None)]
    assert [(a.xyann[0], a.xy[0]) for a in arrows] == [(2000, 4000), (3000, 3500)]
    assert save(figure, tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_timeline_says_how_much_of_it_is_drawn():
    """A visit of a full pipeline lasts 3 s, and two of BP."""
    long, short = (planned_timeline(schedules.fdg(2), [StageCost(1, 2)] * 2, num) for num in (30, 5))
    figure = draw([long, short])
    shown, whole = long.lanes[0][MOST - 1].end, long.boxes[-1].end
    assert shown < whole
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"planned, the first {1e3 * shown:,.1f} of {1e3 * whole:,.1f} ms",
        f"planned, {1e3 * short.boxes[-1].end:,.1f} ms",
    ]
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 1e3 * shown)}


def test_labels_are_legible_or_not_there():
    thousands = [box(0, tick, 3.0 * tick, 3.0 * tick + 3, f"B{tick + 1000}", f"F{tick + 1001}") for tick in range(20)]
    small = [box(1, tick, 3.0 * tick, 3.0 * tick + 0.9, f"F{tick + 1000}") for tick in range(20)]
    figure = draw([Timeline("measured", tuple(thousands + small))])
    labels = [text for text in figure.axes[0].texts if text.get_text()[:2] in ("B1", "F1")]
    assert {text.get_text()[0] for text in labels} == {"B", "F"}
    assert len(labels) >= 2 * MOST
    assert all(text.get_position()[1] < 0.5 for text in labels)  # none on the lane of small boxes
    assert min(text.get_fontsize() for text in labels) >= LETTERS[0]
    assert figure.get_figwidth() <= 13  # inches: on a screen, letters are as large as they say


def test_a_lane_of_several_stages_tells_them_apart():
    boxes = (box(0, 0, 0, 1, "B3", "U3", "F5"), box(1, 0, 1, 2, "F4", device=0), box(2, 0, 0, 2, "F3", device=1))
    texts = [text.get_text() for text in draw([Timeline("measured", boxes)]).axes[0].texts]
    assert [text for text in texts if len(text) < 8] == ["0: B3", "F5", "1: F4", "F3"]


def test_short_visits_are_seen():
    """A white edge is for wide boxes; the others are no narrower than what is visible."""
    boxes = (box(0, 0, 0, 0.001, "B1"), box(0, 1, 1, 1.001, "B2"), box(1, 0, 0, 10, "B1"))
    figure = draw([Timeline("measured", boxes)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    points = 72 / figure.dpi * axes.bbox.width / 10_000  # a ms
    bars = [bar for bar in axes.collections if bar.get_zorder() > 0]
    edged, filled = ([b for b in bars if len(b.get_edgecolor() if edges else b.get_facecolor())] for edges in (1, 0))
    assert [bar.get_datalim(axes.transData).width for bar in edged] == [10_000]
    widths = [points * bar.get_datalim(axes.transData).width for bar in filled]
    assert widths[:2] == pytest.approx([NARROWEST] * 2, rel=0.2)  # the page's margins are estimated
    assert widths[2] > EDGED
    assert min(bar.get_zorder() for bar in filled[:2]) > edged[0].get_zorder()  # nor does that of the next hide it
