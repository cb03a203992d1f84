"""What a run and its stages come to, and how that is found of a rehearsed pipeline (`Pipeline.rehearse`)."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax

from fdg_jax.backward import Trace
from fdg_jax.config import Settings
from fdg_jax.engine.base import Engine, PyTree
from fdg_jax.flops import layer_flops
from fdg_jax.forecast import Forecast, num_bytes
from fdg_jax.local import make_heads, make_synthesisers
from fdg_jax.methods import Method
from fdg_jax.pipeline import Pipeline
from fdg_jax.schedule import Schedule, delay
from fdg_jax.stage import Layer, describe, init_layers
from fdg_jax.timeline import StageCost


@dataclass(frozen=True)
class StagePlan:
    """One stage; operations and bytes are those of a whole batch.

    Attributes:
        start, stop: its layers, and their names.
        sends: bytes of activations to the next stage.
        delay: in ticks.
        staleness: in updates.
        device: its number.
        scratch: bytes that its largest program needs beside arrays, estimated; see `estimates.scratch`.
    """

    start: int
    stop: int
    layers: str
    num_params: int
    forward_flops: float
    backward_flops: float
    sends: int
    delay: int
    staleness: int
    device: int
    forecast: Forecast
    scratch: int


@dataclass(frozen=True)
class RunPlan:
    """All of a run.

    Attributes:
        memory: bytes that every device needs at most.
        device_memory: that it has; None where that is not known.
        batch_seconds: from one batch to the next, once the pipeline is full.
        speed_up: over backpropagation on one device as fast.
        costs: seconds of every stage, of what the schedule counts, batches or micro-batches.
        idle: share of the time in which a device waits, of every device.
    """

    settings: Settings
    method: Method
    schedule: Schedule
    cuts: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    memory: tuple[int, ...]
    device_memory: int | None
    batch_seconds: float
    speed_up: float
    costs: tuple[StageCost, ...]
    idle: tuple[float, ...]

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.device_memory is None or max(self.memory) <= self.device_memory

    @property
    def image_seconds(self) -> float:
        return self.batch_seconds / self.settings.batch_size

    @property
    def devices(self) -> tuple[int, ...]:
        """Of every stage."""
        return tuple(stage.device for stage in self.stages)

    def volatile(self, k: int) -> int:
        """Bytes of stage k that depend on what memos keep."""
        return self.stages[k].forecast.memos + self.stages[k].scratch


def bounds(pipe: Pipeline) -> list[tuple[int, int]]:
    """Numbers of the first layer of every stage and of the first behind it."""
    return list(pairwise((0, *pipe.cuts, len(pipe.layers))))


def forwards_again(pipe: Pipeline) -> list[bool]:
    """Of every stage, whether its backward begins with the forward; "convs" redoes what counts no operation."""
    late = [ticks > 0 for ticks in delay(pipe.schedule)]
    recomputes = [pipe.method.policy == "recompute" and each for each in late]
    return [each or kept == "full" for each, kept in zip(recomputes, pipe.remat, strict=True)]


def added_flops(method: Method, engine: Engine, num_classes: int, targets: PyTree) -> list[float]:
    """Operations of the forward of what a method adds to every stage, a head or a synthesiser, on a whole batch.

    Args:
        method: of the run.
        engine: rehearsed.
        num_classes: that a head tells apart.
        targets: shapes of a batch.
    """
    between, synthesiser, head = list(engine.plan.shapes[1:]), method.synthesiser, method.head
    counts = [0.0] * (len(between) + 1)
    if not between or not (head or synthesiser):
        return counts

    def trace() -> None:  # so that their weights are not made
        key = jax.random.key(0)
        if synthesiser is None:
            layers, inputs = make_heads(str(head), between, num_classes, key), between
        else:
            read = num_classes if synthesiser.context else None
            layers = make_synthesisers(synthesiser.kind, between, read, key, width=synthesiser.width)
            inputs = [(shape, targets if synthesiser.context else None) for shape in between]
        for k, (layer, shapes) in enumerate(zip(layers, inputs, strict=True)):
            (counts[k],) = layer_flops([layer], shapes)

    jax.eval_shape(trace)
    return [method.micro_batches * count for count in counts]


def stage_costs(
    pipe: Pipeline, engine: Engine, forward: Sequence[float], backward: Sequence[float], added: Sequence[float]
) -> list[StageCost]:
    """Of what the schedule counts, batches or micro-batches.

    Args:
        pipe, engine: rehearsed.
        forward, backward: seconds of every layer on a batch.
        added: of the forward of what the method adds to every stage. A head is trained with its stage, a synthesiser
            in an operation of its own.
    """
    again, micro, learns = forwards_again(pipe), pipe.method.micro_batches, pipe.method.synthesiser is not None
    costs = []
    for k, (start, stop) in enumerate(bounds(pipe)):
        ahead, back = sum(forward[start:stop]), sum(backward[start:stop])
        costs.append(
            StageCost(
                forward=(ahead + added[k]) / micro,
                backward=(back + again[k] * ahead + (0 if learns else 2) * added[k]) / micro,
                synthesis=3 * added[k] / micro if learns else 0.0,
                activations=sends(engine, k),
                cotangents=num_bytes(engine.plan.shapes[k]) if k and pipe.schedule.sends_back else 0,
            )
        )
    return costs


def sends(engine: Engine, k: int) -> int:
    """Bytes of what stage k sends to the next of a batch, or micro-batch."""
    return num_bytes(engine.plan.shapes[k + 1]) if k < engine.plan.last else 0


def scratch(pipe: Pipeline, engine: Engine, activations: Sequence[float], k: int) -> int:
    """Bytes that the largest program of stage k needs beside all arrays, about.

    They are gradients; what a batch that is answered in the visit of its forward would else leave in a memo; what the
    backward computes again, under "recompute" the activations of the stage, with `remat` those of one layer; and twice
    those of a layer for what is on its way in it. `benchmarks.memory` reads the true figure off compiled programs.

    Args:
        pipe, engine: rehearsed.
        activations: of every layer, for what the schedule counts; see `layer_activations`.
        k: the stage.
    """
    start, stop = bounds(pipe)[k]
    largest, forecast = max(activations[start:stop]), pipe.forecasts[k]
    need = forecast.weights + 2 * largest  # gradients are as large as the weights, but for module state
    if forecast.num_memos == 0 or engine.plan.synthesiser(k):
        need += num_bytes(engine.workers[k].trace.saved)
    if pipe.method.policy == "recompute" and delay(pipe.schedule)[k] > 0:
        need += sum(activations[start:stop])
    elif pipe.remat[k] != "none":
        need += largest
    return round(need)


def layer_activations(layers: Sequence[Layer], inputs: PyTree) -> list[int]:
    """Bytes that the backward of every layer reads beside parameters; what it puts out is the next one's input.

    Equal layers are traced once.

    Args:
        layers: of the whole network.
        inputs: shapes of a batch of the first layer's.
    """
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    seen: dict[Hashable, int] = {}

    def trace(key: jax.Array) -> None:
        params, state, shapes = init_layers(layers, key, inputs)
        for number, (layer, p, s, x) in enumerate(zip(layers, params, state, shapes[:-1], strict=True)):
            kind = layer.signature or number, describe((p, s, x))
            if kind not in seen:
                seen[kind] = _kept(layer, p, x, s, key)
            sizes.append(seen[kind])

    sizes: list[int] = []
    jax.eval_shape(trace, key)
    return sizes


def _kept(layer: Layer, params: PyTree, inputs: PyTree, state: PyTree, key: jax.Array) -> int:
    trace = Trace(_training(layer), params, inputs, state, key)
    held = zip(trace.held, trace.held_shapes, strict=True)
    return num_bytes(trace.saved) + num_bytes([shape for source, shape in held if source.tree in ("inputs", "state")])


def _training(layer: Layer) -> Callable:
    return lambda params, inputs, state, key: layer.apply(params, state, inputs, key, True)


def memory_here(num_stages: int) -> int | None:
    """Bytes that a device of this machine has, if it says so; CPU devices, one a stage, share the machine's."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_stages
    return (device.memory_stats() or {}).get("bytes_limit")


def needed(stages: Sequence[StagePlan], looped: bool) -> tuple[int, ...]:
    """Bytes that every device needs at most: all that its stages hold, and what the largest visit adds.

    Args:
        stages: of the run.
        looped: the fused engine holds memos and old weights twice.
    """
    devices = range(max(stage.device for stage in stages) + 1)
    groups = [[stage for stage in stages if stage.device == device] for device in devices]
    held = [
        sum(s.forecast.total + looped * (s.forecast.memos + s.forecast.old_weights) for s in each) for each in groups
    ]
    return tuple(h + max(s.forecast.visit + s.scratch for s in each) for h, each in zip(held, groups, strict=True))
