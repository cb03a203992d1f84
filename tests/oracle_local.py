"""Training by local losses, tick by tick, transcribed from the papers: plain loops, nothing of the library.

The stages are `oracle.Module`s (policy "stash": forward and backward meet the same weights anyway). What is added to a
stage is a plain function of its parameters, a dict of dicts named as the library names them; their running statistics
are not followed, for nothing reads them.
"""

from collections import deque
from itertools import count
from math import ceil, floor

import jax
import jax.numpy as jnp
import optax
from oracle import cross_entropy, linear, norm, relu


def mean_square_error(outputs, wanted):
    """Half the squared error, summed over features, averaged over examples."""
    return ((outputs - wanted) ** 2).sum() / (2 * len(outputs))


class Added:
    """A head or a synthesiser: a function, its parameters, its optimizer."""

    def __init__(self, function, params, optimizer):
        self.function, self.params, self.optimizer = function, params, optimizer
        self.opt_state = optimizer.init(params)

    def update(self, gradients):
        updates, self.opt_state = self.optimizer.update(gradients, self.opt_state, self.params)
        self.params = optax.apply_updates(self.params, updates)


def dgl(modules, heads, batches, loss=cross_entropy):
    """Decoupled greedy learning in lock-step; heads are `Added`, of all modules but the last.

    Yields the losses of every tick, one a module, None where it has no batch; changes modules and heads.
    """
    last = len(modules) - 1
    arrived = [None] * (last + 1)  # (activation, labels) for module k
    for tick in range(len(batches) + last):
        arrived[0] = batches[tick] if tick < len(batches) else None
        sent, losses = [None] * (last + 1), [None] * (last + 1)
        for k, module in enumerate(modules):
            if arrived[k] is None:
                continue
            losses[k], message = greedy_step(module, heads[k] if k < last else None, *arrived[k], loss)
            if k < last:
                sent[k + 1] = message
        arrived = sent
        yield losses


def greedy_step(module, head, x, labels, loss):
    """A module's own step, without a head the last one's: the loss, and what it sends on."""
    h = module.forward(x)
    if head is None:
        value, dh = jax.value_and_grad(loss)(h, labels)
    else:
        value, (dphi, dh) = jax.value_and_grad(lambda phi, h: loss(head.function(phi, h), labels), (0, 1))(
            head.params, h
        )
        head.update(dphi)
    module.answer(dh, judged=value)
    return value, (h, labels)


def asynchronous_dgl(modules, heads, batches, slowdown, size, max_uses=None, loss=cross_entropy):
    """Decoupled greedy learning with buffers (Algorithm 2), whose modules have their turns in a fixed pattern.

    After the last batch the others go on until every message that is left has been used. Yields the losses of every
    tick, one a module, None where it does nothing; changes modules and heads.
    """
    last = len(modules) - 1
    buffers = [[] for _ in modules]  # lists [uses, activation, labels], the newest at the end
    posted, fresh = [], deque(batches)
    for tick in count():
        for reader, message in posted:
            buffers[reader] = [*buffers[reader], [0, *message]][-size:]
        posted, losses, ended = [], [None] * (last + 1), tick >= len(batches) * slowdown[0]
        if ended and all(uses for buffer in buffers for uses, *_ in buffer):
            return
        for k, module in enumerate(modules):
            if tick < k or (tick - k) % slowdown[k] or (k == 0 and ended):
                continue
            if k == 0:
                x, labels = fresh.popleft()
            else:
                most = 1 if ended else max_uses or tick + 1
                if not (usable := [entry for entry in buffers[k] if entry[0] < most]):
                    continue
                fewest = min(uses for uses, *_ in usable)
                entry = [entry for entry in usable if entry[0] == fewest][-1]
                entry[0] += 1
                _, x, labels = entry
            losses[k], message = greedy_step(module, heads[k] if k < last else None, x, labels, loss)
            if k < last:
                posted.append((k + 1, message))
        yield losses


