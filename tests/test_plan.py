"""The plan of a run against the pipeline that it plans, work counted by hand, and remedies that are tried out."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from flax import nnx
from PIL import Image

from benchmarks.predicted import forward_flops
from fdg_jax import estimates, models, plan
from fdg_jax.alternatives import sweep
from fdg_jax.backward import resolve_remat
from fdg_jax.build import build, example_images
from fdg_jax.config import (
    ConfigError,
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    default_config,
    make_method,
    resolve,
)
from fdg_jax.flops import count_flops, layer_flops
from fdg_jax.layers import Conv, Linear, relu
from fdg_jax.methods import PRESETS
from fdg_jax.partition import even_cuts
from fdg_jax.plan_files import check_writable, window
from fdg_jax.plan_text import advise, compare, describe, stage_rows
from fdg_jax.planning import Pace, Planner
from fdg_jax.remedies import CHANGES, Remedies, Remedy
from fdg_jax.schedule import delay
from fdg_jax.stage import as_layers
from fdg_jax.trace import shares

MLP = Settings(
    num_stages=3,
    batch_size=16,
    model=ModelSettings("mlp", depth=3, width=8),
    data=DataSettings(crop_padding=0, flip=False),
    method=MethodSettings("fdg", beta=0.5),
)
LARGE = replace(MLP, batch_size=256, model=ModelSettings("mlp", depth=9, width=64))  # memos outweigh weights
DEEP = replace(MLP, model=ModelSettings("resnet_cifar", depth=14, width=4), cuts=(3, 5), batch_size=4)
SPEED = 1e9
SHAPE = jax.ShapeDtypeStruct


@pytest.fixture(scope="module")
def planner():
    return Planner(MLP, Pace(SPEED))


def ready(settings):
    """The pipeline as a run makes it, with its arrays."""
    pipe, source = build(settings)
    return pipe, pipe.init(jax.random.key(0), example_images(settings, source))


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (DEEP, {}),
        (DEEP, {"remat": "full,convs,none"}),
        (MLP, {"method": MethodSettings("dni", width=4)}),
        (MLP, {"method": MethodSettings("fdg", policy="recompute")}),
        (MLP, {"method": MethodSettings("pipedream"), "optim": replace(Settings().optim, name="adamw")}),
    ],
    ids=["stash", "remat", "dni", "recompute", "pipedream"],
)
def test_the_plan_is_what_the_pipeline_says(planner, base, changes):
    """Of a network with equal blocks too, which are stacked."""
    settings = replace(base, **changes)
    found, (pipe, state) = (Planner(DEEP) if base is DEEP else planner).plan(settings), ready(settings)
    assert any(stage.runs for stage in pipe._started().plan.stages) or base is MLP
    assert found.cuts == pipe.cuts
    assert [stage.forecast for stage in found.stages] == list(pipe.forecasts)
    assert [stage.delay for stage in found.stages] == list(delay(pipe.schedule))
    assert [stage.staleness for stage in found.stages] == list(pipe.method.staleness(pipe.schedule))
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in pipe.params(state)]
    bounds = pairwise((0, *pipe.cuts, len(pipe.layers)))
    own = [sum(counts[i:j]) + extra for (i, j), extra in zip(bounds, pipe.extra_params, strict=True)]
    assert [stage.num_params for stage in found.stages] == own


def test_memos_of_micro_batches_on_the_last_stage_count_too(planner):
    """Which `init` cannot know, before there are targets."""
    settings = replace(MLP, method=MethodSettings("gpipe", micro_batches=4))
    found, (pipe, _) = planner.plan(settings), ready(settings)
    assert [stage.forecast for stage in found.stages[:-1]] == list(pipe.forecasts[:-1])
    last = found.stages[-1].forecast
    assert last.num_memos == 3
    assert last.memos >= 3 * 4 * 8 * 4  # three memos of four examples' inputs at least, 8 float32 each


def test_nothing_of_the_network_is_made():
    """36 million parameters, and not one array."""
    settings = replace(MLP, model=ModelSettings("wrn", depth=28, width=10), num_stages=4)
    before = {id(array) for array in jax.live_arrays()}
    made = Planner(settings)
    assert sum(layer.num_params for layer in made.layers) > 36e6
    layer_flops(made.layers, SHAPE((1, 8, 8, 1), jnp.float32))
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in before) < 1e5


def test_operations_of_an_mlp_by_hand(planner):
    """Two for every weight and example: 64 pixels, three hidden layers of 8, ten classes."""
    sizes = [64 * 8, 8 * 8, 8 * 8, 8 * 10]
    counted = [count for count in planner.flops(16) if count]
    assert counted == [2 * 16 * size for size in sizes]


def test_operations_of_a_convolutional_network_by_hand():
    rngs = nnx.Rngs(0)
    around = ((1, 1), (1, 1))
    layers = [
        Conv(3, 5, rngs=rngs, padding=around),
        relu,
        Conv(5, 4, rngs=rngs, strides=2, padding=around),
        lambda x: x.reshape(x.shape[0], -1),
        Linear(4 * 4 * 4, 7, rngs=rngs),
    ]
    by_hand = [2 * 2 * 8 * 8 * 9 * 3 * 5, 0, 2 * 2 * 4 * 4 * 9 * 5 * 4, 0, 2 * 2 * 64 * 7]
    assert layer_flops(as_layers(layers), SHAPE((2, 8, 8, 3), jnp.float32)) == by_hand


def test_operations_of_wrn_are_those_of_the_published_prediction():
    layers = models.abstract(lambda: models.wrn(10, width=2, rngs=nnx.Rngs(0)))
    assert layer_flops(as_layers(layers), SHAPE((1, 32, 32, 3), jnp.float32)) == forward_flops(10, 2)[0]


@pytest.mark.parametrize("strides", [1, 2])
def test_a_gradient_costs_two_forwards_zeros_of_a_stride_apart(strides):
    def conv(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (strides, strides), "SAME", dimension_numbers=dims)

    def both(x, kernel):
        outputs, pullback = jax.vjp(conv, x, kernel)
        return pullback(outputs)

    args = SHAPE((2, 8, 8, 3), jnp.float32), SHAPE((3, 3, 3, 5), jnp.float32)
    assert count_flops(both, *args) == 3 * count_flops(conv, *args) > 0


def test_loops_count_as_often_as_they_turn_and_branches_the_dearest():
    matrix = SHAPE((4, 4), jnp.float32)
    scanned = lambda a: jax.lax.scan(lambda x, _: (x @ x, None), a, None, length=7)[0]  # noqa: E731
    chosen = lambda a: jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, a)  # noqa: E731
    assert count_flops(scanned, matrix) == 7 * 2 * 4**3
    assert count_flops(chosen, matrix) == 2 * 2 * 4**3
    assert count_flops(jax.jit(scanned), matrix) == 7 * 2 * 4**3


def test_time_of_one_stage_is_its_work_over_the_speed(planner):
    """Three forwards of every layer, but two of the first with weights, which has no gradient of images to make."""
    found = planner.plan(replace(MLP, num_stages=1))
    first, *others = [count for count in planner.flops(16) if count]
    work = 2 * first + 3 * sum(others)
    assert found.batch_seconds == pytest.approx(work / SPEED)
    assert found.speed_up == pytest.approx(1)
    assert found.idle == pytest.approx([0])
    assert found.stages[0].forward_flops + found.stages[0].backward_flops == pytest.approx(work)


def test_time_of_fdg_is_that_of_the_slowest_stage(planner):
    found = planner.plan(MLP)
    work = [stage.forward_flops + stage.backward_flops for stage in found.stages]
    assert found.batch_seconds == pytest.approx(max(work) / SPEED)
    assert found.speed_up == pytest.approx(sum(work) / max(work))
    assert found.idle == pytest.approx([1 - each / max(work) for each in work])


def test_what_is_done_again_takes_time_but_not_where_nothing_is_late(planner):
    once, again = (planner.plan(replace(MLP, method=MethodSettings("fdg", policy=p))) for p in ("stash", "recompute"))
    more = [a.backward_flops - b.backward_flops for a, b in zip(again.stages, once.stages, strict=True)]
    assert more == [*(stage.forward_flops for stage in once.stages[:-1]), 0]
    work = [stage.forward_flops + stage.backward_flops for stage in again.stages]
    assert again.batch_seconds == pytest.approx(max(work) / SPEED) != pytest.approx(once.batch_seconds)


def test_backpropagation_over_stages_is_not_faster(planner):
    found = planner.plan(replace(MLP, method=MethodSettings("bp")))
    assert found.speed_up == pytest.approx(1)
    assert sum(found.idle) == pytest.approx(2)  # of three devices one works


def test_measured_times_are_those_of_the_plan(planner):
    measured = planner.measured(MLP)
    for size in (16, 8):
        found = measured.plan(replace(MLP, num_stages=1, batch_size=size))
        assert found.batch_seconds == pytest.approx(sum(measured.pace.layer_seconds) * size / 16)
    assert measured.pace.source.startswith("as measured here")


def test_balanced_cuts_follow_the_work(planner):
    found = planner.plan(replace(MLP, cuts="balanced"))
    flops, work = planner.flops(16), [stage.forward_flops for stage in found.stages]
    assert max(work) == max(flops)  # the dearest layer cannot be cut
    assert sum(work) == sum(flops)


def test_one_device_holds_what_all_stages_do(planner):
    apart, together = (planner.plan(replace(MLP, engine=engine)) for engine in ("mpmd", "fused"))
    assert (len(apart.memory), len(together.memory)) == (3, 1)
    forecasts = [stage.forecast for stage in apart.stages]
    held = sum(each.total + each.memos + each.old_weights for each in forecasts)  # the loop holds these two twice
    assert together.memory[0] >= held + max(each.visit for each in forecasts)
    assert together.idle == pytest.approx([0])
    assert together.speed_up == pytest.approx(1)


def applied(words):
    """The settings that a command line with these flags makes of `LARGE`."""
    config = default_config()
    config.update({"num_stages": 3, "batch_size": 256})
    config.model.update({"name": "mlp", "depth": 9, "width": 64})
    config.data.update({"crop_padding": 0, "flip": False})
    config.method.beta = 0.5
    for word in words:
        key, value = word.removeprefix("--config.").split("=")
        *path, name = key.split(".")
        branch = config
        for part in path:
            branch = branch[part]
        branch[name] = type(branch[name])(value)
    return resolve(config)


@pytest.fixture(scope="module")
def tight():
    """Most of what a run needs, the run, and what is tried."""
    assert applied(()) == LARGE
    narrow = Planner(LARGE, device_memory=1)
    room = 8 * max(narrow.plan(LARGE).memory) // 10
    narrow._device_memory = room
    now = narrow.plan(LARGE)
    return room, now, list(Remedies(narrow, now).all())


def keys(remedy):
    """What a remedy's flags set."""
    return [flag.removeprefix("--config.").split("=")[0] for flag in remedy.flags]


