"""What makes up for a delay, as pure functions that any engine can call and any delayed schedule can carry.

A correction acts in one or more of four places, its hooks: on the error gradient that a stage receives, on the
gradient of its weights, on its optimizer, and on the weights that its forward uses. The functions at the end of the
file put the hooks of several corrections together, in the one order that makes sense; an engine needs only these.

Letters: K stages, k = 0..K-1 from the input; tau the stage's staleness in updates; m momentum, v velocity, eta
learning rate: v' = m v + g, w' = w - eta v'. An optimizer is any of optax's, and stays closed: what a correction wants
to know of it, it finds out by letting it make a step.
"""

import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.names import check_name

PyTree = Any
Optimizer: TypeAlias = optax.GradientTransformation
Factor = float | Callable[[Any], Any]


@dataclass(frozen=True)
class Correction:
    """Changes nothing; the hooks that a correction may override.

    Attributes:
        rank: of wrapping an optimizer, higher ones around lower. 0 makes the optimizer, 1 scales its step, 2 looks at
            that, 3 alters it for the delay, 4 looks at all that the others have made of it.
        predicts: `forward_weights` returns other weights than today's.
        compares_weights: `gradient` reads the weights of the forward, which policy "stash" alone keeps.
    """

    rank: ClassVar[int] = 1
    predicts: ClassVar[bool] = False
    compares_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for each in fields(self):
            if not _fits(value := getattr(self, each.name), each.type):
                raise TypeError(f"{each.name} of {named(type(self))} cannot be {value!r:.60}")

    def __str__(self) -> str:
        """The same in every process, functions by their names: checkpoints record it."""
        facts = [f"{each.name}={_shown(getattr(self, each.name))}" for each in fields(self)]
        return f"{type(self).__name__}({', '.join(facts)})"

    def cotangent_factor(self, k: int, num_stages: int, count: Any) -> Any:
        """What multiplies the error gradient that stage k receives; `count` updates has the stage made so far."""
        return 1.0

    def gradient(self, gradient: PyTree, params_now: PyTree, params_then: PyTree) -> PyTree:
        """The gradient to hand to the optimizer; `params_then` are those that the forward used."""
        return gradient

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        """The optimizer of stage k."""
        return optimizer

    def forward_weights(self, optimizer: Optimizer, params: PyTree, opt_state: PyTree, tau: int | jax.Array) -> PyTree:
        """The weights for a forward that is answered `tau` updates later.

        Args:
            optimizer: the stage's, wrapped by all corrections.
            params: today's.
            opt_state: of that optimizer.
            tau: may be traced: in the fill of a pipeline fewer updates follow than in its steady state.
        """
        return params

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        """Refuses what the correction cannot serve.

        Args:
            optimizer: the one in use (see `base_optimizer`), not wrapped yet; of rank 0, the user's.
            policy: which weights answer a late gradient.
            num_stages: K.

        Raises:
            ValueError: in one line, with the alternative.
        """


@dataclass(frozen=True)
class Shrink(Correction):
    """Gradient shrinking (FDG, equation 7) by a factor per stage, or by one that changes as training goes on.

    Stage k multiplies the error gradient it receives by its factor and sends on what follows from that, so it feels the
    product of the factors k .. K-2. A number for all stages is what `Method.beta` is.

    Attributes:
        factors: a number in [0, 1], or a function of the stage's updates so far; one for all stages but the last, or a
            tuple with one for each of these.
        fade: if given, factors are numbers and rise to 1 linearly in so many updates of the stage, f + (1 - f) *
            min(count / fade, 1); the schedule over steps that can be typed.
    """

    factors: Factor | tuple[Factor, ...]
    fade: int | None = None

    def cotangent_factor(self, k: int, num_stages: int, count: Any) -> Any:
        if k == num_stages - 1:  # it answers its own loss
            return 1.0
        factor = self.factors[k] if isinstance(self.factors, tuple) else self.factors
        if callable(factor):
            return factor(count)
        return factor if self.fade is None else factor + (1 - factor) * jnp.minimum(count / self.fade, 1)

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        factors = self.factors if isinstance(self.factors, tuple) else (self.factors,)
        if isinstance(self.factors, tuple) and len(factors) != num_stages - 1:
            raise ValueError(
                f"Shrink wants {num_stages - 1} factors for {num_stages} stages, one for each but the last; "
                f"got {len(factors)}: {self.factors}"
            )
        for factor in factors:
            if not callable(factor) and not 0 <= factor <= 1:
                raise ValueError(f"Shrink: a factor must lie in [0, 1]; got {factor!r}")
        if self.fade is not None and (self.fade < 1 or any(map(callable, factors))):
            raise ValueError(f"Shrink: fade must be at least 1 update, and factors numbers; got {self!s}")
        if any(factor != 1 for factor in factors):
            check_scale(optimizer)


