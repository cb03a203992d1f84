"""What the engine for K devices owes beyond the right numbers: placement, donation, few compilations, no waiting."""

import gc
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close, host, make_pipeline, run, tiny_batches, tiny_mlp

from fdg_jax import methods, models, schedule
from fdg_jax.engine import mpmd
from fdg_jax.layers import BatchNorm
from fdg_jax.schedule import Op, delay, staleness

POLICIES = ["stash", "current", "recompute"]


def fed(pipe, num):
    state = pipe.init(jax.random.key(0), tiny_batches(1)[0][0])
    for batch in tiny_batches(num):
        state, _ = pipe.step(state, batch)
    return state


@pytest.mark.parametrize("method", [methods.bp(), *[methods.fdg(0.5, policy) for policy in POLICIES]], ids=str)
def test_one_device_two_or_four_give_the_same_bits(method):
    results = []
    for devices in (jax.devices(), jax.devices()[:2], jax.devices()[3:]):
        pipe = make_pipeline(method=method, num_stages=4, devices=devices)
        state, losses = run(pipe, tiny_batches())
        results.append((pipe.params(state), losses))
        homes = [own.batch.device for own in state.stages]
        assert homes == [devices[k * len(devices) // 4] for k in range(4)]
    for other in results[1:]:
        assert_trees_close(other, results[0], 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", ["update_first", "forward_first"])
def test_at_most_three_compilations_a_stage(policy, order):
    """Filling, steady state, draining; a second filling compiles nothing."""
    pipe = make_pipeline(method=methods.fdg(0.5, policy, order), num_stages=4)
    state, _ = run(pipe, tiny_batches(9))
    for batch in tiny_batches(9):
        state, _ = pipe.step(state, batch)
    pipe.drain(state)
    counts = [0] * 4
    for (k, _), program in pipe._started().programs.items():
        counts[k] += program.compiled._cache_size()
    assert counts == [3, 3, 3, 1]


def test_a_step_moves_nothing_but_what_it_says_and_reads_nothing_back(monkeypatch):
    pipe = make_pipeline(num_stages=4)
    state = fed(pipe, 8)
    batches = tiny_batches(4)

    def refuse(*_):
        raise AssertionError("the host waited for a device")

    array = type(jnp.zeros(()))
    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
        monkeypatch.setattr(array, name, refuse)
    monkeypatch.setattr(jax, "device_get", refuse)
    monkeypatch.setattr(jax, "block_until_ready", lambda loss: loss)
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, _ = pipe.step(state, batch)


def test_one_transfer_a_tick(monkeypatch):
    pipe = make_pipeline(num_stages=4)
    state = fed(pipe, 8)
    calls = []
    original = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: calls.append(args) or original(*args))
    pipe.step(state, tiny_batches(1)[0])
    ((messages, devices),) = calls
    assert len(messages) == len(devices) == 2 + 3 + 3  # inputs and targets, activations down, error gradients up


@pytest.mark.parametrize(("devices", "moved"), [((0, 0, 0, 0), 2), ((0, 0, 1, 1), 4), ((0, 1, 2, 3), 8)])
def test_nothing_moves_between_stages_that_share_a_device(monkeypatch, devices, moved):
    """The batch comes from anywhere; beside it one activation and one error gradient pass every change of device."""
    pipe = make_pipeline(num_stages=4, devices=[jax.devices()[i] for i in devices])
    state = fed(pipe, 8)
    messages = []
    original = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: messages.extend(args[0]) or original(*args))
    state, _ = pipe.step(state, tiny_batches(1)[0])
    assert len(messages) == moved
    assert {key[:2] for key in state.outbox} == {
        *(("inputs", k) for k in (1, 2, 3)),
        *(("cotangents", k) for k in range(3)),
    }


def arrays_per_call(monkeypatch, depth, cuts):
    """(in, out) of every call of a tick in the steady state: ResNet-`depth` in four stages, traced and not compiled."""
    network = models.resnet_cifar(depth, width=1, in_shape=(4, 4, 3), rngs=nnx.Rngs(0))
    pipe = make_pipeline(network, num_stages=4, cuts=cuts, devices=jax.devices()[:1])
    batch = tiny_batches(1, (4, 4, 3))[0]
    state = pipe.init(jax.random.key(0), batch[0])
    calls = []

    def shapes_of(run, **_):
        def call(*args):
            result = jax.eval_shape(run, *args)
            calls.append((len(jax.tree.leaves(args)), len(jax.tree.leaves(result))))
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", shapes_of)
        patch.setattr(jax, "device_put", lambda messages, devices: messages)
        for _ in range(8):
            calls.clear()
            state, _ = pipe.step(state, batch)
    return calls


def test_what_a_tick_costs_the_host_does_not_grow_with_depth(monkeypatch):
    """One call a stage, of as many arrays in ResNet-110 as in ResNet-56 where the cuts leave runs of equal blocks in
    the same places; elsewhere an array more or less, for the input that a run's memo has beside the stage's."""
    blocks = {56: 9, 110: 18}  # in each of the three groups
    counts = [arrays_per_call(monkeypatch, depth, (1 + n, 1 + 2 * n, 1 + 3 * n)) for depth, n in blocks.items()]
    assert len(counts[0]) == 4
    assert counts[0] == counts[1]
    even = [arrays_per_call(monkeypatch, depth, "layers") for depth in blocks]
    assert np.abs(np.subtract(*even)).max() <= 1
    assert np.sum(even) < 2 * 500


SCHEDULES = [
    *(schedule.fdg(k, order) for k in (1, 2, 3, 5) for order in schedule.ORDERS),
    *(schedule.bp(k) for k in (1, 3)),
    *(make(3, m) for make in (schedule.adl, schedule.gpipe, schedule.one_f_one_b) for m in (1, 2, 4)),
]


@pytest.mark.parametrize("schedule_", SCHEDULES, ids=lambda s: f"{s.name}-{s.num_stages}-{s.group}")
def test_rows_are_those_of_the_schedule_and_are_read_once(monkeypatch, schedule_):
    """Filling, in the steady state and draining, with whole groups and incomplete ones."""
    monkeypatch.setattr(mpmd, "Program", lambda worker, k, pattern: SimpleNamespace(k=k, pattern=pattern))
    plan = SimpleNamespace(schedule=schedule_, last=schedule_.num_stages - 1, takes_older=lambda k, batch: False)
    engine = mpmd.Mpmd(plan, jax.devices()[:1] * schedule_.num_stages)
    engine.workers = defaultdict(lambda: None)

    def read(tick, num_batches):
        answered, calls = engine.row(tick, num_batches)
        visits = {c.program.k: [Op(kind, answered + c.batches[n]) for kind, n in c.program.pattern] for c in calls}
        return tuple(tuple(visits.get(k, ())) for k in range(schedule_.num_stages))

    sizes = []
    for fed in range(1, 40):
        start = (fed - 1) // schedule_.group * schedule_.period
        for tick in range(start, schedule.num_ticks(schedule_, fed) + 2):
            assert read(tick, fed) == schedule.row(schedule_, tick, fed)
        sizes.append(len(engine._rows))
    assert sizes[19] == sizes[-1]


def test_the_host_does_not_run_away(monkeypatch):
    """Every batch beyond RUN_AHEAD waits for the loss of the one so many before."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    pipe = make_pipeline(num_stages=2)
    _, losses = run(pipe, tiny_batches(mpmd.RUN_AHEAD + 3))
    assert [float(loss) for loss in waited] == losses[:3]


def leaves_by_pointer(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_stash_keeps_the_weights_of_the_last_forwards_and_no_copies():
    """Under stash the D memos of stage k refer to the weights with which stage k forwarded the last D batches: today's
    and tau_k older trees. They are those very buffers; none of the arrays that a forward made is a weight's size."""
    pipe = make_pipeline(tiny_mlp(5), num_stages=3, stack=False)
    state = pipe.init(jax.random.key(0), tiny_batches(1)[0][0])
    trees = []  # parameters of every stage after every step, kept alive
    for batch in tiny_batches(9):
        state, _ = pipe.step(state, batch)
        trees.append([own.params for own in state.stages])
    for k, (ticks, stale) in enumerate(zip(delay(pipe.schedule), staleness(pipe.schedule), strict=True)):
        memos = [memo for (stage, _), memo in sorted(state.memos.items()) if stage == k]
        assert len(memos) == ticks
        if not memos:
            continue
        sources = pipe._started().workers[k].trace.held
        for memo, params in zip(memos, [tree[k] for tree in trees[-ticks:]], strict=True):
            held = [leaf for source, leaf in zip(sources, memo.held, strict=True) if source.tree == "params"]
            assert held
            assert leaves_by_pointer(held) <= leaves_by_pointer(params)
            weights = {leaf.shape for leaf in jax.tree.leaves(params)}
            assert not [leaf.shape for leaf in memo.saved if leaf.shape in weights and leaf.ndim > 1]
        versions = {frozenset(leaves_by_pointer(tree[k])) for tree in trees[-ticks:]}
        assert len(versions) == stale + 1


@pytest.mark.parametrize("policy", ["current", "recompute"])
def test_other_policies_keep_no_old_weights(policy):
    pipe = make_pipeline(num_stages=3, method=methods.fdg(0.5, policy))
    state = fed(pipe, 8)
    for (k, _), memo in state.memos.items():
        trace = pipe._started().workers[k].trace
        assert all(source.tree != "params" for source in trace.held)
        assert policy == "current" or memo.saved == []
        assert not leaves_by_pointer(memo) & leaves_by_pointer(state.stages[k].params)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_donated(policy):
    """Parameters unless old ones are needed (not on the last stage, which is never stale), optimizer state always."""
    pipe = make_pipeline(num_stages=3, method=methods.fdg(0.5, policy))
    state = fed(pipe, 8)
    pipe.step(state, tiny_batches(1)[0])
    for k, own in enumerate(state.stages):
        deleted = all(leaf.is_deleted() for leaf in jax.tree.leaves(own.params))
        assert deleted == (policy != "stash" or k == 2)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own.opt_state))


