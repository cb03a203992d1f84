"""What the recorder makes of what an engine tells it, with a clock of our own; and of a real pipeline."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import jax
import pytest
from helpers import assert_trees_close, host, make_pipeline, tiny_batches
from hypothesis import given
from hypothesis import strategies as st
from jax.monitoring import record_event_duration_secs

from fdg_jax import corrections, methods
from fdg_jax import schedule as schedules
from fdg_jax.recorder import Recorder
from fdg_jax.schedule import Op
from fdg_jax.timeline import Link, StageCost, plan
from fdg_jax.trace import chrome_trace, shares

METHODS = {
    "fdg": methods.fdg(0.5),
    "gpipe": methods.gpipe(2),  # in which some visits make nothing that another stage reads
    "dni": methods.dni(context=False),
}


NAMES = {"pause": "begin", "pause ends": "end"}


def told(*events):
    """The timeline of two stages on two devices: an array is the time at which it is there."""
    now, known = [0.0], threading.local()

    def clock():
        return getattr(known, "time", now[0])

    def wait(array):
        known.time = array  # in the thread that waits

    recorder = Recorder(["a", "b"], schedules.fdg(2), clock, wait)
    for time, what, *arguments in events:
        now[0] = time
        if what == "compiled":  # for so many seconds
            record_event_duration_secs("/jax/core/compile/backend_compile_duration", *arguments)
        else:
            getattr(recorder.pauses if what.startswith("pause") else recorder, NAMES.get(what, what))(*arguments)
    return recorder.stop()


def test_a_visit_begins_with_the_last_of_what_it_needs():
    """Dispatched at 1; or the visit before ends, at 4; or a message arrives, at 9; or dispatched, at 20."""
    visits = [((Op("F", i),), end) for i, end in enumerate((4.0, 6.0, 12.0, 21.0))]
    found = told(
        (1, "begin", 0),
        (1, "visit", 1, *visits[0]),
        (1, "begin", 1),
        (1, "visit", 1, *visits[1]),
        (2, "begin", 2),
        (2, "deliver", {("inputs", 1, 2): 9.0, ("targets", 1, 3): 7.0}),
        (2, "visit", 1, *visits[2]),
        (20, "begin", 3),
        (20, "visit", 1, *visits[3]),
    )
    assert [(box.start, box.end) for box in found.boxes] == [(0, 3), (3, 5), (8, 11), (19, 20)]
    assert [(m.sender, m.reader, m.op, m.sent, m.arrived) for m in found.messages] == [
        (0, 1, Op("F", 2), 1, 8),
        (None, 1, Op("F", 3), 1, 6),
    ]


def test_a_message_leaves_when_it_is_there_and_its_transfer_is_dispatched():
    found = told(
        (0, "begin", 0),
        (0, "visit", 0, (Op("F", 0),), 5.0),
        (1, "begin", 1),
        (1, "deliver", {("inputs", 1, 0): 7.0}),
        (1, "visit", 1, (Op("F", 0), Op("B", 0)), 8.0),
        (10, "begin", 2),
        (10, "deliver", {("cotangents", 0, 0): 12.0}),
        (10, "visit", 0, (Op("B", 0),), 13.0),
    )
    assert [(m.sender, m.op, m.sent, m.arrived) for m in found.messages] == [
        (0, Op("F", 0), 5, 7),
        (1, Op("B", 0), 10, 12),
    ]
    assert [(box.start, box.end) for box in found.boxes] == [(0, 5), (7, 8), (12, 13)]


def test_the_window_begins_at_the_mark():
    visits = [(float(end), "visit", 0, (Op("F", end),), float(end)) for end in (1, 2, 3)]
    found = told(*visits[:2], (2, "mark"), visits[2])
    assert [box.ops[0].batch for box in found.boxes] == [3]
    assert found.since == {0: 0.0}  # the one before ended when this one began


def trained(early=0.0, late=0.0):
    """Two stages and their messages; times are of training, and pauses at 2 and at 6 last so many seconds more."""

    def pause(begin, seconds):
        return [(begin, "pause"), (begin + seconds, "pause ends")] if seconds else []

    first, second = 2 + early, 6 + early + late  # when the two ticks of the window are dispatched
    noted = 2.5 if early else 2.0  # by a thread that is late, when the pause has begun
    return told(
        (0, "begin", 0),
        (0, "visit", 0, (Op("F", 0),), 1.0),
        (0, "visit", 1, (Op("F", 9),), noted),
        *pause(2, early),
        (first, "mark"),
        (first, "begin", 1),
        (first, "deliver", {("inputs", 1, 0): early + 3}),
        (first, "visit", 0, (Op("F", 1),), early + 4),
        (first, "visit", 1, (Op("F", 0), Op("B", 0)), early + 6),
        *pause(6 + early, late),
        (second, "begin", 2),
        (second, "deliver", {("cotangents", 0, 0): second + 1, ("inputs", 1, 1): second + 1}),
        (second, "visit", 0, (Op("B", 0),), second + 3),
        (second, "visit", 1, (Op("F", 1), Op("B", 1)), second + 4),
    )


def test_a_pause_in_the_middle_is_cut_out():
    assert trained(late=90.0) == trained()


@pytest.mark.parametrize("late", [0.0, 40.0])
def test_after_a_pause_the_window_begins_with_its_end(late):
    """Device 0: 7 s, 4 of compute, 1 of transfer. Device 1: 8 s, 6 of compute, 2 of transfer."""
    found, wanted = trained(early=90.0, late=late), trained()
    assert (found.boxes, found.messages) == (wanted.boxes, wanted.messages)
    assert wanted.since == {0: -1.0, 1: 0.0}  # where there was none, device 0 has waited for a second
    assert found.since == {0: 0.0, 1: 0.0}
    parts = shares(found)
    assert parts[0] == pytest.approx((400 / 7, 100 / 7, 0, 200 / 7 - (75 - 400 / 7), 75 - 400 / 7))
    assert parts[1] == pytest.approx((75, 25, 0, 0, 0))


def test_what_compiles_is_cut_out_from_when_devices_are_done():
    """The second visit compiles from 1 to 11, and again from 11.5 to 21; the first one lasts until 3."""
    found = told(
        (0, "mark"),
        (0, "begin", 0),
        (0, "visit", 0, (Op("F", 0),), 3.0),
        (11, "compiled", 10.0),
        (21, "compiled", 9.5),
        (21, "visit", 1, (Op("F", 9),), 23.0),
        (22, "visit", 0, (Op("F", 1),), 24.0),
    )
    assert [(box.start, box.end) for box in found.boxes] == [(0, 3), (3, 5), (3, 6)]


def test_nothing_is_cut_out_while_a_device_is_at_work():
    found = told(
        (0, "begin", 0),
        (0, "visit", 0, (Op("F", 0),), 30.0),
        (11, "compiled", 10.0),
        (11, "visit", 1, (Op("F", 9),), 13.0),
    )
    assert [(box.start, box.end) for box in found.boxes] == [(0, 30), (11, 13)]


def test_a_batch_is_input_from_when_the_host_turns_to_it():
    """It is asked for at 1, sent at 4 and there at 5; device 0 has been free since 2, device 1 awaits what was sent."""
    found = told(
        (0, "begin", 0),
        (0, "visit", 0, (Op("F", 0),), 2.0),
        (0, "visit", 1, (Op("F", 9),), 2.0),
        (1, "fetch"),
        (4, "begin", 1),
        (4, "deliver", {("inputs", 0, 1): 5.0, ("inputs", 1, 0): 5.0}),
        (4, "visit", 0, (Op("F", 1),), 7.0),
        (4, "visit", 1, (Op("F", 0),), 7.0),
        (4, "fetch"),
        (6, "begin", 2),
        (6, "deliver", {("inputs", 1, 1): 8.0}),
        (6, "visit", 1, (Op("F", 1),), 10.0),
    )
    assert [(m.sender, m.reader, m.sent, m.arrived) for m in found.messages] == [
        (None, 0, 1, 5),
        (0, 1, 4, 5),
        (0, 1, 7, 8),
    ]
    assert [(box.start, box.end) for box in found.boxes] == [(0, 2), (0, 2), (5, 7), (5, 7), (8, 10)]
    imbalance = 60 - 400 / 7
    assert shares(found)[0] == pytest.approx((400 / 7, 0, 300 / 7 - imbalance, 0, imbalance))
    assert shares(found)[1] == pytest.approx((60, 20, 0, 20, 0))


@given(st.data())
def test_threads_that_note_late_tell_nothing_impossible(data):
    """A planned run, of which threads note every end late: no arrow runs backwards, no visit is in another."""
    schedule, link = schedules.fdg(2), Link(latency=0.25)
    messages = []
    boxes = list(plan(schedule, [StageCost(1, 2), StageCost(2, 1)], 6, link, messages=messages))
    arrivals = {(m.reader, m.op): m.arrived for m in messages}
    waiting = {}  # a thread, by what it waits for, notes one thing after another

    def noted(lane, seconds):
        late = data.draw(st.sampled_from([0.0, 0.0, 0.5, 3.0, 20.0]))
        waiting[lane] = max(seconds + late, waiting.get(lane, 0.0))
        return waiting[lane]

    events, known = [], {}
    for tick in sorted({box.tick for box in boxes}):
        inside = [box for box in boxes if box.tick == tick]
        reads = {(box.stage, op) for box in inside for op in box.ops} & set(arrivals)
        sent = {("inputs" if op.kind == "F" else "cotangents", k, op.batch): (k, op) for k, op in sorted(reads)}
        events += [
            (tick / 1024, "begin", tick),
            (tick / 1024, "deliver", {key: noted((1 - k, k), arrivals[k, op]) for key, (k, op) in sent.items()}),
        ]
        for box in inside:
            known[box.stage, box.tick] = noted((box.device, box.device), box.end)
            events.append((tick / 1024, "visit", box.stage, box.ops, known[box.stage, box.tick]))
    found = told(*events)
    zero = boxes[0].start
    for box, true in zip(found.boxes, boxes, strict=True):
        assert true.end - zero <= box.end <= known[box.stage, box.tick] - zero
        assert box.start <= box.end
    for lane in found.lanes.values():
        assert all(one.end <= other.start for one, other in pairwise(lane))
    for message, sender, reader in found.arrows():
        assert sender.end <= message.sent <= message.arrived <= reader.start
    flows = [event for event in chrome_trace([found])["traceEvents"] if event["ph"] in "sf"]
    assert len(flows) == 2 * len(messages)
    assert all(begin["ts"] <= end["ts"] for begin, end in zip(flows[::2], flows[1::2], strict=True))


def test_a_computation_that_fails_is_told():
    def wait(array):
        raise ValueError("no such array")

    recorder = Recorder(["a"], schedules.fdg(1), wait=wait)
    recorder.visit(0, (Op("F", 0),), 1)
    with pytest.raises(RuntimeError, match="not measured: no such array"):
        recorder.stop()


def test_what_is_there_already_wakes_no_thread():
    """And what is not waits in one, however many there are."""
    before, seen = threading.active_count(), []
    recorder = Recorder(["a"], schedules.fdg(1), clock=lambda: 7.0, wait=seen.append)
    recorder.begin(0)
    recorder.deliver({("inputs", 0, 0): jax.block_until_ready(jax.numpy.ones(3))})
    assert threading.active_count() == before
    recorder.visit(0, (Op("F", 0),), "late")
    recorder.visit(0, (Op("B", 0),), "later")
    assert threading.active_count() == before + 1
    assert [(message.sent, message.arrived) for message in recorder.stop().messages] == [(0, 0)]
    assert seen == ["late", "later"]


def train(pipe, recorder=None, first=3, num=6, last=12):
    """What the stages own in the end; the window is of the steps first .. first + num - 1."""
    state, batches = pipe.init(jax.random.key(0), tiny_batches(1)[0][0]), tiny_batches(last)
    for step, batch in enumerate(batches):
        if recorder and step in (first - 1, first + num):
            pipe.observe(recorder if step < first else None)
        if recorder and step == first:
            recorder.mark()
        state, _ = pipe.step(state, batch)
    return [host((own.params, own.state, own.opt_state, own.counts, own.totals)) for own in state.stages]


@pytest.fixture(scope="module", params=list(METHODS))
def recorded(request):
    pipe = make_pipeline(num_stages=2, method=METHODS[request.param])
    recorder = Recorder(pipe.devices, pipe.schedule)
    seen = train(pipe, recorder)
    return pipe, recorder.stop(), seen, train(pipe)


def test_the_trajectory_is_the_same(recorded):
    *_, seen, unseen = recorded
    assert_trees_close(seen, unseen, 0)


def test_every_visit_of_the_window_is_there_once_and_in_order(recorded):
    pipe, timeline, *_ = recorded
    period = pipe.ticks_per_batch
    ticks = range(3 * period, 9 * period)
    wanted = [
        (tick, k, visit)
        for tick in ticks
        for k, visit in enumerate(schedules.row(pipe.schedule, tick, 9 * pipe.method.micro_batches))
        if visit
    ]
    assert [(box.tick, box.stage, box.ops) for box in timeline.boxes] == wanted


def test_visits_of_a_device_do_not_overlap(recorded):
    _, timeline, *_ = recorded
    for device, boxes in timeline.lanes.items():
        free = timeline.since[device]
        for box in boxes:
            assert free <= box.start <= box.end
            free = box.end


def test_messages_arrive_after_they_are_sent_and_before_they_are_read(recorded):
    pipe, timeline, *_ = recorded
    assert all(message.sent <= message.arrived for message in timeline.messages)
    arrows = [arrow for arrow in timeline.arrows() if arrow[1]]  # not from the host
    kinds = Counter(message.op.kind for message, *_ in arrows)
    assert min(kinds.values()) >= 5
    assert set(kinds) == {"F", "S" if pipe.method.name == "dni" else "B"}
    for message, sender, reader in arrows:
        assert sender.stage == message.sender
        assert sender.tick < reader.tick
        assert sender.end <= message.sent <= message.arrived <= reader.start


def test_a_switch_of_schedules_is_recorded():
    """The pipeline is drained in step 4, and fills again with another schedule."""
    method = replace(methods.fdg(0.5), corrections=(corrections.SwitchToSynchronous(5),))
    pipe = make_pipeline(num_stages=2, method=method)
    recorder = Recorder(pipe.devices, pipe.schedule)
    train(pipe, recorder)
    updates = Counter(op.batch for box in recorder.stop().boxes for op in box.ops if op.kind == "U" and box.stage == 0)
    assert updates == dict.fromkeys(range(1, 9), 1)


def test_the_fused_engine_has_nothing_to_see():
    pipe = make_pipeline(num_stages=2, engine="fused")
    pipe.init(jax.random.key(0), tiny_batches(1)[0][0])
    with pytest.raises(ValueError, match="no visits to see; mpmd has them"):
        pipe.observe(Recorder(pipe.devices, pipe.schedule))
