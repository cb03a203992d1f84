"""Numbers that are not finite: every stage counts them, and with `skip_nonfinite` they move nothing.

That a skipped batch leaves the rest of Algorithm 1 as it is, the battery compares with the oracle.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close, host, make_pipeline, run, tiny_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import layers, methods, softmax_cross_entropy
from fdg_jax import schedule as schedules
from fdg_jax.engine import worker
from fdg_jax.engine.base import Fault, FirstFault
from fdg_jax.schedule import BACKWARD, Op

KEY = jax.random.key(0)
METHODS = {
    "bp": methods.bp(),
    **{policy: methods.fdg(policy=policy) for policy in ("stash", "current", "recompute")},
    "forward_first": methods.fdg(order="forward_first"),
}


def batches_with(bad, num=6, value=np.nan):
    batches = tiny_batches(num)
    for number in bad:
        batches[number][0][1, 2] = value
    return batches


def answers(pipe, tick, num_batches):
    """The batch that each stage answers in a tick, None where it answers none."""
    row = schedules.row(pipe.schedule, tick, num_batches)
    return [next((op.batch for op in visit if op.kind == BACKWARD), None) for visit in row]


def moving(own):
    return host((own.params, own.opt_state))


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


# With skip_nonfinite


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_answer_to_a_bad_batch_keeps_the_bits_and_every_other_moves(method):
    """Parameters, momentum and the number of updates, on every stage and in every step."""
    bad, num_batches = 2, 6
    pipe = make_pipeline(method=method, optimizer=optax.adam(0.01), skip_nonfinite=True)
    state = pipe.init(KEY, tiny_batches(1)[0][0])
    for fed, batch in enumerate(batches_with([bad], num_batches)):
        before = [moving(own) for own in state.stages]
        state, _ = pipe.step(state, batch)
        ticks = range(fed * pipe.schedule.period, (fed + 1) * pipe.schedule.period)
        for k, own in enumerate(state.stages):
            answered = {answers(pipe, tick, num_batches)[k] for tick in ticks} - {None}
            assert equal(moving(own), before[k]) == (answered <= {bad})
    state, _ = pipe.drain(state)
    assert [int(optax.tree.get(own.opt_state, "count")) for own in state.stages] == [num_batches - 1] * 3
    assert [own.counts.tolist() for own in state.stages] == [[num_batches, num_batches, 1, bad]] * 3
    assert pipe.faults(state) == [Fault(1, bad)] * 3


@pytest.mark.parametrize("num_stages", [1, 3])
def test_backpropagation_goes_on_as_if_the_batch_had_not_been(num_stages):
    ends = []
    for batches in (batches_with([2]), [batch for i, batch in enumerate(tiny_batches(6)) if i != 2]):
        pipe = make_pipeline(num_stages=num_stages, method=methods.bp(), skip_nonfinite=True)
        state, losses = run(pipe, batches)
        ends.append((pipe.params(state), [loss for loss in losses if not math.isnan(loss)]))
    assert_trees_close(*ends, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sums_leave_out_what_is_not_finite(value):
    for skip, means in ((True, 5), (False, 6)):
        pipe = make_pipeline(num_stages=2, skip_nonfinite=skip)
        state, losses = run(pipe, batches_with([2], value=value))
        _, read = pipe.read_metrics(state)
        assert read["batches"] == means
        assert len(losses) == 6
        if skip:
            assert read["loss"] == pytest.approx(np.mean([loss for loss in losses if math.isfinite(loss)]), rel=1e-6)
            assert 0 <= read["accuracy"] <= 1
        else:
            assert not math.isfinite(read["loss"])


def test_statistics_are_those_of_the_other_batches():
    """Stage 0 normalises its inputs, so that its statistics depend on nothing but the batches."""
    good = tiny_batches(6)
    ends = []
    for skip, batches in ((True, batches_with([2])), (True, good[:2] + good[3:]), (False, batches_with([2]))):
        network = [layers.BatchNorm(6, rngs=nnx.Rngs(0)), layers.Linear(6, 3, rngs=nnx.Rngs(1))]
        pipe = make_pipeline(network, num_stages=2, skip_nonfinite=skip)
        state, _ = run(pipe, batches)
        ends.append(pipe.module_state(state)[0])
    skipped, without, poisoned = ends
    assert_trees_close(skipped, without, 0)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(poisoned))


@jax.custom_vjp
def overflow(x, flag):
    """The identity, but for a gradient that is infinite where the flag is set."""
    return x


overflow.defvjp(
    lambda x, flag: (x, flag),
    lambda flag, cotangent: (jnp.where(flag.any(), jnp.inf, cotangent), np.zeros(flag.shape, jax.dtypes.float0)),
)


class Flagged(nnx.Module):
    """A linear layer beside which a flag passes; the gradient of its outputs may overflow."""

    def __init__(self, seed, overflows):
        self.linear, self.overflows = layers.Linear(6, 6, rngs=nnx.Rngs(seed)), overflows

    def __call__(self, inputs):
        x, flag = inputs
        y = self.linear(x)
        return overflow(y, flag) if self.overflows else y, flag


@pytest.mark.parametrize("at", range(3))
def test_an_overflow_is_dropped_where_it_occurs_and_in_the_stages_before(at):
    """The stages after it have moved already."""
    bad, num_stages = 3, 3
    pipe = make_pipeline(
        [Flagged(k, overflows=k == at) for k in range(num_stages)],
        num_stages=num_stages,
        loss=lambda outputs, targets: softmax_cross_entropy(outputs[0], targets),
        method=methods.fdg(),
        optimizer=optax.adam(0.01),
        skip_nonfinite=True,
    )
    batches = [((x, np.full(len(x), i == bad)), labels) for i, (x, labels) in enumerate(tiny_batches(6))]
    state, losses = run(pipe, batches)
    assert np.isfinite(losses).all()
    updates = [int(optax.tree.get(own.opt_state, "count")) for own in state.stages]
    assert updates == [5 if k <= at else 6 for k in range(num_stages)]
    assert pipe.faults(state) == [Fault(1, bad) if k <= at else Fault(0, None) for k in range(num_stages)]
    assert pipe.first_fault(state) == FirstFault(at, bad, schedules.tick_of(pipe.schedule, at, Op(BACKWARD, bad)))
    assert pipe.read_metrics(state)[1]["batches"] == 6


def test_a_stage_without_parameters_passes_the_news_on():
    network = [layers.Linear(6, 3, rngs=nnx.Rngs(0)), jnp.tanh, lambda x: 2 * x]
    pipe = make_pipeline(network, method=methods.fdg(), skip_nonfinite=True, optimizer=optax.adam(0.01))
    state, _ = run(pipe, batches_with([1, 4]))
    assert pipe.faults(state) == [Fault(2, 1)] * 3
    assert int(optax.tree.get(state.stages[0].opt_state, "count")) == 4


def test_a_loss_may_be_infinite_where_its_gradient_is_not():
    def loss(outputs, targets):
        mean = jnp.mean(outputs)
        return mean + jax.lax.stop_gradient(jnp.where(targets[0] > 0, jnp.inf, 0)), {"mean": mean}

    batches = [(x, np.full_like(labels, i == 2)) for i, (x, labels) in enumerate(tiny_batches(6))]
    pipe = make_pipeline(loss=loss, method=methods.fdg(), optimizer=optax.adam(0.01), skip_nonfinite=True)
    state, _ = run(pipe, batches)
    assert pipe.faults(state) == [Fault(1, 2)] * 3
    assert [int(optax.tree.get(own.opt_state, "count")) for own in state.stages] == [5, 5, 5]
    assert np.isfinite(list(pipe.read_metrics(state)[1].values())).all()


# Counting


@functools.cache
def pipeline(num_stages, name):
    return make_pipeline(num_stages=num_stages, method=METHODS[name], skip_nonfinite=True)


@settings(max_examples=20, deadline=None)
@given(
    num_stages=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(["bp", "stash", "forward_first"]),
    bad=st.sets(st.integers(0, 7)),
    drain_after=st.none() | st.integers(1, 7),
)
def test_every_stage_counts_what_it_answered(num_stages, name, bad, drain_after):
    """Wherever the run stands, against the rows of the picture; batch numbers go on after a drain."""
    pipe = pipeline(num_stages, name)
    state, origin, met = pipe.init(KEY, tiny_batches(1)[0][0]), 0, [[] for _ in range(num_stages)]

    def walk(ticks, num_batches):
        for tick in ticks:
            for k, batch in enumerate(answers(pipe, tick, num_batches)):
                met[k] += [origin + batch] if batch is not None and origin + batch in bad else []
        assert pipe.faults(state) == [Fault(len(of_stage), min(of_stage, default=None)) for of_stage in met]

    for number, batch in enumerate(batches_with(bad, 8)):
        if number == drain_after:
            state, _ = pipe.drain(state)
            fed = number - origin
            walk(range(fed * pipe.schedule.period, schedules.num_ticks(pipe.schedule, fed)), fed)
            origin = number
        state, _ = pipe.step(state, batch)
        fed = number - origin
        walk(range(fed * pipe.schedule.period, (fed + 1) * pipe.schedule.period), fed + 1)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_fault_is_found_in_the_picture(name):
    """The last stage meets a bad batch first, in the row of the picture that has its backward."""
    pipe = make_pipeline(method=METHODS[name], skip_nonfinite=True)
    state = pipe.init(KEY, tiny_batches(1)[0][0])
    assert pipe.first_fault(state) is None
    for batch in batches_with([1, 3], 5):
        state, _ = pipe.step(state, batch)
    rows = enumerate(schedules.unroll(pipe.schedule, 5))
    tick = next(tick for tick, row in rows if Op(BACKWARD, 1) in row[2])
    assert pipe.first_fault(state) == FirstFault(stage=2, batch=1, tick=tick)


# Without skip_nonfinite


@pytest.mark.parametrize("name", METHODS)
def test_watching_changes_no_bit(name, monkeypatch):
    ends = []
    for watched in (True, False):
        if not watched:
            monkeypatch.setattr(worker, "all_finite", lambda _: jnp.array(True))
        pipe = make_pipeline(method=METHODS[name])
        state, losses = run(pipe, tiny_batches(6))
        ends.append((pipe.params(state), [host(own.opt_state) for own in state.stages], losses))
        assert pipe.faults(state) == [Fault(0, None)] * 3
    assert_trees_close(*ends, 0)


def test_faults_are_reported_all_the_same():
    """The weights are lost from the first bad batch on, and every later answer is a fault."""
    pipe = make_pipeline()
    state, _ = run(pipe, batches_with([2]))
    assert pipe.faults(state) == [Fault(6 - 2, 2)] * 3
    assert pipe.first_fault(state) == FirstFault(2, 2, schedules.tick_of(pipe.schedule, 2, Op(BACKWARD, 2)))


@pytest.mark.parametrize("skip", [True, False])
def test_zero_times_nan_is_nan(skip):
    """Shrinking by beta = 0 hides no lost error gradient; under skip the weights do not even decay."""
    network = [layers.Linear(6, 6, rngs=nnx.Rngs(0)), layers.Linear(6, 3, rngs=nnx.Rngs(1))]
    loss = lambda outputs, targets: jnp.where(targets[0] < 9, 1.0, jnp.nan) * jnp.mean(outputs)  # noqa: E731
    pipe = make_pipeline(network, method=methods.fdg(0.0), num_stages=2, loss=loss, skip_nonfinite=skip)
    (inputs, labels), *_ = tiny_batches(1)
    before = host(pipe.init(KEY, inputs).stages[0].params)
    state, _ = run(pipe, [(inputs, np.full_like(labels, 9))])
    after = host(state.stages[0].params)
    assert equal(after, before) if skip else all(np.isnan(leaf).all() for leaf in jax.tree.leaves(after))


# The test itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_finite_number_is_called_otherwise(dtype):
    largest = jnp.finfo(dtype).max
    assert worker.all_finite({"a": jnp.full((3, 70000), largest), "b": jnp.full(3, -largest), "c": jnp.arange(3)})


@pytest.mark.parametrize("place", [0, 1, 99_999, 199_999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_among_many_is_found(place, value):
    numbers = np.ones(200_000, np.float32)
    numbers[place] = value
    assert not jax.jit(worker.all_finite)([np.ones(3, np.float32), numbers])


def test_nothing_is_finite():
    assert worker.all_finite([])
    assert worker.all_finite(None)
