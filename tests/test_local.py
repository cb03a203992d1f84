from itertools import islice, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, tiny_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Module, cross_entropy, hidden_layer, linear_layer
from oracle_local import (
    Added,
    deep_synthesiser,
    dgl,
    dni,
    linear_head,
    linear_synthesiser,
    mean_square_error,
    mlp_sr_head,
    rectangles,
)

from fdg_jax import local, reuse, schedule
from fdg_jax.models.heads import pool
from fdg_jax.reuse import Buffer, Entry, Reuse

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
FLAT, IMAGE = (4, 6), (4, 5, 9, 2)
CLASSES = 3
LABELS = jnp.array([0, 2, 1, 2])


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def awake(tree):
    """The same parameters, none of them zero."""
    return jax.tree.map(lambda leaf: leaf + 0.3 * normal(*leaf.shape), tree)


def make_head(kind, shape, dtype=jnp.float32):
    (head,) = local.make_heads(kind, [shaped(*shape, dtype=dtype)], CLASSES, KEY, dtype)
    return head, *head.init(KEY, None)


def make_synthesiser(kind, shape, num_classes=CLASSES, **kwargs):
    (synthesiser,) = local.make_synthesisers(kind, [shaped(*shape)], num_classes, KEY, **kwargs)
    return synthesiser, *synthesiser.init(KEY, None)


# Heads and synthesisers


@pytest.mark.parametrize("shape", [FLAT, IMAGE, (2, 1, 1, 2)])
@pytest.mark.parametrize(("kind", "oracle"), [("mlp_sr", mlp_sr_head), ("linear", linear_head)])
def test_a_head_is_the_published_one(kind, oracle, shape):
    head, params, state = make_head(kind, shape)
    params, x = awake(params), normal(*shape)
    logits, _ = head.apply(params, state, x, KEY, True)
    assert logits.shape == (shape[0], CLASSES)
    assert_trees_close(logits, oracle(params, x), 1e-4)


@pytest.mark.parametrize("shape", [FLAT, IMAGE])
def test_parameters_of_heads_by_formula(shape):
    c = shape[-1]
    wide, convs = (4 * c, 3 * (c * c + 2 * c)) if len(shape) == 4 else (c, 0)
    mlp_sr = convs + 3 * (wide * wide + 3 * wide) + (wide + 1) * CLASSES
    heads = [make_head(kind, shape) for kind in ("mlp_sr", "linear")]
    assert local.num_params([head for head, *_ in heads]) == [mlp_sr, (c + 1) * CLASSES]
    assert [sum(leaf.size for leaf in jax.tree.leaves(params)) for _, params, _ in heads] == local.num_params(
        [head for head, *_ in heads]
    )


@pytest.mark.parametrize("context", [None, CLASSES])
@pytest.mark.parametrize("shape", [FLAT, IMAGE])
def test_parameters_of_synthesisers_by_formula(shape, context):
    c, w = shape[-1], 7
    linear = c * c + c + (0 if context is None else (context + 1) * c)
    window, biases = (25, 0) if len(shape) == 4 else (1, 2 * w + c)
    deep = window * (c * w + w * w + w * c) + biases + 4 * w + (0 if context is None else (context + 1) * w)
    layers = [make_synthesiser(kind, shape, context, width=w)[0] for kind in ("linear", "deep")]
    assert local.num_params(layers) == [linear, deep]


@pytest.mark.parametrize("context", [None, CLASSES])
@pytest.mark.parametrize("shape", [FLAT, IMAGE])
@pytest.mark.parametrize(("kind", "oracle"), [("deep", deep_synthesiser), ("linear", linear_synthesiser)])
def test_a_synthesiser_begins_with_zero_and_learns_the_published_function(kind, oracle, shape, context):
    layer, params, state = make_synthesiser(kind, shape, context, width=7)
    h = normal(*shape)
    estimate, _ = local.synthesise(layer, params, state, h, LABELS, KEY)
    np.testing.assert_array_equal(estimate, np.zeros(shape, np.float32))
    loss = lambda params: local.synthesis_loss(layer, params, state, h, LABELS, jnp.cos(h), KEY)  # noqa: E731
    value, gradients = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, np.mean(np.cos(h) ** 2), rtol=1e-5)
    assert np.abs(gradients["last"]["kernel"]).max() > 0
    params = awake(params)
    estimate, _ = local.synthesise(layer, params, state, h, LABELS, KEY)
    assert_trees_close(estimate, oracle(params, h, LABELS), 1e-4)
    other, _ = local.synthesise(layer, params, state, h, LABELS[::-1], KEY)
    assert (np.abs(np.asarray(other - estimate)).max() > 1e-3) == (context is not None)


