"""Training goes on in another process: `python resume_script.py FOLDER` resumes every case that it finds there.

`FOLDER/NAME/step_*` holds the checkpoint of case NAME, and FOLDER/NAME.npz gets what `outcome` says of its second half.
The test imports the same cases and runs them straight.
"""

import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # as many devices as the tests have, and their compiled programs
import jax
import numpy as np
import optax
from flax import nnx
from helpers import make_pipeline, tiny_batches

from fdg_jax import Pipeline, State, layers, methods
from fdg_jax.checkpoint import Checkpoints, read_checkpoint
from fdg_jax.snapshot import named_leaves

HALF = 5  # batches: stage 0 of three has answered its first one, and all kinds of things are in flight
BATCHES = tiny_batches(2 * HALF)
POLICIES = ("stash", "current", "recompute")
CASES = {
    **{f"bp-{k}": (methods.bp(), k) for k in (1, 2, 3)},
    **{f"{policy}-{k}": (methods.fdg(0.5, policy), k) for policy in POLICIES for k in (1, 2, 3)},
    **{f"forward_first-{policy}": (methods.fdg(0.5, policy, "forward_first"), 3) for policy in POLICIES},
}


class Block(nnx.Module):
    """BatchNorm, linear, ReLU, dropout."""

    def __init__(self, features: int, outputs: int, rngs: nnx.Rngs):
        self.norm = layers.BatchNorm(features, rngs=rngs)
        self.linear = layers.Linear(features, outputs, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(layers.relu(self.linear(self.norm(x))))


def blocks(seed: int) -> list:
    """Four layers on (N, 6), three classes, no two of one shape."""
    rngs = nnx.Rngs(seed)
    return [Block(6, 5, rngs), Block(5, 4, rngs), Block(4, 7, rngs), layers.Linear(7, 3, rngs=rngs)]


def begin(name: str, seed: int) -> tuple[Pipeline, State]:
    """The pipeline of a case and its state before the first batch; the seed is all that is random in them."""
    method, num_stages = CASES[name]
    pipe = make_pipeline(blocks(seed), method=method, num_stages=num_stages, optimizer=optax.adam(0.01))
    return pipe, pipe.init(jax.random.key(seed), BATCHES[0][0])


def train(pipe: Pipeline, state: State, batches: list) -> tuple[State, list]:
    """The state after some batches, and what every step returned as metrics."""
    reported = []
    for batch in batches:
        state, metrics = pipe.step(state, batch)
        reported.append(metrics)
    return state, reported


def outcome(pipe: Pipeline, state: State, reported: list) -> dict[str, np.ndarray]:
    """Everything that two runs can be compared by, by name: the state, what is in flight included, and the metrics."""
    state, means = pipe.read_metrics(state)
    fields: dict[str, Any] = {f"stage {k}": own._replace(key=None) for k, own in enumerate(state.stages)}
    flight = [{" ".join(map(str, key)): tree for key, tree in box.items()} for box in (state.inbox, state.outbox)]
    memos = {f"{k} {batch}": tuple(memo) for (k, batch), memo in state.memos.items()}
    steps = dict(enumerate(reported))
    found = {**fields, "in flight": flight, "memos": memos, "steps": steps, "means": means}
    return {name: np.asarray(leaf) for name, leaf in [*named_leaves_of(found), ("fed", state.fed)]}


def named_leaves_of(tree: Any) -> list:
    """Leaves with names; batches without metrics, while the pipeline fills, count as leaves too."""
    return named_leaves(jax.tree.map(lambda leaf: -1.0 if leaf is None else leaf, tree, is_leaf=lambda leaf: leaf is None))


def resume(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The second half of a case, from its checkpoint; network and key come from another seed."""
    pipe, fresh = begin(name, seed=7)
    (path,) = Checkpoints(folder / name).complete()
    snapshot, _ = read_checkpoint(path)
    state = pipe.restore(fresh, snapshot)
    return outcome(pipe, *train(pipe, state, BATCHES[HALF:]))


if __name__ == "__main__":
    for case in CASES:
        np.savez(Path(sys.argv[1]) / f"{case}.npz", **resume(case, Path(sys.argv[1])))