def test_remedies_that_fit_do_when_they_are_applied(tight):
    room, now, remedies = tight
    assert not now.fits
    fitting = [remedy for remedy in remedies if remedy.fits]
    assert {remedy.changes[-1] for remedy in fitting} >= {"weights that answer", "batch"}
    for remedy in {remedy.changes[-1]: remedy for remedy in fitting}.values():
        settings = applied(remedy.flags)
        assert settings == remedy.plan.settings
        pipe, _ = ready(settings)
        scratch = [stage.scratch for stage in remedy.plan.stages]
        assert max(f.peak + more for f, more in zip(pipe.forecasts, scratch, strict=True)) <= room


def test_every_kind_is_tried_and_the_advice_names_the_best_and_a_smaller_batch(tight):
    _, _, remedies = tight
    assert {key for remedy in remedies for key in keys(remedy)} == {
        *("remat", "method.policy", "cuts", "num_stages", "batch_size")
    }
    best, text = min(remedies), advise(remedies)
    smaller = min(remedy for remedy in remedies if remedy.fits and "batch_size" in keys(remedy))
    *_, named, _, words, other, needs, changed = text.splitlines()
    assert named == f"best: {' '.join(best.flags)}"
    assert words == "      late gradients meet today's weights"
    assert other == f"or:   {' '.join(smaller.flags)}"
    assert needs.endswith("cost 2.00")
    assert "noisier gradients" in changed
    rows = [line.split("  ")[0] for line in text.splitlines()[1 : 1 + len(remedies)]]
    assert rows == [" ".join(remedy.flags) for remedy in sorted(remedies)]


