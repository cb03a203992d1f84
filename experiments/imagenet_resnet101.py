"""ResNet-101 on ImageNet with FDG over two devices.

    python -m fdg_jax.main --config experiments/imagenet_resnet101.py
    python -m fdg_jax.main --config experiments/imagenet_resnet101.py:smoke

Expected: nothing is published of FDG on ImageNet. The recipe is the usual one: 90 epochs, a tenth of the rate at 30, 60
and 80, batches of 256, three epochs of warm-up; the weight decay of 1e-4 is here on everything. TFDS cannot fetch
ImageNet by itself: it wants the archives of image-net.org, and TensorFlow to prepare them; the command says how when it
finds nothing.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, varied


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.num_stages = 2
    config.cuts = "published"
    config.epochs = 90
    config.batch_size = 256
    config.dtype = "bfloat16"

    config.model.name = "resnet"
    config.model.depth = 101
    config.model.width = 64
    config.model.stem = "imagenet"

    config.data.source = "tfds"
    config.data.name = "imagenet2012"

    config.method.name = "fdg"
    config.method.beta = 0.5

    config.optim.weight_decay = 1e-4
    config.optim.milestones = (30, 60, 80)
    config.optim.warmup_epochs = 3
    return varied(config, variants)
