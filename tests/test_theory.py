"""Theorem 1 on least-squares problems: expectations are finite means, only the draw of a problem is left to chance.

Where no draw of n fails, the fraction of problems that do is below 1 - 0.05^(1/n) at 95 % confidence (Clopper-Pearson).
"""

import itertools

import numpy as np
import pytest

from fdg_jax import theory
from fdg_jax.theory import LeastSquares

MODULES = (2, 3, 4)
BETAS = (0.2, 0.5, 0.8, 1.0)
DRAWS = 100  # problems for each K and beta; 1200 in all: fewer than 0.25 % fail
MORE_STEPS = 4  # beyond t = 2 (K-1), where the theorem begins


def draw(rng, num_modules, num_samples=None):
    """A problem of up to 5 samples with 1 or 2 numbers a module, where to start, and a rate gamma in (0, 1/L]."""
    modules = np.repeat(np.arange(1, num_modules + 1), rng.integers(1, 3))
    size = num_samples or rng.integers(1, 6)
    problem = LeastSquares(rng.normal(size=(size, modules.size)), rng.normal(size=size), modules)
    return problem, rng.normal(size=modules.size) * rng.choice([0.3, 3]), rng.uniform(0.02, 1) / problem.lipschitz


def sides(problem, history, rates, beta, t):
    """Left, printed right and corrected right side of (11) given theta^0..theta^t; Z1 and M beside."""
    past = history[: t + 1]
    z1, second_moment = theory.z1(problem, past[-1], beta), problem.second_moment(past)
    z2 = theory.z2(problem.lipschitz, second_moment, problem.num_modules, beta, t)
    corrected = theory.corrected_right_side(problem, second_moment, z1, rates[: t + 1], beta, fresh=True)
    return theory.left_side(problem, past, rates[t], beta), theory.right_side(rates[t], z1, z2), corrected, z1, z2


def times(num_modules):
    return range(2 * (num_modules - 1), 2 * (num_modules - 1) + MORE_STEPS)


def draws(num_modules, beta, scale=1.0, diminishing=False):
    """(problem, history, rates, t) of runs with fresh samples, at one rate or at rates that fall to about 1 % of it."""
    rng = np.random.default_rng([num_modules, int(10 * beta)])
    for _ in range(DRAWS):
        problem, start, rate = draw(rng, num_modules)
        length = times(num_modules).stop
        rates = (
            scale * rate * np.sort(10 ** rng.uniform(-2, 0, length))[::-1]
            if diminishing
            else np.full(length, scale * rate)
        )
        samples = rng.integers(0, len(problem.inputs), length)
        history = theory.run(problem, start, rates, beta, samples, fresh=True)
        yield from ((problem, history, rates, t) for t in times(num_modules))


def test_the_problem():
    """A quadratic's central difference is its derivative; L and M are the largest there are."""
    rng = np.random.default_rng(0)
    problem, theta, _ = draw(rng, 3, num_samples=4)
    n = theta.size
    slopes = [(problem.loss(theta + e) - problem.loss(theta - e)) / 2 for e in np.eye(n)]
    np.testing.assert_allclose(problem.gradient(theta), slopes)
    every = problem.sample_gradient(theta, np.arange(4))
    np.testing.assert_allclose(every.mean(0), slopes)
    hessian = np.stack([problem.gradient(e) - problem.gradient(np.zeros(n)) for e in np.eye(n)])
    np.testing.assert_allclose(problem.lipschitz, np.linalg.eigvalsh(hessian)[-1])
    assert problem.second_moment(theta) == pytest.approx(max(np.sum(every**2, -1)))

    ball = theta * rng.uniform(-1, 1, (500, 1))
    radius = np.linalg.norm(theta)
    assert problem.second_moment(ball) <= problem.second_moment_in_ball(radius)
    worst = radius * problem.inputs / np.linalg.norm(problem.inputs, axis=-1, keepdims=True)
    assert problem.second_moment_in_ball(radius) == pytest.approx(problem.second_moment(np.vstack([worst, -worst])))


@pytest.mark.parametrize("fresh", [True, False])
def test_steps_are_equation_7(fresh):
    problem, start, rate = draw(np.random.default_rng(1), 3, num_samples=4)
    beta, samples, thetas = 0.5, np.array([2, 0, 3, 1, 2, 3, 0]), [start]
    for t in range(7):
        theta = thetas[t].copy()
        for c, k in enumerate(problem.modules):
            d = t - 2 * (3 - k)
            if d >= 0:
                i = samples[t] if fresh else samples[d]
                x, y = problem.inputs[i], problem.targets[i]
                theta[c] -= rate / (t + 1) * beta ** (3 - k) * (x @ thetas[d] - y) * x[c]
        thetas.append(theta)
    rates = rate / np.arange(1, 8)
    np.testing.assert_allclose(theory.run(problem, start, rates, beta, samples, fresh), thetas)
    twice = theory.run(problem, start, rates, beta, np.stack([samples[::-1], samples], 1), fresh)
    np.testing.assert_allclose(twice[:, 1], thetas)  # runs side by side are the runs alone


