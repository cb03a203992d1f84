"""Every method on 1,797 scanned digits, three stages, three seeds each, all with the same batches.

    python -m fdg_jax.main --config experiments/compare_digits.py
    python -m fdg_jax.main --config experiments/compare_digits.py --config.methods="bp, fdg(beta=0.5)"
    python -m fdg_jax.main --config experiments/compare_digits.py:smoke

What is typed after --config.methods is what runs: names of `fdg_jax.methods`, with the keys of config.method as
arguments, corrections among them: "pipelined_bp(corrections='spike_compensation, linear_prediction')". A comparison
that was stopped goes on with the same command.

Expected: median test errors of 0.5 to 1.7 % for all that propagate errors, the differences being inside the spread of
three seeds (up to 1.4 %); dgl about 2 %, dni about 15 %. It takes less than 15 minutes on two cores.
"""

from ml_collections import ConfigDict

from fdg_jax.config import default_config, smoke, varied

METHODS = """
    bp, gpipe, one_f_one_b, ddg, features_replay,
    fdg, fdg(beta=0.5), fdg(policy=current), adl(average=True),
    pipelined_bp, pipelined_bp(corrections='spike_compensation, linear_prediction'),
    pipedream, pipedream(vertical_sync=True), pipedream_2bw, dgl, dni(width=16, learning_rate=0.001)
"""


def get_config(variants: str = "") -> ConfigDict:
    config = default_config()
    config.methods = " ".join(METHODS.split())
    config.seeds = (0, 1, 2)

    config.num_stages = 3
    config.engine = "mpmd"  # on two cores; it compiles once for all seeds
    config.epochs = 20
    config.batch_size = 64
    config.log_every_steps = 11

    config.model.name = "resnet_cifar"
    config.model.depth = 8

    config.data.source = "digits"
    config.data.crop_padding = 1
    config.data.flip = False

    config.optim.learning_rate = 0.05
    config.optim.schedule = "cosine"

    config.checkpoint.keep_best = 0
    return varied(config, variants, smoke=_smoke)


def _smoke(config: ConfigDict) -> None:
    smoke(config)
    config.seeds = (0,)