class OnPaper:
    """A planner by sums: six layers as long, memos as delays and images, of which "convs" keeps 60 %, "full" 25 %.

    Stage 0 of three needs 90 kB, of which 80 are memos, stage 1 50, of which 40 are, stage 2 10.
    """

    layers = [None] * 6
    asked = Settings(num_stages=3, cuts=(2, 4), batch_size=100, method=MethodSettings("fdg"))

    def __init__(self, found, device_memory):
        self.found, self.device_memory = found, device_memory

    def remedies(self, **changes):
        return Remedies(self, self.plan(replace(self.asked, **changes)))

    def balanced(self, settings):
        return even_cuts([1] * 6, settings.num_stages)

    def plan(self, settings):
        method, k = make_method(settings.method), settings.num_stages
        cuts = self.balanced(settings) if settings.cuts == "layers" else settings.cuts
        words, delays = resolve_remat(settings.remat, k, method.policy), delay(method.schedule(k))
        late = method.staleness(method.schedule(k))
        stages, seconds = [], []
        for n, (start, stop) in enumerate(pairwise((0, *cuts, 6))):
            again = words[n] == "full" or (method.policy == "recompute" and delays[n] > 0)
            part = 0.1 if method.policy == "recompute" else {"none": 1, "convs": 0.6, "full": 0.25}[words[n]]
            memos = int(part * 100 * settings.batch_size * (stop - start) * delays[n])
            forecast = replace(self.found.stages[0].forecast, memos=memos)
            device = 0 if settings.engine == "fused" else n
            held = {"device": device, "forecast": forecast, "scratch": 50 * settings.batch_size * (stop - start)}
            stages.append(
                replace(self.found.stages[0], start=start, stop=stop, delay=delays[n], staleness=late[n], **held)
            )
            seconds.append((4 if again else 3) * settings.batch_size * (stop - start))
        needs = [0] * (1 if settings.engine == "fused" else k)
        for stage in stages:
            needs[stage.device] += stage.forecast.memos + stage.scratch
        facts = {"settings": settings, "method": method, "cuts": cuts, "stages": tuple(stages), "memory": tuple(needs)}
        facts["schedule"] = method.schedule(k)
        return replace(self.found, **facts, device_memory=self.device_memory, batch_seconds=max(seconds))


