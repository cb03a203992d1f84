"""What a run will come to, from its settings: memory, work and time of every stage. No array of the network is made.

Shapes and counts are exact. Two things are estimates: seconds, which are operations over a device's speed or sums of
measured layers, in a pipeline whose transfers take no time; and `scratch`, what a program needs beside all arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from fdg_jax import estimates, models
from fdg_jax.balance import layer_seconds
from fdg_jax.build import data_shape, make_layers, make_optimizer, make_pipeline
from fdg_jax.config import ConfigError, Settings
from fdg_jax.engine.base import Engine
from fdg_jax.estimates import RunPlan, StagePlan
from fdg_jax.flops import backward_flops, layer_flops
from fdg_jax.overview import named
from fdg_jax.partition import assign_devices, even_cuts
from fdg_jax.pipeline import Pipeline
from fdg_jax.schedule import delay
from fdg_jax.stage import as_layers
from fdg_jax.timeline import steady

ASSUMED_SPEED = 1e12  # operations a second of a device of which nothing is known
STEPS = 100  # of an epoch, on which no shape depends


@dataclass(frozen=True)
class Pace:
    """How fast a device works.

    Attributes:
        flops_per_second: of one device.
        source: where that comes from, in words.
        layer_seconds: measured, of every layer's forward and backward of a batch; None to go by operations.
        batch_size: of that batch.
    """

    flops_per_second: float = ASSUMED_SPEED
    source: str = f"at an assumed {ASSUMED_SPEED / 1e12:g} TFLOP/s a device (give --flops_per_second, or --measure)"
    layer_seconds: tuple[float, ...] | None = None
    batch_size: int = 1


class Planner:
    """Plans runs of one network on one data set, which may differ in all else.

    Args:
        settings: of any of them, of which none has larger batches.
        pace: of the devices.
        device_memory: bytes of a device, of which every stage gets one; by default those of this machine.

    Raises:
        ConfigError: the data set or the network is not there, or the data set has not one whole batch.
    """

    def __init__(self, settings: Settings, pace: Pace | None = None, device_memory: int | None = None):
        self.pace, self._device_memory = pace or Pace(), device_memory
        try:
            self.image_shape, self.num_classes = data_shape(settings.data, settings.batch_size)
            self._modules = models.abstract(lambda: make_layers(settings, self.image_shape, self.num_classes))
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
        self.layers = as_layers(self._modules)
        one = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        self._flops = layer_flops(self.layers, one)
        self._activations = estimates.layer_activations(self.layers, one)

    def measured(self, settings: Settings) -> "Planner":
        """The same with the pace of this machine: every layer runs, forward and backward, on JAX's default device."""
        layers = make_layers(settings, self.image_shape, self.num_classes)
        seconds = layer_seconds(layers, self._inputs(settings))
        flops = self.flops(settings.batch_size)
        device = jax.devices()[0].device_kind
        pace = Pace((sum(flops) + sum(backward_flops(flops))) / sum(seconds), "", tuple(seconds), settings.batch_size)
        speed = f"{pace.flops_per_second / 1e9:.1f} GFLOP/s"
        source = f"as measured here ({device}; every device as fast as it is alone), {speed}"
        return Planner(settings, replace(pace, source=source), self._device_memory)

    def plan(self, settings: Settings) -> RunPlan:
        """What these settings come to.

        Raises:
            ConfigError: they do not fit one another.
        """
        if settings.method.buffer:
            raise ConfigError("a plan is of stages in lock-step: ask for one with --config.method.buffer=0")
        inputs = self._inputs(settings)
        forward, backward = self._layer_times(settings.batch_size)
        try:
            pipe = make_pipeline(
                settings,
                self._modules,
                self.cuts(settings),
                make_optimizer(settings.optim, STEPS, settings.epochs),
            )
            targets = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32)
            engine = pipe.rehearse(inputs, targets)
            added = estimates.added_flops(pipe.method, engine, self.num_classes, targets)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
        num_devices = self._num_devices(pipe, settings)
        placed = assign_devices(range(num_devices), pipe.num_stages)
        costs = estimates.stage_costs(
            pipe, engine, forward, backward, [each / self.pace.flops_per_second for each in added]
        )
        found = steady(pipe.schedule, costs, devices=placed)
        seconds = found.batch_seconds * pipe.method.micro_batches
        stages = self._stages(pipe, engine, settings.batch_size, added, placed)
        return RunPlan(
            settings,
            pipe.method,
            pipe.schedule,
            pipe.cuts,
            stages,
            memory=estimates.needed(stages, looped=num_devices == 1 < pipe.num_stages),
            device_memory=self._device_memory or estimates.memory_here(num_devices),
            batch_seconds=seconds,
            speed_up=(sum(forward) + sum(backward)) / seconds if seconds else 1.0,
            costs=tuple(costs),
            idle=found.idle,
        )

    def memory_source(self, num_devices: int) -> str:
        """Where the memory of each of so many devices comes from, in words."""
        if self._device_memory is not None:
            return "--device_memory"
        shared = num_devices > 1 and jax.devices()[0].platform == "cpu"
        return f"this machine's, shared by the {num_devices} devices" if shared else "this machine's"

    def cuts(self, settings: Settings) -> str | tuple[int, ...]:
        """As `Pipeline` takes them; "balanced" by what is known of the layers' times."""
        if settings.cuts == "published":
            model = settings.model
            return models.published_cuts(model.name, model.depth, model.width, settings.num_stages)
        return self.balanced(settings) if settings.cuts == "balanced" else settings.cuts

    def balanced(self, settings: Settings) -> tuple[int, ...]:
        """The cuts that make the slowest stage as fast as can be.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        times = self._layer_times(settings.batch_size)
        return even_cuts([sum(pair) for pair in zip(*times, strict=True)], settings.num_stages)

    def flops(self, batch_size: int) -> list[float]:
        """Of every layer's forward on a batch; all that is counted grows with the batch."""
        return [batch_size * count for count in self._flops]

    def _inputs(self, settings: Settings) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((settings.batch_size, *self.image_shape), jnp.float32)

    def _layer_times(self, batch_size: int) -> tuple[list[float], list[float]]:
        """Seconds of every layer's forward and backward."""
        ahead, back = self.flops(batch_size), backward_flops(self.flops(batch_size))
        measured = self.pace.layer_seconds
        if measured is None:
            seconds = [(count + more) / self.pace.flops_per_second for count, more in zip(ahead, back, strict=True)]
        else:
            seconds = [batch_size / self.pace.batch_size * each for each in measured]
        shares = [count / (count + more) if count else 1 / 3 for count, more in zip(ahead, back, strict=True)]
        forward = [share * each for share, each in zip(shares, seconds, strict=True)]
        return forward, [each - part for each, part in zip(seconds, forward, strict=True)]

    def _num_devices(self, pipe: Pipeline, settings: Settings) -> int:
        """As many as stages where the user plans for other devices, or these are CPU devices; else those there are."""
        if settings.engine == "fused":
            return 1
        elsewhere = self._device_memory is not None or jax.devices()[0].platform == "cpu"
        return pipe.num_stages if elsewhere else min(pipe.num_stages, len(jax.devices()))

    def _stages(
        self, pipe: Pipeline, engine: Engine, batch_size: int, added: Sequence[float], placed: Sequence[int]
    ) -> tuple[StagePlan, ...]:
        """Of a rehearsed pipeline."""
        again, learns = estimates.forwards_again(pipe), pipe.method.synthesiser is not None
        micro, taus, flops = pipe.method.micro_batches, pipe.method.staleness(pipe.schedule), self.flops(batch_size)
        activations = [batch_size / micro * size for size in self._activations]
        stages = []
        for k, (start, stop) in enumerate(estimates.bounds(pipe)):
            layers, ahead = self.layers[start:stop], sum(flops[start:stop])
            back = sum(backward_flops(flops)[start:stop]) + again[k] * ahead
            stages.append(
                StagePlan(
                    start,
                    stop,
                    named(layers),
                    sum(layer.num_params or 0 for layer in layers) + pipe.extra_params[k],
                    forward_flops=ahead + added[k],
                    backward_flops=back + (3 if learns else 2) * added[k],
                    sends=micro * estimates.sends(engine, k),
                    delay=delay(pipe.schedule)[k],
                    staleness=taus[k],
                    device=placed[k],
                    forecast=pipe.forecasts[k],
                    scratch=estimates.scratch(pipe, engine, activations, k),
                )
            )
        return tuple(stages)
