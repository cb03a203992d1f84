"""A state taken at any moment and put back, here or in another process, goes on as if nothing had happened."""

import copy
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resume_script
from flax import nnx
from helpers import assert_trees_close, host, make_pipeline, run, tiny_batches, tiny_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from resume_script import BATCHES, CASES, HALF, blocks, outcome, train

from fdg_jax import layers, methods, optim, softmax_cross_entropy
from fdg_jax import snapshot as snapshots
from fdg_jax.agreement import Mismatch
from fdg_jax.checkpoint import Checkpoints
from fdg_jax.engine.base import NO_FAULT, FirstFault
from fdg_jax.snapshot import Snapshot, weights

KEY = jax.random.key(0)
POLICIES = ["stash", "current", "recompute"]


def through_json(snapshot):
    """As it comes back from a file: the arrays on the host, the record parsed anew."""
    return Snapshot([aligned(np.asarray(leaf)) for leaf in snapshot.arrays], json.loads(json.dumps(snapshot.record)))


def aligned(array):
    """A copy at an address that JAX, on a CPU device, would use as it is."""
    room = np.empty(array.nbytes + 64, np.uint8)
    begin = -room.ctypes.data % 64
    copied = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(value, other[name], err_msg=name)


# In another process


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Of every case, what comes of 2N batches straight, and of N here and N more in another process."""
    folder = tmp_path_factory.mktemp("cases")
    straight = {}
    for name in CASES:
        pipe, state = resume_script.begin(name, seed=0)
        state, _ = train(pipe, state, BATCHES[:HALF])
        checkpoints = Checkpoints(folder / name)
        checkpoints.save(HALF, pipe.snapshot(state), {})
        straight[name] = outcome(pipe, *train(pipe, state, BATCHES[HALF:]))
        checkpoints.wait()
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "error", str(here / "resume_script.py"), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return straight, {name: dict(np.load(folder / f"{name}.npz")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_another_process_goes_on_with_the_same_bits(name, halves):
    """Parameters, optimizer state, statistics, everything in flight, the metrics of every step and their means."""
    straight, resumed = (half[name] for half in halves)
    assert any("opt_state" in leaf and "mu" in leaf for leaf in straight)
    assert any("norm" in leaf and "var" in leaf for leaf in straight)
    assert all(np.isfinite(value) for leaf, value in straight.items() if "totals" in leaf)
    assert_same(straight, resumed)


# At any moment


@pytest.mark.parametrize(
    "method", [*[methods.fdg(policy=policy) for policy in POLICIES], methods.fdg(order="forward_first")], ids=str
)
def test_saved_after_any_batch_of_filling_steady_state_or_draining_it_goes_on_the_same(method):
    pipe = make_pipeline(blocks(0), method=method, optimizer=optax.adam(0.01))
    fresh = pipe.init(jax.random.key(1), BATCHES[0][0])
    state = pipe.init(KEY, BATCHES[0][0])
    snapshots = [pipe.snapshot(state)]
    reported = []
    for batch in BATCHES[:7]:
        state, metrics = pipe.step(state, batch)
        reported.append(metrics)
        snapshots.append(pipe.snapshot(state))
    state, drained = pipe.drain(state)
    after_drain = pipe.snapshot(state)
    straight = outcome(pipe, state, reported + drained)
    for done, snapshot in enumerate(snapshots):
        state = pipe.restore(fresh, through_json(snapshot))
        assert_same(outcome(pipe, state, []), outcome(pipe, pipe.restore(fresh, snapshot), []))
        state, more = train(pipe, state, BATCHES[done:7])
        state, drained = pipe.drain(state)
        assert_same(outcome(pipe, state, reported[:done] + more + drained), straight)
    assert after_drain.in_flight == ""
    again = [train(pipe, state, BATCHES) for state in (state, pipe.restore(fresh, through_json(after_drain)))]
    assert_same(*[outcome(pipe, *ended) for ended in again])


ACTIONS = ["step", "drain", "read", "predict", "snapshot", "restore"]


@pytest.fixture(scope="module")
def pipes():
    found = {}
    for policy in POLICIES:
        pipe = make_pipeline(blocks(0), method=methods.fdg(policy=policy), optimizer=optax.adam(0.01))
        found[policy] = pipe, pipe.init(jax.random.key(1), BATCHES[0][0])
    return found


@settings(deadline=None, max_examples=12)
@given(actions=st.lists(st.sampled_from(["step", *ACTIONS]), max_size=14), policy=st.sampled_from(POLICIES))
def test_saving_and_restoring_among_anything_else_changes_no_bit(pipes, actions, policy):
    pipe, fresh = pipes[policy]

    def follow(actions):
        state = pipe.restore(fresh, start)
        seen, batches = [], iter(BATCHES * 2)
        for action in actions:
            if action == "step":
                state, metrics = pipe.step(state, next(batches))
                seen.append(metrics)
            elif action == "drain":
                state, metrics = pipe.drain(state)
                seen += metrics
            elif action == "read":
                state, means = pipe.read_metrics(state)
                seen.append({"loss": np.nan, **means})
            elif action == "predict":
                pipe.predict(state, BATCHES[0][0])
            elif action == "snapshot":
                pipe.snapshot(state)
            else:
                state = pipe.restore(fresh, through_json(pipe.snapshot(state)))
        return outcome(pipe, state, seen)

    start = through_json(pipe.snapshot(pipe.init(KEY, BATCHES[0][0])))
    assert_same(follow(actions), follow([a for a in actions if a in ("step", "drain", "read")]))


@pytest.mark.parametrize(("policy", "room"), [*((policy, True) for policy in POLICIES), ("stash", False)])
def test_a_snapshot_disturbs_nothing_and_outlives_the_steps_that_overwrite_what_it_copied(policy, room, monkeypatch):
    """Parameters, optimizer states and memos are donated and reused in place, but never what was taken of them.

    Where a device has no room for copies, they are made on the host.
    """
    monkeypatch.setattr(snapshots, "_has_room", lambda device_and_bytes: room)
    pipe = make_pipeline(method=methods.fdg(0.5, policy))
    _, undisturbed = run(pipe, BATCHES)
    state, losses, taken = pipe.init(KEY, BATCHES[0][0]), [], []
    for batch in BATCHES:
        snapshot = pipe.snapshot(state)
        assert room or all(type(leaf) is np.ndarray for leaf in snapshot.arrays)
        taken.append((snapshot, host(snapshot.arrays), copy.deepcopy(snapshot.record)))
        state, metrics = pipe.step(state, batch)
        losses += [metrics] if metrics else []
    state, drained = pipe.drain(state)
    assert [float(metrics["loss"]) for metrics in losses + drained] == undisturbed
    for snapshot, arrays, record in taken:
        assert_trees_close(host(snapshot.arrays), arrays, 0)
        assert snapshot.record == record


def test_a_restored_state_outlives_nothing_of_the_snapshot_it_came_from():
    """The arrays on the host are not the state's memory, which the next steps overwrite."""
    pipe = make_pipeline(method=methods.fdg(0.5, "current"))
    state, _ = run(pipe, BATCHES[:6], drain=False)
    snapshot = through_json(pipe.snapshot(state))
    before = host(snapshot.arrays)
    fresh = pipe.init(KEY, BATCHES[0][0])
    ends = []
    for _ in range(2):
        ends.append(outcome(pipe, *train(pipe, pipe.restore(fresh, snapshot), BATCHES[:4])))
        assert_trees_close(snapshot.arrays, before, 0)
    assert_same(*ends)