@dataclass(frozen=True)
class LearningRateShrinking(Correction):
    """Stage k's learning rate times beta^(K-1-k): what shrinking becomes where an optimizer ignores gradients' scale.

    Adam's step is the same for g and beta g (up to its epsilon), so there the step itself is shrunk, its weight decay
    included.
    """

    beta: float

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        factor = self.beta ** (num_stages - 1 - k)
        return optimizer if factor == 1 else optax.chain(optimizer, optax.scale(factor))

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"LearningRateShrinking: beta must lie in (0, 1]; got {self.beta!r}")


@dataclass(frozen=True)
class LearningRateDamping(Correction):
    """A learning rate of eta / tau^p, for a stage with tau = 0 of eta.

    PipeMare (Yang et al. 2021) lets it fade: p falls linearly from `power` to 0 in `fade` updates of the stage, p =
    power * (1 - min(count / fade, 1)). Written from memory; why it must help: gradient descent w' = w - eta c w_{t-tau}
    on a curvature c has the modes z^{tau+1} - z^tau + eta c = 0. On the edge of stability |z| = 1, z = e^{i x}, this
    says |z - 1| = 2 sin(x / 2) = eta c and, of the arguments, (2 tau + 1) x = pi; so it is stable for

        eta c < 2 sin(pi / (2 (2 tau + 1))),

    about pi / (2 tau + 1), and eta c / tau stays below this for every tau >= 1 and eta c < 1.

    Attributes:
        power: p, 0 or more.
        fade: updates until nothing is damped any more; None never ends.
    """

    power: float = 1.0
    fade: int | None = None

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        power, fade = self.power, self.fade
        if tau <= 1 or power == 0:
            return optimizer
        if fade is None:
            return optax.chain(optimizer, optax.scale(tau**-power))

        def factor(count):
            return jnp.float32(tau) ** (-power * (1 - jnp.minimum(count / fade, 1)))

        return optax.chain(optimizer, optax.scale_by_schedule(factor))

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        if self.power < 0:
            raise ValueError(f"LearningRateDamping: power must not be negative; got {self.power!r}")
        if self.fade is not None and self.fade < 1:
            raise ValueError(f"LearningRateDamping: fade must be at least 1 update, or None; got {self.fade!r}")


class Kept(NamedTuple):
    """The state of an optimizer, and what a prediction wants of its last step: the gradient, or the update."""

    inner: PyTree
    last: PyTree


def _keep_last(optimizer: Optimizer, what: str) -> Optimizer:
    """The same optimizer, with its last "gradient" or "update" in its state; one more copy of the weights' size."""

    def init(params):
        return Kept(optimizer.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(gradient, state, params=None):
        updates, inner = optimizer.update(gradient, state.inner, params)
        return updates, Kept(inner, gradient if what == "gradient" else updates)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class WeightPrediction(Correction):
    """The forward uses the weights that the optimizer would reach in tau steps, when its gradient is answered.

    The steps are the optimizer's own (PipeOptim, Guan et al. 2023, with one step taken tau times): any of optax, with
    its weight decay, its rates of these steps and the other corrections. What they need are gradients to come:

    - "zero": none. With SGD v decays, v_{t+j} = m^j v_t, and tau steps sum up to FTPipe's (Eliad et al. 2021)

          w_hat = w - eta (m + .. + m^tau) v = w - eta (m - m^{tau+1}) / (1 - m) v.

      Nothing is kept. With tau = 1 this is the point in which Nesterov's gradient is taken.
    - "held": the last one, again and again; exact for any optimizer while the gradient is constant. It is kept with
      the optimizer's state: memory for one more copy of the weights.

    Attributes:
        assume: "zero" or "held".
    """

    assume: str = "zero"
    rank: ClassVar[int] = 4
    predicts: ClassVar[bool] = True

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        return _keep_last(optimizer, "gradient") if self.assume == "held" and tau else optimizer

    def forward_weights(self, optimizer: Optimizer, params: PyTree, opt_state: PyTree, tau: int | jax.Array) -> PyTree:
        kept = _find(opt_state, Kept) if self.assume == "held" else []
        gradient = kept[0].last if kept else jax.tree.map(jnp.zeros_like, params)

        def step(_, reached):
            params, state = reached
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, tau, step, (params, opt_state))[0]

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        check_name("assumption of WeightPrediction", self.assume, ("zero", "held"))


