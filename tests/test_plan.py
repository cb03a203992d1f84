"""The plan of a run against the pipeline that it plans, work counted by hand, and remedies that are tried out."""

import math
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
from fdg_jax.alternatives import Remedies, Remedy, cheapest, sweep
from fdg_jax.build import build, example_images
from fdg_jax.config import ConfigError, DataSettings, MethodSettings, ModelSettings, Settings, default_config, resolve
from fdg_jax.flops import count_flops, layer_flops
from fdg_jax.layers import Conv, Linear, relu
from fdg_jax.methods import PRESETS
from fdg_jax.planning import Pace, Planner
from fdg_jax.schedule import delay
from fdg_jax.stage import as_layers

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


def test_remedies_that_fit_do_when_they_are_applied(tight):
    room, now, remedies = tight
    assert not now.fits
    fitting = [remedy for remedy in remedies if remedy.fits]
    assert {remedy.kind for remedy in fitting} >= {"policy", "batch"}
    for remedy in {remedy.kind: remedy for remedy in fitting}.values():
        settings = applied(remedy.flags)
        assert settings == remedy.plan.settings
        pipe, _ = ready(settings)
        scratch = [stage.scratch for stage in remedy.plan.stages]
        assert max(f.peak + more for f, more in zip(pipe.forecasts, scratch, strict=True)) <= room


def test_every_kind_is_tried_and_the_advice_names_the_cheapest(tight):
    _, _, remedies = tight
    assert {remedy.kind for remedy in remedies} == {"remat", "policy", "stages", "batch"}
    best = cheapest(remedies)
    assert best.fits
    assert best.cost <= 1.02 * min(remedy.cost for remedy in remedies if remedy.fits)
    text = plan.advise(remedies)
    assert text.splitlines()[-1].startswith(f"cheapest: {' '.join(best.flags)} needs ")
    assert all(" ".join(remedy.flags) in text for remedy in remedies)


def test_more_devices_and_longer_times_cost_and_gains_earn_nothing(tight):
    _, now, remedies = tight
    tried = [remedy for remedy in remedies if remedy.plan]
    assert {len(remedy.plan.memory) for remedy in tried} > {1, 3, 4}
    for remedy in tried:
        slower = remedy.plan.image_seconds / now.image_seconds
        devices = len(remedy.plan.memory) / len(now.memory)
        assert remedy.cost >= max(1, slower, devices)
        assert remedy.cost == pytest.approx(1) or max(slower, devices) > 1


def test_among_equals_the_one_that_changes_least(planner):
    fits = replace(planner.plan(MLP), device_memory=2**60)
    kinds = [Remedy(kind, (kind,), "", fits) for kind in ("batch", "stages", "policy", "remat")]
    assert cheapest(kinds).kind == "remat"
    assert cheapest(kinds[:2]).kind == "stages"
    dear = replace(kinds[-1], cost=1.3)
    assert cheapest([*kinds[:-1], dear]).kind == "policy"
    assert cheapest([replace(kinds[0], plan=replace(fits, device_memory=0)), dear]) is dear
    assert cheapest([]) is None


def test_where_nothing_fits_the_leanest_is_tried_with_smaller_batches():
    narrow = Planner(MLP, device_memory=10)
    remedies = list(Remedies(narrow, narrow.plan(MLP)).all())
    assert len(remedies[-1].flags) > 1
    assert remedies[-1].flags[-1] == "--config.batch_size=1"
    assert "nothing that was tried fits" in plan.advise(remedies)


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
    text = plan.describe(found, planner)
    assert "this device does not say how much it has: give --device_memory" in text
    assert "FIT" not in text


def test_one_is_not_plural(planner):
    assert plan.stage_rows(planner.plan(MLP))[2][7:9] == ("2 ticks", "1 update")


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
        status, out, _ = command(*ARGUMENTS, "--device_memory=3KiB", "--flops_per_second=1e9", f"--out={folder}")
        assert status == 0
        texts.append(out.replace(str(folder), ""))
        files.append([(folder / f"schedule.{suffix}").read_bytes() for suffix in ("png", "svg")])
    assert texts[0] == texts[1]
    assert files[0] == files[1]
    with Image.open(tmp_path / "one" / "schedule.png") as image:
        image.verify()
    for words in (
        "fdg(beta=0.5, policy=stash), 2 stages",
        "B0 U F2",
        "DOES NOT FIT",
        "at 1e+09 FLOP/s",
        "nothing that was tried fits",
    ):
        assert words in texts[0]


@IN_PROCESS
def test_the_sweep_prints_a_table(command, planner, monkeypatch):
    rows = [(1, "bp", planner.plan(replace(MLP, num_stages=1))), (2, "gpipe", "a reason")]
    monkeypatch.setattr(plan, "sweep", lambda *_: rows)
    status, out, _ = command(*ARGUMENTS, "--sweep")
    head, first, second = out.split("\n\n")[0].splitlines()
    assert status == 0
    assert head.split() == ["K", "method", "cuts", "s", "a", "batch", "speed-up", "idle", "staleness", "MiB"]
    assert first.split()[:2] == ["1", "bp"]
    assert second.split() == ["2", "gpipe", *["-"] * 6, "a", "reason"]


@IN_PROCESS
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*ARGUMENTS, "--config.num_stages=9"], "num_stages must lie in 1.."),
        ([*ARGUMENTS, "--config.method.name=fgd"], "unknown method 'fgd'; did you mean 'fdg'?"),
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
def test_an_interrupt_ends_it_in_a_line(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run", interrupted)
    assert command(*ARGUMENTS) == (130, "", "fdg_jax: stopped\n")


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
