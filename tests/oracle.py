"""Algorithm 1 of the FDG text, transcribed word for word: plain loops, lists as queues, one `jax.vjp` at a time.

Slow, and on purpose without a line of the library. A network is a list of layers, a layer a list of steps
`(operation, name of its parameters, numbers of its operands)`; value 0 is the layer's input, step n makes value n + 1.

The three policies are the three places at which a vjp can be taken:

* stash: the module as a function, at the weights and the input of the forward;
* recompute: the module as a function, at today's weights and the input of the forward;
* current: every operation by itself, at today's weights and at the operands that it had in the forward.
"""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

EPSILON = 1e-5


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, strides=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    around = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, p["kernel"], (strides, strides), around, dimension_numbers=dimensions)


def norm(p, x):
    mean, var = moments(x)
    return (x - mean) / jnp.sqrt(var + EPSILON) * p["scale"] + p["bias"]


def moments(x):
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), ((x - x.mean(axes)) ** 2).mean(axes)


def relu(p, x):
    return jnp.where(x <= 0, 0.0, x)


def add(p, x, y):
    return x + y


def pad_shortcut(p, x, channels):
    new = channels - x.shape[-1]
    return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


def pool(p, x):
    return x.mean((1, 2))


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def pick(params, name):
    """The parameters called `name`: a key of the layer's, "" for all of them, None for none."""
    if name is None:
        return {}
    return params[name] if name else params


@partial(jax.jit, static_argnums=0)
def call(operation, p, *operands):
    return operation(p, *operands)


@partial(jax.jit, static_argnums=0)
def pull(operation, p, operands, cotangent):
    return jax.vjp(lambda p, operands: operation(p, *operands), p, operands)[1](cotangent)


def run_layer(steps, params, x):
    values = [x]
    for operation, name, operands in steps:
        values.append(call(operation, pick(params, name), *[values[i] for i in operands]))
    return values


def run_module(layers, params, x):
    """All values of all layers; the last of the last is the module's output."""
    values = []
    for steps, p in zip(layers, params, strict=True):
        values.append(run_layer(steps, p, x))
        x = values[-1][-1]
    return values


def pull_by_operation(layers, params, values, cotangent):
    """The backward of a module through each operation by itself, with these weights and these values."""
    gradients = jax.tree.map(jnp.zeros_like, params)
    for number in reversed(range(len(layers))):
        cotangents = [jnp.zeros_like(value) for value in values[number]]
        cotangents[-1] = cotangent
        for n in reversed(range(len(layers[number]))):
            operation, name, operands = layers[number][n]
            inputs = [values[number][i] for i in operands]
            dp, dx = pull(operation, pick(params[number], name), inputs, cotangents[n + 1])
            accumulate(gradients[number], name, dp)
            for i, d in zip(operands, dx, strict=True):
                cotangents[i] = cotangents[i] + d
        cotangent = cotangents[0]
    return gradients, cotangent


def accumulate(gradients, name, dp):
    target = pick(gradients, name)
    for key, value in dp.items():
        target[key] = target[key] + value


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


