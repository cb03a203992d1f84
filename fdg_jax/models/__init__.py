"""Networks as lists of layers, and a way to build them by name."""

import inspect
from collections.abc import Callable, Sequence

from flax import nnx

from fdg_jax.models.cuts import published_cuts
from fdg_jax.models.mlp import mlp
from fdg_jax.models.resnet import resnet
from fdg_jax.models.resnet_cifar import resnet_cifar
from fdg_jax.models.wrn import wrn
from fdg_jax.names import check_name

__all__ = ["MODELS", "abstract", "build", "mlp", "published_cuts", "resnet", "resnet_cifar", "wrn"]

MODELS: dict[str, Callable[..., Sequence[Callable]]] = {
    "mlp": mlp,
    "resnet_cifar": resnet_cifar,
    "resnet": resnet,
    "wrn": wrn,
}


def build(
    name: str,
    *,
    seed: int,
    depth: int,
    width: int,
    num_classes: int,
    in_shape: Sequence[int],
    dtype: str,
    init: str = "he",
    stem: str = "cifar",
    pool_window: int = 0,
) -> Sequence[Callable]:
    """The layers of the network called `name`, initialised from `seed`; see the network's own function.

    Raises:
        ValueError: there is no such network, or not of this depth, or it has no such option.
    """
    check_name("model", name, MODELS)
    return MODELS[name](
        depth,
        rngs=nnx.Rngs(seed),
        width=width,
        num_classes=num_classes,
        in_shape=in_shape,
        dtype=dtype,
        init=init,
        **_options(name, stem=(stem, "cifar"), pool_window=(pool_window, 0)),
    )


def abstract(make: Callable[[], Sequence[Callable]]) -> Sequence[Callable]:
    """The layers that `make` would make, modules with shapes for parameters: nothing is computed or held."""
    layers: list[Callable] = []

    def modules() -> list[nnx.Module]:
        layers.extend(make())
        return [layer for layer in layers if isinstance(layer, nnx.Module)]

    shapes = iter(nnx.eval_shape(modules))
    return [next(shapes) if isinstance(layer, nnx.Module) else layer for layer in layers]


def _options(name: str, **given: tuple[object, object]) -> dict[str, object]:
    """Of (value, default) of every option the values that the network takes; others must be at their default."""
    accepted = inspect.signature(MODELS[name]).parameters
    for option, (value, default) in given.items():
        if option not in accepted and value != default:
            owners = [owner for owner, model in MODELS.items() if option in inspect.signature(model).parameters]
            raise ValueError(
                f"{option} is an option of {', '.join(owners)}, not of {name}: leave it at {default!r}; got {value!r}"
            )
    return {option: value for option, (value, _) in given.items() if option in accepted}
