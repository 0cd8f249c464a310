"""What the operations of block-sparse attention take: the checks that every implementation relies on.

Contract: shapes, dtypes and devices are read, never values: reading those would stall a GPU. That the selected blocks are
ones that their queries can see is for `Selection.check`, which does read them.

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
    """A `Layout`.

    Raises:
        SparsortError: it is something else.
    """
    if not isinstance(layout, Layout):
        raise SparsortError(
            f"layout must be a Layout, got {type(layout).__name__}; make one by Layout.plain(batch, queries), from_padding, "
            "packed or from_lengths."
        )


def check_heads(query: Tensor, key: Tensor, layout: Layout, value: Tensor | None = None) -> None:
    """`query` (B, H, T, D), `key` and `value` (B, G, S, D), of one dtype on one device, and G divides H.

    Raises:
        SparsortError: they are not.
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
            f"{heads} query heads cannot be divided into {groups} groups, one for each key/value head; expected the heads to be "
            "a multiple of the groups."
        )
    _check_width("query", width)


def check_index(
    index_query: Tensor, index_key: Tensor, layout: Layout, groups: int | None = None, query: Tensor | None = None
) -> None:
    """`index_query` (B, G, T, I) and `index_key` (B, S, I), of one dtype on one device (those of `query`, if given).

    Raises:
        SparsortError: they are not.
    """
    check_layout(layout)
    like = None if query is None else ("query", query)
    check_tensor("index_query", index_query, (layout.batch, groups, layout.queries, None), like=like)
    width = index_query.shape[3]
    check_tensor("index_key", index_key, (layout.batch, layout.keys, width), like=("index_query", index_query))
    if index_query.shape[1] == 0:
        raise SparsortError("index_query has no groups; expected one for each key/value head.")
    _check_width("index_query", width)


def check_selection(selection: Selection, query: Tensor, key: Tensor, layout: Layout) -> None:
    """The selection is of the layout's rows and queries, the key's groups, and on the query's device.

    Raises:
        SparsortError: it is not.
    """
    if not isinstance(selection, Selection):
        raise SparsortError(
            f"selection must be a Selection, got {type(selection).__name__}; index_select makes one, and "
            "Selection(blocks=…, block_size=…) holds blocks that were chosen otherwise."
        )
    found, expected = tuple(selection.blocks.shape[:3]), (layout.batch, key.shape[1], layout.queries)
    if found != expected:
        raise SparsortError(
            f"the selection is of (rows, groups, queries) = {found}; expected {expected}, from the layout and the key."
        )
    if selection.blocks.device != query.device:
        raise SparsortError(
            f"the selection is on {selection.blocks.device} and the query on {query.device}; bring them to one device."
        )


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *,
    like: tuple[str, Tensor] | None = None,
    any_float: bool = False,
) -> None:
    """A floating-point tensor of this shape (None: any size), on the device and of the dtype of another.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        shape: what it must be.
        like: name and value of the tensor that it goes with.
        any_float: its dtype may be another than that tensor's.

    Raises:
        SparsortError: it is not.
    """
    if not isinstance(tensor, Tensor):
        raise SparsortError(f"{name} must be a torch tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in FLOAT_DTYPES:
        raise SparsortError(f"{name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64.")
    fits = len(tensor.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
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
            f"{name} is on {tensor.device} and {other_name} on {other.device}; bring them to one device."
        )
    if tensor.dtype != other.dtype and not any_float:
        raise SparsortError(
            f"{name} is {tensor.dtype} and {other_name} is {other.dtype}; cast them to one dtype, or run under torch.autocast."
        )


def _check_width(name: str, width: int) -> None:
    if width == 0:
        raise SparsortError(f"{name} is of width 0; expected 1 or more, as nothing could be compared.")
