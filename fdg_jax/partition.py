"""Layers -> K stages -> devices. Every layer lands in exactly one stage, in order, and no stage is empty.

A *cut* is the number of the first layer of a stage: K - 1 increasing cuts make K stages.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import TypeVar

from fdg_jax.names import check_name

T = TypeVar("T")

SPLITS = ("layers", "parameters")


def resolve_cuts(
    cuts: Sequence[int] | str, num_stages: int | None, num_params: Sequence[int | None]
) -> tuple[int, ...]:
    """The cuts that a user asks for, as numbers.

    Args:
        cuts: numbers; or "layers" or "parameters", an even split of these.
        num_stages: K; may be None where the cuts are numbers.
        num_params: of every layer, None where it is not known yet.

    Raises:
        ValueError: the two disagree or do not fit the layers.
    """
    num_layers = len(num_params)
    if num_stages is not None and not hasattr(num_stages, "__index__"):
        raise TypeError(f"num_stages must be a whole number; got {num_stages!r}")
    if isinstance(cuts, str):
        check_name("kind of cuts", cuts, SPLITS)
        if num_stages is None:
            raise ValueError(f"cuts={cuts!r} needs num_stages")
        if cuts == "layers":
            return even_cuts([1] * num_layers, num_stages)
        known = [count for count in num_params if count is not None]
        if len(known) < num_layers:
            unknown = num_params.index(None)
            raise ValueError(
                f"cuts='parameters' needs every layer's parameter count, which layer {unknown} (Linen) has only after "
                "init; use cuts='layers' or numbers"
            )
        return even_cuts(known, num_stages)
    resolved = check_cuts(cuts, num_layers)
    if num_stages not in (None, len(resolved) + 1):
        raise ValueError(f"cuts {resolved} make {len(resolved) + 1} stages, num_stages is {num_stages}; leave one out")
    return resolved


def check_cuts(cuts: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The cuts as a tuple.

    Raises:
        ValueError: they do not increase, or fall outside 1 .. num_layers - 1.
    """
    try:
        cuts = tuple(index(cut) for cut in cuts)
    except TypeError:
        raise ValueError(
            f"cuts must be whole numbers in a list, the first layer of each stage but the first; got {cuts!r:.60}"
        ) from None
    outside = [cut for cut in cuts if not 0 < cut < num_layers]
    if outside:
        raise ValueError(f"cuts must lie in 1..{num_layers - 1} for {num_layers} layers; got {cuts}")
    if list(cuts) != sorted(set(cuts)):
        raise ValueError(f"cuts {cuts} must increase; did you mean {tuple(sorted(set(cuts)))}?")
    return cuts


def even_cuts(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """The cuts that make the most expensive stage as cheap as can be, by dynamic programming.

    Among equals, the one whose earlier stages are the cheapest: the last stage computes the loss as well, the earlier
    ones hold more memos.

    Args:
        costs: of every layer, not negative: ones for an even number of layers, parameter counts, seconds.
        num_stages: K, at most len(costs).

    Raises:
        ValueError: there are fewer layers than stages.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"num_stages must lie in 1..{num_layers}, for every stage needs one of the {num_layers} layers; "
            f"got {num_stages}"
        )
    total = [0.0, *accumulate(costs)]
    # best[j]: (dearest stage, cuts) of the first j layers in the stages so far; a layer for each later stage is left.
    best: dict[int, tuple[float, tuple[int, ...]]] = {j: (total[j], ()) for j in range(1, num_layers - num_stages + 2)}
    for stage in range(1, num_stages):
        best = {
            j: min((max(best[i][0], total[j] - total[i]), (*best[i][1], i)) for i in range(stage, j))
            for j in range(stage + 1, num_layers - num_stages + stage + 2)
        }
    return best[num_layers][1]


def assign_devices(devices: Sequence[T], num_stages: int) -> tuple[T, ...]:
    """A device for every stage: one each, or shared in order where there are fewer."""
    count = min(len(devices), num_stages)
    return tuple(devices[k * count // num_stages] for k in range(num_stages))