def test_the_left_side_is_the_mean_over_one_more_step():
    problem, start, rate = draw(np.random.default_rng(1), 3, num_samples=4)
    samples = np.concatenate([np.tile([[2], [0], [3], [1], [2]], 4), [range(4)]])  # one past, then each of the four
    history = theory.run(problem, start, [rate] * 6, 0.5, samples, fresh=True)
    change = np.mean([problem.loss(theta) for theta in history[6]]) - problem.loss(history[5, 0])
    assert theory.left_side(problem, history[:6, 0], rate, 0.5) == pytest.approx(change)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_modules", [1, *MODULES])
def test_z1_and_z2_are_the_printed_ones(num_modules, beta):
    K, L, M = num_modules, 1.7, 2.3
    geometric = K if beta == 1 else (beta**K - 1) / (beta - 1)
    for t in range(2 * K + 1):
        late = sum(beta ** (3 * (K - k)) * (t - max(0, t - 2 * (K - k))) for k in range(1, K + 1))
        assert theory.z2(L, M, K, beta, t) == pytest.approx(L * M * geometric + L * M * late)
    problem, theta, _ = draw(np.random.default_rng(2), K)
    g = problem.gradient(theta)
    parts = [beta ** (K - k) * np.linalg.norm(g[problem.modules == k]) ** 2 for k in range(1, K + 1)]
    assert theory.z1(problem, theta, beta) == pytest.approx(sum(parts))


def test_the_corrected_side_is_its_formula():
    problem, _, _ = draw(np.random.default_rng(3), 2)
    L, M, beta, g = problem.lipschitz, 2.3, 0.4, [0.5, 0.3, 0.2, 0.1]
    S, G = 1 + beta**2, 0.3 + 0.2
    given_the_past = -0.1 / 2 * 7 + 0.1 / 2 * beta * L**2 * M * S * G**2 + 0.1**2 / 2 * L * M * S
    assert theory.corrected_right_side(problem, M, 7.0, g, beta, fresh=True) == pytest.approx(given_the_past)
    over_runs = given_the_past + 0.1 * L * M * S**0.5 * beta * G
    assert theory.corrected_right_side(problem, M, 7.0, g, beta, fresh=False) == pytest.approx(over_runs)
    with pytest.raises(ValueError, match=r"begins at t = 2 \(K-1\) = 2, not 1; give more rates"):
        theory.corrected_right_side(problem, M, 7.0, g[:2], beta, fresh=True)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_modules", MODULES)
def test_both_bounds_hold_at_a_constant_rate(num_modules, beta):
    """Given any past and with a new sample, all draws; and Z2 is needed, for without it some fail."""
    bare = []
    for problem, history, rates, t in draws(num_modules, beta):
        left, right, corrected, z1, _ = sides(problem, history, rates, beta, t)
        assert left <= right
        assert left <= corrected
        bare.append(left <= -rates[t] / 2 * z1)
    assert not all(bare)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_modules", MODULES)
def test_the_corrected_bound_holds_at_diminishing_rates(num_modules, beta):
    for problem, history, rates, t in draws(num_modules, beta, diminishing=True):
        left, _, corrected, _, _ = sides(problem, history, rates, beta, t)
        assert left <= corrected


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_modules", MODULES)
def test_both_bounds_hold_over_algorithm_1s_runs(num_modules, beta):
    """Module k answers the sample of step d_k: the mean over *all* sequences of two samples, 4 problems each (48)."""
    rng, t = np.random.default_rng([num_modules, int(10 * beta)]), 2 * num_modules - 1
    samples = np.array(list(itertools.product(range(2), repeat=t + 1))).T
    for _ in range(4):
        problem, start, rate = draw(rng, num_modules, num_samples=2)
        rates = np.full(t + 1, rate)
        history = theory.run(problem, start, rates, beta, samples, fresh=False)
        left = np.mean(problem.loss(history[t + 1]) - problem.loss(history[t]))
        z1, second_moment = np.mean(theory.z1(problem, history[t], beta)), problem.second_moment(history[: t + 1])
        z2 = theory.z2(problem.lipschitz, second_moment, num_modules, beta, t)
        assert left <= theory.right_side(rate, z1, z2)
        assert left <= theory.corrected_right_side(problem, second_moment, z1, rates, beta, fresh=False)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_modules", MODULES)
