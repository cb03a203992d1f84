"""Plans a run without training it: what every stage holds, does and takes, and the cure where it does not fit.

    python -m fdg_jax.plan --config experiments/wrn28_10.py --config.num_stages=4 --device_memory=4GiB
    python -m fdg_jax.plan --config experiments/digits.py --sweep

Exit status: 0 planned, also where it does not fit; 2 the configuration is wrong.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from rich.console import Console

from fdg_jax import plots
from fdg_jax.alternatives import MOST_STAGES, Remedies, Remedy, cheapest, sweep
from fdg_jax.config import ConfigError, Settings, resolve
from fdg_jax.estimates import RunPlan
from fdg_jax.flags import complain, experiment_name, given_config, parse_flags
from fdg_jax.overview import columns
from fdg_jax.planning import Pace, Planner
from fdg_jax.schedule import show

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
TICKS = 16  # of the picture in the terminal
ESTIMATES = """\
Scratch, which a program needs beside arrays, is an estimate: leave some room. Operations are those of convolutions and
matrix products, two a multiplication; a backward is two forwards. Transfers and the host take no time."""
REMEDIES = "Cost: how many times longer an image takes, times how many more devices it takes; to gain counts nothing."
SWEEP = """\
Cuts where the layers' times are most even. Speed-up: over backpropagation on one device. Idle: mean of the devices.
Staleness: of stage 0, in updates. MiB: at most, on the fullest device. The method of the config has its arguments, the
others their defaults."""


class _Parser(argparse.ArgumentParser):
    """One that complains in a line."""

    def error(self, message: str):
        raise SystemExit(complain(message, 2))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this command, and the others, which belong to `--config`."""
    parser = _Parser(
        prog="python -m fdg_jax.plan",
        usage="%(prog)s --config FILE [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device_memory", type=size, metavar="40GiB", help="plan for devices with so much memory, one a stage")
    add("--flops_per_second", type=speed, metavar="5e12", help="plan for devices as fast (an assumed 1e12)")
    add("--measure", action="store_true", help="run every layer on this machine's device, and plan with its times")
    add("--sweep", action="store_true", help=f"compare K = 1..{MOST_STAGES} and all methods in one table")
    add(
        "--out",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="draw the schedule there, as schedule.svg and schedule.png\n"
        "(by default plans/ and the experiment's name); not with --sweep",
    )
    return parser.parse_known_args(list(argv))


def size(text: str) -> int:
    """Bytes, as in 40GiB or 16GB."""
    found = re.fullmatch(r"([\d.]+)\s*([a-zA-Z]*)", text)
    unit = UNITS.get(found[2].upper() if found else "none")
    if not found or not unit or not 0 < float(found[1]) * unit < 2**63:
        raise argparse.ArgumentTypeError(f"must be a size such as 40GiB or 16GB; got {text!r}")
    if unit == 1 and float(found[1]) < 2**20:  # bytes were not meant
        raise argparse.ArgumentTypeError(f"must have a unit, such as {text}GiB; got {text!r}, which is in bytes")
    return int(float(found[1]) * unit)


def speed(text: str) -> float:
    """Operations a second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be operations a second, such as 5e12; got {text!r}")
    return value


def describe(plan: RunPlan, planner: Planner) -> str:
    """The run in four parts: schedule, stages, memory, time."""
    model, settings = plan.settings.model, plan.settings
    shape = "x".join(map(str, planner.image_shape))
    fullest = max(range(len(plan.memory)), key=plan.memory.__getitem__)
    rate = settings.batch_size / plan.batch_seconds if plan.batch_seconds else 0.0
    idle = " ".join(f"{100 * share:.0f} %" for share in plan.idle)
    return "\n\n".join(
        (
            f"{model.name} of depth {model.depth} and width {model.width}, {settings.dtype}, batches of "
            f"{settings.batch_size} images of {shape}\n{plan.method}, {len(plan.stages)} stages",
            show(plan.schedule, min(plots.usual_ticks(plan.schedule), TICKS)),
            columns(stage_rows(plan)),
            f"memory, MiB\n{columns(memory_rows(plan))}",
            verdict(plan, f"device {fullest} needs {gib(plan.memory[fullest])} at most", planner.memory_source),
            f"predicted {planner.pace.source}:\n{plan.batch_seconds:.3g} s a batch, {rate:,.0f} images/s, "
            f"{plan.speed_up:.2f} times backpropagation on one device; devices are idle {idle}",
            ESTIMATES,
        )
    )


def verdict(plan: RunPlan, need: str, source: str) -> str:
    """Whether it fits, and into what."""
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


def counted(number: int, noun: str) -> str:
    """Like "1 tick" or "2 ticks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:.2f}"


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{mib(size)} MiB"


