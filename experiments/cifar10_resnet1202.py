"""ResNet-1202 on CIFAR-10 with FDG over two devices.

    python -m fdg_jax.main --config experiments/cifar10_resnet1202.py
    python -m fdg_jax.main --config experiments/cifar10_resnet1202.py:smoke

Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients" (arXiv 1906.09108).
Expected (the table of the authors' repository): FDG 5.49 % (beta 0.7), 5.50 % (beta 1); BP* 5.53 %.
Test error at the last epoch, median of three seeds; BP* was trained by the authors with this recipe.
(That row is labelled WRN-28-10 with 19.4 M parameters; text and count are ResNet-1202's.)
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"

    config.model.name = "resnet_cifar"
    config.model.depth = 1202
    config.model.width = 16

    config.data.source = "tfds"
    config.data.name = "cifar10"

    config.method.name = "fdg"
    config.method.beta = 0.7
    return varied(config, variants)
