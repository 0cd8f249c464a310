"""Exact attention over a selection on the CPU, forward and backward, at a cost proportional to the selection.

Contract: see `attend_forward` and `attend_backward`; autograd and argument checks are in `ops.py`, and the equations in
`reference.py`. The work is done key block by key block within chunks of queries (`tiles.py`). The queries that chose a block are
gathered and multiplied with it, so every product is dense and nothing outside the selection is read. There are two exceptions:
a few queries against many keys (decoding) gather their keys instead, and short sequences use the dense map (`dense_map.py`)
if that is cheaper and fits. Logits, sums and gradients are float32 (float64 for float64).

Source: MSA (arXiv 2606.13392) for the outer loop over keys by the reverse of the selection; FlashAttention-2 (arXiv 2307.08691,
algorithm 2) for the backward pass, which recomputes P from the log-sum-exp.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D width, K slots, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.cpu import dense_map
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

# The number of elements of gathered keys, for a few queries against many keys: 16 MiB in float32.
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
    """Compute softmax(scale · q kᵀ + bias) v over the visible keys of the selected blocks.

    Args:
        query: (B, H, T, D), any strides; float64, float32, bfloat16 or float16.
        key, value: (B, G, S, D) of the same dtype.
        selection: the blocks (B, G, T, K).
        layout: the sequences.
        scale: factor for the logits.
        bias: (B, G, T, K), added to the logits of a slot's keys.

    Returns:
        Output (B, H, T, D) in the query's dtype and log-sum-exp (B, H, T); 0 and −∞ for a query that sees nothing.
    """
    batch, heads, columns, width = query.shape
    if dense_map.attends_short(selection, layout, heads):
        return dense_map.attend_forward(query, key, value, selection, layout, scale=scale, bias=bias)
    groups = key.shape[1]
    dtype = working_dtype(query.dtype)
    # Store tokens before heads in memory. Then the output of a chunk is contiguous, and so is the (B, T, H·D) view that the
    # layer's output projection needs.
    output = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    lse = query.new_full((batch, columns, heads), -torch.inf, dtype=dtype).transpose(1, 2)
    # Few queries against many keys, as in decoding, gather their own keys instead of going through all blocks.
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
                of_heads = (span.row, slice(group * group_heads, (group + 1) * group_heads), chunk.columns)
                queries = rows_of_heads(query[of_heads], dtype).mul_(scale * LOG2E)
                entry_bias = _of_entries(bias, span, group, chunk, dtype)
                chunk_output, chunk_lse = _chunk_forward(queries, keys, values, entry_bias, chunk, group_heads, scratch)
                output[of_heads] = chunk_output.view(-1, group_heads, width).transpose(0, 1)
                lse[of_heads] = chunk_lse.T
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
    """Compute the gradients of `attend_forward`.

    Args:
        grad_output: (B, H, T, D), the gradient of the output.
        query, key, value, selection, layout, scale, bias: the arguments of `attend_forward`.
        output, lse: the results of `attend_forward`.

    Returns:
        The gradients of query, key, value and bias (None without a bias), each in its dtype; 0 for padding.
    """
    batch, heads, columns, width = query.shape
    if dense_map.attends_short(selection, layout, heads):
        tensors = (grad_output, query, key, value, output, lse)
        return dense_map.attend_backward(*tensors, selection, layout, scale=scale, bias=bias)
    groups, group_heads = key.shape[1], heads // key.shape[1]
    dtype = working_dtype(query.dtype)
    size = selection.block_size
    d_query = query.new_zeros(batch, columns, heads, width).transpose(1, 2)
    d_key, d_value = (tensor.new_zeros(tensor.shape) for tensor in (key, value))
    d_bias = None if bias is None else bias.new_zeros(bias.shape)
    scratch = Scratch(query.device, dtype)
    for span in layout.spans:
        within = slice(span.key_start, span.key_start + span.keys)
        for group in range(groups):
            keys = keys_of_span(key[span.row, group], span, size, dtype)
            values = keys_of_span(value[span.row, group], span, size, dtype)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for chunk in chunks(selection, span, group, group_heads, merge=bias is None):
                of_heads = (span.row, slice(group * group_heads, (group + 1) * group_heads), chunk.columns)
                queries, grads = (rows_of_heads(tensor[of_heads], dtype) for tensor in (query, grad_output))
                # delta = Σ P · dP of a query, which equals Σ grads · output and so needs no map (FlashAttention-2).
                delta = (grads * rows_of_heads(output[of_heads], dtype)).view(-1, group_heads, width).sum(dim=-1)
                entry_bias = _of_entries(bias, span, group, chunk, dtype)
                d_queries, d_entries = _chunk_backward(
                    queries.mul_(scale * LOG2E),
                    grads,
                    lse[of_heads].masked_fill(lse[of_heads] == -torch.inf, 0).T * LOG2E,
                    delta,
                    (keys, values),
                    (d_keys, d_values),
                    entry_bias,
                    chunk,
                    scratch,
                )
                d_query[of_heads] = d_queries.mul_(scale).view(-1, group_heads, width).transpose(0, 1)
                if d_bias is not None:
                    d_bias[span.row, group, chunk.columns][chunk.query, chunk.slot] = d_entries.to(d_bias.dtype)
            # d_keys was summed from queries that contain the factor log2 e, which ln 2 removes.
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
    """Return the output (T, R·D) and the log-sum-exp (T, R) of scaled queries (T, R·D), with a bias (E,) or None."""
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
    # The highest logit contributes 1 to the sum, so only queries that see nothing have a smaller sum, and the clamp makes their
    # output 0.
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
    """Add to d_keys and d_values, and return the unscaled query gradients (T, R·D) and the gradients by entry (E,).

    With P = 2^(logits − lse), dP = grads · valuesᵀ and delta = Σ grads · output (T, R), dlogits = P · (dP − delta).
    """
    (keys, values), (d_keys, d_values) = keys_values, d_keys_values
    heads, width = delta.shape[1], keys.shape[1]
    gathered = scratch("gathered", chunk.longest, heads * width)
    gathered_grads = scratch("gathered_grads", chunk.longest, heads * width)
    entry_lse, entry_delta = lse[chunk.query][..., None], delta[chunk.query][..., None]
    # Subtracting the bias from the log-sum-exp has the same effect on P as adding it to the logits.
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
    """Return the bias of each entry, (E,), for logits to base 2."""
    return None if bias is None else bias[span.row, group, chunk.columns][chunk.query, chunk.slot].to(dtype) * LOG2E


def _is_few(span: Span, selection: Selection) -> bool:
    """Whether gathering each query's own keys reads fewer keys than going through the whole sequence."""
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
    """Write the output and log-sum-exp of the spans' queries, each of which gathers its own keys."""
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
                key_index = (blocks[..., None] * size + inside).flatten(1)
                seen = (key_index <= position[:, None]) & (blocks >= 0).repeat_interleave(size, dim=1)
                # Do not read keys that are not seen, which may be NaN: gather the query's first visible key instead.
                lowest = torch.where(seen, key_index, position[:, None]).amin(dim=1, keepdim=True)
                key_index = torch.where(seen, key_index, lowest).flatten()
                heads = slice(group * group_heads, (group + 1) * group_heads)
                rows = query[span.row, heads, columns].transpose(0, 1).to(dtype)
                keys = key[span.row, group, within].index_select(0, key_index).to(dtype).view(count, -1, key.shape[3])
                logits = (rows @ keys.transpose(1, 2)).mul_(scale)
                if bias is not None:
                    logits += bias[span.row, group, columns].to(dtype).repeat_interleave(size, dim=1)[:, None]
                logits.masked_fill_(~seen[:, None], -torch.inf)
                total = logits.logsumexp(dim=-1)
                weights = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp_()
                values = value[span.row, group, within].index_select(0, key_index).to(dtype)
                values = values.view(count, -1, key.shape[3])
                output[span.row, heads, columns] = (weights @ values).transpose(0, 1).to(output.dtype)
                lse[span.row, heads, columns] = total.T