@pytest.fixture
def on_paper(planner):
    return lambda device_memory: OnPaper(planner.plan(MLP), device_memory)


def test_memory_is_found_where_it_is_missing_and_nowhere_else(on_paper):
    """Device 0 alone is too full: its memos keep less, step by step; no value changes, though a smaller batch fits."""
    paper = on_paper(55_000)
    now = paper.remedies().now
    assert now.memory == (90_000, 50_000, 10_000)
    remedies = list(paper.remedies().all())
    remats = [remedy for remedy in remedies if keys(remedy) == ["remat"]]
    assert {remedy.changes for remedy in remats} == {("nothing",)}
    assert [r.flags for r in remats] == [(f"--config.remat={word},none,none",) for word in ("convs", "full")]
    assert [r.fits for r in remats] == [False, True]
    assert min(remedies) == remats[-1]
    assert remats[-1].cost == pytest.approx(4 / 3)
    assert [r for r in remedies if r.fits and keys(r) == ["batch_size"]]
    assert not [r for r in remedies if len(keys(r)) > 1 and "batch_size" in keys(r)]


def test_every_device_that_is_too_full_is_relieved(on_paper):
    words = [remedy.plan.settings.remat for remedy in on_paper(45_000).remedies().all() if keys(remedy) == ["remat"]]
    assert words == ["convs,convs,none", "full,convs,none"]