def test_the_printed_bound_holds_over_drawn_runs(num_modules, beta):
    """32 samples, 500 runs of Algorithm 1: the mean of left - right is below 0 by 4 standard errors (99.99 %)."""
    rng, t = np.random.default_rng([num_modules, int(10 * beta)]), 2 * num_modules
    problem, start, rate = draw(rng, num_modules, num_samples=32)
    samples = rng.integers(0, 32, (t + 1, 500))
    history = theory.run(problem, start, np.full(t + 1, rate), beta, samples, fresh=False)
    left = problem.loss(history[t + 1]) - problem.loss(history[t])
    radius = np.linalg.norm(history, axis=-1).max()  # the runs stay in this ball
    z2 = theory.z2(problem.lipschitz, problem.second_moment_in_ball(radius), num_modules, beta, t)
    excess = left - theory.right_side(rate, theory.z1(problem, history[t], beta), z2)
    assert excess.mean() + 4 * excess.std() / np.sqrt(500) < 0


@pytest.mark.parametrize("num_modules", MODULES)
def test_the_step_size_condition(num_modules):
    """It is where the right side changes its sign, never above 1/(2L); below it the expected loss falls."""
    fell = 0
    for problem, history, rates, t in draws(num_modules, beta=0.5, scale=0.1):
        *_, z1, z2 = sides(problem, history, rates, 0.5, t)
        largest = theory.largest_rate(problem.lipschitz, z1, z2)
        assert largest <= 0.5 / problem.lipschitz * (1 + 1e-12)
        assert theory.right_side(0.99 * largest, z1, z2) < 0 < theory.right_side(1.01 * largest, z1, z2)
        if rates[t] <= largest:
            assert theory.left_side(problem, history[: t + 1], rates[t], 0.5) < 0
            fell += 1
    assert fell > 0
    assert theory.largest_rate(4.0, z1=1e9, z2=1.0) == 0.25


# One sample, x = (1, 0), y = 0: f = theta_1^2 / 2, a block-diagonal Hessian with L = 1, and all the delay in module 1.
SWING = LeastSquares(np.array([[1.0, 0.0]]), np.zeros(1), np.array([1, 2]))


def test_the_printed_bound_is_false_for_some_diminishing_rates():
    """theta_1 goes 1, 1, 1, 0, -1 at rate 1/L; then the gradient of theta_1^2 = 1 drives it on, at a small rate."""
    rates = [1.0, 1.0, 1.0, 1.0, 0.1]
    history = theory.run(SWING, np.array([1.0, 0.0]), rates, 1.0, np.zeros(5, int), fresh=True)
    np.testing.assert_array_equal(history[:5, 0], [1, 1, 1, 0, -1])
    left, right, corrected, z1, z2 = sides(SWING, history, rates, 1.0, t=4)
    assert (z1, z2) == (1.0, 4.0)
    assert left == pytest.approx(0.1 + 0.1**2 / 2)
    assert right == pytest.approx(-0.1 / 2 + 0.1**2 * 4)
    assert right < 0 < left < corrected


def test_the_printed_bound_is_false_while_the_pipeline_fills():
    history = np.array([[1.0, 0.0]])
    assert theory.left_side(SWING, history, 0.1, beta=1.0) == 0  # module 1 has no gradient yet, module 2 none to follow
    assert theory.right_side(0.1, theory.z1(SWING, history[0], 1.0), theory.z2(1.0, 1.0, 2, 1.0, t=0)) < 0


def test_given_the_past_algorithm_1_may_break_the_bound():
    """y = 1 and -1 on one input: the batch in flight is drawn already, and may be the one that pulls away."""
    problem = LeastSquares(np.array([[1.0, 0.0]] * 2), np.array([1.0, -1.0]), np.array([1, 2]))
    start, rate = np.array([0.1, 0.0]), 0.01
    samples = np.array(list(itertools.product(range(2), repeat=3))).T
    history = theory.run(problem, start, [rate] * 3, 1.0, samples, fresh=False)
    change = problem.loss(history[3]) - problem.loss(history[2])
    z2 = theory.z2(1.0, problem.second_moment(history[:3]), 2, 1.0, t=2)
    right = theory.right_side(rate, theory.z1(problem, history[2], 1.0), z2)
    pulls_away = samples[0] == 0
    assert np.all(change[pulls_away] > right[pulls_away])
    assert change.mean() <= right.mean()
