import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close

from fdg_jax import layers
from fdg_jax.backward import Trace, kept, lighten, resolve_remat


def dense(params, x, state):
    """Two linear maps with a nonlinearity that saves its output."""
    h = layers.relu(x @ params["a"])
    return h @ params["b"] + params["c"], state


PARAMS = {"a": jnp.arange(6.0).reshape(2, 3) / 6, "b": jnp.arange(12.0).reshape(3, 4) / 12, "c": jnp.ones(4)}
X = jnp.array([[1.0, -2.0], [0.5, 3.0]])
STATE = {"count": jnp.zeros(())}


def trace(function=dense, params=PARAMS, x=X, state=STATE, **kwargs):
    return Trace(function, params, x, state, **kwargs)


def gradients(made: Trace, params, x, state, today, cotangents):
    """Forward with `params`, backward with `today`, each in a jit of its own."""
    outputs, _, saved = jax.jit(made.forward)(params, x, state)
    memo = made.memo(saved, params, x, state, outputs)
    return jax.jit(made.backward)(today, memo, cotangents)


def test_lighten_keeps_what_nobody_else_holds_and_each_once():
    def f(x):
        y, vjp = jax.vjp(lambda x: jnp.sin(x) * jnp.sin(x) * x, x)
        light = lighten(vjp, inputs=x, outputs=y)
        assert light.reads("inputs")
        assert len(light.saved) == len({id(leaf) for leaf in light.saved})
        assert all(leaf is not x for leaf in light.saved)
        restored = light.restore(inputs=[x], outputs=[y])
        return restored(jnp.ones_like(y)), vjp(jnp.ones_like(y))

    restored, original = jax.jit(f)(jnp.array([0.3, 0.7]))
    assert_trees_close(restored, original, 0)


def test_a_memo_holds_no_weights_under_todays_weights_and_references_under_stash():
    stash, today = trace(), trace(todays_weights=True)
    assert [source.tree for source in today.held] == ["inputs"]
    assert {source.tree for source in stash.held} == {"params", "inputs"}
    assert [leaf.shape for leaf in stash.saved] == [(2, 3)]  # the hidden activation, once for two readers
    outputs, _, saved = jax.jit(stash.forward)(PARAMS, X, STATE)
    memo = stash.memo(saved, PARAMS, X, STATE, outputs)
    held = dict(zip(stash.held, memo.held, strict=True))
    assert all(array is X for source, array in held.items() if source.tree == "inputs")
    assert {id(array) for source, array in held.items() if source.tree == "params"} == {
        id(PARAMS["a"]),
        id(PARAMS["b"]),
    }


def test_the_policies_take_their_weights_where_they_say():
    today = jax.tree.map(lambda leaf: leaf + 0.5, PARAMS)
    g = jnp.ones((2, 4))
    h = layers.relu(X @ PARAMS["a"])

    def by_hand(a, b, h):
        dh = jnp.where(h > 0, g @ b.T, 0)
        return {"a": X.T @ dh, "b": h.T @ g, "c": g.sum(0)}, [dh @ a.T]

    stash = gradients(trace(), PARAMS, X, STATE, today, [g])
    assert_trees_close(stash, by_hand(PARAMS["a"], PARAMS["b"], h))
    current = gradients(trace(todays_weights=True), PARAMS, X, STATE, today, [g])
    assert_trees_close(current, by_hand(today["a"], today["b"], h))
    recompute = gradients(trace(todays_weights=True, remat=True), PARAMS, X, STATE, today, [g])
    assert_trees_close(recompute, by_hand(today["a"], today["b"], layers.relu(X @ today["a"])))
    recomputed = trace(todays_weights=True, remat=True)
    assert recomputed.saved == []
    assert [source.tree for source in recomputed.held] == ["inputs"]


def test_a_memo_refers_to_the_output_where_the_backward_reads_it():
    made = trace(lambda params, x, state: (layers.relu(x @ params["a"]), state))
    assert made.saved == []
    assert "outputs" in {source.tree for source in made.held}


def test_a_second_call_compiles_nothing():
    """A vjp carried across jit as it is would recompile for ever; the memo is a flat list of arrays."""
    made = trace()
    forward, backward = jax.jit(made.forward), jax.jit(made.backward)
    for shift in range(3):
        params = jax.tree.map(lambda leaf, shift=shift: leaf + shift, PARAMS)
        outputs, _, saved = forward(params, X, STATE)
        backward(params, made.memo(saved, params, X, STATE, outputs), [jnp.ones((2, 4))])
    assert forward._cache_size() == backward._cache_size() == 1


def test_no_gradients_of_inputs_where_nobody_wants_them():
    made = trace(differentiate_inputs=False)
    dparams, dinputs = gradients(made, PARAMS, X, STATE, PARAMS, [jnp.ones((2, 4))])
    assert dinputs == []
    assert_trees_close(dparams, gradients(trace(), PARAMS, X, STATE, PARAMS, [jnp.ones((2, 4))])[0])


