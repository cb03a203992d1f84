"""A method is an answer to four questions; everything else is shared. Named presets build it.

When does a stage do what (`schedule`), which weights answer a late gradient (`policy`), and what happens to the error
gradient that a stage receives from its neighbour (`beta`). What corrects the delay at the update is still to come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fdg_jax import schedule as schedules
from fdg_jax.backward import POLICIES
from fdg_jax.names import check_name
from fdg_jax.schedule import ORDERS, Schedule


@dataclass(frozen=True)
class Method:
    """What distinguishes one way of training K stages from another.

    Attributes:
        name: of the preset.
        schedule: K -> Schedule.
        policy: "stash", "current" or "recompute" (see `backward`).
        beta: every stage but the last multiplies the error gradient it receives by it, so that stage k feels
            beta^(K-1-k). Only the loss gradient shrinks; weight decay does not.
    """

    name: str
    schedule: Callable[[int], Schedule]
    policy: str = "stash"
    beta: float = 1.0

    def __str__(self) -> str:
        return self.name if self.name == "bp" else f"{self.name}(beta={self.beta:g}, policy={self.policy})"


def bp() -> Method:
    """Backpropagation: exact, and one stage at work at a time."""
    return Method("bp", schedules.bp)


def fdg(beta: float = 1.0, policy: str = "stash", order: str = "update_first") -> Method:
    """Fully decoupled learning with delayed gradients (Zhuang, Wang, Liu, Lin; arXiv 1906.09108).

    Args:
        beta: gradient shrinking factor in (0, 1], equation 7. 0 is allowed for study: every stage but the last then
            moves by weight decay alone.
        policy: "stash" is the paper's theory, "current" what the released code computes, "recompute" the least memory.
        order: "update_first" (Algorithm 1) or "forward_first", one update staler.

    Raises:
        ValueError: a value outside these.
    """
    if not hasattr(beta, "__float__") or not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in (0, 1], or be 0 to freeze every stage but the last for study; got {beta!r}")
    check_name("policy", policy, POLICIES)
    check_name("order", order, ORDERS)
    return Method("fdg", partial(schedules.fdg, order=order), policy, float(beta))
