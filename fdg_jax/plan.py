"""Plans a run without training it: what every stage holds, does and takes, and the cure where it does not fit.

    python -m fdg_jax.plan --config experiments/wrn28_10.py --config.num_stages=4 --device_memory=4GiB
    python -m fdg_jax.plan --config experiments/digits.py --sweep

Exit status: 0 planned, also where it does not fit; 2 the configuration is wrong.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from absl import logging
from rich.console import Console

from fdg_jax.alternatives import MOST_STAGES, sweep
from fdg_jax.commands import Parser, complain
from fdg_jax.config import ConfigError, Settings, resolve
from fdg_jax.console import telling
from fdg_jax.estimates import RunPlan
from fdg_jax.flags import experiment_name, given_config, parse_flags
from fdg_jax.plan_files import check_writable, draw
from fdg_jax.plan_text import SWEEP, advise, compare, describe
from fdg_jax.planning import Pace, Planner
from fdg_jax.remedies import Remedies

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this command, and the others, which belong to `--config`."""
    parser = Parser(
        prog="python -m fdg_jax.plan",
        usage="%(prog)s --config FILE [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--device_memory",
        type=size,
        metavar="40GiB",
        help="plan for devices of so much memory, one a stage; one if fused",
    )
    add("--flops_per_second", type=speed, metavar="5e12", help="plan for devices as fast (an assumed 1e12)")
    add("--measure", action="store_true", help="run every layer on this machine's device, and plan with its times")
    add("--sweep", action="store_true", help=f"compare K = 1..{MOST_STAGES} and all methods in one table")
    add(
        "--out",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="draw there the schedule, as schedule.svg and schedule.png, and what it comes to in seconds, as\n"
        "timeline.png and, for https://ui.perfetto.dev, trace.json\n"
        "(by default plans/ and the experiment's name); not with --sweep",
    )
    args, rest = parser.parse_known_args(list(argv))
    parser.check_flags(rest, ("config",))
    return args, rest


def size(text: str) -> int:
    """Bytes, as in 40GiB or 16GB."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)", text, re.ASCII)
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
    if not 1 <= value <= 1e24:  # beyond, times are no numbers
        raise argparse.ArgumentTypeError(f"must be operations a second, such as 5e12; got {text!r}")
    return value


def make_planner(args: argparse.Namespace, settings: Settings, console: Console) -> Planner:
    """For the devices that the command line describes."""
    speed = args.flops_per_second
    pace = Pace(speed, f"at {speed:.3g} FLOP/s a device (--flops_per_second)") if speed else None
    planner = Planner(settings, pace, args.device_memory)
    if not args.measure:
        return planner
    with telling(console, "measuring every layer"):
        return planner.measured(settings)


def run(args: argparse.Namespace, console: Console) -> None:
    """Prints the plan, and draws it where asked."""
    if args.sweep and args.out is not None:
        raise ConfigError("--out draws one schedule, and --sweep plans many; give one of them")
    if args.measure and args.flops_per_second:
        raise ConfigError("--measure and --flops_per_second both say how fast a device is; give one of them")
    config = given_config()
    if "methods" in config:
        raise ConfigError(
            f"{experiment_name()} compares methods, a plan is of one run: name another config, and add --sweep"
        )
    settings = resolve(config)
    out = None if args.out is None else Path(args.out or Path("plans") / experiment_name())
    if out:
        check_writable(out)
    planner = make_planner(args, settings, console)
    if args.sweep:
        return print_sweep(planner, settings, console)
    plan = planner.plan(settings)
    print(describe(plan, planner), flush=True)
    if not plan.fits:
        with telling(console, "looking for remedies"):
            remedies = list(Remedies(planner, plan).all())
        print(f"\n{advise(remedies)}", flush=True)
    if out:
        print(draw(plan, out))


def print_sweep(planner: Planner, settings: Settings, console: Console) -> None:
    """All methods with every K in one table."""
    most = min(MOST_STAGES, len(planner.layers))
    found: list[tuple[int, str, RunPlan | str]] = []
    with telling(console, "planning every method") as tell:
        for k in range(1, most + 1):
            tell(f"K = {k} of {most}")
            found += sweep(planner, settings, [k])
    print(f"{compare(found, settings)}\n\npredicted {planner.pace.source}\n{SWEEP}")


@contextmanager
def stopped_at_once(console: Console) -> Iterator[None]:
    """Ends the process at a SIGINT; not by an exception, which is lost where it falls into a callback of JAX's."""

    def stop(*_: object) -> None:
        console.show_cursor()
        os._exit(complain("stopped", 128 + signal.SIGINT))

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    args, rest = parse(sys.argv[1:] if argv is None else argv)
    others = parse_flags(["plan", *rest])
    logging.set_verbosity(logging.WARNING)
    try:
        if len(others) > 1:
            raise ConfigError(f"unexpected argument {others[1]!r}; flags begin with -- and --help lists them")
        console = Console(stderr=True)
        with stopped_at_once(console):
            run(args, console)
    except BrokenPipeError:  # the reader, `head` for one, has enough; at its end Python would write again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, OSError) as error:
        return complain(error, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