def test_stages_that_share_a_device_are_relieved_one_by_one_the_fullest_first(on_paper):
    tried = on_paper(1).remedies(engine="fused").all()
    words = [remedy.plan.settings.remat for remedy in tried if keys(remedy) == ["remat"]]
    assert words[:3] == ["convs,none,none", "full,none,none", "full,convs,none"]
    assert words[-1] == "full,full,full"


def test_where_only_smaller_batches_fit_remat_keeps_them_larger(on_paper):
    remedies = list(on_paper(15_000).remedies().all())
    fitting = {tuple(keys(remedy)): remedy for remedy in remedies if remedy.fits}
    assert set(fitting) == {("batch_size",), ("remat", "batch_size"), ("batch_size", "method.policy")}
    assert fitting["remat", "batch_size"].flags == ("--config.remat=full,full,none", "--config.batch_size=50")
    assert fitting["remat", "batch_size"].cost == pytest.approx(2 * 4 / 3)
    assert fitting["batch_size",].flags == ("--config.batch_size=12",)
    assert fitting["batch_size",].cost == pytest.approx(100 / 12)
    assert min(remedies).plan.settings.batch_size == 50


def test_what_other_cuts_and_stages_change_depends_on_the_method(on_paper):
    """Nothing is late in backpropagation, whatever the cuts; and one stage alone would make other methods that."""
    for method, change in (("bp", "nothing"), ("fdg", "delays"), ("dgl", "local losses")):
        remedies = on_paper(1).remedies(method=MethodSettings(method))
        moved = [remedy for remedy in (*remedies._cuts(), *remedies._stages()) if "remat" not in keys(remedy)]
        assert {remedy.changes for remedy in moved} == {(change,)}
        assert (1 in {remedy.plan.settings.num_stages for remedy in moved if remedy.plan}) == (method == "bp")


def test_layers_leave_the_fullest_stage_as_long_as_that_helps(on_paper):
    """From four layers of stage 0 to two, 36 kB to 18; with one layer less, stage 1 needs 21."""
    lean = {"method": MethodSettings("fdg", policy="recompute")}
    needs = [max(on_paper(1).remedies(**lean, cuts=cuts).now.memory) for cuts in ((4, 5), (3, 5), (2, 4), (1, 4))]
    assert needs == [36_000, 27_000, 18_000, 21_000]
    (found,) = (r for r in on_paper(1).remedies(**lean, cuts=(4, 5)).all() if keys(r) == ["cuts"])
    assert found.plan.cuts == (2, 4)


def test_nothing_is_late_in_one_stage_so_that_no_policy_is_tried(on_paper):
    tried = list(on_paper(1).remedies(num_stages=1, cuts="layers").all())
    assert not [remedy for remedy in tried if "method.policy" in keys(remedy)]
    assert [remedy for remedy in tried if "remat" in keys(remedy)]


def test_where_nothing_fits_all_is_tried_down_to_one_image(on_paper):
    remedies = list(on_paper(1).remedies().all())
    assert not any(remedy.fits for remedy in remedies)
    assert [r.flags[:-1] for r in remedies if r.plan.settings.batch_size == 1] == [(), ("--config.batch_size=1",)]
    assert "nothing that was tried fits" in advise(remedies)


def test_words_a_stage_of_a_run_that_is_given_some_become_one_for_another_number_of_stages(on_paper):
    tried = list(on_paper(1).remedies(remat="full,none,none").all())
    assert {r.plan.settings.remat for r in tried if "num_stages" in keys(r) and "batch_size" not in keys(r)} == {"full"}


