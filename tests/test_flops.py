"""Operations counted from the program, against those counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import tiny_mlp

from fdg_jax.flops import layer_flops, shares, stage_flops
from fdg_jax.stage import as_layers


def test_matrix_products_are_two_operations_a_weight_and_row():
    rngs = nnx.Rngs(0)
    layers = as_layers([nnx.Linear(6, 5, use_bias=False, rngs=rngs), nnx.Linear(5, 3, use_bias=False, rngs=rngs)])
    assert layer_flops(layers, jax.ShapeDtypeStruct((4, 6), jnp.float32)) == [2 * 4 * 6 * 5, 2 * 4 * 5 * 3]


def test_convolutions_are_two_operations_a_weight_and_pixel():
    layers = as_layers([nnx.Conv(3, 4, (3, 3), padding="VALID", use_bias=False, rngs=nnx.Rngs(0))])
    assert layer_flops(layers, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)) == [2 * 9 * 3 * 4 * 2 * 6 * 6]


def test_equal_layers_count_alike_and_are_traced_once():
    """So that what a deep network costs before it begins does not grow with its depth."""
    traced = []

    def watched(layer):
        return dataclasses.replace(layer, apply=lambda *args, **kw: traced.append(layer) or layer.apply(*args, **kw))

    layers = [watched(layer) for layer in as_layers(tiny_mlp(4))]
    counted = layer_flops(layers, jax.ShapeDtypeStruct((4, 6), jnp.float32))
    assert counted[1] == counted[2] == counted[3] != counted[0]
    assert len(counted) == 5
    assert len({id(layer) for layer in traced}) == 3


def test_the_first_layer_needs_no_gradient_of_its_inputs_and_a_late_forward_is_counted():
    assert stage_flops([1.0, 2.0, 3.0, 4.0], (0, 2, 4), [False, False]) == [3 * 3 - 1, 3 * 7]
    assert stage_flops([1.0, 2.0, 3.0, 4.0], (0, 2, 4), [True, False]) == [4 * 3 - 1, 3 * 7]


def test_shares_are_of_the_slowest():
    assert shares([1.0, 4.0, 2.0]) == [0.25, 1.0, 0.5]
    assert shares([0.0, 0.0]) == shares([]) == []
