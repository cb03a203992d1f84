"""How batches reach the pipeline in a run: one by one, or many in a call where the device makes them itself."""

import time
from types import TracebackType

from fdg_jax.data import ArraySource, Source
from fdg_jax.engine.base import State
from fdg_jax.pipeline import Pipeline

SECONDS = 1.0  # about as long may a call take: between two calls a run hears signals and shows its progress


class Feeding:
    """Feeds the batches of a run in order. A context, since reading ahead has to end.

    Args:
        pipe, source: of the run.
        seed, batch_size: of the batches.
        first: number of the first batch.
    """

    def __init__(self, pipe: Pipeline, source: Source, seed: int, batch_size: int, first: int):
        self._pipe = pipe
        # Only the fused engine gains by it, and only sets that live on the device can do it.
        resident = source if pipe.engine == "fused" and isinstance(source, ArraySource) else None
        self._feed = resident.feed(seed, batch_size) if resident else None
        self._batches = source.batches(seed, batch_size, first)
        self._most = 1

    def __enter__(self) -> "Feeding":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._batches.close()

    def advance(self, state: State, most: int) -> tuple[State, int]:
        """The state after some of the next `most` batches, and how many; does not wait for the last of them.

        Raises:
            ValueError: a batch cannot be read.
        """
        if self._feed is None:
            return self._pipe.step(state, next(self._batches))[0], 1
        num, began = min(most, self._most), time.perf_counter()
        state, _ = self._pipe.run(state, self._feed, num)
        seconds = time.perf_counter() - began  # of the call before this one, for which the engine has waited
        if seconds > 2 * SECONDS:
            self._most = max(1, num // 2)
        elif seconds < SECONDS / 2 and num == self._most:
            self._most *= 2
        return state, num
