"""What a user hands to a pipeline, refused early and in one clear line: the rule, the value, the cure."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from fdg_jax.engine.base import PyTree, State
from fdg_jax.methods import Method
from fdg_jax.stage import describe

Shapes = PyTree  # of `jax.ShapeDtypeStruct`


def check_ingredients(layers: Any, loss: Any, optimizer: Any, method: Any, devices: Any) -> None:
    """Whether the arguments of `Pipeline` are of the right kind."""
    if not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a list of modules and callables; got one {type(layers).__name__}")
    if not layers:
        raise ValueError("a pipeline needs at least one layer; layers is empty")
    if not callable(loss):
        raise TypeError(f"loss must be a function (outputs, targets) -> scalar; got {loss!r:.60}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax transformation, such as optax.sgd(0.1); got {optimizer!r:.60}")
    if not isinstance(method, Method):
        raise TypeError(f"method must come from fdg_jax.methods, such as methods.fdg(beta=0.5); got {method!r:.60}")
    if devices is not None and not len(devices):
        raise ValueError("devices is empty; leave it out for all that JAX finds")
    if devices is not None and not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError(f"devices must be a list of JAX devices, such as jax.devices(); got {devices!r:.60}")


def typed_key(key: Any) -> jax.Array:
    """The key as `jax.random.key` makes it; `jax.random.PRNGKey` still makes raw ones."""
    try:
        key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        jax.random.split(key)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"key must be a single key of jax.random, such as jax.random.key(0); got {key!r:.60}"
        ) from None
    return key


def array_shapes(name: str, tree: PyTree) -> Shapes:
    """Shapes and dtypes as JAX will see them; `name` is for the complaint about what is no array."""

    def shape(leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            kind = type(leaf).__name__
            raise TypeError(
                f"{name} must be arrays, or a pytree of arrays; got a {kind}: np.asarray makes one of a list"
            )
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

    return jax.tree.map(shape, tree)


def batched_shapes(name: str, tree: PyTree) -> Shapes:
    """The same of inputs or targets, which have a batch dimension in front."""
    shapes = array_shapes(name, tree)
    for leaf in jax.tree.leaves(shapes):
        if not leaf.shape or not leaf.shape[0]:
            raise ValueError(f"{name} must have a batch dimension in front, of one or more; got {describe(leaf)}")
    return shapes


def batch_shapes(batch: Any, first_inputs: Shapes, first_targets: Shapes | None) -> tuple[Shapes, Shapes]:
    """Shapes of the inputs and targets of a batch that is like the first; of the first itself, no targets are known."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch is a pair (inputs, targets); got {type(batch).__name__}")
    names = "inputs", "targets"
    shapes = tuple(batched_shapes(f"the batch's {name}", tree) for name, tree in zip(names, batch, strict=True))
    if shapes == (first_inputs, first_targets):
        return shapes
    if len({leaf.shape[0] for leaf in jax.tree.leaves(shapes)}) > 1:
        raise ValueError(f"inputs {describe(shapes[0])} and targets {describe(shapes[1])} must be of equal length")
    for name, given, first in zip(names, shapes, (first_inputs, first_targets), strict=True):
        if first is not None and given != first:
            length_alone = without_batch(given) == without_batch(first)
            raise ValueError(
                f"the batch's {name} are {describe(given)}; every batch must be like the first, {describe(first)}"
                + (": drop or pad an incomplete last batch" if length_alone else "")
            )
    return shapes


def batch_signature(batch: Any) -> tuple | None:
    """What two batches must have in common for one check to do for both, quickly; None where a leaf is no array."""
    leaves, treedef = jax.tree.flatten(batch)
    try:
        return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
    except AttributeError:
        return None


def without_batch(shapes: Shapes) -> PyTree:
    """Shapes and dtypes but for the batch dimension."""
    return jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), shapes)


@contextmanager
def using(state: Any, num_stages: int) -> Iterator[None]:
    """Refuses what is no state of a pipeline of so many stages, or a state that an earlier call overwrote in place."""
    if not isinstance(state, State):
        raise TypeError(
            f"state must be what init or step returned (state, metrics = pipe.step(state, batch)); "
            f"got {type(state).__name__}"
        )
    if len(state.stages) != num_stages:
        raise ValueError(f"the state has {len(state.stages)} stages, the pipeline {num_stages}: it is another's")
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.stages)):
            raise
        raise ValueError(
            "this state was overwritten in place by an earlier step or drain: go on from the state that it returned"
        ) from error
