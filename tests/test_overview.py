"""The memory forecast against what the devices hold, and what `remat` makes of a memo."""

import jax
import pytest
from flax import nnx
from helpers import assert_trees_close, in_float64, make_pipeline, run, tiny_batches

from benchmarks.memory import measure
from fdg_jax import layers, methods, models
from fdg_jax.models.parts import Head

SHAPE = (8, 8, 3)


def resnet(depth=14, width=4, **kwargs):
    return models.resnet_cifar(depth, rngs=nnx.Rngs(0), width=width, num_classes=3, in_shape=SHAPE, **kwargs)


@pytest.mark.parametrize(
    ("method", "remat"),
    [
        (methods.fdg(0.5, "stash"), "none"),
        (methods.fdg(0.5, "stash", order="forward_first"), "none"),
        (methods.fdg(0.5, "stash"), "full,convs,none"),
        (methods.fdg(0.5, "current"), "none"),
        (methods.fdg(0.5, "recompute"), "none"),
        (methods.bp(), "none"),
    ],
    ids=str,
)
def test_devices_hold_what_was_forecast(method, remat):
    """Between ticks and during visits, on every stage. 10 % were promised.

    Only the key, counters and metrics are left out, which weigh in a network as small as this one. Where a step is
    several ticks, what a stage holds between two of them shows in the visits alone.
    """
    assert_forecast(make_pipeline(resnet(), num_stages=3, method=method, remat=remat), tiny_batches(3, SHAPE, 4))


@pytest.mark.parametrize(
    "method",
    [
        methods.one_f_one_b(2),
        methods.ddg(),
        methods.features_replay(),
        methods.adl(2),
        methods.pipedream(),
        methods.pipedream(vertical_sync=True),
        methods.pipedream_2bw(4),
    ],
    ids=str,
)
def test_other_methods_hold_what_was_forecast(method):
    """Accumulated gradients, several versions of weights, messages that wait: wide layers, but quickly compiled."""
    network = [layers.Linear(width, 96, rngs=nnx.Rngs(i)) for i, width in enumerate((6, 96, 96))]
    assert_forecast(make_pipeline(network, num_stages=3, method=method), tiny_batches(3, (6,), 64))


def assert_forecast(pipe, batches):
    _, stages = measure(pipe, batches)
    for stage in stages:
        assert stage.peak_ratio == pytest.approx(1, abs=0.02)
        assert stage.held_ratio == pytest.approx(1, abs=0.02) or pipe.ticks_per_batch > 1


def test_what_is_shown_is_the_forecast():
    pipe = make_pipeline(resnet(), num_stages=3)
    pipe.init(jax.random.key(0), tiny_batches(1, SHAPE, 16)[0][0])
    *_, head, first, second, third = pipe.show().splitlines()
    assert " ".join(head.split()) == "stage weights optimizer old weights memos messages total MiB peak MiB"
    for line, forecast in zip((first, second, third), pipe._forecasts, strict=True):
        total, peak = line.split()[-2:]
        assert float(total) == pytest.approx(forecast.total / 2**20, abs=0.01)
        assert float(peak) == pytest.approx(forecast.peak / 2**20, abs=0.01)
        assert forecast.peak > forecast.total > 0


def test_one_is_not_plural():
    shown = make_pipeline(resnet(), num_stages=3, method=methods.fdg(0.5)).show()
    rows = [line for line in shown.splitlines() if " ticks " in line or " tick " in line]
    assert [row.split()[-5:-1] for row in rows] == [
        ["4", "ticks", "3", "updates"],
        ["2", "ticks", "1", "update"],
        ["0", "ticks", "0", "updates"],
    ]


