"""From stored pixels to what a network sees: random crop and flip, then normalisation."""

import jax
import jax.numpy as jnp


def crop_and_flip(images: jax.Array, index: jax.Array, key: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Images `index` (B,) of `images` (N, H, W, C), each shifted by up to `padding` pixels and mirrored or not.

    As a crop of H x W from the image with `padding` zeros around it, uniform over the (2 padding + 1)^2 places, and a
    mirroring from left to right for one image in two. What is random is a function of the key. One gather does it all.
    """
    height, width = images.shape[1:3]
    key_shift, key_flip = jax.random.split(key)
    shift = jax.random.randint(key_shift, (2, len(index), 1), -padding, padding + 1)
    rows, columns = jnp.arange(height), jnp.arange(width)
    if flip:
        mirrored = jax.random.bernoulli(key_flip, shape=(len(index), 1))
        columns = jnp.where(mirrored, columns[::-1], columns)
    rows, columns = rows + shift[0], columns + shift[1]
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    pixels = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return jnp.where(inside[..., None], pixels, 0)


def _within(places: jax.Array, size: int) -> jax.Array:
    return (places >= 0) & (places < size)


def normalise(pixels: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(pixels - mean) / std, per channel, in float32."""
    return (pixels.astype(jnp.float32) - mean) / std
