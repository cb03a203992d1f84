"""Closed forms, bounds and properties of planned times. Costs are sixteenths of a second, so that sums are exact."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import schedule as schedules
from fdg_jax.schedule import Op
from fdg_jax.timeline import FREE, Link, StageCost, peak_in_flight, plan, steady

MAKERS = {
    "bp": schedules.bp,
    "fdg": schedules.fdg,
    "fdg_forward_first": lambda num_stages: schedules.fdg(num_stages, "forward_first"),
    "gpipe": lambda num_stages: schedules.gpipe(num_stages, 3),
    "one_f_one_b": lambda num_stages: schedules.one_f_one_b(num_stages, 4),
    "ddg": schedules.ddg,
    "pipedream": schedules.pipedream,
    "pipedream_2bw": lambda num_stages: schedules.pipedream_2bw(num_stages, num_stages),
    "adl": lambda num_stages: schedules.adl(num_stages, 2),
    "local": schedules.local,
}
sixteenths = st.integers(1, 32).map(lambda n: n / 16)
stage_costs = st.lists(
    st.builds(StageCost, sixteenths, sixteenths, st.integers(0, 4).map(lambda n: n / 16)), max_size=5
)
stage_costs = stage_costs.filter(bool)
any_schedule = st.sampled_from(list(MAKERS))


def seconds(cost: StageCost) -> float:
    return cost.forward + cost.backward + cost.update


def equal(num_stages: int, **more: float) -> list[StageCost]:
    return [StageCost(1.0, 2.0, **more)] * num_stages


def test_boxes_of_fdg():
    """Two stages of 1 + 2 s, and a second from one to the other: each waits for the other's message."""
    boxes = list(plan(schedules.fdg(2), equal(2), 2, Link(latency=1.0)))
    assert [(box.stage, box.tick, " ".join(map(str, box.ops)), box.start, box.end) for box in boxes] == [
        (0, 0, "F0", 0.0, 1.0),
        (0, 1, "F1", 1.0, 2.0),
        (1, 1, "F0 B0 U", 2.0, 5.0),
        (0, 2, "B0 U", 6.0, 8.0),
        (1, 2, "F1 B1 U", 5.0, 8.0),
        (0, 3, "B1 U", 9.0, 11.0),
    ]


def test_messages_on_a_link_wait_for_one_another():
    """Forwards of 1 s send 4 bytes over 1 byte a second and 10 s: they arrive at 1 + 4 + 10, then every 4 s."""
    costs = [StageCost(1.0, 0.0, activations=4.0), StageCost(0.0, 0.0)]
    boxes = [box for box in plan(schedules.gpipe(2, 3), costs, 3, Link(10.0, 1.0)) if box.stage == 1]
    assert [box.start for box in boxes if box.ops[0].kind == "F"] == [15.0, 19.0, 23.0]


def test_stages_on_one_device_take_turns_and_send_nothing():
    costs, slow = equal(4, activations=1.0, cotangents=1.0), Link(100.0, 0.01)
    shared = steady(schedules.fdg(4), costs, slow, devices=(0, 0, 0, 0))
    assert (shared.batch_seconds, shared.busy, shared.speed_up) == (12.0, (1.0,), 1.0)
    two = steady(schedules.fdg(4), costs, FREE, devices=(0, 0, 1, 1))
    assert (two.batch_seconds, two.busy) == (6.0, (1.0, 1.0))


@given(stage_costs)
def test_fdg_is_as_fast_as_its_slowest_stage(costs):
    result = steady(schedules.fdg(len(costs)), costs)
    slowest = max(map(seconds, costs))
    assert result.batch_seconds == pytest.approx(slowest)
    assert result.busy == pytest.approx([seconds(cost) / slowest for cost in costs])


@given(stage_costs, st.integers(0, 64).map(lambda n: n / 16))
def test_fdg_over_a_link(costs, latency):
    """There and back between neighbours takes both their visits and two hops, for two batches."""
    hop = latency + 0.5
    costs = [replace(cost, activations=2.0, cotangents=2.0) for cost in costs]
    result = steady(schedules.fdg(len(costs)), costs, Link(latency, bandwidth=4.0))
    pairs = [(seconds(a) + seconds(b) + 2 * hop) / 2 for a, b in pairwise(costs)]
    assert result.batch_seconds == pytest.approx(max([seconds(cost) for cost in costs] + pairs))


@given(stage_costs, sixteenths)
def test_bp_is_the_sum(costs, latency):
    result = steady(schedules.bp(len(costs)), costs, Link(latency))
    messages = 2 * (len(costs) - 1) * latency
    assert result.batch_seconds == pytest.approx(sum(map(seconds, costs)) + messages)
    assert result.in_flight == 1
    assert steady(schedules.bp(len(costs)), costs).speed_up == pytest.approx(1)


@pytest.mark.parametrize("make", [schedules.gpipe, schedules.one_f_one_b])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_the_bubble_of_synchronous_pipelines(make, num_stages, group):
    """(M + K - 1) / M of the time without a bubble."""
    result = steady(make(num_stages, group), equal(num_stages))
    assert result.batch_seconds == pytest.approx(3.0 * (group + num_stages - 1) / group)
    assert result.speed_up == pytest.approx(num_stages * group / (group + num_stages - 1))
    assert result.idle == pytest.approx([(num_stages - 1) / (group + num_stages - 1)] * num_stages)
    assert result.in_flight == (group if make is schedules.gpipe else min(group, num_stages))


