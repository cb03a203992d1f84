"""Figure 4 of our runs: bars over betas, curves over K. A figure holds FDG of which nothing else differs.

Backpropagation stands in it where it was run with the same settings.
"""

from collections.abc import Iterator, Sequence

from fdg_jax.figures import Bar, Picture, beta_bars, stage_curves
from fdg_jax.published import cells
from fdg_jax.tally import Group, Task, alike, rest

BY_K = ("num_stages", "cuts", "optim.warmup_epochs")  # the papers' recipe warms up where there are many stages


def draw(number: int, task: Task, groups: Sequence[Group]) -> Iterator[Picture]:
    """Bars over betas for every K that has some, and curves over K for every beta that has some.

    Args:
        number: of the task, for the names of the pictures.
        task: of the groups, from `tally.by_task`.
        groups: of FDG with one or more betas and K, of BP, and others, which are left out.
    """
    fdg = _fdg(groups)
    for stages in sorted({group.num_stages for group in fdg}):
        same_k = [group for group in fdg if group.num_stages == stages]
        for part, (apart, own) in enumerate(alike(same_k, "method.beta")):
            bp = _bp_of(own[0], groups)
            bars, bp_published = _bars(task, own)
            if len(bars) > 1:
                name, title = f"betas_{number}_K{stages}{_part(part)}", f"{task.title}, K = {stages}{apart}"
                yield beta_bars(name, title, bars, bp.error if bp else None, bp_published)
    for beta in sorted({group.beta for group in fdg}, reverse=True):
        for part, (apart, own) in enumerate(alike([group for group in fdg if group.beta == beta], *BY_K)):
            bp = _bp_of(own[0], groups)
            if len({group.num_stages for group in own}) > 1:
                name, title = f"stages_{number}_beta{beta:g}{_part(part)}", f"{task.title}, beta {beta:g}{apart}"
                yield stage_curves(name, title, [bp, *own] if bp else own)


def differ(groups: Sequence[Group]) -> bool:
    """Whether runs of FDG differ in more than beta and K, so that there are figures of each."""
    return len(alike(_fdg(groups), "method.beta", *BY_K)) > 1


def _fdg(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.method == "fdg"]


def _part(number: int) -> str:
    return f"_{number}" if number else ""


def _bp_of(fdg: Group, groups: Sequence[Group]) -> Group | None:
    """Backpropagation with the other settings of these runs; None where it was not run."""
    others = rest(fdg, "method.", *BY_K)
    return next((group for group in groups if group.method == "bp" and rest(group, "method.", *BY_K) == others), None)


def _bars(task: Task, groups: Sequence[Group]) -> tuple[list[Bar], float | None]:
    """Of groups of one K, with those of Figure 4a that were not run; and BP's published error.

    The papers' errors are shown beside runs of their task alone.
    """
    places = [cell for cell in cells("figure4a") if (cell.network, cell.dataset) == task.cell]
    if groups[0].num_stages not in {cell.num_stages for cell in places if cell.beta is not None}:
        places = []
    published = {cell.beta: cell.error if task.scale == "full" else None for cell in places}
    bp = published.pop(None, None)
    bars = [Bar(group.beta, group.error, published.pop(group.beta, None), "not finished") for group in groups]
    bars += [Bar(beta, None, error, "not run") for beta, error in published.items() if beta is not None]
    return sorted(bars, key=lambda bar: bar.beta), bp
