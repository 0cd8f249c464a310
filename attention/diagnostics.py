"""What a selection does in training: how much of the attention it catches, what it leaves, what it costs.

Contract: read only, without gradients. Recall and mass are measured against the dense attention of the same queries and keys,
for a sample of queries spread over each sequence, and only of those that had to choose: a query that takes every block it
sees would raise both for nothing.

- mass: share of the heads' dense attention that falls on the chosen blocks, mean over heads and queries.
- recall: |chosen ∩ top| / |chosen|, top being as many blocks with the most dense attention, mean over the group's heads
  (MSA's block recall, arXiv 2606.13392).
- dead: share of the blocks that some later block's query could have taken and none did.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


@dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """One layer, one batch.

    Attributes:
        mass, recall: over the queries that had to choose; NaN where none had to.
        mean_blocks, most_blocks: of the queries that are not padding.
        dead: NaN where no block could have been taken from afar.
        sampled: queries behind mass and recall, over all groups.
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
        selection: of the layout's queries.
        scale: of the attention's scores.
        sample: queries of each sequence to compare with dense attention, evenly spread. Cost: sample × S scores a head.
    """
    counts = selection.counts[layout.position(query.device)[:, None].expand_as(selection.counts) >= 0]
    masses, recalls = [], []
    for row, queries, positions, keys in _sampled(layout, sample):
        chosen = selection.blocks[row][:, queries].long()  # (G, t, K)
        share = _block_shares(query[row][:, queries], key[row, :, keys], positions.to(query.device), scale, selection)
        # (G, t): where there was something to choose from.
        own = torch.div(positions.to(query.device), selection.block_size, rounding_mode="floor")
        taken = (chosen >= 0).sum(dim=-1)
        open_to = taken < own + 1
        picked = torch.zeros_like(share, dtype=torch.bool)
        # A slot of −1 marks an extra column that is dropped.
        picked = torch.nn.functional.pad(picked, (0, 1))
        picked.scatter_(-1, torch.where(chosen >= 0, chosen, share.shape[-1]), True)
        picked = picked[..., :-1]
        rank = share.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        best = rank < taken[..., None]
        masses.append((share * picked).sum(dim=-1)[open_to])
        recalls.append(((best & picked).sum(dim=-1) / taken.clamp(min=1))[open_to & (taken > 0)])
    mass = torch.cat(masses) if masses else torch.zeros(0)
    recall = torch.cat(recalls) if recalls else torch.zeros(0)
    return SelectionReport(
        mass=float(mass.double().mean()),
        recall=float(recall.double().mean()),
        mean_blocks=float(counts.double().mean()),
        most_blocks=int(counts.max()) if counts.numel() else 0,
        dead=_dead(selection, layout),
        sampled=int(mass.numel()),
    )


def _sampled(layout: Layout, sample: int) -> list[tuple[int, Tensor, Tensor, slice]]:
    """(row, query columns, their positions, key columns) of each sequence."""
    found = []
    for span in layout.spans:
        steps = torch.linspace(0, span.queries - 1, min(sample, span.queries)).round().long()
        positions = steps + span.keys - span.queries
        found.append((span.row, steps + span.query_start, positions, slice(span.key_start, span.key_start + span.keys)))
    return found


def _block_shares(query: Tensor, key: Tensor, positions: Tensor, scale: float, selection: Selection) -> Tensor:
    """(G, t, N) float32: dense attention on each block, mean over the group's heads. query (H, t, D), key (G, S, D)."""
    groups, keys, width = key.shape
    grouped = query.float().reshape(groups, -1, len(positions), width)
    scores = torch.einsum("grtd,gsd->grts", grouped, key.float()) * scale
    seen = torch.arange(keys, device=key.device) <= positions[:, None]
    shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=1)
    block = selection.block_size
    padded: Tensor = torch.nn.functional.pad(shares, (0, -keys % block))
    return padded.reshape(groups, len(positions), -1, block).sum(dim=-1)


def _dead(selection: Selection, layout: Layout) -> float:
    """Of the blocks before the last one that has queries, those that no query of another block took."""
    groups, width = selection.blocks.shape[1], selection.block_size
    position = layout.position(selection.blocks.device)
    dead = total = 0
    for span in layout.spans:
        columns = slice(span.query_start, span.query_start + span.queries)
        own = torch.div(position[span.row, columns], width, rounding_mode="floor")
        reachable = int(own[-1])
        if not reachable:
            continue
        chosen = selection.blocks[span.row][:, columns]
        afar = torch.where(chosen < own[:, None], chosen, -1).flatten(1).long()
        marked = torch.zeros(groups, reachable + 1, dtype=torch.bool, device=chosen.device)
        # Column 0 takes the −1 of slots that do not count.
        marked.scatter_(1, afar + 1, True)
        dead += int((~marked[:, 1:]).sum())
        total += groups * reachable
    return dead / total if total else float("nan")
