"""Corrections of delay against their own equations, written out in NumPy for gradient descent with a delay.

The problem: f(w) = sum(C * (w - TARGET)^2) / 2, whose gradient is C * (w - TARGET); tau steps late it is taken where
the weights of the forward were.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import corrections, methods, optim
from fdg_jax.corrections import (
    CORRECTIONS,
    Correction,
    DelayCompensation,
    LearningRateDamping,
    LearningRateShrinking,
    LinearPrediction,
    Nesterov,
    Shrink,
    SpikeCompensation,
    SwitchToSynchronous,
    WeightPrediction,
)

C = np.array([1.0, 0.3, 2.0])
TARGET = np.array([0.5, -1.0, 2.0])
START = np.array([1.0, 2.0, -0.5])
RATE = 0.02
STEPS = 10
GRADIENT = jnp.asarray([0.7, -1.3, 0.2], jnp.float32)
ALL = [
    Shrink(0.5),
    LearningRateShrinking(0.5),
    LearningRateDamping(0.5),
    LearningRateDamping(1.0, fade=7),
    WeightPrediction(),
    WeightPrediction("held"),
    LinearPrediction(),
    LinearPrediction("weights", 2.0),
    SpikeCompensation(),
    DelayCompensation(),
    SwitchToSynchronous(3),
]


def train(used, optimizer, tau, steps=STEPS):
    """The weights after each step of delayed descent by way of the hooks: (steps, 3)."""
    optimizer = corrections.correct_optimizer(used, optimizer, tau, 0, 3)

    @jax.jit
    def forward(params, state):
        return corrections.forward_weights(used, optimizer, params, state, tau)

    @jax.jit
    def answer(params, then, state):
        gradient = jnp.asarray(C, jnp.float32) * (then - jnp.asarray(TARGET, jnp.float32))
        gradient = corrections.correct_gradient(used, gradient, params, then)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(START, jnp.float32)
    state, flight, reached = optimizer.init(params), [], []
    for t in range(steps):
        flight.append(forward(params, state))
        if t >= tau:
            params, state = answer(params, flight[t - tau], state)
        reached.append(np.array(params))
    return np.stack(reached)


def by_hand(tau, m=0.9, decay=0.0, a=1.0, b=0.0, strength=0.0, rate=lambda n: RATE, predict=None, steps=STEPS):
    """The same with SGD and the equations as they are printed; predict(w, w before, v) are a forward's weights."""
    w = before = START.astype(float)
    v, flight, reached = np.zeros(3), [], []
    for t in range(steps):
        flight.append(predict(w, before, v) if predict else w)
        if t >= tau:
            then = flight[t - tau]
            g = C * (then - TARGET)
            d = g + strength * g * g * (w - then) + decay * w
            v = m * v + d
            before, w = w, w - rate(t - tau) * (a * v + b * d)
        reached.append(w)
    return np.stack(reached)


def assert_same_way(actual, expected):
    assert np.abs(expected - START).max() > 0.05  # it went somewhere
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6)


def spike(m, tau):
    return {"a": m**tau, "b": (1 - m**tau) / (1 - m)}


def warmed_up(optimizer, used=(), tau=0, gradients=None):
    """Optimizer, weights and state after a few steps, so that nothing is zero any more."""
    optimizer = corrections.correct_optimizer(used, optimizer, tau, 0, 3)
    params = jnp.asarray(START, jnp.float32)
    state = optimizer.init(params)
    for gradient in [0.5 * GRADIENT + 1, -GRADIENT, GRADIENT] if gradients is None else gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return optimizer, params, state


def go_on(optimizer, params, state, gradient, steps):
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


# What leaves everything as it is


@pytest.mark.parametrize("used", [*ALL, Correction()], ids=repr)
def test_without_delay_nothing_changes(used):
    plain = optim.sgd(RATE, 0.9, 0.1)
    if not isinstance(used, LearningRateShrinking):  # goes by stage, not by delay
        assert used.optimizer(plain, 0, 0, 3) is plain
    optimizer, params, state = warmed_up(plain, [used])
    assert_trees_close(jax.jit(partial(used.forward_weights, optimizer, tau=0))(params, state), params, 0)
    assert_trees_close(used.gradient(GRADIENT, params, params), GRADIENT, 0)


