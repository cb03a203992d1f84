"""FDG with two stages on 1,797 scanned digits: a small residual network that trains in seconds on two CPU cores.

    python -m fdg_jax.main --config experiments/digits.py

Expected: test accuracy about 99 % (98.9 to 99.7 % over five seeds), training done within 15 s.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.epochs = 20
    config.batch_size = 64
    config.log_every_steps = 22

    config.model.name = "resnet_cifar"
    config.model.depth = 8

    config.data.source = "digits"
    config.data.crop_padding = 1
    config.data.flip = False

    config.method.name = "fdg"
    config.method.beta = 0.5

    config.optim.learning_rate = 0.1
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "cosine"
    return varied(config, variants)