def test_what_takes_longer_or_more_devices_or_updates_costs_and_gains_earn_nothing(tight):
    _, now, remedies = tight
    tried = [remedy for remedy in remedies if remedy.plan]
    assert {len(remedy.plan.memory) for remedy in tried} > {2, 3, 4}
    for remedy in tried:
        slower = remedy.plan.image_seconds / now.image_seconds
        devices = len(remedy.plan.memory) / len(now.memory)
        updates = now.settings.batch_size / remedy.plan.settings.batch_size
        assert remedy.cost == pytest.approx(max(1, slower) * max(1, devices) * max(1, updates))
        assert remedy.cost >= 2 or "batch_size" not in keys(remedy)


def test_the_better_remedy_is_that_of_the_rule(planner):
    fits = replace(planner.plan(MLP), device_memory=2**60)
    near = [Remedy(("flag",), (key,), fits) for key in CHANGES]
    assert sorted(near[2:] + near[:2]) == near
    remat, policy, *_, batch = near
    assert replace(remat, cost=3.0) < policy  # what changes no value, at any cost
    assert replace(batch, cost=1.1) < replace(policy, cost=1.3)
    assert batch < replace(remat, plan=replace(fits, device_memory=1))  # what fits
    assert replace(remat, plan=replace(fits, device_memory=1)) < replace(batch, plan=None)


def test_the_timeline_is_that_of_the_full_pipeline(planner):
    """In seconds: visits do not overlap, and devices compute as much of the time as the plan says."""
    for method in (MethodSettings("fdg"), MethodSettings("gpipe", micro_batches=4), MethodSettings("bp")):
        found = planner.plan(replace(MLP, method=method))
        timeline = window(found)
        assert sorted(timeline.lanes) == [0, 1, 2]
        for device, share in shares(timeline).items():
            assert share.compute == pytest.approx(100 * (1 - found.idle[device]), abs=0.01)
            assert share.transfer == 0
            assert all(a.end <= b.start + 1e-12 for a, b in pairwise(timeline.lanes[device]))
        updates = [box for box in timeline.lanes[0] if any(op.kind == "U" for op in box.ops)]
        assert updates
        assert all(b.end - a.end == pytest.approx(found.batch_seconds) for a, b in pairwise(updates))


def test_the_sweep_has_a_row_for_every_method_and_k(planner):
    rows = list(sweep(planner, MLP, (1, 5)))
    assert [(k, name) for k, name, _ in rows] == [(k, name) for k in (1, 5) for name in PRESETS]
    found = {(k, name): row for k, name, row in rows if not isinstance(row, str)}
    assert all(row.speed_up == pytest.approx(1) for (k, _), row in found.items() if k == 1)
    assert (found[5, "fdg"].method.beta, found[5, "adl"].method.beta) == (0.5, 1.0)  # the config's own, and not
    assert found[5, "gpipe"].method.micro_batches == 8  # the first that divides 16
    assert found[5, "fdg"].speed_up > found[5, "gpipe"].speed_up > found[5, "bp"].speed_up
    for (k, _), row in found.items():
        assert len(row.stages) == k
        assert row.cuts == planner.balanced(replace(MLP, num_stages=k))


def test_a_row_that_cannot_be_says_why():
    settings = replace(MLP, batch_size=6, method=MethodSettings("gpipe", micro_batches=4))
    rows = {name: row for _, name, row in sweep(Planner(settings), settings, (2,))}
    assert "6 does not make 4 equal micro-batches" in rows["gpipe"]
    assert not isinstance(rows["bp"], str)


def test_memory_that_a_device_does_not_tell_is_not_known(planner, monkeypatch):
    silent = SimpleNamespace(platform="gpu", device_kind="some", memory_stats=lambda: None)
    found = planner.plan(MLP)
    monkeypatch.setattr(jax, "devices", lambda: [silent] * 3)
    found = replace(found, device_memory=estimates.memory_here(3))
    assert found.fits
    text = describe(found, planner)
    assert "this device does not say how much it has: give --device_memory" in text
    assert "FIT" not in text


def test_one_is_not_plural(planner):
    assert stage_rows(planner.plan(MLP))[2][7:9] == ("2 ticks", "1 update")