def kept(network, cuts, batch_size, **kwargs):
    """Of a memo of stage 0: bytes of its maps and of its small vectors, and the trace that makes it."""
    pipe = make_pipeline(network, cuts=cuts, **kwargs)
    pipe.init(jax.random.key(0), tiny_batches(1, SHAPE, batch_size)[0][0])
    trace = pipe._started().workers[0].trace
    held = [shape for source, shape in zip(trace.held, trace.held_shapes, strict=True) if source.tree != "params"]
    leaves = [*trace.saved, *held]
    maps = sum(leaf.size for leaf in leaves if leaf.ndim >= 4)
    forecast = pipe._forecasts[0]
    assert forecast.memos == forecast.num_memos * 4 * sum(leaf.size for leaf in leaves)
    return maps, sum(leaf.size for leaf in leaves if leaf.ndim < 4), trace


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize(("remat", "activations"), [("none", 4), ("convs", 2), ("full", 1)])
@pytest.mark.parametrize("family", ["resnet_cifar", "wrn"])
def test_activations_that_one_more_block_adds_to_a_memo(family, remat, activations, stack):
    """Exactly, of basic blocks; and beside them the statistics of two normalisations, which "full" does without."""
    memos = []
    for blocks in (3, 4):
        if family == "resnet_cifar":
            network, channels = resnet(6 * blocks + 2), 4
        else:
            network = models.wrn(6 * blocks + 4, width=1, rngs=nnx.Rngs(0), num_classes=3, in_shape=SHAPE)
            channels = 16
        memos.append(kept(network, (blocks + 1,), 2, remat=remat, stack=stack))
    (maps, vectors, _), (more_maps, more_vectors, _) = memos
    assert more_maps - maps == activations * 2 * 8 * 8 * channels
    assert more_vectors - vectors == (0 if remat == "full" else 4 * channels)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("remat", ["none", "convs", "full"])
def test_no_memo_holds_a_copy_of_a_weight(remat, stack):
    """All that the forward makes for it depends on the stage's input, and has the shape of no parameter."""
    *_, trace = kept(resnet(20), (5,), 2, remat=remat, stack=stack)
    assert trace.hidden_params() == []
    pipe = make_pipeline(resnet(20), cuts=(5,))
    state = pipe.init(jax.random.key(0), tiny_batches(1, SHAPE, 2)[0][0])
    kernels = {leaf.shape for leaf in jax.tree.leaves(state.stages[0].params) if leaf.ndim >= 4}
    assert kernels
    assert not kernels & {leaf.shape for leaf in trace.saved}


def in_halves(remats, stack):
    """Parameters and module state after a few batches, in float64: BatchNorm amplifies float32's rounding."""
    with jax.enable_x64(True):
        batches = [(images.astype("float64"), labels) for images, labels in tiny_batches(5, SHAPE)]
        for remat in remats:
            network = in_float64([*resnet(20, dtype="float64")[:4], Head(4, 3, rngs=nnx.Rngs(0), dtype="float64")])
            pipe = make_pipeline(network, cuts=(4,), stack=stack, remat=remat)
            state, _ = run(pipe, batches)
            yield pipe.params(state), pipe.module_state(state)


@pytest.mark.parametrize("stack", [True, False])
def test_remat_changes_no_value(stack):
    """Batch statistics included, which would move twice if what is done again moved them."""
    expected, *others = in_halves(("none", "convs", "full", "full,convs"), stack)
    for other in others:
        assert_trees_close(other, expected, 1e-9)


def test_what_is_done_again_sees_the_same_dropout_mask():
    def network():
        rngs = nnx.Rngs(0)
        block = lambda: nnx.Sequential(nnx.Linear(6, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), jax.nn.gelu)  # noqa: E731
        return [block(), block(), block(), nnx.Linear(6, 3, rngs=rngs)]

    ends = []
    for remat in ("none", "convs,full,none"):
        pipe = make_pipeline(network(), cuts=(1, 2), remat=remat)
        ends.append(pipe.params(run(pipe, tiny_batches())[0]))
    assert_trees_close(ends[1], ends[0], 1e-6)