def dni(modules, synthesisers, batches, loss=cross_entropy):
    """Synthetic gradients; synthesisers are `Added` with functions (phi, h, labels), of all modules but the last.

    Module k trains on batch i in tick i + k by the estimate, and its synthesiser in tick i + k + 2, before anything
    else happens there, by the error gradient that module k+1 found in tick i + k + 1. Yields after every tick the last
    module's loss, None where it has no batch; changes modules and synthesisers.
    """
    last = len(modules) - 1
    arrived = [None] * (last + 1)
    returned = [None] * (last + 1)  # the error gradient that module k+1 sent to module k
    waiting = [[] for _ in modules]  # (h, labels) whose error gradient is to come
    for tick in range(len(batches) + last + 1):
        arrived[0] = batches[tick] if tick < len(batches) else None
        sent, sent_back, value = [None] * (last + 1), [None] * (last + 1), None
        for k, module in enumerate(modules):
            if k < last and returned[k] is not None:
                learn(synthesisers[k], *waiting[k].pop(0), returned[k])
            if arrived[k] is None:
                continue
            x, labels = arrived[k]
            h = module.forward(x)
            if k == last:
                value, e = jax.value_and_grad(loss)(h, labels)
            else:
                e = synthesisers[k].function(synthesisers[k].params, h, labels)
                waiting[k].append((h, labels))
                sent[k + 1] = (h, labels)
            d = module.answer(e, judged=e)
            if k > 0:
                sent_back[k - 1] = d
        arrived, returned = sent, sent_back
        yield value


def learn(synthesiser, h, labels, target):
    def error(phi):
        return ((synthesiser.function(phi, h, labels) - target) ** 2).mean()

    synthesiser.update(jax.grad(error)(synthesiser.params))


def linear_head(phi, h):
    """Mean over the map where there is one, and a linear layer."""
    if h.ndim == 4:
        return linear(phi["linear"], h.mean((1, 2)))
    return linear(phi, h)


def mlp_sr_head(phi, h):
    """Three 1x1 convolutions on a quarter of the map, three wide layers on 2 x 2 of it; on flat features the latter."""
    steps = [phi["layers"][number] for number in sorted(phi["layers"])]
    if h.ndim == 4:
        h = rectangles(h, ceil(h.shape[1] / 4), ceil(h.shape[2] / 4))
        for step in steps[:3]:
            h = relu(None, norm(step["norm"], h @ step["layer"]["kernel"][0, 0]))
        h = rectangles(h, 2, 2).reshape(len(h), -1)
        steps = steps[3:]
    for step in steps[:3]:
        h = relu(None, norm(step["norm"], linear(step["layer"], h)))
    return linear(steps[3], h)


def rectangles(x, rows, columns):
    """Adaptive average pooling, one output pixel at a time."""

    def bounds(i, size, length):
        return slice(floor(i * length / size), ceil((i + 1) * length / size))

    height, width = x.shape[1:3]
    pixels = [
        [x[:, bounds(i, rows, height), bounds(j, columns, width)].mean((1, 2)) for j in range(columns)]
        for i in range(rows)
    ]
    return jnp.stack([jnp.stack(line, 1) for line in pixels], 1)


def linear_synthesiser(phi, h, labels):
    return linear(phi["last"], h) + context(phi, labels, h.ndim)


def deep_synthesiser(phi, h, labels):
    step = same_conv if h.ndim == 4 else linear
    x = step(phi["first"], h) + context(phi, labels, h.ndim)
    x = relu(None, norm(phi["norm"], x))
    x = relu(None, norm(phi["second"]["norm"], step(phi["second"]["layer"], x)))
    return step(phi["last"], x)


def same_conv(p, x):
    return jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def context(phi, labels, rank):
    if "context" not in phi:
        return 0.0
    if labels.ndim == 1:
        labels = jnp.eye(len(phi["context"]["linear"]["kernel"]))[labels]
    added = linear(phi["context"]["linear"], labels)
    return added[:, None, None] if rank == 4 else added
