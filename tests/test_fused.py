"""The fused engine is `mpmd` in one program: the same bits on these networks, the same state, the same checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, feed_of, host, make_pipeline, run, tiny_batches, tiny_mlp

from fdg_jax import methods, models
from fdg_jax.data import Feed, digits
from fdg_jax.engine import fused

ORDERS = ["update_first", "forward_first"]
METHODS = [methods.bp(), *(methods.fdg(0.5, p, o) for p in ("stash", "current", "recompute") for o in ORDERS)]


def fresh(num):
    """Batches of a tiny data set, as a list and as a feed."""
    batches = tiny_batches(num)
    return batches, feed_of(batches)


def small_resnet(dropout=False):
    blocks = models.resnet_cifar(8, rngs=nnx.Rngs(1), width=2, num_classes=10, in_shape=(8, 8, 1))
    return [*blocks[:-1], nnx.Dropout(0.5, rngs=nnx.Rngs(2)), blocks[-1]] if dropout else blocks


def in_flight(state):
    """All of a state, by its names."""
    stages = [own._replace(key=jax.random.key_data(own.key)) for own in state.stages]
    return host((stages, state.inbox, state.outbox, state.memos))


CASES = [(METHODS[0], 1), *((method, 3) for method in METHODS)]


@pytest.mark.parametrize(
    ("method", "num_stages"), CASES, ids=[f"{m.name}-{m.policy}-{i}" for i, (m, _) in enumerate(CASES)]
)
def test_fused_takes_the_steps_of_mpmd_and_leaves_its_state(method, num_stages):
    """Parameters, optimizer, counts, what is in flight, losses: bit for bit, through filling, loops and draining."""
    batches, feed = fresh(12)
    one = make_pipeline(tiny_mlp(), method=method, num_stages=num_stages, stack=False)
    two = make_pipeline(tiny_mlp(), method=method, num_stages=num_stages, stack=False, engine="fused")
    state, expected = run(one, batches, drain=False)
    other = two.init(jax.random.key(0), batches[0][0])
    losses = []
    for num in (3, 0, 1, 6, 2):
        other, metrics = two.run(other, feed, num)
        losses += [] if metrics is None else np.asarray(metrics["loss"]).tolist()
    assert losses == expected
    assert_trees_close(in_flight(other), in_flight(state), 0)
    (state, left), (other, others) = one.drain(state), two.drain(other)
    assert_trees_close(others, left, 0)
    assert_trees_close(in_flight(other), in_flight(state), 0)


@pytest.mark.parametrize("policy", ["stash", "current", "recompute"])
def test_convolutions_batchnorm_dropout_and_augmented_data(policy):
    """A resident set, augmented inside the loop; the masks and crops are those of the batch's number."""
    source = digits().augmented(1, True)
    ends = []
    for engine in ("mpmd", "fused"):
        layers = small_resnet(dropout=policy != "current")  # whose residuals Flax's Dropout would hide from it
        pipe = make_pipeline(layers, method=methods.fdg(0.5, policy), num_stages=3, engine=engine)
        state = pipe.init(jax.random.key(0), source.batch(0, 0, 8)[0])
        state, metrics = pipe.run(state, source.feed(seed=3, batch_size=8), 9)
        ends.append((in_flight(state), host(metrics)))
    assert_trees_close(ends[1], ends[0], 9 * 1e-6)  # XLA fuses the making of a batch with what reads it


def test_a_feed_makes_the_batches_of_its_source():
    source = digits().augmented(2, True)
    feed = source.feed(seed=5, batch_size=16)
    for i in (0, 7, 300):
        assert_trees_close(feed.batch(i), source.batch(5, i, 16), 0)
    assert feed.at == source.feed(seed=5, batch_size=16).at != source.feed(seed=6, batch_size=16).at


