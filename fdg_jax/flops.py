"""Work of layers and stages in floating point operations: counted from the program, so that it costs a run no time.

Of a convolution or a matrix product there are two for every weight that meets a number, zeros of the padding included,
as papers count them; all else counts nothing. (XLA's own analysis of a lowered program leaves out the padding, counts
the body of a loop once however often it runs, and takes longer.)
"""

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.extend

from fdg_jax.stage import Layer, PyTree, describe


def count_flops(function: Callable, *args: PyTree) -> float:
    """Of one call with arguments of these shapes. A loop without a fixed number of turns counts as one turn.

    Args:
        function: traceable by JAX.
        args: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _in_jaxpr(jaxpr: Any) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Any) -> float:
    """2 x outputs x what each is a sum of; in a loop, so many times; of branches, the most."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed
    if eqn.primitive.name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
        summed = math.prod(kernel) // kernel[spec[0]]  # all but the output channels
        stuffed = math.prod(eqn.params["lhs_dilation"])  # zeros between numbers, in the gradient of a stride
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed / stuffed
    inside = [_in_jaxpr(jaxpr) for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == "cond":
        return max(inside)
    if eqn.primitive.name.startswith(("custom_vjp_call", "custom_jvp_call")):
        return inside[0] if inside else 0.0
    return (eqn.params["length"] if eqn.primitive.name == "scan" else 1) * sum(inside)


def _apply(layer: Layer) -> Callable:
    return lambda params, state, inputs, key: layer.apply(params, state, inputs, key, True)


def layer_flops(layers: Sequence[Layer], inputs: PyTree) -> list[float]:
    """Of every layer's forward on a batch; equal layers are counted once.

    Args:
        layers: of the whole network.
        inputs: shapes of a batch of the first layer's.
    """
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    counted: dict[Hashable, tuple[float, PyTree]] = {}
    flops = []
    for number, layer in enumerate(layers):
        params, state = jax.eval_shape(layer.init, key, inputs)
        kind = layer.signature or number, describe((params, state, inputs))
        if kind not in counted:
            args = params, state, inputs, key
            counted[kind] = count_flops(_apply(layer), *args), jax.eval_shape(_apply(layer), *args)[0]
        count, inputs = counted[kind]
        flops.append(count)
    return flops


def backward_flops(forward: Sequence[float]) -> list[float]:
    """Of every layer's backward: twice its forward's, for the gradients of weights and of inputs.

    Nobody asks for the gradient of the network's inputs: the first layer that has work to do makes those of weights
    alone, and its backward costs what its forward does.
    """
    first = next((number for number, count in enumerate(forward) if count), 0)
    return [count if number == first else 2 * count for number, count in enumerate(forward)]


def stage_flops(forward: Sequence[float], bounds: Sequence[int], forwards_again: Sequence[bool]) -> list[float]:
    """Of every stage's training on a batch: a forward, a backward, and maybe the forward once more.

    Args:
        forward: of every layer, from `layer_flops`.
        bounds: number of the first layer of every stage, then the number of layers.
        forwards_again: of every stage, whether its backward begins with the forward.
    """
    backward = backward_flops(forward)
    return [
        (2 if again else 1) * sum(forward[i:j]) + sum(backward[i:j])
        for (i, j), again in zip(pairwise(bounds), forwards_again, strict=True)
    ]


def shares(costs: Sequence[float]) -> list[float]:
    """Of the largest; empty where nothing was counted."""
    most = max(costs, default=0.0)
    return [cost / most for cost in costs] if most else []
