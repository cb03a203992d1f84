"""Draws every picture of these pages: `python -m docs.pictures`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fdg_jax import Pipeline, methods, models, softmax_cross_entropy
from fdg_jax.plots import INK, PALETTE, Drawn, bare, draw_box, draw_lane, draw_schedule, new_figure, save
from fdg_jax.schedule import UPDATE, Visit, bp, delay, fdg, row, staleness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETAS = (1.0, 0.8, 0.5, 0.2)
POLICIES: Mapping[str, tuple[str, str]] = {  # name in the picture: policy and remat
    "stash": ("stash", "none"),
    'stash, remat="convs"': ("stash", "convs"),
    'stash, remat="full"': ("stash", "full"),
    "current": ("current", "none"),
    "recompute": ("recompute", "none"),
}
GREY = "#DCDFE4"  # of what a picture is not about


def backpropagation() -> "Figure":
    """All stages but one wait."""
    return draw_schedule(bp(3), 12, title="backpropagation")


def decoupled() -> "Figure":
    """The same ticks, and none waits once the pipeline is full."""
    return draw_schedule(fdg(3), 12, title="FDG")


def delayed() -> "Figure":
    """The way of one batch through FDG, and what happens to the weights of stage 0 meanwhile."""
    schedule, batch, first, last = fdg(3), 4, 4, 10
    figure = new_figure(7.5, 2.7)
    axes = figure.add_subplot()
    for k, (D, tau) in enumerate(zip(delay(schedule), staleness(schedule), strict=True)):
        draw_lane(axes, k, first, last - first)
        for tick in range(first, last):
            _draw_visit(axes, k, tick, row(schedule, tick)[k], batch, meanwhile=range(batch + k + 1, batch + k + D))
        axes.text(last + 0.15, k, f"D = {D}, tau = {tau}", va="center", fontsize=9, color=INK)
    axes.annotate("", (batch + 4.2, -0.62), (batch + 0.8, -0.62), arrowprops={"arrowstyle": "<->", "color": INK})
    words = f"batch {batch} on stage 0: D ticks between forward and backward, tau updates of its weights"
    axes.text(first, -0.78, words, va="bottom", fontsize=9, color=INK)
    axes.set(xlim=(first, last + 1.6), ylim=(2.5, -1.15), xlabel="tick")
    axes.set_xticks([tick + 0.5 for tick in range(first, last)], [str(tick) for tick in range(first, last)])
    axes.set_yticks(range(3), [f"stage {k}" for k in range(3)])
    bare(axes)
    return figure


def _draw_visit(axes: "Axes", k: int, tick: int, visit: Visit, batch: int, meanwhile: range) -> None:
    """Its operations in order: those for the batch in colour, updates meanwhile dark, all others grey."""
    start = tick + 0.03
    for op in visit:
        length = 0.1 if op.kind == UPDATE else 0.42
        if op.batch == batch or (op.kind == UPDATE and tick in meanwhile):
            draw_box(axes, k, Drawn(op.kind, op.batch, start, length), size=9)
        else:
            axes.broken_barh([(start, length)], (k - 0.4, 0.8), facecolors=GREY, edgecolors="white", linewidth=0.7)
        start += length


def shrunk() -> "Figure":
    """What beta leaves of the error gradient on every stage."""
    stages = 4
    figure = new_figure(7.5, 2.6)
    axes = figure.add_subplot()
    width = 0.8 / len(BETAS)
    for number, beta in enumerate(BETAS):
        places = [k + (number - (len(BETAS) - 1) / 2) * width for k in range(stages)]
        factors = [beta ** (stages - 1 - k) for k in range(stages)]
        axes.bar(places, factors, 0.92 * width, color=PALETTE[number], label=f"beta = {beta:g}")
        for place, factor in zip(places, factors, strict=True):
            axes.text(place, factor + 0.02, f"{factor:.3g}", ha="center", va="bottom", fontsize=7.5, color=INK)
    axes.set(ylim=(0, 1.1), ylabel="factor of the gradient")
    axes.set_xticks(range(stages), [f"stage {k}" for k in range(stages)])
    axes.yaxis.label.set_color(INK)
    bare(axes)
    figure.legend(loc="outside lower center", ncols=len(BETAS), frameon=False, fontsize=9)
    return figure


def held() -> "Figure":
    """Forecast memory of every stage under every policy: ResNet-8, three stages, batches of 128."""
    figure = new_figure(7.5, 3.0)
    axes = figure.add_subplot()
    width = 0.85 / len(POLICIES)
    for number, (name, (policy, remat)) in enumerate(POLICIES.items()):
        totals = [forecast.total / 2**20 for forecast in forecasts(policy, remat)]
        places = [k + (number - (len(POLICIES) - 1) / 2) * width for k in range(len(totals))]
        axes.bar(places, totals, 0.92 * width, color=PALETTE[number], label=name)
        for place, total in zip(places, totals, strict=True):
            axes.text(place, total, f"{total:.0f}", ha="center", va="bottom", fontsize=7.5, color=INK)
    axes.set(ylabel="MiB")
    axes.set_xticks(range(len(totals)), [f"stage {k}" for k in range(len(totals))])
    axes.yaxis.label.set_color(INK)
    bare(axes)
    figure.legend(loc="outside lower center", ncols=len(POLICIES), frameon=False, fontsize=9)
    return figure


def forecasts(policy: str, remat: str):
    """Of ResNet-8 under FDG, a group of channels a stage; nothing is trained."""
    layers = models.resnet_cifar(depth=8, rngs=nnx.Rngs(0))
    pipe = Pipeline(
        layers,
        loss=softmax_cross_entropy,
        optimizer=optax.sgd(0.1, momentum=0.9),
        method=methods.fdg(policy=policy),
        cuts=(2, 3),
        engine="mpmd",
        devices=jax.devices()[:1],
        remat=remat,
    )
    pipe.init(jax.random.key(0), jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32))
    return pipe.forecasts


PICTURES: Mapping[str, Callable[[], "Figure"]] = {
    "backpropagation.svg": backpropagation,
    "fdg.svg": decoupled,
    "delay.svg": delayed,
    "beta.svg": shrunk,
    "memory.svg": held,
}


def main() -> None:
    """Draws them all."""
    parser = argparse.ArgumentParser(prog="python -m docs.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures", help="folder")
    out = parser.parse_args().out
    for name, draw in PICTURES.items():
        print(save(draw(), out / name))


if __name__ == "__main__":
    main()
