"""The published cuts, in the words of the code that they come from: slices of its groups `layer1` .. `layer4`."""

import re
from itertools import pairwise

import jax
import pytest
from flax import nnx

from fdg_jax import models
from fdg_jax.models.cuts import published_cuts
from fdg_jax.partition import check_cuts

BLOCKS = {  # in every group
    ("resnet_cifar", 20, 16): [3] * 3,
    ("resnet_cifar", 56, 16): [9] * 3,
    ("resnet_cifar", 110, 16): [18] * 3,
    ("resnet_cifar", 1202, 16): [200] * 3,
    ("resnet", 18, 64): [2] * 4,
    ("resnet", 50, 64): [3, 4, 6, 3],
    ("resnet", 101, 64): [3, 4, 23, 3],
    ("wrn", 28, 10): [4] * 3,
}
GROUPS = "stem,layer1 / layer2 / layer3,head"
TABLE = [
    ("resnet_cifar", 20, 16, "stem,layer1,layer2[:1] / layer2[1:],layer3,head"),
    ("resnet_cifar", 20, 16, GROUPS),
    ("resnet_cifar", 56, 16, "stem,layer1,layer2[:4] / layer2[4:],layer3,head"),
    ("resnet_cifar", 56, 16, GROUPS),
    (
        "resnet_cifar",
        56,
        16,
        "stem,layer1[:6] / layer1[6:],layer2[:4] / layer2[4:],layer3[:2] / layer3[2:],head",
    ),
    ("resnet_cifar", 110, 16, "stem,layer1,layer2[:9] / layer2[9:],layer3,head"),
    ("resnet_cifar", 110, 16, GROUPS),
    (
        "resnet_cifar",
        110,
        16,
        "stem,layer1[:13] / layer1[13:],layer2[:9] / layer2[9:],layer3[:5] / layer3[5:],head",
    ),
    (
        "resnet_cifar",
        110,
        16,
        "stem,layer1[:10] / layer1[10:],layer2[:3] / layer2[3:14] / layer2[14:],layer3[:7] / layer3[7:],head",
    ),
    ("resnet_cifar", 1202, 16, "stem,layer1,layer2[:50] / layer2[50:],layer3,head"),
    ("resnet_cifar", 1202, 16, GROUPS),
    (
        "resnet_cifar",
        1202,
        16,
        "stem,layer1[:75] / layer1[75:],layer2[:50] / layer2[50:],layer3[:25] / layer3[25:],head",
    ),
    (
        "resnet_cifar",
        1202,
        16,
        "stem,layer1[:60] / layer1[60:],layer2[:20] / layer2[20:80] / layer2[80:],layer3[:40] / layer3[40:],head",
    ),
    ("resnet", 18, 64, "stem,layer1,layer2 / layer3,layer4,head"),
    ("resnet", 18, 64, "stem,layer1 / layer2,layer3[:1] / layer3[1:],layer4,head"),
    ("resnet", 50, 64, "stem,layer1,layer2 / layer3,layer4,head"),
    ("resnet", 50, 64, "stem,layer1,layer2[:2] / layer2[2:],layer3[:3] / layer3[3:],layer4,head"),
    ("resnet", 50, 64, "stem,layer1,layer2[:1] / layer2[1:],layer3[:1] / layer3[1:5] / layer3[5:],layer4,head"),
    ("resnet", 101, 64, "stem,layer1,layer2,layer3[:9] / layer3[9:],layer4,head"),
    ("resnet", 101, 64, "stem,layer1,layer2,layer3[:4] / layer3[4:15] / layer3[15:],layer4,head"),
    ("resnet", 101, 64, "stem,layer1,layer2,layer3[:1] / layer3[1:9] / layer3[9:17] / layer3[17:],layer4,head"),
    (
        "resnet",
        101,
        64,
        "stem,layer1,layer2[:3] / layer2[3:],layer3[:6] / layer3[6:13] / layer3[13:20] / layer3[20:],layer4,head",
    ),
    ("wrn", 28, 10, "stem,layer1,layer2[:2] / layer2[2:],layer3,head"),
    ("wrn", 28, 10, GROUPS),
    ("wrn", 28, 10, "stem,layer1[:3] / layer1[3:],layer2[:2] / layer2[2:],layer3[:1] / layer3[1:],head"),
]


def written_out(modules: str, blocks: list[int]) -> list[list]:
    """The layers of every module by name: "stem", (group, block), "head"."""
    stages = []
    for module in modules.split(" / "):
        stage = []
        for part in module.split(","):
            if found := re.fullmatch(r"layer(\d)(?:\[(\d*):(\d*)\])?", part):
                group, start, stop = int(found[1]), found[2], found[3]
                stage += [(group, b) for b in range(blocks[group - 1])][
                    slice(int(start) if start else None, int(stop) if stop else None)
                ]
            else:
                stage.append(part)
        stages.append(stage)
    return stages


@pytest.mark.parametrize(("name", "depth", "width", "modules"), TABLE)
def test_published_cuts_are_the_released_codes(name, depth, width, modules):
    blocks = BLOCKS[name, depth, width]
    network = ["stem", *((g, b) for g, count in enumerate(blocks, 1) for b in range(count)), "head"]
    stages = written_out(modules, blocks)
    cuts = check_cuts(published_cuts(name, depth, width, len(stages)), len(network))
    bounds = [0, *cuts, len(network)]
    assert [network[a:b] for a, b in pairwise(bounds)] == stages
    assert [layer for stage in stages for layer in stage] == network


def test_every_published_cut_is_in_the_table():
    written = {(*row[:3], row[3].count("/") + 1) for row in TABLE}
    for network in BLOCKS:
        for num_stages in range(2, 20):
            if (*network, num_stages) not in written:
                with pytest.raises(ValueError, match="published"):
                    published_cuts(*network, num_stages)


@pytest.mark.parametrize("network", [key for key in BLOCKS if key[1] < 1202], ids=str)
def test_the_groups_are_the_networks(network):
    """Stem, head, and between them groups that begin where a block's output has more channels."""
    name, depth, width = network
    channels = []

    def build():
        layers = models.MODELS[name](depth, width=width, rngs=nnx.Rngs(0))
        for block in layers[1:-1]:
            kernels = [leaf for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)) if leaf.ndim == 4]
            channels.append(max(kernel.shape[-1] for kernel in kernels))
        return ()

    jax.eval_shape(build)
    assert [channels.count(size) for size in sorted(set(channels))] == BLOCKS[network]
    assert channels == sorted(channels)


def test_one_stage_has_no_cut():
    assert published_cuts("resnet_cifar", 20, 16, 1) == ()


def test_what_is_not_published_is_refused():
    with pytest.raises(ValueError, match=r"resnet_cifar of depth 56, width 16 are for K = 2, 3, 4; got num_stages=5"):
        published_cuts("resnet_cifar", 56, 16, 5)
    with pytest.raises(
        ValueError, match=r"for wrn of depth 28, width 2: .*; wrn of depth 28, width 10 \(K = 2, 3, 4\)"
    ):
        published_cuts("wrn", 28, 2, 2)
    with pytest.raises(ValueError, match=r"for mlp of depth 3, width 64: .* resnet_cifar of depth 20, width 16 \(K ="):
        published_cuts("mlp", 3, 64, 2)