def advise(remedies: Sequence[Remedy]) -> str:
    """What was tried, and the cheapest that fits and why."""
    table = [("remedy", "needs", "fits", "cost", "what changes")]
    for r in remedies:
        outcome = (gib(max(r.plan.memory)), "yes" if r.fits else "no", f"{r.cost:.2f}") if r.plan else ("-", "no", "-")
        table.append((" ".join(r.flags), *outcome, r.change if r.plan else f"refused: {r.refused}"))
    best = cheapest(remedies)
    if best is None or best.plan is None:
        return f"{columns(table)}\n{REMEDIES}\n\nnothing that was tried fits: take devices with more memory"
    dearer = f"{best.cost:.2f} times the cost" if best.cost >= 1.005 else "at no cost in time or devices"
    choice = f"cheapest: {' '.join(best.flags)} needs {gib(max(best.plan.memory))}, {dearer}; {best.change}"
    return f"{columns(table)}\n{REMEDIES}\n\n{choice}"


def sweep_rows(planner: Planner, settings: Settings) -> list[tuple[str, ...]]:
    """A line a K and method."""
    rows: list[tuple[str, ...]] = [("K", "method", "cuts", "s a batch", "speed-up", "idle", "staleness", "MiB", "")]
    for k, name, plan in sweep(planner, settings, range(1, min(MOST_STAGES, len(planner.layers)) + 1)):
        if isinstance(plan, str):
            rows.append((str(k), name, *["-"] * 6, plan))
            continue
        rows.append(
            (
                str(k),
                name,
                ",".join(map(str, plan.cuts)) or "-",
                f"{plan.batch_seconds:.3g}",
                f"{plan.speed_up:.2f}",
                f"{100 * sum(plan.idle) / len(plan.idle):.0f} %",
                str(plan.stages[0].staleness),
                mib(max(plan.memory)),
                "" if plan.fits else "does not fit",
            )
        )
    return rows


def make_planner(args: argparse.Namespace, settings: Settings, console: Console) -> Planner:
    """For the devices that the command line describes."""
    if args.measure and args.flops_per_second:
        raise ConfigError("--measure and --flops_per_second both say how fast a device is; give one of them")
    speed = args.flops_per_second
    pace = Pace(speed, f"at {speed:.3g} FLOP/s a device (--flops_per_second)") if speed else None
    planner = Planner(settings, pace, args.device_memory)
    if not args.measure:
        return planner
    with console.status("measuring every layer"):
        return planner.measured(settings)


def run(args: argparse.Namespace, console: Console) -> None:
    """Prints the plan, and draws it where asked."""
    if args.sweep and args.out is not None:
        raise ConfigError("--out draws one schedule, and --sweep plans many; give one of them")
    config = given_config()
    if "methods" in config:
        raise ConfigError(
            f"{experiment_name()} compares methods, a plan is of one run: name another config, and add --sweep"
        )
    settings = resolve(config)
    planner = make_planner(args, settings, console)
    if args.sweep:
        with console.status("planning every method"):
            rows = sweep_rows(planner, settings)
        print(f"{columns(rows)}\n\npredicted {planner.pace.source}\n{SWEEP}")
        return
    plan = planner.plan(settings)
    print(describe(plan, planner))
    if not plan.fits:
        with console.status("looking for remedies"):
            remedies = list(Remedies(planner, plan).all())
        print(f"\n{advise(remedies)}")
    if args.out is not None:
        for path in draw(plan, Path(args.out or Path("plans") / experiment_name())):
            print(f"written: {path}")


def draw(plan: RunPlan, folder: Path) -> list[Path]:
    """The schedule's picture as files."""
    figure = plots.draw_schedule(plan.schedule, title=str(plan.method))
    return [plots.save(figure, folder / f"schedule{suffix}") for suffix in plots.SUFFIXES]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    args, rest = parse(sys.argv[1:] if argv is None else argv)
    others = parse_flags(["plan", *rest])
    logging.set_verbosity(logging.WARNING)
    try:
        if len(others) > 1:
            raise ConfigError(f"unexpected argument {others[1]!r}; flags begin with -- and --help lists them")
        run(args, Console(stderr=True))
    except (ConfigError, OSError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("stopped", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
