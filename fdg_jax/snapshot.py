"""The whole state of a run as numbered arrays and a record of what each is, and back.

Nothing is drained: activations, cotangents and memos in flight are part of it, keyed by batch. An array that several
places refer to is taken once and stays shared when it comes back, which is how old weights under *stash* are held: one
tree, however many memos point to it. The record is plain JSON; what reads it trusts no name or number in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.agreement import Leaf, Mismatch, compare, describe, fit, is_key, named_leaves
from fdg_jax.backward import Memo
from fdg_jax.engine.base import COTANGENTS, INPUTS, Metrics, PyTree, StageState, State

FAULTS = 2  # its place in `StageState.counts`
OPTIONAL = ("accumulated", "previous", "synthesis")  # fields that a method need not have, nor all the time


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment.

    Attributes:
        arrays: by number; on devices as `take` copies them, on the host as they come from a file.
        record: what each is, as JSON: see `take`.
    """

    arrays: list[Any]
    record: dict[str, Any]

    @property
    def in_flight(self) -> str:
        """What waits to be answered, in words; empty where nothing does."""
        kinds = [message["kind"] for box in ("inbox", "outbox") for message in self.record[box]]
        counts = {
            "memo": len(self.record["memos"]),
            "activation": kinds.count(INPUTS),
            "cotangent": kinds.count(COTANGENTS),
        }
        return ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)

    @property
    def faults(self) -> int:
        """Batches on which a stage met a number that was not finite, summed over the stages; arrays on the host."""
        (counts,) = zip(*(stage["counts"] for stage in self.record["stages"]), strict=True)
        return sum(int(self.arrays[number][FAULTS]) for _, number in counts)


def take(state: State) -> Snapshot:
    """Copies a state, on its devices and without waiting, so that training may go on and overwrite it.

    The record holds `fed` and `origin`; `stages`, a dict of fields each; `inbox` and `outbox`, messages; `memos`; and
    `arrays`, shape and dtype of each. A leaf is [name, number of its array].
    """
    numbers: dict[tuple[int, int], int] = {}
    arrays: list[Any] = []

    def leaves(stage: int, named: Sequence[Leaf]) -> list[list]:
        """On what device an array comes back is its stage's affair, so that two stages share none."""
        for _, leaf in named:
            if numbers.setdefault((stage, id(leaf)), len(arrays)) == len(arrays):
                arrays.append(leaf)
        return [[name, numbers[stage, id(leaf)]] for name, leaf in named]

    def messages(box: Mapping, last: int, owner: Callable[[str, int, int], int]) -> list[dict]:
        return [
            {"kind": kind, "stage": k, "batch": n, "leaves": leaves(owner(kind, k, last), named_leaves(tree))}
            for (kind, k, n), tree in box.items()
        ]

    last = len(state.stages) - 1
    record = {
        "fed": state.fed,
        "origin": state.origin,
        "stages": [
            {field: leaves(k, named_leaves(getattr(own, field))) for field in StageState._fields}
            for k, own in enumerate(state.stages)
        ],
        "inbox": messages(state.inbox, last, lambda kind, k, last: k),
        "outbox": messages(state.outbox, last, _sender),
        "memos": [
            {"stage": k, "batch": n, **{part: leaves(k, named_leaves(getattr(memo, part))) for part in Memo._fields}}
            for (k, n), memo in state.memos.items()
        ],
    }
    record["arrays"] = [describe(leaf) for leaf in arrays]
    return Snapshot(_copies(arrays), record)


def put(
    snapshot: Snapshot, fresh: State, devices: Sequence[jax.Device], shapes: Sequence[PyTree], targets: PyTree = None
) -> State:
    """The state again, on any devices.

    Args:
        snapshot: its arrays on the host.
        fresh: a state before its first batch, which says what the stages must own.
        devices: of every stage.
        shapes: of every stage's inputs.
        targets: of a batch, as shapes; None where there has been none.

    Raises:
        Mismatch: a stage owns something else than `fresh`, or a message has another shape.
    """
    record, last = snapshot.record, len(devices) - 1
    if len(record["stages"]) != len(devices):
        raise Mismatch(f"{len(record['stages'])} stages are in the checkpoint, {len(devices)} here")
    for k, (own, saved) in enumerate(zip(fresh.stages, record["stages"], strict=True)):
        for field in ("params", "state", "opt_state", "key", *(field for field in OPTIONAL if saved.get(field))):
            compare(f"stage {k}'s {field}", getattr(own, field), saved[field], record["arrays"])
    placed = _place(snapshot, devices)

    def tree(stage: int, like: PyTree, leaves: list) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(like), [placed[stage, number] for _, number in leaves])

    def box(messages: list[dict], owner: Callable[[str, int, int], int]) -> dict:
        found = {}
        for message in messages:
            kind, k, n, leaves = (message[name] for name in ("kind", "stage", "batch", "leaves"))
            wanted = _message_shapes(kind, k, shapes, targets)
            compare(f"the {kind} of batch {n} for stage {k}", wanted, leaves, record["arrays"])
            found[kind, k, n] = tree(owner(kind, k, last), wanted, leaves)
        return found

    stages = []
    for k, (own, saved) in enumerate(zip(fresh.stages, record["stages"], strict=True)):
        absent = {"totals", *(field for field in OPTIONAL if not saved.get(field))}
        fields = {
            field: tree(k, getattr(own, field), saved[field]) for field in StageState._fields if field not in absent
        }
        totals: Metrics = {name: placed[k, number] for name, number in saved["totals"]}
        stages.append(StageState(**fields, totals=totals))
    memos = {
        (memo["stage"], memo["batch"]): Memo(
            *([placed[memo["stage"], number] for _, number in memo[part]] for part in Memo._fields)
        )
        for memo in record["memos"]
    }
    inbox, outbox = box(record["inbox"], lambda kind, k, last: k), box(record["outbox"], _sender)
    return State(record["fed"], record["origin"], tuple(stages), inbox, outbox, memos)


