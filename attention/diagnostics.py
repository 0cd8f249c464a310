"""Measures of a selection in training: how much attention it captures, which blocks it never takes, and its size.

Contract: nothing is modified, and no gradients are recorded. Mass and recall compare the selection with the dense attention of
the same queries and keys, for a sample of queries spread over each sequence. Queries that take every block they see are
excluded, because they have nothing to choose and would inflate both measures.

- mass: share of the heads' dense attention that falls on the chosen blocks, mean over heads and queries.
- recall: |chosen ∩ top| / |chosen|, where |top| = |chosen|. Top is the query's own block, which every selector takes, and the
  other blocks with the most dense attention, mean over the group's heads (MSA's block recall, arXiv 2606.13392).
- dead: share of the blocks that no query took, among those that a query of a later block could have taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.attention.selectors.chunks import full_precision
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.selection import Selection


@dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """The measures of one layer on one batch.

    Attributes:
        mass, recall: means over the sampled queries that had to choose; NaN if no query had to.
        mean_blocks, most_blocks: mean and maximum number of blocks per query that is not padding.
        dead: share of blocks that no query of a later block took; NaN if there was no such query.
        sampled: number of queries that mass and recall are averaged over, all groups together.
    """

    mass: float
    recall: float
    mean_blocks: float
    most_blocks: int
    dead: float
    sampled: int


@torch.no_grad()
def report_selection(
    query: Tensor, key: Tensor, selection: Selection, layout: Layout, *, scale: float, sample: int = 64
) -> SelectionReport:
    """Measure one layer's selection.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        selection: the blocks of the layout's queries.
        layout: the position of each sequence in the batch.
        scale: factor for the attention logits.
        sample: number of queries per sequence to compare with dense attention, evenly spread. This costs sample × S scores per
            head.
    """
    # Padding has the position −1 and chooses nothing, so it would lower the mean.
    counts = selection.counts[layout.position(query.device)[:, None].expand_as(selection.counts) >= 0]
    with full_precision(query.device):
        measures = [_mass_and_recall(query, key, selection, span, scale, sample) for span in layout.spans]
    # torch.cat refuses an empty list, which is what a batch without sequences gives.
    empty = torch.zeros(0, device=query.device)
    mass = torch.cat([empty, *(mass for mass, _ in measures)])
    recall = torch.cat([empty, *(recall for _, recall in measures)])
    return SelectionReport(
        mass=float(mass.double().mean()),
        recall=float(recall.double().mean()),
        mean_blocks=float(counts.double().mean()),
        most_blocks=int(counts.max()) if counts.numel() else 0,
        dead=_dead(selection, layout),
        sampled=mass.numel(),
    )


def _mass_and_recall(
    query: Tensor, key: Tensor, selection: Selection, span: Span, scale: float, sample: int
) -> tuple[Tensor, Tensor]:
    """Return mass and recall of those sampled queries of one sequence that had to choose."""
    offsets = torch.linspace(0, span.queries - 1, min(sample, span.queries)).round().long().to(query.device)
    columns, positions = offsets + span.query_start, offsets + span.keys - span.queries
    chosen = selection.blocks[span.row][:, columns].long()  # (G, t, K)
    keys = key[span.row, :, span.key_start : span.key_start + span.keys]
    share = _block_shares(query[span.row][:, columns], keys, positions, scale, selection.block_size)
    own = torch.div(positions, selection.block_size, rounding_mode="floor").expand(share.shape[:-1])
    taken = (chosen >= 0).sum(dim=-1)
    # Unused slots (−1) scatter into one extra column, which is dropped.
    picked = torch.zeros(*share.shape[:-1], share.shape[-1] + 1, dtype=torch.bool, device=share.device)
    picked = picked.scatter(-1, torch.where(chosen >= 0, chosen, share.shape[-1]), True)[..., :-1]
    # The query's own block counts as the top one: every selector takes it, whatever its attention.
    ranked = share.scatter(-1, own[..., None], torch.inf).sort(dim=-1, descending=True, stable=True).indices
    # The argsort of a permutation is its inverse: the rank of each block.
    top = ranked.argsort(dim=-1) < taken[..., None]
    # A query sees own + 1 blocks. It had a choice only if it took some but not all of them.
    had_to = (taken > 0) & (taken < own + 1)
    mass = (share * picked).sum(dim=-1)[had_to]
    recall = ((top & picked).sum(dim=-1) / taken.clamp(min=1))[had_to]
    return mass, recall


def _block_shares(query: Tensor, key: Tensor, positions: Tensor, scale: float, block_size: int) -> Tensor:
    """Return dense attention per block, mean over the group's heads: (G, t, N) float32 from query (H, t, D), key (G, S, D)."""
    groups, keys, width = key.shape
    grouped = query.float().reshape(groups, -1, len(positions), width)
    scores = torch.einsum("grtd,gsd->grts", grouped, key.float()) * scale
    seen = torch.arange(keys, device=key.device) <= positions[:, None]
    shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=1)
    # Pad the keys to whole blocks; a block larger than the sequence is cut to it, to save memory.
    block_size = min(block_size, keys)
    padded: Tensor = torch.nn.functional.pad(shares, (0, -keys % block_size))
    return padded.reshape(groups, len(positions), -1, block_size).sum(dim=-1)


def _dead(selection: Selection, layout: Layout) -> float:
    """Return the share of blocks before the last query's own that no query of a later block took."""
    groups, width = selection.blocks.shape[1], selection.block_size
    position = layout.position(selection.blocks.device)
    dead = total = 0
    for span in layout.spans:
        columns = slice(span.query_start, span.query_start + span.queries)
        own = torch.div(position[span.row, columns], width, rounding_mode="floor")
        # A later query exists for the blocks before the last query's own.
        reachable = int(own[-1])
        if not reachable:
            continue
        chosen = selection.blocks[span.row][:, columns]
        earlier = torch.where(chosen < own[:, None], chosen, -1).flatten(1).long()
        marked = torch.zeros(groups, reachable + 1, dtype=torch.bool, device=chosen.device)
        # Slots that do not count (−1) scatter into column 0, which is dropped.
        marked.scatter_(1, earlier + 1, True)
        dead += int((~marked[:, 1:]).sum())
        total += groups * reachable
    return dead / total if total else float("nan")
