import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from fdg_jax import optim

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
GRADIENTS = [jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32) for _ in range(5)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_papers(momentum, weight_decay, nesterov):
    """PyTorch's rule: d = g + wd w; v = m v + d; w = w - lr v, or lr (d + m v) with Nesterov."""
    optimizer = optim.sgd(0.1, momentum, weight_decay, nesterov)
    params, state = W, optimizer.init(W)
    w, v = np.array(W), np.zeros_like(W)
    for g in GRADIENTS:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        d = np.array(g) + weight_decay * w
        v = momentum * v + d
        w = w - 0.1 * (d + momentum * v if nesterov else v)
        assert_trees_close(np.array(params), w)


def test_a_rate_in_pieces():
    """FDG's recipe in little: warm-up at a tenth, then a tenth at each boundary."""
    rate = optim.piecewise(0.1, boundaries=[4, 6], warmup_steps=2)
    rates = [float(rate(jnp.int32(i))) for i in range(8)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    np.testing.assert_allclose([float(optim.piecewise(0.3, [])(jnp.int32(i))) for i in (0, 99)], 0.3, rtol=1e-6)


def test_a_cosine_rate():
    rate = optim.cosine(0.2, num_steps=10)
    np.testing.assert_allclose(
        [float(rate(i)) for i in range(11)], [0.1 * (1 + np.cos(np.pi * i / 10)) for i in range(11)], atol=1e-7
    )
    warm = optim.cosine(0.2, num_steps=10, warmup_steps=4)
    np.testing.assert_allclose([float(warm(i)) for i in range(5)], [0, 0.05, 0.1, 0.15, 0.2], atol=1e-7)
    assert float(warm(10)) == pytest.approx(0, abs=1e-7)


def test_rates_are_usable_inside_jit():
    for rate in (optim.piecewise(0.1, [3]), optim.cosine(0.1, 5)):
        optimizer = optim.sgd(rate)
        state = optimizer.init(W)
        update = jax.jit(optimizer.update)
        for g in GRADIENTS:
            _, state = update(g, state, W)
        assert update._cache_size() == 1
