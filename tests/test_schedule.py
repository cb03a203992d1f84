from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax import methods
from fdg_jax import schedule as schedules
from fdg_jax.schedule import Op, Schedule, Slot

MAKERS = {
    "bp": schedules.bp,
    "fdg": schedules.fdg,
    "fdg_forward_first": lambda num_stages: schedules.fdg(num_stages, "forward_first"),
    "gpipe": lambda num_stages: schedules.gpipe(num_stages, 3),
    "one_f_one_b": lambda num_stages: schedules.one_f_one_b(num_stages, 4),
    "ddg": schedules.ddg,
    "pipedream": schedules.pipedream,
    "pipedream_2bw": lambda num_stages: schedules.pipedream_2bw(num_stages, num_stages + 1),
    "adl": lambda num_stages: schedules.adl(num_stages, 2),
    "adl_forward_first": lambda num_stages: schedules.adl(num_stages, 3, "forward_first"),
    "local": schedules.local,
}
every_schedule = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
GROUPED = {
    "gpipe": schedules.gpipe,
    "one_f_one_b": schedules.one_f_one_b,
    "pipedream_2bw": schedules.pipedream_2bw,
    "adl": schedules.adl,
}
every_number = pytest.mark.parametrize("num_stages", range(1, 9))


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
    """Pipelined backpropagation's too."""
    assert methods.pipelined_bp().schedule(3) == schedules.fdg(3, "forward_first")
    assert schedules.show(schedules.fdg(3, "forward_first"), 6).splitlines()[1:] == [
        " 0    F0",
        " 1    F1          F0",
        " 2    F2          F1          F0 B0 U",
        " 3    F3          F2 B0 U     F1 B1 U",
        " 4    F4 B0 U     F3 B1 U     F2 B2 U",
        " 5    F5 B1 U     F4 B2 U     F3 B3 U",
    ]


def test_picture_of_bp():
    assert schedules.show(schedules.bp(3), 7).splitlines()[1:] == [
        " 0    F0",
        " 1                F0",
        " 2                            F0 B0 U",
        " 3                B0 U",
        " 4    B0 U",
        " 5    F1",
        " 6                F1",
    ]


def test_picture_of_gpipe():
    assert schedules.show(schedules.gpipe(3, 2), 9).splitlines()[1:] == [
        " 0    F0",
        " 1    F1          F0",
        " 2                F1          F0",
        " 3                            F1 B0",
        " 4                B0          B1 U",
        " 5    B0          B1 U",
        " 6    B1 U",
        " 7    F2",
        " 8    F3          F2",
    ]


def test_picture_of_one_f_one_b():
    assert schedules.show(schedules.one_f_one_b(3, 4), 12).splitlines() == [
        "tick  stage 0     stage 1     stage 2",
        " 0    F0",
        " 1    F1          F0",
        " 2    F2          F1          F0 B0",
        " 3                B0",
        " 4    B0          F2          F1 B1",
        " 5    F3          B1",
        " 6    B1          F3          F2 B2",
        " 7                B2",
        " 8    B2                      F3 B3 U",
        " 9                B3 U",
        "10    B3 U",
        "11    F4",
    ]


def test_picture_of_ddg():
    """And of Features Replay, which differs in the weights that answer."""
    assert methods.features_replay().schedule(3) == schedules.ddg(3)
    assert schedules.show(schedules.ddg(3), 9).splitlines()[1:] == [
        " 0    F0",
        " 1                F0",
        " 2                            F0 B0 U",
        " 3    F1",
        " 4                F1",
        " 5                B0 U        F1 B1 U",
        " 6    F2",
        " 7                F2",
        " 8    B0 U        B1 U        F2 B2 U",
    ]


def test_picture_of_pipedream():
    assert schedules.show(schedules.pipedream(3), 8).splitlines()[1:] == [
        " 0    F0",
        " 1                F0",
        " 2    F1                      F0 B0 U",
        " 3                F1",
        " 4    F2          B0 U        F1 B1 U",
        " 5    B0 U        F2",
        " 6    F3          B1 U        F2 B2 U",
        " 7    B1 U        F3",
    ]


def test_picture_of_pipedream_2bw():
    assert schedules.show(schedules.pipedream_2bw(3, 3), 10).splitlines()[1:] == [
        " 0    F0",
        " 1                F0",
        " 2    F1                      F0 B0",
        " 3                F1",
        " 4    F2          B0          F1 B1",
        " 5    B0          F2",
        " 6    F3          B1          F2 B2 U",
        " 7    B1          F3",
        " 8    F4          B2 U        F3 B3",
        " 9    B2 U        F4",
    ]