IN_PROCESS = pytest.mark.filterwarnings("ignore:.*load_module.*:DeprecationWarning")  # by ml_collections
ARGUMENTS = [
    "--config=experiments/digits.py",
    "--config.model.name=mlp",
    "--config.model.depth=3",
    "--config.model.width=8",
    "--config.cuts=balanced",
]


@pytest.fixture
def command(capsys, monkeypatch):
    """A function of the arguments: status, stdout, stderr."""

    def run(*arguments):
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # of the command before: a process has one
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])  # where ml_collections looks for overrides
        try:
            status = plan.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@IN_PROCESS
def test_the_command_prints_the_plan_and_draws_it_twice_alike(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Remedies, "all", lambda self: [])  # which are tried above
    texts, files = [], []
    for turn in ("one", "two"):
        folder = tmp_path / turn
        status, out, err = command(*ARGUMENTS, "--device_memory=3KiB", "--flops_per_second=1e9", f"--out={folder}")
        assert status == 0
        assert err == "looking for remedies\n"
        texts.append(out.replace(str(folder), ""))
        files.append([(folder / name).read_bytes() for name in DRAWN])
    assert texts[0] == texts[1]
    assert files[0] == files[1]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(DRAWN)
    for name in DRAWN[:2]:
        with Image.open(tmp_path / "one" / name) as image:
            image.verify()
    events = json.loads(files[0][3])["traceEvents"]
    percents = [event["args"]["percent"] for event in events if event["name"] == "shares"]
    rows = [line.split() for line in texts[0].splitlines() if line.startswith("planned")]
    assert [float(row[3]) for row in rows] == [round(each["compute"], 1) for each in percents]
    assert max(each["compute"] for each in percents) == pytest.approx(100)
    for words in (
        "fdg(beta=0.5, policy=stash), 2 stages",
        "B0 U F2",
        "DOES NOT FIT",
        "at 1e+09 FLOP/s",
        "nothing that was tried fits",
    ):
        assert words in texts[0]


DRAWN = "schedule.png", "timeline.png", "schedule.svg", "trace.json"


@IN_PROCESS
def test_one_device_shares_its_memory_with_nobody(command):
    apart, together = (command(*ARGUMENTS, f"--config.engine={engine}")[1] for engine in ("mpmd", "fused"))
    assert "(this machine's, shared by the 2 devices)" in apart
    assert "(this machine's)" in together


@IN_PROCESS
def test_the_sweep_prints_a_table_and_says_how_far_it_is(command, planner, monkeypatch):
    monkeypatch.setattr(plan, "sweep", lambda planner, settings, numbers: [(k, "gpipe", "a reason") for k in numbers])
    monkeypatch.setattr(plan, "MOST_STAGES", 2)
    status, out, err = command(*ARGUMENTS, "--sweep")
    head, _, first, _, second, *_ = out.splitlines()
    assert status == 0
    assert head.split() == ["K", "method", "cuts", "s", "a", "batch", "speed-up", "idle", "staleness", "MiB"]
    assert first.split() == ["1", "gpipe", *["-"] * 6, "a", "reason"]
    assert second.split()[0] == "2"
    assert err.splitlines() == ["planning every method", *(f"planning every method: K = {k} of 2" for k in (1, 2))]


def test_the_best_of_a_sweep_fits_and_is_marked(planner):
    """Under every K from the fastest that fits to what is refused, and the flags that ask for the best of all."""
    slow, fast = (planner.plan(replace(MLP, method=MethodSettings(name))) for name in ("bp", "ddg"))
    one = planner.plan(replace(MLP, num_stages=1))
    too_large = replace(fast, device_memory=1, speed_up=9.0)
    found = [(3, "no", "a reason"), (3, "large", too_large), (3, "bp", slow), (3, "ddg", fast), (1, "fdg", one)]
    table, _, end = compare(found, MLP).rpartition("\n\n")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[1] if row else "" for row in rows] == ["", "fdg", "", "ddg", "bp", "large", "no"]
    assert [row[-1] for row in rows if row and row[-1] == "best"] == ["best"]
    assert rows[3][-1] == "best"
    words, flags = end.splitlines()
    assert words.startswith("best: ddg(policy=stash) with 3 stages")
    assert flags.split() == ["--config.method.name=ddg", "--config.method.beta=1.0"]
    assert "nothing fits" in compare(found[:2], MLP)


