"""Theorem 1 of the FDG text (Zhuang et al.), to be read beside it: both sides of inequality (11), as numbers.

    E[f(theta^{t+1})] - f(theta^t) <= -gamma_t / 2 Z1 + gamma_t^2 Z2                                              (11)

Modules k = 1..K count from the input, d_k = t - 2 (K - k), and by eq. (7) module k steps by gamma_t beta^{K-k} times
its part of a sample's gradient *at one old theta*, theta^{d_k}.

**It covers** plain SGD on an L-smooth f with ||grad f_x||^2 <= M, for every sample x, where the run goes.
**It does not cover** momentum, weight decay or batch normalisation, nor the gradient that a pipeline computes: there a
batch meets newer weights in later modules, so it has no single old theta. Nor does it promise a minimum: the condition
asks for gamma_t below a multiple of Z1, which vanishes.

**The print has gaps**, so `right_side` is the printed one and `corrected_right_side` what we can prove:
1. The rate diminishes, so sum_j gamma_j^2 over the n steps of the delay is at least, not at most, n gamma_t^2. With 1/L
   before t and a small gamma_t (11) is false; a test holds the example. At constant rates the tests find none.
2. The squared norm of a sum of n steps is bounded by the sum of their squares, without the factor n.
3. By (9) grad_k f would move with module k only; as used, that is so for a block-diagonal Hessian alone.
4. While d_k < 0 nothing has arrived and module k stands still, yet Z1 counts it: (11) begins at t = 2 (K-1).
5. The proof takes the mean over x as if it were new at t. Algorithm 1 answers in module k the sample of step d_k, which
   theta^t has felt already through later modules. (11) can then hold over whole runs, not given the past, and the
   correlation has its price.
At beta = 1, (beta^K - 1) / (beta - 1) is read as K. Of min{1/L, Z1 / (2 Z2)} the second is the smaller, always:
Z1 <= M sum_k beta^{K-k} <= Z2 / L.

**The corrected bound**, for any rates. Write h = grad_k f(theta^t), u = grad_k f_x(theta^{d_k}), v = E[u]. Smoothness
and -2 h.v = ||h - v||^2 - ||h||^2 - ||v||^2 give for a new x, with S = sum_k beta^{2(K-k)},
    E[f(theta^{t+1})] - f(theta^t) <= -gamma_t/2 Z1 + gamma_t/2 sum_k beta^{K-k} ||h - v||^2 + gamma_t^2/2 L M S.
Step j moves theta by at most gamma_j sqrt(M S), so ||h - v|| <= L sqrt(M S) G_k, G_k = sum of gamma_j, d_k <= j < t.
Algorithm 1's x adds -gamma_t sum_k beta^{K-k} E[(h - v).(u - v)], at most gamma_t L M sqrt(S) sum_k beta^{K-k} G_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LeastSquares:
    """f(theta) = mean over N samples of 1/2 (x.theta - y)^2, theta of n numbers cut into K modules."""

    inputs: np.ndarray  # x, (N, n)
    targets: np.ndarray  # y, (N,)
    modules: np.ndarray  # (n,): the module 1..K of each number

    @property
    def num_modules(self) -> int:
        return int(self.modules.max())

    @property
    def lipschitz(self) -> float:
        """L of Assumption 1: the largest eigenvalue of the Hessian X^T X / N."""
        return float(np.linalg.norm(self.inputs, 2) ** 2 / len(self.inputs))

    def loss(self, theta: np.ndarray) -> np.ndarray:
        """f of theta (..., n)."""
        return np.mean((theta @ self.inputs.T - self.targets) ** 2, -1) / 2

    def sample_gradient(self, theta: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """grad f_x(theta), (..., n), for theta (..., n) and samples' indices (...)."""
        x = self.inputs[sample]
        return (np.sum(x * theta, -1) - self.targets[sample])[..., None] * x

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return (theta @ self.inputs.T - self.targets) @ self.inputs / len(self.inputs)

    def second_moment(self, thetas: np.ndarray) -> float:
        """M of (10) where a run went: the largest ||grad f_x(theta)||^2 over all samples and the given thetas."""
        residuals = thetas @ self.inputs.T - self.targets
        return float(np.max(residuals**2 * np.sum(self.inputs**2, -1)))

    def second_moment_in_ball(self, radius: float) -> float:
        """M of (10) on ||theta|| <= radius, attained there: max over samples of (||x|| (||x|| radius + |y|))^2."""
        norms = np.linalg.norm(self.inputs, axis=-1)
        return float(np.max(norms * (norms * radius + np.abs(self.targets))) ** 2)


