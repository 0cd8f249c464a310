"""What every implementation of the sparsity metrics takes and gives back.

Shape suffixes: N rows that are measured, B batch, T tokens, H width, M metrics in the order of `metrics.METRICS`,
S sites.

Contract of a measurement, shared by `torch_rows.py` and `triton_rows.py`:

- a row is one token's state; token number b·T + t names row (b, t) of a (B, T, H) tensor;
- `dim_scale` (H,) multiplies each coordinate before anything is measured, and a zero in it leaves the dimension out of
  the row and out of its width d (so NaN in such a dimension does no harm); with a final norm it may be (2, H), one
  scale a site;
- with a `FinalNorm`, site 0 is the state as it stands and site 1 the state after that norm, computed without rounding
  to the model's dtype;
- a row whose coordinates are all zero (or that has no dimension left), and a row that holds NaN or infinity, has NaN
  for every metric and a code of `metrics.ROW_REASONS`.
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

# The widest row that one program of `triton_rows.py` holds.
MAX_TRITON_WIDTH = 32768

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """The model's last RMS norm: y = x / sqrt(mean(x²) + eps) · (offset + weight).

    Attributes:
        weight: (H,), the norm's weight.
        eps: added to the mean square.
        offset: 0 for most models, 1 where the weight is stored as a difference from one (Gemma).
    """

    weight: Tensor
    eps: float = 1e-6
    offset: float = 0.0


class RowMetrics(NamedTuple):
    """The metrics of N rows; with a final norm every tensor has a leading axis of 2 (before, after).

    Attributes:
        values_NM: (N, M) in the order of `METRICS`; float64 for float64 states, else float32. `l1` alone may be
            infinite: a row of finite numbers can sum to more than float32 holds.
        reason_N: int8 codes of `ROW_REASONS`; where it is not 0 the row's values are NaN.
        gini_bound_N: with gini="binned", what |gini − exact Gini| cannot exceed beyond rounding; else None.
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
    """Check everything beside the states against them.

    An index on a GPU is not read, since that would stall the device; `triton_rows.py` gives NaN for a token that is not there.

    Raises:
        SparsortError: a shape, a dtype or a value that does not fit, named with what was expected.
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
                f"{tuple(states.shape)} have tokens 0 to {tokens - 1}."
            )
    if dim_scale is not None:
        shapes: list[tuple[int, ...]] = [(H,)] if norm is None else [(H,), (2, H)]
        _check_vector("dim_scale", dim_scale, states, shapes)
    if norm is not None:
        _check_vector("the final norm's weight", norm.weight, states, [(H,)])
        if not (norm.eps >= 0 and math.isfinite(norm.eps) and math.isfinite(norm.offset)):
            raise SparsortError(
                "a final norm needs a finite eps of at least 0 and a finite offset, "
                f"got eps={norm.eps}, offset={norm.offset}."
            )
    check_l0_threshold(l0_threshold)
    if gini not in get_args(GiniMethod):
        raise unknown_choice("Gini method", gini, get_args(GiniMethod))


def as_batches(states: Tensor) -> Tensor:
    """`states` of any number of axes as (B, T, H): a view, but for more than three axes that no stride joins."""
    if states.ndim <= 2:
        return states.reshape(1, -1, states.shape[-1])
    return states.flatten(0, -3)


def _check_vector(what: str, vector: Tensor, states: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tuple(vector.shape) not in shapes or vector.dtype not in FLOAT_DTYPES:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise SparsortError(
            f"{what} must be floating point of shape {wanted} for states of width {states.shape[-1]}, "
            f"got {vector.dtype} of shape {tuple(vector.shape)}."
        )
    if vector.device != states.device:
        raise SparsortError(
            f"{what} is on {vector.device} but the states are on {states.device}. Move it with .to(states.device)."
        )
