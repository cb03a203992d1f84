"""Whether a snapshot fits what asks for it, and if not, in what it differs: one line, first difference first."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import chain, zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.backward import Memo
from fdg_jax.engine.base import Metrics, PyTree

RECORDED = {"fed", "origin", "stages", "inbox", "outbox", "memos", "arrays", "pipeline", "versions", "targets"}
Leaf = tuple[str, Any]  # a name, and an array or its shape

_version = cache(version)  # it reads files


class Mismatch(ValueError):
    """The snapshot is of another run; one line that says in what it differs."""


def named_leaves(tree: PyTree) -> list[Leaf]:
    """The leaves of a tree with dotted names."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def is_key(leaf: Any) -> bool:
    """Whether it is a typed key of `jax.random`, or the shape of one."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype as JSON; of a typed key, which a file cannot hold, those of its numbers and its kind beside."""
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        impl = {"impl": str(jax.random.key_impl(leaf))} if isinstance(leaf, jax.Array) else {}
        return {"shape": list(data.shape), "dtype": data.dtype.name, "key": str(leaf.dtype), **impl}
    weak = {"weak": True} if getattr(leaf, "weak_type", False) else {}
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name, **weak}


def _words(description: Mapping[str, Any]) -> str:
    return f"{description.get('key', description['dtype'])}[{','.join(map(str, description['shape']))}]"


def compare(what: str, wanted: PyTree, leaves: list, arrays: list[dict]) -> None:
    """Whether recorded leaves have the names, shapes and dtypes of a tree; Mismatch says what differs first."""
    here = {name: _words(describe(leaf)) for name, leaf in named_leaves(wanted)}
    there = {name: _words(arrays[number]) for name, number in leaves}
    for name in dict.fromkeys(chain(here, there)):
        if here.get(name) != there.get(name):
            raise Mismatch(
                f"{what}{'.' * bool(name)}{name} is {there.get(name, 'missing')} in the checkpoint, "
                f"{here.get(name, 'missing')} here"
            )
    if list(here) != list(there):  # leaves are put back by their places
        raise Mismatch(f"{what} has the order {', '.join(there)} in the checkpoint, {', '.join(here)} here")


def fit(what: str, saved: Sequence[Mapping[str, Any]], like: Sequence[PyTree]) -> list[PyTree]:
    """Leaves by name, a mapping a layer, as the trees that a network has; Mismatch says what does not fit."""
    if len(saved) != len(like):
        raise Mismatch(f"the network has {len(saved)} layers in the checkpoint, {len(like)} here")
    trees = []
    for number, (found, tree) in enumerate(zip(saved, like, strict=True)):
        names = [name for name, _ in named_leaves(tree)]
        order = {name: place for place, name in enumerate(names)}
        found = dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
        leaves = [[name, place] for place, name in enumerate(found)]
        compare(f"layer {number}'s {what}", tree, leaves, [describe(leaf) for leaf in found.values()])
        trees.append(jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in names]))
    return trees


def versions() -> dict[str, str]:
    """Of the packages on whose word a snapshot depends."""
    from fdg_jax import __version__  # which the package has when it is complete, installed or not

    others = {name: _version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    return {"fdg_jax": __version__, **others}


def compare_runs(record: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Whether a snapshot is of a pipeline like the one here; Mismatch says in what they differ."""
    if missing := sorted(RECORDED - set(record)):
        raise Mismatch(f"the checkpoint is not of a pipeline: it has no {' and no '.join(missing)}")
    saved = {"remat": ["none"] * len(here["pipeline"]["remat"]), **record["pipeline"]}  # which once was not recorded
    name, there, value = _first_difference("", saved, here["pipeline"])
    if there != value:
        raise Mismatch(f"{name} is {there} in the checkpoint, {value} here")
    for name in ("fdg_jax", "jax", "flax"):  # which decide what a memo holds, and in which order
        saved, running = record["versions"][name], here["versions"][name]
        if record["memos"] and saved != running:
            raise Mismatch(f"{name} is {saved} in the checkpoint, {running} here, which cannot read its memos")


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """Where two values of JSON differ first, by a dotted name, and both; lists with numbers in them stay whole."""
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(key, there.get(key, "missing"), value) for key, value in here.items()]
    elif isinstance(there, list) and isinstance(here, list) and not any(isinstance(item, int) for item in there + here):
        pairs = [(n, *both) for n, both in enumerate(zip_longest(there, here, fillvalue="missing"))]
    for key, one, other in pairs:
        if one != other:
            return _first_difference(f"{name}{'.' * bool(name)}{key}", one, other)
    return name, there, here


def shapes_as_json(tree: PyTree) -> list | None:
    """Names, shapes and dtypes of a tree's leaves."""
    return None if tree is None else [[name, describe(leaf)] for name, leaf in named_leaves(tree)]


def targets_of(record: Mapping[str, Any], given: PyTree) -> PyTree:
    """The targets of a batch, as shapes, of a recorded run; None where it had not seen a batch.

    Raises:
        Mismatch: those given are others, or none are and they are no single array.
    """
    saved = record["targets"]
    if saved is None:
        return given
    if given is None and [name for name, _ in saved] == [""]:
        return jax.ShapeDtypeStruct(tuple(saved[0][1]["shape"]), np.dtype(saved[0][1]["dtype"]))
    if given is None:
        raise Mismatch("targets are a tree, which a checkpoint cannot tell: give example_targets")
    leaves = [[name, number] for number, (name, _) in enumerate(saved)]
    compare("the targets of a batch", given, leaves, [description for _, description in saved])
    return given


def compare_totals(totals: Metrics, reported: Mapping[str, Any]) -> None:
    """Whether the sums over batches are of what the loss function reports; Mismatch says in what they differ."""
    leaves = [[name, number] for number, name in enumerate(totals)]
    compare("the sum of the metric", reported, leaves, [describe(total) for total in totals.values()])


def compare_memos(what: str, memo: Memo, wanted: Memo) -> None:
    """Whether a memo is like another, of shapes, which a stage's visits read; Mismatch says in what it differs."""
    for part, found, shapes in zip(Memo._fields, memo, wanted, strict=True):
        leaves = [[name, number] for number, (name, _) in enumerate(named_leaves(found))]
        compare(f"{what}: {part}", shapes, leaves, [describe(leaf) for leaf in found])