def test_picture_of_adl():
    assert schedules.show(schedules.adl(3, 2), 7).splitlines()[1:] == [
        " 0    F0",
        " 1    F1          F0",
        " 2    F2          F1          F0 B0",
        " 3    F3          B0 F2       F1 B1 U",
        " 4    B0 F4       B1 U F3     F2 B2",
        " 5    B1 U F5     B2 F4       F3 B3 U",
        " 6    B2 F6       B3 U F5     F4 B4",
    ]


def test_picture_of_local_losses():
    assert schedules.show(schedules.local(3), 3).splitlines()[1:] == [
        " 0    F0 B0 U",
        " 1    F1 B1 U     F0 B0 U",
        " 2    F2 B2 U     F1 B1 U     F0 B0 U",
    ]


def test_an_incomplete_group_is_updated_in_its_usual_tick():
    """Three batches, an update every two: the last answers batch 2 alone, a tick after its backward."""
    assert schedules.show(schedules.adl(2, 2), 99, num_batches=3).splitlines()[1:] == [
        " 0    F0",
        " 1    F1          F0 B0",
        " 2    B0 F2       F1 B1 U",
        " 3    B1 U        F2 B2",
        " 4    B2          U",
        " 5    U",
    ]
    assert schedules.row(schedules.adl(2, 2), 5, 3)[0] == (Op("U", 2),)


@every_schedule
def test_the_tick_of_an_operation_is_its_row(make):
    schedule = make(3)
    for tick, row in enumerate(schedules.unroll(schedule, 5)):
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


@every_number
@pytest.mark.parametrize("group", range(1, 5))
def test_gpipe_and_one_f_one_b_are_exact(num_stages, group):
    """As long as each other, never stale, and memos M against min(M, K - k)."""
    gpipe, turns = schedules.gpipe(num_stages, group), schedules.one_f_one_b(num_stages, group)
    after = [num_stages - 1 - k for k in range(num_stages)]
    held = [min(group, n + 1) for n in after]
    assert schedules.stalenesses(gpipe) == schedules.stalenesses(turns) == ((0,) * group,) * num_stages
    assert schedules.delay(gpipe) == tuple(2 * n + group - 1 for n in after)
    assert schedules.delay(turns) == tuple(2 * n + m - 1 for n, m in zip(after, held, strict=True))
    assert schedules.depth(gpipe) == (group,) * num_stages
    assert schedules.depth(turns) == tuple(held)
    for schedule in (gpipe, turns):
        # No tick could be saved: the first stage is at work from the beginning of a group to its end.
        assert schedule.period == schedule.span == schedules.tick_of(schedule, 0, Op("U", group - 1)) + 1
    if num_stages > 1:
        assert gpipe.period == turns.period == 2 * (num_stages + group) - 3


