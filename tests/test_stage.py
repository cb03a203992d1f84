from functools import partial
from itertools import pairwise

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, host, make_pipeline, run, tiny_batches, tiny_mlp

from fdg_jax import layers, methods, models
from fdg_jax.stage import Stage, as_layers, group_layers, init_layers

KEY = jax.random.key(0)


class LinenBlock(flax.linen.Module):
    """With everything a Linen module can have: parameters, statistics, dropout and a flag for training."""

    features: int
    rate: float = 0.0

    @flax.linen.compact
    def __call__(self, x, train):
        x = flax.linen.Dense(self.features)(x)
        x = flax.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return flax.linen.Dropout(self.rate, deterministic=not train)(flax.linen.relu(x))


class NnxBlock(nnx.Module):
    def __init__(self, features, rate, rngs):
        self.linear = nnx.Linear(features, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


def split_inits(made, x):
    params, state, shapes = init_layers(made, KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return params, state, shapes


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)


@pytest.mark.parametrize("module", [LinenBlock(4), NnxBlock(4, 0.0, nnx.Rngs(0))], ids=["linen", "nnx"])
def test_modules_become_pure_functions_with_statistics(module):
    (layer,) = as_layers([module])
    (params,), (state,), _ = split_inits([layer], X)
    before = host(state)
    outputs, new = layer.apply(params, state, X, KEY, True)
    assert_trees_close(state, before, 0)  # pure: what was given is as it was
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path((params, new))}
    kernel, mean = (next(leaf for path, leaf in flat.items() if name in path) for name in ("kernel", "mean"))
    assert_trees_close(mean, 0.1 * (X @ kernel).mean(0), 1e-5)
    evaluated, same = layer.apply(params, new, X, KEY, False)
    assert_trees_close(same, new, 0)
    assert float(jnp.abs(evaluated - outputs).max()) > 1e-3


@pytest.mark.parametrize("module", [LinenBlock(4, 0.5), NnxBlock(4, 0.5, nnx.Rngs(0))], ids=["linen", "nnx"])
def test_dropout_is_a_function_of_the_key(module):
    (layer,) = as_layers([module])
    (params,), (state,), _ = split_inits([layer], X)
    one, _ = layer.apply(params, state, X, KEY, True)
    again, _ = layer.apply(params, state, X, KEY, True)
    other, _ = layer.apply(params, state, X, jax.random.key(1), True)
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    evaluated, _ = layer.apply(params, state, X, KEY, False)
    other_evaluated, _ = layer.apply(params, state, X, jax.random.key(1), False)
    np.testing.assert_array_equal(evaluated, other_evaluated)


def test_streams_of_one_module_differ_and_start_anew_in_every_batch():
    class Two(nnx.Module):
        def __init__(self):
            self.one, self.other = nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(2))

        def __call__(self, x):
            return self.one(x), self.other(x)

    used, fresh = Two(), Two()
    used(X)  # counts in the user's module have moved on
    masks = [layer.apply({}, {}, X, KEY, True)[0] for layer in as_layers([used, fresh])]
    assert_trees_close(*masks, 0)
    assert (masks[0][0] != masks[0][1]).any()


class Flagged(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, deterministic):
        return flax.linen.Dropout(0.5, deterministic=deterministic)(x)


@pytest.mark.parametrize("module", [Flagged(), flax.linen.BatchNorm()], ids=["deterministic", "use_running_average"])
def test_flags_that_mean_evaluation_are_turned_round(module):
    (layer,) = as_layers([module])
    (params,), (state,), _ = split_inits([layer], X)
    trained, _ = layer.apply(params, state, X, KEY, True)
    evaluated, same = layer.apply(params, state, X, KEY, False)
    assert_trees_close(same, state, 0)
    assert_trees_close(evaluated, X, 1e-4)  # nothing dropped; the first statistics are mean 0 and variance 1
    assert float(jnp.abs(trained - X).max()) > 1e-2


def test_equal_linen_layers_start_from_different_parameters():
    (one, other), _, _ = split_inits(as_layers([flax.linen.Dense(4), flax.linen.Dense(4)]), X)
    assert (one["kernel"] != other["kernel"]).any()


@pytest.mark.parametrize("policy", ["stash", "current"])
def test_users_modules_are_never_changed(policy):
    """Nor are their arrays donated."""
    *hidden, head = tiny_mlp()
    network = [*hidden, NnxBlock(5, 0.5, nnx.Rngs(0)), head]

    def content():
        return [nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))) for module in network]

    before, deterministic = host(content()), network[3].dropout.deterministic
    run(make_pipeline(network, cuts=(3,), stack=False, method=methods.fdg(0.5, policy)), tiny_batches(4))
    assert_trees_close(content(), before, 0)
    assert network[3].dropout.deterministic == deterministic


