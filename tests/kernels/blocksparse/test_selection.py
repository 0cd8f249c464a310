"""Selections, the selection of every block, and the reverse: against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import check_blocks

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, every_block, reverse

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)
LENGTHS = st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=3)


def rows_of(layout: Layout, block_size: int) -> list[list[int]]:
    """The number of each query's own block, −1 for padding, by plain loops."""
    own = [[-1] * layout.queries for _ in range(layout.batch)]
    for span in layout.spans:
        for i in range(span.queries):
            own[span.row][span.query_start + i] = (span.keys - span.queries + i) // block_size
    return own


@st.composite
def selections(draw):
    """A layout of packed rows and a random valid selection of it, with unused slots anywhere in a row."""
    layout = Layout.from_lengths(draw(LENGTHS))
    size, groups, slots = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(0, 4))
    rows = [
        [
            [
                draw(st.permutations(([*range(own[t] + 1)] + [-1] * slots)[: max(slots, 0)]))
                for t in range(layout.queries)
            ]
            for _ in range(groups)
        ]
        for own in rows_of(layout, size)
    ]
    blocks = torch.tensor(rows, dtype=torch.int32).reshape(layout.batch, groups, layout.queries, slots)
    return layout, Selection(blocks=blocks, block_size=size)


@SETTINGS
@given(selections())
def test_reverse_lists_the_queries_of_every_block(case):
    layout, selection = case
    check_blocks(selection, layout)
    made = reverse(selection, layout)
    batch, groups, queries, slots = selection.blocks.shape
    first, blocks_of_row = [], [0] * batch
    for span in layout.spans:
        first.append(blocks_of_row[span.row])
        blocks_of_row[span.row] += -(-span.keys // selection.block_size)
    most = max(blocks_of_row)
    assert (made.first_block, made.blocks) == (tuple(first), most)
    query, slot, start = [], [], [0]
    sequence = layout.span_of_query("cpu").tolist()
    for b in range(batch):
        for g in range(groups):
            for block in range(most):
                for t in range(queries):
                    for k in range(slots):
                        chosen = int(selection.blocks[b, g, t, k])
                        if chosen >= 0 and chosen + first[sequence[b][t]] == block:
                            query.append(t)
                            slot.append(k)
                start.append(len(query))
    assert made.query.tolist() == query
    assert made.slot.tolist() == slot
    assert made.start.tolist() == start


@SETTINGS
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3))
def test_every_block_is_all_blocks_up_to_the_querys_own(lengths, size, groups):
    layout = Layout.from_lengths(lengths)
    selection = every_block(layout, groups, size)
    check_blocks(selection, layout)
    assert selection.blocks.shape == (layout.batch, groups, layout.queries, layout.blocks(size))
    for b, own in enumerate(rows_of(layout, size)):
        for g in range(groups):
            for t in range(layout.queries):
                expected = [*range(own[t] + 1)] + [-1] * (layout.blocks(size) - own[t] - 1)
                assert selection.blocks[b, g, t].tolist() == expected
    assert torch.equal(selection.counts, (selection.blocks >= 0).sum(-1).int())


def test_used_slots_are_counted_wherever_they_are():
    selection = Selection(blocks=torch.tensor([[[[-1, 2, 0], [-1, -1, -1]]]], dtype=torch.int32), block_size=4)
    assert selection.counts.tolist() == [[[2, 0]]]
    assert selection.counts.dtype == torch.int32


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[0, -1], [1, 0]], r"block 1 of \(row, group, query\) \(0, 0, 1\) is not a block that its query can see"),
        ([[0, -1], [-2, 0]], r"block -2 of \(row, group, query\) \(0, 0, 1\)"),
        ([[0, -1], [0, 0]], r"block 0 of \(row, group, query\) \(0, 0, 1\) is twice"),
    ],
)
def test_blocks_that_no_query_may_hold_are_found(blocks, message):
    selection = Selection(blocks=torch.tensor([[blocks]], dtype=torch.int32), block_size=2)
    with pytest.raises(SparsortError, match=message):
        check_blocks(selection, Layout.plain(1, 2))


def test_blocks_of_padding_are_found():
    layout = Layout.from_padding(torch.tensor([[0, 1]]), 2)
    selection = Selection(blocks=torch.zeros(1, 1, 2, 1, dtype=torch.int32), block_size=2)
    with pytest.raises(SparsortError, match=r"\(0, 0, 0\) is not a block"):
        check_blocks(selection, layout)
    with pytest.raises(SparsortError, match="of 1 rows of 2 queries and the layout of 1 of 3"):
        check_blocks(selection, Layout.plain(1, 3))


@pytest.mark.parametrize(
    ("blocks", "block_size", "message"),
    [
        (torch.zeros(1, 1, 1, 1, dtype=torch.int64), 2, "torch.int64"),
        (torch.zeros(1, 1, 1, dtype=torch.int32), 2, r"shape \(1, 1, 1\)"),
        (
            torch.zeros(1, 1, 1, 1, dtype=torch.int32),
            0,
            "block_size is 0; expected a whole number of keys from 1 to 1048576",
        ),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int32), 2.0, "block_size is 2.0"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int32), 10**9, "block_size is 1000000000"),
        ([[[[0]]]], 4, "selected blocks must be a torch tensor, got list"),
    ],
)
def test_an_invalid_selection_is_refused(blocks, block_size, message):
    with pytest.raises(SparsortError, match=message):
        Selection(blocks=blocks, block_size=block_size)


def test_every_block_with_an_invalid_size_is_refused():
    with pytest.raises(SparsortError, match="block_size is 0"):
        every_block(Layout.plain(1, 4), 1, 0)