@every_number
def test_delay_staleness_and_depth_of_ddg_and_pipedream(num_stages):
    """K-1-k batches, as many updates, K - k memos (algorithms.md 2, 7.2 and 12)."""
    late = tuple(num_stages - 1 - k for k in range(num_stages))
    for schedule in (schedules.ddg(num_stages), schedules.pipedream(num_stages)):
        assert tuple(ticks // schedule.period for ticks in schedules.delay(schedule)) == late
        assert schedules.staleness(schedule) == late
        assert schedules.depth(schedule) == tuple(n + 1 for n in late)
    assert schedules.delay(schedules.ddg(num_stages)) == tuple((num_stages + 1) * n for n in late)
    assert schedules.delay(schedules.pipedream(num_stages)) == tuple(2 * n + (n > 0) for n in late)


def operations(schedule: Schedule, k: int, num_batches: int) -> list[Op]:
    return [op for stages in schedules.unroll(schedule, num_batches) for op in stages[k]]


@every_number
def test_ddg_does_in_order_what_pipedream_does(num_stages):
    for k in range(num_stages):
        both = [operations(make(num_stages), k, 20) for make in (schedules.ddg, schedules.pipedream)]
        assert both[0] == both[1]


@every_number
def test_ddg_is_forward_locked(num_stages):
    """No batch enters before the one ahead of it has passed all stages, and then all stages answer at once."""
    schedule = schedules.ddg(num_stages)
    for tick in range(num_stages * num_stages, num_stages * (num_stages + 3)):
        row = schedules.row(schedule, tick)
        forwards = [op.batch for visit in row for op in visit if op.kind == "F"]
        assert forwards == [tick // num_stages]
        backwards = sum(op.kind == "B" for visit in row for op in visit)
        assert backwards == (num_stages if tick % num_stages == num_stages - 1 else 0)


@every_number
@pytest.mark.parametrize("more", range(3))
def test_2bw_is_one_update_late_everywhere(num_stages, more):
    """Forwards use the version that the group before the last made; by the backward there is one more."""
    group = num_stages + more
    schedule = schedules.pipedream_2bw(num_stages, group)
    assert schedules.stalenesses(schedule) == ((1,) * group,) * num_stages
    assert schedules.depth(schedule) == tuple(num_stages - k for k in range(num_stages))
    assert schedules.delay(schedule) == tuple(2 * n + (n > 0) for n in reversed(range(num_stages)))
    for k in range(num_stages):
        updates = 0
        for op in operations(schedule, k, 5 * group):
            version = max(0, op.batch // group - 1)
            if op.kind == "F":
                assert version <= updates <= version + 1, "two buffers hold it"
            if op.kind == "B" and op.batch >= group:
                assert updates - version == 1
            updates += op.kind == "U"


@every_number
@pytest.mark.parametrize("group", range(1, 5))
def test_staleness_of_adl(num_stages, group):
    """D_k ticks of one batch each hold D_k / M updates, rounded up or down; update_first sees one tick fewer."""
    delays = [2 * (num_stages - 1 - k) for k in range(num_stages)]
    for order, ticks in (("forward_first", delays), ("update_first", [max(0, d - 1) for d in delays])):
        schedule = schedules.adl(num_stages, group, order)
        assert schedules.delay(schedule) == tuple(delays)
        for late, d in zip(schedules.stalenesses(schedule), ticks, strict=True):
            assert sum(late) == d, "M batches meet each of the D_k updates of M D_k ticks once"
            assert {d // group, -(-d // group)} >= set(late)
        assert schedules.staleness(schedule) == tuple(-(-d // group) for d in ticks)
        assert schedules.depth(schedule) == schedules.depth(schedules.fdg(num_stages, order))


def test_published_staleness_of_adl():
    """The table of the paper for K = 3 (algorithms.md 4) counts what forward_first does."""
    late = {group: schedules.stalenesses(schedules.adl(3, group, "forward_first")) for group in (2, 4)}
    assert late[2] == ((2, 2), (1, 1), (0, 0))
    assert late[4] == ((1, 1, 1, 1), (1, 1, 0, 0), (0, 0, 0, 0))
    late = {group: schedules.stalenesses(schedules.adl(3, group)) for group in (2, 4)}
    assert late[2] == ((2, 1), (1, 0), (0, 0))
    assert late[4] == ((1, 1, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0))


@every_number
def test_groups_of_one_are_the_schedules_without_groups(num_stages):
    for order in schedules.ORDERS:
        one, plain = schedules.adl(num_stages, 1, order), schedules.fdg(num_stages, order)
        assert replace(one, name="fdg") == plain
    for make in (schedules.gpipe, schedules.one_f_one_b):
        assert replace(make(num_stages, 1), name="bp") == schedules.bp(num_stages)


@every_schedule
def test_one_stage_does_what_bp_does(make):
    schedule = make(1)
    forwards, backwards = ([op for op in operations(schedule, 0, 12) if op.kind == kind] for kind in "FB")
    assert [op.batch for op in forwards] == [op.batch for op in backwards] == list(range(12))
    assert schedules.staleness(schedule) == ((1,) if schedule.double_buffered else (0,))


@every_number
def test_local_losses_are_never_late(num_stages):
    schedule = schedules.local(num_stages)
    assert schedules.delay(schedule) == schedules.staleness(schedule) == (0,) * num_stages
    assert schedules.depth(schedule) == (1,) * num_stages
    if num_stages > 1:
        with pytest.raises(ValueError, match="stage 0 runs B0 in tick 0, before stage 1's B0 can be read"):
            schedules.validate(replace(schedule, local=False))


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_bp_is_never_stale(num_stages):
    schedule = schedules.bp(num_stages)
    assert schedules.staleness(schedule) == (0,) * num_stages
    assert schedules.depth(schedule) == (1,) * num_stages


def moved(schedule: Schedule, k: int, n: int, offset: int) -> Schedule:
    stages = [list(slots) for slots in schedule.stages]
    stages[k][n] = stages[k][n]._replace(offset=offset)
    return replace(schedule, stages=tuple(map(tuple, stages)))


def earliest(schedule: Schedule, k: int, slot: Slot) -> int | None:
    """The first tick in which a slot finds what it reads; None for the first stage's forward, which reads the batch."""
    offset = {(j, s.kind, s.micro): s.offset for j, slots in enumerate(schedule.stages) for s in slots}
    if slot.kind == "F":
        return offset[k - 1, "F", slot.micro] + 1 if k else None
    if slot.kind == "U":
        return max(offset[k, "B", m] for m in range(schedule.group))
    above = offset.get((k + 1, "B", slot.micro), -1) if not schedule.local else -1
    return max(offset[k, "F", slot.micro], above + 1)


@every_schedule
@pytest.mark.parametrize("num_stages", [1, 2, 3, 8])
def test_an_operation_a_tick_too_early_is_refused(make, num_stages):
    """Every operation that reads something; the error names stage, operation and tick."""
    schedule = make(num_stages)
    for k, slots in enumerate(schedule.stages):
        for n, slot in enumerate(slots):
            tick = earliest(schedule, k, slot)
            if tick is None:
                continue
            # The first group's operation, or the second's where the tick before would be the one before the first.
            group, at = (0, tick - 1) if tick else (1, schedule.period - 1)
            op = f"{slot.kind}{group * schedule.group + slot.micro}"
            with pytest.raises(ValueError, match=rf"stage {k} runs {op} in tick {at}, before stage"):
                schedules.validate(moved(schedule, k, n, tick - 1))


@every_schedule
def test_an_operation_left_out_is_refused(make):
    schedule = make(3)
    for k, slots in enumerate(schedule.stages):
        for n in range(len(slots)):
            stages = (*schedule.stages[:k], slots[:n] + slots[n + 1 :], *schedule.stages[k + 1 :])
            with pytest.raises(ValueError, match=f"stage {k} never runs {slots[n].kind}{slots[n].micro}"):
                schedules.validate(replace(schedule, stages=stages))


def test_an_update_that_comes_too_late_is_refused():
    """It would apply gradients of the group after it."""
    schedule = schedules.gpipe(2, 2)
    with pytest.raises(ValueError, match="stage 1 runs B2 in tick 7, before stage 1's U1 can be read"):
        schedules.validate(moved(schedule, 1, 4, 7))


def test_an_update_before_any_backward_of_its_group_is_refused():
    with pytest.raises(ValueError, match="stage 0 runs U2 in tick 6, before stage 0's B0 can be read"):
        schedules.validate(moved(schedules.gpipe(2, 3), 0, 3, 7))


def test_two_versions_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="a group of at least num_stages=4 micro-batches; got 3"):
        schedules.pipedream_2bw(4, 3)
    late = replace(schedules.adl(4, 2), double_buffered=True)  # batch 4 enters in tick 4; batch 0 is answered in tick 6
    with pytest.raises(ValueError, match="stage 0 runs F4 in tick 4, before stage 0's U1 can be read"):
        schedules.validate(late)


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
    """An update bears the last number of its group, which may be incomplete at the end."""
    schedule = MAKERS[name](num_stages)
    rows = list(schedules.unroll(schedule, num_batches))
    assert len(rows) == schedules.num_ticks(schedule, num_batches)
    last_numbers = [min(first + schedule.group, num_batches) - 1 for first in range(0, num_batches, schedule.group)]
    for k in range(num_stages):
        ops = [op for stages in rows for op in stages[k]]
        for kind in "FB":
            assert [op.batch for op in ops if op.kind == kind] == list(range(num_batches))
        assert [op.batch for op in ops if op.kind == "U"] == last_numbers
        for n, op in enumerate(ops):
            assert op.kind != "U" or ops.index(Op("B", op.batch)) < n
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
    """An engine that is fed batch after batch sees what one that knows them all would.

    Batch i enters in the tick of its first forward. Until the next one enters, no operation knows of it but an update
    by its number: where the group is incomplete it names the last batch there is.
    """
    schedule = MAKERS[name](num_stages)
    enters = [schedules.tick_of(schedule, 0, Op("F", batch)) for batch in range(num_batches + 1)]
    for fed, (start, stop) in enumerate(pairwise(enters), start=1):
        for tick in range(start, stop):
            assert schedules.row(schedule, tick, fed) == schedules.row(schedule, tick, num_batches)
            assert schedules.row(schedule, tick, fed) == schedules.row(schedule, tick)


def test_the_steady_state_repeats():
    schedule = schedules.fdg(4)
    for one, next_one in pairwise(schedules.row(schedule, tick) for tick in range(10, 14)):
        shifted = tuple(tuple(Op(op.kind, op.batch + 1) for op in visit) for visit in one)
        assert shifted == next_one


@every_schedule
def test_no_stages_are_refused(make):
    with pytest.raises(ValueError, match="at least one stage; got num_stages=0"):
        make(0)


@pytest.mark.parametrize("make", GROUPED.values(), ids=GROUPED)
def test_empty_groups_are_refused(make):
    with pytest.raises(ValueError, match="at least one batch; got group=0"):
        make(2, 0)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="unknown order 'update_frist'; did you mean 'update_first'"):
        schedules.fdg(2, "update_frist")