def _sender(kind: str, reader: int, last: int) -> int:
    """The stage on whose device a message waits to be sent; the first inputs and the targets come from outside."""
    if kind == INPUTS:
        return max(0, reader - 1)
    return reader + 1 if kind == COTANGENTS else last


def _message_shapes(kind: str, reader: int, shapes: Sequence[PyTree], targets: PyTree) -> PyTree:
    if kind == INPUTS:
        return shapes[reader]
    if kind == COTANGENTS:
        return [leaf for leaf in jax.tree.leaves(shapes[reader + 1]) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return targets


def _copies(arrays: list[Any]) -> list[Any]:
    """Copies on the same devices, made in their queues; where an accelerator has no room for them, on the host."""
    data = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in arrays]
    if not all(map(_has_room, _bytes_by_device(data).items())):
        return [np.array(leaf) for leaf in jax.device_get(data)]
    on_devices = [leaf for leaf in data if isinstance(leaf, jax.Array)]
    copied = iter(jax.device_put(on_devices, [leaf.device for leaf in on_devices], may_alias=False))
    return [next(copied) if isinstance(leaf, jax.Array) else leaf for leaf in data]


def _bytes_by_device(arrays: list[Any]) -> dict[jax.Device, int]:
    sizes: dict[jax.Device, int] = {}
    for leaf in arrays:
        if isinstance(leaf, jax.Array):
            sizes[leaf.device] = sizes.get(leaf.device, 0) + leaf.nbytes
    return sizes


def _has_room(device_and_bytes: tuple[jax.Device, int]) -> bool:
    """Whether a device can hold so many bytes more with as many to spare; a CPU device, which does not say, can."""
    device, wanted = device_and_bytes
    stats = device.memory_stats() or {}
    return "bytes_limit" not in stats or stats["bytes_limit"] - stats["bytes_in_use"] > 2 * wanted


def _place(snapshot: Snapshot, devices: Sequence[jax.Device]) -> dict[tuple[int, int], jax.Array]:
    """The arrays on the devices of the stages that refer to them, by (stage, number)."""
    places = list(dict.fromkeys(_places(snapshot.record, len(devices) - 1)))
    leaves = [snapshot.arrays[number] for _, number in places]
    targets = [devices[stage] for stage, _ in places]
    # Twice: JAX uses a NumPy array's memory as it is on a CPU device, and the next step overwrites what is donated.
    copies = jax.device_put(jax.device_put(leaves, targets), targets, may_alias=False)
    descriptions = snapshot.record["arrays"]
    return {
        (stage, number): _as_described(leaf, descriptions[number])
        for (stage, number), leaf in zip(places, copies, strict=True)
    }


def _places(record: Mapping[str, Any], last: int) -> Iterator[tuple[int, int]]:
    for k, fields in enumerate(record["stages"]):
        yield from ((k, number) for leaves in fields.values() for _, number in leaves)
    for message in record["inbox"]:
        yield from ((message["stage"], number) for _, number in message["leaves"])
    for message in record["outbox"]:
        owner = _sender(message["kind"], message["stage"], last)
        yield from ((owner, number) for _, number in message["leaves"])
    for memo in record["memos"]:
        yield from ((memo["stage"], number) for part in Memo._fields for _, number in memo[part])


def _as_described(leaf: jax.Array, description: Mapping[str, Any]) -> jax.Array:
    if "key" in description:
        return jax.random.wrap_key_data(leaf, impl=description["impl"])
    if description.get("weak") and leaf.shape == ():
        return jax.device_put(jnp.asarray(leaf.item()), leaf.device)  # of a Python number, which makes it weak again
    return leaf


def weights(snapshot: Snapshot, params: Sequence[PyTree], module_state: Sequence[PyTree]) -> tuple[list, list]:
    """Parameters and module state, one tree a layer, whatever the cuts were; the rest is left.

    Args:
        snapshot: its arrays on the host.
        params, module_state: of the network that asks, one tree a layer; structure and shapes matter.

    Raises:
        Mismatch: a layer has others, or there are more layers or fewer.
    """
    places = [
        (k, g, j, size)
        for k, groups in enumerate(snapshot.record["pipeline"]["groups"])
        for g, size in enumerate(groups)
        for j in range(size)
    ]

    def layer(field: str, place: tuple[int, int, int, int]) -> dict[str, Any]:
        k, g, j, size = place
        found = {}
        for name, leaf in snapshot.record["stages"][k][field]:
            group, _, inside = name.partition(".")
            if group == str(g):
                found[inside] = snapshot.arrays[leaf][j] if size > 1 else snapshot.arrays[leaf]
        return found

    return (
        fit("params", [layer("params", place) for place in places], params),
        fit("state", [layer("state", place) for place in places], module_state),
    )
