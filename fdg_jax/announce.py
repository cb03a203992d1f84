"""What a run is about to do, said before it does it: to people in words, to machines in one line."""

from pathlib import Path

from rich.console import Console

from fdg_jax.build import example_images
from fdg_jax.config import Settings
from fdg_jax.console import JsonLines, describe_balance, say
from fdg_jax.data import Source
from fdg_jax.estimates import forwards_again
from fdg_jax.flops import layer_flops, shares, stage_flops
from fdg_jax.pipeline import Pipeline
from fdg_jax.schedule import delay, staleness


def announce(
    settings: Settings, pipe: Pipeline, source: Source, workdir: Path, console: Console, lines: JsonLines, step: int
) -> list[float]:
    """Says it; returns the work of every stage as a share of the slowest's, estimated from its operations.

    Args:
        settings, source, workdir: of the run.
        pipe: after `init`.
        console, lines: for people, and for machines.
        step: batches fed before.
    """
    balance = stage_balance(settings, pipe, source)
    steps = source.steps_per_epoch(settings.batch_size)
    dropped = source.num_train - steps * settings.batch_size
    shape = "x".join(map(str, source.image_shape))
    text = [
        f"{source.name}: {source.num_train:,} training and {source.num_test:,} test images of {shape}, "
        f"{source.num_classes} classes",
        f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''} of {steps} batches of {settings.batch_size}"
        + (f"; {dropped} images left over are dropped, others in every epoch" if dropped else ""),
        f"{settings.model.name} of depth {settings.model.depth} and width {settings.model.width}, {settings.dtype}; "
        f"{settings.optim.name}, learning rate {settings.optim.learning_rate:g} ({settings.optim.schedule})",
        "",
        pipe.show(),
        "",
        *([f"{describe_balance(balance)} of the slowest's work, by floating point operations"] if balance[1:] else []),
        f"writing to {workdir}",
    ]
    if pipe.method.beta == 0:
        text.append("beta 0: only the last stage learns from the loss; the others move by weight decay alone")
    say(console, "\n".join(text))
    lines.write("start", _facts(settings, pipe, source, workdir) | {"step": step, "stage_balance": balance})
    return balance


def _facts(settings: Settings, pipe: Pipeline, source: Source, workdir: Path) -> dict[str, object]:
    return {
        "workdir": str(workdir),
        "data": source.name,
        "train_images": source.num_train,
        "test_images": source.num_test,
        "model": settings.model.name,
        "method": str(pipe.method),
        "engine": pipe.engine,
        "num_stages": pipe.num_stages,
        "cuts": pipe.cuts,
        "devices": [f"{device.platform}:{device.id}" for device in pipe.devices],
        "delay_ticks": delay(pipe.schedule),
        "staleness_updates": staleness(pipe.schedule),
        "memory_bytes": [forecast.peak for forecast in pipe.forecasts],
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "num_steps": settings.epochs * source.steps_per_epoch(settings.batch_size),
    }


def stage_balance(settings: Settings, pipe: Pipeline, source: Source) -> list[float]:
    """Shares of the slowest stage's work; what a method adds to stages (heads, synthesisers) is not counted."""
    forward = layer_flops(pipe.layers, example_images(settings, source))
    return shares(stage_flops(forward, (0, *pipe.cuts, len(pipe.layers)), forwards_again(pipe)))
