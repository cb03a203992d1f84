"""The cuts that the code released with FDG makes (ZHUANGHP/FDG, DG_models.py): always between two residual blocks.

A cut (g, b) stands before block b of group g, both as that code counts them: its `layer2[:4] / layer2[4:]` is (2, 4),
and (2, 0) is where the second group begins.
"""

_GROUPS = ((2, 0), (3, 0))  # one stage a group, of three

# (model, depth, width): blocks in each group, and the cuts for every K
_PUBLISHED: dict[tuple[str, int, int], tuple[tuple[int, ...], dict[int, tuple[tuple[int, int], ...]]]] = {
    ("resnet_cifar", 20, 16): ((3, 3, 3), {2: ((2, 1),), 3: _GROUPS}),
    ("resnet_cifar", 56, 16): ((9, 9, 9), {2: ((2, 4),), 3: _GROUPS, 4: ((1, 6), (2, 4), (3, 2))}),
    ("resnet_cifar", 110, 16): (
        (18, 18, 18),
        {2: ((2, 9),), 3: _GROUPS, 4: ((1, 13), (2, 9), (3, 5)), 5: ((1, 10), (2, 3), (2, 14), (3, 7))},
    ),
    ("resnet_cifar", 1202, 16): (
        (200, 200, 200),
        {2: ((2, 50),), 3: _GROUPS, 4: ((1, 75), (2, 50), (3, 25)), 5: ((1, 60), (2, 20), (2, 80), (3, 40))},
    ),
    ("resnet", 18, 64): ((2, 2, 2, 2), {2: ((3, 0),), 3: ((2, 0), (3, 1))}),
    ("resnet", 50, 64): (
        (3, 4, 6, 3),
        {2: ((3, 0),), 3: ((2, 2), (3, 3)), 4: ((2, 1), (3, 1), (3, 5))},
    ),
    ("resnet", 101, 64): (
        (3, 4, 23, 3),
        {
            2: ((3, 9),),
            3: ((3, 4), (3, 15)),
            4: ((3, 1), (3, 9), (3, 17)),
            5: ((2, 3), (3, 6), (3, 13), (3, 20)),
        },
    ),
    ("wrn", 28, 10): ((4, 4, 4), {2: ((2, 2),), 3: _GROUPS, 4: ((1, 3), (2, 2), (3, 1))}),
}


def published_cuts(name: str, depth: int, width: int, num_stages: int) -> tuple[int, ...]:
    """The number of the first layer of every stage but the first; layer 0 is the stem, the last one the head.

    Args:
        name: of `models.MODELS`.
        depth, width: of the network.
        num_stages: K. One stage has no cut, and gives ().

    Raises:
        ValueError: none are published for this network, or not for this K; the message lists those that are.
    """
    if (name, depth, width) not in _PUBLISHED:
        every = "; ".join(f"{_describe(*network)} (K = {_stages(network)})" for network in _PUBLISHED)
        raise ValueError(
            f"no cuts are published for {_describe(name, depth, width)}: cut it by 'layers', 'parameters' or numbers; "
            f"published are {every}"
        )
    blocks, cuts = _PUBLISHED[name, depth, width]
    if num_stages == 1:
        return ()
    if num_stages not in cuts:
        raise ValueError(
            f"the cuts published for {_describe(name, depth, width)} are for K = {_stages((name, depth, width))}; "
            f"got num_stages={num_stages}: cut by 'layers', 'parameters' or numbers"
        )
    return tuple(1 + sum(blocks[: group - 1]) + block for group, block in cuts[num_stages])


def _describe(name: str, depth: int, width: int) -> str:
    return f"{name} of depth {depth}, width {width}"


def _stages(network: tuple[str, int, int]) -> str:
    return ", ".join(map(str, _PUBLISHED[network][1]))