@pytest.mark.parametrize("used", [WeightPrediction(), WeightPrediction("held"), LinearPrediction()], ids=repr)
def test_the_first_forward_of_a_late_stage_is_not_predicted(used):
    """While the pipeline fills, tau is 0 for batch 0 although the stage's is 4, and known at run time only."""
    optimizer, params, state = warmed_up(optim.sgd(RATE, 0.9, 0.1), [used], tau=4)
    forward = jax.jit(partial(used.forward_weights, optimizer))
    assert_trees_close(forward(params, state, jnp.int32(0)), params, 0)
    assert np.abs(forward(params, state, jnp.int32(2)) - params).min() > 0
    assert_trees_close(forward(params, state, jnp.int32(4)), used.forward_weights(optimizer, params, state, 4))


# Spike compensation


@pytest.mark.parametrize("tau", [0, 1, 2, 5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_spike_compensation_is_its_equation(tau, decay):
    actual = train([SpikeCompensation()], optim.sgd(RATE, 0.9, decay), tau)
    assert_same_way(actual, by_hand(tau, 0.9, decay, **spike(0.9, tau)))


def test_spike_compensation_of_one_step_is_nesterov():
    """To the bit, weight decay included."""
    one, _, state = warmed_up(optim.sgd(RATE, 0.9, 0.1), [SpikeCompensation()], tau=1)
    other, params, expected = warmed_up(optim.sgd(RATE, 0.9, 0.1, nesterov=True))
    assert_trees_close(jax.tree.leaves(state), jax.tree.leaves(expected), 0)
    for gradient in (GRADIENT, -3 * GRADIENT):
        updates, state = jax.jit(one.update)(gradient, state, params)
        wanted, expected = jax.jit(other.update)(gradient, expected, params)
        assert_trees_close(updates, wanted, 0)


def test_spike_compensation_over_nesterov_is_one_step_more():
    actual = train([SpikeCompensation()], optim.sgd(RATE, 0.9, nesterov=True), 2)
    assert_same_way(actual, by_hand(2, 0.9, **spike(0.9, 3)))


@settings(max_examples=20, deadline=None)
@given(m=st.floats(0.0, 0.95), tau=st.integers(0, 6), later=st.integers(0, 4))
def test_a_late_gradient_catches_up(m, tau, later):
    """The property it is derived from: from its arrival on, it has moved as if it had not been late."""
    punctual = optim.sgd(1.0, m) if m else optax.chain(optax.trace(0.0), optax.scale(-1.0))
    late = SpikeCompensation().optimizer(punctual, tau, 0, 3)

    def moved(optimizer, steps):
        state, total = optimizer.init(jnp.zeros(1)), 0.0
        for n in range(steps):
            updates, state = optimizer.update(jnp.full(1, float(n == 0)), state, jnp.zeros(1))
            total -= float(updates[0])
        return total

    assert moved(late, later + 1) == pytest.approx(moved(punctual, tau + later + 1), rel=1e-5)


def test_spike_compensation_takes_the_rate_of_its_own_step():
    """Looking D steps ahead must not look up the learning rate there."""

    def rate(n):
        return RATE / (1 + n)

    assert_same_way(train([SpikeCompensation()], optim.sgd(rate), 3), by_hand(3, rate=rate, **spike(0.9, 3)))


# Prediction


@settings(max_examples=20, deadline=None)
@given(m=st.floats(0.1, 0.95), tau=st.integers(0, 6))
def test_prediction_with_sgd_is_the_geometric_sum(m, tau):
    """FTPipe: w - lr (m - m^{s+1}) / (1 - m) v, with v from its own recursion."""
    optimizer, params, state = warmed_up(optim.sgd(RATE, m))
    g = np.array(GRADIENT)
    v = m * (m * (0.5 * g + 1) - g) + g
    expected = np.array(params) - RATE * (m - m ** (tau + 1)) / (1 - m) * v
    actual = WeightPrediction().forward_weights(optimizer, params, state, tau)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("tau", [1, 4])
def test_training_with_prediction(decay, tau):
    def predict(w, _, v):
        for _ in range(tau):
            v = 0.9 * v + decay * w
            w = w - RATE * v
        return w

    assert_same_way(
        train([WeightPrediction()], optim.sgd(RATE, 0.9, decay), tau), by_hand(tau, 0.9, decay, predict=predict)
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(RATE, 0.9, 0.1),
        optim.sgd(lambda n: RATE / (1 + n), 0.9, nesterov=True),
        optax.adam(0.01),
        optax.adamw(0.01, weight_decay=0.1),
    ],
    ids=["sgd", "nesterov with a schedule", "adam", "adamw"],
)
def test_a_held_gradient_predicts_exactly_where_it_is_constant(optimizer):
    used = [WeightPrediction("held")]
    optimizer, params, state = warmed_up(optimizer, used, tau=3)
    reached = go_on(optimizer, params, state, GRADIENT, 3)
    predicted = corrections.forward_weights(used, optimizer, params, state, 3)
    assert_trees_close(predicted, reached)
    silent = WeightPrediction().forward_weights(optimizer, params, state, 3)
    assert np.abs(silent - reached).max() > 1e-3  # assuming no gradient is not exact here
    assert_trees_close(silent, go_on(optimizer, params, state, 0 * GRADIENT, 3))  # and is where there is none


@pytest.mark.parametrize("horizon", [1.0, 2.0])
@pytest.mark.parametrize("tau", [1, 3])
def test_linear_prediction_with_spike_compensation(tau, horizon):
    far = horizon * tau
    forms = {
        "velocity": lambda w, before, v: w - RATE * far * v,
        "weights": lambda w, before, v: w + far * (w - before),
    }
    ways = {}
    for form, predict in forms.items():
        used = [SpikeCompensation(), LinearPrediction(form, horizon)]
        ways[form] = by_hand(tau, predict=predict, **spike(0.9, tau))
        assert_same_way(train(used, optim.sgd(RATE), tau), ways[form])
        assert_same_way(train(used[::-1], optim.sgd(RATE), tau), ways[form])  # the order of the tuple does not matter
        assert_same_way(train(used[1:], optim.sgd(RATE), tau), by_hand(tau, predict=forms["velocity"]))
    assert np.abs(ways["velocity"] - ways["weights"]).max() > 1e-3


def test_linear_prediction_of_a_damped_step():
    """The velocity form takes the learning rate in use, which damping has made smaller."""
    used = [LinearPrediction(), LearningRateDamping()]
    expected = by_hand(3, rate=lambda n: 0.1 / 3, predict=lambda w, before, v: w - 0.1 / 3 * 3 * v)
    assert_same_way(train(used, optim.sgd(0.1), 3), expected)


@pytest.mark.parametrize(
    "nesterov", [Nesterov(0.9), Nesterov(0.9, build=partial(optax.nadam, 0.01))], ids=["own", "nadam"]
)
def test_a_held_gradient_goes_through_all_corrections(nesterov):
    """Nesterov's discount and damping act on it once in every predicted step; a new optimizer does not lose it."""
    used = [WeightPrediction("held"), LearningRateDamping(), nesterov]
    optimizer, params, state = warmed_up(optim.sgd(RATE, 0.0), used, tau=3)
    predicted = corrections.forward_weights(used, optimizer, params, state, 3)
    assert_trees_close(predicted, go_on(optimizer, params, state, GRADIENT, 3))


# Learning rates


@pytest.mark.parametrize("tau", [0, 1, 2, 5])
@pytest.mark.parametrize(("power", "fade"), [(1.0, None), (0.5, None), (1.0, 3), (0.5, 4)])
def test_damping(tau, power, fade):
    def faded(n):
        left = 1.0 if fade is None else 1 - min(n / fade, 1)
        return 0.1 / max(tau, 1) ** (power * left)

    assert_same_way(train([LearningRateDamping(power, fade)], optim.sgd(0.1), tau), by_hand(tau, rate=faded))


@pytest.mark.parametrize("tau", [2, 5, 9])
def test_damping_by_the_delay_keeps_any_rate_below_one_stable(tau):
    """Plain descent with eta c = 0.9 diverges from tau = 2 on, and eta / tau converges: see the docstring."""
    edge = 2 * np.sin(np.pi / (2 * (2 * tau + 1)))
    assert 0.9 / tau < edge < 0.9
    used, optimizer = LearningRateDamping(), optim.sgd(0.45, 0.0)  # the largest curvature is 2
    damped, plain = (np.abs(train(u, optimizer, tau, 120) - TARGET)[:, 2] for u in ([used], []))
    assert damped[-20:].max() < 0.1 * damped[0]
    assert plain[-20:].max() > 10 * plain[0]


def test_shrinking_the_rate_per_stage():
    """beta^(K-1-k) on all of the step, for an optimizer to which the gradient's scale is nothing."""
    steps = []
    for k in range(3):
        optimizer = LearningRateShrinking(0.5).optimizer(optax.adamw(0.1), 2, k, 3)
        updates, _ = optimizer.update(GRADIENT, optimizer.init(GRADIENT), GRADIENT)
        steps.append(np.array(updates))
    plain = optax.adamw(0.1)
    np.testing.assert_array_equal(steps[2], plain.update(GRADIENT, plain.init(GRADIENT), GRADIENT)[0])
    np.testing.assert_allclose(steps[0], 0.25 * steps[2], rtol=1e-6)
    np.testing.assert_allclose(steps[1], 0.5 * steps[2], rtol=1e-6)


# Gradients


def test_shrinking_per_stage_and_by_schedule():
    def factors(used, count):
        return [float(corrections.cotangent_factor(used, k, 3, count)) for k in range(3)]

    ramp = optax.linear_schedule(0.5, 1.0, 10)
    assert factors([], 0) == [1, 1, 1]
    assert factors([Shrink(0.5)], 0) == [0.5, 0.5, 1]
    assert factors([Shrink((0.25, 0.5))], 0) == [0.25, 0.5, 1]
    assert factors([Shrink(ramp)], jnp.int32(5)) == factors([Shrink(0.5, fade=10)], jnp.uint32(5)) == [0.75, 0.75, 1]
    assert factors([Shrink((0.25, 0.5), fade=4)], 1) == [0.4375, 0.625, 1]
    assert factors([Shrink(0.25, fade=4)], 9) == [1, 1, 1]
    assert factors([Shrink((0.5, ramp)), Shrink(0.5)], jnp.int32(20)) == [0.25, 0.5, 1]
    assert jax.jit(lambda n: corrections.cotangent_factor([Shrink(ramp)], 0, 3, n))(5) == 0.75
    assert isinstance(corrections.cotangent_factor([Shrink(ramp)], 2, 3, 0), float)


@pytest.mark.parametrize("tau", [0, 3])
def test_delay_compensation_is_its_equation(tau):
    assert_same_way(train([DelayCompensation(0.2)], optim.sgd(RATE), tau), by_hand(tau, strength=0.2))


@settings(max_examples=20, deadline=None)
@given(strength=st.floats(0.1, 1.0), w=st.floats(-1.0, 0.5), sign=st.sampled_from([-1, 1]))
def test_delay_compensation_is_exact_to_first_order(strength, w, sign):
    """Where f'' = lambda f'^2, for which f' = 1 / (2 - lambda w), half the distance leaves a quarter of the error."""

    def slope(w):
        return 1 / (2 - strength * w)

    def error(distance):
        now = w + sign * distance
        return abs(
            DelayCompensation(strength).gradient(slope(np.float64(w)), np.float64(now), np.float64(w)) - slope(now)
        )

    assert error(0.01) < 0.1 * abs(slope(w + sign * 0.01) - slope(w))  # the error of doing nothing
    assert error(0.005) == pytest.approx(error(0.01) / 4, rel=0.05)


# Nesterov


@pytest.mark.parametrize("tau", [0, 1, 4])
def test_nesterov_is_its_equation(tau):
    """The published recursion in w, which takes gradients in w + d; the stage holds w + d."""
    gamma, rate = 0.9, 0.3
    w = before = START.astype(float)
    points, expected = [], []
    for t in range(STEPS):
        ahead = w + gamma * (w - before)
        points.append(ahead)
        gradient = C * (points[t - tau] - TARGET) if t >= tau else 0.0
        before, w = w, ahead - rate * (1 - gamma) * gradient
        expected.append(w + gamma * (w - before))
    assert_same_way(train([Nesterov(gamma)], optim.sgd(rate, 0.0), tau), np.stack(expected))


def test_nesterov_with_discount_bears_a_delay():
    """tau = 1, eta c = 1.5: past the edge of plain descent, 1."""
    optimizer = optim.sgd(0.75, 0.0)
    used, plain = (np.abs(train(u, optimizer, 1, 120) - TARGET)[:, 2] for u in ([Nesterov(0.9)], []))
    assert used[-10:].max() < 0.1 * used[0]
    assert plain[-10:].max() > 1e3 * plain[0]


@pytest.mark.parametrize(("tau", "wider"), [(1, True), (2, True), (3, True), (5, False), (8, False)])
def test_on_a_quadratic_nesterov_allows_larger_rates_for_small_delays_only(tau, wider):
    """By the roots of its recursion with the largest rate that plain descent bears."""
    edge, gamma = 2 * np.sin(np.pi / (2 * (2 * tau + 1))), 0.95
    polynomial = np.zeros(tau + 3)
    polynomial[:3] = 1, -1 - gamma, gamma
    polynomial[-2:] += edge * (1 - gamma) * np.array([1 + gamma, -gamma])
    assert (np.abs(np.roots(polynomial)).max() < 1) == wider


def test_nesterovs_momentum_per_stage():
    """PipeDream's stages, tau = K-1-k, as published; those of FDG, up to 2 (K-1), never above the highest."""
    used = Nesterov(0.99, low=0.9)
    np.testing.assert_allclose([used.gamma(tau, 3) for tau in (2, 1, 0)], [0.96, 0.93, 0.9])
    assert [used.gamma(tau, 3) for tau in (4, 3)] == [0.99, 0.99]
    assert {Nesterov().gamma(tau, 3) for tau in range(5)} == {0.99}
    _, _, state = warmed_up(optim.sgd(RATE, 0.0), [used], 1, [GRADIENT, 0 * GRADIENT])
    trace = state[-1].trace
    assert_trees_close(trace, -RATE * (1 - 0.93) * 0.93 * GRADIENT)


@pytest.mark.parametrize(
    ("build", "given"),
    [(lambda gamma: optax.nadam(0.01, b1=gamma), optim.sgd(RATE)), (None, optim.nadamw(0.01))],
    ids=["build", "nadamw"],
)
def test_nesterov_builds_an_optimizer_of_its_momentum(build, given):
    used = Nesterov(0.99, low=0.9, build=build)
    for chosen in ([used, LearningRateDamping()], [LearningRateDamping(), used]):
        optimizer, params, state = warmed_up(given, chosen, tau=2)
        expected, _, wanted = warmed_up(optax.nadam(0.01, b1=0.96))
        updates, _ = optimizer.update(GRADIENT, state, params)
        full, _ = expected.update(GRADIENT, wanted, params)
        assert_trees_close(updates, 0.5 * full)


# What is refused


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.adam(1e-3), True),
        (optax.adamw(1e-3, weight_decay=0.1), True),
        (optax.lion(1e-3), True),
        (optax.rmsprop(1e-2, initial_scale=0.0), True),
        (optax.adam(optax.linear_schedule(0.0, 1e-3, 100)), True),
        (optax.adam(optax.cosine_decay_schedule(1e-3, 4)), True),
        (optim.sgd(optax.linear_schedule(0.0, 0.1, 100), 0.9), False),
        (optim.sgd(0.1, 0.9, 5e-4), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optim.sgd(0.1)), False),
        (optax.sgd(0.0), False),
        (optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(9, jnp.abs(x)), g)), False),
    ],
    ids=[
        "adam",
        "adamw",
        "lion",
        "rmsprop",
        "warm-up",
        "short cosine",
        "sgd's warm-up",
        "sgd",
        "clipped sgd",
        "stands still",
        "sign of all but huge",
    ],
)
def test_who_ignores_the_scale_of_gradients(optimizer, expected):
    assert corrections.scale_free(optimizer) == expected
    if expected:
        with pytest.raises(ValueError, match=r"use LearningRateShrinking \(learning_rate_shrinking in a config\)"):
            corrections.check([Shrink(0.5)], optimizer, "stash", 3)
    else:
        corrections.check_scale(optimizer)
    corrections.check([Shrink(1.0)], optimizer, "stash", 3)