def delays_and_shrinks(num_modules: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """t - d_{K,k}(t) = 2 (K - k) and beta^{K-k}, each (K,), for k = 1..K."""
    hops = np.arange(num_modules - 1, -1, -1)
    return 2 * hops, beta**hops


def delayed_gradient(
    problem: LeastSquares, history: Sequence[np.ndarray], beta: float, samples: Sequence[np.ndarray]
) -> np.ndarray:
    """Eq. (7) after theta^0..theta^t of (..., n), module k answering samples[k - 1]; 0 where nothing has arrived."""
    t, total = len(history) - 1, np.zeros((*np.shape(samples[-1]), problem.modules.size))
    for k, (delay, shrink) in enumerate(zip(*delays_and_shrinks(problem.num_modules, beta), strict=True)):
        if delay <= t:
            gradient = problem.sample_gradient(history[t - delay], samples[k])
            total += np.where(problem.modules == k + 1, shrink * gradient, 0)
    return total


def run(
    problem: LeastSquares, theta: np.ndarray, rates: Sequence[float], beta: float, samples: np.ndarray, fresh: bool
) -> np.ndarray:
    """The iterates theta^0..theta^T, (T+1, ..., n), from theta (n,) with T rates and samples (T, ...).

    With `fresh` every module answers sample t in step t, still at its old theta, as the proof takes it; otherwise
    module k answers sample d_k, as Algorithm 1 does.
    """
    history = [np.broadcast_to(theta, (*samples.shape[1:], theta.size))]
    delays, _ = delays_and_shrinks(problem.num_modules, beta)
    for t, rate in enumerate(rates):
        answered = [samples[t if fresh else max(0, t - delay)] for delay in delays]
        history.append(history[-1] - rate * delayed_gradient(problem, history, beta, answered))
    return np.stack(history)


def left_side(problem: LeastSquares, history: np.ndarray, rate: float, beta: float) -> float:
    """E[f(theta^{t+1})] - f(theta^t) over a new sample given theta^0..theta^t, (t+1, n): a mean of N values, exact."""
    samples = [np.arange(len(problem.inputs))] * problem.num_modules
    after = history[-1] - rate * delayed_gradient(problem, list(history), beta, samples)
    return float(np.mean(problem.loss(after)) - problem.loss(history[-1]))


def z1(problem: LeastSquares, theta: np.ndarray, beta: float) -> np.ndarray:
    """Z1 = sum_k beta^{K-k} ||grad_k f(theta)||^2, (...), for theta (..., n)."""
    _, shrink = delays_and_shrinks(problem.num_modules, beta)
    return np.sum(shrink[problem.modules - 1] * problem.gradient(theta) ** 2, -1)


def z2(lipschitz: float, second_moment: float, num_modules: int, beta: float, t: int) -> float:
    """Z2 as printed: L M sum_k (beta^{K-k} + beta^{3(K-k)} (t - max{0, d_k})), its first sum the geometric one."""
    delay, shrink = delays_and_shrinks(num_modules, beta)
    return float(lipschitz * second_moment * np.sum(shrink + shrink**3 * np.minimum(t, delay)))


def largest_rate(lipschitz: float, z1: float, z2: float) -> float:
    """The step-size condition: for 0 < gamma_t <= min{1/L, Z1 / (2 Z2)} the right side of (11) is at most 0."""
    return min(1 / lipschitz, z1 / (2 * z2))


def right_side(rate: float, z1: float, z2: float) -> float:
    """-gamma_t / 2 Z1 + gamma_t^2 Z2, as printed."""
    return -rate / 2 * z1 + rate**2 * z2


def corrected_right_side(
    problem: LeastSquares, second_moment: float, z1: float, rates: Sequence[float], beta: float, fresh: bool
) -> float:
    """What can be proved, see the file's docstring, for the rates gamma_0..gamma_t; a ValueError if t < 2 (K-1).

    With `fresh` it bounds `left_side`, given any past; otherwise the mean of f(theta^{t+1}) - f(theta^t) over
    Algorithm 1's runs, from the mean of Z1 and an M for all of them.
    """
    *past, rate = rates
    delay, shrink = delays_and_shrinks(problem.num_modules, beta)
    if len(past) < delay[0]:
        raise ValueError(f"the bound begins at t = 2 (K-1) = {delay[0]}, not {len(past)}; give more rates")
    drift = problem.lipschitz * np.array([sum(past[len(past) - n :]) for n in delay])  # L G_k
    spread = np.sum(shrink**2)  # S
    terms = (spread * np.sum(shrink * drift**2) + rate * problem.lipschitz * spread) / 2
    if not fresh:
        terms += np.sqrt(spread) * np.sum(shrink * drift)
    return float(-rate / 2 * z1 + rate * second_moment * terms)