def test_a_loop_is_compiled_once_and_no_call_is_long(monkeypatch):
    """Whatever the numbers of batches; equal feeds share it; more than CAPACITY batches are several calls."""
    monkeypatch.setattr(fused, "CAPACITY", 4)
    _, feed = fresh(8)
    pipe = make_pipeline(num_stages=2, engine="fused")
    state, _ = pipe.run(pipe.init(jax.random.key(0), tiny_batches(1)[0][0]), feed, 2)
    calls = []
    advance = pipe._started()._advance
    monkeypatch.setattr(pipe._started(), "_advance", lambda *args: calls.append(args[-1]) or advance(*args))
    for num in (1, 9, 3, 4):
        state, metrics = pipe.run(state, feed, num)
        assert metrics["loss"].shape == (num,)
    assert calls == [4, 4, 1, 3, 4]  # but for one batch more that fills the pipeline
    assert pipe._started()._periods_program._cache_size() == 1


def test_a_checkpoint_of_one_engine_goes_on_in_the_other():
    batches, feed = fresh(10)
    whole = make_pipeline(num_stages=3)
    end, _ = run(whole, batches, drain=False)
    for first, second in (("mpmd", "fused"), ("fused", "mpmd")):
        one, two = (make_pipeline(num_stages=3, engine=engine) for engine in (first, second))
        state, _ = one.run(one.init(jax.random.key(0), batches[0][0]), feed, 7)
        snapshot = one.snapshot(state)
        state = two.restore(
            two.init(jax.random.key(0), batches[0][0]), type(snapshot)(host(snapshot.arrays), snapshot.record)
        )
        state, _ = two.run(state, feed, 3)
        assert_trees_close(in_flight(state), in_flight(end), 0)


def test_what_comes_between_two_calls_leaves_them_what_they_are():
    """Predictions, readings of the metrics, draining and filling anew, a batch of NaN that is skipped; remat."""
    batches, _ = fresh(9)
    batches[6][0][:] = np.nan
    feed = feed_of(batches)
    ends = []
    for engine in ("mpmd", "fused"):
        pipe = make_pipeline(num_stages=2, engine=engine, remat=("full", "none"), skip_nonfinite=True)
        state, seen = pipe.init(jax.random.key(0), batches[0][0], first_batch=18), []
        for num in (8, 5):
            state, _ = pipe.run(state, feed, num)
            seen.append(pipe.predict(state, batches[0][0]))
            state, means = pipe.read_metrics(state)
            seen.append(means)
            state, _ = pipe.drain(state)
        assert [fault.count for fault in pipe.faults(state)] == [1, 1]
        ends.append((in_flight(state), host(seen)))
    assert_trees_close(ends[1], ends[0], 1e-6)


def test_data_of_another_device_are_moved_once():
    batches, feed = fresh(8)
    feed = Feed(jax.device_put(feed.data, jax.devices()[2]), feed.at)
    pipe = make_pipeline(num_stages=2, engine="fused", devices=jax.devices()[1:])
    state = pipe.init(jax.random.key(0), batches[0][0])
    state, metrics = pipe.run(state, feed, 6)
    assert metrics["loss"].devices() == {jax.devices()[1]}
    moved = pipe._started()._moved[1]
    pipe.run(state, feed, 2)
    assert pipe._started()._moved[1] is moved


def test_no_batches_pin_no_shapes():
    _, feed = fresh(2)
    pipe = make_pipeline(num_stages=2, engine="fused")
    assert pipe.run(pipe.init(jax.random.key(0), tiny_batches(1)[0][0]), feed, 0)[1] is None
    assert pipe._targets is None


def test_old_weights_are_stored_as_often_as_in_mpmd():
    """A snapshot counts each array once, so that its size shows what two places share."""
    batches, feed = fresh(9)
    sizes = []
    for engine in ("mpmd", "fused"):
        pipe = make_pipeline(num_stages=3, engine=engine)
        state, _ = pipe.run(pipe.init(jax.random.key(0), batches[0][0]), feed, 9)
        held = {id(leaf) for memo in state.memos.values() for leaf in memo.held}
        own = {id(leaf) for stage in state.stages for leaf in jax.tree.leaves(stage.params)}
        sizes.append(len(held & own))
    assert sizes[0] == sizes[1] > 0


