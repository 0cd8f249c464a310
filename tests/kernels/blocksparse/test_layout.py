"""The places of sequences, against plain loops over the columns of random batches, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout, Span

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def padded_rows(draw):
    """(mask as lists, queries, keys): one run of ones a row, and sizes that a mask of these columns allows."""
    columns = draw(st.integers(0, 9))
    runs = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=4))
    mask = [[int(start <= column < start + length) for column in range(columns)] for start, length in runs]
    return mask, columns, draw(st.integers(0, columns)), columns + draw(st.integers(0, 3))


@SETTINGS
@given(padded_rows())
def test_a_padding_mask_puts_every_token_where_loops_put_it(case):
    mask, columns, queries, keys = case
    layout = Layout.from_padding(torch.tensor(mask, dtype=torch.int64).reshape(len(mask), columns), queries, keys)
    assert (layout.batch, layout.queries, layout.keys) == (len(mask), queries, keys)
    positions, numbers, table = [], [], []
    for row, ones in enumerate(mask):
        # A token's position is the number of tokens before it; its query column counts from the last `queries` columns.
        column_of_query = [columns - queries + t for t in range(queries)]
        positions.append([sum(ones[:c]) if ones[c] else -1 for c in column_of_query])
        real = [t for t, c in enumerate(column_of_query) if ones[c]]
        numbers.append([len(table) if ones[c] else -1 for c in column_of_query])
        if real:
            table.append([row, real[0], len(real), ones.index(1), sum(ones)])
    assert layout.position("cpu").tolist() == positions
    assert layout.span_of_query("cpu").tolist() == numbers
    assert layout.table("cpu").tolist() == table
    assert layout.tokens == sum(line[2] for line in table)
    assert layout.longest == max((line[4] for line in table), default=0)
    for tensor in (layout.table("cpu"), layout.position("cpu"), layout.span_of_query("cpu")):
        assert tensor.dtype == torch.int32


@SETTINGS
@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=3), st.integers(0, 3), st.integers(1, 5))
def test_packed_lengths_put_every_token_where_loops_put_it(lengths, spare, block):
    columns = max((sum(sizes) for sizes in lengths), default=0) + spare
    layout = Layout.from_lengths(lengths, columns)
    positions, numbers, sequences = [], [], 0
    for sizes in lengths:
        place, number = [], []
        for size in sizes:
            place += range(size)
            number += [sequences] * size
            sequences += size > 0
        positions.append(place + [-1] * (columns - len(place)))
        numbers.append(number + [-1] * (columns - len(number)))
    assert layout.position("cpu").tolist() == positions
    assert layout.span_of_query("cpu").tolist() == numbers
    longest = max((size for sizes in lengths for size in sizes), default=0)
    assert layout.blocks(block) == len({position // block for position in range(longest)})


@SETTINGS
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3))
def test_position_ids_give_back_the_lengths_they_were_made_of(sizes, rows):
    ids = torch.tensor([[position for size in sizes for position in range(size)]] * rows)
    # Several single tokens at the end, after something longer, are what packing writes for padding.
    ones = len(sizes) - max((n + 1 for n, size in enumerate(sizes) if size > 1), default=0)
    kept = sizes[: len(sizes) - ones] if 1 < ones < len(sizes) else sizes
    assert Layout.packed(ids) == Layout.from_lengths([kept] * rows, sum(sizes))
    assert Layout.packed(ids[:1], batch=rows) == Layout.packed(ids)


def test_a_sequence_may_start_at_any_position():
    layout = Layout.packed(torch.tensor([[7, 8, 9, 3, 4, 0]]))
    assert [span.queries for span in layout.spans] == [3, 2, 1]
    for wrong in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 1, 3)):
        with pytest.raises(SparsortError, match=r"expected \(4, tokens\)"):
            Layout.packed(wrong, batch=4)


def test_left_right_and_no_padding_are_one_sequence_at_different_columns():
    made = [Layout.from_padding(torch.tensor([mask]), 5) for mask in ([0, 0, 1, 1, 1], [1, 1, 1, 0, 0])]
    left, right = made[0].spans[0], made[1].spans[0]
    assert left == Span(row=0, query_start=2, queries=3, key_start=2, keys=3)
    assert right == Span(row=0, query_start=0, queries=3, key_start=0, keys=3)
    assert Layout.from_padding(torch.ones(2, 5), 5) == Layout.plain(2, 5)
    assert made[0].position("cpu")[0, 2:].tolist() == made[1].position("cpu")[0, :3].tolist() == [0, 1, 2]


def test_the_queries_of_a_cache_are_its_last_keys():
    layout = Layout.plain(2, 3, 8)
    assert layout.position("cpu").tolist() == [[5, 6, 7]] * 2
    # Columns of a static cache after the mask's are not filled yet.
    layout = Layout.from_padding(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 1, keys=8)
    assert layout.table("cpu").tolist() == [[0, 0, 1, 1, 3], [1, 0, 1, 0, 4]]


@pytest.mark.parametrize(
    "layout",
    [
        Layout.plain(2, 0),
        Layout.plain(0, 3),
        Layout.from_padding(torch.zeros(2, 0), 0),
        Layout.from_padding(torch.zeros(2, 4), 4),
        Layout.from_padding(torch.ones(2, 4), 0),
        Layout.from_lengths([[], [0]]),
        Layout.packed(torch.zeros(2, 0, dtype=torch.int64)),
    ],
    ids=["length 0", "batch 0", "mask of no columns", "all padding", "no queries", "empty rows", "packed length 0"],
)
def test_a_batch_without_tokens_is_a_layout_without_sequences(layout):
    assert layout.spans == ()
    assert (layout.tokens, layout.longest, layout.blocks(16)) == (0, 0, 0)
    assert layout.table("cpu").shape == (0, 5)
    assert layout.position("cpu").shape == (layout.batch, layout.queries)
    assert layout.position("cpu").tolist() == [[-1] * layout.queries] * layout.batch


def span(row=0, query_start=0, queries=2, key_start=0, keys=2):
    return Span(row=row, query_start=query_start, queries=queries, key_start=key_start, keys=keys)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([span(row=1)], "a row below 1"),
        ([span(row=-1)], "a row below 1"),
        ([span(queries=0)], "1 ≤ queries ≤ keys"),
        ([span(queries=3, keys=2)], "1 ≤ queries ≤ keys"),
        ([span(query_start=-1)], "query column 0"),
        ([span(), span(query_start=1, key_start=2)], "ended .query column 2, key column 2"),
        ([span(), span(query_start=2, key_start=1)], "ended .query column 2, key column 2"),
        ([span(query_start=3)], "end at query column 5 and key column 2, but the tensors have 4 and 6"),
        ([span(key_start=3, keys=4)], "end at query column 2 and key column 7, but the tensors have 4 and 6"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(spans, message):
    with pytest.raises(SparsortError, match=message):
        Layout(spans=tuple(spans), batch=1, queries=4, keys=6)


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "message"),
    [
        (torch.tensor([[1, 0, 1]]), 3, None, "row 0 .* 2 tokens between columns 0 and 2: padding between"),
        (torch.ones(3), 3, None, r"shape \(3,\); expected \(batch, columns\)"),
        (torch.tensor(1), 3, None, r"shape \(\); expected"),
        (torch.ones(1, 1, 3, 3), 3, None, r"shape \(1, 1, 3, 3\); expected"),
        (torch.ones(2, 3), 4, None, "with 4 ≤ columns ≤ 3"),
        (torch.ones(2, 3), 1, 2, "with 1 ≤ columns ≤ 2"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, queries, keys, message):
    with pytest.raises(SparsortError, match=message):
        Layout.from_padding(mask, queries, keys)


def test_a_layout_cached_in_inference_mode_can_be_used_in_training():
    layout = Layout.plain(1, 3, 1001)
    with torch.inference_mode():
        made = layout.table("cpu"), layout.position("cpu"), layout.span_of_query("cpu")
    assert not any(tensor.is_inference() for tensor in made)
    weight = torch.ones(1001, requires_grad=True)
    weight[layout.position("cpu")].sum().backward()
    assert weight.grad.sum() == 3


@pytest.mark.parametrize("lengths", [[3, 4], 3, ["ab"], [[1.5]], [[3, -1]], None])
def test_invalid_lengths_are_refused(lengths):
    with pytest.raises(
        SparsortError, match=r"expected, for each row, the lengths of its sequences, such as \[\[3, 4\], \[7\]\]"
    ):
        Layout.from_lengths(lengths)
