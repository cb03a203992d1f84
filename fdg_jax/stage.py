"""Flax modules and callables become layers of pure functions, and consecutive layers a stage.

A `Layer` is `init` and `apply` on plain dicts of arrays; NNX objects stay out of the hot path, the public state and the
checkpoints. A `Stage` is the layers between two cuts, runs of equal layers stacked (see `stacking`).
"""

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdg_jax.backward import kept
from fdg_jax.stacking import fast_in_loops, scan_blocks, stack, unstack

PyTree = Any


@dataclass(frozen=True)
class Layer:
    """One layer as pure functions.

    Attributes:
        name: of the module's class or of the function.
        init: `(key, inputs) -> (params, state)`, the inputs as shapes.
        apply: `(params, state, inputs, key, train) -> (outputs, state)`.
        signature: layers with equal signatures compute the same function of their parameters; None is like nothing.
        num_params: where it is known before `init`.
    """

    name: str
    init: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, PyTree, jax.Array, bool], tuple[PyTree, PyTree]]
    signature: Hashable | None
    num_params: int | None


def as_layers(objects: Sequence[Any]) -> tuple[Layer, ...]:
    """Layers from Flax NNX modules, Linen modules and callables, in any mixture.

    Modules are switched as Flax does it: NNX modules by their `train()` and `eval()`, Linen modules by the argument of
    their `__call__` that is called train, training, is_training, deterministic or use_running_average. What a callable
    closes over is a constant to it. A Linen module listed twice is two layers, each with parameters of its own.

    Raises:
        TypeError: an object is none of these, or a module in a callable's dress, whose parameters nobody would train.
        ValueError: two layers share an NNX variable, which the split would silently untie.
    """
    layers = []
    owner: dict[int, int] = {}
    for number, thing in enumerate(objects):
        if isinstance(thing, nnx.Module):
            state = nnx.state(thing, nnx.Not(nnx.RngState))  # random streams may be shared: every layer reseeds its own
            for variable in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
                first = owner.setdefault(id(variable), number)
                if first != number:
                    raise ValueError(
                        f"layers {first} and {number} ({type(thing).__name__}) share a {type(variable).__name__}; "
                        "a stage trains its own copy, so give each layer its own module"
                    )
            layers.append(_from_nnx(thing))
        elif isinstance(thing, flax.linen.Module):
            layers.append(_from_linen(thing))
        elif isinstance(_unwrapped(thing), nnx.Module | flax.linen.Module):
            raise TypeError(
                f"layer {number} is a {type(thing).__name__} of a {type(_unwrapped(thing)).__name__}, "
                "whose parameters would not train: give the module itself"
            )
        elif callable(thing) and not isinstance(thing, type):
            layers.append(_from_callable(thing))
        else:
            cure = f": call {thing.__name__} to make one" if isinstance(thing, type) else ""
            raise TypeError(
                f"layer {number} is {thing!r:.60}; "
                f"a layer must be a Flax NNX module, a Linen module or a callable{cure}"
            )
    return tuple(layers)


