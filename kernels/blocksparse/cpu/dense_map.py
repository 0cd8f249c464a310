"""Block-sparse attention, its alignment loss and its selection for short sequences on the CPU, computed on the dense map.

The block-wise implementation needs B · G · N small products, which cost more than they save for short sequences. Here, a run of
query columns of all rows is multiplied with the keys up to the last one that any of these queries sees, and keys that are not
selected are hidden (`key_slots.py`).

Contract: the functions have the same interface as those of `attend.py`, `align.py` and `select.py`, which call `attends_short`
and `scores_short` to decide. There is one difference: keys that no query selected are multiplied as well, so they must be
finite, as for dense attention. Padding may still hold any values.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D width, I index width, K slots, W block
size, N blocks, t query columns at a time, s key slots that they see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.cpu import key_slots, tiles
from sparsort.kernels.blocksparse.cpu.key_slots import ColumnRun, Grid, SelectionMask
from sparsort.kernels.blocksparse.cpu.tiles import LN2, LOG2E, Scratch, working_dtype
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

# The overhead of one tile of the block-wise implementation, as a number of logits. A tile takes 0.28 ms in addition to its
# products, for selection, both passes and alignment, and a logit takes 20 to 28 ns (measured with one thread, D = 16 to 64,
# T = 256 to 2048, W = 16 to 128).
_TILE_LOGITS = 10_000
# The cost of a selected logit of the block-wise implementation, relative to a logit of the dense map.
_GATHERED = 1.2


def attends_short(selection: Selection, layout: Layout, heads: int) -> bool:
    """Whether attention and alignment are cheaper on the dense map, and need no more memory than block by block.

    Args:
        selection: the blocks (B, G, T, K).
        layout: the sequences.
        heads: H.
    """
    _, groups, columns, slots = selection.blocks.shape
    size = selection.block_size
    if not scores_short(layout, heads, size):
        return False
    _, blocks = layout.first_blocks(size)
    # Half of the square: a run of columns is multiplied only with the keys up to the last one that it sees.
    dense = layout.batch * heads * columns * (blocks * size + key_slots.COLUMNS) / 2
    blockwise = 0.0
    for span in layout.spans:
        chosen = min(slots * size, span.keys)
        # The first queries see fewer keys than they could choose.
        selected = heads * chosen * (span.keys - chosen / 2)
        blockwise += _GATHERED * selected + _TILE_LOGITS * groups * -(-span.keys // size)
    return dense <= blockwise


def scores_short(layout: Layout, heads: int, block_size: int) -> bool:
    """Whether the maps for `heads` heads fit into the memory of a chunk: a run of columns by key, and all columns by block."""
    if not layout.spans or layout.queries != layout.keys:
        return False
    _, blocks = layout.first_blocks(block_size)
    # Count key slots instead of columns: a row with many short sequences has more slots, since each sequence is padded to
    # whole blocks.
    per_head = max(max(key_slots.COLUMNS, block_size) * blocks * block_size, layout.queries * blocks)
    return layout.batch * heads * per_head <= tiles.CHUNK_ELEMENTS


@torch.no_grad()
def attend_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention; see `cpu.attend.attend_forward`."""
    batch, heads, columns, width = query.shape
    groups = key.shape[1]
    dtype = working_dtype(query.dtype)
    grid = Grid.of(layout, selection.block_size, query.device)
    mask = SelectionMask(grid, selection, dtype, -torch.inf, bias)
    keys, values = grid.keys(key, dtype), grid.keys(value, dtype)
    # Store tokens before heads in memory, as the layer's output projection needs them.
    output = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    lse = query.new_full((batch, heads, columns), -torch.inf, dtype=dtype)
    scratch = Scratch(query.device, dtype)
    for run in grid.column_runs():
        queries = grid.rows(query, run, groups, dtype).mul_(scale * LOG2E)
        weights = _logits(queries, keys, run, mask, groups, scratch("weights", *_map(queries, grid, run)))
        peak, total = _peak_and_sum(weights)
        mixed = torch.bmm(weights, values[:, : weights.shape[2]]).div_(total.clamp_min(1))
        output[:, :, run.columns] = mixed.view(batch, heads, -1, width)
        lse[:, :, run.columns] = (peak + total.log2()).mul_(LN2).view(batch, heads, -1)
    return output, lse