FOREIGN = [methods.bp(), methods.fdg(0.5), methods.fdg(0.5, "recompute"), methods.gpipe(2), methods.pipedream()]


@pytest.mark.parametrize("method", FOREIGN, ids=[f"{method.name}-{method.policy}" for method in FOREIGN])
def test_foreign_convolutions_run_a_period_a_call_on_a_cpu(method, monkeypatch):
    """XLA:CPU runs their gradients up to 80 times slower in a loop; the steps are those of mpmd, in one program."""
    monkeypatch.setattr(fused.Fused, "_loop", None)
    feed, ends = digits().feed(0, 4), []
    for engine in ("mpmd", "fused"):
        layers = [
            nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0)),
            lambda x: x.reshape(len(x), -1),
            nnx.Linear(128, 10, rngs=nnx.Rngs(1)),
        ]
        pipe = make_pipeline(layers, method=method, num_stages=2, engine=engine)
        state = pipe.init(jax.random.key(0), feed.batch(0)[0])
        state, metrics = pipe.run(state, feed, 9)
        ends.append((in_flight(state), host(metrics)))
    assert_trees_close(ends[1], ends[0], 9 * 1e-6)
    before = {key: program.compiled._cache_size() for key, program in pipe._started().programs.items()}
    pipe.run(state, feed, 5)
    assert pipe._started()._period_program._cache_size() == 1
    assert {key: program.compiled._cache_size() for key, program in pipe._started().programs.items()} == before


def test_a_user_s_arrays_are_not_overwritten():
    inputs, targets = jax.tree.map(jnp.asarray, tiny_batches(1)[0])
    feed = Feed((inputs, targets), lambda data, i: data)
    pipe = make_pipeline(num_stages=3, engine="fused")
    state = pipe.init(jax.random.key(0), inputs)
    for _ in range(5):
        state, _ = pipe.step(state, (inputs, targets))
    state, _ = pipe.run(state, feed, 6)
    assert not inputs.is_deleted()
    np.testing.assert_array_equal(inputs, tiny_batches(1)[0][0])


def test_every_stage_is_on_the_first_device():
    pipe = make_pipeline(num_stages=3, engine="fused", devices=jax.devices()[1:])
    assert set(pipe.devices) == {jax.devices()[1]}


def test_auto_is_mpmd_on_cpu_devices_and_fused_on_one_accelerator(monkeypatch):
    assert make_pipeline(engine="auto").engine == "mpmd"
    assert make_pipeline(engine="auto", devices=jax.devices()[:1]).engine == "mpmd"

    class Accelerator(type(jax.devices()[0])):
        platform = "gpu"

    from fdg_jax import pipeline

    assert pipeline.choose_engine("auto", [Accelerator]) == "fused"
    assert pipeline.choose_engine("auto", [Accelerator, Accelerator, object]) == "mpmd"


@pytest.mark.parametrize(
    ("feed", "num", "line"),
    [
        (fresh(2)[1], -1, "num_batches must be 0 or more; got -1"),
        (Feed(fresh(2)[1].data, lambda data, i: data[0][0]), 1, r"a batch is a pair"),
        (tiny_batches(2), 1, "feed must be a `Feed`"),
    ],
)
def test_what_is_wrong_gets_one_line(feed, num, line):
    pipe = make_pipeline(num_stages=2, engine="fused")
    state = pipe.init(jax.random.key(0), tiny_batches(1)[0][0])
    with pytest.raises((ValueError, TypeError), match=line):
        pipe.run(state, feed, num)
    pipe.step(state, tiny_batches(1)[0])
