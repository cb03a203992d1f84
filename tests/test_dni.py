"""Predicted error gradients in the engines: their schedule, the paper's equations, and backpropagation in the limit."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close, feed_of, host, in_float64, make_pipeline, tiny_batches, tiny_mlp
from oracle import Module, hidden_layer, linear_layer
from oracle_local import Added, deep_synthesiser, dni, linear_synthesiser, mean_square_error
from test_local import perfect

from fdg_jax import layers, methods, optim, schedule
from fdg_jax.engine.base import Fault
from fdg_jax.snapshot import Snapshot
from fdg_jax.timeline import Link, StageCost, steady

KEY = jax.random.key(0)
ENGINES = ["mpmd", "fused"]
CLASSES = 3


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def set_synthesisers(state, phi, learning_rate):
    """The state with these parameters of synthesisers, in their dtype, as if nothing had been learnt yet."""
    stages = list(state.stages)
    for k, params in enumerate(phi):
        own, dtype = stages[k], jax.tree.leaves(params)[0].dtype
        running = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), own.synthesis.state)
        fresh = own.synthesis._replace(params=params, state=running, opt_state=optax.adam(learning_rate).init(params))
        stages[k] = own._replace(synthesis=jax.device_put(host(fresh), own.counts.device))
    return replace(state, stages=tuple(stages))


# The schedule


def test_the_picture_for_three_stages():
    lines = [line.split("  ") for line in schedule.show(schedule.dni(3), 9, 3).splitlines()[1:]]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["0", "F0 B0 U"],
        ["1", "F1 B1 U", "F0 B0 U"],
        ["2", "S0 F2 B2 U", "F1 B1 U", "F0 B0 U"],
        ["3", "S1", "S0 F2 B2 U", "F1 B1 U"],
        ["4", "S2", "S1", "F2 B2 U"],
        ["5", "S2"],
    ]


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_nothing_is_late_and_outputs_are_kept_for_two_batches(num_stages):
    made = schedule.dni(num_stages)
    schedule.validate(made)
    assert schedule.delay(made) == schedule.staleness(made) == (0,) * num_stages
    assert schedule.depth(made) == (2,) * (num_stages - 1) + (1,)
    assert schedule.num_ticks(made, 7) == 7 + num_stages - (num_stages == 1)


@pytest.mark.parametrize(
    ("k", "offset", "line"), [(0, 1, "stage 0 runs S0 in tick 1, before stage 1's B0"), (1, 2, "")]
)
def test_a_synthesis_waits_for_the_error_gradient(k, offset, line):
    made = schedule.dni(3)
    slots = tuple(slot._replace(offset=offset) if slot.kind == "S" else slot for slot in made.stages[k])
    with pytest.raises(ValueError, match=line or "stage 1 runs S0 in tick 2, before stage 2's B0 can be read"):
        schedule.validate(replace(made, stages=(*made.stages[:k], slots, *made.stages[k + 1 :])))


def test_a_stage_takes_as_long_as_its_synthesis_too():
    result = steady(schedule.dni(3), [StageCost(1.0, 2.0, synthesis=1.5)] * 3)
    assert result.batch_seconds == 4.5
    assert result.busy == (1.0, 1.0, 3 / 4.5)


def test_a_synthesis_waits_for_its_message():
    """From a visit of stage 0 over stage 1 and two links to the visit after the next."""
    result = steady(schedule.dni(2), [StageCost(1.0, 2.0, synthesis=1.5)] * 2, Link(latency=10.0))
    np.testing.assert_allclose(result.batch_seconds, (4.5 + 10 + 3 + 10) / 2)


# The equations


@pytest.mark.parametrize(
    ("kind", "oracle", "context", "engine"),
    [
        ("deep", deep_synthesiser, True, "mpmd"),
        ("deep", deep_synthesiser, True, "fused"),
        ("linear", linear_synthesiser, False, "mpmd"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_every_batch_equals_the_oracle(kind, oracle, context, engine):
    rate, optimizer, batches = 0.02, optim.sgd(0.1, 0.9, 1e-2), tiny_batches(9)
    method = methods.dni(kind, context, rate, width=7)
    network = in_float64(tiny_mlp(2, dtype=jnp.float64))
    pipe = make_pipeline(network, method=method, optimizer=optimizer, engine=engine)
    state = pipe.init(KEY, batches[0][0])
    phi = jax.tree.map(lambda leaf: np.float64(leaf), host([own.synthesis.params for own in state.stages[:-1]]))
    state = set_synthesisers(state, phi, rate)
    steps = [[hidden_layer()], [hidden_layer()], [linear_layer()]]
    modules = [Module(s, [p], optimizer, "stash") for s, p in zip(steps, pipe.params(state), strict=True)]
    synthesisers = [Added(oracle, params, optax.adam(rate)) for params in phi]

    def compare(state, context):
        theta = [module.params[0] for module in modules]
        learnt = [synthesiser.params for synthesiser in synthesisers]
        ours = [own.synthesis.params for own in state.stages[:-1]]
        for a, b in zip(jax.tree.leaves((pipe.params(state), ours)), jax.tree.leaves((theta, learnt)), strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-9, err_msg=context)

    losses, expected, start = [], [], 0
    for num in (6, 3):  # what is drained fills anew
        run = dni(modules, synthesisers, batches[start : start + num])
        for i in range(start, start + num):
            expected.append(next(run))
            state, metrics = pipe.run(state, feed_of(batches), 1)
            losses += [] if metrics is None else metrics["loss"].tolist()
            compare(state, f"after batch {i}")
        state, left = pipe.drain(state)
        losses += [float(metrics["loss"]) for metrics in left]
        expected += run
        assert not state.memos
        assert not state.inbox
        assert not state.outbox
        compare(state, f"drained of {num}")
        start += num
    np.testing.assert_allclose(losses, [loss for loss in expected if loss is not None], rtol=1e-6)
    moved = [np.abs(own.synthesis.params["last"]["kernel"]).max() for own in state.stages[:-1]]
    assert min(moved) > 0.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("x64")
def test_perfect_synthesisers_take_the_steps_of_backpropagation(engine):
    """A linear network, a quadratic loss; in step i stage k has batch i - k, for the weights that it will meet."""
    optimizer, rng, widths = optim.sgd(0.05, 0.9), np.random.default_rng(0), (6, 5, 4, CLASSES)
    batches = [(rng.normal(size=(4, 6)), rng.normal(size=(4, CLASSES))) for _ in range(6)]
    network = [layers.Linear(a, b, rngs=nnx.Rngs(a), dtype=jnp.float64) for a, b in pairwise(widths)]
    method = methods.dni("linear", learning_rate=0.0)
    pipe = make_pipeline(in_float64(network), loss=mean_square_error, optimizer=optimizer, method=method, engine=engine)
    state = pipe.init(KEY, batches[0][0])

    def loss(theta, x, y):
        for p in theta:
            x = x @ p["kernel"] + p["bias"]
        return mean_square_error(x, y)

    versions = [pipe.params(state)]
    opt_state = optimizer.init(versions[0])
    for x, y in batches:
        updates, opt_state = optimizer.update(jax.grad(loss)(versions[-1], x, y), opt_state, versions[-1])
        versions.append(optax.apply_updates(versions[-1], updates))
    for i in range(len(batches)):
        phi = [
            jax.tree.map(np.float64, perfect(jax.tree.map(jnp.asarray, versions[max(i - k, 0)]), k, 4))
            for k in range(2)
        ]
        state, _ = pipe.run(set_synthesisers(state, phi, 0.0), feed_of(batches), 1)
    for k, params in enumerate(pipe.params(state)):
        expected = versions[len(batches) - k][k]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), params, host(expected))


def test_the_first_estimates_are_zero():
    """Batches 0 and 1 meet a synthesiser that has learnt nothing; the last stage learns, and teaches stage 1 alone."""
    pipe = make_pipeline(method=methods.dni(learning_rate=0.1, width=4), optimizer=optim.sgd(0.1, 0.9))
    state = pipe.init(KEY, tiny_batches(1)[0][0])
    before, phi = pipe.params(state), host([own.synthesis.params for own in state.stages[:-1]])
    for batch in tiny_batches(2):
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    after, learnt = pipe.params(state), [own.synthesis.params["last"] for own in state.stages[:-1]]
    assert_trees_close(after[: pipe.cuts[1]], before[: pipe.cuts[1]], 0)
    assert np.abs(after[-1]["kernel"] - before[-1]["kernel"]).max() > 1e-3
    assert_trees_close(host(learnt[0]), phi[0]["last"], 0)
    assert np.abs(host(learnt[1])["kernel"]).max() > 1e-3
    for batch in tiny_batches(3):
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    after = pipe.params(state)[: pipe.cuts[1]]
    assert not np.array_equal(jax.tree.leaves(after)[-1], jax.tree.leaves(before[: pipe.cuts[1]])[-1])


# What the engines owe


def fresh(engine="mpmd", **kwargs):
    return make_pipeline(method=methods.dni(learning_rate=0.01, width=4), engine=engine, **kwargs)


def everything(state):
    stages = [own._replace(key=jax.random.key_data(own.key)) for own in state.stages]
    return host((stages, state.inbox, state.outbox, state.memos))


def test_a_checkpoint_in_flight_goes_on_in_either_engine():
    batches = tiny_batches(10)
    feed = feed_of(batches)
    whole = fresh()
    end, expected = whole.run(whole.init(KEY, batches[0][0]), feed, 10)
    for first, second in (("mpmd", "fused"), ("fused", "mpmd")):
        one, two = fresh(first), fresh(second)
        state, _ = one.run(one.init(KEY, batches[0][0]), feed, 6)
        taken = one.snapshot(state)
        assert taken.in_flight.startswith("4 memos")
        state = two.restore(two.init(jax.random.key(5), batches[0][0]), Snapshot(host(taken.arrays), taken.record))
        state, metrics = two.run(state, feed, 4)
        assert_trees_close(host(metrics["loss"]), host(expected["loss"])[-4:])
        assert_trees_close(everything(state), everything(end), 1e-5)


def test_a_checkpoint_need_not_have_what_a_method_has_not():
    """As those from before there were synthesisers."""
    pipe, inputs = make_pipeline(num_stages=1, method=methods.bp()), tiny_batches(1)[0][0]
    state = pipe.init(KEY, inputs)
    taken, before = pipe.snapshot(state), everything(state)
    for stage in taken.record["stages"]:
        del stage["synthesis"], stage["previous"], stage["accumulated"]
    found = pipe.restore(pipe.init(jax.random.key(5), inputs), Snapshot(host(taken.arrays), taken.record))
    assert_trees_close(everything(found), before, 0)


def test_a_batch_that_is_not_finite_teaches_nobody():
    batches = tiny_batches(8)
    batches[2] = (np.full_like(batches[2][0], np.nan), batches[2][1])
    pipe = fresh(skip_nonfinite=True)
    state = pipe.init(KEY, batches[0][0])
    for batch in batches:
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    assert pipe.faults(state) == [Fault(1, 2)] * 3
    finite = [np.isfinite(leaf).all() for own in state.stages for leaf in jax.tree.leaves((own.params, own.synthesis))]
    assert all(finite)
    counts = [int(own.synthesis.opt_state[0].count) for own in state.stages[:-1]]
    assert counts == [7, 7]


def test_the_memory_forecast_counts_what_is_kept():
    pipe = make_pipeline(method=methods.dni("linear", context=False))
    batches = tiny_batches(5)
    state = pipe.init(KEY, batches[0][0])
    for batch in batches:
        state, _ = pipe.step(state, batch)
    for k, forecast in enumerate(pipe._forecasts):
        kept = [memo for (stage, _), memo in state.memos.items() if stage == k]
        assert len(kept) == forecast.num_memos == (2 if k < 2 else 0)
        assert sum(leaf.nbytes for memo in kept for leaf in jax.tree.leaves(memo)) == forecast.memos
        phi = state.stages[k].synthesis
        assert (forecast.weights > sum(leaf.nbytes for leaf in jax.tree.leaves(state.stages[k].params))) == bool(phi)
    assert "S0 F2 B2 U" in pipe.show()


def test_without_context_stages_get_no_targets():
    pipe = make_pipeline(method=methods.dni("linear", context=False))
    state = pipe.init(KEY, tiny_batches(1)[0][0])
    for batch in tiny_batches(4):
        state, _ = pipe.step(state, batch)
    assert {k for kind, k, _ in (*state.inbox, *state.outbox) if kind == "targets"} == {2}


def test_one_stage_is_backpropagation():
    ends = []
    for method in (methods.dni(), methods.bp()):
        pipe = make_pipeline(method=method, num_stages=1)
        state, _ = pipe.run(pipe.init(KEY, tiny_batches(1)[0][0]), feed_of(tiny_batches(4)), 4)
        ends.append(pipe.params(state))
    assert_trees_close(*ends, 0)


def test_what_is_wrong_gets_one_line():
    for arguments, line in (
        ({"kind": "depe"}, "unknown synthesiser 'depe'; did you mean 'deep'"),
        ({"learning_rate": -1.0}, "learning_rate of the synthesisers must be a number and not negative; got -1.0"),
        ({"width": 0}, "width must be a whole number, at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=line):
            methods.dni(**arguments)
    pipe = make_pipeline(loss=lambda outputs, targets: jnp.mean(outputs**2), method=methods.dni("linear"))
    inputs, labels = tiny_batches(1)[0]
    with pytest.raises(ValueError, match=r"label context reads targets that are one array; .* use methods.dni\(co"):
        pipe.step(pipe.init(KEY, inputs), (inputs, (labels, labels)))


def test_the_name_says_all():
    assert str(methods.dni()) == "dni(deep, context, learning_rate=0.0001, width=128)"
