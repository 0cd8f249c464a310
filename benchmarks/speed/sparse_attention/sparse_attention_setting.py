"""The steps that `sparse_attention.py` measures: shapes, inputs, dense and sparse attention, and formulas for their work.

A step is split into phases: choose (index scores and top-k), attend, attend_backward, align (the loss and its gradients) and
align_backward (passing them on). There are two kinds of inputs. `random`: index queries and keys are Gaussian, so neighbouring
queries share blocks only by chance, which is the worst case for work in tiles. `clustered`: runs of 256 keys have one of 64
topics, each query looks for one topic, and neighbours look for the same one, as with a trained selector.

Legend: B batch, N tokens, H query heads, G groups, D head width, I index width, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from sparse_attention_timing import Clock
from torch import Tensor

from sparsort.attention.flops import AttentionShape, SparseShape
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.ops import align, attend, index_select
from sparsort.kernels.blocksparse.selection import Selection, every_block

Kind = Literal["random", "clustered"]
DenseForm = Literal["shared", "repeated"]
DENSE_FORMS: tuple[DenseForm, ...] = ("shared", "repeated")
Step: TypeAlias = Callable[[Clock], object]
_TOPICS, _RUN = 64, 256


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes of a layer."""

    heads: int
    groups: int
    head_dim: int
    index_dim: int
    block_size: int
    blocks: int

    def __str__(self) -> str:
        return f"h{self.heads}_g{self.groups}_d{self.head_dim}"

    @property
    def words(self) -> str:
        return (
            f"Hq {self.heads}, G {self.groups}, D {self.head_dim}, I {self.index_dim}, "
            f"k·B = {self.blocks}·{self.block_size}"
        )

    @property
    def budget(self) -> FixedBudget:
        return FixedBudget(blocks=self.blocks)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(heads=self.heads, groups=self.groups, head_dim=self.head_dim, index_dim=self.index_dim)

    @property
    def sparse(self) -> SparseShape:
        return SparseShape(block_size=self.block_size, blocks=self.blocks)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Leaves of the graph in the memory layout of a model: (B, N, heads, width), viewed with heads before tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    index_key: Tensor
    grad: Tensor
    layout: Layout

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.index_query, self.index_key


