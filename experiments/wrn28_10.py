"""WRN-28-10 on CIFAR-10, or with `:cifar100` on CIFAR-100, with FDG over two devices.

    python -m fdg_jax.main --config experiments/wrn28_10.py
    python -m fdg_jax.main --config experiments/wrn28_10.py:cifar100
    python -m fdg_jax.main --config experiments/wrn28_10.py:smoke

Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients" (arXiv 1906.09108).
Expected (Table 2): FDG 3.85 % (beta 0.7), 4.13 % (beta 1); BP 4.00 % as published, 4.01 % in the authors' repository.
Expected (Table 3): FDG 19.08 % (beta 0.6), 20.28 % (beta 1); BP 19.2 % as published, 19.6 % in the authors' repository.
Test error at the last epoch, median of three seeds.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"

    config.model.name = "wrn"
    config.model.depth = 28
    config.model.width = 10

    config.data.source = "tfds"
    config.data.name = "cifar10"

    config.method.name = "fdg"
    config.method.beta = 0.7
    return varied(config, variants, cifar100=cifar100)


def cifar100(config: ConfigDict) -> None:
    config.data.name = "cifar100"
    config.method.beta = 0.6