@dataclass(frozen=True)
class LinearPrediction(Correction):
    """Linear weight prediction of pipelined backpropagation (Kosson et al. 2021), T = horizon * tau steps of one size.

    - "velocity": w_hat = w_t - T eta v_t, where eta v_t is the last step of the optimizer as the user gave it;
    - "weights": w_hat = w_t + T (w_t - w_{t-1}), the last step as it was, with all corrections in it.

    Written from memory. The property: both are the line through the weights whose slope is a step, so exact where
    all steps are equal; and since w_t - w_{t-1} = -eta v_t, they are the same without spike compensation. The last step
    is kept with the optimizer's state: memory for one more copy of the weights.

    Attributes:
        form: "velocity" or "weights".
        horizon: T / tau. 1 is LWP_D; 2, LWP_2D, goes too far, which the paper found to help at times.
    """

    form: str = "velocity"
    horizon: float = 1.0
    predicts: ClassVar[bool] = True

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Below spike compensation for the velocity, above it for the weights."""
        return 2 if self.form == "velocity" else 4

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        return _keep_last(optimizer, "update") if tau else optimizer

    def forward_weights(self, optimizer: Optimizer, params: PyTree, opt_state: PyTree, tau: int | jax.Array) -> PyTree:
        kept = _find(opt_state, Kept)
        if not kept:  # a stage without delay
            return params
        return optax.apply_updates(params, jax.tree.map(lambda step: self.horizon * tau * step, kept[0].last))

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        check_name("form of LinearPrediction", self.form, ("velocity", "weights"))
        if self.horizon < 0:
            raise ValueError(f"LinearPrediction: horizon must not be negative; got {self.horizon!r}")


@dataclass(frozen=True)
class SpikeCompensation(Correction):
    """The step that a late gradient has missed, at once when it arrives (Kosson et al. 2021): D = tau,

        v' = m v + g;  w' = w - eta (a v' + b g),  a = m^D,  b = (1 - m^D) / (1 - m).

    Written from memory, so derived. Without delay g moves the weights by 1, m, m^2, .. (times eta) in this step and the
    next ones. D steps late, the first of its steps must be the D + 1 that are due, a + b = 1 + m + .. + m^D, and
    the others must follow as they would have, a m^j = m^{D+j}. So a = m^D, and b is the rest. D = 0 is SGD with
    momentum, D = 1 (a = m, b = 1) Nesterov.

    It is computed without knowing m: p_0 = v', p_j = m p_{j-1} + g has p_D = a v' + b g, so it is the step of an
    optimizer whose momentum has met the gradient D times more, everything else in its state held; what is kept is v'.
    With weight decay g is the gradient with the decay in it. With optax's Nesterov, which is D = 1, it is D + 1.
    """

    rank: ClassVar[int] = 3

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        def update(gradient, state, params=None):
            updates, new = optimizer.update(gradient, state, params)
            ahead = new
            for _ in range(tau):  # not a loop of XLA's: unrolled, it is one pass over the memory
                updates, ahead = optimizer.update(gradient, _with_traces(state, ahead), params)
            return updates, new

        return optax.GradientTransformation(optimizer.init, update) if tau else optimizer

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        states = _states(optimizer)
        if states is not None and "TraceState" not in states:
            raise ValueError(
                f"{named(SpikeCompensation)} corrects the momentum of optax.trace, and this optimizer keeps "
                f"{', '.join(states) or 'none'}; use optim.sgd with momentum (config.optim.name=sgd), or "
                f"{named(WeightPrediction)} with any optimizer"
            )


@dataclass(frozen=True)
class DelayCompensation(Correction):
    """Delay-compensated gradients (DC-ASGD, Zheng et al. 2017): g + lambda g * g * (w_now - w_then).

    Taylor: grad f(w_now) = g + H (w_now - w_then) + .., with g taken in w_then. For a likelihood the expected Hessian
    is that of g g^T, whose diagonal, times lambda, stands for H. First-order exact where f'' = lambda f'^2.

    Attributes:
        strength: lambda, 0 or more.
    """

    strength: float = 0.04
    compares_weights: ClassVar[bool] = True

    def gradient(self, gradient: PyTree, params_now: PyTree, params_then: PyTree) -> PyTree:
        return jax.tree.map(
            lambda g, now, then: g + self.strength * g * g * (now - then).astype(g.dtype),
            gradient,
            params_now,
            params_then,
        )

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        if self.strength < 0:
            raise ValueError(f"DelayCompensation: strength must not be negative; got {self.strength!r}")
        if policy != "stash":
            raise ValueError(
                f"{named(DelayCompensation)} compares today's weights with those of the forward, which policy 'stash' "
                f"keeps; got policy {policy!r}: use a method with 'stash', as ddg or fdg, or {named(WeightPrediction)}"
            )


@dataclass(frozen=True)
class Nesterov(Correction):
    """Nesterov momentum near 1 as a correction of delay (Ajanthan et al. 2025), the stale gradient discounted.

        w_{t+1} = w_t + d_t - eta (1 - gamma) g(w_{t-tau} + d_{t-tau}),  d_t = gamma (w_t - w_{t-1}).

    The gradient is taken in y_t = w_t + d_t, and these are the weights that a stage holds. With u_t = -eta (1 - gamma)
    g_t and V_{t+1} = w_{t+1} - w_t = gamma V_t + u_t, y_{t+1} - y_t = V_{t+1} + gamma (V_{t+1} - V_t) = gamma V_{t+1} +
    u_t: Nesterov's trace over the steps of an optimizer that has no momentum of its own. On a quadratic it bears larger
    learning rates than plain descent for tau <= 3 and, beyond, smaller ones (the roots of this recursion, tested).

    Attributes:
        momentum: gamma of all stages; of the stalest with `low`.
        low: if given, gamma_k = low + tau_k (momentum - low) / K, never above `momentum`. The cap is ours: published
            for PipeDream, where tau_k < K, the formula passes 1 for the delays of FDG.
        build: gamma -> optimizer. Replaces the one of the run, and takes momentum and discount upon itself: the
            authors' NAdam is `lambda gamma: optax.nadamw(3e-4, b1=gamma)`. It is not needed with `optim.nadamw`, which
            knows itself how to be built with another momentum.
    """

    momentum: float = 0.99
    low: float | None = None
    build: Callable[[float], Optimizer] | None = None
    rank: ClassVar[int] = 0

    def gamma(self, tau: int, num_stages: int) -> float:
        """The momentum of a stage."""
        if self.low is None:
            return self.momentum
        return min(self.momentum, self.low + tau * (self.momentum - self.low) / num_stages)

    def optimizer(self, optimizer: Optimizer, tau: int, k: int, num_stages: int) -> Optimizer:
        gamma = self.gamma(tau, num_stages)
        if build := self._build(optimizer):
            return build(gamma)
        return optax.chain(optimizer, optax.scale(1 - gamma), optax.trace(gamma, nesterov=True))

    def _build(self, optimizer: Optimizer) -> Callable[[float], Optimizer] | None:
        return self.build or getattr(optimizer, "with_momentum", None)

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        low = self.momentum if self.low is None else self.low
        if not 0 <= low <= self.momentum < 1:
            raise ValueError(f"Nesterov: 0 <= low <= momentum < 1 must hold; got {self.low!r} and {self.momentum!r}")
        if build := self._build(optimizer):
            if not isinstance(made := build(self.momentum), optax.GradientTransformation):
                raise TypeError(f"Nesterov: build must return an optimizer, as optax.nadamw does; got {made!r:.60}")
        elif has_momentum(optimizer):
            raise ValueError(
                f"{named(Nesterov)} brings the momentum, and this optimizer has one of its own; use one without "
                "(config.optim.momentum=0), or optim.nadamw (config.optim.name=nadamw), whose momentum it sets"
            )


@dataclass(frozen=True)
class SwitchToSynchronous(Correction):
    """After `after` batches the pipeline is drained, and training goes on without delay (Zhang & Abdelrahman 2021).

    Data only; `engine.switching` acts on it. The other corrections end with the delay, and so does shrinking.
    """

    after: int

    def check(self, optimizer: Optimizer, policy: str, num_stages: int) -> None:
        if self.after < 0:
            raise ValueError(f"SwitchToSynchronous: after must not be negative; got {self.after!r}")


CORRECTIONS: dict[str, type[Correction]] = {
    "shrink": Shrink,
    "learning_rate_shrinking": LearningRateShrinking,
    "learning_rate_damping": LearningRateDamping,
    "weight_prediction": WeightPrediction,
    "linear_prediction": LinearPrediction,
    "spike_compensation": SpikeCompensation,
    "delay_compensation": DelayCompensation,
    "nesterov": Nesterov,
    "switch_to_synchronous": SwitchToSynchronous,
}


def named(kind: type[Correction]) -> str:
    """What a user looks for, in Python and in a config: "SpikeCompensation (spike_compensation in a config)"."""
    typed = [name for name, known in CORRECTIONS.items() if known is kind]
    return f"{kind.__name__} ({typed[0]} in a config)" if typed else kind.__name__


def cotangent_factor(corrections: Sequence[Correction], k: int, num_stages: int, count: Any) -> Any:
    """The product of all factors; the number 1.0 where there is nothing to multiply."""
    product: Any = 1.0
    for correction in corrections:
        factor = correction.cotangent_factor(k, num_stages, count)
        product = factor if isinstance(product, float) and product == 1 else product * factor
    return product


def correct_gradient(
    corrections: Sequence[Correction], gradient: PyTree, params_now: PyTree, params_then: PyTree
) -> PyTree:
    """The gradient after all corrections of it."""
    for correction in corrections:
        gradient = correction.gradient(gradient, params_now, params_then)
    return gradient


def correct_optimizer(
    corrections: Sequence[Correction], optimizer: Optimizer, tau: int, k: int, num_stages: int
) -> Optimizer:
    """Stage k's optimizer with all corrections around it, in the order of their ranks."""
    for correction in sorted(corrections, key=lambda correction: correction.rank):
        optimizer = correction.optimizer(optimizer, tau, k, num_stages)
    return optimizer


def base_optimizer(corrections: Sequence[Correction], optimizer: Optimizer, num_stages: int) -> Optimizer:
    """The optimizer that makes the steps: the user's, or what a correction (rank 0) puts in its place."""
    return correct_optimizer([each for each in corrections if each.rank == 0], optimizer, 0, 0, num_stages)


def synchronous_optimizer(
    corrections: Sequence[Correction], optimizer: Optimizer, tau: int, k: int, num_stages: int
) -> Optimizer:
    """The optimizer that goes on with the state of `correct_optimizer` when there is no delay any more.

    What makes the optimizer (rank 0) does so for tau = 0. Of the others the state is kept up, so that it stays what a
    checkpoint expects, and the step is as if they were not there.
    """
    for correction in sorted(corrections, key=lambda correction: correction.rank):
        if correction.rank == 0:
            optimizer = correction.optimizer(optimizer, 0, k, num_stages)
        else:
            optimizer = _without_effect(partial(correction.optimizer, tau=tau, k=k, num_stages=num_stages), optimizer)
    return optimizer


def _without_effect(wrap: Callable[[Optimizer], Optimizer], optimizer: Optimizer) -> Optimizer:
    """The steps of an optimizer, with the state that `wrap` makes of its own."""

    def update(gradient, state, params=None):
        steps = []

        def noted(*args):
            updates, new = optimizer.update(*args)
            steps.append(updates)
            return updates, new

        _, new = wrap(optax.GradientTransformation(optimizer.init, noted)).update(gradient, state, params)
        return steps[0], new  # a wrapper's first call is the step, others look ahead

    return optax.GradientTransformation(wrap(optimizer).init, update)


def forward_weights(
    corrections: Sequence[Correction], optimizer: Optimizer, params: PyTree, opt_state: PyTree, tau: int | jax.Array
) -> PyTree:
    """The weights of a forward; `optimizer` and `opt_state` are those of `correct_optimizer`."""
    for correction in corrections:
        params = correction.forward_weights(optimizer, params, opt_state, tau)
    return params


def check(corrections: Sequence[Correction], optimizer: Optimizer, policy: str, num_stages: int) -> None:
    """Checks each correction, and that they go together.

    Raises:
        ValueError: in one line, with the alternative.
    """
    for correction in corrections:
        if correction.rank == 0:
            correction.check(optimizer, policy, num_stages)
    used = base_optimizer(corrections, optimizer, num_stages)
    for correction in corrections:
        if correction.rank > 0:
            correction.check(used, policy, num_stages)
    names = [type(correction).__name__ for correction in corrections]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"a method takes a correction once; got {', '.join(twice)} more than once")
    predictions = [type(correction).__name__ for correction in corrections if correction.predicts]
    if len(predictions) > 1:
        raise ValueError(f"two predictions would go twice as far; keep one of {' and '.join(predictions)}")
    if {"Nesterov", "SpikeCompensation"} <= set(names):
        raise ValueError("Nesterov and SpikeCompensation both reshape the momentum for the delay; keep one of them")


