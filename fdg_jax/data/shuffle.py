"""A random order of any length without making it: where place p of an epoch points, for the places that are wanted.

Sorting 50,000 random numbers in every tick, or keeping the order of an epoch somewhere, would make a batch depend on
more than (seed, i). A permutation that can be evaluated at a point does not: rounds of a Feistel network permute the
numbers of an even number of bits, whatever the round function is, and walking on until a number falls inside
0 .. size - 1 keeps it a permutation (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

import jax
import jax.numpy as jnp
from jax import lax

ROUNDS = 6
LEAST_BITS = 4  # of half a number: in smaller domains the orders would not be equally likely


def shuffled(seed: jax.Array | int, epoch: jax.Array | int, places: jax.Array, size: int) -> jax.Array:
    """The members of 0 .. size - 1 at the given places of an epoch's order. Jittable; `size` is static.

    Args:
        seed, epoch: whole numbers; each pair has an order of its own.
        places: (...) numbers in 0 .. size - 1; all of them together give each member once.
        size: of the set, at most 2^31.

    Returns:
        (...) uint32.
    """
    half = max(LEAST_BITS, ((size - 1).bit_length() + 1) // 2)
    mask = jnp.uint32(2**half - 1)
    base = _mix(jnp.uint32(seed) * jnp.uint32(0x9E3779B9) ^ _mix(jnp.uint32(epoch) + jnp.uint32(0x85EBCA6B)))
    keys = [_mix(base + jnp.uint32(round_ + 1)) for round_ in range(ROUNDS)]

    def permute(x):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << half | right

    def walk(x):
        return jnp.where(x < size, x, permute(x))

    # But for tiny sets the domain is at most four times the set, so that a few steps are enough.
    return lax.while_loop(lambda x: jnp.any(x >= size), walk, permute(places.astype(jnp.uint32)))


def _mix(x: jax.Array) -> jax.Array:
    """A hash of 32 bits in which each bit of the input moves about half of the output's (murmur3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