def test_linen_nnx_and_callables_train_together():
    network = [LinenBlock(6), jnp.tanh, NnxBlock(6, 0.1, nnx.Rngs(0)), flax.linen.Dense(3)]
    _, losses = run(make_pipeline(network, num_stages=3), tiny_batches(1) * 30)
    assert losses[-1] < 0.5 * losses[0]


class Oddly(flax.linen.Module):
    """A Linen module whose flag has another of the usual names, or an unusual one."""

    @flax.linen.compact
    def __call__(self, x, is_training=False):
        return flax.linen.BatchNorm(use_running_average=not is_training)(x)


class Nameless(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, learn=False):
        return flax.linen.BatchNorm(use_running_average=not learn)(x)


def test_linen_modules_are_switched_by_any_usual_name_and_refused_otherwise():
    (layer,) = as_layers([Oddly()])
    (params,), (state,), _ = split_inits([layer], X)
    _, new = layer.apply(params, state, X, KEY, True)
    assert float(jnp.abs(new["batch_stats"]["BatchNorm_0"]["mean"]).max()) > 0
    with pytest.raises(
        ValueError, match=r"layer 0 \(Nameless\) fails .* no argument to switch its statistics by; give"
    ):
        split_inits(as_layers([Nameless()]), X)


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs
        self.linear = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.linear(x) + 0 * jax.random.normal(self.rngs.params(), ())


@pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning")
def test_what_a_module_sows_is_no_state_and_random_streams_may_be_shared():
    rngs = nnx.Rngs(0)
    network = [Sowing(rngs), Sowing(rngs), nnx.Linear(6, 3, rngs=rngs)]
    network[0](jnp.ones((2, 6)))  # and may have been left there before
    pipe = make_pipeline(network, num_stages=2)
    state, losses = run(pipe, tiny_batches(4))
    assert np.isfinite(losses).all()
    assert pipe.module_state(state) == [{}, {}, {}]


