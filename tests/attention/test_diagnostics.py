"""Recall, mass and dead blocks, against loops over every query, key and block."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsort.attention.diagnostics import SelectionReport, report_selection
from sparsort.attention.selectors.base import LayerInputs
from sparsort.attention.selectors.fixed import Oracle
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, every_block

HEADS, GROUPS, WIDTH, BLOCK = 4, 2, 8, 3
SCALE = WIDTH**-0.5
LAYOUTS = {
    "plain": Layout.plain(2, 13),
    "left": Layout.from_padding(torch.tensor([[0, 0, 0, *[1] * 10], [1] * 13]), 13),
    "right": Layout.from_padding(torch.tensor([[1] * 7 + [0] * 6, [0] * 13]), 13),
    "packed": Layout.from_lengths([[5, 1, 7], [13]]),
    "cache": Layout.from_padding(torch.tensor([[0, 0, *[1] * 11], [1] * 13]), 2, 16),
    "one": Layout.plain(2, 1),
}


def _tensors(layout: Layout, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(layout.batch, HEADS, layout.queries, WIDTH, generator=draw)
    key = torch.randn(layout.batch, GROUPS, layout.keys, WIDTH, generator=draw)
    # Nothing that is not of a sequence may count.
    kept = torch.zeros(layout.batch, layout.keys, dtype=torch.bool)
    for span in layout.spans:
        kept[span.row, span.key_start : span.key_start + span.keys] = True
    query[~(layout.position("cpu") >= 0)[:, None].expand(-1, HEADS, -1)] = math.nan
    return query, key.masked_fill(~kept[:, None, :, None], math.nan)


def _drawn(layout: Layout, slots: int, seed: int, own: bool = True) -> Selection:
    """Every query's own block, perhaps, and others at random, in any slots."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.full((layout.batch, GROUPS, layout.queries, slots), -1, dtype=torch.int32)
    position = layout.position("cpu")
    for row, group, column in itertools.product(range(layout.batch), range(GROUPS), range(layout.queries)):
        if position[row, column] < 0:
            continue
        last = int(position[row, column]) // BLOCK
        others = torch.randperm(last + (not own), generator=draw)[: slots - own].tolist()
        found = [*others, *[last] * own][:slots]
        places = torch.randperm(slots, generator=draw)[: len(found)]
        blocks[row, group, column, places] = torch.tensor(found, dtype=torch.int32)
    return Selection(blocks=blocks, block_size=BLOCK)


def _by_loops(query: Tensor, key: Tensor, selection: Selection, layout: Layout) -> dict[str, Any]:
    masses, recalls, counts, dead = [], [], [], []
    for span in layout.spans:
        taken_from_afar: set[tuple[int, int]] = set()
        for group, n in itertools.product(range(GROUPS), range(span.queries)):
            column, position = span.query_start + n, span.keys - span.queries + n
            chosen = [int(b) for b in selection.blocks[span.row, group, column] if b >= 0]
            own = position // BLOCK
            counts.append(len(chosen))
            taken_from_afar |= {(group, block) for block in chosen if block < own}
            if not chosen or len(chosen) == own + 1:
                continue
            share = [0.0] * (own + 1)
            heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
            for head in heads:
                logits = [
                    float(query[span.row, head, column] @ key[span.row, group, span.key_start + s]) * SCALE
                    for s in range(position + 1)
                ]
                total = sum(math.exp(logit) for logit in logits)
                for s, logit in enumerate(logits):
                    share[s // BLOCK] += math.exp(logit) / total / len(heads)
            masses.append(sum(share[block] for block in chosen))
            top = [own, *sorted(range(own), key=lambda block: -share[block])][: len(chosen)]
            recalls.append(len(set(top) & set(chosen)) / len(chosen))
        last = (span.keys - 1) // BLOCK
        dead += [(group, block) not in taken_from_afar for group in range(GROUPS) for block in range(last)]
    return {
        "mass": _mean(masses),
        "recall": _mean(recalls),
        "mean_blocks": _mean(counts),
        "most_blocks": max(counts, default=0),
        "dead": _mean(dead),
        "sampled": len(masses),
    }


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else math.nan


def _report(query: Tensor, key: Tensor, selection: Selection, layout: Layout, sample: int = 100) -> SelectionReport:
    return report_selection(query, key, selection, layout, scale=SCALE, sample=sample)


@pytest.mark.parametrize("name", LAYOUTS)
@given(slots=st.integers(1, 6), seed=st.integers(0, 10_000), own=st.booleans())
def test_loops_find_the_same(name: str, slots: int, seed: int, own: bool) -> None:
    layout = LAYOUTS[name]
    query, key = _tensors(layout, seed)
    selection = _drawn(layout, slots, seed, own)
    expected = _by_loops(query, key, selection, layout)
    assert vars(_report(query, key, selection, layout)) == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_queries_that_had_nothing_to_choose_have_no_diagnostics(name: str) -> None:
    layout = LAYOUTS[name]
    query, key = _tensors(layout)
    report = _report(query, key, every_block(layout, GROUPS, BLOCK), layout)
    assert math.isnan(report.mass)
    assert math.isnan(report.recall)
    assert report.sampled == 0
    assert report.dead == 0 or layout.longest <= BLOCK


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_oracle_recalls_all_and_catches_most(name: str, blocks: int) -> None:
    layout = LAYOUTS[name]
    query, key = _tensors(layout)
    inputs = LayerInputs(
        module=nn.Identity(),
        hidden=query,
        rotary=None,
        query=query,
        key=key,
        value=key,
        layout=layout,
        scale=SCALE,
        full=False,
        budget=FixedBudget(blocks=blocks),
    )
    best = _report(query, key, Oracle(BLOCK).choose(inputs, None).selection, layout)
    assert best.recall == 1 or best.sampled == 0
    for other in (inputs.last_blocks(BLOCK, blocks), _drawn(layout, blocks, seed=1)):
        assert not _report(query, key, other, layout).mass > best.mass


def test_a_batch_without_tokens_has_no_diagnostics() -> None:
    layout = Layout.from_padding(torch.zeros(2, 5), 5)
    query, key = _tensors(layout)
    report = _report(query, key, every_block(layout, GROUPS, BLOCK), layout)
    assert (report.most_blocks, report.sampled) == (0, 0)
    assert math.isnan(report.mean_blocks)
    assert math.isnan(report.dead)


def test_a_sample_is_spread_over_the_sequence_and_its_last_query_is_in_it() -> None:
    layout = Layout.plain(1, 100)
    query, key = _tensors(layout)
    # Only the last query leaves something out, and only from its first block is nothing caught.
    blocks = every_block(layout, GROUPS, BLOCK).blocks.clone()
    blocks[:, :, -1, 0] = -1
    selection = Selection(blocks=blocks, block_size=BLOCK)
    everything, few = _report(query, key, selection, layout), _report(query, key, selection, layout, sample=4)
    assert (everything.sampled, few.sampled) == (GROUPS, GROUPS)
    assert everything.mass == pytest.approx(few.mass)
    evenly = _report(query, key, _drawn(layout, 1, seed=0), layout, sample=10)
    # Ten of each group, but for the first, which sees one block.
    assert evenly.sampled == 9 * GROUPS


def test_autocast_does_not_round_what_is_measured() -> None:
    layout = LAYOUTS["plain"]
    query, key = _tensors(layout)
    selection = _drawn(layout, 2, seed=0)
    plain = _report(query, key, selection, layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert _report(query, key, selection, layout) == plain
