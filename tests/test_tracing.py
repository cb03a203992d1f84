"""The window of a run: its files, its plan, what is said; bad settings."""

import dataclasses
import io
import json
import re
from types import SimpleNamespace

import jax
import pytest
from helpers import make_pipeline, tiny_batches
from jax.monitoring import record_event_duration_secs
from rich.console import Console
from test_trace import HAND_MADE, planned_timeline

from fdg_jax import methods
from fdg_jax import schedule as schedules
from fdg_jax.config import (
    ConfigError,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    Settings,
    TraceSettings,
    default_config,
    differences,
    resolve,
)
from fdg_jax.console import JsonLines
from fdg_jax.expected import divided_costs, follows, measured_costs, planned
from fdg_jax.flops import layer_flops
from fdg_jax.recorder import Recorder
from fdg_jax.schedule import Op
from fdg_jax.timeline import Box, Message, StageCost
from fdg_jax.trace import Shares, Timeline, shares
from fdg_jax.tracing import Tracing
from fdg_jax.train import train_and_evaluate

SMALL = Settings(
    seed=3,
    epochs=2,
    batch_size=256,  # 5 steps an epoch
    log_every_steps=2,
    model=ModelSettings(name="mlp", depth=2, width=16),
    data=DataSettings(source="digits"),
    method=MethodSettings(beta=0.5),
    optim=OptimSettings(learning_rate=0.05, schedule="constant"),
)


def train(workdir, **changes):
    text, lines = io.StringIO(), io.StringIO()
    settings = dataclasses.replace(SMALL, **changes)
    train_and_evaluate(settings, workdir, Console(file=text, width=250), JsonLines(lines))
    told = [line for line in map(json.loads, lines.getvalue().splitlines()) if line["event"] == "trace"]
    return text.getvalue(), told