def test_dtypes():
    half = shaped(*IMAGE, dtype=jnp.bfloat16)
    h = normal(*IMAGE).astype(jnp.bfloat16)
    for kind in ("mlp_sr", "linear"):
        head, params, state = make_head(kind, IMAGE, jnp.bfloat16)
        assert head.apply(params, state, h, KEY, True)[0].dtype == jnp.float32
    for kind in ("deep", "linear"):
        (layer,) = local.make_synthesisers(kind, [half], CLASSES, KEY, jnp.bfloat16, width=7)
        params, state = layer.init(KEY, None)
        estimate, _ = local.synthesise(layer, params, state, h, LABELS, KEY)
        assert estimate.dtype == jnp.bfloat16
        assert local.synthesis_loss(layer, params, state, h, LABELS, h, KEY).dtype == jnp.float32


@pytest.mark.parametrize(("size", "sizes"), [((8, 12), (2, 3)), ((5, 7), (2, 2)), ((1, 1), (2, 2)), ((9, 3), (4, 1))])
def test_pool_equals_the_mean_of_every_rectangle(size, sizes):
    x = normal(2, *size, 3)
    assert_trees_close(pool(x, sizes), rectangles(x, *sizes), 1e-6)


def test_a_head_does_not_depend_on_the_heads_after_it():
    shapes = [shaped(*FLAT), shaped(4, 5), shaped(*IMAGE)]
    of_three, of_two = (local.make_heads("mlp_sr", shapes[:n], CLASSES, KEY) for n in (3, 2))
    assert_trees_close([head.init(KEY, None) for head in of_three[:2]], [head.init(KEY, None) for head in of_two], 0)


@pytest.mark.parametrize(
    ("kind", "outputs", "message"),
    [
        ("mlp_rs", shaped(*FLAT), r"unknown head 'mlp_rs'; did you mean 'mlp_sr'"),
        ("linear", shaped(4, 7, 6), r"reads outputs \(N, F\) or \(N, H, W, C\); got \(N, 7, 6\)"),
        ("linear", (shaped(*FLAT), shaped(*FLAT)), r"one floating point tensor; stage 0 puts out \(float32\[4,6\], "),
        ("linear", shaped(*FLAT, dtype=jnp.int32), r"one floating point tensor; stage 0 puts out int32\[4,6\]"),
    ],
)
def test_heads_refuse(kind, outputs, message):
    with pytest.raises(ValueError, match=message):
        local.make_heads(kind, [outputs], CLASSES, KEY)


def test_synthesisers_refuse_unknown_kinds():
    with pytest.raises(ValueError, match="unknown synthesiser 'depe'; did you mean 'deep'"):
        local.make_synthesisers("depe", [shaped(*FLAT)], None, KEY)


# Runs of three stages: the library's functions in the loops of their docstring, against the oracle


WIDTHS = (6, 5, 4, CLASSES)
STEPS = [[hidden_layer()], [hidden_layer()], [linear_layer()]]


def network():
    params = [{"kernel": normal(a, b), "bias": normal(b)} for a, b in pairwise(WIDTHS)]
    return [[{"linear": params[0]}], [{"linear": params[1]}], [params[2]]]


def stage(k):
    def apply(theta, state, x, key):
        (p,) = theta
        p = p.get("linear", p)
        x = x @ p["kernel"] + p["bias"]
        return x if k == 2 else jax.nn.relu(x), state

    return apply


