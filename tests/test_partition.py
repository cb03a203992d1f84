from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax.partition import assign_devices, check_cuts, even_cuts, resolve_cuts


def dearest(costs, cuts):
    return max(sum(costs[i:j]) for i, j in pairwise((0, *cuts, len(costs))))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_even_cuts_are_the_best_there_are(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    cuts = even_cuts(costs, num_stages)
    assert check_cuts(cuts, len(costs)) == cuts
    assert len(cuts) == num_stages - 1
    assert dearest(costs, cuts) == min(dearest(costs, c) for c in combinations(range(1, len(costs)), num_stages - 1))


@given(st.integers(1, 30), st.data())
def test_an_even_split_of_layers_is_even(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    sizes = [j - i for i, j in pairwise((0, *even_cuts([1] * num_layers, num_stages), num_layers))]
    assert max(sizes) == -(-num_layers // num_stages)
    assert min(sizes) >= 1


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((9, 4), r"cuts \(9, 4\) must increase; did you mean \(4, 9\)\?"),
        ((4, 4), r"must increase; did you mean \(4,\)"),
        ((0, 4), r"cuts must lie in 1..9 for 10 layers; got \(0, 4\)"),
        ((4, 10), r"cuts must lie in 1..9 for 10 layers; got \(4, 10\)"),
        ((-1,), "must lie in 1..9"),
        ((4.0,), r"must be whole numbers in a list, .*; got \(4.0,\)"),
        (4, "must be whole numbers in a list, .*; got 4"),
        (None, "must be whole numbers in a list, .*; got None"),
    ],
)
def test_wrong_cuts_are_refused(cuts, message):
    with pytest.raises(ValueError, match=message):
        check_cuts(cuts, 10)


def test_cuts_by_parameters():
    assert resolve_cuts("parameters", 2, [1, 1, 1, 9]) == (3,)
    assert resolve_cuts("layers", 2, [1, 1, 1, 9]) == (2,)
    assert resolve_cuts((1, 3), None, [1, 1, 1, 9]) == (1, 3)


@pytest.mark.parametrize(
    ("cuts", "num_stages", "params", "message"),
    [
        ("layers", 5, [1, 1, 1], "num_stages must lie in 1..3, .* got 5"),
        ("layers", 0, [1, 1, 1], "num_stages must lie in 1..3, .* got 0"),
        ("layers", None, [1, 1, 1], "needs num_stages"),
        ("layer", 2, [1, 1, 1], "unknown kind of cuts 'layer'; did you mean 'layers'"),
        ("parameters", 2, [1, None, 1], r"layer 1 \(Linen\) has only after init"),
        ((1,), 3, [1, 1, 1], r"cuts \(1,\) make 2 stages, num_stages is 3; leave one out"),
    ],
)
def test_wrong_requests_are_refused(cuts, num_stages, params, message):
    with pytest.raises(ValueError, match=message):
        resolve_cuts(cuts, num_stages, params)


def test_stages_share_devices_in_order():
    assert assign_devices("ab", 4) == ("a", "a", "b", "b")
    assert assign_devices("abc", 4) == ("a", "a", "b", "c")
    assert assign_devices("abcdef", 4) == ("a", "b", "c", "d")
    assert assign_devices("a", 3) == ("a", "a", "a")
