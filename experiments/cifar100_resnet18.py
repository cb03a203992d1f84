"""ResNet-18 on CIFAR-100 with FDG over two devices.

    python -m fdg_jax.main --config experiments/cifar100_resnet18.py
    python -m fdg_jax.main --config experiments/cifar100_resnet18.py:smoke

Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients" (arXiv 1906.09108).
Expected (Table 3): FDG 22.18 % (beta 0.5), 22.78 % (beta 1); BP* 22.35 %.
Test error at the last epoch, median of three seeds; BP* was trained by the authors with this recipe.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"

    config.model.name = "resnet"
    config.model.depth = 18
    config.model.width = 64

    config.data.source = "tfds"
    config.data.name = "cifar100"

    config.method.name = "fdg"
    config.method.beta = 0.5
    return varied(config, variants)