@torch.no_grad()
def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of attention; see `cpu.attend.attend_backward`."""
    batch, heads, columns, width = query.shape
    groups = key.shape[1]
    dtype = working_dtype(query.dtype)
    grid = Grid.of(layout, selection.block_size, query.device)
    mask = SelectionMask(grid, selection, dtype, -torch.inf, bias)
    keys, values = grid.keys(key, dtype), grid.keys(value, dtype)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    d_query = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    d_blocks = None if bias is None else keys.new_zeros(batch, groups, columns, grid.blocks + 1)
    scratch = Scratch(query.device, dtype)
    for run in grid.column_runs():
        queries = grid.rows(query, run, groups, dtype).mul_(scale * LOG2E)
        grads = grid.rows(grad_output, run, groups, dtype)
        delta = (grads * grid.rows(output, run, groups, dtype)).sum(dim=-1, keepdim=True)
        shape = _map(queries, grid, run)
        weights = _logits(queries, keys, run, mask, groups, scratch("weights", *shape))
        # The log-sum-exp of the forward pass normalises the logits, so no second peak and sum are needed.
        weights.sub_(_to_base_2(grid.rows(lse[..., None], run, groups, dtype))).exp2_()
        d_values[:, : shape[2]].baddbmm_(weights.transpose(1, 2), grads)
        d_logits = torch.bmm(grads, values[:, : shape[2]].transpose(1, 2), out=scratch("d_logits", *shape))
        d_logits.sub_(delta).mul_(weights)
        d_keys[:, : shape[2]].baddbmm_(d_logits.transpose(1, 2), queries)
        d_queries = torch.bmm(d_logits, keys[:, : shape[2]]).mul_(scale)
        d_query[:, :, run.columns] = d_queries.view(batch, heads, -1, width)
        if d_blocks is not None:
            by_block = d_logits.view(batch, groups, heads // groups, -1, run.blocks, grid.size)
            d_blocks[:, :, run.columns, : run.blocks] = by_block.sum(dim=(2, 5))
    # d_keys was summed from queries that contain the factor log2 e, which ln 2 removes.
    d_key, d_value = grid.key_gradient(d_keys.mul_(LN2), key), grid.key_gradient(d_values, value)
    d_bias = None if d_blocks is None or bias is None else d_blocks.gather(-1, mask.row_blocks).to(bias.dtype)
    return d_query, d_key, d_value, d_bias


@torch.no_grad()
def align_forward(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    index_scale: float,
    lse: Tensor | None = None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the alignment loss; see `cpu.align.align_forward`."""
    batch, groups, columns, _ = index_query.shape
    heads = query.shape[1] // groups
    dtype = torch.promote_types(working_dtype(query.dtype), working_dtype(index_query.dtype))
    grid = Grid.of(layout, selection.block_size, query.device)
    # Hidden keys get a large negative but finite score, because their product with P = 0 must be 0, not NaN.
    hidden = torch.finfo(dtype).min / 4
    mask = SelectionMask(grid, selection, dtype, hidden, None)
    keys, index_keys = grid.keys(key, dtype), grid.keys(index_key[:, None], dtype)
    rows = query.new_zeros(batch, groups, columns, dtype=dtype)
    d_index_query = index_query.new_zeros(index_query.shape) if gradients else None
    d_index_keys = torch.zeros_like(index_keys)
    scratch = Scratch(query.device, dtype)
    for run in grid.column_runs():
        queries = grid.rows(query, run, groups, dtype).mul_(scale * LOG2E)
        shape = _map(queries, grid, run)
        weights = _logits(queries, keys, run, mask, groups, scratch("weights", *shape))
        if lse is None:
            peak, total = _peak_and_sum(weights)
            weights.div_(total.mul_(heads)).masked_fill_(peak < hidden / 2, 0)
        else:
            # Adding log2 of the number of heads divides the probabilities by it, so that the sum over heads is their mean.
            lse_2 = _to_base_2(grid.rows(lse[..., None], run, groups, dtype))
            weights.sub_(lse_2.add_(math.log2(heads))).exp2_()
        by_head = weights.view(batch, groups, heads, -1, shape[2]).unbind(2)
        # Added in place into the first head, because a sum over an inner axis would need another map.
        teacher = by_head[0]
        for other in by_head[1:]:
            teacher.add_(other)
        # All groups share one head of index keys, so their queries are rows of one product.
        queries = grid.rows(index_query, run, 1, dtype).mul_(index_scale * LOG2E)
        student = _logits(queries, index_keys, run, mask, groups, scratch("student", *_map(queries, grid, run)))
        peak, total = _peak_and_sum(scratch("terms", *student.shape).copy_(student))
        student.sub_((peak + total.log2()).masked_fill_(peak < hidden / 2, 0))
        log_student = student.view(teacher.shape)
        terms = torch.clamp(teacher, torch.finfo(dtype).tiny, out=scratch("terms", *teacher.shape))
        terms.log2_().sub_(log_student).mul_(teacher)
        rows[:, :, run.columns] = _row_sums(terms).mul_(LN2)[..., 0]
        if d_index_query is None:
            continue
        log_student.exp2_().sub_(teacher)
        d_index_keys[:, : shape[2]].baddbmm_(student.transpose(1, 2), queries)
        d_queries = torch.bmm(student, index_keys[:, : shape[2]]).mul_(index_scale)
        d_index_query[:, :, run.columns] = d_queries.view(batch, groups, -1, d_queries.shape[2]).to(index_query.dtype)
    if d_index_query is None:
        return rows, None, None
    return rows, d_index_query, grid.key_gradient(d_index_keys.mul_(LN2), index_key[:, None])[:, 0]


