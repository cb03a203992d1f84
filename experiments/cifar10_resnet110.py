"""ResNet-110 on CIFAR-10 with FDG over two devices.

    python -m fdg_jax.main --config experiments/cifar10_resnet110.py
    python -m fdg_jax.main --config experiments/cifar10_resnet110.py:smoke

Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients" (arXiv 1906.09108).
Expected (Table 2): FDG 5.73 % (beta 0.5), 5.79 % (beta 1); BP* 5.79 %.
Test error at the last epoch, median of three seeds; BP* was trained by the authors with this recipe.
The rate is 0.01 for the first three epochs.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"

    config.model.name = "resnet_cifar"
    config.model.depth = 110
    config.model.width = 16

    config.data.source = "tfds"
    config.data.name = "cifar10"

    config.method.name = "fdg"
    config.method.beta = 0.5
    config.optim.warmup_epochs = 3
    return varied(config, variants)
