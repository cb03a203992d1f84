"""From settings to what a run is made of: data, network, cuts, method, optimizer, pipeline."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from fdg_jax import data, models, optim
from fdg_jax.balance import balanced_cuts
from fdg_jax.config import ConfigError, DataSettings, OptimSettings, Settings, make_method
from fdg_jax.console import say
from fdg_jax.data import Source
from fdg_jax.metrics import softmax_cross_entropy
from fdg_jax.pipeline import Pipeline


def build(
    settings: Settings,
    console: Console | None = None,
    cuts: tuple[int, ...] | None = None,
    updates_before: int = 0,
) -> tuple[Pipeline, Source]:
    """The pipeline and the data of a run.

    Args:
        settings: from `config.resolve`.
        console: where to tell what was measured for balanced cuts.
        cuts: those of a run that goes on, which a measurement would not find again.
        updates_before: at which the learning rate's schedule begins.

    Raises:
        ConfigError: the settings do not fit one another.
    """
    try:
        source = make_source(settings.data)
        steps_per_epoch = source.steps_per_epoch(settings.batch_size)
        layers = make_layers(settings, source.image_shape, source.num_classes)
        pipe = make_pipeline(
            settings,
            layers,
            cuts or make_cuts(settings, layers, source, console),
            make_optimizer(settings.optim, steps_per_epoch, settings.epochs, updates_before),
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    return pipe, source.placed(pipe.devices[0], pipe.devices[-1])


def make_layers(settings: Settings, image_shape: Sequence[int], num_classes: int) -> Sequence[Any]:
    """The network that the settings name, for images (H, W, C).

    Raises:
        ValueError: there is no such network.
    """
    return models.build(
        **dataclasses.asdict(settings.model),
        seed=settings.seed,
        num_classes=num_classes,
        in_shape=image_shape,
        dtype=settings.dtype,
    )


def make_pipeline(
    settings: Settings,
    layers: Sequence[Any],
    cuts: str | tuple[int, ...],
    optimizer: optax.GradientTransformation,
) -> Pipeline:
    """The pipeline that the settings describe.

    Args:
        settings: of the run.
        layers: from `make_layers`.
        cuts: from `make_cuts`.
        optimizer: from `make_optimizer`.

    Raises:
        ValueError, TypeError: they do not fit one another.
    """
    return Pipeline(
        layers,
        loss=softmax_cross_entropy,
        optimizer=optimizer,
        method=make_method(settings.method),
        num_stages=settings.num_stages,
        cuts=cuts,
        engine=settings.engine,
        remat=settings.remat,
        skip_nonfinite=settings.on_nan == "skip",
    )


def make_source(settings: DataSettings) -> Source:
    """The data set that the settings name.

    Raises:
        ValueError: it is not there, or not as it should be.
    """
    if settings.source == "digits":
        source: Source = data.digits()
    elif settings.source == "arrays":
        source = data.arrays(Path(settings.path).expanduser())
    elif settings.source == "folder":
        from fdg_jax.data.folder import folder  # here and below, since these need packages that other runs do not

        source = folder(settings.path, resize=settings.resize or None)
    else:
        from fdg_jax.data.tfds import tfds

        source = tfds(settings.name, settings.path or None)
    side = min(source.image_shape[:2])
    if settings.crop_padding > side:
        raise ValueError(
            f"config.data.crop_padding must be at most {side}, the side of an image; got {settings.crop_padding}"
        )
    source = source.augmented(settings.crop_padding, settings.flip)
    return source.limited(settings.limit) if settings.limit else source


def data_shape(settings: DataSettings, batch_size: int) -> tuple[tuple[int, ...], int]:
    """(H, W, C) of the images and the number of classes; TFDS is asked for no more than its catalogue.

    Raises:
        ValueError: the data set is not there, or has not one whole batch; which TFDS's catalogue does not tell.
    """
    if settings.source == "tfds":
        from fdg_jax.data.tfds import tfds_shape

        return tfds_shape(settings.name, settings.path or None)
    source = make_source(settings)
    source.steps_per_epoch(batch_size)
    return source.image_shape, source.num_classes


def make_cuts(
    settings: Settings, layers: Sequence[Any], source: Source, console: Console | None = None
) -> str | tuple[int, ...]:
    """The cuts as `Pipeline` takes them; those balanced by measurement are measured here, and told."""
    model = settings.model
    if settings.cuts == "published":
        return models.published_cuts(model.name, model.depth, model.width, settings.num_stages)
    if settings.cuts == "balanced":
        balance = balanced_cuts(layers, example_images(settings, source), settings.num_stages)
        if console:
            say(console, str(balance))
        return balance.cuts
    return settings.cuts


def example_images(settings: Settings, source: Source) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a batch of images."""
    return jax.ShapeDtypeStruct((settings.batch_size, *source.image_shape), jnp.float32)


def described(source: Source, settings: Settings) -> dict[str, Any]:
    """What a run that goes on must find again, as JSON."""
    labels = np.asarray(source.batch(settings.seed, 0, settings.batch_size)[1])
    return {
        "name": source.name,
        "training images": source.num_train,
        "image shape": list(source.image_shape),
        "classes": source.num_classes,
        "labels of the first batch": hashlib.sha256(labels.tobytes()).hexdigest()[:16],
    }


def make_optimizer(
    settings: OptimSettings, steps_per_epoch: int, epochs: int, updates_before: int = 0
) -> optax.GradientTransformation:
    """The optimizer with its learning rate as a function of updates, of those before too; settings count epochs."""
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    rate: optax.ScalarOrSchedule = settings.learning_rate
    if settings.schedule == "cosine":
        rate = optim.cosine(settings.learning_rate, epochs * steps_per_epoch, warmup_steps)
    elif settings.schedule == "piecewise":
        boundaries = [epoch * steps_per_epoch for epoch in settings.milestones]
        rate = optim.piecewise(
            settings.learning_rate, boundaries, settings.decay_factor, warmup_steps, settings.warmup_factor
        )
    if updates_before and callable(rate):
        rate = partial(_later, rate, updates_before)
    if settings.name == "sgd":
        return optim.sgd(rate, settings.momentum, settings.weight_decay, settings.nesterov)
    if settings.name == "nadamw":
        return optim.nadamw(rate, settings.momentum, settings.weight_decay)
    return optax.adamw(rate, b1=settings.momentum, weight_decay=settings.weight_decay)


def _later(schedule: optax.Schedule, updates_before: int, count: jax.Array) -> jax.Array:
    return schedule(count + updates_before)