class Average(nnx.Module):
    """Keeps a running mean; adds it to the input, or multiplies by it, so that the backward reads it."""

    def __init__(self, multiplies: bool):
        self.multiplies, self.mean = multiplies, nnx.BatchStat(jnp.ones((4, 5)))

    def __call__(self, x):
        mean = self.mean[...]
        self.mean[...] = 0.9 * mean + 0.1 * jax.lax.stop_gradient(x)
        return x * mean if self.multiplies else x + mean


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("policy", ["stash", "current"])
def test_module_state_is_overwritten_unless_memos_refer_to_it(policy, read):
    layers = [*tiny_mlp(2)[:2], Average(read), BatchNorm(5, rngs=nnx.Rngs(0)), *tiny_mlp(2)[2:]]
    pipe = make_pipeline(layers, cuts=(4,), method=methods.fdg(0.5, policy), stack=False)
    state = fed(pipe, 6)
    pipe.step(state, tiny_batches(1)[0])
    own = state.stages[0]
    assert len(jax.tree.leaves(own.state)) == 3
    assert {leaf.is_deleted() for leaf in jax.tree.leaves(own.state)} == {not read}


@pytest.mark.parametrize("policy", POLICIES)
def test_live_bytes_are_what_the_state_says(policy):
    """After many steps nothing lives on the devices but the state: no weight tree outlives the memo that needs it."""

    def live():
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted())

    pipe = make_pipeline(tiny_mlp(5, dtype="float32"), num_stages=3, method=methods.fdg(0.5, policy))
    state = fed(pipe, 6)
    sizes = []
    for _ in range(3):
        for batch in tiny_batches(5):
            state, _ = pipe.step(state, batch)
        sizes.append(live())
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_forecast_is_what_the_state_holds():
    for policy in POLICIES:
        pipe = make_pipeline(tiny_mlp(5), num_stages=3, method=methods.fdg(0.5, policy), stack=False)
        state = fed(pipe, 12)
        for k, (own, forecast) in enumerate(zip(state.stages, pipe._forecasts, strict=True)):
            memos = [memo for (stage, _), memo in state.memos.items() if stage == k]
            today = leaves_by_pointer(own.params)
            sources = pipe._started().workers[k].trace.held
            old, kept = {}, 0
            for memo in memos:
                for source, leaf in zip(sources, memo.held, strict=True):
                    if source.tree != "params":
                        kept += leaf.nbytes
                    elif leaf.unsafe_buffer_pointer() not in today:
                        old[leaf.unsafe_buffer_pointer()] = leaf.nbytes
                kept += sum(leaf.nbytes for leaf in memo.saved)
            assert forecast.num_memos == len(memos)
            assert forecast.memos == kept
            assert forecast.old_weights == sum(old.values())
            assert forecast.weights == sum(leaf.nbytes for leaf in jax.tree.leaves((own.params, own.state)))
            assert forecast.optimizer == sum(leaf.nbytes for leaf in jax.tree.leaves(own.opt_state))


