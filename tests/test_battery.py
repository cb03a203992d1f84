"""Every policy, order, optimizer and number of stages against the oracle, tick by tick.

In float64, where rounding cannot hide a wrong step: the two agree to nine digits after every tick. In float32 a network
without BatchNorm, which amplifies rounding, agrees to six.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from helpers import assert_trees_close, in_float64

from fdg_jax import Pipeline, layers, methods, models, optim, softmax_cross_entropy

NUM_BATCHES = 7
EXACT, CLOSE = 1e-9, 1e-6


class Residual(nnx.Module):
    """BatchNorm, linear, ReLU beside a shortcut: a normalised block that compiles fast."""

    def __init__(self, features, rngs, dtype):
        self.norm = layers.BatchNorm(features, rngs=rngs, dtype=dtype)
        self.linear = layers.Linear(features, features, rngs=rngs, dtype=dtype)

    def __call__(self, x):
        return layers.relu(self.linear(self.norm(x))) + x


def mlp(dtype):
    network = models.mlp(3, rngs=nnx.Rngs(1), width=5, num_classes=3, in_shape=(2, 3), dtype=dtype)[1:]
    return network, [oracle.hidden_layer()] * 3 + [oracle.linear_layer()], (6,)


def normed(dtype):
    rngs = nnx.Rngs(1)
    network = [*(Residual(5, rngs, dtype) for _ in range(4)), layers.Linear(5, 3, rngs=rngs, dtype=dtype)]
    return network, [oracle.residual_layer()] * 4 + [oracle.linear_layer()], (5,)


def resnet(dtype):
    network = models.resnet_cifar(8, rngs=nnx.Rngs(1), width=2, num_classes=3, in_shape=(4, 4, 1), dtype=dtype)
    blocks = [oracle.block_layer(), oracle.block_layer(4), oracle.block_layer(8)]
    return network, [oracle.stem_layer(), *blocks, oracle.head_layer()], (4, 4, 1)


NETWORKS = {"mlp": mlp, "normed": normed, "resnet": resnet}
OPTIMIZERS = {"sgd": optim.sgd(0.05, momentum=0.9, weight_decay=1e-2), "adam": optax.adam(0.01)}
POLICIES = ("stash", "current", "recompute")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("optimizer", "beta"), [("sgd", 0.5), ("adam", 1.0)])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("network", ["mlp", "normed"])
def test_fdg_is_algorithm_1(network, optimizer, num_stages, beta, policy):
    with jax.enable_x64(True):
        follow_oracle(network, optimizer, num_stages, methods.fdg(beta, policy), "float64", EXACT)


def test_fdg_is_algorithm_1_on_a_resnet():
    """Convolutions and shortcuts too, under the policy that needs the most of the layers."""
    with jax.enable_x64(True):
        follow_oracle("resnet", "sgd", 3, methods.fdg(0.5, "current"), "float64", EXACT)


@pytest.mark.parametrize("policy", POLICIES)
def test_forward_first_is_algorithm_1_with_the_two_exchanged(policy):
    with jax.enable_x64(True):
        follow_oracle("normed", "sgd", 3, methods.fdg(0.5, policy, "forward_first"), "float64", EXACT)


@pytest.mark.parametrize("policy", POLICIES)
def test_float32_stays_within_rounding(policy):
    follow_oracle("mlp", "sgd", 4, methods.fdg(0.5, policy), "float32", CLOSE)


@pytest.mark.parametrize(
    ("network", "optimizer", "num_stages", "policy", "order"),
    [
        *[("normed", "sgd", 3, policy, "update_first") for policy in POLICIES],
        ("normed", "adam", 2, "stash", "forward_first"),
        ("mlp", "adam", 3, "current", "update_first"),
        ("mlp", "sgd", 1, "stash", "update_first"),
    ],
)
def test_a_skipped_batch_is_algorithm_1_without_its_updates(network, optimizer, num_stages, policy, order):
    with jax.enable_x64(True):
        method = methods.fdg(0.5 if optimizer == "sgd" else 1.0, policy, order)
        follow_oracle(network, optimizer, num_stages, method, "float64", EXACT, skipped=(2,))


def test_the_oracle_tells_the_policies_apart():
    """Otherwise the agreement above would prove little: after the first update the three go different ways."""
    ends = {}
    for policy in POLICIES:
        _, steps, shape = NETWORKS["mlp"]("float32")
        network, _, _ = mlp("float32")
        params = [nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in network]
        modules = make_modules(steps, params, (1, 2), OPTIMIZERS["sgd"], policy)
        for _ in oracle.fdg(modules, make_batches(shape, "float32"), 1.0):
            pass
        ends[policy] = modules[0].params[0]["linear"]["kernel"]
    for one, other in itertools.combinations(ends.values(), 2):
        assert float(jnp.max(jnp.abs(one - other))) > 1e-5


def follow_oracle(network, optimizer, num_stages, method, dtype, tolerance, skipped=()):
    """Runs both side by side and compares parameters, optimizer state and loss after every tick, draining included.

    The inputs of the batches in `skipped` are NaN.
    """
    network, steps, shape = NETWORKS[network](dtype)
    batches = make_batches(shape, dtype)
    for number in skipped:
        batches[number][0][:] = np.nan
    skip = bool(skipped)
    pipe = Pipeline(
        in_float64(network) if dtype == "float64" else network,
        loss=softmax_cross_entropy,
        optimizer=OPTIMIZERS[optimizer],
        method=method,
        num_stages=num_stages,
        stack=False,
        skip_nonfinite=skip,
    )
    state = pipe.init(jax.random.key(0), batches[0][0])
    modules = make_modules(steps, pipe.params(state), pipe.cuts, OPTIMIZERS[optimizer], method.policy, skip)
    expected = oracle.fdg(modules, batches, method.beta, method.schedule.keywords["order"])

    def compare():
        for own, module in zip(state.stages, modules, strict=True):
            assert_trees_close(own.params, module.params, tolerance)
            assert_trees_close(own.opt_state, module.opt_state, tolerance)

    for batch in batches:
        state, metrics = pipe.step(state, batch)
        loss = next(expected)
        assert (metrics is None) == (loss is None)
        if loss is not None:
            assert_trees_close(metrics["loss"], np.float32(loss), CLOSE)
        compare()
    state, drained = pipe.drain(state)
    losses = [np.float32(loss) for loss in expected if loss is not None]
    assert_trees_close([metrics["loss"] for metrics in drained], losses, CLOSE)
    compare()
    for module_state, statistics in zip(
        pipe.module_state(state), [s for m in modules for s in m.statistics], strict=True
    ):
        for name, (mean, var) in statistics.items():
            assert_trees_close(module_state[name], {"mean": mean, "var": var}, tolerance)


def make_modules(steps, params, cuts, optimizer, policy, skip=False):
    params = jax.tree.map(jnp.array, params)
    bounds = itertools.pairwise((0, *cuts, len(steps)))
    return [oracle.Module(steps[i:j], params[i:j], optimizer, policy, skip) for i, j in bounds]


def make_batches(shape, dtype):
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, 4).astype(np.int32) for _ in range(NUM_BATCHES)]
    return [(rng.normal(size=(4, *shape)).astype(dtype), y) for y in labels]
