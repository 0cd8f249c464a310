"""The plan has every row once within its limits, and shares prefixes where this saves tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.scoring.model.batching import Limits, plan


def _brute_force_tokens(ids: list[list[int]], depth: int) -> int:
    sharing = [row for row in ids if len(row) > depth]
    heads = {tuple(row[:depth]) for row in sharing}
    return sum(map(len, ids)) - depth * (len(sharing) - len(heads))


_ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(ids=_ROWS, tokens=st.integers(1, 60), kept=st.integers(1, 200), depth=st.integers(0, 12))
def test_every_row_once_and_within_the_limits(ids: list[list[int]], tokens: int, kept: int, depth: int) -> None:
    how = plan(ids, Limits(tokens=tokens, kept=kept, depth=depth))
    assert sorted(np.concatenate(how.batches).tolist()) == list(range(len(ids)))
    for rows in how.batches:
        shared = how.head_of[rows] >= 0
        assert shared.all() or not shared.any()
        skip = how.depth if shared.any() else 0
        width = max(len(ids[row]) for row in rows)
        assert len(rows) == 1 or ((width - skip) * len(rows) <= tokens and width * len(rows) <= kept)
    assert how.n_computed == _brute_force_tokens(ids, how.depth) <= how.n_tokens
    for row, head in enumerate(how.head_of):
        if head >= 0:
            assert how.heads[head].tolist() == ids[row][: how.depth]
            assert len(ids[row]) > how.depth
    if how.depth:
        assert sorted(np.concatenate(how.head_batches).tolist()) == list(range(len(how.heads)))


def test_the_depth_is_the_one_that_computes_fewest_tokens() -> None:
    rng = np.random.default_rng(0)
    ids = [[7, 7, *rng.integers(0, 3, 2).tolist(), *rng.integers(0, 1000, 9).tolist()] for _ in range(300)]
    how = plan(ids, Limits(tokens=512, kept=8192, depth=12))
    best = min(range(13), key=lambda depth: _brute_force_tokens(ids, depth))
    assert how.depth == best == 4
    assert how.n_computed == _brute_force_tokens(ids, best)


def test_one_short_row_does_not_keep_the_others_from_sharing() -> None:
    ids = [[1, 2, 3, 4, 5, 6, row] for row in range(100)] + [[1]]
    how = plan(ids, Limits(tokens=64, kept=1024, depth=32))
    assert how.depth == 6
    assert how.head_of[-1] == -1


def test_nothing_is_shared_where_it_saves_nothing() -> None:
    assert (
        plan([[1, *range(10 * row, 10 * row + 40)] for row in range(50)], Limits(tokens=512, kept=8192, depth=32)).depth
        == 0
    )
    assert plan([[1, 2, 3]], Limits(tokens=512, kept=8192, depth=32)).depth == 0


@pytest.mark.parametrize("over", [0, 3])
def test_rows_over_the_rotary_limit_run_alone_and_unshared(over: int) -> None:
    ids = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 4], [1, 2, 3, 5, 6]]
    how = plan(ids, Limits(tokens=512, kept=8192, depth=32, alone_over=over))
    assert how.depth == 0
    long = [row for row in range(4) if len(ids[row]) > over]
    assert all(any(batch.tolist() == [row] for batch in how.batches) for row in long)


def test_padding_stays_small_on_skewed_lengths() -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(4, 0.8, 1000).astype(int), 1, 2000)
    how = plan([rng.integers(0, 10**6, n).tolist() for n in lengths], Limits(tokens=1024, kept=16384, depth=0))
    padded = sum(lengths[rows].max() * len(rows) for rows in how.batches)
    assert padded / lengths.sum() < 1.1