@pytest.mark.parametrize("policy", POLICIES)
def test_going_on_compiles_nothing_new(policy):
    """What comes back is to JAX what it was: dtypes, weak types, devices."""
    pipe = make_pipeline(method=methods.fdg(0.5, policy))
    state, _ = run(pipe, BATCHES, drain=False)
    snapshot = through_json(pipe.snapshot(state))
    pipe.predict(state, BATCHES[0][0])
    state, _ = pipe.drain(state)
    engine = pipe._started()

    def compiled():
        programs = [program.compiled for program in engine.programs.values()]
        return [function._cache_size() for function in [*programs, *engine._evaluations]]

    before = compiled()
    state = pipe.restore(state, snapshot)
    pipe.predict(state, BATCHES[0][0])
    state, _ = train(pipe, state, BATCHES)
    pipe.drain(state)
    assert compiled() == before


def test_evaluation_after_restoring_is_evaluation_before():
    pipe = make_pipeline(blocks(0), method=methods.fdg(), optimizer=optax.adam(0.01))
    state, _ = run(pipe, BATCHES[:6], drain=False)
    other = make_pipeline(blocks(3), method=methods.fdg(), optimizer=optax.adam(0.01))
    restored = other.restore(other.init(jax.random.key(8), BATCHES[0][0]), through_json(pipe.snapshot(state)))
    np.testing.assert_array_equal(other.predict(restored, BATCHES[1][0]), pipe.predict(state, BATCHES[1][0]))
    assert_trees_close(other.params(restored), pipe.params(state), 0)
    assert_trees_close(other.module_state(restored), pipe.module_state(state), 0)
    assert other.faults(restored) == pipe.faults(state)