def check_scale(optimizer: Optimizer) -> None:
    """Refuses to shrink the gradients of an optimizer that ignores their scale.

    Raises:
        ValueError: naming the alternatives.
    """
    if scale_free(optimizer):
        raise ValueError(
            "shrinking gradients (beta < 1) does nothing, as the optimizer "
            f"({', '.join(_states(optimizer) or []) or 'without state'}) ignores their scale; "
            f"leave it at 1 and use {named(LearningRateShrinking)} or {named(LearningRateDamping)}, "
            "or use optim.sgd (config.optim.name=sgd)"
        )


def scale_free(optimizer: Optimizer) -> bool:
    """Whether half the gradients lead to the same updates, as with Adam.

    Decided by a trial with random gradients, tiny, middling and huge: one that clips ignores the scale of the huge ones
    only. Its first steps are passed over, in which averages that start from zero may not be full yet, but where a
    schedule of the rate lets it move in no others. One that never moves, or cannot be tried on a kernel and a bias,
    counts as heeding the scale.
    """
    rng = np.random.default_rng(0)

    def normal():
        return {"bias": rng.normal(size=2).astype(np.float32), "kernel": rng.normal(size=(3, 2)).astype(np.float32)}

    params, gradients = normal(), [normal() for _ in range(4)]
    update = jax.jit(optimizer.update)

    def trial(size):
        state, moves = optimizer.init(params), []
        for step in range(16):
            scaled = jax.tree.map(lambda g: np.float32(size) * g, gradients[step % 4])
            updates, state = update(scaled, state, params)
            moves.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)]))
        return np.stack(moves[8:] if np.any(moves[8:]) else moves)

    def same(size):
        whole, half = trial(size), trial(size / 2)
        return whole.any() and np.linalg.norm(whole - half) <= 0.01 * np.linalg.norm(whole)

    def first(size):
        updates, _ = optimizer.update(
            jax.tree.map(lambda g: np.float32(size) * g, gradients[0]), optimizer.init(params), params
        )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)])

    try:
        whole, half = first(1e-2), first(5e-3)
        if whole.any() and np.linalg.norm(whole - 2 * half) <= 1e-3 * np.linalg.norm(whole):
            return False  # as SGD does, whose trial would cost a compilation
        return all(same(size) for size in (1e-2, 1.0, 1e2))
    except Exception:  # masks made for one network, for instance
        return False


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether an optimizer still moves when, after a first gradient, there is none; tried on weights of 0, no decay."""
    params = jnp.zeros((2, 2))
    try:
        _, state = optimizer.update(jnp.ones((2, 2)), optimizer.init(params), params)
        updates, _ = optimizer.update(params, state, params)
    except Exception:  # as above
        return False
    return bool(jnp.any(updates != 0))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the annotated type; numbers may be NumPy's or JAX's, and are no truth values."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_fits(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(each, typing.get_args(kind)[0]) for each in value)
    if typing.get_origin(kind) is Callable:
        return callable(value)
    if kind in (int, float):
        return hasattr(value, "__index__" if kind is int else "__float__") and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else repr(value)


def _is_trace(node: Any) -> bool:
    return isinstance(node, optax.TraceState)


def _with_traces(state: PyTree, source: PyTree) -> PyTree:
    """`state` with the momentum of `source`."""
    return jax.tree.map(lambda own, other: other if _is_trace(own) else own, state, source, is_leaf=_is_trace)


def _find(state: PyTree, kind: type) -> list:
    """All parts of a state that are of the given kind."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _states(optimizer: Optimizer) -> list[str] | None:
    """The kinds of state that an optimizer keeps, by name, since it has none itself; None if it cannot be asked."""
    try:
        state = optimizer.init({"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))})
    except Exception:  # as above
        return None
    return list(dict.fromkeys(_kinds(state)))


def _kinds(node: Any) -> Iterator[str]:
    """The names of all named tuples with an array in them."""
    if hasattr(node, "_fields") and jax.tree.leaves(node):
        yield type(node).__name__
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list) else ():
        yield from _kinds(child)