@pytest.mark.parametrize(
    ("used", "optimizer", "policy", "words"),
    [
        ([Shrink((0.5,))], optim.sgd(0.1), "stash", "wants 2 factors for 3 stages"),
        ([Shrink(1.5)], optim.sgd(0.1), "stash", r"must lie in \[0, 1\]; got 1.5"),
        ([LearningRateShrinking(0.0)], optim.sgd(0.1), "stash", r"beta must lie in \(0, 1\]"),
        ([LearningRateDamping(-1.0)], optim.sgd(0.1), "stash", "power must not be negative"),
        ([LearningRateDamping(fade=0)], optim.sgd(0.1), "stash", "at least 1 update"),
        ([WeightPrediction("last")], optim.sgd(0.1), "stash", "unknown assumption of WeightPrediction 'last'"),
        ([LinearPrediction("speed")], optim.sgd(0.1), "stash", "unknown form of LinearPrediction 'speed'"),
        ([LinearPrediction(horizon=-1.0)], optim.sgd(0.1), "stash", "horizon must not be negative"),
        ([SpikeCompensation()], optax.adam(0.1), "stash", "keeps ScaleByAdamState; use optim.sgd .* or WeightP"),
        ([SpikeCompensation()], optim.sgd(0.1, 0.0), "stash", "keeps none; .* or WeightPrediction"),
        ([DelayCompensation()], optim.sgd(0.1), "current", "policy 'stash' keeps; got policy 'current'"),
        ([DelayCompensation(-1.0)], optim.sgd(0.1), "stash", "strength must not be negative"),
        ([Nesterov()], optim.sgd(0.1), "stash", r"one of its own; use one without \(config.optim.momentum=0\)"),
        ([Nesterov()], optax.adam(0.1), "stash", r"or optim.nadamw \(config.optim.name=nadamw\)"),
        ([Nesterov(0.9, low=0.95)], optim.sgd(0.1, 0.0), "stash", "0 <= low <= momentum < 1"),
        ([Shrink(0.5, fade=0)], optim.sgd(0.1), "stash", "fade must be at least 1 update, and factors numbers"),
        ([Shrink(abs, fade=3)], optim.sgd(0.1), "stash", r"got Shrink\(factors=abs, fade=3\)"),
        ([Shrink(0.5), Nesterov(build=optax.nadamw)], optim.sgd(0.1), "stash", "ScaleByAdamState.* ignores"),
        ([Shrink(0.5), Nesterov()], optim.nadamw(0.1), "stash", "ignores their scale"),
        ([SpikeCompensation(), Nesterov(build=optax.nadamw)], optim.sgd(0.1), "stash", "keeps ScaleByAdamState"),
        ([SwitchToSynchronous(-1)], optim.sgd(0.1), "stash", "after must not be negative"),
        ([WeightPrediction(), LinearPrediction()], optim.sgd(0.1), "stash", "keep one of WeightPrediction and Linear"),
        ([DelayCompensation(), DelayCompensation()], optim.sgd(0.1), "stash", "once; got DelayCompensation"),
        (
            [SpikeCompensation(), Nesterov(build=lambda gamma: optim.sgd(0.1, gamma))],
            optim.sgd(0.1),
            "stash",
            "keep one of them",
        ),
    ],
)
def test_what_is_refused_in_one_line(used, optimizer, policy, words):
    with pytest.raises(ValueError, match=words) as caught:
        corrections.check(used, optimizer, policy, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DelayCompensation("a"), r"strength of DelayCompensation \(delay_com.* cannot be 'a'"),
        (lambda: Shrink((0.5, "b")), r"factors of Shrink .* cannot be \(0.5, 'b'\)"),
        (lambda: SwitchToSynchronous(1.5), "after of SwitchToSynchronous .* cannot be 1.5"),
        (lambda: corrections.check([Nesterov(build=abs)], optim.sgd(0.1), "stash", 3), "build must return"),
        (lambda: methods.dni(learning_rate="x"), "must be a number and not negative; got 'x'"),
        (lambda: methods.fdg().with_corrections("shrink"), r"must be objects, as .*; got \('shrink',\)"),
        (lambda: methods.fdg().with_corrections(SpikeCompensation), "must be objects"),
        (lambda: methods.pipelined_bp(corrections=SpikeCompensation()), r"must be objects, .*; got Spike"),
    ],
)
def test_what_is_no_correction_gets_one_line(make, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_name_for_checkpoints_is_the_same_in_every_process():
    assert str(Shrink((0.5, np.sin, abs))) == "Shrink(factors=(0.5, sin, abs), fade=None)"
    assert " at 0x" not in str(Nesterov(build=lambda gamma: optax.sgd(gamma)))


def test_what_is_allowed():
    corrections.check([c for c in ALL if not c.predicts][:3], optim.sgd(0.1), "stash", 3)
    corrections.check([SpikeCompensation(), LinearPrediction()], optax.sgd(0.1, 0.9), "current", 3)
    corrections.check([Nesterov(low=0.9)], optax.adam(0.1, b1=0.0), "recompute", 3)
    corrections.check([Nesterov(build=optax.adam)], optax.adam(0.1), "recompute", 3)
    corrections.check([Nesterov(low=0.9)], optim.nadamw(0.1), "recompute", 3)
    corrections.check([Shrink(0.5), Nesterov(build=lambda gamma: optim.sgd(0.1, gamma))], optax.adam(0.1), "stash", 3)
    for_one_network = optax.masked(optax.trace(0.9), {"some": True})  # cannot be tried; its user knows
    corrections.check([SpikeCompensation(), Shrink(0.5)], for_one_network, "stash", 3)


@pytest.mark.parametrize("used", [*ALL, Nesterov(0.9)], ids=repr)
def test_half_precision_stays(used):
    optimizer = corrections.correct_optimizer([used], optim.sgd(RATE, 0.9), 3, 0, 3)
    params = jnp.asarray(START, jnp.bfloat16)
    state = optimizer.init(params)
    gradient = used.gradient(params, params, jnp.asarray(TARGET, jnp.bfloat16))
    updates, after = jax.jit(optimizer.update)(gradient, state, params)
    ahead = [used.forward_weights(optimizer, params, after, tau) for tau in (3, jnp.int32(3))]
    assert {leaf.dtype for leaf in (gradient, updates, *ahead)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)


def test_each_correction_has_a_name():
    """And can be told from others, and used as a static argument."""
    assert {type(used) for used in ALL} | {Nesterov} == set(CORRECTIONS.values())
    assert len({*ALL, *ALL}) == len(ALL)
