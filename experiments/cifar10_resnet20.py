"""ResNet-20 on CIFAR-10 with FDG over two devices.

    python -m fdg_jax.main --config experiments/cifar10_resnet20.py
    python -m fdg_jax.main --config experiments/cifar10_resnet20.py:smoke

Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients" (arXiv 1906.09108).
Expected (Table 2 and Figure 4(a)): FDG 7.23 % (beta 0.2), 7.92 % (beta 1); BP* 7.78 %.
Test error at the last epoch, median of three seeds; BP* was trained by the authors with this recipe.
The bars of Figure 4(a) are this run with other values of --config.method.beta; BP is
--config.method.name=bp --config.method.beta=1.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"

    config.model.name = "resnet_cifar"
    config.model.depth = 20
    config.model.width = 16

    config.data.source = "tfds"
    config.data.name = "cifar10"

    config.method.name = "fdg"
    config.method.beta = 0.2
    return varied(config, variants)
