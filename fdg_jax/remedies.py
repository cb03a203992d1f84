"""What makes a run fit into memory that does not, and what that costs. `RULE` says which remedy is the better one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from fdg_jax.alternatives import MOST_STAGES, changed, evenly_cut
from fdg_jax.backward import REMATS, resolve_remat
from fdg_jax.config import Settings
from fdg_jax.estimates import RunPlan
from fdg_jax.methods import POLICY
from fdg_jax.planning import Planner

RULE = """\
Best first: what fits, then what leaves all values as they are, then the least cost, which is how many times longer an
image takes, times how many more devices there are, times how many more updates an epoch has; no gain lowers it."""
CHANGES = {  # what a remedy changes, in short and in words; of equal cost the first changes training least
    "nothing": "all values stay as they are",
    "weights that answer": "late gradients meet today's weights",
    "delays": "layers have other delays",
    "local losses": "other layers learn by losses of their own",
    "batch": "noisier gradients and BatchNorm, more updates an epoch: adapt the rate",
}


@dataclass(frozen=True)
class Remedy:
    """One way to need less memory.

    Attributes:
        flags: that ask for it.
        changes: keys of `CHANGES`, in their order.
        plan: what comes of it; None where it is refused.
        refused: why.
        cost: see `RULE`; 1 costs nothing.
    """

    flags: tuple[str, ...]
    changes: tuple[str, ...]
    plan: RunPlan | None
    refused: str = ""
    cost: float = 1.0

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    def __lt__(self, other: "Remedy") -> bool:
        """The better one is less, as `RULE` has it."""
        return self._worth() < other._worth()

    def _worth(self) -> tuple:
        last = list(CHANGES).index(self.changes[-1])
        return not self.fits, self.plan is None, last > 0, round(self.cost, 2), last


class Remedies:
    """All that are tried for a run that does not fit.

    Args:
        planner: of the run.
        now: the run as asked for.
    """

    def __init__(self, planner: Planner, now: RunPlan):
        self.planner, self.now = planner, now
        late = any(stage.staleness for stage in now.stages)
        self.moved = (
            "local losses" if now.schedule.local else "delays" if late else "nothing"
        )  # by other cuts, and by K

    def all(self) -> Iterator[Remedy]:
        """One change at a time; where only smaller batches fit, these also with remat, and on the leanest change."""
        enough, others = False, [self.now]
        for remedy in self._remats(self.now):
            enough |= remedy.fits
            yield remedy
        for remedy in chain(self._policies(), self._cuts(), self._stages()):
            enough |= remedy.fits
            others += [remedy.plan] if remedy.plan else []
            yield remedy
        yield from self._batches(self.now.settings, with_remat=not enough)
        leanest = min(others, key=_need)
        if leanest is not self.now and not enough:
            yield from self._batches(leanest.settings, with_remat=True)

    def _remats(self, plan: RunPlan | None) -> Iterator[Remedy]:
        """On every device too full, memos of the fullest stage keep less, "convs" and then "full", until it fits."""
        while plan and not plan.fits and plan.method.policy == "stash":
            words = list(resolve_remat(plan.settings.remat, len(plan.stages), "stash"))
            full = _fullest_stages(plan, [k for k, word in enumerate(words) if word != REMATS[-1]])
            if not full:
                return
            for k in full:
                words[k] = REMATS[REMATS.index(words[k]) + 1]
            remedy = self._try(replace(plan.settings, remat=",".join(words)))
            yield remedy
            plan = remedy.plan

    def _policies(self) -> Iterator[Remedy]:
        """Other weights answer what is late; where these are today's, there is no remat."""
        settings = self.now.settings
        for word in ("current", "recompute") if self.moved == "delays" and settings.method.name in POLICY else ():
            if self.now.method.policy != word:
                yield self._try(replace(settings, method=replace(settings.method, policy=word), remat="none"))

    def _cuts(self) -> Iterator[Remedy]:
        """Layer by layer leaves the fullest stage for a neighbour, as long as that helps."""
        plan, best = self.now, None
        while not plan.fits:
            nearby = [self._try(replace(plan.settings, cuts=cuts)) for cuts in _cuts_nearby(plan)]
            leaner = [(_need(each.plan), n) for n, each in enumerate(nearby) if each.plan]
            if not leaner or min(leaner)[0] >= _need(plan):
                break
            best = nearby[min(leaner)[1]]
            assert best.plan
            plan = best.plan
        if best:
            yield best

    def _stages(self) -> Iterator[Remedy]:
        """More and fewer stages, cut where the layers' times are most even; remat is that of the leanest stage.

        One alone would be another method: backpropagation, unless this is that.
        """
        settings = self.now.settings
        if "," in settings.remat:
            settings = replace(settings, remat=max(settings.remat.split(","), key=REMATS.index))
        for k in range(1 if self.moved == "nothing" else 2, min(MOST_STAGES, len(self.planner.layers)) + 1):
            if k != settings.num_stages:
                yield self._try(evenly_cut(self.planner, replace(settings, num_stages=k)))

    def _batches(self, settings: Settings, with_remat: bool) -> Iterator[Remedy]:
        """Half the batch, a quarter, .. until it fits; and the largest that does so with remat."""
        while settings.batch_size > 1:
            settings = replace(settings, batch_size=settings.batch_size // 2)
            remedy = self._try(settings)
            if with_remat and (lean := [each for each in self._remats(remedy.plan) if each.fits]):
                with_remat = False
                yield from lean
            if remedy.fits or settings.batch_size == 1:
                yield remedy
                return

    def _try(self, settings: Settings) -> Remedy:
        flags, changes = changed(self.now.settings, settings), self._changes(settings)
        try:
            plan = self.planner.plan(settings)
        except ValueError as error:
            return Remedy(flags, changes, None, str(error))
        slower = plan.image_seconds / self.now.image_seconds if self.now.image_seconds else 1.0
        devices = len(plan.memory) / len(self.now.memory)
        updates = self.now.settings.batch_size / settings.batch_size
        return Remedy(flags, changes, plan, cost=max(1.0, slower) * max(1.0, devices) * max(1.0, updates))

    def _changes(self, settings: Settings) -> tuple[str, ...]:
        now, found = self.now.settings, set()
        if settings.method != now.method:
            found.add("weights that answer")
        if (settings.num_stages, settings.cuts) != (now.num_stages, now.cuts):
            found.add(self.moved)
        if settings.batch_size != now.batch_size:
            found.add("batch")
        return tuple(key for key in CHANGES if key in found - {"nothing"}) or ("nothing",)


def _need(plan: RunPlan) -> int:
    """Bytes on the fullest device."""
    return max(plan.memory)


def _fullest_stages(plan: RunPlan, among: Sequence[int]) -> list[int]:
    """Of every device that is too full, the stage among these with most memos and scratch, where it has one."""
    own = [[k for k in among if plan.devices[k] == device] for device in range(len(plan.memory))]
    too_full = [need > (plan.device_memory or need) for need in plan.memory]
    return [max(stages, key=plan.volatile) for stages, over in zip(own, too_full, strict=True) if stages and over]


def _cuts_nearby(plan: RunPlan) -> Iterator[tuple[int, ...]]:
    """Those with which the fullest stage of the fullest device is a layer shorter, at its beginning or its end."""
    device = plan.memory.index(_need(plan))
    k = max((k for k, each in enumerate(plan.devices) if each == device), key=plan.volatile)
    if plan.stages[k].stop - plan.stages[k].start > 1:
        for cut, step in ((k - 1, 1), (k, -1)):
            if 0 <= cut < len(plan.cuts):
                yield *plan.cuts[:cut], plan.cuts[cut] + step, *plan.cuts[cut + 1 :]
