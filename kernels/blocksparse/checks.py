"""The checks of the arguments of block-sparse attention, which every implementation relies on.

Contract: the checks read shapes, dtypes and devices but no values, because reading values would stall a GPU. Whether queries can
see their selected blocks is therefore not checked here.

Legend: B batch, T query columns, S key columns, H query heads, G groups = key/value heads, D head width, I index width,
K slots.
"""

from __future__ import annotations

from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection
from sparsort.kernels.sparsity.checks import FLOAT_DTYPES


def check_layout(layout: Layout) -> None:
    """Check that the argument is a `Layout`.

    Raises:
        SparsortError: it is not.
    """
    if not isinstance(layout, Layout):
        raise SparsortError(
            f"layout must be a Layout, got {type(layout).__name__}; make one by Layout.plain(batch, queries), or by "
            "Layout.from_padding, packed or from_lengths."
        )


def check_heads(query: Tensor, key: Tensor, layout: Layout, value: Tensor | None = None) -> None:
    """Check `query` (B, H, T, D), `key` and `value` (B, G, S, D): one dtype, one device, and H a multiple of G.

    Raises:
        SparsortError: they do not fit each other or the layout.
    """
    check_layout(layout)
    check_tensor("query", query, (layout.batch, None, layout.queries, None))
    heads, width = query.shape[1], query.shape[3]
    check_tensor("key", key, (layout.batch, None, layout.keys, width), like=("query", query))
    groups = key.shape[1]
    if value is not None:
        check_tensor("value", value, tuple(key.shape), like=("query", query))
    if groups == 0 or heads == 0 or heads % groups:
        raise SparsortError(
            f"{heads} query heads cannot be divided into {groups} groups, one for each key/value head; expected the number of "
            "heads to be a multiple of the number of groups. Check the head axes (axis 1) of query and key."
        )
    _check_width("query", width)


def check_index(
    index_query: Tensor, index_key: Tensor, layout: Layout, groups: int | None = None, query: Tensor | None = None
) -> None:
    """Check `index_query` (B, G, T, I) and `index_key` (B, S, I): one dtype and one device, those of `query` if given.

    Raises:
        SparsortError: they do not fit each other or the layout.
    """
    check_layout(layout)
    like = None if query is None else ("query", query)
    check_tensor("index_query", index_query, (layout.batch, groups, layout.queries, None), like=like)
    width = index_query.shape[3]
    check_tensor("index_key", index_key, (layout.batch, layout.keys, width), like=("index_query", index_query))
    if index_query.shape[1] == 0:
        raise SparsortError("index_query has no groups; expected one group (axis 1) for each key/value head.")
    _check_width("index_query", width)


def check_selection(selection: Selection, query: Tensor, key: Tensor, layout: Layout) -> None:
    """Check that the selection has the layout's rows and queries and the key's groups, and is on the query's device.

    Raises:
        SparsortError: it does not fit.
    """
    if not isinstance(selection, Selection):
        raise SparsortError(
            f"selection must be a Selection, got {type(selection).__name__}; use the result of index_select, or wrap your own "
            "blocks as Selection(blocks=…, block_size=…)."
        )
    sizes, expected = tuple(selection.blocks.shape[:3]), (layout.batch, key.shape[1], layout.queries)
    if sizes != expected:
        raise SparsortError(
            f"the selection has (rows, groups, queries) = {sizes}; expected {expected}, from the layout and the key. Select "
            "again with this layout."
        )
    if selection.blocks.device != query.device:
        raise SparsortError(
            f"the selection is on {selection.blocks.device} and the query on {query.device}; move them to one device."
        )


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *,
    like: tuple[str, Tensor] | None = None,
    any_float: bool = False,
) -> None:
    """Check that an argument is a floating-point tensor of the given shape, with the device and dtype of another tensor.

    Args:
        name: name of the argument, for the message.
        tensor: the argument.
        shape: the expected shape; None stands for any size.
        like: name and value of the tensor whose device and dtype it must have.
        any_float: whether its dtype may differ from that tensor's.

    Raises:
        SparsortError: the argument does not fit.
    """
    if not isinstance(tensor, Tensor):
        raise SparsortError(
            f"{name} must be a torch tensor, got {type(tensor).__name__}. Convert it with torch.as_tensor."
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise SparsortError(
            f"{name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64. Convert it with .float()."
        )
    fits = len(tensor.shape) == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise SparsortError(
            f"{name} has shape {tuple(tensor.shape)}; expected ({expected}), from the layout and the tensors before it."
        )
    if like is None:
        return
    other_name, other = like
    if tensor.device != other.device:
        raise SparsortError(
            f"{name} is on {tensor.device} and {other_name} on {other.device}; move them to one device."
        )
    if tensor.dtype != other.dtype and not any_float:
        raise SparsortError(
            f"{name} is {tensor.dtype} and {other_name} is {other.dtype}; cast them to one dtype, or run under torch.autocast."
        )


def _check_width(name: str, width: int) -> None:
    if width == 0:
        raise SparsortError(f"{name} has width 0; expected a last axis of size 1 or more.")
