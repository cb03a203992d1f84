import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close, in_float64, make_pipeline, run, tiny_batches, tiny_mlp

from fdg_jax import methods, models, optim
from fdg_jax.engine.worker import Worker
from fdg_jax.models.parts import Head
from fdg_jax.stacking import optimizer_allows

SHAPE = (8, 8, 1)


def resnet(depth, **kwargs):
    return models.resnet_cifar(depth, rngs=nnx.Rngs(0), width=2, num_classes=3, in_shape=SHAPE, **kwargs)


@pytest.mark.parametrize("policy", ["stash", "current", "recompute"])
def test_stacking_changes_no_value(policy):
    """In float64, since in float32 sums in another order differ by rounding, which BatchNorm amplifies step by step."""
    ends = []
    with jax.enable_x64(True):
        batches = [(images.astype("float64"), labels) for images, labels in tiny_batches(5, SHAPE)]
        for stack in (True, False):
            equal = resnet(20, dtype="float64")[:4]
            network = in_float64([*equal, Head(2, 3, rngs=nnx.Rngs(0), dtype="float64")])
            pipe = make_pipeline(network, cuts=(4,), stack=stack, method=methods.fdg(0.5, policy))
            state, _ = run(pipe, batches)
            ends.append((pipe.params(state), pipe.module_state(state)))
            assert pipe._started().plan.stages[0].groups == ((1, 3) if stack else (1, 1, 1, 1))
    assert_trees_close(*ends, 1e-9)


def num_equations(jaxpr):
    return sum(1 + sum(map(num_equations, jax.extend.core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


@pytest.mark.parametrize("stack", [True, False])
def test_memo_leaves_and_program_do_not_grow_with_depth(stack):
    """What decides dispatch and compilation: number of arrays in a memo, size of the traced program."""
    sizes = []
    for depth in (20, 110):
        pipe = make_pipeline(resnet(depth), num_stages=1, stack=stack, method=methods.bp())
        images, labels = tiny_batches(1, SHAPE)[0]
        state = pipe.init(jax.random.key(0), images)
        own = state.stages[0]
        worker = Worker(pipe._started().plan, 0, own, labels)
        trace = worker.trace
        sizes.append((len(trace.saved) + len(trace.held), len(jax.tree.leaves(own)), num_equations(trace._jaxpr.jaxpr)))
    assert (sizes[0] == sizes[1]) == stack


def test_a_memo_is_four_activations_a_block():
    """Input and output of both convolutions. Beside them: the stem's convolution, the input of each stacked run (which
    the layer before saves too), and per channel vectors. The output of the last block stands for the stem's ReLU."""
    depth, batch = 32, 4
    n = (depth - 2) // 6
    for stack, runs in ((False, 0), (True, 3)):
        pipe = make_pipeline(resnet(depth), num_stages=2, cuts=(3 * n + 1,), stack=stack)
        images, _ = tiny_batches(1, SHAPE, batch)[0]
        pipe.init(jax.random.key(0), images)
        trace = pipe._started().workers[0].trace
        saved = [leaf for leaf in trace.saved if leaf.ndim >= 4]
        held = [shape for source, shape in zip(trace.held, trace.held_shapes, strict=True) if source.tree == "outputs"]
        activation = batch * 8 * 8 * 2  # of the first group; a group later has half as many numbers
        blocks = n * activation * (4 + 4 / 2 + 4 / 4) + activation / 2 + activation / 4  # inputs of the halving blocks
        stem = activation
        extra = activation * (1 + 1 / 2 + 1 / 4) if runs else 0
        assert sum(leaf.size for leaf in saved + held) == blocks + stem + extra + activation / 4


def test_only_per_channel_vectors_come_on_top():
    """Statistics of every normalisation; no copy of a weight, no scalars (each array costs a dispatch)."""
    pipe = make_pipeline(resnet(20), cuts=(10,))
    pipe.init(jax.random.key(0), tiny_batches(1, SHAPE)[0][0])
    trace = pipe._started().workers[0].trace
    vectors = [leaf.shape for leaf in trace.saved if leaf.ndim < 4]
    assert len(vectors) == 2 * (
        1 + 2 * 5
    )  # mean and deviation: the stem, two norms in two single blocks and three runs
    assert all(shape[-1] in (2, 4, 8) for shape in vectors)


def spare_vectors(tree):
    return jax.tree.map(lambda p: p.ndim > 1, tree)


BLOCKS = [{"kernel": jax.random.normal(jax.random.key(i), (3, 4)), "bias": jnp.full(4, 0.1 * i)} for i in range(1, 3)]


@pytest.mark.parametrize(
    ("optimizer", "allowed"),
    [
        (optim.sgd(0.1, 0.9, 1e-4), True),
        (optax.adamw(1e-3), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), True),
        (optax.chain(optax.clip(0.5), optax.sgd(optim.piecewise(0.1, [2]))), True),
        (optax.MultiSteps(optim.sgd(0.1, 0.9, 1e-4), 4).gradient_transformation(), True),
        (optax.adamw(1e-3, weight_decay=1.0, mask=spare_vectors), False),
        (
            optax.MultiSteps(optax.adamw(1e-3, weight_decay=5e-4, mask=spare_vectors), 4).gradient_transformation(),
            False,
        ),
        (optax.adamw(optim.piecewise(1e-3, [5], warmup_steps=5), weight_decay=0.1, mask=spare_vectors), False),
        (optax.set_to_zero(), False),  # has shown nothing
        (optax.lars(0.1), False),
        (optax.lamb(0.1), False),
        (optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)), False),
        (optax.contrib.muon(0.1), False),
        (optax.GradientTransformation(lambda p: (), lambda g, s, p: 1 / 0), False),
    ],
)
def test_which_optimizers_may_see_stacked_parameters(optimizer, allowed):
    assert optimizer_allows(optimizer, [BLOCKS]) == allowed


def test_every_run_is_tried():
    """Weight decay masked by rank tells biases from stacked biases, and kernels from nothing."""
    kernels = [{"kernel": block["kernel"]} for block in BLOCKS]
    optimizer = optax.adamw(1e-3, weight_decay=1.0, mask=spare_vectors)
    assert optimizer_allows(optimizer, [kernels])
    assert not optimizer_allows(optimizer, [kernels, BLOCKS])


def test_blocks_stay_single_where_the_optimizer_could_tell():
    """Weight decay by rank would spare a single bias and hit a stacked one."""
    optimizer = optax.adamw(0.01, weight_decay=0.5, mask=spare_vectors)
    network = tiny_mlp(5)
    batches = tiny_batches(4)
    automatic = make_pipeline(network, num_stages=2, optimizer=optimizer, method=methods.fdg())
    single = make_pipeline(network, num_stages=2, optimizer=optimizer, method=methods.fdg(), stack=False)
    assert_trees_close(automatic.params(run(automatic, batches)[0]), single.params(run(single, batches)[0]), 0)
