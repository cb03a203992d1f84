"""Other settings than those asked for: what makes a run fit into memory and what that costs, and all methods beside it.

A remedy costs as many times more as an image takes longer, times as many more devices as it takes. What makes a run
faster, or needs fewer devices, earns nothing: nobody asked for it. Among remedies that cost the same within 2 % the one
comes first that changes training least: what memos keep, the weights that answer, the delays, the batch.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fdg_jax.config import MethodSettings, Settings, make_method
from fdg_jax.estimates import RunPlan
from fdg_jax.methods import POLICY, PRESETS
from fdg_jax.planning import Planner

MOST_STAGES = 8
KINDS = ("remat", "policy", "stages", "batch")  # by how much they change, least first
CHANGES = {
    "convs": "values stay; elementwise operations are done again, which count nothing",
    "full": "values stay; every forward is done again",
    "current": "late gradients meet today's weights",
    "recompute": "late gradients meet today's weights; every late forward is done again",
    "stages": "other delays",
    "batch": "another batch size, for which the learning rate may not suit",
}


@dataclass(frozen=True)
class Remedy:
    """One way to need less memory.

    Attributes:
        kind: the one of `KINDS` that it changes, the last where it changes several.
        flags: that ask for it.
        change: what it means, in words.
        plan: what comes of it; None where it is refused.
        refused: why.
        cost: see above; 1 costs nothing.
    """

    kind: str
    flags: tuple[str, ...]
    change: str
    plan: RunPlan | None
    refused: str = ""
    cost: float = 1.0

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits


class Remedies:
    """All that are tried for a run that does not fit.

    Args:
        planner: of the run.
        now: the run as asked for.
    """

    def __init__(self, planner: Planner, now: RunPlan):
        self.planner, self.now = planner, now

    def all(self) -> Iterator[Remedy]:
        """Every one by itself; and where none of these fits, the leanest together with smaller batches."""
        single = []
        for remedy in (*self._lean(), *self._stages(), *self._batches(self.now.settings, ())):
            single.append(remedy)
            yield remedy
        if not any(remedy.fits for remedy in single):
            plans = [
                (max(r.plan.memory), n, r.plan.settings) for n, r in enumerate(single) if r.plan and r.kind != "batch"
            ]
            if plans:
                _, number, settings = min(plans)
                yield from self._batches(settings, single[number].flags, single[number].change)

    def _lean(self) -> Iterator[Remedy]:
        """What memos keep, and which weights answer."""
        settings, policy = self.now.settings, self.now.method.policy
        if policy == "stash" and any(stage.delay for stage in self.now.stages):
            for word in ("convs", "full"):
                if settings.remat != word:
                    yield self._try("remat", replace(settings, remat=word), (f"--config.remat={word}",), CHANGES[word])
        for word in ("current", "recompute") if settings.method.name in POLICY else ():
            if policy != word:
                flags = (
                    f"--config.method.policy={word}",
                    *(["--config.remat=none"] if settings.remat != "none" else []),
                )
                method = replace(settings.method, policy=word)
                yield self._try("policy", replace(settings, method=method, remat="none"), flags, CHANGES[word])

    def _stages(self) -> Iterator[Remedy]:
        settings = self.now.settings
        for k in range(1, min(MOST_STAGES, len(self.planner.layers)) + 1):
            if k != settings.num_stages and "," not in settings.remat:
                other = replace(settings, num_stages=k)
                other = replace(other, cuts=self.planner.balanced(other))
                cuts = ",".join(map(str, other.cuts)) or "layers"
                flags = f"--config.num_stages={k}", f"--config.cuts={cuts}"
                yield self._try("stages", other, flags, CHANGES["stages"])

    def _batches(self, settings: Settings, flags: tuple[str, ...], change: str = "") -> Iterator[Remedy]:
        """Half the batch, a quarter, .. until it fits."""
        size = settings.batch_size
        while size > 1:
            size //= 2
            flag = f"--config.batch_size={size}"
            words = "; ".join(filter(None, (change, CHANGES["batch"])))
            remedy = self._try("batch", replace(settings, batch_size=size), (*flags, flag), words)
            if remedy.fits or size == 1:
                yield remedy
                return

    def _try(self, kind: str, settings: Settings, flags: Sequence[str], change: str) -> Remedy:
        try:
            plan = self.planner.plan(settings)
        except ValueError as error:
            return Remedy(kind, tuple(flags), change, None, str(error))
        slower = plan.image_seconds / self.now.image_seconds if self.now.image_seconds else 1.0
        more = len(plan.memory) / len(self.now.memory)
        return Remedy(kind, tuple(flags), change, plan, cost=max(1.0, slower) * max(1.0, more))


def cheapest(remedies: Sequence[Remedy]) -> Remedy | None:
    """Of those that fit."""
    fitting = [remedy for remedy in remedies if remedy.fits]
    least = min((remedy.cost for remedy in fitting), default=0.0)
    near = [remedy for remedy in fitting if remedy.cost <= 1.02 * least]
    return min(near, key=lambda remedy: (KINDS.index(remedy.kind), remedy.cost), default=None)


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
                plan: RunPlan | str = planner.plan(replace(tried, cuts=planner.balanced(tried)))
            except ValueError as error:
                plan = str(error)
            yield k, name, plan


def _preset(name: str, num_stages: int, batch_size: int) -> MethodSettings:
    """With as many micro-batches as stages, 4 or more, such that they are equal."""
    if "micro_batches" not in inspect.signature(PRESETS[name]).parameters:
        return MethodSettings(name)
    fits = (m for m in range(max(4, num_stages), batch_size) if batch_size % m == 0)
    return MethodSettings(name, micro_batches=next(fits, batch_size))