# What it holds


def holds(snapshot, *shapes):
    """How many arrays of these shapes it holds, and their bytes."""
    arrays = [leaf for leaf in snapshot.arrays if leaf.shape in shapes]
    return len(arrays), sum(leaf.nbytes for leaf in arrays)


@pytest.mark.parametrize("policy", POLICIES)
def test_old_weights_are_stored_once_each(policy):
    """FDG with K = 3: stage 0 updates from tick 4 on and stage 1 from tick 3, and their memos live 4 and 2 ticks. Under
    stash the memos then refer to min(4, 1 + updates) and min(2, 1 + updates) trees, of which one is today's."""
    pipe = make_pipeline(method=methods.fdg(0.5, policy), optimizer=optim.sgd(0.1, 0.0))  # kernels are in params alone
    state = pipe.init(KEY, BATCHES[0][0])
    for tick, batch in enumerate(BATCHES):
        state, _ = pipe.step(state, batch)
        snapshot = pipe.snapshot(state)
        first, second = min(4, 1 + max(0, tick - 3)), min(2, 1 + max(0, tick - 2))
        if policy != "stash":
            first = second = 1
        assert holds(snapshot, (6, 5)) == (first, first * 4 * 30)
        assert holds(snapshot, (5, 5)) == (second + 1, (second + 1) * 4 * 25)  # stage 2 has one such kernel too
        assert holds(snapshot, (5, 3)) == (1, 4 * 15)
        restored = pipe.restore(pipe.init(KEY, BATCHES[0][0]), through_json(snapshot)) if tick in (3, 6) else state
        kernels = {id(leaf) for leaf in jax.tree.leaves(restored) if np.shape(leaf) == (6, 5)}
        assert len(kernels) == first  # shared again where they were
    in_flight = {"memos": 4 + 2, "activations": 2, "cotangents": 2}
    assert snapshot.in_flight == ", ".join(f"{count} {name}" for name, count in in_flight.items())


def test_every_number_is_used_and_every_leaf_described():
    pipe = make_pipeline(blocks(0), method=methods.fdg(), optimizer=optax.adam(0.01))
    state, _ = run(pipe, BATCHES[:6], drain=False)
    snapshot = pipe.snapshot(state)
    record = snapshot.record
    places = [leaf for stage in record["stages"] for leaves in stage.values() for leaf in leaves]
    places += [leaf for box in ("inbox", "outbox") for message in record[box] for leaf in message["leaves"]]
    places += [leaf for memo in record["memos"] for part in ("saved", "held") for leaf in memo[part]]
    assert {number for _, number in places} == set(range(len(snapshot.arrays)))
    assert len(record["arrays"]) == len(snapshot.arrays)
    for leaf, description in zip(snapshot.arrays, record["arrays"], strict=True):
        assert (list(leaf.shape), leaf.dtype.name) == (description["shape"], description["dtype"])
    assert len(places) == len(jax.tree.leaves(state)) - 2  # `fed` and `origin` are numbers
    assert json.loads(json.dumps(record)) == record


