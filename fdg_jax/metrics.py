"""What is measured: the loss and its metrics on a batch, sums over a test set, and the files that numbers go to."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.sealed import replace_text

PyTree = Any


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross entropy in nats and accuracy, in float32 or better: logits (N, C), targets (N,) integers in 0..C-1.

    Raises:
        ValueError: the shapes or dtypes are others.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            "softmax_cross_entropy wants logits (N, C) and targets (N,) of whole numbers; got "
            f"{logits.dtype}{list(logits.shape)} and {targets.dtype}{list(targets.shape)}"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == targets, dtype=jnp.float32)}


def call_loss(loss: Callable, outputs: PyTree, targets: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and all that is to be reported: "loss" itself and the metrics that the function gives beside it.

    Raises:
        ValueError: the function gives something else than a floating point scalar, or that and a dict of scalars.
    """
    result = loss(outputs, targets)
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(metrics, Mapping):
        kind = type(metrics).__name__
        raise ValueError(f"the loss function must give a dict of metrics beside the loss; it gives a {kind}")
    taken = sorted({"loss", "batches", "count"} & set(metrics))
    if taken:
        raise ValueError(f"the metric {taken[0]!r} would hide the pipeline's own: give it another name")
    for name, scalar in {"the loss": value, **{f"the metric {name!r}": m for name, m in metrics.items()}}.items():
        if not isinstance(scalar, jax.Array | np.ndarray | np.generic):
            raise ValueError(f"{name} must be a scalar array; the loss function gives a {type(scalar).__name__}")
        if scalar.shape != ():
            given = f"{scalar.dtype}{list(scalar.shape)}"
            raise ValueError(f"{name} must be a scalar; the loss function gives {given}: average over the batch")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"the loss must be a floating point number; the loss function gives {value.dtype}")
    return value, {"loss": value, **metrics}


@partial(jax.jit, static_argnames="loss")
def masked_sums(loss: Callable, outputs: PyTree, targets: PyTree, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums, over the examples that `mask` (N,) keeps, of "loss" and what the loss function reports; their "count".

    Each example is a batch of one to `loss`, so that padding leaves no trace.
    """

    def one(outputs, targets):
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], (outputs, targets))
        return {**call_loss(loss, *batch_of_one)[1], "count": jnp.ones(())}

    return jax.tree.map(lambda each: jnp.sum(jnp.where(mask, each, 0)), jax.vmap(one)(outputs, targets))


class MetricWriter:
    """Appends to `metrics.jsonl`, one object a line, and writes TensorBoard events under the same tags.

    Both are on their way to the disk when `write` returns: what a killed process measured is not lost.

    Args:
        workdir: an existing folder.
        last_step: of a run that goes on, the last step whose numbers stand; later ones, and a line that was cut off,
            are taken out, since the run makes them again.
    """

    def __init__(self, workdir: Path, last_step: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter  # only a run with a workdir needs it
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._path = workdir / "metrics.jsonl"
        if last_step is not None:
            _drop_later(self._path, last_step)
        self._lines = self._path.open("a", encoding="utf-8")
        # Its SummaryWriter writes from a thread, and waits for ever once the disk is full and the thread dead.
        self._event_type, self._summary_type = Event, Summary
        self._events = EventsWriter(str(workdir / "events"), f".{os.getpid()}")
        if last_step is not None:
            start = SessionLog(status=SessionLog.START)  # hides the events of this step and later ones
            self._events.write_event(Event(step=last_step + 1, session_log=start, wall_time=time.time()))

    def write(self, step: int, epoch: float, time_s: float, values: Mapping[str, float]) -> None:
        """One moment of the run: batches and epochs fed, seconds since the start, and what was measured, by tag.

        Raises:
            OSError: it cannot be written.
        """
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = {"step": step, "epoch": round(epoch, 4), "time_s": round(time_s, 3), **finite}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        scalars = [self._summary_type.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = self._summary_type(value=scalars)
        self._events.write_event(self._event_type(step=step, wall_time=time.time(), summary=summary))
        self._events.flush()

    def close(self) -> None:
        for file in (self._lines, self._events):
            with contextlib.suppress(OSError):  # of what `write` could not write, and has told
                file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, but for one that was cut off by a crash; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _drop_later(path: Path, last_step: int) -> None:
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= last_step]
    replace_text(path, "".join(kept))
