"""Other block-sparse attention on the same GPU: FlexAttention, flash-linear-attention's NSA, flash-msa.

They do different things, so each is compared with the part of ours that does the same, on shapes that it supports:

    FlexAttention   blocks shared by 128 neighbouring queries (its mask is by tile; here the blocks of the tile's last
                    query); only attending
    fla NSA         its kernel needs groups of 16 or more, so both run with half as many groups; only attending, same blocks
    flash-msa       index scores, top-k, attention and the index gradients, without the value of the loss; against all of ours

A figure above 1 means that ours is that many times as fast as the peer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sparse_attention_report import SparseReport
from sparse_attention_setting import Inputs, Setting, Step, choose, make_inputs, sparse_step
from sparse_attention_timing import Clock, in_turns, phases_in_words, ratio
from torch import Tensor

from sparsort.kernels.blocksparse.selection import Selection

_ATTENDING = ("attend", "attend_backward")


def add_peers(report: SparseReport, setting: Setting, tokens: int, rounds: int, dtype: torch.dtype) -> None:
    """Add forward and backward of every peer that is installed and runs; for the others, the reason."""
    place: dict[str, Any] = {"device": report.device, "dtype": dtype}
    narrow = replace(setting, groups=max(setting.groups // 2, 1))
    peers: tuple[tuple[str, str, Setting, Callable[[Inputs, Setting], Step], tuple[str, ...] | None], ...] = (
        ("flex_attention", "torch.nn.attention.flex_attention", setting, _flex_step, _ATTENDING),
        ("fla_nsa", "fla", narrow, _nsa_step, _ATTENDING),
        ("flash_msa", "flash_msa", setting, _flash_msa_step, None),
    )
    for name, package, shape, make, wanted in peers:
        if importlib.util.find_spec(package) is None:
            report.notes.append(f"{name}: not installed")
            continue
        inputs = make_inputs(shape, tokens, **place)
        try:
            steps: dict[str, Callable[[Clock], object]] = {
                "peer": make(inputs, shape),
                "ours": partial(sparse_step, inputs, shape),
            }
            kept = in_turns(steps, rounds, warm=3)
        # The report counts missing memory by itself (`SparseReport.attempt`).
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  any error of a peer is a result
            report.notes.append(
                f"{name} at {tokens} tokens: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            )
            continue
        found = ratio(kept["peer"], kept["ours"], wanted)
        note = f"{found}; {shape.words}; theirs: {phases_in_words(kept['peer'])}"
        report.add(f"over_{name}_{tokens}", found.median, "x", note=note)


def _flex_step(inputs: Inputs, setting: Setting) -> Step:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    numbers, full, own = shared_blocks(choose(inputs, setting), setting.heads)

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    tokens = inputs.query.shape[2]
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(numbers),
        own,
        numbers,
        full,
        BLOCK_SIZE=setting.block_size,
        mask_mod=causal,
        seq_lengths=(tokens, tokens),
    )
    # Without compilation, FlexAttention computes the whole score matrix.
    compiled: Any = torch.compile(flex_attention)

    def step(clock: Clock) -> None:
        with clock("forward"):
            output = compiled(inputs.query, inputs.key, inputs.value, block_mask=mask, enable_gqa=True)
        with clock("backward"):
            torch.autograd.grad(output, (inputs.query, inputs.key, inputs.value), inputs.grad)

    return step


def shared_blocks(selection: Selection, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A selection by tiles of `block_size` queries: each tile has the blocks of its last query.

    Returns:
        All int32: the number of blocks before its own for each tile, (B, H, tiles); their block numbers, at the start of rows
        of length `tiles`, (B, H, tiles, tiles); and the tile's own block, of which a query sees a part, in rows of that length.
    """
    # The last query of each tile.
    last = selection.blocks[:, :, selection.block_size - 1 :: selection.block_size]
    batch, groups, tiles, _ = last.shape
    own = torch.arange(tiles, dtype=torch.int32, device=last.device)[:, None]
    # One further column takes the unused slots and the tile's own block.
    chosen = torch.zeros(batch, groups, tiles, tiles + 1, dtype=torch.bool, device=last.device)
    chosen.scatter_(-1, torch.where((last >= 0) & (last != own), last, tiles).long(), True)
    chosen = chosen[..., :tiles].repeat_interleave(heads // groups, dim=1)
    # A stable sort puts the chosen block numbers first, in rising order.
    order = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    first = torch.zeros_like(order)
    first[..., :1] = own
    return chosen.sum(dim=-1, dtype=torch.int32), order, first


def _nsa_step(inputs: Inputs, setting: Setting) -> Step:
    # Imported by name, because the package is optional and has no types.
    parallel_nsa = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa
    selection = choose(inputs, setting)
    # Tokens come before heads, and used slots first, as in the result of `choose`.
    indices = selection.blocks.clamp(min=0).transpose(1, 2).contiguous().long()
    counts = selection.counts.transpose(1, 2).contiguous().long()
    leaves = [
        tensor.detach().transpose(1, 2).contiguous().requires_grad_()
        for tensor in (inputs.query, inputs.key, inputs.value)
    ]
    grad = inputs.grad.transpose(1, 2).contiguous()

    def step(clock: Clock) -> None:
        with clock("forward"):
            output = parallel_nsa(*leaves, block_indices=indices, block_counts=counts, block_size=setting.block_size)
        with clock("backward"):
            torch.autograd.grad(output, leaves, grad)

    return step


def _flash_msa_step(inputs: Inputs, setting: Setting) -> Step:
    flash_msa_func = importlib.import_module("flash_msa").flash_msa_func
    given = (inputs.index_query, inputs.index_key[:, None], inputs.query, inputs.key, inputs.value)
    leaves = [tensor.detach().contiguous().requires_grad_() for tensor in given]
    # flash-msa takes the budget in keys.
    keys = setting.blocks * setting.block_size

    def step(clock: Clock) -> None:
        with clock("forward"):
            output, loss = flash_msa_func(*leaves, keys, setting.head_dim**-0.5)
        with clock("backward"):
            torch.autograd.grad([output, loss], leaves, [inputs.grad, torch.ones_like(loss)])

    return step
