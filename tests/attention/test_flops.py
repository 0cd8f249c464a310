"""The formulas: the papers' own figures, and loops that count every pair."""

from __future__ import annotations

import itertools

import pytest

from sparsort.attention.flops import (
    AttentionShape,
    SparseShape,
    choosing_flops,
    crossover,
    dense_flops,
    saving,
    sparse_flops,
)
from sparsort.attention.selectors import SELECTORS, SelectorKind
from sparsort.errors import SparsortError

MSA = AttentionShape(heads=64, groups=4, head_dim=128, index_dim=128)
SMALL = AttentionShape(heads=6, groups=2, head_dim=3, index_dim=5)
N, W, K, WINDOW = 256, 8, 3, 2


def test_the_published_figure_of_msa() -> None:
    sparse = SparseShape(block_size=128, blocks=16)
    assert saving(MSA, 2**20, sparse) == pytest.approx(28.44, abs=0.005)
    # Without the work of choosing it would be N / (2·k·W).
    free = SparseShape(selector="window", block_size=128, blocks=16)
    assert saving(MSA, 2**20, free) == 2**20 / (2 * 16 * 128)
    assert saving(MSA, 2**40, sparse) == pytest.approx(2 * 64 / 4, rel=1e-4)


def test_the_crossover_of_msa() -> None:
    length = crossover(MSA, blocks=16, block_size=128)
    assert 4_150 < length < 4_250
    sparse = SparseShape(block_size=128, blocks=16)
    assert saving(MSA, int(length), sparse) < 1 < saving(MSA, int(length) + 1, sparse)
    wide = AttentionShape(heads=4, groups=4, head_dim=16, index_dim=32)
    assert crossover(wide, blocks=2, block_size=16) == float("inf")
    assert saving(wide, 10**6, SparseShape(block_size=16, blocks=2)) < 1


def _pairs() -> int:
    return sum(1 for query, key in itertools.product(range(N), repeat=2) if key <= query)


def _near_pairs(blocks: int) -> int:
    """Each query with all keys of its own block and of those right before it, as many as there are."""
    return sum(1 for query, key in itertools.product(range(N), repeat=2) if 0 <= query // W - key // W < blocks)


def _block_pairs() -> int:
    """Each query with the blocks that lie whole before it."""
    return sum(1 for query in range(N) for block in range(N // W) if (block + 1) * W <= query + 1)


def _counted(selector: SelectorKind) -> int:
    """A multiply-add as two, for every pair that the selector looks at, forward."""
    H, G, D, width = SMALL.heads, SMALL.groups, SMALL.head_dim, SMALL.index_dim
    match selector:
        case "index_branch" | "lm_trained":
            return _pairs() * G * 2 * width
        case "moba":
            return _block_pairs() * G * 2 * D
        case "seer":
            return _block_pairs() * G * 2 * width
        case "nsa":
            return (_block_pairs() + _near_pairs(WINDOW)) * H * (2 * D + 2 * D)
        case "oracle":
            return _pairs() * H * 2 * D
        case _:
            return 0


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_loop_over_the_pairs_counts_the_same(selector: SelectorKind) -> None:
    sparse = SparseShape(selector=selector, block_size=W, blocks=K, window=WINDOW)
    # The formulas take N/2 keys for (N + 1)/2, and k blocks for queries that see fewer.
    near = K * W / (2 * N)
    assert choosing_flops(SMALL, N, sparse) == pytest.approx(_counted(selector), rel=near)
    attending = _near_pairs(K) * SMALL.heads * 4 * SMALL.head_dim
    assert sparse_flops(SMALL, N, sparse) == pytest.approx(_counted(selector) + attending, rel=near)
    assert sparse_flops(SMALL, N, sparse) - choosing_flops(SMALL, N, sparse) >= attending
    assert dense_flops(SMALL, N) == pytest.approx(_pairs() * SMALL.heads * 4 * SMALL.head_dim, rel=1 / N)


def test_a_selection_of_everything_costs_what_dense_attention_does_and_choosing() -> None:
    for selector in SELECTORS:
        sparse = SparseShape(selector=selector, block_size=W, blocks=N / W)
        expected = dense_flops(SMALL, N) + choosing_flops(SMALL, N, sparse)
        assert sparse_flops(SMALL, N, sparse) == expected


def test_a_training_step_has_the_losses_of_its_selector() -> None:
    H, G, D, I = SMALL.heads, SMALL.groups, SMALL.head_dim, SMALL.index_dim  # noqa: E741
    attending, keys = 4 * H * D * N * K * W, N * K * W
    more = {
        "index_branch": G * I * N**2 + (2 * H * D + 3 * 2 * G * I) * keys,
        "seer": 4 * G * I * N**2 / W + H * D * N**2,
        "moba": G * D * N**2 / W,
        "window": 0,
        "nsa": 3.5 * (2 * H * D * N**2 / W + 4 * H * D * N * WINDOW * W),
    }
    for selector, choosing in more.items():
        sparse = SparseShape(selector=selector, block_size=W, blocks=K, window=WINDOW)  # type: ignore[arg-type]
        assert sparse_flops(SMALL, N, sparse, training=True) == pytest.approx(3.5 * attending + choosing)
    assert dense_flops(SMALL, N, training=True) == 3.5 * dense_flops(SMALL, N)


def test_sizes_that_no_attention_has_are_refused() -> None:
    with pytest.raises(SparsortError, match="multiple of groups"):
        AttentionShape(heads=6, groups=4, head_dim=8)
    with pytest.raises(SparsortError, match="sizes 1 or more"):
        AttentionShape(heads=4, groups=4, head_dim=0)
    with pytest.raises(SparsortError, match="block_size must be 1"):
        SparseShape(block_size=0, blocks=2)
    with pytest.raises(SparsortError, match="Did you mean 'moba'"):
        SparseShape(selector="mobi", block_size=8, blocks=2)  # type: ignore[arg-type]