def test_whole_numbers_pass_without_gradients():
    """Tokens or masks beside activations: gradients go to inexact leaves only, on both sides."""

    def embed(params, inputs, state):
        tokens, scale = inputs["tokens"], inputs["scale"]
        return {"tokens": tokens + 1, "x": params["table"][tokens] * scale}, state

    params = {"table": jnp.arange(8.0).reshape(4, 2)}
    inputs = {"tokens": jnp.array([1, 3]), "scale": jnp.array([[2.0], [3.0]])}
    made = trace(embed, params, inputs)
    dparams, dinputs = gradients(made, params, inputs, STATE, params, [jnp.ones((2, 2))])
    np.testing.assert_array_equal(dparams["table"], [[0, 0], [2, 2], [0, 0], [3, 3]])
    assert_trees_close(dinputs, [jnp.array([[5.0], [13.0]])])


def split(module):
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def apply(params, x, state):
        copy = nnx.merge(graph, params, state, copy=True)
        return copy(x), nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

    return apply, nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def hidden(module, x):
    apply, params, state = split(module)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(params)]
    return [names[i] for i in Trace(apply, params, x, state).hidden_params()]


IMAGES = jnp.ones((2, 4, 4, 3))


@pytest.mark.parametrize(
    ("module", "x", "expected"),
    [
        (layers.Conv(3, 4, rngs=nnx.Rngs(0), dtype="bfloat16"), IMAGES, []),
        (layers.BatchNorm(3, rngs=nnx.Rngs(0), dtype="bfloat16"), IMAGES, []),
        (layers.Linear(3, 4, rngs=nnx.Rngs(0), dtype="bfloat16"), jnp.ones((2, 3)), []),
        (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 3)), []),
        (nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), IMAGES, []),
        (nnx.Linear(3, 4, rngs=nnx.Rngs(0), dtype="bfloat16"), jnp.ones((2, 3)), ["kernel"]),
        (nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), dtype="bfloat16"), IMAGES, ["kernel"]),
        (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), IMAGES, ["scale"]),
        (nnx.LayerNorm(3, rngs=nnx.Rngs(0)), IMAGES, ["scale"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nnx.Module) else "",
)
def test_weights_hidden_in_copies_are_found(module, x, expected):
    assert hidden(module, x) == expected


@pytest.mark.parametrize(("remat", "expected"), [("convs", [(2, 4, 4, 4), (4,), (4,)]), ("full", [])])
def test_what_is_kept_of_foreign_layers(remat, expected):
    """Of Flax's: the convolution's output and the two sums of the normalisation; the last product nobody reads."""

    class Foreign(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.gelu(self.norm(self.conv(x))))

    apply, params, state = split(Foreign(nnx.Rngs(0)))
    assert sorted(leaf.shape for leaf in Trace(kept(remat, apply), params, IMAGES, state).saved) == expected


def test_a_trace_keeps_no_array():
    """It lives as long as the engine: what it kept would be weights of the beginning."""
    made = trace()
    assert {source.tree for source in made.held} == {"params", "inputs"}
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(vars(made)))


def test_remat_is_a_word_for_all_stages_or_one_for_each():
    assert resolve_remat("convs", 3, "stash") == ("convs",) * 3
    assert resolve_remat("full, none", 2, "stash") == resolve_remat(["full", "none"], 2, "stash") == ("full", "none")
    assert resolve_remat("none", 2, "current") == ("none", "none")


def test_weights_hidden_in_an_output_are_found():
    def also_returns_its_cast(params, x, state):
        cast = params["w"].astype(jnp.bfloat16)
        return (x @ cast.astype(x.dtype), cast), state

    def returns_what_it_used(params, x, state):
        y = jnp.tanh(x @ params["w"])
        return (y, y * y), state

    params = {"w": jnp.ones((2, 2))}
    assert trace(also_returns_its_cast, params).hidden_params() == [0]
    scaled_by_state = lambda params, x, state: (x @ (params["w"] * (1 + state["count"])), state)  # noqa: E731
    assert trace(scaled_by_state, params).hidden_params() == [0]
    assert trace(returns_what_it_used, params).hidden_params() == []


def test_weights_hidden_inside_a_scan_are_found():
    def cast_in_a_loop(params, x, state):
        step = lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16).astype(jnp.float32)), None)  # noqa: E731
        return jax.lax.scan(step, x, params["w"])[0], state

    def plain_in_a_loop(params, x, state):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0], state

    params = {"w": jnp.ones((3, 2, 2))}
    assert trace(cast_in_a_loop, params, jnp.ones((4, 2))).hidden_params() == [0]
    assert trace(plain_in_a_loop, params, jnp.ones((4, 2))).hidden_params() == []