def _unwrapped(function: Any) -> Any:
    """The function in a `partial`, the object of a bound method."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__self__", function)


def _from_nnx(module: nnx.Module) -> Layer:
    def split(module):
        """Graph definition, parameters, random streams and other state, the latter three as plain dicts."""
        nnx.pop(module, nnx.Intermediate)  # what a forward sowed is for its caller to look at, not state
        graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graph, *map(nnx.to_pure_dict, states)

    training, evaluating = nnx.clone(module), nnx.clone(module)
    training.train()
    evaluating.eval()
    graph_train, params, rng, state = split(training)
    graph_eval = split(evaluating)[0]

    def init(key, inputs):
        del key, inputs  # the module brings its parameters, or their shapes where nothing is to be run
        return jax.tree.map(_fresh, (params, state))

    def apply(params, state, inputs, key, train):
        graph = graph_train if train else graph_eval
        copy = nnx.merge(graph, params, _seed(rng, key), state, copy=True)
        outputs = copy(inputs)
        return outputs, split(copy)[3]

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Layer(type(module).__name__, init, apply, (graph_train, graph_eval), num_params)


def _fresh(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """A copy; zeros of a shape."""
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else jnp.array(leaf, copy=True)


def _seed(rng: PyTree, key: jax.Array) -> PyTree:
    """The random streams of a module, restarted from `key`: masks are functions of the key alone."""
    leaves, treedef = jax.tree.flatten(rng)
    fresh = [
        jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, fresh)


def _from_linen(module: flax.linen.Module) -> Layer:
    accepted = inspect.signature(type(module).__call__).parameters
    modes = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}

    def mode(train):
        return {name: training == train for name, training in modes.items() if name in accepted}

    def init(key, inputs):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
        variables = dict(jax.jit(partial(module.init, **mode(True)))(key, zeros))
        if "batch_stats" in variables and not mode(True):
            raise ValueError(
                f"its __call__ has no argument to switch its statistics by; give it one of {', '.join(modes)}"
            )
        return variables.pop("params", {}), variables

    def apply(params, state, inputs, key, train):
        rngs = {"params": key}  # on which every other stream, dropout's too, falls back
        mutable = list(state) if train else []
        outputs, new = module.apply({"params": params, **state}, inputs, rngs=rngs, mutable=mutable, **mode(train))
        return outputs, {**state, **new}

    return Layer(type(module).__name__, init, apply, _hashable(module), None)


def _from_callable(function: Callable) -> Layer:
    def apply(params, state, inputs, key, train):
        del params, key, train
        return function(inputs), state

    name = getattr(function, "__name__", type(function).__name__)
    return Layer(name, lambda key, inputs: ({}, {}), apply, _hashable(function), 0)


def _hashable(thing: Any) -> Hashable | None:
    try:
        hash(thing)
    except TypeError:
        return None
    return thing


def init_layers(layers: Sequence[Layer], key: jax.Array, inputs: PyTree) -> tuple[list, list, list]:
    """Parameters and state of every layer, and the shapes between them.

    Args:
        layers: of the whole network.
        key: for the layers that bring no parameters of their own.
        inputs: of the first layer, as shapes.

    Returns:
        Three lists: parameters and state, one entry a layer; shapes of the inputs of every layer and of the outputs.

    Raises:
        ValueError: a layer fails on its inputs; the message names it.
        TypeError: a layer returns something else than an array or a pytree of arrays.
    """
    params, states, shapes = [], [], [inputs]
    for number, layer in enumerate(layers):
        try:
            p, s = layer.init(jax.random.fold_in(key, number), shapes[-1])
            outputs, state = jax.eval_shape(partial(_checked, layer, number), p, s, shapes[-1], key)
            if _shapes(state) != _shapes(s):
                raise ValueError(f"its state changes from {describe(s)} to {describe(state)} in a forward")
        except _NotArrays as error:
            raise TypeError(str(error)) from None
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            given = describe(shapes[-1])
            giver = f"layer {number - 1} ({layers[number - 1].name}) returns" if number else "the batch holds"
            raise ValueError(
                f"layer {number} ({layer.name}) fails on inputs {given}: {reason.rstrip('.')}; mend it, or what {giver}"
            ) from error
        params.append(p)
        states.append(s)
        shapes.append(outputs)
    return params, states, shapes


class _NotArrays(Exception):
    pass


def _checked(layer: Layer, number: int, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array):
    outputs, state = layer.apply(params, state, inputs, key, True)
    leaves = jax.tree.leaves(outputs, is_leaf=lambda leaf: leaf is None)
    wrong = [leaf for leaf in leaves if not isinstance(leaf, jax.Array | np.ndarray)]
    if wrong or not leaves:
        raise _NotArrays(
            f"layer {number} ({layer.name}) returns {outputs!r:.60}; a layer must return an array or a pytree of arrays"
        )
    return outputs, state


def describe(tree: PyTree) -> str:
    """Shapes and dtypes in a few characters: float32[8,32,32,3]."""
    leaves = [f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(tree)]
    return leaves[0] if len(leaves) == 1 else f"({', '.join(leaves)})"


@dataclass(frozen=True)
class Stage:
    """The layers between two cuts as one pure function.

    Attributes:
        layers: in order.
        start: number of the first layer in the network.
        groups: how many layers each entry of the stage's `params` and `state` stands for; their sum is len(layers).
            Trees of a group of several have a leading axis of that length.
        remat: what a memo keeps beside the stage's input: "none", all that the backward reads; "convs", outputs of
            convolutions and matrix products; "full", the input of every layer. The rest the backward computes again.
    """

    layers: tuple[Layer, ...]
    start: int
    groups: tuple[int, ...]
    remat: str = "none"

    @property
    def runs(self) -> list[int]:
        """Numbers, in the network, of the layers with which stacked groups begin."""
        starts = accumulate(self.groups, initial=self.start)
        return [start for start, size in zip(starts, self.groups, strict=False) if size > 1]

    def stack(self, trees: Sequence[PyTree]) -> list[PyTree]:
        """One tree a layer -> one tree a group."""
        rest = iter(trees)
        grouped = [[next(rest) for _ in range(size)] for size in self.groups]
        return [stack(group) if len(group) > 1 else group[0] for group in grouped]

    def unstack(self, trees: Sequence[PyTree]) -> list[PyTree]:
        """One tree a group -> one tree a layer."""
        return [
            tree
            for size, group in zip(self.groups, trees, strict=True)
            for tree in (unstack(group, size) if size > 1 else [group])
        ]

    def apply(self, params: list, state: list, inputs: PyTree, key: jax.Array, train: bool) -> tuple[PyTree, list]:
        """(outputs, new state). Layer l draws its randomness from fold_in(key, l), wherever the cuts are."""
        remat = self.remat if train else "none"
        whole = remat if remat == "convs" else "none"  # which needs no input of a layer but the first
        return kept(whole, partial(self._apply, remat, train))(params, state, inputs, key)

    def _apply(
        self, remat: str, train: bool, params: list, state: list, inputs: PyTree, key: jax.Array
    ) -> tuple[PyTree, list]:
        number, new_state = self.start, []
        for size, p, s in zip(self.groups, params, state, strict=True):
            block = kept(remat, partial(_block, self.layers[number - self.start], train))
            if size == 1:
                inputs, s = block(p, s, inputs, key, number)
            else:
                numbers = jnp.arange(number, number + size, dtype=jnp.uint32)
                inputs, s = scan_blocks(block, p, s, inputs, key, numbers)
            number += size
            new_state.append(s)
        return inputs, new_state


def _block(layer: Layer, train: bool, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array, number: jax.Array):
    return layer.apply(params, state, inputs, jax.random.fold_in(key, number), train)


def group_layers(
    layers: Sequence[Layer], params: Sequence[PyTree], state: Sequence[PyTree], shapes: Sequence[PyTree], platform: str
) -> tuple[int, ...]:
    """Lengths of the groups into which a stage's layers fall: runs of layers that can be stacked, and single layers.

    Args:
        layers, params, state: of the stage.
        shapes: inputs of every layer, and the outputs of the last.
        platform: of the stage's device. On "cpu" a layer with a convolution other than `layers.conv` stays alone.
    """
    groups: list[int] = []
    for i, layer in enumerate(layers):
        stacks = (
            i > 0
            and layer.signature is not None
            and layer.signature == layers[i - 1].signature
            and _shapes((params[i], state[i])) == _shapes((params[i - 1], state[i - 1]))
            and _shapes(shapes[i - 1]) == _shapes(shapes[i]) == _shapes(shapes[i + 1])
            and jax.tree.leaves(params[i]) != []
            and all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(shapes[i]))
            and (groups[-1] > 1 or platform != "cpu" or _fast_in_loops(layer, params[i], state[i], shapes[i]))
        )
        if stacks:
            groups[-1] += 1
        else:
            groups.append(1)
    return tuple(groups)


def _shapes(tree: PyTree) -> Hashable:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _fast_in_loops(layer: Layer, params: PyTree, state: PyTree, inputs: PyTree) -> bool:
    def training(params, state, inputs, key):
        return layer.apply(params, state, inputs, key, True)

    return fast_in_loops(training, params, state, inputs, jax.random.key(0))