class Module:
    """Module k of the paper with its weights, its optimizer and what it remembers."""

    def __init__(self, layers, params, optimizer, policy, skip=False):
        self.layers, self.params, self.optimizer, self.policy, self.skip = layers, params, optimizer, policy, skip
        self.opt_state = optimizer.init(params)
        self.remembered = deque()
        self.statistics = [{} for _ in layers]
        self.momentum = 0.9

    def forward(self, x):
        values = run_module(self.layers, self.params, x)
        self.remembered.append((self.params, x, values))
        statistics = self.moved_statistics(values)
        if finite(statistics) or not self.skip:
            self.statistics = statistics
        return values[-1][-1]

    def answer(self, cotangent, judged):
        """Backward and update; with `skip`, no update where what is judged is not finite, and NaN goes on."""
        gradients, sent = self.backward(cotangent)
        if self.skip and not finite((judged, gradients)):
            return jnp.full_like(sent, jnp.nan)
        self.update(gradients)
        return sent

    def backward(self, cotangent):
        params, x, values = self.remembered.popleft()
        if self.policy == "current":
            return pull_by_operation(self.layers, self.params, values, cotangent)
        weights = params if self.policy == "stash" else self.params
        _, pull_module = jax.vjp(lambda p, x: run_module(self.layers, p, x)[-1][-1], weights, x)
        return pull_module(cotangent)

    def update(self, gradients):
        updates, self.opt_state = self.optimizer.update(gradients, self.opt_state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def moved_statistics(self, values):
        moved = [dict(statistics) for statistics in self.statistics]
        for steps, of_layer, statistics in zip(self.layers, values, moved, strict=True):
            for operation, name, (first, *_) in steps:
                if operation is norm:
                    mean, var = moments(of_layer[first])
                    old = statistics.get(name, (jnp.zeros_like(mean), jnp.ones_like(var)))
                    statistics[name] = tuple(
                        self.momentum * a + (1 - self.momentum) * b for a, b in zip(old, (mean, var), strict=True)
                    )
        return moved


def fdg(modules, batches, beta, order="update_first"):
    """Algorithm 1. Yields the loss of every tick, None where the last module has no batch; changes the modules."""
    last = len(modules) - 1
    activations = [None] * (last + 1)  # what module k reads in this tick
    error_gradients = [None] * (last + 1)
    labels = deque()
    for tick in range(len(batches) + 2 * last):
        batch = batches[tick] if tick < len(batches) else None
        if batch is not None:
            activations[0] = batch[0]
            labels.append(batch[1])
        sent_down, sent_up, loss = [None] * (last + 1), [None] * (last + 1), None

        for k in range(last):
            if order == "forward_first" and activations[k] is not None:
                sent_down[k] = modules[k].forward(activations[k])
            if error_gradients[k] is not None:
                sent_up[k] = modules[k].answer(beta * error_gradients[k], judged=error_gradients[k])
            if order == "update_first" and activations[k] is not None:
                sent_down[k] = modules[k].forward(activations[k])

        if activations[last] is not None:
            module = modules[last]
            logits = module.forward(activations[last])
            loss, pull_loss = jax.vjp(partial(cross_entropy, labels=labels.popleft()), logits)
            sent_up[last] = module.answer(*pull_loss(jnp.ones_like(loss)), judged=loss)

        activations = [None, *sent_down[:last]]
        error_gradients = [*sent_up[1:], None]
        yield loss


def linear_layer():
    return [(linear, "", (0,))]


def hidden_layer():
    return [(linear, "linear", (0,)), (relu, None, (1,))]


def residual_layer():
    return [(norm, "norm", (0,)), (linear, "linear", (1,)), (relu, None, (2,)), (add, None, (3, 0))]


def stem_layer():
    return [(conv, "conv", (0,)), (norm, "norm", (1,)), (relu, None, (2,))]


def halving_conv(p, x):
    return conv(p, x, strides=2)


def block_layer(channels=None):
    """A basic block; with `channels` it halves the map and widens to them."""
    first = halving_conv if channels else conv
    steps = [
        (first, "conv1", (0,)),
        (norm, "norm1", (1,)),
        (relu, None, (2,)),
        (conv, "conv2", (3,)),
        (norm, "norm2", (4,)),
    ]
    if channels is None:
        return [*steps, (add, None, (5, 0)), (relu, None, (6,))]
    shortcut = SHORTCUTS.setdefault(channels, partial(pad_shortcut, channels=channels))
    return [*steps, (shortcut, None, (0,)), (add, None, (5, 6)), (relu, None, (7,))]


SHORTCUTS: dict = {}


def head_layer():
    return [(pool, None, (0,)), (linear, "linear", (1,))]
