"""Exact attention on a selection, on the CPU: forward and backward at the cost of what was selected.

Contract: see `attend_forward` and `attend_backward`; autograd and argument checks are in `ops.py`, the equations in
`reference.py`. Work goes key block by key block inside chunks of queries (`tiles.py`): the queries that chose a block are
gathered and multiplied with it, so every product is dense and nothing outside the selection is touched. A few queries against
many keys (decoding) gather their keys instead, and short sequences take the dense map (`dense_map.py`), where that is cheaper and
fits. Logits, sums and gradients are float32 (float64 for float64).

Source: MSA (arXiv 2606.13392), keys-outer over the reverse index; the backward pass recomputes P from the log-sum-exp as in
FlashAttention-2 (arXiv 2307.08691, algorithm 2).

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D width, K slots, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.cpu import dense_map as short
from sparsort.kernels.blocksparse.cpu.tiles import (
    LN2,
    LOG2E,
    Chunk,
    Scratch,
    add_product,
    chunk_logits,
    chunks,
    keys_of_span,
    peak_and_sum,
    rows_of_heads,
    working_dtype,
)
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.selection import Selection

# Elements of the keys that a few queries gather at a time.
_GATHER_ELEMENTS = 1 << 22


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
    """softmax(scale · q kᵀ + bias) v over the visible keys of the selected blocks.

    Args:
        query: (B, H, T, D), any strides; float64, float32, bfloat16 or float16.
        key, value: (B, G, S, D) of the same dtype.
        selection: of (B, G, T, K) blocks.
        bias: (B, G, T, K), added to the logits of a slot's keys.

    Returns:
        Output (B, H, T, D) in the query's dtype and log-sum-exp (B, H, T); 0 and −∞ where a query sees nothing.
    """
    batch, heads, columns, width = query.shape
    if short.attends_short(selection, layout, heads):
        return short.attend_forward(query, key, value, selection, layout, scale=scale, bias=bias)
    groups = key.shape[1]
    dtype = working_dtype(query.dtype)
    # Tokens before heads: what a chunk makes lies together, and the layer's next step wants it so.
    output = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    lse = query.new_full((batch, columns, heads), -torch.inf, dtype=dtype).transpose(1, 2)
    few = [span for span in layout.spans if _is_few(span, selection)]
    if few:
        _gathered(query, key, value, selection, few, scale, bias, output, lse)
    group_heads = heads // groups
    scratch = Scratch(query.device, dtype)
    for span in layout.spans:
        if _is_few(span, selection):
            continue
        for group in range(groups):
            keys = keys_of_span(key[span.row, group], span, selection.block_size, dtype)
            values = keys_of_span(value[span.row, group], span, selection.block_size, dtype)
            for chunk in chunks(selection, span, group, group_heads, merge=bias is None):
                place = (span.row, slice(group * group_heads, (group + 1) * group_heads), chunk.columns)
                queries = rows_of_heads(query[place], dtype).mul_(scale * LOG2E)
                entry_bias = _of_entries(bias, span, group, chunk, dtype)
                made, chunk_lse = _chunk_forward(queries, keys, values, entry_bias, chunk, group_heads, scratch)
                output[place] = made.view(-1, group_heads, width).transpose(0, 1)
                lse[place] = chunk_lse.T
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
    """Gradients of `attend_forward`'s output.

    Args:
        grad_output: (B, H, T, D).
        output, lse: what `attend_forward` returned; the other arguments are what it was given.

    Returns:
        Gradients of query, key, value and, where there is one, of bias, each in its dtype; 0 for padding.
    """
    batch, heads, columns, width = query.shape
    if short.attends_short(selection, layout, heads):
        given = (grad_output, query, key, value, output, lse)
        return short.attend_backward(*given, selection, layout, scale=scale, bias=bias)
    groups, group_heads = key.shape[1], heads // key.shape[1]
    dtype = working_dtype(query.dtype)
    size = selection.block_size
    d_query = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    d_key, d_value = (given.new_zeros(given.shape) for given in (key, value))
    d_bias = None if bias is None else bias.new_zeros(bias.shape)
    scratch = Scratch(query.device, dtype)
    for span in layout.spans:
        within = slice(span.key_start, span.key_start + span.keys)
        for group in range(groups):
            keys = keys_of_span(key[span.row, group], span, size, dtype)
            values = keys_of_span(value[span.row, group], span, size, dtype)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for chunk in chunks(selection, span, group, group_heads, merge=bias is None):
                place = (span.row, slice(group * group_heads, (group + 1) * group_heads), chunk.columns)
                queries, grads = (rows_of_heads(given[place], dtype) for given in (query, grad_output))
                delta = (grads * rows_of_heads(output[place], dtype)).view(-1, group_heads, width).sum(dim=-1)
                entry_bias = _of_entries(bias, span, group, chunk, dtype)
                d_queries, d_entries = _chunk_backward(
                    queries.mul_(scale * LOG2E),
                    grads,
                    lse[place].masked_fill(lse[place] == -torch.inf, 0).T * LOG2E,
                    delta,
                    (keys, values),
                    (d_keys, d_values),
                    entry_bias,
                    chunk,
                    scratch,
                )
                d_query[place] = d_queries.mul_(scale).view(-1, group_heads, width).transpose(0, 1)
                if d_bias is not None:
                    d_bias[span.row, group, chunk.columns][chunk.query, chunk.slot] = d_entries.to(d_bias.dtype)
            # The queries that made it were scaled to base 2.
            d_key[span.row, group, within] = d_keys[: span.keys].mul_(LN2).to(key.dtype)
            d_value[span.row, group, within] = d_values[: span.keys].to(value.dtype)
    return d_query, d_key, d_value, d_bias


def _chunk_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    chunk: Chunk,
    heads: int,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Output (T, R·D) and log-sum-exp (T, R) of scaled queries (T, R·D); bias (E,)."""
    width = keys.shape[1]
    logits = chunk_logits(queries, keys, chunk, -torch.inf, scratch)
    gathered = scratch("gathered", chunk.longest, heads * width)
    if bias is not None:
        logits += bias[:, None, None]
    peak, total = peak_and_sum(logits, chunk.query, chunk.queries)
    output = torch.zeros_like(queries)
    for tile in chunk.tiles:
        block = values[tile.key : tile.key + chunk.width]
        weights = logits[tile.start : tile.end].view(-1, chunk.width)
        add_product(output, tile, weights, block, gathered)
    # The highest logit adds 1 to the sum, so only queries that see nothing have less.
    output.view(-1, heads, width).div_(total.clamp_min(1)[..., None])
    return output, (peak + total.log2()).mul_(LN2)