def assert_close(actual, expected):
    """In float64, of numbers of the order of one: a bias before a normalisation stays zero up to rounding."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), actual, expected)


def in_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def step(optimizer, params, opt_state, gradients):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def hidden_shapes():
    return [shaped(4, width) for width in WIDTHS[1:-1]]


@pytest.mark.parametrize(("kind", "oracle"), [("mlp_sr", mlp_sr_head), ("linear", linear_head)])
@pytest.mark.usefixtures("x64")
def test_dgl_equals_the_oracle(kind, oracle):
    optimizer, batches, theta = optax.sgd(0.1, 0.9), tiny_batches(3), in_float64(network())
    heads = local.make_heads(kind, hidden_shapes(), CLASSES, KEY, jnp.float64)
    phi, added = (in_float64(list(trees)) for trees in zip(*(head.init(KEY, None) for head in heads), strict=True))
    modules = [Module(steps, p, optimizer, "stash") for steps, p in zip(STEPS, theta, strict=True)]
    expected = [Added(oracle, p, optimizer) for p in phi]
    losses = list(dgl(modules, expected, batches))

    opt_states = [optimizer.init(pair) for pair in zip(theta, phi, strict=False)]
    values = np.zeros((3, 2))
    for i, (x, y) in enumerate(batches):
        for k, head in enumerate(heads):
            train = jax.value_and_grad(local.greedy(stage(k), head, cross_entropy), has_aux=True)
            (values[i, k], aux), gradients = train((theta[k], phi[k]), x, ((), added[k]), KEY, y)
            (theta[k], phi[k]), opt_states[k] = step(optimizer, (theta[k], phi[k]), opt_states[k], gradients)
            (_, added[k]), _, x = aux
    assert_close((theta[:2], phi), ([m.params for m in modules[:2]], [head.params for head in expected]))
    for k in range(2):
        np.testing.assert_allclose(values[:, k], [losses[i + k][k] for i in range(3)], rtol=1e-9)


def test_dgl_stages_do_not_change_when_later_stages_do():
    optimizer, theta = optax.sgd(0.1, 0.9), network()
    added = [{"kernel": normal(width, CLASSES), "bias": normal(CLASSES)} for width in WIDTHS[1:-1]]
    trained = []
    for last in (2, 1):
        steps = [STEPS[0], *([STEPS[1]] if last == 2 else []), STEPS[2]]
        params = [*theta[:last], [{"kernel": normal(WIDTHS[last], CLASSES), "bias": normal(CLASSES)}]]
        modules = [Module(s, p, optimizer, "stash") for s, p in zip(steps, params, strict=True)]
        heads = [Added(linear_head, p, optimizer) for p in added[:last]]
        assert len(list(dgl(modules, heads, tiny_batches(3)))) == 3 + last
        trained.append((modules[0].params, heads[0].params))
    assert_trees_close(*trained, 0)
    assert np.abs(trained[0][0][0]["linear"]["kernel"] - theta[0][0]["linear"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("context", [None, CLASSES])
@pytest.mark.parametrize(("kind", "oracle"), [("deep", deep_synthesiser), ("linear", linear_synthesiser)])
@pytest.mark.usefixtures("x64")
def test_dni_equals_the_oracle(kind, oracle, context):
    optimizer, for_phi, batches, theta = optax.sgd(0.1, 0.9), optax.sgd(3.0), tiny_batches(5), in_float64(network())
    layers = local.make_synthesisers(kind, hidden_shapes(), context, KEY, jnp.float64, width=7)
    phi, added = (in_float64(list(trees)) for trees in zip(*(layer.init(KEY, None) for layer in layers), strict=True))
    modules = [Module(steps, p, optimizer, "stash") for steps, p in zip(STEPS, theta, strict=True)]
    expected = [Added(oracle, p, for_phi) for p in phi]
    losses = [loss for loss in dni(modules, expected, batches) if loss is not None]

    opt_states, phi_states = list(map(optimizer.init, theta)), list(map(for_phi.init, phi))
    inputs, kept, cotangents, values = {}, {}, {}, []
    for tick in range(len(batches) + 3):
        for k in range(3):
            i = tick - k
            if k < 2 and 0 <= i - 2 < len(batches):  # S
                h, y = kept.pop((k, i - 2))
                loss = lambda p, *of, k=k: local.synthesis_loss(layers[k], p, added[k], *of, KEY)  # noqa: E731
                gradients = jax.grad(loss)(phi[k], h, y, cotangents.pop((k, i - 2)))
                phi[k], phi_states[k] = step(for_phi, phi[k], phi_states[k], gradients)
            if not 0 <= i < len(batches):
                continue
            x, y = (inputs.pop((k, i)) if k else batches[i][0]), batches[i][1]
            h, pull = jax.vjp(lambda p, x, k=k: stage(k)(p, (), x, KEY)[0], theta[k], x)
            if k < 2:
                e, added[k] = local.synthesise(layers[k], phi[k], added[k], h, y, KEY)
                inputs[k + 1, i], kept[k, i] = h, (h, y)
            else:
                value, e = jax.value_and_grad(cross_entropy)(h, y)
                values.append(value)
            gradients, cotangents[k - 1, i] = pull(e)
            theta[k], opt_states[k] = step(optimizer, theta[k], opt_states[k], gradients)
        assert sum(of == 0 for of, _ in kept) <= 2
    assert not kept
    np.testing.assert_allclose(values, losses, rtol=1e-9)
    assert_close((theta, phi), ([m.params for m in modules], [s.params for s in expected]))
    assert min(np.abs(p["last"]["kernel"]).max() for p in phi) > 1e-2  # both have learned


# A perfect synthesiser: linear stages and a quadratic loss, h_K = h_k A + c, so e_k = (h_k A + c - Y) A^T / N


def perfect(theta, k, num_examples):
    """The linear synthesiser of stage k that is exact where the stages that follow have parameters theta."""
    width = theta[k]["kernel"].shape[1]
    a, c = jnp.eye(width), jnp.zeros(width)
    for p in theta[k + 1 :]:
        a, c = a @ p["kernel"], c @ p["kernel"] + p["bias"]
    return {
        "last": {"kernel": a @ a.T / num_examples, "bias": c @ a.T / num_examples},
        "context": {"linear": {"kernel": -a.T / num_examples, "bias": jnp.zeros(len(a))}},
    }


def linear_network():
    return [{"kernel": 0.5 * normal(a, b), "bias": normal(b)} for a, b in pairwise(WIDTHS)]


def linear_stages(theta, x):
    for p in theta:
        x = x @ p["kernel"] + p["bias"]
    return x


def test_stages_with_perfect_synthesisers_have_the_gradients_of_backpropagation():
    theta, x, y = linear_network(), normal(*FLAT), normal(4, CLASSES)
    expected = jax.grad(lambda theta: mean_square_error(linear_stages(theta, x), y))(theta)
    for k, layer in enumerate(local.make_synthesisers("linear", hidden_shapes(), CLASSES, KEY)):
        phi, (_, state) = perfect(theta, k, len(x)), layer.init(KEY, None)
        h, pull = jax.vjp(lambda p, x: linear_stages([p], x), theta[k], x)
        estimate, _ = local.synthesise(layer, phi, state, h, y, KEY)
        gradients, d = pull(estimate)
        assert_trees_close(gradients, expected[k], 1e-5)
        if k:  # the target of the stage before is exact too
            before, _ = local.make_synthesisers("linear", hidden_shapes(), CLASSES, KEY)
            loss = local.synthesis_loss(before, perfect(theta, k - 1, len(x)), state, x, y, d, KEY)
            np.testing.assert_allclose(loss, 0, atol=1e-10)
        x = h


def test_dni_with_perfect_synthesisers_takes_the_steps_of_backpropagation():
    optimizer, batches = optax.sgd(0.05, 0.9), [(normal(*FLAT), normal(4, CLASSES)) for _ in range(5)]
    versions = [linear_network()]
    opt_state = optimizer.init(versions[0])
    for x, y in batches:
        gradients = jax.grad(lambda theta, x=x, y=y: mean_square_error(linear_stages(theta, x), y))(versions[-1])
        theta, opt_state = step(optimizer, versions[-1], opt_state, gradients)
        versions.append(theta)

    modules = [Module([linear_layer()], [p], optimizer, "stash") for p in versions[0]]
    synthesisers = [Added(linear_synthesiser, perfect(versions[0], k, 4), optax.sgd(0.0)) for k in range(2)]
    run = dni(modules, synthesisers, batches, mean_square_error)
    for tick in range(len(batches) + 3):
        for k, synthesiser in enumerate(synthesisers):  # for the weights that batch tick - k will meet further down
            synthesiser.params = perfect(versions[min(max(tick - k, 0), len(batches))], k, 4)
        next(run)
    assert_trees_close([module.params[0] for module in modules], versions[-1], 1e-4)


# Buffers


def uses(slowdown, ticks, size, max_uses=None):
    """Per tick and stage the batch that it trains on, None for none."""
    plan, rows = Reuse.start(slowdown, size, max_uses), []
    for _ in range(ticks):
        plan, row = plan.step()
        rows.append([use and use.batch for use in row])
    return rows


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stages_of_equal_speed_work_in_lock_step(size):
    rows = islice(schedule.unroll(schedule.local(3)), 7)
    assert uses((1, 1, 1), 7, size) == [[visit[0].batch if visit else None for visit in row] for row in rows]


def stage_one(*args):
    return [row[1] for row in uses(*args)]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_slow_stage_takes_the_newest_and_leaves_out_the_others(size):
    assert stage_one((1, 3), 9, size) == [None, 0, None, None, 3, None, None, 6, None]


def test_a_stage_whose_turns_are_uneven_catches_up_on_what_it_missed():
    buffer, order = Buffer(3), []
    for batch in range(4):  # four messages come while it is at work, the first is overwritten
        buffer = buffer.put(Entry(batch, batch))
    for _ in range(5):
        buffer, use = buffer.take()
        order.append(use.batch)
    assert order == [3, 2, 1, 3, 2]


def test_a_fast_stage_uses_batches_again_the_least_used_first():
    assert stage_one((2, 1), 8, 1) == [None, 0, 0, 1, 1, 2, 2, 3]
    assert stage_one((3, 1), 10, 2) == [None, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert stage_one((3, 1), 7, 1, 2) == [None, 0, 0, None, 1, 1, None]
    assert stage_one((2, 1), 8, 4, 1) == [None, 0, None, 1, None, 2, None, 3]


def test_priority_is_the_least_used_and_then_the_newest():
    buffer = Buffer(3, entries=(Entry(0, 0, 2), Entry(1, 1, 1), Entry(2, 2, 1)))
    order = []
    for _ in range(4):
        buffer, use = buffer.take()
        order.append(use.batch)
    assert order == [2, 1, 2, 1]
    assert [entry.batch for entry in buffer.put(Entry(9, 9)).entries] == [1, 2, 9]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.none() | st.integers(1, 3),
)
def test_every_choice_follows_from_what_was_sent_and_used_before(slowdown, size, max_uses):
    plan = Reuse.start(slowdown, size, max_uses)
    sent = [{} for _ in slowdown]  # by stage that sends: tick -> batch
    used = [[] for _ in slowdown]
    fresh = 0
    for tick in range(25):
        resident = plan.resident
        plan, row = plan.step()
        for k, use in enumerate(row):
            if tick < k or (tick - k) % slowdown[k]:
                assert use is None
                continue
            if k == 0:
                batch, fresh = fresh, fresh + 1
            else:
                held = sorted(t for t in sent[k - 1] if t < tick)[-size:]
                assert resident[k - 1] == set(held)
                held = [t for t in held if max_uses is None or used[k].count(t) < max_uses]
                if not held:
                    assert use is None
                    continue
                least = min(map(used[k].count, held))
                chosen = max(t for t in held if used[k].count(t) == least)
                used[k].append(chosen)
                assert use.sent == chosen
                assert use.uses == least + 1
                batch = sent[k - 1][chosen]
            assert use.batch == batch
            sent[k][tick] = batch


@pytest.mark.parametrize(
    ("slowdown", "size", "max_uses", "message"),
    [
        ((1, 0), 1, None, r"slowdown must hold a number of ticks, at least 1, for every stage; got \(1, 0\)"),
        ((), 1, None, "slowdown must hold"),
        ((1, 1), 0, None, "a buffer's size must be at least 1; got 0"),
        ((1, 1), 2, 0, "a buffer's max_uses must be at least 1; got 0"),
    ],
)
def test_buffers_refuse(slowdown, size, max_uses, message):
    with pytest.raises(ValueError, match=message):
        Reuse.start(slowdown, size, max_uses)


def test_no_arrays_decide_who_trains_on_what():
    assert "jax" not in vars(reuse)