def test_a_forecast_counts_batches_not_ticks():
    """A batch of bp stays for several ticks, and is alone."""
    pipe = make_pipeline(num_stages=3, method=methods.bp())
    pipe.init(jax.random.key(0), tiny_batches(1)[0][0])
    assert [forecast.num_memos for forecast in pipe._forecasts] == [1, 1, 0]


def test_the_callers_buffers_are_left_alone():
    """Batches may be written over as soon as `step` returns, and arrays given to it or to `init` are not donated."""
    pipe = make_pipeline(num_stages=3)
    clean = run(pipe, tiny_batches())[1]
    state, losses = pipe.init(jax.random.key(0), tiny_batches(1)[0][0]), []
    # As aligned as XLA likes it: JAX would use this memory as it is.
    memory = np.zeros(4 * 6 * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    buffer = memory[start : start + 4 * 6 * 4].view(np.float32).reshape(4, 6)
    for inputs, targets in tiny_batches():
        buffer[:] = inputs
        state, metrics = pipe.step(state, (buffer, targets))
        buffer[:] = np.nan
        losses += [metrics] if metrics else []
    _, drained = pipe.drain(state)
    assert [float(m["loss"]) for m in losses + drained] == clean

    on_device = [jax.device_put(batch, jax.devices()[0]) for batch in tiny_batches()]
    assert run(pipe, on_device)[1] == clean
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(on_device))