@torch.no_grad()
def index_select(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """Select blocks; see `cpu.select.index_select`."""
    batch, groups, columns, _ = index_query.shape
    dtype = working_dtype(index_query.dtype)
    grid = Grid.of(layout, block_size, index_query.device)
    keys = grid.keys(index_key[:, None], dtype)
    best = keys.new_full((batch, grid.blocks, groups, columns), -torch.inf)
    scratch = Scratch(index_query.device, dtype)
    for run in grid.column_runs():
        queries = grid.rows(index_query, run, 1, dtype).mul_(scale)
        seen = run.blocks * block_size
        # With keys before queries, the maximum over a block's keys is a maximum of whole rows.
        scores = scratch("scores", batch, seen, queries.shape[1])
        torch.bmm(keys[:, :seen], queries.transpose(1, 2), out=scores)
        by_key = scores.view(batch, seen, groups, -1)
        by_key[:, run.tail :] += grid.future(run, -torch.inf, dtype).transpose(1, 2)[:, :, None]
        by_block = by_key.view(batch, run.blocks, block_size, groups, -1)
        highest = by_block.amax(dim=2)
        # A score that is not finite counts as lowest. This is rare, so it is only searched for if a maximum is NaN or ∞.
        if not bool((highest < torch.inf).all()):
            highest = by_block.masked_fill(~by_block.isfinite(), -torch.inf).amax(dim=2)
        best[:, : run.blocks, :, run.columns] = highest
    scores, own = best.permute(0, 2, 3, 1), layout.position(best.device) // block_size
    if grid.first_block is not None:
        own_blocks = grid.first_block[..., None] + torch.arange(layout.blocks(block_size), device=best.device)
        # Block numbers after a sequence's last block are clamped to stay in range; `choose` ignores them as not visible.
        index = own_blocks.clamp_(max=grid.blocks - 1)[:, None].expand(-1, groups, -1, -1)
        scores = scores.gather(-1, index)
    return Selection(blocks=choose(scores, own[:, None], budget), block_size=block_size)


def _map(queries: Tensor, grid: Grid, run: ColumnRun) -> tuple[int, int, int]:
    """Return the shape of the queries' map over the run's key slots."""
    return queries.shape[0], queries.shape[1], run.blocks * grid.size


def _logits(queries: Tensor, keys: Tensor, run: ColumnRun, mask: SelectionMask, groups: int, out: Tensor) -> Tensor:
    """Write the logits (…, s) of scaled queries to `out`, with hidden keys.

    The queries are (B · groups, R · t, D), or (B, groups · t, I) if all groups share the keys.
    """
    torch.bmm(queries, keys[:, : out.shape[2]].transpose(1, 2), out=out)
    count = run.columns.stop - run.columns.start
    mask.add_to(out.view(mask.row_blocks.shape[0], groups, -1, count, out.shape[2]), run)
    return out


def _peak_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by 2^(logits − peak), in place, and return peak and sum, (…, 1); the caller divides by the sum."""
    # The clamp keeps the peak finite. A row that sees nothing then becomes 0, with sum 0 and log-sum-exp −∞.
    peak = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return peak, _row_sums(logits.sub_(peak).exp2_())


def _row_sums(values: Tensor) -> Tensor:
    """Return the sums along the last axis: (…, 1)."""
    # A product with ones is used because torch sums along short rows slowly.
    width = values.shape[-1]
    return torch.mv(values.reshape(-1, width), values.new_ones(width)).view(*values.shape[:-1], 1)


def _to_base_2(lse: Tensor) -> Tensor:
    """Convert a log-sum-exp to base 2, in place; −∞ becomes 0, because the whole row is hidden."""
    return lse.mul_(LOG2E).masked_fill_(lse == -torch.inf, 0)