def make_inputs(
    setting: Setting,
    tokens: int,
    kind: Kind = "random",
    *,
    queries: int | None = None,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Query (B, H, T, D), key and value (B, G, N, D), index query (B, G, T, I), index key (B, N, I); T is N by default."""
    # The same inputs for the same length, whatever was drawn before.
    generator = torch.Generator(device).manual_seed(tokens)
    T = tokens if queries is None else queries

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def heads_first(heads: int, columns: int, width: int) -> Tensor:
        # Models compute (B, N, heads, width) and pass a transposed view, so kernels see these strides and no
        # copy.
        return normal(batch, columns, heads, width).to(dtype).transpose(1, 2)

    index_query, index_key = (
        normal(batch, T, setting.groups, setting.index_dim),
        normal(batch, tokens, setting.index_dim),
    )
    if kind == "clustered":
        # Each index key and query is its topic plus noise of half the size.
        topics = normal(_TOPICS, setting.index_dim)
        index_key = topics[_topics(batch, tokens, generator)] + index_key / 2
        wanted = torch.stack([_topics(batch, T, generator) for _ in range(setting.groups)], dim=2)
        index_query = topics[wanted] + index_query / 2
    leaves = (
        heads_first(setting.heads, T, setting.head_dim),
        heads_first(setting.groups, tokens, setting.head_dim),
        heads_first(setting.groups, tokens, setting.head_dim),
        index_query.to(dtype).transpose(1, 2),
        index_key.to(dtype),
    )
    query, key, value, index_query, index_key = (leaf.requires_grad_() for leaf in leaves)
    return Inputs(
        query=query,
        key=key,
        value=value,
        index_query=index_query,
        index_key=index_key,
        grad=heads_first(setting.heads, T, setting.head_dim),
        layout=Layout.plain(batch, T, tokens),
    )


def _topics(batch: int, columns: int, generator: torch.Generator) -> Tensor:
    """(B, columns): the topic of every token; a run of tokens shares one."""
    # Rounded up, because the last run may be shorter.
    runs = torch.randint(_TOPICS, (batch, -(-columns // _RUN)), generator=generator, device=generator.device)
    return runs.repeat_interleave(_RUN, dim=1)[:, :columns]


def dense_attend(inputs: Inputs, form: DenseForm) -> Tensor:
    """Causal SDPA, (B, H, N, D): SDPA shares the key/value heads itself, or they are repeated before it, as in transformers."""
    key, value = inputs.key, inputs.value
    if form == "repeated":
        batch, groups, tokens, width = key.shape
        repeats = inputs.query.shape[1] // groups
        # Every key/value head is repeated for the query heads of its group, as a copy in memory.
        key, value = (
            x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(batch, groups * repeats, tokens, width)
            for x in (key, value)
        )
    return F.scaled_dot_product_attention(inputs.query, key, value, is_causal=True, enable_gqa=form == "shared")


def dense_step(inputs: Inputs, form: DenseForm, clock: Clock) -> None:
    """Forward and backward of dense attention."""
    _forget(inputs)
    with clock("forward"):
        output = dense_attend(inputs, form)
    with clock("backward"):
        output.backward(inputs.grad)


def sparse_step(inputs: Inputs, setting: Setting, clock: Clock, *, full: bool = False) -> Selection:
    """Forward and backward of sparse attention and of its alignment loss; `full` attends to every block, as in the warm-up."""
    _forget(inputs)
    with clock("choose"):
        selection = choose(inputs, setting, full=full)
    with clock("attend"):
        output, lse = attend(inputs.query, inputs.key, inputs.value, selection, inputs.layout)
    with clock("align"):
        # The alignment loss reuses the log-sum-exp of the attention, so it does not compute the softmax again.
        loss = align(inputs.query, inputs.key, inputs.index_query, inputs.index_key, selection, inputs.layout, lse=lse)
    with clock("attend_backward"):
        # Two separate backward passes, so that the phases can be timed; their gradients reach different
        # tensors.
        output.backward(inputs.grad)
    with clock("align_backward"):
        loss.backward()
    return selection


def choose(inputs: Inputs, setting: Setting, *, full: bool = False) -> Selection:
    """Select blocks by index scores and top-k, or select every block."""
    if full:
        return every_block(inputs.layout, setting.groups, setting.block_size, inputs.query.device)
    return index_select(
        inputs.index_query, inputs.index_key, inputs.layout, setting.budget, block_size=setting.block_size
    )


def _forget(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def selected_pairs(selection: Selection, layout: Layout) -> int:
    """Number of (query, attended key) pairs, summed over groups; every selection includes the local block."""
    counts = selection.counts.long()
    position = layout.position(counts.device).long()[:, None]
    # In its own block, a query sees the keys up to its own position only.
    last = torch.remainder(position, selection.block_size) + 1
    return int(torch.where(position >= 0, (counts - 1) * selection.block_size + last, 0).sum())


def shared_by_neighbours(selection: Selection, neighbours: int = 128) -> float:
    """Number of distinct blocks of `neighbours` queries over the blocks of one; 1 if all choose the same."""
    blocks = selection.blocks[0]
    distinct, chosen = 0, 0.0
    for group in blocks:
        for part in group.split(neighbours):
            used = part[part >= 0]
            distinct += int(used.unique().numel())
            chosen += used.numel() / part.shape[0]
    return distinct / chosen


def selected_flops(setting: Setting, pairs: int) -> float:
    """Operations of forward and backward over `pairs` of all groups: 3.5 times 4·D for each head of a group."""
    # Forward has two products of 2·D each. Backward has five such products, 2.5 times as many.
    return 3.5 * 4 * setting.head_dim * (setting.heads // setting.groups) * pairs


def least_bytes(setting: Setting, tokens: int, element: int, *, sparse: bool) -> float:
    """Least bytes of forward and backward: every tensor is moved once in each.

    Forward: query and output (H·D), key and value (2·G·D), log-sum-exp (4·H). Backward: query, output, its gradient and the
    query's gradient (4·H·D), key, value and their gradients (4·G·D), log-sum-exp. Sparse: index queries and keys ((G + 1)·I) and
    the selection, which is written once and read twice (12·G·k).
    """
    heads, groups, width = setting.heads, setting.groups, setting.head_dim
    # The sums of the forward and backward terms in the docstring; log-sum-exp has 4 bytes and is written and read
    # once.
    moved = element * width * (6 * heads + 6 * groups) + 8 * heads
    if sparse:
        moved += element * (groups + 1) * setting.index_dim + 12 * groups * setting.blocks
    return float(tokens * moved)


def most_bytes(setting: Setting, tokens: int, element: int) -> float:
    """Bytes of keys and values in a forward pass in which no two queries share a read: 2·G·k·B·D per token."""
    keys = min(setting.blocks * setting.block_size, tokens)
    return float(tokens * 2 * setting.groups * keys * setting.head_dim * element)
