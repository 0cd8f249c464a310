"""What a selection does in training: how much of the attention it catches, what it leaves, what it costs.

Contract: read only, without gradients. Recall and mass are measured against the dense attention of the same queries and keys,
for a sample of queries spread over each sequence, and only of those that had to choose: a query that takes every block it
sees would raise both for nothing.

- mass: share of the heads' dense attention that falls on the chosen blocks, mean over heads and queries.
- recall: |chosen ∩ top| / |chosen|; top is the query's own block, which every selector takes, and those of the others with the
  most dense attention (mean over the group's heads), as many as were chosen (MSA's block recall, arXiv 2606.13392).
- dead: share of the blocks that some later block's query could have taken and none did.
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
    with full_precision(query.device):
        caught = [_caught(query, key, selection, span, scale, sample) for span in layout.spans]
    none = torch.zeros(0, device=query.device)
    mass, recall = torch.cat([none, *(mass for mass, _ in caught)]), torch.cat([none, *(found for _, found in caught)])
    return SelectionReport(
        mass=float(mass.double().mean()),
        recall=float(recall.double().mean()),
        mean_blocks=float(counts.double().mean()),
        most_blocks=int(counts.max()) if counts.numel() else 0,
        dead=_dead(selection, layout),
        sampled=mass.numel(),
    )


def _caught(
    query: Tensor, key: Tensor, selection: Selection, span: Span, scale: float, sample: int
) -> tuple[Tensor, Tensor]:
    """Mass and recall of the sampled queries of one sequence that had to choose."""
    offsets = torch.linspace(0, span.queries - 1, min(sample, span.queries)).round().long().to(query.device)
    columns, positions = offsets + span.query_start, offsets + span.keys - span.queries
    chosen = selection.blocks[span.row][:, columns].long()  # (G, t, K)
    keys = key[span.row, :, span.key_start : span.key_start + span.keys]
    share = _block_shares(query[span.row][:, columns], keys, positions, scale, selection.block_size)
    own = torch.div(positions, selection.block_size, rounding_mode="floor").expand(share.shape[:-1])
    taken = (chosen >= 0).sum(dim=-1)
    # One column more, for the −1 of unused slots.
    picked = torch.zeros(*share.shape[:-1], share.shape[-1] + 1, dtype=torch.bool, device=share.device)
    picked = picked.scatter(-1, torch.where(chosen >= 0, chosen, share.shape[-1]), True)[..., :-1]
    ranked = share.scatter(-1, own[..., None], torch.inf).sort(dim=-1, descending=True, stable=True).indices
    top = ranked.argsort(dim=-1) < taken[..., None]
    had_to = (taken > 0) & (taken < own + 1)
    mass = (share * picked).sum(dim=-1)[had_to]
    recall = ((top & picked).sum(dim=-1) / taken.clamp(min=1))[had_to]
    return mass, recall


def _block_shares(query: Tensor, key: Tensor, positions: Tensor, scale: float, block_size: int) -> Tensor:
    """(G, t, N) float32: dense attention on each block, mean over the group's heads. query (H, t, D), key (G, S, D)."""
    groups, keys, width = key.shape
    grouped = query.float().reshape(groups, -1, len(positions), width)
    scores = torch.einsum("grtd,gsd->grts", grouped, key.float()) * scale
    seen = torch.arange(keys, device=key.device) <= positions[:, None]
    shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=1)
    block_size = min(block_size, keys)
    padded: Tensor = torch.nn.functional.pad(shares, (0, -keys % block_size))
    return padded.reshape(groups, len(positions), -1, block_size).sum(dim=-1)


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