def test_a_stage_may_send_whole_numbers_alone():
    """Tokens prepared before an embedding: no error gradient flows back through the cut, and nothing waits for it."""
    ids = np.random.default_rng(0).integers(0, 10, (4, 6)).astype(np.int32)
    embed = nnx.Embed(10, 5, rngs=nnx.Rngs(0))
    network = [lambda x: (x + 1) % 10, embed, lambda x: x.mean(1), nnx.Linear(5, 3, rngs=nnx.Rngs(1))]
    batches = [(ids, labels) for _, labels in tiny_batches(5)]
    cut = run(make_pipeline(network, cuts=(1, 3), method=methods.fdg(1.0)), batches)[1]
    ends = run(make_pipeline(network, cuts=(3,), method=methods.fdg(1.0)), batches)[1]
    assert cut == pytest.approx(ends, rel=1e-6)
    assert cut[-1] < cut[0]


def test_weights_given_to_init_are_copied():
    pipe = make_pipeline(num_stages=2, stack=False, method=methods.fdg(0.5, "current"))
    given = jax.tree.map(jnp.array, pipe.params(pipe.init(jax.random.key(0), tiny_batches(1)[0][0])))
    before = host(given)
    state = pipe.init(jax.random.key(0), tiny_batches(1)[0][0], params=given)
    for batch in tiny_batches(4):
        state, _ = pipe.step(state, batch)
    assert_trees_close(given, before, 0)


def test_memos_are_donated_where_a_new_one_takes_their_place():
    pipe = make_pipeline(tiny_mlp(5), num_stages=3, stack=False)
    state = fed(pipe, 8)
    answered = next(memo for (k, _), memo in sorted(state.memos.items()) if k == 0)
    assert answered.saved
    pipe.step(state, tiny_batches(1)[0])
    assert all(leaf.is_deleted() for leaf in answered.saved)


def test_optimizer_states_count_each_stages_own_updates():
    """So schedules and Adam's bias correction follow the batch index on every stage (algorithms.md 12, pitfall iii)."""
    pipe = make_pipeline(num_stages=3, method=methods.fdg(), optimizer=optax.adam(0.01))
    state = fed(pipe, 7)
    counts = [int(optax.tree.get(own.opt_state, "count")) for own in state.stages]
    assert counts == [7 - 4, 7 - 3, 7 - 2]
    state, _ = pipe.drain(state)
    assert [int(optax.tree.get(own.opt_state, "count")) for own in state.stages] == [7, 7, 7]


def test_training_goes_on_after_a_drain():
    """The pipeline fills anew with the batches that follow; batch numbers, and so dropout masks, go on."""
    pipe = make_pipeline(num_stages=3)
    state = fed(pipe, 4)
    state, drained = pipe.drain(state)
    assert len(drained) == 2
    assert pipe.drain(state)[1] == []
    assert (state.fed, state.origin, state.memos, state.inbox, state.outbox) == (4, 4, {}, {}, {})
    before = host([own.params for own in state.stages])
    filling = []
    for batch in tiny_batches(3):
        state, metrics = pipe.step(state, batch)
        filling.append(metrics)
    assert filling[:2] == [None, None]
    assert filling[2] is not None
    assert_trees_close(host(state.stages[0].params), before[0], 0)
    assert [int(own.batch) for own in state.stages] == [7, 6, 5]
