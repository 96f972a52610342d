"""The order in which blocks change places: csrc/kv_moves.h."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcm_fast._native import ordered_moves


@given(st.data(), st.integers(1, 12))
def test_one_after_the_other_is_the_same_as_all_at_the_same_time(data, blocks):
    sources = data.draw(st.lists(st.integers(0, blocks - 1), unique=True))
    targets = data.draw(st.permutations(range(blocks)).map(lambda order: order[: len(sources)]))
    moves = list(zip(sources, targets, strict=True))
    content = list(range(blocks + 1))
    for src, dst in ordered_moves(moves, spare=blocks):
        content[dst] = content[src]
    expected = list(range(blocks))
    for src, dst in moves:
        expected[dst] = src
    assert content[:blocks] == expected


def test_no_more_moves_than_needed():
    assert ordered_moves([(0, 1), (1, 2), (5, 5)]) == [(1, 2), (0, 1)]
    assert ordered_moves([(3, 4), (4, 3)], spare=7) == [(4, 7), (3, 4), (7, 3)]


@pytest.mark.parametrize(
    ("moves", "spare", "message"),
    [
        ([(0, 1), (1, 0)], -1, "expected a spare block for moves in a circle, got -1"),
        ([(0, 1)], 1, "expected a spare block that does not move, got 1"),
        ([(0, 1), (0, 2)], -1, "expected no source twice, got 0"),
        ([(0, 1), (2, 1)], -1, "expected no target twice, got 1"),
        ([(0, 1), (2, -3)], -1, "expected blocks that are not negative, got -3"),
    ],
)
def test_bad_moves(moves, spare, message):
    with pytest.raises(ValueError, match=message):
        ordered_moves(moves, spare)
