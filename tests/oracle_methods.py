"""Every delayed method from its authors' equations: NumPy and plain loops, with no autodiff and nothing of the library.

A network is linear layers with ReLUs between them, the weights of a stage one vector theta. All methods are one
recursion in the number of the batch: theta_k^(n+1) follows from theta_k^n and the gradient of group n of batches. They
differ in the version of the weights that batch i meets on its way down stage k, `version(i, k)` updates old, and in the
weights that answer; nothing here knows of ticks. Stages are numbered from 0; `late` = K-1-k is how many follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Stage:
    """Linear layers from `widths[0]` to `widths[-1]` features; `plain` has no ReLU after the last one."""

    widths: Sequence[int]
    plain: bool = False

    def matrices(self, theta):
        """[(W, b), ..]"""
        found, start = [], 0
        for a, b in zip(self.widths[:-1], self.widths[1:], strict=True):
            found.append((theta[start : start + a * b].reshape(a, b), theta[start + a * b : start + a * b + b]))
            start += a * b + b
        assert start == len(theta)
        return found

    def forward(self, theta, x):
        """The input and what every layer makes of it."""
        values, layers = [x], self.matrices(theta)
        for number, (W, b) in enumerate(layers):
            x = x @ W + b
            if not (self.plain and number == len(layers) - 1):
                x = np.where(x > 0, x, 0.0)
            values.append(x)
        return values

    def backward(self, theta, values, delta):
        """(gradient, error gradient of the input), at these weights and these values."""
        layers, parts = self.matrices(theta), []
        for number in reversed(range(len(layers))):
            if not (self.plain and number == len(layers) - 1):
                delta = delta * (values[number + 1] > 0)
            parts += [delta.sum(0), (values[number].T @ delta).ravel()]
            delta = delta @ layers[number][0].T
        return np.concatenate(parts[::-1]), delta


def cross_entropy(logits, labels):
    """(mean loss, its gradient)"""
    shifted = logits - logits.max(1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    wanted = np.eye(logits.shape[1])[labels]
    return -np.log((probabilities * wanted).sum(1)).mean(), (probabilities - wanted) / len(logits)


# Which weights batch i meets on stage k, as the number of updates that have made them


def synchronous(group=1):
    return lambda i, late, last: i // group


def ddg(i, late, last):
    """Huo et al. 2018: w^(t-K+k), the iteration being that in which the batch passes all stages. PipeDream's as well:
    w^(t+1) = w^t - rate grad f(w_1^(t-n+1), .., w_n^t), Narayanan et al. 2019."""
    return max(0, i - late)


def vertical_sync(i, late, last):
    """Narayanan et al. 2019: w^(t-n+1) on all stages."""
    return max(0, i - last)


def double_buffered(group):
    """Narayanan et al. 2021: W(t+1) = W(t) - rate grad f(W(t-1))."""
    return lambda i, late, last: max(0, i // group - 1)


def fdg(order, group=1):
    """Zhuang et al.: d = t - 2(K-k). Updating first, a stage has used that gradient when it goes forward. With groups,
    only whole ones count (Zhuang et al. 2021)."""
    return lambda i, late, last: max(0, i - 2 * late + (order == "update_first" and late > 0)) // group


# Optimizers: (theta, gradient, state) -> (theta, state); a state is a dict of vectors named as optax names them


def sgd(rate, momentum=0.9, decay=0.0, spike=0):
    """PyTorch's; rate(n) of update n. Spike compensation over D = `spike` (Kosson et al. 2021) replaces v by a v + b g,
    a = m^D, b = (1 - m^D) / (1 - m)."""

    def step(theta, gradient, state):
        a, b = momentum**spike, (1 - momentum**spike) / (1 - momentum)
        d = gradient + decay * theta
        v = momentum * state["trace"] + d
        n = state["count"]
        moved = theta - rate(n) * (a * v + b * d)
        kept = {"gradient": gradient, "velocity": -rate(n) * v, "step": moved - theta}  # for predictions
        return moved, {"trace": v, "count": n + 1, **kept}

    return step


def adam(rate, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba 2015."""

    def step(theta, gradient, state):
        n = state["count"] + 1
        mu = b1 * state["mu"] + (1 - b1) * gradient
        nu = b2 * state["nu"] + (1 - b2) * gradient**2
        moved = theta - rate * (mu / (1 - b1**n)) / (np.sqrt(nu / (1 - b2**n)) + eps)
        return moved, {"mu": mu, "nu": nu, "count": n, "gradient": gradient}

    return step


def nesterov(rate, gamma):
    """Ajanthan et al. 2025: w' = w + d - rate (1 - gamma) g(w + d of old), d = gamma (w - w before); theta is w + d."""

    def step(theta, gradient, state):
        w = state.get("w", theta)
        new = theta - rate * (1 - gamma) * gradient
        return new + gamma * (new - w), {"w": new, "trace": new - w, "count": state["count"] + 1}

    return step


