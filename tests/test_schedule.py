from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax import schedule as schedules
from fdg_jax.schedule import Op, Schedule, Slot

MAKERS = {
    "bp": schedules.bp,
    "fdg": schedules.fdg,
    "fdg_forward_first": lambda num_stages: schedules.fdg(num_stages, "forward_first"),
}
every_schedule = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_picture_of_fdg():
    assert schedules.show(schedules.fdg(3), 5).splitlines() == [
        "tick  stage 0     stage 1     stage 2",
        " 0    F0",
        " 1    F1          F0",
        " 2    F2          F1          F0 B0 U",
        " 3    F3          B0 U F2     F1 B1 U",
        " 4    B0 U F4     B1 U F3     F2 B2 U",
    ]


def test_picture_of_draining():
    """Three batches and no more: the last stage ends first, stage 0 last, and nothing is dropped."""
    assert schedules.show(schedules.fdg(3), 99, num_batches=3).splitlines()[1:] == [
        " 0    F0",
        " 1    F1          F0",
        " 2    F2          F1          F0 B0 U",
        " 3                B0 U F2     F1 B1 U",
        " 4    B0 U        B1 U        F2 B2 U",
        " 5    B1 U        B2 U",
        " 6    B2 U",
    ]


def test_picture_of_forward_first():
    assert schedules.show(schedules.fdg(2, "forward_first"), 4).splitlines()[1:] == [
        " 0    F0",
        " 1    F1          F0 B0 U",
        " 2    F2 B0 U     F1 B1 U",
        " 3    F3 B1 U     F2 B2 U",
    ]


def test_picture_of_bp():
    assert schedules.show(schedules.bp(2), 6).splitlines()[1:] == [
        " 0    F0",
        " 1                F0 B0 U",
        " 2    B0 U",
        " 3    F1",
        " 4                F1 B1 U",
        " 5    B1 U",
    ]


@every_schedule
def test_the_tick_of_an_operation_is_its_row(make):
    schedule = make(3)
    for tick, row in enumerate(schedules.unroll(schedule, 4)):
        for k, visit in enumerate(row):
            assert all(schedules.tick_of(schedule, k, op) == tick for op in visit)


@every_schedule
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_schedules_are_valid(make, num_stages):
    schedules.validate(make(num_stages))


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_delay_staleness_and_depth_of_fdg(num_stages):
    """D_k = 2(K-1-k); tau_k = max(0, D_k - 1), and D_k where the forward comes first (algorithms.md 1.2 and 12)."""
    delays = [2 * (num_stages - 1 - k) for k in range(num_stages)]
    first, second = schedules.fdg(num_stages), schedules.fdg(num_stages, "forward_first")
    assert schedules.delay(first) == schedules.delay(second) == tuple(delays)
    assert schedules.staleness(first) == tuple(max(0, d - 1) for d in delays)
    assert schedules.staleness(second) == tuple(delays)
    assert schedules.depth(first) == tuple(max(1, d) for d in delays)
    assert schedules.depth(second) == tuple(d + 1 for d in delays)


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_bp_is_never_stale(num_stages):
    schedule = schedules.bp(num_stages)
    assert schedules.staleness(schedule) == (0,) * num_stages
    assert schedules.depth(schedule) == (1,) * num_stages


def moved_earlier(schedule: Schedule, k: int, n: int) -> Schedule:
    stages = [list(slots) for slots in schedule.stages]
    kind, offset = stages[k][n]
    stages[k][n] = Slot(kind, offset - 1)
    return replace(schedule, stages=tuple(map(tuple, stages)))


@every_schedule
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_an_operation_a_tick_too_early_is_refused(make, num_stages):
    """Every operation that reads something; the error names stage, operation and tick."""
    schedule = make(num_stages)
    for k, slots in enumerate(schedule.stages):
        for n, (kind, offset) in enumerate(slots):
            if kind == "F" and k == 0:
                continue  # it reads the batch, which is there
            # Batch 0's operation, or batch 1's where the tick before would be the one before the first.
            batch, tick = (0, offset - 1) if offset else (1, schedule.period - 1)
            with pytest.raises(ValueError, match=rf"stage {k} runs {kind}{batch} in tick {tick}, before stage"):
                schedules.validate(moved_earlier(schedule, k, n))


def test_an_operation_twice_or_never_is_refused():
    schedule = schedules.fdg(2)
    twice = replace(schedule, stages=(schedule.stages[0] + (Slot("F", 3),), schedule.stages[1]))
    with pytest.raises(ValueError, match=r"stage 0 runs F0 in tick 3, and did so before in tick 0"):
        schedules.validate(twice)
    never = replace(schedule, stages=(schedule.stages[0][:1] + schedule.stages[0][2:], schedule.stages[1]))
    with pytest.raises(ValueError, match="stage 0 never runs U0"):
        schedules.validate(never)


def test_an_update_before_its_backward_is_refused():
    backward, update, forward = schedules.fdg(2).stages[0]
    swapped = replace(schedules.fdg(2), stages=((update, backward, forward), schedules.fdg(2).stages[1]))
    with pytest.raises(ValueError, match="stage 0 runs U0 in tick 2, before stage 0's B0"):
        schedules.validate(swapped)


@given(st.sampled_from(list(MAKERS)), st.integers(1, 6), st.integers(0, 12))
def test_every_batch_is_answered_once_in_order_by_every_stage(name, num_stages, num_batches):
    schedule = MAKERS[name](num_stages)
    rows = list(schedules.unroll(schedule, num_batches))
    assert len(rows) == schedules.num_ticks(schedule, num_batches)
    for k in range(num_stages):
        ops = [op for stages in rows for op in stages[k]]
        for kind in schedules.KINDS:
            assert [op.batch for op in ops if op.kind == kind] == list(range(num_batches))
    if rows:
        assert any(rows[-1]), "the last row is not empty"


@given(st.integers(1, 6), st.integers(0, 30))
def test_updates_after_some_ticks(num_stages, ticks):
    """algorithms.md 1.2(4): T - 2(K-1) + k updates. The last stage steps in the visit of its backward, T - (K-1) of
    them; the released code applies the same gradient at the beginning of the next tick, and so counts T - K."""
    rows = [schedules.row(schedules.fdg(num_stages), tick) for tick in range(ticks)]
    last = num_stages - 1
    for k in range(num_stages):
        updates = sum(op.kind == "U" for stages in rows for op in stages[k])
        assert updates == max(0, ticks - 2 * last + k if k < last else ticks - last)


@given(st.sampled_from(list(MAKERS)), st.integers(1, 5), st.integers(1, 8))
def test_rows_do_not_depend_on_how_many_batches_follow(name, num_stages, num_batches):
    """An engine that is fed batch after batch sees what one that knows them all would."""
    schedule = MAKERS[name](num_stages)
    for tick in range(num_batches * schedule.period):
        fed = tick // schedule.period + 1
        assert schedules.row(schedule, tick, fed) == schedules.row(schedule, tick, num_batches)


def test_the_steady_state_repeats():
    schedule = schedules.fdg(4)
    for one, next_one in pairwise(schedules.row(schedule, tick) for tick in range(10, 14)):
        shifted = tuple(tuple(Op(op.kind, op.batch + 1) for op in visit) for visit in one)
        assert shifted == next_one


@pytest.mark.parametrize("make", [schedules.bp, schedules.fdg])
def test_no_stages_are_refused(make):
    with pytest.raises(ValueError, match="at least one stage; got num_stages=0"):
        make(0)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="unknown order 'update_frist'; did you mean 'update_first'"):
        schedules.fdg(2, "update_frist")
