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
from fdg_jax.agreement import named_leaves
from fdg_jax.checkpoint import Checkpoints, read_checkpoint
from fdg_jax.corrections import SwitchToSynchronous, WeightPrediction

HALF = 5  # batches: stage 0 of three has answered its first one, and all kinds of things are in flight
BATCHES = tiny_batches(2 * HALF)
POLICIES = ("stash", "current", "recompute")
CASES = {
    **{f"bp-{k}": (methods.bp(), k) for k in (1, 3)},
    **{f"{policy}-3": (methods.fdg(policy=policy), 3) for policy in POLICIES},
    "forward_first-3": (methods.fdg(order="forward_first"), 3),
    # What only some methods keep: half a group's gradients and a correction's state, older weights, heads, synthesisers
    "switch-2": (
        methods.adl(2, order="forward_first").with_corrections(WeightPrediction("held"), SwitchToSynchronous(7)),
        2,
    ),
    "pipedream_2bw-2": (methods.pipedream_2bw(2), 2),
    "dgl-2": (methods.dgl("linear"), 2),
    "dni-2": (methods.dni("linear"), 2),
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
    """Three layers on (N, 6), three classes, no two of one shape."""
    rngs = nnx.Rngs(seed)
    return [Block(6, 5, rngs), Block(5, 4, rngs), layers.Linear(4, 3, rngs=rngs)]


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
    flight = {str(key): tree for part in (state.inbox, state.outbox, state.memos) for key, tree in part.items()}
    stages = [own._asdict() for own in state.stages]
    # A step reports nothing while the pipeline fills.
    steps = [metrics or {"loss": np.nan} for metrics in reported]
    return {name: on_host(leaf) for name, leaf in named_leaves([state.fed, state.origin, stages, flight, steps, means])}


def on_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


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