def test_batches_in_which_numbers_were_not_finite_are_counted_in_a_snapshot_and_on():
    batches = tiny_batches(9)
    batches[2][0][:] = np.nan
    pipe = make_pipeline(skip_nonfinite=True)
    straight, _ = run(pipe, batches)
    state, _ = run(pipe, batches[:6], drain=False)
    snapshot = through_json(pipe.snapshot(state))
    assert snapshot.faults == sum(fault.count for fault in pipe.faults(state)) == 2  # stage 0 answers it in tick 6
    state, _ = train(pipe, pipe.restore(pipe.init(KEY, batches[0][0]), snapshot), batches[6:])
    state, _ = pipe.drain(state)
    assert pipe.faults(state) == pipe.faults(straight)
    assert pipe.first_fault(state) == pipe.first_fault(straight) == FirstFault(2, 2, 4)


# On other devices, cut elsewhere


@pytest.mark.parametrize("policy", POLICIES)
def test_placement_may_change(policy):
    """From a device a stage to one for all, and back; and to the same in the other order."""
    method = methods.fdg(0.5, policy)
    places = {"own": jax.devices()[:3], "shared": jax.devices()[:1], "reversed": jax.devices()[::-1][:3]}
    pipes = {name: make_pipeline(method=method, devices=devices) for name, devices in places.items()}
    snapshots, straight = {}, None
    for name in ("own", "shared"):
        state, _ = run(pipes[name], BATCHES[:HALF], drain=False)
        snapshots[name] = pipes[name].snapshot(state)
        straight = outcome(pipes[name], *train(pipes[name], state, BATCHES[HALF:]))
    for source, target in (("own", "shared"), ("shared", "own"), ("own", "reversed")):
        pipe = pipes[target]
        state = pipe.restore(pipe.init(jax.random.key(3), BATCHES[0][0]), through_json(snapshots[source]))
        assert [own.batch.device for own in state.stages] == list(pipe.devices)
        for (k, _), memo in state.memos.items():
            assert {leaf.device for leaf in jax.tree.leaves(memo)} == {pipe.devices[k]}
        for (_, k, _), message in state.inbox.items():
            assert {leaf.device for leaf in jax.tree.leaves(message)} == {pipe.devices[k]}
        for (kind, k, _), message in state.outbox.items():  # where they wait to be sent
            sender = pipe.devices[k + 1 if kind == "cotangents" else k - 1]
            assert {leaf.device for leaf in jax.tree.leaves(message)} == {sender}
        assert {kind for kind, _, _ in state.outbox} == {"inputs", "cotangents"}
        assert_same(outcome(pipe, *train(pipe, state, BATCHES[HALF:])), straight)


def normed(seed=1, num=5):
    """Blocks that are stacked where they share a stage, with statistics."""
    rngs = nnx.Rngs(seed)
    return [
        *[nnx.Sequential(layers.Linear(6, 6, rngs=rngs), layers.BatchNorm(6, rngs=rngs)) for _ in range(num)],
        layers.Linear(6, 3, rngs=rngs),
    ]