@pytest.mark.parametrize("name", ["fdg", "ddg", "pipedream", "pipedream_2bw", "adl", "local"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_methods_that_never_drain_keep_equal_stages_busy(name, num_stages):
    result = steady(MAKERS[name](num_stages), equal(num_stages))
    assert result.busy == pytest.approx([1.0] * num_stages)
    assert result.speed_up == pytest.approx(num_stages)


@given(stage_costs)
def test_a_barrier_makes_the_forward_lock_of_ddg_real(costs):
    """All forwards one after the other, then all backwards at once; FDG does not mind a barrier."""
    locked = steady(schedules.ddg(len(costs)), costs, barrier=True)
    backwards = [cost.backward + cost.update for cost in costs]
    last = costs[-1].forward + backwards[-1]
    assert locked.batch_seconds == pytest.approx(sum(cost.forward for cost in costs[:-1]) + max([last, *backwards]))
    fdg = [steady(schedules.fdg(len(costs)), costs, barrier=barrier).batch_seconds for barrier in (False, True)]
    assert fdg[0] == pytest.approx(fdg[1])


def test_what_is_in_flight():
    """FDG answers batch i when batch i + 2(K-1) has begun; 1F1B holds K, whose oldest it answers before the next."""
    assert steady(schedules.fdg(4), equal(4)).in_flight == 7
    assert steady(schedules.pipedream(4), equal(4)).in_flight == 4


def test_the_host_bounds_how_far_a_fast_first_stage_runs_ahead():
    """Local losses hold back nobody: the first stage would leave the last ever further behind."""
    costs = [StageCost(1.0, 0.0), StageCost(10.0, 0.0)]
    result = steady(schedules.local(2), costs, run_ahead=4)
    assert result.batch_seconds == pytest.approx(10.0)
    assert result.in_flight == 4 + 2
    assert steady(schedules.local(2), costs, run_ahead=2).in_flight == 2 + 2


@settings(max_examples=60)
@given(any_schedule, stage_costs, sixteenths, st.data())
def test_bounds_of_any_schedule(name, costs, latency, data):
    """No device does more than there is time for, nothing beats its own work, a link only costs."""
    num_stages, schedule = len(costs), MAKERS[name](len(costs))
    last = data.draw(st.integers(0, num_stages - 1))
    devices = [min(k, last) for k in range(num_stages)]
    results = [steady(schedule, costs, Link(wait), devices) for wait in (0.0, latency, 4 * latency)]
    for faster, slower in pairwise(results):
        assert faster.batch_seconds <= slower.batch_seconds + 1e-9
    group_seconds = results[0].batch_seconds * schedule.group
    loads = [0.0] * (last + 1)
    for cost, device in zip(costs, devices, strict=True):
        loads[device] += schedule.group * (cost.forward + cost.backward) + cost.update
    assert group_seconds >= max(loads) - 1e-9
    assert 1 - 1e-9 <= results[0].speed_up <= last + 1 + 1e-9
    for result in results:
        assert all(0 <= share <= 1 for share in (*result.busy, *result.idle))
        assert result.busy == pytest.approx([load / result.batch_seconds / schedule.group for load in loads])
    if name in ("bp", "gpipe", "one_f_one_b"):
        there_and_back = sum(cost.forward + cost.backward for cost in costs) + costs[0].update
        assert group_seconds >= there_and_back - 1e-9, "a batch comes back before the next one enters"


@given(any_schedule, stage_costs, st.integers(0, 9))
def test_every_visit_is_planned_once_and_waits_for_what_it_reads(name, costs, num_batches):
    schedule, link = MAKERS[name](len(costs)), Link(0.25)
    boxes = list(plan(schedule, costs, num_batches, link))
    rows = schedules.unroll(schedule, num_batches)
    planned = [(tick, k, visit) for tick, row in enumerate(rows) for k, visit in enumerate(row) if visit]
    assert [(box.tick, box.stage, box.ops) for box in boxes] == planned
    at = {(box.stage, op): box for box in boxes for op in box.ops}
    for (k, op), box in at.items():
        assert box.end - box.start == sum(
            {"F": costs[k].forward, "B": costs[k].backward, "U": costs[k].update}[op.kind] for op in box.ops
        )
        source = {"F": k - 1, "B": k + 1, "U": -1}[op.kind]
        if 0 <= source < len(costs) and not (op.kind == "B" and schedule.local):
            assert box.start >= at[source, op].end + link.latency
    for k in range(len(costs)):
        assert all(a.end <= b.start for a, b in pairwise(box for box in boxes if box.stage == k))
    assert peak_in_flight(boxes) <= num_batches


def test_work_that_takes_no_time_takes_no_time():
    result = steady(schedules.fdg(2), [StageCost(0.0, 0.0)] * 2)
    assert (result.batch_seconds, result.busy, result.speed_up) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StageCost(-1.0, 0.0), "forward must be a finite number that is not negative; got -1.0"),
        (lambda: StageCost(0.0, math.nan), "backward must be a finite number that is not negative; got nan"),
        (lambda: Link(latency=-1.0), "latency must be a finite number that is not negative; got -1.0"),
        (lambda: Link(bandwidth=0.0), "bandwidth must be positive; got 0.0"),
        (lambda: plan(schedules.fdg(2), equal(3)), "costs must be one for each of the 2 stages; got 3"),
        (lambda: plan(schedules.fdg(2), equal(2), devices=[0]), "devices must be one for each of the 2 stages; got 1"),
        (lambda: plan(schedules.fdg(2), equal(2), devices=[0, 2]), r"numbered 0, 1, ... without a gap; got \(0, 2\)"),
        (lambda: plan(schedules.fdg(2), equal(2), run_ahead=0), "at least one loss; got run_ahead=0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_update_alone_is_a_visit():
    """The update of an incomplete group comes in a tick of its own."""
    boxes = list(plan(schedules.adl(1, 2), [StageCost(1.0, 1.0, 0.5)], 1))
    assert [(box.ops, box.start, box.end) for box in boxes][1] == ((Op("U", 0),), 2.0, 2.5)