def losses(workdir):
    return [json.loads(line)["train/loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def slices(workdir, pid):
    events = json.loads((workdir / "trace.json").read_text())["traceEvents"]
    return [e for e in events if e["ph"] == "X" and e["pid"] == pid and e["cat"] == "visit"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of one trajectory: traced and profiled, and not."""
    folder = tmp_path_factory.mktemp("runs")
    told, lines = train(folder / "traced", trace=TraceSettings(3, 4), profile=True)
    train(folder / "plain")
    return folder, told, lines


def test_a_traced_run_is_the_same_run(runs):
    assert losses(runs[0] / "traced") == losses(runs[0] / "plain")


def test_the_files_of_a_window(runs):
    workdir = runs[0] / "traced"
    assert (workdir / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    expected = [
        (schedules.row(schedules.fdg(2), tick)[k], tick, k) for tick in range(3, 7) for k in range(2)
    ]  # of fdg, a step is a tick
    for pid in (0, 1):
        found = [(e["name"], e["args"]["tick"], e["args"]["stage"]) for e in slices(workdir, pid)]
        assert found == [(" ".join(map(str, visit)), tick, k) for visit, tick, k in expected]
    assert not list((runs[0] / "plain").glob("trace*"))


def test_the_table_of_a_window(runs):
    folder, told, _ = runs
    assert re.search(r"traced the steps 3 to 6 without 3 pauses of \d+\.\d\d s in all; where", told)  # after 4, 5 and 6
    assert f"{folder / 'traced' / 'trace.png'}; " in told
    assert "whose making slowed the run" in told
    rows = re.findall(r"^(planned|measured) +(\d) +([\d,]+) +([\d. ]+)$", told, re.MULTILINE)
    assert [row[:3] for row in rows] == [(name, k, k) for name in ("planned", "measured") for k in "01"]
    for *_, figures in rows:
        assert sum(map(float, figures.split())) == pytest.approx(100, abs=0.2)


def test_machines_are_told_the_same(runs):
    folder, told, (line,) = runs
    assert (line["first_step"], line["steps"], line["asked_steps"]) == (3, 4, 4)
    assert line["files"] == [str(folder / "traced" / name) for name in ("trace.png", "trace.json")]
    assert line["pause_s"] > line["compilation_s"] == 0
    assert isinstance(line["compilation_s"], float)
    for name in ("planned", "measured"):
        for device, found in enumerate(line[name]):
            assert (found["device"], found["stages"]) == (device, [device])
            figures = [found[part] for part in Shares._fields]
            assert "  ".join(f"{each:9.1f}" for each in figures) in told
            assert sum(figures) == pytest.approx(100)


def test_a_window_that_the_run_ends_and_an_engine_without_visits(tmp_path):
    told, (line,) = train(tmp_path / "run", trace=TraceSettings(8, 50), engine="fused")
    assert (
        "the fused engine has no visits to see, so that the trace is the plan alone; --config.engine=mpmd measures it; "
        "--config.profile=true" in told
    )
    assert "traced the steps 8 to 9 (2 of the 50 asked for, since it stopped after step 9)" in told
    assert (line["steps"], line["asked_steps"]) == (2, 50)
    assert len(slices(tmp_path / "run", 0)) == 4
    assert not slices(tmp_path / "run", 1)
    assert "measured" not in told
    assert "measured" not in line


def test_a_window_beyond_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"first_step=10 is beyond the run, whose steps are 0 to 9; try --config"):
        train(tmp_path / "run", trace=TraceSettings(10, 1))
    assert not (tmp_path / "run").exists()


class FusedPipe:
    engine, devices, schedule, ticks_per_batch = "fused", ("a", "a"), schedules.fdg(2), 1


class Digits:
    image_shape = (8, 8, 1)


@pytest.fixture
def fused(monkeypatch, tmp_path):
    """The tracing of steps 2 to 4 of a run with the fused engine; its clock, what it guesses of, and what it tells."""
    now, found, text = [0.0], [], io.StringIO()

    def guessed(tracing, seconds, end):
        found.append((seconds, end))
        return HAND_MADE

    monkeypatch.setattr("fdg_jax.tracing.Recorder", lambda *run: Recorder(*run, clock=lambda: now[0]))
    monkeypatch.setattr(Tracing, "_guessed", guessed)
    monkeypatch.setattr(Tracing, "_write", lambda self, timelines: None)
    settings = dataclasses.replace(SMALL, trace=TraceSettings(2, 3))
    with Tracing(settings, FusedPipe(), Digits(), tmp_path, Console(file=text, width=250), step=0) as tracing:
        yield tracing, now, found, text


def test_the_time_of_a_fused_window_is_without_pauses(fused):
    """Of 3 steps of 1 s, after each of which the loop pauses: the last of these comes after the window."""
    tracing, now, found, text = fused
    for step in range(6):
        tracing.watch(None, step)
        now[0] += 1
        for _ in range(2):  # it logs, then it saves
            with tracing.paused(None):
                now[0] += 10
    assert found == [(3.0, 5)]
    assert "the steps 2 to 4 without 2 pauses of 40.00 s in all; where" in text.getvalue()


def test_the_time_of_a_fused_window_is_without_compilation(fused):
    """Of 3 steps of 1 s the first, before the window, and the third compile; so does a pause, which is cut as such."""
    tracing, now, found, text = fused
    for step in range(6):
        tracing.watch(None, step)
        if step % 2:
            for seconds in (4.0, 3.0):  # it traces, and half a second later it compiles
                now[0] += seconds
                record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
                now[0] += 0.5 if seconds == 4 else 0
        now[0] += 1
        if step == 3:
            with tracing.paused(None):
                now[0] += 10
                record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9.0)
        record_event_duration_secs("/jax/another_duration", 1.0)
    assert found == [(3.0, 5)]
    assert "the steps 2 to 4 without 1 pause of 10.00 s in all and 7.50 s of compilation; where" in text.getvalue()


def test_a_run_that_goes_on_within_the_window_says_so(monkeypatch, fused):
    tracing, now, found, text = fused
    for step in (4, 5):
        tracing.watch(None, step)
        now[0] += 1
    assert found == [(1.0, 5)]
    assert "traced step 4 (1 of the 3 asked for, since the run went on at step 4); where" in text.getvalue()


def test_an_earlier_trace_is_kept(tmp_path):
    text = io.StringIO()
    settings = dataclasses.replace(SMALL, trace=TraceSettings(2, 3))
    tracing = Tracing(settings, FusedPipe(), Digits(), tmp_path, Console(file=text, width=250), step=0)
    parts = [dataclasses.replace(HAND_MADE, name=name) for name in ("first", "second", "third")]
    for part in parts:
        tracing._write([part])
    for name, part in zip(("trace-2", "trace-3", "trace"), parts, strict=True):
        assert part.name in (tmp_path / f"{name}.json").read_text()
        assert (tmp_path / f"{name}.png").exists()
    told = [f"the earlier trace is kept as trace-{k}.png and trace-{k}.json" for k in (2, 3)]
    assert text.getvalue().splitlines()[-2:] == told


@pytest.mark.parametrize(
    ("schedule", "reuse", "why"),
    [(schedules.bp(2), 0, "switches within the window"), (schedules.fdg(2), 3, "repeats batches of a buffer")],
)
def test_a_window_without_a_plan_says_so(tmp_path, schedule, reuse, why):
    pipe, text = FusedPipe(), io.StringIO()
    pipe.schedule, pipe.method = schedule, SimpleNamespace(reuse=reuse)
    tracing = Tracing(SMALL, pipe, Digits(), tmp_path, Console(file=text, width=250), step=0)
    measured = planned_timeline(schedules.fdg(2), [StageCost(1, 2)] * 2, 3)
    assert tracing._beside_plan(measured, [0, 1]) == [measured]
    assert text.getvalue() == f"no timeline is planned beside the measured one, for the method {why}\n"


def test_what_compiles_after_a_run_is_heard_of_no_more(fused):
    tracing, *_ = fused
    tracing.watch(None, 2)
    heard = tracing._recorder.pauses.found
    record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
    assert len(heard) == 1
    tracing.__exit__(None, None, None)
    tracing._recorder.pauses.begin_turn()
    record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
    assert len(heard) == 1


def test_a_run_that_goes_on_after_the_window_says_so(tmp_path):
    text = io.StringIO()
    settings = dataclasses.replace(SMALL, trace=TraceSettings(2, 3))
    tracing = Tracing(settings, FusedPipe(), Digits(), tmp_path, Console(file=text, width=200), step=5)
    assert "goes on at step 5, after the window of config.trace: nothing is traced" in text.getvalue()
    assert tracing.marks() == []
    assert tracing.watch(None, 5) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trace.first_step": -1}, r"config.trace.first_step must be finite and at least 0; got -1"),
        ({"trace.num_steps": -5}, r"config.trace.num_steps must be finite and at least 0; got -5"),
        ({"trace.num_steps": 2.5}, r"config.trace.num_steps must be of type int; got 2.5"),
        ({"profile": True}, r"config.profile=true needs a window of steps; add --config.trace.num_steps=20"),
    ],
)
def test_wrong_settings(changes, words):
    config = default_config().to_dict()
    for key, value in changes.items():
        *above, last = key.split(".")
        (config[above[0]] if above else config)[last] = value
    with pytest.raises(ConfigError, match=words):
        resolve(config)


def test_a_run_may_go_on_with_another_window():
    saved = dataclasses.asdict(SMALL)
    assert differences(saved, dataclasses.replace(SMALL, trace=TraceSettings(1, 2), profile=True)) == []


def test_costs_are_found_again():
    """Of a plan with fill and drain, in which forwards, backwards and all together occur."""
    costs = [StageCost(1.0, 2.5, 0.5, activations=2.0), StageCost(3.0, 4.0, cotangents=1.0)]
    found = measured_costs(planned_timeline(schedules.pipedream(2), costs), 2)
    assert found[0].forward == pytest.approx(1)
    assert found[0].backward + found[0].update == pytest.approx(3)
    assert sum((found[1].forward, found[1].backward, found[1].update)) == pytest.approx(7)
    assert (found[0].activations, found[1].cotangents) == (2, 1)


def test_costs_are_medians_and_never_negative():
    def box(end, *kinds):
        return Box(0, 0, 0, tuple(Op(kind, 0) for kind in kinds), 0.0, end)

    (cost,) = measured_costs(Timeline("measured", (box(1, *"BUF"), box(3, *"BUF"), box(99, *"BUF"))), 1)
    assert cost.seconds((Op("B", 0), Op("U", 0), Op("F", 1))) == pytest.approx(3)
    (cost,) = measured_costs(Timeline("measured", (box(5, "F"), box(2, "F", "B"))), 1)
    assert cost.backward == 0


@pytest.mark.parametrize("maker", [schedules.fdg, schedules.bp, lambda k: schedules.gpipe(k, 3)])
@pytest.mark.parametrize("tick", [4, 60, 12_345])
def test_the_plan_of_a_window_is_the_runs(maker, tick):
    """Ticks and batches as the schedule has them, also late in a run, whose plan is that of an early window."""
    schedule = maker(3)
    costs = [StageCost(1.0, 2.0, activations=0.5, cotangents=0.5)] * 3
    k, visit = next((k, visit) for k, visit in enumerate(schedules.row(schedule, tick)) if visit)
    shifted = tuple(op._replace(batch=op.batch + 7) for op in visit)  # of a run that was drained after 7 batches
    found = planned(schedule, costs, [0, 1, 2], Box(k, k, tick, shifted, 0.0, 0.0), 20)
    wanted = [
        (number, k, tuple(op._replace(batch=op.batch + 7) for op in visit))
        for number in range(tick, tick + 20)
        for k, visit in enumerate(schedules.row(schedule, number))
        if visit
    ]
    assert [(box.tick, box.stage, box.ops) for box in found.boxes] == wanted
    assert follows(found, schedule)
    read = {(box.stage, op) for box in found.boxes for op in box.ops}
    assert found.messages
    assert {(message.reader, message.op) for message in found.messages} <= read
    assert min(box.start for box in found.boxes) == 0
    for parts in shares(found).values():
        assert sum(parts) == pytest.approx(100)


def test_another_schedule_is_noticed():
    boxes = planned_timeline(schedules.bp(2), [StageCost(1, 2)] * 2, 3)
    assert follows(boxes, schedules.bp(2))
    assert not follows(boxes, schedules.fdg(2))


def test_only_what_is_read_in_a_window_is_drawn():
    timeline = planned_timeline(schedules.fdg(2), [StageCost(1, 2)] * 2, 4)
    outside = Message(0, 1, Op("F", 9), 0.0, 1.0)
    assert list(dataclasses.replace(timeline, messages=(outside,)).arrows()) == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_time_of_a_fused_batch_is_divided_by_operations(remat):
    """Backward is twice the forward, but for the first layer, which makes no gradient of images; again with remat."""
    pipe = make_pipeline(num_stages=2, engine="fused", remat=remat)
    images, labels = tiny_batches(1)[0]
    pipe.init(jax.random.key(0), images)
    costs = divided_costs(pipe, images, labels, num_classes=3, seconds=6.0)
    forward = [cost.forward for cost in costs]
    first = layer_flops(pipe.layers, images)[0] / sum(layer_flops(pipe.layers, images)) * sum(forward)
    again = remat == "full"
    assert sum(cost.forward + cost.backward for cost in costs) == pytest.approx(6)
    assert costs[0].backward == pytest.approx((2 + again) * forward[0] - first)
    assert costs[1].backward == pytest.approx((2 + again) * forward[1])


def test_heads_are_counted():
    shares = []
    for method in (methods.fdg(), methods.dgl()):
        pipe = make_pipeline(num_stages=2, engine="fused", method=method)
        images, labels = tiny_batches(1)[0]
        pipe.init(jax.random.key(0), images)
        first, second = divided_costs(pipe, images, labels, num_classes=3, seconds=1.0)
        shares.append((first.forward + first.backward) / (second.forward + second.backward))
    assert shares[1] > shares[0]