class Growing(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        self.sow("losses", "penalty", x.sum())
        return x


def test_a_pytree_passes_between_layers():
    """Activations beside a mask of whole numbers, through a cut."""

    def fork(x):
        return {"x": x, "mask": jnp.arange(x.shape[0]) % 2}

    class Inner(nnx.Module):
        def __init__(self):
            self.linear = layers.Linear(6, 6, rngs=nnx.Rngs(0))

        def __call__(self, inputs):
            return {"x": self.linear(inputs["x"]), "mask": inputs["mask"]}

    def join(inputs):
        return inputs["x"][:, :3] * inputs["mask"][:, None]

    network = [layers.Linear(6, 6, rngs=nnx.Rngs(1)), fork, Inner(), join]
    whole = run(make_pipeline(network, num_stages=1, method=methods.bp()), tiny_batches(3))
    cut = run(make_pipeline(network, cuts=(2, 3), method=methods.bp()), tiny_batches(3))
    np.testing.assert_allclose(cut[1], whole[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (["relu"], TypeError, "layer 0 is 'relu'; a layer must be a Flax NNX module, a Linen module or a callable"),
        ([nnx.Linear], TypeError, "a layer must be a Flax NNX module, .*: call Linear to make one"),
        ([nnx.Linear], TypeError, "layer 0 is <class"),
        (
            [tiny_mlp()[0].__call__],
            TypeError,
            "layer 0 is a method of a Hidden, whose parameters would not train: give the module",
        ),
        ([partial(partial(tiny_mlp()[0]))], TypeError, "layer 0 is a partial of a Hidden, whose parameters"),
        ([Growing()], ValueError, r"layer 0 \(Growing\) fails on .*: its state changes from float32\[\] to \(float32"),
        ([*tiny_mlp(), lambda x: None], TypeError, r"layer 4 \(<lambda>\) returns None; .* pytree of arrays"),
        ([*tiny_mlp(), lambda x: "text"], TypeError, r"layer 4 \(<lambda>\) returns 'text'"),
        ([*tiny_mlp(), lambda x: (x, 3)], TypeError, r"layer 4 \(<lambda>\) returns \("),
        (
            [tiny_mlp()[0], nnx.Linear(7, 3, rngs=nnx.Rngs(0))],
            ValueError,
            r"layer 1 \(Linear\) fails on inputs float32\[4,5\]: .*; mend it, or what layer 0 \(Hidden\) returns$",
        ),
        ([nnx.Linear(7, 3, rngs=nnx.Rngs(0))], ValueError, r"layer 0 .*; mend it, or what the batch holds$"),
    ],
)
def test_wrong_layers_are_refused(network, error, message):
    with pytest.raises(error, match=message) as caught:
        make_pipeline(network, num_stages=1).init(KEY, tiny_batches(1)[0][0])
    assert "\n" not in str(caught.value)


def test_layers_that_share_a_parameter_are_refused():
    shared = layers.Linear(6, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers 0 and 2 \(Linear\) share a Param; .* give each layer its own"):
        as_layers([shared, jnp.tanh, shared])


def grouped(network, x, platform="cpu"):
    made = as_layers(network)
    params, state, shapes = init_layers(made, KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return group_layers(made, params, state, shapes, platform)


def test_runs_of_equal_layers_are_found():
    network = models.resnet_cifar(20, rngs=nnx.Rngs(0), width=2, in_shape=(8, 8, 1))
    assert grouped(network, jnp.ones((2, 8, 8, 1))) == (1, 3, 1, 2, 1, 2, 1)


def test_layers_that_differ_stay_alone():
    rngs = nnx.Rngs(0)
    x = jnp.ones((2, 6))
    equal = [nnx.Linear(6, 6, rngs=rngs) for _ in range(2)]
    assert grouped(equal, x) == (2,)
    assert grouped([equal[0], nnx.Linear(6, 6, use_bias=False, rngs=rngs)], x) == (1, 1)
    assert grouped([layers.BatchNorm(6, rngs=rngs, epsilon=epsilon) for epsilon in (1e-5, 1e-2)], x) == (1, 1)
    narrowing = [layers.Conv(3, 3, padding="VALID", rngs=rngs) for _ in range(2)]
    assert grouped(narrowing, jnp.ones((2, 9, 9, 3))) == (1, 1)
    assert grouped([jnp.tanh, jnp.tanh], x) == (1, 1)  # nothing to stack
    assert grouped([flax.linen.Dense(6), flax.linen.Dense(6), flax.linen.Dense(5)], x) == (2, 1)


def test_a_convolution_without_its_own_vjp_stays_out_of_loops_on_the_cpu():
    foreign = [nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(i)) for i in range(2)]
    own = [layers.Conv(3, 3, rngs=nnx.Rngs(i)) for i in range(2)]
    x = jnp.ones((2, 4, 4, 3))
    assert grouped(foreign, x) == (1, 1)
    assert grouped(foreign, x, platform="gpu") == (2,)
    assert grouped(own, x) == (2,)

    class Hidden(nnx.Module):
        """Its convolution is inside another function's program."""

        def __init__(self):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.remat(lambda conv, x: conv(x))(self.conv, x)

    assert grouped([Hidden(), Hidden()], x) == (1, 1)


def test_whole_numbers_stay_out_of_loops():
    """The loop has a vjp of its own, which takes gradients of every input."""

    class Masked(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(4))

        def __call__(self, inputs):
            return {"x": inputs["x"] * self.scale[...], "mask": inputs["mask"]}

    made = as_layers([Masked(), Masked()])
    shapes = {"x": jax.ShapeDtypeStruct((2, 4), jnp.float32), "mask": jax.ShapeDtypeStruct((2,), jnp.int32)}
    assert group_layers(made, *init_layers(made, KEY, shapes), "cpu") == (1, 1)


def test_stack_and_unstack_are_inverse():
    made = as_layers([*[nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(3)], jnp.tanh])
    params, _, _ = split_inits(made, jnp.ones((2, 3)))
    stage = Stage(made, 5, (3, 1))
    assert stage.runs == [5]
    stacked = stage.stack(params)
    assert stacked[0]["kernel"].shape == (3, 3, 3)
    assert_trees_close(stage.unstack(stacked), params, 0)


def test_where_the_cuts_are_changes_no_mask():
    """Dropout follows the layer's number in the network, not its stage."""
    network = [NnxBlock(6, 0.5, nnx.Rngs(i)) for i in range(3)]
    made = as_layers(network)
    params, state, _ = split_inits(made, jnp.ones((8, 6)))
    x = jax.random.normal(KEY, (8, 6))
    whole, _ = Stage(made, 0, (3,)).apply(
        [jax.tree.map(lambda *a: jnp.stack(a), *params)], [jax.tree.map(lambda *a: jnp.stack(a), *state)], x, KEY, True
    )
    y = x
    for i, j in pairwise((0, 1, 3)):
        y, _ = Stage(made[i:j], i, (1,) * (j - i)).apply(params[i:j], state[i:j], y, KEY, True)
    assert_trees_close(y, whole)