def test_of_equally_fast_methods_the_one_with_fewer_stages_or_less_delay_is_the_best(planner):
    late = planner.plan(MLP)
    fresh = replace(late, stages=(replace(late.stages[0], staleness=0), *late.stages[1:]))
    fewer = replace(late, stages=late.stages[:2])
    assert "ddg" in compare([(3, "fdg", late), (3, "ddg", fresh)], MLP).split(" best\n")[0].splitlines()[-1]
    assert "ddg" in compare([(3, "fdg", fresh), (2, "ddg", fewer)], MLP).split(" best\n")[0].splitlines()[-1]


@IN_PROCESS
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*ARGUMENTS, "--config.num_stages=9"], "num_stages must lie in 1.."),
        ([*ARGUMENTS, "--config.method.name=fgd"], "unknown method 'fgd'; did you mean 'fdg'?"),
        ([*ARGUMENTS, "--config.batch_size=5000"], "batch_size must be at most 1437, the training images of digits"),
        ([*ARGUMENTS, "--device_memory=.."], "must be a size such as 40GiB or 16GB; got '..'"),
        ([*ARGUMENTS, "--device_memory=1.2.3GiB"], "must be a size such as 40GiB or 16GB; got '1.2.3GiB'"),
        ([*ARGUMENTS, "--sweeep"], "did you mean 'sweep'"),
        ([*ARGUMENTS, "--flops_per_second=1e-310"], "must be operations a second, such as 5e12; got '1e-310'"),
        ([*ARGUMENTS, f"--out={__file__}"], "cannot write to --out="),
        ([*ARGUMENTS, "--device_memory=12xB"], "must be a size such as 40GiB or 16GB; got '12xB'"),
        ([*ARGUMENTS, "--device_memory=8"], "must have a unit, such as 8GiB; got '8', which is in bytes"),
        ([*ARGUMENTS, "--sweep", "--out=x"], "--out draws one schedule, and --sweep plans many"),
        ([*ARGUMENTS, "--flops_per_second=-1"], "must be operations a second, such as 5e12; got '-1'"),
        ([*ARGUMENTS, "--measure", "--flops_per_second=1"], "give one of them"),
        ([*ARGUMENTS, "more"], "unexpected argument 'more'"),
        (["--config=experiments/nothing.py"], "there is no file --config=experiments/nothing.py"),
        (["--config=experiments/compare_digits.py"], "compares methods"),
    ],
)
def test_wrong_input_gets_one_line(arguments, words, command):
    status, out, err = command(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("fdg_jax: ")
    assert err.count("\n") == 1
    assert words in err


@IN_PROCESS
def test_an_interrupt_ends_it_in_a_line_also_in_a_callback(command, monkeypatch):
    """Where Python ignores exceptions, as in the callbacks of weak references, of which tracing has thousands."""

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    ended = []
    monkeypatch.setattr(plan, "run", lambda *_: Dropped() and None)
    monkeypatch.setattr(plan.os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    assert command(*ARGUMENTS)[1:] == ("", "fdg_jax: stopped\n")
    assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_is_checked_and_not_made(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for bad in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=r"^cannot write to --out=.*: Not a directory; choose another$"):
            check_writable(bad)


@pytest.mark.parametrize(
    ("text", "number"), [("40GiB", 40 * 2**30), ("16GB", 16e9), ("1.5 kib", 1536), ("2000000", 2e6)]
)
def test_sizes(text, number):
    assert plan.size(text) == number


def test_a_network_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="depth"):
        Planner(replace(MLP, model=ModelSettings("wrn", depth=11)))


def test_the_plan_of_an_unknown_speed_says_so(planner):
    assert "assumed" in Pace().source
    assert math.isclose(planner.pace.flops_per_second, SPEED)