@pytest.mark.parametrize("stack", [True, False])
def test_weights_of_four_stages_begin_two_or_one(stack):
    pipe = make_pipeline(normed(), cuts=(2, 3, 5))
    state, _ = run(pipe, BATCHES[:6], drain=False)
    snapshot = through_json(pipe.snapshot(state))
    assert 2 in snapshot.record["pipeline"]["groups"][0]
    for num_stages in (2, 1):
        other = make_pipeline(normed(seed=2), num_stages=num_stages, stack=stack)
        fresh = other.init(KEY, BATCHES[0][0])
        params, module_state = weights(snapshot, other.params(fresh), other.module_state(fresh))
        begun = other.init(KEY, BATCHES[0][0], params, module_state)
        assert_trees_close(other.params(begun), pipe.params(state), 0)
        assert_trees_close(other.module_state(begun), pipe.module_state(state), 0)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: normed(num=4), "the network has 6 layers in the checkpoint, 5 here"),
        (
            lambda: [*normed()[:-1], layers.Linear(6, 4, rngs=nnx.Rngs(0))],
            "layer 5's params.bias is float32[3] in the checkpoint, float32[4] here",
        ),
        (
            lambda: [*normed()[:4], nnx.Sequential(layers.Linear(6, 6, rngs=nnx.Rngs(0))), normed()[5]],
            "layer 4's params.layers.1.bias is float32[6] in the checkpoint, missing here",
        ),
        (
            lambda: [nnx.Sequential(layers.Linear(6, 6, rngs=nnx.Rngs(0)), Gained()), *normed()[1:]],
            "layer 0's state.layers.1.mean is float32[6] in the checkpoint, missing here",
        ),
    ],
)
def test_weights_of_another_network_are_refused(network, message):
    pipe = make_pipeline(normed(), cuts=(2, 3, 5))
    state = pipe.init(KEY, BATCHES[0][0])
    other = make_pipeline(network(), num_stages=1)
    fresh = other.init(KEY, BATCHES[0][0])
    with pytest.raises(Mismatch) as refused:
        weights(through_json(pipe.snapshot(state)), other.params(fresh), other.module_state(fresh))
    assert str(refused.value) == message


class Gained(nnx.Module):
    """The parameters of BatchNorm and none of its statistics."""

    def __init__(self):
        self.scale, self.bias = nnx.Param(jnp.ones(6)), nnx.Param(jnp.zeros(6))

    def __call__(self, x):
        return x * self.scale[...] + self.bias[...]


# What does not fit


def snapshot_of(num=5, **kwargs):
    """Of a pipeline in flight after so many batches."""
    pipe = make_pipeline(**kwargs)
    state, _ = train(pipe, pipe.init(KEY, BATCHES[0][0]), BATCHES[:num])
    return through_json(pipe.snapshot(state))


def refusal(snapshot, inputs=BATCHES[0][0], targets=None, **kwargs):
    pipe = make_pipeline(**kwargs)
    with pytest.raises(Mismatch) as refused:
        pipe.restore(pipe.init(KEY, inputs), snapshot, targets)
    return str(refused.value)


def plain(*sizes):
    return [layers.Linear(*pair, rngs=nnx.Rngs(0)) for pair in pairwise(sizes)]


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"num_stages": 2}, {"num_stages": 3}, "num_stages is 2 in the checkpoint, 3 here"),
        ({"cuts": (1, 2)}, {"cuts": (2, 3)}, "cuts is [1, 2] in the checkpoint, [2, 3] here"),
        (
            {"method": methods.fdg(0.5)},
            {"method": methods.bp()},
            "method is fdg(beta=0.5, policy=stash) in the checkpoint, bp here",
        ),
        (
            {"method": methods.fdg(0.5)},
            {"method": methods.fdg(0.25)},
            "method is fdg(beta=0.5, policy=stash) in the checkpoint, fdg(beta=0.25, policy=stash) here",
        ),
        (
            {"method": methods.fdg(0.5, "recompute")},
            {"method": methods.fdg(0.5, "current")},
            "method is fdg(beta=0.5, policy=recompute) in the checkpoint, fdg(beta=0.5, policy=current) here",
        ),
        (
            {"method": methods.fdg(0.5)},
            {"method": methods.fdg(0.5, order="forward_first")},
            "schedule.stages.0.0 is ['B', 4] in the checkpoint, ['F', 0] here",
        ),
        (
            {"layers": plain(6, 5, 4, 3)},
            {"layers": [*plain(6, 5, 4), jnp.tanh, *plain(4, 3)]},
            "layers.2 is Linear in the checkpoint, tanh here",
        ),
        (
            {"layers": [*plain(6, 5, 3), jnp.tanh]},
            {"layers": plain(6, 5, 3), "num_stages": 2},
            "layers.2 is tanh in the checkpoint, missing here",
        ),
        (
            {"layers": plain(6, 5, 4, 3)},
            {"layers": plain(6, 5, 7, 3)},
            "stage 1's params.0.bias is float32[4] in the checkpoint, float32[7] here",
        ),
        (
            {"layers": tiny_mlp(5), "num_stages": 2, "stack": True},
            {"layers": tiny_mlp(5), "num_stages": 2, "stack": False},
            "groups.0 is [1, 2] in the checkpoint, [1, 1, 1] here",
        ),
        ({}, {"remat": "none,full,none"}, "remat.1 is none in the checkpoint, full here"),
        (
            {"optimizer": optim.sgd(0.1, 0.9)},
            {"optimizer": optim.sgd(0.1, 0.0)},
            "stage 0's opt_state.1.trace.0.linear.bias is float32[5] in the checkpoint, missing here",
        ),
        (
            {"method": methods.fdg(), "optimizer": optim.sgd(0.1, 0.0)},
            {"method": methods.fdg(), "optimizer": optax.adam(0.1)},
            "stage 0's opt_state.0.count is missing in the checkpoint, int32[] here",
        ),
    ],
)
def test_what_differs_is_named_with_what_was_saved_and_what_is_asked(saved, here, message):
    assert refusal(snapshot_of(**saved), **here) == message
    assert "\n" not in message