def _chunk_backward(
    queries: Tensor,
    grads: Tensor,
    lse: Tensor,
    delta: Tensor,
    keys_values: tuple[Tensor, Tensor],
    d_keys_values: tuple[Tensor, Tensor],
    bias: Tensor | None,
    chunk: Chunk,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Adds to d_keys and d_values; returns the gradients of the logits: by query times keys (T, R·D), and by entry (E,).

    delta is Σ grads · output (T, R): with P = 2^(logits − lse) and dP = grads · valuesᵀ, dlogits = P · (dP − delta).
    """
    (keys, values), (d_keys, d_values) = keys_values, d_keys_values
    heads, width = delta.shape[1], keys.shape[1]
    gathered = scratch("gathered", chunk.longest, heads * width)
    gathered_grads = scratch("gathered_grads", chunk.longest, heads * width)
    entry_lse, entry_delta = lse[chunk.query][..., None], delta[chunk.query][..., None]
    if bias is not None:
        entry_lse -= bias[:, None, None]
    d_queries = torch.zeros_like(queries)
    d_entries = queries.new_empty(0 if bias is None else bias.numel())
    for tile in chunk.tiles:
        part, within = slice(tile.start, tile.end), slice(tile.key, tile.key + chunk.width)
        rows = tile.take(queries, gathered).view(-1, width)
        grad_rows = tile.take(grads, gathered_grads).view(-1, width)
        weights = scratch("weights", tile.end - tile.start, heads, chunk.width)
        d_logits = scratch("d_logits", tile.end - tile.start, heads, chunk.width)
        flat_weights, flat_d_logits = weights.view(-1, chunk.width), d_logits.view(-1, chunk.width)
        torch.mm(rows, keys[within].T, out=flat_weights)
        chunk.hide(tile, weights, -torch.inf)
        weights.sub_(entry_lse[part]).exp2_()
        torch.mm(grad_rows, values[within].T, out=flat_d_logits)
        d_values[within].addmm_(flat_weights.T, grad_rows)
        d_logits.sub_(entry_delta[part]).mul_(weights)
        d_keys[within].addmm_(flat_d_logits.T, rows)
        if bias is not None:
            d_entries[part] = d_logits.sum(dim=(1, 2))
        add_product(d_queries, tile, flat_d_logits, keys[within], gathered)
    return d_queries, d_entries


def _of_entries(bias: Tensor | None, span: Span, group: int, chunk: Chunk, dtype: torch.dtype) -> Tensor | None:
    """(E,) to base 2."""
    return None if bias is None else bias[span.row, group, chunk.columns][chunk.query, chunk.slot].to(dtype) * LOG2E


def _is_few(span: Span, selection: Selection) -> bool:
    """Whether gathering every query's keys reads less than going through all of the sequence's."""
    reads = span.queries * selection.blocks.shape[3] * selection.block_size
    return reads > 0 and (span.queries == 1 or reads <= span.keys)


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    spans: list[Span],
    scale: float,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Writes output and log-sum-exp of the spans' queries, each of which gathers its own keys."""
    dtype = working_dtype(query.dtype)
    group_heads, size, slots = query.shape[1] // key.shape[1], selection.block_size, selection.blocks.shape[3]
    step = max(_GATHER_ELEMENTS // max(slots * size * query.shape[3], 1), 1)
    inside = torch.arange(size, device=query.device)
    for span in spans:
        within = slice(span.key_start, span.key_start + span.keys)
        for start in range(0, span.queries, step):
            count = min(step, span.queries - start)
            columns = slice(span.query_start + start, span.query_start + start + count)
            first = span.keys - span.queries + start
            position = torch.arange(first, first + count, device=query.device)
            for group in range(key.shape[1]):
                blocks = selection.blocks[span.row, group, columns].long()
                place = (blocks[..., None] * size + inside).flatten(1)
                seen = (place <= position[:, None]) & (blocks >= 0).repeat_interleave(size, dim=1)
                # What is not seen is not read: the first key that is seen stands in for it.
                lowest = torch.where(seen, place, position[:, None]).amin(dim=1, keepdim=True)
                place = torch.where(seen, place, lowest).flatten()
                heads = slice(group * group_heads, (group + 1) * group_heads)
                rows = query[span.row, heads, columns].transpose(0, 1).to(dtype)
                taken = key[span.row, group, within].index_select(0, place).to(dtype).view(count, -1, key.shape[3])
                logits = (rows @ taken.transpose(1, 2)).mul_(scale)
                if bias is not None:
                    logits += bias[span.row, group, columns].to(dtype).repeat_interleave(size, dim=1)[:, None]
                logits.masked_fill_(~seen[:, None], -torch.inf)
                total = logits.logsumexp(dim=-1)
                weights = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp_()
                taken = value[span.row, group, within].index_select(0, place).to(dtype).view(count, -1, key.shape[3])
                output[span.row, heads, columns] = (weights @ taken).transpose(0, 1).to(output.dtype)
                lse[span.row, heads, columns] = total.T
