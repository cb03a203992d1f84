"""Every method on CIFAR-10, ResNet-20 in three stages, three seeds each, with the recipe of the FDG papers.

    python -m fdg_jax.main --config experiments/compare_cifar10.py
    python -m fdg_jax.main --config experiments/compare_cifar10.py --config.methods="bp, fdg(beta=0.2)"
    python -m fdg_jax.main --config experiments/compare_cifar10.py:smoke

How to choose, and to go on: as `compare_digits.py`. Three stages want three devices; days on a CPU.

Expected: no source has all of these. Of ResNet-20, Zhuang et al. (arXiv 1906.09108, Table 2) have BP* 7.78 %, and with
two stages FDG 7.92 % (beta 1) and 7.23 % (beta 0.2), medians of three seeds; 0.2 % are inside the noise of seeds.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, smoke, varied

METHODS = """
    bp, gpipe, one_f_one_b, ddg, features_replay,
    fdg, fdg(beta=0.2), fdg(policy=current), fdg(policy=recompute), adl, adl(average=True),
    pipelined_bp, pipelined_bp(corrections='spike_compensation, linear_prediction'),
    pipedream, pipedream(vertical_sync=True), pipedream_2bw, dgl, dni
"""


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.methods = " ".join(METHODS.split())
    config.seeds = (0, 1, 2)

    config.num_stages = 3
    config.cuts = "published"

    config.model.name = "resnet_cifar"
    config.model.depth = 20
    config.model.width = 16

    config.data.source = "tfds"
    config.data.name = "cifar10"
    return varied(config, variants, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    smoke(config)
    config.seeds = (0,)