def test_a_snapshot_of_before_remat_was_recorded_had_none():
    snapshot = snapshot_of()
    del snapshot.record["pipeline"]["remat"]
    assert refusal(snapshot, remat="convs") == "remat.0 is none in the checkpoint, convs here"
    inputs, targets = tiny_batches(1)[0]
    pipe = make_pipeline()
    pipe.restore(pipe.init(KEY, inputs), snapshot, targets)


def test_an_optimizer_that_counts_differently_is_refused_before_the_first_batch_too():
    assert "opt_state.0.count is missing" in refusal(
        snapshot_of(num=0, method=methods.fdg()), method=methods.fdg(), optimizer=optax.adam(0.1)
    )


def test_another_batch_size_is_refused():
    larger = tiny_batches(1, size=8)[0]
    message = refusal(snapshot_of(), inputs=larger[0])
    assert message == "the inputs of batch 4 for stage 1 is float32[4,5] in the checkpoint, float32[8,5] here"
    message = refusal(snapshot_of(), inputs=larger[0], targets=larger[1])
    assert message == "the targets of a batch is int32[4] in the checkpoint, int32[8] here"


def test_a_loss_that_reports_something_else_is_refused():
    message = refusal(snapshot_of(), loss=lambda outputs, targets: softmax_cross_entropy(outputs, targets)[0])
    assert message == "the sum of the metric.accuracy is float32[] in the checkpoint, missing here"


def test_targets_that_are_a_tree_come_back_where_their_shapes_are_given():
    def loss(outputs, targets):
        return softmax_cross_entropy(outputs, targets["labels"])[0] * targets["weights"].mean()

    trees = [(x, {"labels": y, "weights": np.full(4, 2, np.float32)}) for x, y in BATCHES]
    pipe = make_pipeline(loss=loss)
    state, _ = run(pipe, trees[:5], drain=False)
    snapshot = through_json(pipe.snapshot(state))
    straight = outcome(pipe, *train(pipe, state, trees[5:]))
    state = pipe.restore(pipe.init(KEY, trees[0][0]), snapshot, trees[0][1])
    assert_same(outcome(pipe, *train(pipe, state, trees[5:])), straight)
    with pytest.raises(ValueError, match="example_targets"):
        pipe.restore(pipe.init(KEY, trees[0][0]), snapshot)


@pytest.mark.parametrize("package", ["jax", "flax", "fdg_jax"])
def test_memos_of_another_version_are_refused_and_everything_else_is_not(package):
    in_flight, drained = snapshot_of(num=5), snapshot_of(num=0)
    here = in_flight.record["versions"][package]
    for snapshot in (in_flight, drained):
        snapshot.record["versions"][package] = "0.0.1"
    message = f"{package} is 0.0.1 in the checkpoint, {here} here, which cannot read its memos"
    assert refusal(in_flight) == message
    pipe = make_pipeline()
    pipe.restore(pipe.init(KEY, BATCHES[0][0]), drained)


