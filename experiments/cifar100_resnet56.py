"""ResNet-56 on CIFAR-100 with FDG over two devices.

    python -m fdg_jax.main --config experiments/cifar100_resnet56.py
    python -m fdg_jax.main --config experiments/cifar100_resnet56.py:smoke

Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients" (arXiv 1906.09108).
Expected (Table 3): FDG 27.70 % (beta 0.8), 27.87 % (beta 1); BP* 27.68 %.
Test error at the last epoch, median of three seeds; BP* was trained by the authors with this recipe.
(The authors' repository has 27.49 % at beta 0.4.)
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"

    config.model.name = "resnet_cifar"
    config.model.depth = 56
    config.model.width = 16

    config.data.source = "tfds"
    config.data.name = "cifar100"

    config.method.name = "fdg"
    config.method.beta = 0.8
    return varied(config, variants)