def nothing_yet(theta):
    zero = np.zeros_like(theta)
    return {**dict.fromkeys(("trace", "mu", "nu", "gradient", "velocity", "step"), zero), "count": 0}


# What a forward uses in place of theta, `tau` updates before its gradient is applied


def no_prediction(step, theta, state, tau):
    return theta


def own_steps(assume):
    """The optimizer's own steps with the gradient 0, or with the last one (Guan et al. 2023)."""

    def predict(step, theta, state, tau):
        gradient = state["gradient"] if assume == "held" else np.zeros_like(theta)
        for _ in range(tau):
            theta, state = step(theta, gradient, state)
        return theta

    return predict


def linear(form, horizon):
    """Kosson et al. 2021: w - T rate v, or w + T (w - w before), T = horizon * tau."""

    def predict(step, theta, state, tau):
        return theta + horizon * tau * state["velocity" if form == "velocity" else "step"]

    return predict


# The recursion


@dataclass
class Equations:
    """What distinguishes a method.

    Attributes:
        version: (i, late, last) -> number of the version of the weights that batch i meets.
        policy: whether these weights answer ("stash"), today's do with the activations as they were ("current"), or
            with the activations that they give now ("recompute").
        group: M batches an update.
        average: over them, or summed.
        shrink: (k, updates so far) -> factor of the error gradient that a stage receives.
        strength: lambda of g + lambda g g (w now - w then), Zheng et al. 2017.
        predict: see above.
    """

    version: Callable
    policy: str = "stash"
    group: int = 1
    average: bool = True
    shrink: Callable = lambda k, count: 1.0
    strength: float = 0.0
    predict: Callable = no_prediction


@dataclass
class Run:
    """All versions of the weights and the optimizer states of every stage, and the loss of every batch."""

    weights: list[list[np.ndarray]]
    states: list[list[dict]]
    losses: list[float] = field(default_factory=list)


def begin(theta):
    return Run([[w] for w in theta], [[nothing_yet(w)] for w in theta])


def train(network, steps, batches, equations, start):
    """Continues from the last versions of `start` with an empty pipeline.

    Args:
        network: `Stage`s.
        steps: the optimizer of every stage.
        batches: (x, labels); micro-batches where these travel.
        equations: of the method.
        start: a `Run`.
    """
    run = Run([of_stage[-1:] for of_stage in start.weights], [of_stage[-1:] for of_stage in start.states])
    for first in range(0, len(batches), equations.group):
        members = range(first, min(first + equations.group, len(batches)))
        found = [gradients_of(network, steps, i, batches[i], equations, run) for i in members]
        for k, step in enumerate(steps):
            gradient = sum(gradients[k] for gradients in found) / (len(members) if equations.average else 1)
            theta, state = step(run.weights[k][-1], gradient, run.states[k][-1])
            run.weights[k].append(theta)
            run.states[k].append(state)
    return run


def gradients_of(network, steps, i, batch, equations, run):
    """Of every stage for one batch; its loss is noted."""
    last, (x, labels), memos = len(network) - 1, batch, []
    for k, stage in enumerate(network):
        n = equations.version(i, last - k, last)
        then = equations.predict(steps[k], run.weights[k][n], run.states[k][n], i // equations.group - n)
        memos.append((then, stage.forward(then, x)))
        x = memos[-1][1][-1]
    loss, delta = cross_entropy(x, labels)
    run.losses.append(loss)
    gradients = [None] * (last + 1)
    for k in reversed(range(last + 1)):
        now, (then, values) = run.weights[k][-1], memos[k]
        if k < last:
            delta = equations.shrink(k, run.states[k][-1]["count"]) * delta
        if equations.policy == "recompute":
            values = network[k].forward(now, values[0])
        answers = then if equations.policy == "stash" else now
        g, delta = network[k].backward(answers, values, delta)
        gradients[k] = g + equations.strength * g * g * (now - then)
    return gradients


def train_greedily(network, steps, batches, start):
    """Belilovsky et al. 2020: every stage ends in a linear head of its own, and nothing is sent back."""
    run = Run([of_stage[-1:] for of_stage in start.weights], [of_stage[-1:] for of_stage in start.states])
    for x, labels in batches:
        for k, stage in enumerate(network):
            values = stage.forward(run.weights[k][-1], x)
            loss, delta = cross_entropy(values[-1], labels)
            gradient, _ = stage.backward(run.weights[k][-1], values, delta)
            theta, state = steps[k](run.weights[k][-1], gradient, run.states[k][-1])
            run.weights[k].append(theta)
            run.states[k].append(state)
            x = values[-2]
        run.losses.append(loss)
    return run
