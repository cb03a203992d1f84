"""A delay that ends: the pipeline is drained after so many batches, and goes on as backpropagation."""

from dataclasses import replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, feed_of, host, in_float64, make_pipeline, tiny_batches, tiny_mlp
from oracle import Module, cross_entropy, fdg, hidden_layer, linear_layer

from fdg_jax import corrections, methods, optim, schedule
from fdg_jax.corrections import (
    DelayCompensation,
    LearningRateDamping,
    LearningRateShrinking,
    LinearPrediction,
    Nesterov,
    Shrink,
    SpikeCompensation,
    SwitchToSynchronous,
    WeightPrediction,
)
from fdg_jax.snapshot import Snapshot

KEY = jax.random.key(0)
ENGINES = ["mpmd", "fused"]
AFTER, NUM = 5, 9


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def switching(method, after=AFTER):
    return method.with_corrections(SwitchToSynchronous(after))


def backpropagation(modules, batches):
    for x, labels in batches:
        for module in modules:
            x = module.forward(x)
        loss, cotangent = jax.value_and_grad(cross_entropy)(x, labels)
        for module in reversed(modules):
            cotangent = module.answer(cotangent, judged=cotangent)
        yield loss


@pytest.mark.parametrize(
    ("order", "engine"), [("update_first", "mpmd"), ("update_first", "fused"), ("forward_first", "mpmd")]
)
@pytest.mark.usefixtures("x64")
def test_fdg_and_then_backpropagation_equal_the_oracle_after_every_batch(order, engine):
    optimizer, batches = optim.sgd(0.1, 0.9, 1e-2), tiny_batches(NUM)
    policy = "stash" if order == "update_first" else "current"
    pipe = make_pipeline(
        in_float64(tiny_mlp(3, dtype=jnp.float64)),
        cuts=(1, 2),
        method=switching(methods.fdg(0.5, policy, order)),
        optimizer=optimizer,
        engine=engine,
    )
    state, feed = pipe.init(KEY, batches[0][0]), feed_of(batches)
    steps = [[hidden_layer()], [hidden_layer()], [hidden_layer(), linear_layer()]]
    params = iter(pipe.params(state))
    modules = [Module(each, list(islice(params, len(each))), optimizer, policy) for each in steps]
    delayed, exact = fdg(modules, batches[:AFTER], 0.5, order), backpropagation(modules, batches[AFTER:])
    for i in range(NUM):
        if i < AFTER - 1:
            losses = [next(delayed)]
        elif i == AFTER - 1:
            losses = list(delayed)
        else:
            losses = [next(exact)]
        state, metrics = pipe.run(state, feed, 1)
        found = [] if metrics is None else metrics["loss"].tolist()
        np.testing.assert_allclose(found, [loss for loss in losses if loss is not None], rtol=1e-6)
        expected = [p for module in modules for p in module.params]
        for a, b in zip(jax.tree.leaves(pipe.params(state)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9, err_msg=f"after batch {i}")
        if i >= AFTER - 1:
            assert not state.memos
    state, totals = pipe.read_metrics(state)
    assert totals["batches"] == NUM


def grouped(method):
    """The method without its delay: as many batches an update, all on the same weights."""
    made = partial(schedule.gpipe, group=method.schedule(3).group)
    return replace(method, schedule=made, policy="stash", beta=1.0, vertical_sync=False, corrections=())


CASES = {
    "ddg": methods.ddg("current"),
    "adl": methods.adl(2, 0.5),
    "vertical_sync": methods.pipedream(vertical_sync=True),
    "2bw": methods.pipedream_2bw(4),
    "shrink": methods.fdg().with_corrections(Shrink(0.5), LearningRateShrinking(0.5), DelayCompensation()),
    "damping": methods.fdg().with_corrections(LearningRateDamping(0.5, fade=30), WeightPrediction("held")),
    "lines": methods.pipelined_bp(corrections=(LinearPrediction("weights"), LearningRateDamping())),
}


@pytest.mark.parametrize("name", CASES)
def test_what_comes_after_is_exact(name):
    """As if another pipeline, which never had a delay, went on from the drained weights; SGD keeps nothing else."""
    method, after = CASES[name], 4
    batches = tiny_batches(8, size=8)
    kwargs = {"optimizer": optim.sgd(0.05, 0.0, 1e-2)}
    delayed, exact = make_pipeline(method=method, **kwargs), make_pipeline(method=grouped(method), **kwargs)
    state = delayed.init(KEY, batches[0][0])
    for batch in batches[:after]:
        state, _ = delayed.step(state, batch)
    state, _ = delayed.drain(state)
    middle = delayed.params(state)
    state = exact.init(KEY, batches[0][0], params=middle, first_batch=after)
    for batch in batches[after:]:
        state, _ = exact.step(state, batch)
    end = exact.params(exact.drain(state)[0])

    pipe = make_pipeline(method=switching(method, after), **kwargs)
    state = pipe.init(KEY, batches[0][0])
    for i, batch in enumerate(batches):
        state, _ = pipe.step(state, batch)
        if i == after - 1:
            assert not state.memos
            assert_trees_close(pipe.params(state), middle, 0)
    assert not any(own.previous for own in state.stages)
    assert_trees_close(pipe.params(pipe.drain(state)[0]), end)


RATE = 0.1
PLAIN = optim.sgd(RATE, 0.9, 1e-2)
WRAPPERS = [
    LearningRateShrinking(0.5),
    LearningRateDamping(),
    LearningRateDamping(fade=9),
    WeightPrediction("held"),
    LinearPrediction(),
    LinearPrediction("weights"),
    SpikeCompensation(),
]


@pytest.mark.parametrize(
    "used", [*([each] for each in WRAPPERS), [SpikeCompensation(), LinearPrediction("weights")]], ids=repr
)
def test_an_optimizer_goes_on_with_its_state_and_without_corrections(used):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    gradients = [{"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)} for _ in range(6)]
    delayed = corrections.correct_optimizer(used, PLAIN, 3, 0, 3)
    exact = corrections.synchronous_optimizer(used, PLAIN, 3, 0, 3)
    state, plain = delayed.init(params), PLAIN.init(params)
    assert jax.tree.structure(exact.init(params)) == jax.tree.structure(state)
    for n, gradient in enumerate(gradients):
        expected, plain = PLAIN.update(gradient, plain, params)
        updates, new = jax.jit((delayed if n < 3 else exact).update)(gradient, state, params)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state = new
        if n >= 3:
            assert_trees_close(updates, expected)


def test_what_makes_the_optimizer_stays():
    made = corrections.synchronous_optimizer([Nesterov(0.95, low=0.8)], optim.sgd(RATE, 0.0), 3, 0, 3)
    expected = corrections.correct_optimizer([Nesterov(0.8)], optim.sgd(RATE, 0.0), 0, 0, 3)
    ours, theirs = made.init(jnp.ones(2)), expected.init(jnp.ones(2))
    params = jnp.ones(2)
    for gradient in (jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0])):
        (a, ours), (b, theirs) = (o.update(gradient, s, params) for o, s in ((made, ours), (expected, theirs)))
        assert_trees_close(a, b)


# Metrics, engines, checkpoints


def everything(state):
    stages = [own._replace(key=jax.random.key_data(own.key)) for own in state.stages]
    return host((state.fed, state.origin, stages, state.inbox, state.outbox, state.memos))


def test_a_step_at_the_switch_reports_the_mean_of_what_left():
    batches, method = tiny_batches(NUM), switching(methods.fdg(0.5))
    stepping, running = make_pipeline(method=method), make_pipeline(method=method)
    state, all_ = running.run(running.init(KEY, batches[0][0]), feed_of(batches), NUM)
    state, reported = stepping.init(KEY, batches[0][0]), []
    for batch in batches:
        state, metrics = stepping.step(state, batch)
        reported.append(metrics and float(metrics["loss"]))
    losses = all_["loss"].tolist()
    assert len(losses) == NUM
    assert reported[:2] == [None, None]
    assert reported[2:4] + reported[5:] == losses[:2] + losses[5:]
    np.testing.assert_allclose(reported[4], np.mean(losses[2:5]), rtol=1e-6)


@pytest.mark.parametrize("name", ["adl", "vertical_sync"])
def test_both_engines_and_checkpoints_go_through_the_switch(name):
    """Taken before it, at it, and after it: with an update half done where two batches make a group."""
    batches, method = tiny_batches(10), switching(CASES[name], 4)
    feed = feed_of(batches)
    whole = make_pipeline(method=method)
    end, expected = whole.run(whole.init(KEY, batches[0][0]), feed, 10)
    for num, first, second in ((3, "mpmd", "fused"), (4, "fused", "mpmd"), (7, "mpmd", "fused")):
        one, two = make_pipeline(method=method, engine=first), make_pipeline(method=method, engine=second)
        state, begun = one.run(one.init(KEY, batches[0][0]), feed, num)
        taken = one.snapshot(state)
        state = two.restore(two.init(jax.random.key(5), batches[0][0]), Snapshot(host(taken.arrays), taken.record))
        state, ended = two.run(state, feed, 10 - num)
        losses = np.concatenate([each["loss"] for each in (begun, ended) if each])
        np.testing.assert_allclose(losses, expected["loss"], rtol=1e-5)
        assert_trees_close(everything(state), everything(end), 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_after_nothing_it_is_backpropagation(engine):
    ends = []
    for method in (switching(methods.pipedream(vertical_sync=True), 0), methods.bp()):
        pipe = make_pipeline(method=method, engine=engine)
        state, metrics = pipe.run(pipe.init(KEY, tiny_batches(1)[0][0]), feed_of(tiny_batches(4)), 4)
        ends.append((everything(state), host(metrics)))
    assert_trees_close(*ends, 0)


def test_a_run_that_begins_late_begins_synchronous():
    batches = tiny_batches(1)
    pipe = make_pipeline(method=switching(methods.fdg(0.5)))
    for first, answered in ((AFTER - 1, True), (AFTER, True), (AFTER - 2, False)):
        state, metrics = pipe.step(pipe.init(KEY, batches[0][0], first_batch=first), batches[0])
        assert (metrics is not None) == answered
        assert bool(state.memos) != answered


def test_a_fault_after_the_switch_has_its_tick():
    """Four batches and their draining take 8 ticks, a batch of backpropagation 5, the last stage has it in the 3rd."""
    batches = tiny_batches(7)
    batches[5] = (np.full_like(batches[5][0], np.nan), batches[5][1])
    pipe = make_pipeline(method=switching(methods.fdg(0.5), 4), skip_nonfinite=True)
    state = pipe.init(KEY, batches[0][0])
    for batch in batches:
        state, _ = pipe.step(state, batch)
    assert pipe.first_fault(state) == (2, 5, 8 + 5 + 2)


def test_no_delay_no_switch():
    for method in (methods.dgl("linear"), methods.dni()):
        with pytest.raises(ValueError, match=f"ends a delay, and {method.name} has none; leave it out, or go on"):
            make_pipeline(method=switching(method))


@pytest.mark.parametrize("method", [methods.bp(), methods.gpipe(2)])
def test_what_is_synchronous_stays_as_it_is(method):
    ends = []
    for each in (method, switching(method, 2)):
        pipe = make_pipeline(method=each)
        state = pipe.init(KEY, tiny_batches(1)[0][0])
        for batch in tiny_batches(4):
            state, _ = pipe.step(state, batch)
        ends.append(pipe.params(state))
    assert_trees_close(*ends)


def test_an_optimizer_of_any_kind_goes_through():
    batches = tiny_batches(7)
    used = (LearningRateDamping(fade=5), WeightPrediction("held"))
    pipe = make_pipeline(method=switching(methods.fdg().with_corrections(*used), 3), optimizer=optax.adamw(1e-2))
    state, metrics = pipe.run(pipe.init(KEY, batches[0][0]), feed_of(batches), 7)
    assert metrics["loss"].shape == (7,)
    counts = [leaf for leaf in jax.tree.leaves(state.stages[0].opt_state) if leaf.dtype == jnp.int32]
    assert {int(count) for count in counts} == {7}
