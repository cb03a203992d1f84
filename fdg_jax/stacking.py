"""Equal blocks stacked along a new leading axis and scanned: how, and when it is the same and no slower.

The number of arrays, the cost of a dispatch and the time to compile then do not grow with depth. The scan has its own
vjp. JAX's would save a block's output next to the following block's input, which is the same activation; here block j's
backward is handed the input of block j + 1.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.backward import lighten

PyTree = Any


def stack(trees: Sequence[PyTree]) -> PyTree:
    """One tree of equal trees, with a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: PyTree, size: int) -> list[PyTree]:
    """The inverse of `stack`."""
    return [jax.tree.map(itemgetter(i), tree) for i in range(size)]


def scan_blocks(
    block: Callable, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array, numbers: jax.Array
) -> tuple[PyTree, PyTree]:
    """Applies equal blocks one after another: (outputs, new state).

    Args:
        block: `(params, state, inputs, key, number) -> (outputs, state)`, outputs shaped as inputs.
        params, state, numbers: stacked, one entry a block.
        inputs: of the first block; inexact arrays.
        key: given to every block as it is.
    """

    @jax.custom_vjp
    def run(params, inputs, state, key, numbers):
        return jax.lax.scan(lambda x, of: block(of[0], of[1], x, key, of[2]), inputs, (params, state, numbers))

    def forward(params, inputs, state, key, numbers):
        def body(x, of):
            p, s, number = of
            y, vjp, new = jax.vjp(lambda p, x: block(p, s, x, key, number), p, x, has_aux=True)
            light = lighten(vjp, params=p, state=s, inputs=x, outputs=y)
            return y, (new, light, x if light.reads("inputs", "outputs") else None)

        outputs, (new, light, xs) = jax.lax.scan(body, inputs, (params, state, numbers))
        last = outputs if light.reads("outputs") else None
        return (outputs, new), (light.needed(params=params, state=state), light, xs, last)

    def backward(residuals, cotangents):
        held, light, xs, last = residuals

        def body(carry, of):
            cotangent, y = carry
            held, light, x = of
            dparams, dx = light.restore(**held, inputs=jax.tree.leaves(x), outputs=jax.tree.leaves(y))(cotangent)
            return (dx, None if y is None else x), dparams

        (dinputs, _), dparams = jax.lax.scan(body, (cotangents[0], last), (held, light, xs), reverse=True)
        return dparams, dinputs, None, None, None

    run.defvjp(forward, backward)
    return run(params, inputs, state, key, numbers)


def fast_in_loops(function: Callable, *args: PyTree) -> bool:
    """Whether XLA:CPU runs the gradient as fast inside a loop: no convolution but those with a vjp of their own."""

    def fast(jaxpr) -> bool:
        return all(
            eqn.primitive.name.startswith("custom_vjp_call")
            or (
                eqn.primitive.name != "conv_general_dilated"
                and all(map(fast, jax.extend.core.jaxprs_in_params(eqn.params)))
            )
            for eqn in jaxpr.eqns
        )

    return fast(jax.make_jaxpr(function)(*args).jaxpr)


def optimizer_allows(optimizer: optax.GradientTransformation, runs: Sequence[Sequence[PyTree]]) -> bool:
    """Whether an optimizer moves runs of equal blocks by the same updates when each run is stacked.

    SGD and Adam do; those that look at a parameter's rank, name or norm do not (weight decay masked by rank, LARS,
    Muon). Decided by a trial: steps on random parameters (a bias that is still zero would hide its decay) with random
    gradients, tiny, middling and huge. Enough steps for an optimizer that accumulates a few gradients, or starts late;
    one that never moves has shown nothing and is not trusted.

    Args:
        optimizer: any.
        runs: parameters of the blocks of every run, at least two blocks each.
    """

    rng = np.random.default_rng(0)

    def normal(tree):
        return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tree)

    def stacked(runs):
        return [jax.tree.map(lambda *blocks: np.stack(blocks), *run) for run in runs]

    params = normal([list(run) for run in runs])
    gradients = [normal(params) for _ in range(4)]
    update = jax.jit(optimizer.update)

    def trial(size):
        state, state_together = optimizer.init(params), optimizer.init(stacked(params))
        moved = False
        for step in range(16):
            grads = jax.tree.map(lambda leaf: leaf.dtype.type(size) * leaf, gradients[step % 4])
            updates, state = update(grads, state, params)
            together, state_together = update(stacked(grads), state_together, stacked(params))
            for a, b in zip(jax.tree.leaves(stacked(updates)), jax.tree.leaves(together), strict=True):
                largest = np.abs(a).max()
                moved |= largest > 0
                if not np.abs(a - b).max() <= 1e-5 * largest:
                    return False
        return moved

    try:
        return all(trial(size) for size in (1.0, 1e-3, 1e3))
    except Exception:  # it cannot even be called on the stacked tree: leave the layers as they are
        return False
