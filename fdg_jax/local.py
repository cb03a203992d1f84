"""Learning from a loss of one's own: decoupled greedy learning (DGL), and predicted error gradients (DNI).

They run on `schedule.local` and `schedule.dni`: in tick t stage k does forward, backward and update of batch i = t - k,
and D_k = tau_k = 0. h_k are the outputs of stage k, y the targets, theta_k the stage's parameters, phi_k those of what
is added to it.

**DGL** (Belilovsky et al. 2020). Stage k < K-1 minimises loss(head_k(h_k), y) over theta_k and phi_k; the last stage
has the network's own head. Its input is a constant, nothing is sent back, so that no stage knows which stages follow.

**DNI** (Jaderberg et al. 2017). Stage k < K-1 answers its batch in the tick of the forward with an estimate of the
error gradient, e_k = M_k(h_k[, y]), and its synthesiser M_k learns from what the next stage makes of the same batch:

    tick i+k    stage k     F_i: h_k = f_k(theta_k, h_(k-1)), sent to k+1;  e_k = M_k(phi_k, h_k, y)
                            B_i: g_k, d_(k-1) = J_k^T e_k;  d_(k-1) is sent to k-1;   U: theta_k by g_k
                            kept: (h_k, y), with nothing of the inside of M_k
    tick i+k+1  stage k+1   F_i B_i U likewise, its e_(k+1) the true error gradient if it is the last;
                            d_k = J_(k+1)^T e_(k+1) is sent to k
    tick i+k+2  stage k     S_i: phi_k by the gradient of |M_k(phi_k, h_k, y) - d_k|^2, from the (h_k, y) that was kept
                            and d_k, both then dropped; in the same visit, after it: F B U of batch i+2

So a tick of stage k is the visit "S_(i-2) F_i B_i U", without S on the last stage. It reads the messages INPUTS_i
(k > 0), TARGETS_i (the last stage, and all with label context) and COTANGENTS_(i-2) (k < K-1), and sends INPUTS_i down
(k < K-1) and COTANGENTS_i up (k > 0). Between two ticks stage k < K-1 holds the (h_k, y) of two batches. S reads the
phi_k of its own tick and does M_k's forward again, so that the gradient is a true one, of one phi_k; M_k's running
statistics move with F only. The last S, of stage K-2, runs in tick i + K: one after the last stage's update.
As slots: `Slot("S", k + 2)` before those of `schedule.local` for k < K-1; S_i reads (k, F_i) and (k+1, B_i).

The scale of what M_k learns: the loss is a mean over N examples, hence e_k is of order 1/N, and the mean squared error
and its gradient are small. Adam does not mind; the code released with DGL, which has DNI to compare with, uses it for
all parameters, and notes that SGD does not converge.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fdg_jax.metrics import call_loss
from fdg_jax.models.heads import check_features, make_head, make_synthesiser
from fdg_jax.stage import Layer, as_layers, describe

PyTree = Any


def make_heads(
    kind: str, outputs: Sequence[PyTree], num_classes: int, key: jax.Array, dtype: DTypeLike | None = None
) -> tuple[Layer, ...]:
    """An auxiliary head for every stage but the last; see `models.heads.make_head`.

    Args:
        kind: "mlp_sr" or "linear".
        outputs: of these stages, as shapes.
        num_classes: width of the logits.
        key: of the initialisation; head k draws from fold_in(key, k), whatever comes after.
        dtype: of the computation; by default that of the outputs.

    Raises:
        ValueError: there is no such kind, or a stage's outputs are not one tensor (N, F) or (N, H, W, C).
    """
    heads = [
        make_head(kind, _features(k, tree), num_classes, key=jax.random.fold_in(key, k), dtype=dtype or _dtype(tree))
        for k, tree in enumerate(outputs)
    ]
    return as_layers(heads)


def make_synthesisers(
    kind: str,
    outputs: Sequence[PyTree],
    num_classes: int | None,
    key: jax.Array,
    dtype: DTypeLike | None = None,
    width: int = 128,
) -> tuple[Layer, ...]:
    """A synthesiser for every stage but the last; see `models.heads.make_synthesiser`.

    Args:
        kind: "deep" or "linear".
        outputs: of these stages, as shapes.
        num_classes: of the label context; None for none.
        key, dtype: as for `make_heads`.
        width: channels of the hidden layers.

    Raises:
        ValueError: as `make_heads`.
    """
    synthesisers = [
        make_synthesiser(
            kind,
            _features(k, tree),
            num_classes,
            key=jax.random.fold_in(key, k),
            dtype=dtype or _dtype(tree),
            width=width,
        )
        for k, tree in enumerate(outputs)
    ]
    return as_layers(synthesisers)


def _features(k: int, outputs: PyTree) -> tuple[int, ...]:
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.inexact):
        raise ValueError(
            f"a local loss reads one floating point tensor; stage {k} puts out {describe(outputs)}: cut elsewhere"
        )
    return check_features(leaves[0].shape[1:])


def _dtype(outputs: PyTree) -> DTypeLike:
    return jax.tree.leaves(outputs)[0].dtype


def num_params(layers: Sequence[Layer]) -> list[int]:
    """Auxiliary parameters, one number a head or synthesiser: they are no part of the network and count apart."""
    return [layer.num_params or 0 for layer in layers]


def greedy(stage: Callable, head: Layer, loss: Callable) -> Callable:
    """A stage's training function under DGL: its own loss on its own outputs, both parameters at once.

    Args:
        stage: `(params, state, inputs, key) -> (outputs, state)` in training form.
        head: of the stage.
        loss: of the network, `(logits, targets)`.

    Returns:
        `((theta, phi), inputs, (state, head state), key, targets) -> (value, ((state, head state), reported,
        outputs))`, to differentiate in the first argument: what the outputs become elsewhere changes no gradient.
    """

    def train(params, inputs, state, key, targets):
        (theta, phi), (own, added) = params, state
        outputs, own = stage(theta, own, inputs, key)
        logits, added = head.apply(phi, added, outputs, key, True)
        value, reported = call_loss(loss, logits, targets)
        return value, ((own, added), reported, outputs)

    return train


def synthesise(
    synthesiser: Layer, params: PyTree, state: PyTree, outputs: jax.Array, targets: PyTree, key: jax.Array
) -> tuple[jax.Array, PyTree]:
    """e_k = M_k(h_k[, y]), shaped as the outputs, and the synthesiser's state after this forward.

    Args:
        synthesiser: from `make_synthesisers`.
        params, state: its own.
        outputs: h_k.
        targets: y, read with label context only.
        key: for layers that draw.
    """
    return synthesiser.apply(params, state, (outputs, targets), key, True)


def synthesis_loss(
    synthesiser: Layer,
    params: PyTree,
    state: PyTree,
    outputs: jax.Array,
    targets: PyTree,
    cotangent: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The mean over all entries of (M_k(h_k[, y]) - d_k)^2, in float32 or better; differentiate in `params`.

    Args:
        synthesiser, params, state, outputs, targets, key: as for `synthesise`, of the batch that d_k belongs to; the
            state is not moved a second time.
        cotangent: d_k = J_(k+1)^T e_(k+1), what stage k+1 sent back; a constant.
    """
    estimate, _ = synthesise(synthesiser, params, state, outputs, targets, key)
    dtype = jnp.promote_types(estimate.dtype, jnp.float32)
    return jnp.mean(jnp.square(estimate.astype(dtype) - cotangent.astype(dtype)))
