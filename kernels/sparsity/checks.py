"""The arguments and results of every implementation of the sparsity metrics, and the checks of the arguments.

Shape suffixes: N measured rows, B batch, T tokens, H width, M metrics in the order of `metrics.METRICS`, S sites.

Contract of a measurement, shared by `torch_rows.py` and `triton_rows.py`:

- A row is one token's state. Token number b·T + t names row (b, t) of a (B, T, H) tensor.
- `dim_scale` (H,) multiplies each coordinate before anything is measured. A zero excludes the dimension from the row and from
  its width d, so NaN in such a dimension has no effect. With a final norm it may be (2, H), one scale per site.
- With a `FinalNorm`, site 0 is the state itself, and site 1 is the state after that norm, computed without rounding to the
  model's dtype.
- If all coordinates of a row are zero, no dimension is left, or a coordinate is NaN or infinite, every metric of the row is NaN,
  and its reason is the code in `metrics.ROW_REASONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.metrics import check_l0_threshold

GiniMethod = Literal["exact", "binned", "none"]

# The widest row that one program of `triton_rows.py` can hold in registers.
MAX_TRITON_WIDTH = 32768

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """The model's last RMS norm: y = x / sqrt(mean(x²) + eps) · (offset + weight).

    Attributes:
        weight: (H,), the norm's weight.
        eps: added to the mean square.
        offset: 0 for most models, 1 if the weight is stored as a difference from one (Gemma).
    """

    weight: Tensor
    eps: float = 1e-6
    offset: float = 0.0


class RowMetrics(NamedTuple):
    """The metrics of N rows; with a final norm every tensor has a leading axis of 2 (before, after).

    Attributes:
        values_NM: (N, M) in the order of `METRICS`; float64 for float64 states, else float32. Only `l1` may be infinite, because
            the sum of finite numbers can exceed the range of float32.
        reason_N: (N,) int8 codes of `ROW_REASONS`; if not 0, the row's values are NaN.
        gini_bound_N: (N,) upper bounds of |gini − exact Gini|, up to rounding, with gini="binned"; else None.
    """

    values_NM: Tensor
    reason_N: Tensor
    gini_bound_N: Tensor | None


def check_states(states: object) -> Tensor:
    """Return `states` if it is a floating-point tensor with a last axis of at least one coordinate.

    Raises:
        SparsortError: it is not.
    """
    if not isinstance(states, Tensor):
        raise SparsortError(
            f"states must be a torch tensor of shape (..., H), got {type(states).__name__}. "
            "Convert it with torch.as_tensor."
        )
    if states.dtype not in FLOAT_DTYPES:
        raise SparsortError(
            f"states must be float16, bfloat16, float32 or float64, got {states.dtype} of shape {tuple(states.shape)}. "
            "Convert them with .float()."
        )
    if states.ndim == 0 or states.shape[-1] == 0:
        raise SparsortError(
            f"states must have a last axis of at least one coordinate, got shape {tuple(states.shape)}. "
            "Pass hidden states of shape (..., H)."
        )
    return states


def check_arguments(
    states: Tensor,
    index: Tensor | None,
    dim_scale: Tensor | None,
    norm: FinalNorm | None,
    l0_threshold: float,
    gini: str,
) -> None:
    """Check all other arguments against the states.

    The values of an index on a GPU are not checked, since reading them would stall the device. For a token number that does not
    exist, `triton_rows.py` returns NaN.

    Raises:
        SparsortError: a shape, a dtype or a value does not fit.
    """
    H = states.shape[-1]
    tokens = states.shape[:-1].numel()
    if index is not None:
        if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
            raise SparsortError(
                f"index must be int32 or int64 of shape (N,), got {index.dtype} of shape {tuple(index.shape)}. "
                "Pass token numbers b*T + t; for a mask pass mask.flatten().nonzero().squeeze(1)."
            )
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < tokens:
            raise SparsortError(
                f"index holds token numbers from {int(index.min())} to {int(index.max())}, but states of shape "
                f"{tuple(states.shape)} have tokens 0 to {tokens - 1}. Pass token numbers b*T + t."
            )
    if dim_scale is not None:
        shapes: list[tuple[int, ...]] = [(H,)] if norm is None else [(H,), (2, H)]
        _check_vector("dim_scale", dim_scale, states, shapes)
    if norm is not None:
        _check_vector("the final norm's weight", norm.weight, states, [(H,)])
        if not (norm.eps >= 0 and math.isfinite(norm.eps) and math.isfinite(norm.offset)):
            raise SparsortError(
                f"the final norm has eps={norm.eps} and offset={norm.offset}; expected a finite eps of at least 0 and a finite "
                "offset. Pass those of the model's norm."
            )
    check_l0_threshold(l0_threshold)
    if gini not in get_args(GiniMethod):
        raise unknown_choice("Gini method", gini, get_args(GiniMethod))


def as_batches(states: Tensor) -> Tensor:
    """Reshape `states` of any number of axes to (B, T, H), as a view unless the leading axes cannot be merged without a copy."""
    if states.ndim <= 2:
        return states.reshape(1, -1, states.shape[-1])
    return states.flatten(0, -3)


def _check_vector(name: str, vector: Tensor, states: Tensor, shapes: list[tuple[int, ...]]) -> None:
    """Check the shape, dtype and device of a vector that the states are multiplied with."""
    if tuple(vector.shape) not in shapes or vector.dtype not in FLOAT_DTYPES:
        expected = " or ".join(str(shape) for shape in shapes)
        raise SparsortError(
            f"{name} must be floating point of shape {expected} for states of width {states.shape[-1]}, "
            f"got {vector.dtype} of shape {tuple(vector.shape)}. Convert it, or pass one value per coordinate."
        )
    if vector.device != states.device:
        raise SparsortError(
            f"{name} is on {vector.device} but the states are on {states.device}. Move it with .to(states.device)."
        )
