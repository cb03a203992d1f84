"""Networks as lists of layers, and a way to build them by name."""

from collections.abc import Callable, Sequence

from flax import nnx

from fdg_jax.models.mlp import mlp
from fdg_jax.models.resnet_cifar import resnet_cifar
from fdg_jax.names import check_name

__all__ = ["MODELS", "build", "mlp", "resnet_cifar"]

MODELS: dict[str, Callable[..., Sequence[Callable]]] = {"mlp": mlp, "resnet_cifar": resnet_cifar}


def build(
    name: str, *, seed: int, depth: int, width: int, num_classes: int, in_shape: Sequence[int], dtype: str
) -> Sequence[Callable]:
    """The layers of the network called `name`, initialised from `seed`; see the network's own function.

    Raises:
        ValueError: there is no such network, or not of this depth.
    """
    check_name("model", name, MODELS)
    rngs = nnx.Rngs(seed)
    return MODELS[name](depth, rngs=rngs, width=width, num_classes=num_classes, in_shape=in_shape, dtype=dtype)
