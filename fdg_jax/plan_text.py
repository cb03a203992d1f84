"""Plans in words and tables: one run, the remedies where it does not fit, and the sweep."""

from collections.abc import Sequence

from fdg_jax import plots
from fdg_jax.alternatives import BEST, changed, rank
from fdg_jax.config import Settings
from fdg_jax.estimates import RunPlan
from fdg_jax.overview import columns, counted
from fdg_jax.planning import Planner
from fdg_jax.remedies import CHANGES, RULE, Remedy
from fdg_jax.schedule import show

TICKS = 16  # of the picture in the terminal
ESTIMATES = """\
Scratch, which a program needs beside arrays, is an estimate: leave some room. Operations are those of convolutions and
matrix products, two a multiplication; a backward is two forwards. Transfers and the host take no time."""
SWEEP = f"""\
Under every K the best first. Cuts where the layers' times are most even. Speed-up: over backpropagation on one device.
Idle: mean of the devices. Staleness: of stage 0, in updates. MiB: at most, on the fullest device. The method of the
config has its arguments, the others their defaults.
{BEST}"""


def describe(plan: RunPlan, planner: Planner) -> str:
    """The run in four parts: schedule, stages, memory, time."""
    model, settings = plan.settings.model, plan.settings
    shape = "x".join(map(str, planner.image_shape))
    rate = settings.batch_size / plan.batch_seconds if plan.batch_seconds else 0.0
    idle = " ".join(f"{100 * share:.0f} %" for share in plan.idle)
    return "\n\n".join(
        (
            f"{model.name} of depth {model.depth} and width {model.width}, {settings.dtype}, batches of "
            f"{settings.batch_size} images of {shape}\n{plan.method}, {len(plan.stages)} stages",
            show(plan.schedule, min(plots.usual_ticks(plan.schedule), TICKS)),
            columns(stage_rows(plan)),
            f"memory, MiB\n{columns(memory_rows(plan))}",
            verdict(plan, planner.memory_source(len(plan.memory))),
            f"predicted {planner.pace.source}:\n{plan.batch_seconds:.3g} s a batch, {rate:,.0f} images/s, "
            f"{plan.speed_up:.2f} times backpropagation on one device; devices are idle {idle}",
            ESTIMATES,
        )
    )


def verdict(plan: RunPlan, source: str) -> str:
    """Whether it fits, and into what."""
    need = f"device {plan.memory.index(max(plan.memory))} needs {gib(max(plan.memory))} at most"
    if plan.device_memory is None:
        return f"{need}; this device does not say how much it has: give --device_memory, as --device_memory=16GiB"
    return f"{'fits' if plan.fits else 'DOES NOT FIT'}: {need}, a device has {gib(plan.device_memory)} ({source})"


def stage_rows(plan: RunPlan) -> list[tuple[str, ...]]:
    """A line a stage: layers, parameters, work, messages, delays."""
    heads = (
        "stage",
        "layers",
        "",
        "parameters",
        "GFLOP forward",
        "backward",
        "sends MiB",
        "delay",
        "staleness",
        "device",
    )
    rows: list[tuple[str, ...]] = [heads]
    rows += [
        (
            str(k),
            f"{stage.start}-{stage.stop - 1}" if stage.stop - stage.start > 1 else str(stage.start),
            stage.layers,
            f"{stage.num_params:,}",
            f"{stage.forward_flops / 1e9:.4g}",
            f"{stage.backward_flops / 1e9:.4g}",
            mib(stage.sends),
            counted(stage.delay, "tick"),
            counted(stage.staleness, "update"),
            str(stage.device),
        )
        for k, stage in enumerate(plan.stages)
    ]
    return rows


def memory_rows(plan: RunPlan) -> list[tuple[str, ...]]:
    """A line a stage: what it holds, and the most of it."""
    heads = "stage", "weights", "optimizer", "old weights", "memos", "messages", "visit", "scratch", "at most"
    rows: list[tuple[str, ...]] = [heads]
    for k, stage in enumerate(plan.stages):
        f = stage.forecast
        memos = f"{f.num_memos} x {mib(f.memos // max(1, f.num_memos))}"
        rows.append(
            (
                str(k),
                *map(mib, (f.weights, f.optimizer, f.old_weights)),
                memos,
                *map(mib, (f.messages, f.visit, stage.scratch, f.peak + stage.scratch)),
            )
        )
    return rows


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:.2f}"


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{mib(size)} MiB"


def advise(remedies: Sequence[Remedy]) -> str:
    """What was tried, the best first, and what that one changes; beside it the best of the smaller batches."""
    ranked = sorted(remedies)
    table = [("remedy", "needs", "fits", "cost", "changes")]
    for r in ranked:
        outcome = (gib(max(r.plan.memory)), "yes" if r.fits else "no", f"{r.cost:.2f}") if r.plan else ("-", "no", "-")
        short = ", ".join(r.changes)
        table.append((" ".join(r.flags), *outcome, short if r.plan else f"refused: {r.refused}"))
    fitting = [remedy for remedy in ranked if remedy.fits]
    smaller = [remedy for remedy in fitting[1:] if "batch" in remedy.changes]
    told = [f"best: {_told(remedy)}" for remedy in fitting[:1]] + [f"or:   {_told(remedy)}" for remedy in smaller[:1]]
    nothing = ["nothing that was tried fits: take devices with more memory"]
    return "\n".join((columns(table), RULE, "", *(told or nothing)))


def _told(remedy: Remedy) -> str:
    """Its flags, what it comes to, and what it means, a line each."""
    assert remedy.plan
    words = "; ".join(CHANGES[key] for key in remedy.changes)
    lines = " ".join(remedy.flags), f"needs {gib(max(remedy.plan.memory))}, cost {remedy.cost:.2f}", words
    return "\n      ".join(lines)


def compare(found: Sequence[tuple[int, str, RunPlan | str]], asked: Settings) -> str:
    """A line a K and method, and how to ask for the best.

    Args:
        found: from `sweep`.
        asked: the settings of the run.
    """
    plans = [plan for *_, plan in found if not isinstance(plan, str)]
    best = min((plan for plan in plans if plan.fits), key=rank, default=None)
    table: list[tuple[str, ...]] = [("K", "method", "cuts", "s a batch", "speed-up", "idle", "staleness", "MiB", "")]
    for k in sorted({k for k, *_ in found}):
        table.append(("",) * len(table[0]))
        own = [(name, plan) for number, name, plan in found if number == k]
        for name, plan in sorted(own, key=lambda each: (1,) if isinstance(each[1], str) else (0, rank(each[1]))):
            table.append((str(k), name, *_outcome(plan, plan is best)))
    if best is None:
        return f"{columns(table)}\n\nnothing fits: take devices with more memory"
    words = f"{best.method} with {counted(len(best.stages), 'stage')}, {best.speed_up:.2f} times backpropagation"
    return f"{columns(table)}\n\nbest: {words}\n      {' '.join(changed(asked, best.settings)) or 'as it is'}"


def _outcome(plan: RunPlan | str, is_best: bool) -> tuple[str, ...]:
    """Cells of a line: cuts, seconds, speed-up, idle, staleness, memory, remark."""
    if isinstance(plan, str):
        return *["-"] * 6, plan
    return (
        ",".join(map(str, plan.cuts)) or "-",
        f"{plan.batch_seconds:.3g}",
        f"{plan.speed_up:.2f}",
        f"{100 * sum(plan.idle) / len(plan.idle):.0f} %",
        str(plan.stages[0].staleness),
        mib(max(plan.memory)),
        "best" if is_best else "" if plan.fits else "does not fit",
    )
