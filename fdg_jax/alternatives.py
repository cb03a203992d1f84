"""All methods with every number of stages beside a run, and how other settings than its own are asked for."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace

from fdg_jax.config import MethodSettings, Settings, make_method
from fdg_jax.estimates import RunPlan
from fdg_jax.methods import PRESETS
from fdg_jax.planning import Planner

MOST_STAGES = 8
BEST = """\
The best of them all fits and is the fastest; of equals it has the fewest stages, then the least staleness, then the
least memory. Accuracy, in which methods differ, nobody can predict."""


def rank(plan: RunPlan) -> tuple:
    """By which plans of a sweep are sorted, the best first, as `BEST` has it."""
    return not plan.fits, -round(plan.speed_up, 2), len(plan.stages), plan.stages[0].staleness, max(plan.memory)


def sweep(planner: Planner, settings: Settings, num_stages: Sequence[int]) -> Iterator[tuple[int, str, RunPlan | str]]:
    """Every method with every number of stages, cut where the layers' times are most even: (K, method, plan or reason).

    Args:
        planner: of the run.
        settings: of the run; its own method keeps its arguments, the others have their defaults.
        num_stages: the K to try.
    """
    for k in num_stages:
        for name in PRESETS:
            method = settings.method if name == settings.method.name else _preset(name, k, settings.batch_size)
            stash = make_method(method).policy == "stash" and "," not in settings.remat
            tried = replace(settings, num_stages=k, method=method, remat=settings.remat if stash else "none")
            try:
                plan: RunPlan | str = planner.plan(evenly_cut(planner, tried))
            except ValueError as error:
                plan = str(error)
            yield k, name, plan


def _preset(name: str, num_stages: int, batch_size: int) -> MethodSettings:
    """With as many micro-batches as stages, 4 or more, such that they are equal."""
    if "micro_batches" not in inspect.signature(PRESETS[name]).parameters:
        return MethodSettings(name)
    fits = (m for m in range(max(4, num_stages), batch_size) if batch_size % m == 0)
    return MethodSettings(name, micro_batches=next(fits, batch_size))


def evenly_cut(planner: Planner, settings: Settings) -> Settings:
    """The same, cut where the layers' times are most even."""
    return replace(settings, cuts=planner.balanced(settings) or "layers")


def changed(asked: Settings, other: Settings) -> tuple[str, ...]:
    """The flags that make other settings of those asked for."""
    before, after = _flat(asked), _flat(other)
    return tuple(f"--config.{key}={_typed(after[key])}" for key in after if before[key] != after[key])


def _flat(settings: object, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in vars(settings).items():
        leaves |= _flat(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return leaves


def _typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