@pytest.mark.parametrize("package", ["optax", "orbax-checkpoint"])
def test_what_does_not_decide_what_a_memo_holds_may_be_of_another_version(package):
    snapshot = snapshot_of(num=5)
    snapshot.record["versions"][package] = "0.0.1"
    pipe = make_pipeline()
    pipe.restore(pipe.init(KEY, BATCHES[0][0]), snapshot)


def test_a_memo_that_holds_something_else_is_refused():
    """Two networks of the same names and shapes, whose backward reads different things."""

    def with_activation(function):
        return [*plain(6, 5), lambda x: function(x), *plain(5, 3)]

    message = refusal(
        snapshot_of(layers=with_activation(jnp.tanh), cuts=(2,)), layers=with_activation(lambda x: 2 * x), cuts=(2,)
    )
    assert message.startswith("the memo of batch 3 on stage 0: ")
    assert message.endswith("saved.0 is float32[4,5] in the checkpoint, float32[] here")


@pytest.mark.parametrize("field", ["params", "opt_state"])
def test_leaves_in_another_order_are_refused(field):
    """They are put back by their places, and two of one shape would change places unseen."""
    snapshot = snapshot_of(layers=plain(6, 6, 6, 3))
    snapshot.record["stages"][0][field].reverse()
    assert f"stage 0's {field} has the order" in refusal(snapshot, layers=plain(6, 6, 6, 3))


def test_a_key_of_another_kind_is_refused():
    pipe = make_pipeline()
    state = pipe.init(jax.random.key(0, impl="rbg"), BATCHES[0][0])
    message = refusal(through_json(pipe.snapshot(state)))
    assert message == "stage 0's key is key<rbg>[4] in the checkpoint, key<fry>[2] here"


# Beginning later than at batch 0


def recording():
    """An optimizer that moves nothing and remembers the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, _, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


@pytest.mark.parametrize("method", [methods.bp(), *[methods.fdg(0.5, policy) for policy in POLICIES]], ids=str)
def test_a_run_that_begins_at_a_batch_has_the_dropout_and_the_counts_of_that_batch(method):
    """Where nothing moves, beginning at batch n is having come there."""

    class Noisy(nnx.Module):
        def __init__(self):
            self.linear = layers.Linear(6, 6, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dropout(self.linear(x))

    batches, first = BATCHES[:1] * 7, 3
    pipe = make_pipeline([Noisy(), Noisy(), *plain(6, 3)], method=method, optimizer=recording())
    state = pipe.init(KEY, batches[0][0])
    state, reported = train(pipe, state, batches)
    state, drained = pipe.drain(state)
    losses = [float(metrics["loss"]) for metrics in reported + drained if metrics]
    assert len(set(losses)) == len(batches)
    later = pipe.init(KEY, batches[0][0], first_batch=first)
    assert later.fed == first
    assert [own.counts.tolist() for own in later.stages] == [[first, first, 0, int(NO_FAULT)]] * 3
    later, reported = train(pipe, later, batches[first:])
    later, drained = pipe.drain(later)
    assert [float(metrics["loss"]) for metrics in reported + drained if metrics] == losses[first:]
    for field in ("counts", "opt_state"):
        assert_trees_close(*[host([getattr(own, field) for own in end.stages]) for end in (later, state)], 0)


def test_a_fault_after_a_later_beginning_bears_the_number_of_its_batch():
    batches = tiny_batches(5)
    batches[1][0][:] = np.nan
    pipe = make_pipeline(skip_nonfinite=True)
    state = pipe.init(KEY, batches[0][0], first_batch=10)
    state, _ = train(pipe, state, batches)
    state, _ = pipe.drain(state)
    assert {fault.first_batch for fault in pipe.faults(state)} == {11}
    snapshot = through_json(pipe.snapshot(state))
    assert (snapshot.record["fed"], snapshot.record["origin"]) == (15, 15)


def test_a_state_that_was_overwritten_is_not_taken():
    pipe = make_pipeline(method=methods.fdg(0.5, "current"))
    state, _ = run(pipe, BATCHES[:6], drain=False)
    pipe.step(state, BATCHES[6])
    with pytest.raises(ValueError, match="this state was overwritten in place by an earlier step or drain"):
        pipe.snapshot(state)
