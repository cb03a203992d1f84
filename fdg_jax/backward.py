"""Light residuals, and which weights answer a late gradient.

A delayed method keeps D memos a stage, so a memo must hold nothing twice. What `jax.vjp` returns is a pytree whose
leaves are arrays, many of them the very arguments of the traced function; a jitted function that returned it would copy
those, weights and all. `lighten` compares leaves with what the caller holds *by identity*, while tracing, and keeps the
others only. `Trace` does this for a whole stage: one trace, a forward and a backward, and between them a memo that is a
flat list of arrays. (The treedef of a vjp carries a jaxpr, new in every trace: carried across a jit boundary it would
recompile for ever, so it stays here, as the one canonical treedef of the stage.)

Three policies, which coincide at a stage's first backward and wherever no update falls between forward and backward:

* *stash*: activations and weights of the forward, as in the papers' theory;
* *current*: activations of the forward, weights of today, as in the code released with FDG. An activation is whatever
  depends on the stage's input; what depends on parameters alone is a weight and has to be today's;
* *recompute*: input of the forward, weights of today: the forward is done again.

Beside the policy stands `remat`, which changes no value: how much of a forward a memo keeps, and how much of it is
done again with the forward's own weights. `kept` puts it into a function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from fdg_jax.names import check_name

PyTree = Any
POLICIES = ("stash", "current", "recompute")
REMATS = ("none", "convs", "full")


def resolve_remat(remat: str | Sequence[str], num_stages: int, policy: str) -> tuple[str, ...]:
    """What the memos of every stage keep, one word a stage.

    Args:
        remat: of `REMATS`: one word for all stages or one a stage; a string may hold several, as "full,none".
        num_stages: K.
        policy: which weights answer.

    Raises:
        ValueError: a word is none of these, there are too few or too many, or the policy allows "none" alone.
    """
    given = remat.split(",") if isinstance(remat, str) else remat if isinstance(remat, Sequence) else [remat]
    words = tuple(word.strip() if isinstance(word, str) else word for word in given)
    for word in words:
        check_name("remat", word, REMATS)
    if len(words) not in (1, num_stages):
        raise ValueError(f"remat must be one word, or one for each of {num_stages} stages; got {','.join(words)}")
    if policy != "stash" and set(words) != {"none"}:
        reason = {
            "current": "keeps the activations of the forward, and with today's weights they would come out otherwise: "
            "use policy 'stash', or 'recompute', which is just that",
            "recompute": "keeps a stage's input alone as it is: leave remat at 'none', or use policy 'stash'",
        }[policy]
        raise ValueError(f"remat={','.join(words)} does not go with policy {policy!r}, which {reason}")
    return words * num_stages if len(words) == 1 else words


def kept(remat: str, function: Callable) -> Callable:
    """The same function, whose vjp keeps its arguments and beside them: "none", whatever it reads; "full", nothing.

    "convs" keeps outputs of convolutions and matrix products, and sums, which are small and cost a pass over what they
    sum, like the mean of a normalisation; a backward then redoes elementwise operations only.
    """
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=_is_costly if remat == "convs" else None)


def _is_costly(primitive: jax.extend.core.Primitive, *_: Any, **params: Any) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general", "reduce_sum")


class Source(NamedTuple):
    """Where a leaf of a vjp is found again: leaf number `leaf` of the tree called `tree`."""

    tree: str
    leaf: int


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class LightVJP:
    """A vjp without the leaves that its caller holds anyway. A pytree: its leaves are `saved`, the rest is static."""

    saved: list[jax.Array]
    sources: tuple[Source, ...]
    treedef: jax.tree_util.PyTreeDef

    def needed(self, **trees: PyTree) -> dict[str, list]:
        """The leaves of each tree, with None in place of those that the backward does not read."""
        wanted = set(self.sources)
        return {
            name: [leaf if Source(name, i) in wanted else None for i, leaf in enumerate(jax.tree.leaves(tree))]
            for name, tree in trees.items()
        }

    def reads(self, *trees: str) -> bool:
        """Whether the backward reads any leaf of these trees."""
        return any(source.tree in trees for source in self.sources)

    def restore(self, **leaves: Sequence) -> Callable:
        """The vjp function, from the leaves of the trees that were given to `lighten`, in the same order."""
        found: dict[str, Sequence] = {**leaves, "saved": self.saved}
        return jax.tree.unflatten(self.treedef, [found[tree][i] for tree, i in self.sources])

    def tree_flatten(self):
        return self.saved, (self.sources, self.treedef)

    @classmethod
    def tree_unflatten(cls, static, saved):
        return cls(saved, *static)


def lighten(vjp: Callable, **trees: PyTree) -> LightVJP:
    """Drops from a vjp, under trace, every leaf that is a leaf of one of `trees`, and every second copy of a leaf."""
    leaves, treedef = jax.tree.flatten(vjp)
    place: dict[int, Source] = {}
    for name, tree in trees.items():
        for i, leaf in enumerate(jax.tree.leaves(tree)):
            place.setdefault(id(leaf), Source(name, i))
    saved: list[jax.Array] = []
    for leaf in leaves:
        if id(leaf) not in place:
            place[id(leaf)] = Source("saved", len(saved))
            saved.append(leaf)
    return LightVJP(saved, tuple(place[id(leaf)] for leaf in leaves), treedef)


class Memo(NamedTuple):
    """What a stage keeps of a forward for its backward: arrays that the forward made, and references to others."""

    saved: list[jax.Array]
    held: list[jax.Array]


class Trace:
    """A stage's training function, traced once: a forward, a backward, and what the memo between them holds.

    Args:
        function: `(params, inputs, state, *extras) -> (outputs, aux)`, pure.
        params, inputs, state, extras: arrays or `jax.ShapeDtypeStruct`s of the shapes to come.
        remat: keep the arguments only and do the forward again in the backward.
        todays_weights: the backward reads the parameters it is given, and the memo holds none.
        holds_params: the memo holds all parameters of the forward, for `params_then`.
        holds_outputs: the memo holds the outputs too, for `outputs_then`.
        differentiate_inputs: whether the backward gives gradients of the inputs as well.
    """

    def __init__(
        self,
        function: Callable,
        params: PyTree,
        inputs: PyTree,
        state: PyTree,
        *extras: PyTree,
        remat: bool = False,
        todays_weights: bool = False,
        holds_params: bool = False,
        holds_outputs: bool = False,
        differentiate_inputs: bool = True,
    ):
        # Shapes from here on: an array that stayed here would keep the weights of the beginning for ever.
        params, inputs, state, *extras = jax.eval_shape(lambda *args: args, params, inputs, state, *extras)
        self._num_params = len(jax.tree.leaves(params))
        self._num_inputs = len(jax.tree.leaves(inputs))
        light: LightVJP

        def forward(params, inputs, state, *extras):
            nonlocal light
            smooth, merge = _split_inexact(inputs) if differentiate_inputs else ([], lambda _: inputs)
            call = lambda params, smooth: function(params, merge(smooth), state, *extras)  # noqa: E731
            outputs, vjp, aux = jax.vjp(jax.checkpoint(call) if remat else call, params, smooth, has_aux=True)
            light = lighten(vjp, params=params, inputs=inputs, state=state, outputs=outputs)
            return outputs, aux, light.saved

        args = (params, inputs, state, *extras)
        self._jaxpr, shapes = jax.make_jaxpr(forward, return_shape=True)(*args)
        self.outputs, self.aux, self.saved = shapes  # as ShapeDtypeStructs
        self._results = jax.tree.structure(shapes)
        self._sources, self._treedef = light.sources, light.treedef
        elsewhere = ("saved", "params") if todays_weights else ("saved",)
        wanted = [*light.sources, *(Source("params", i) for i in range(self._num_params if holds_params else 0))]
        wanted += [Source("outputs", i) for i in range(len(jax.tree.leaves(self.outputs)) if holds_outputs else 0)]
        self.held = tuple(source for source in dict.fromkeys(wanted) if source.tree not in elsewhere)
        self._held_trees = {source.tree for source in self.held}
        self.held_shapes = self.memo([], params, inputs, state, self.outputs).held

    def forward(self, params: PyTree, inputs: PyTree, state: PyTree, *extras: PyTree) -> tuple:
        """(outputs, aux, saved arrays)."""
        flat = jax.extend.core.jaxpr_as_fun(self._jaxpr)(*jax.tree.leaves((params, inputs, state, *extras)))
        return jax.tree.unflatten(self._results, flat)

    def memo(self, saved: list, params: PyTree, inputs: PyTree, state: PyTree, outputs: PyTree) -> Memo:
        """The memo of a forward: `saved` as it returned them, and its own arguments where the backward reads them."""
        trees = {"params": params, "inputs": inputs, "state": state, "outputs": outputs}
        leaves = {name: jax.tree.leaves(trees[name]) for name in self._held_trees}
        return Memo(saved, [leaves[tree][i] for tree, i in self.held])

    def params_then(self, params: PyTree, memo: Memo) -> PyTree:
        """The parameters of the memo's forward, of a trace that holds them; `params` has their structure."""
        held = dict(zip(self.held, memo.held, strict=True))
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(treedef, [held[Source("params", i)] for i in range(len(leaves))])

    def outputs_then(self, memo: Memo) -> list[jax.Array]:
        """The outputs of the memo's forward that it holds, in order."""
        return [leaf for source, leaf in zip(self.held, memo.held, strict=True) if source.tree == "outputs"]

    def backward(self, params: PyTree, memo: Memo, cotangents: list[jax.Array]) -> tuple[PyTree, list]:
        """Gradients of the parameters, and of the inexact leaves of the inputs in order.

        Args:
            params: today's parameters, read where the memo holds none.
            memo: from `memo`.
            cotangents: of the inexact leaves of the outputs, in order.
        """
        held = dict(zip(self.held, memo.held, strict=True))
        trees = {"saved": memo.saved, "params": jax.tree.leaves(params)}
        leaves = [held[source] if source in held else trees[source.tree][source.leaf] for source in self._sources]
        vjp = jax.tree.unflatten(self._treedef, leaves)
        _, merge = _split_inexact(jax.tree.map(_zero_cotangent, self.outputs))
        return vjp(merge(cotangents))

    def hidden_params(self) -> list[int]:
        """Parameters, by their place among the leaves, that the backward reads through a copy made at the forward.

        Such a copy depends on parameters and not on the stage's input, and so would be a stale weight under *current*.
        """
        jaxpr = self._jaxpr.jaxpr
        saved = range(len(jaxpr.outvars) - len(self.saved), len(jaxpr.outvars))
        outputs = [source.leaf for source in self.held if source.tree == "outputs"]
        hidden: set[int] = set()
        for out in (*outputs, *saved):
            _, used = partial_eval.dce_jaxpr(jaxpr, [i == out for i in range(len(jaxpr.outvars))])
            if not any(used[self._num_params : self._num_params + self._num_inputs]):
                hidden.update(i for i in range(self._num_params) if used[i])
        return sorted(hidden)


def _split_inexact(tree: PyTree) -> tuple[list, Callable[[list], PyTree]]:
    """The leaves that can have gradients, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    smooth = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0 and _is_inexact(leaf)]

    def merge(replacements: list) -> PyTree:
        merged = list(leaves)
        for i, leaf in zip(smooth, replacements, strict=True):
            merged[i] = leaf
        return jax.tree.unflatten(treedef, merged)

    return [leaves[i] for i in smooth], merge


def _is_inexact(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _zero_cotangent(leaf) -> Any:
    return leaf if _is_inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0)
