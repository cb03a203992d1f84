"""SGD as the papers state it, and learning rate schedules. Everything counts a stage's own updates."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD as PyTorch and the FDG papers have it, with weight decay coupled into the gradient.

    d = g + weight_decay * w;  v = momentum * v + d;  w = w - learning_rate * v  (Nesterov: d + momentum * v for v).
    Shrinking scales g alone, so that beta is no learning rate where weight_decay > 0.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.trace(momentum, nesterov) if momentum else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


class WithMomentum(optax.GradientTransformation):
    """An optimizer that knows how to be built with another momentum, as `corrections.Nesterov` wants it.

    Attributes:
        with_momentum: momentum -> optimizer.
    """

    with_momentum: Callable[[float], optax.GradientTransformation]

    def __new__(cls, build: Callable[[float], optax.GradientTransformation], momentum: float) -> "WithMomentum":
        self = super().__new__(cls, *build(momentum))
        self.with_momentum = build
        return self


def nadamw(learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, weight_decay: float = 0.0) -> WithMomentum:
    """Adam with Nesterov momentum and decoupled weight decay; `corrections.Nesterov` chooses the momentum of a stage.

    The discount of the gradient, 1 - momentum, is Adam's own.
    """

    def build(momentum):
        return optax.nadamw(learning_rate, b1=momentum, weight_decay=weight_decay)

    return WithMomentum(build, momentum)


def piecewise(
    learning_rate: float,
    boundaries: Sequence[int],
    factor: float = 0.1,
    warmup_steps: int = 0,
    warmup_factor: float = 0.1,
) -> optax.Schedule:
    """`learning_rate`, multiplied by `factor` at each boundary, and by `warmup_factor` for the first `warmup_steps`.

    Args:
        learning_rate: after the warm-up.
        boundaries: updates, increasing; the first update at the new rate.
        factor: of each boundary.
        warmup_steps: updates at the constant rate of the warm-up, as FDG trains ResNet-110.
        warmup_factor: of the warm-up.
    """
    edges = jnp.asarray([*boundaries], jnp.int32)

    def schedule(count):
        rate = learning_rate * factor ** jnp.sum(count >= edges)
        return jnp.where(count < warmup_steps, warmup_factor * rate, rate)

    return schedule


def cosine(learning_rate: float, num_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Linear from 0 to `learning_rate` in `warmup_steps` updates, then half a cosine to 0 at `num_steps`."""
    if not warmup_steps:
        return optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, num_steps)
