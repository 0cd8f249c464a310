"""Block-sparse attention, its alignment loss and its selection while sequences are short, on the CPU: on the dense map.

Going through a selection key block by key block takes B · G · N small products, which at first cost more than they save. Here
some query columns of every row at once are multiplied with the keys up to the last that any of them sees, and what was not
selected is hidden (`key_slots.py`).

Contract: the functions are those of `attend.py`, `align.py` and `select.py`, which ask `attends_short` and
`scores_short`. The only difference: keys that nobody selected are multiplied too, so they must be finite, as for dense
attention; padding may hold anything here as there.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D width, I index width, K slots, W block
size, N blocks, t query columns at a time, s places that they see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.cpu import key_slots as places
from sparsort.kernels.blocksparse.cpu import tiles
from sparsort.kernels.blocksparse.cpu.key_slots import Grid, Hiding, Piece
from sparsort.kernels.blocksparse.cpu.tiles import LN2, LOG2E, Scratch, working_dtype
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

# What a tile of the long way costs beside its products, in logits: 0.28 ms for selection, both passes and alignment, of which
# a logit takes 20 to 28 ns (one thread, D = 16 to 64, T = 256 to 2048, W = 16 to 128).
_TILE_LOGITS = 10_000
# A selected logit of the long way takes this many times one of the dense map.
_GATHERED = 1.2


def attends_short(selection: Selection, layout: Layout, heads: int) -> bool:
    """Whether attention and alignment are cheaper on the dense map, and that fits: no more is held than the long way holds.

    Args:
        heads: H.
    """
    _, groups, columns, slots = selection.blocks.shape
    size = selection.block_size
    if not scores_short(layout, heads, size):
        return False
    _, blocks = places.first_blocks(layout, size)
    dense = layout.batch * heads * columns * (blocks * size + places.COLUMNS) / 2
    long = 0.0
    for span in layout.spans:
        chosen = min(slots * size, span.keys)
        # The first queries see less than they may choose.
        selected = heads * chosen * (span.keys - chosen / 2)
        long += _GATHERED * selected + _TILE_LOGITS * groups * -(-span.keys // size)
    return dense <= long


def scores_short(layout: Layout, heads: int, block_size: int) -> bool:
    """Whether so many heads' map of a run of columns, and of all columns by block, fit into what a chunk may hold."""
    if not layout.spans or layout.queries != layout.keys:
        return False
    _, blocks = places.first_blocks(layout, block_size)
    # By the places, of which many short sequences in a row have more than there are columns.
    per_head = max(max(places.COLUMNS, block_size) * blocks * block_size, layout.queries * blocks)
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
    """See `cpu.attend.attend_forward`."""
    batch, heads, columns, width = query.shape
    groups = key.shape[1]
    dtype = working_dtype(query.dtype)
    grid = Grid.of(layout, selection.block_size, query.device)
    hiding = Hiding(grid, selection, dtype, -torch.inf, bias)
    keys, values = grid.keys(key, dtype), grid.keys(value, dtype)
    # Tokens before heads, as the layer's next step wants it.
    output = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    lse = query.new_full((batch, heads, columns), -torch.inf, dtype=dtype)
    scratch = Scratch(query.device, dtype)
    for piece in grid.pieces():
        queries = grid.rows(query, piece, groups, dtype).mul_(scale * LOG2E)
        weights = _logits(queries, keys, piece, hiding, groups, scratch("weights", *_map(queries, grid, piece)))
        peak, total = _peak_and_sum(weights)
        made = torch.bmm(weights, values[:, : weights.shape[2]]).div_(total.clamp_min(1))
        output[:, :, piece.columns] = made.view(batch, heads, -1, width)
        lse[:, :, piece.columns] = (peak + total.log2()).mul_(LN2).view(batch, heads, -1)
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
    """See `cpu.attend.attend_backward`."""
    batch, heads, columns, width = query.shape
    groups = key.shape[1]
    dtype = working_dtype(query.dtype)
    grid = Grid.of(layout, selection.block_size, query.device)
    hiding = Hiding(grid, selection, dtype, -torch.inf, bias)
    keys, values = grid.keys(key, dtype), grid.keys(value, dtype)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    d_query = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    d_blocks = None if bias is None else keys.new_zeros(batch, groups, columns, grid.blocks + 1)
    scratch = Scratch(query.device, dtype)
    for piece in grid.pieces():
        queries = grid.rows(query, piece, groups, dtype).mul_(scale * LOG2E)
        grads = grid.rows(grad_output, piece, groups, dtype)
        delta = (grads * grid.rows(output, piece, groups, dtype)).sum(dim=-1, keepdim=True)
        shape = _map(queries, grid, piece)
        weights = _logits(queries, keys, piece, hiding, groups, scratch("weights", *shape))
        weights.sub_(_to_base_2(grid.rows(lse[..., None], piece, groups, dtype))).exp2_()
        d_values[:, : shape[2]].baddbmm_(weights.transpose(1, 2), grads)
        d_logits = torch.bmm(grads, values[:, : shape[2]].transpose(1, 2), out=scratch("d_logits", *shape))
        d_logits.sub_(delta).mul_(weights)
        d_keys[:, : shape[2]].baddbmm_(d_logits.transpose(1, 2), queries)
        made = torch.bmm(d_logits, keys[:, : shape[2]]).mul_(scale)
        d_query[:, :, piece.columns] = made.view(batch, heads, -1, width)
        if d_blocks is not None:
            by_block = d_logits.view(batch, groups, heads // groups, -1, piece.blocks, grid.size)
            d_blocks[:, :, piece.columns, : piece.blocks] = by_block.sum(dim=(2, 5))
    # The queries that made it were scaled to base 2.
    d_key, d_value = grid.key_gradient(d_keys.mul_(LN2), key), grid.key_gradient(d_values, value)
    d_bias = None if d_blocks is None or bias is None else d_blocks.gather(-1, hiding.places).to(bias.dtype)
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
    """See `cpu.align.align_forward`."""
    batch, groups, columns, _ = index_query.shape
    heads = query.shape[1] // groups
    dtype = torch.promote_types(working_dtype(query.dtype), working_dtype(index_query.dtype))
    grid = Grid.of(layout, selection.block_size, query.device)
    # Finite, as its product with P's 0 must be 0.
    hidden = torch.finfo(dtype).min / 4
    hiding = Hiding(grid, selection, dtype, hidden, None)
    keys, index_keys = grid.keys(key, dtype), grid.keys(index_key[:, None], dtype)
    rows = query.new_zeros(batch, groups, columns, dtype=dtype)
    d_index_query = index_query.new_zeros(index_query.shape) if gradients else None
    d_index_keys = torch.zeros_like(index_keys)
    scratch = Scratch(query.device, dtype)
    for piece in grid.pieces():
        queries = grid.rows(query, piece, groups, dtype).mul_(scale * LOG2E)
        shape = _map(queries, grid, piece)
        weights = _logits(queries, keys, piece, hiding, groups, scratch("weights", *shape))
        if lse is None:
            peak, total = _peak_and_sum(weights)
            weights.div_(total.mul_(heads)).masked_fill_(peak < hidden / 2, 0)
        else:
            given = _to_base_2(grid.rows(lse[..., None], piece, groups, dtype))
            weights.sub_(given.add_(math.log2(heads))).exp2_()
        by_head = weights.view(batch, groups, heads, -1, shape[2]).unbind(2)
        teacher = by_head[0]
        for other in by_head[1:]:
            teacher.add_(other)
        # One index head of keys: the groups' queries are rows of one product.
        queries = grid.rows(index_query, piece, 1, dtype).mul_(index_scale * LOG2E)
        student = _logits(queries, index_keys, piece, hiding, groups, scratch("student", *_map(queries, grid, piece)))
        peak, total = _peak_and_sum(scratch("terms", *student.shape).copy_(student))
        student.sub_((peak + total.log2()).masked_fill_(peak < hidden / 2, 0))
        log_student = student.view(teacher.shape)
        terms = torch.clamp(teacher, torch.finfo(dtype).tiny, out=scratch("terms", *teacher.shape))
        terms.log2_().sub_(log_student).mul_(teacher)
        rows[:, :, piece.columns] = _row_sums(terms).mul_(LN2)[..., 0]
        if d_index_query is None:
            continue
        log_student.exp2_().sub_(teacher)
        d_index_keys[:, : shape[2]].baddbmm_(student.transpose(1, 2), queries)
        made = torch.bmm(student, index_keys[:, : shape[2]]).mul_(index_scale)
        d_index_query[:, :, piece.columns] = made.view(batch, groups, -1, made.shape[2]).to(index_query.dtype)
    if d_index_query is None:
        return rows, None, None
    return rows, d_index_query, grid.key_gradient(d_index_keys.mul_(LN2), index_key[:, None])[:, 0]


@torch.no_grad()
def index_select(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """See `cpu.select.index_select`."""
    batch, groups, columns, _ = index_query.shape
    dtype = working_dtype(index_query.dtype)
    grid = Grid.of(layout, block_size, index_query.device)
    keys = grid.keys(index_key[:, None], dtype)
    best = keys.new_full((batch, grid.blocks, groups, columns), -torch.inf)
    scratch = Scratch(index_query.device, dtype)
    for piece in grid.pieces():
        queries = grid.rows(index_query, piece, 1, dtype).mul_(scale)
        places = piece.blocks * block_size
        # Keys before queries: then the maximum of a block runs over whole rows.
        scores = scratch("scores", batch, places, queries.shape[1])
        torch.bmm(keys[:, :places], queries.transpose(1, 2), out=scores)
        by_key = scores.view(batch, places, groups, -1)
        by_key[:, piece.tail :] += grid.future(piece, -torch.inf, dtype).transpose(1, 2)[:, :, None]
        by_block = by_key.view(batch, piece.blocks, block_size, groups, -1)
        found = by_block.amax(dim=2)
        # Rare: a token's score that is no finite number counts as lowest.
        if not bool((found < torch.inf).all()):
            found = by_block.masked_fill(~by_block.isfinite(), -torch.inf).amax(dim=2)
        best[:, : piece.blocks, :, piece.columns] = found
    scores, own = best.permute(0, 2, 3, 1), layout.position(best.device) // block_size
    if grid.first_block is not None:
        own_blocks = grid.first_block[..., None] + torch.arange(layout.blocks(block_size), device=best.device)
        # What lies after a sequence's last block is not visible and is not looked at.
        index = own_blocks.clamp_(max=grid.blocks - 1)[:, None].expand(-1, groups, -1, -1)
        scores = scores.gather(-1, index)
    return Selection(blocks=choose(scores, own[:, None], budget), block_size=block_size)


def _map(queries: Tensor, grid: Grid, piece: Piece) -> tuple[int, int, int]:
    return queries.shape[0], queries.shape[1], piece.blocks * grid.size


def _logits(queries: Tensor, keys: Tensor, piece: Piece, hiding: Hiding, groups: int, out: Tensor) -> Tensor:
    """Scaled queries (B · groups, R · t, D), or those of all groups together (B, groups · t, I), times keys; (…, s)."""
    torch.bmm(queries, keys[:, : out.shape[2]].transpose(1, 2), out=out)
    count = piece.columns.stop - piece.columns.start
    hiding.add_to(out.view(hiding.places.shape[0], groups, -1, count, out.shape[2]), piece)
    return out


def _peak_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax as far as it goes in place: logits become 2^(logits − peak). Peak and sum, (…, 1); the sums are not divided by."""
    # Below every logit: a row that sees nothing becomes 0, whose sum is 0 and whose log-sum-exp is −∞.
    peak = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return peak, _row_sums(logits.sub_(peak).exp2_())


def _row_sums(values: Tensor) -> Tensor:
    """(…, 1), by a product with ones, because sums along short rows are slow."""
    width = values.shape[-1]
    return torch.mv(values.reshape(-1, width), values.new_ones(width)).view(*values.shape[:-1], 1)


def _to_base_2(lse: Tensor) -> Tensor:
    """In place; 0 for −∞, whose row is hidden throughout."""
    return lse.mul_(LOG2E).masked_fill_(lse == -torch.inf, 0)
