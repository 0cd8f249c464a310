"""The settings of a model's sparse attention: the selector, the blocks, the budget, and the layers.

Contract: a configuration is frozen, is checked on construction, and survives `from_json(to_json())` unchanged. This module does
not import torch, so a recipe can be read and refused before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from sparsort.attention.selectors import SELECTORS, SelectorKind
from sparsort.conditions import ALWAYS, Table, among, refuse_unread_fields
from sparsort.errors import SparsortError, unknown_choice

if TYPE_CHECKING:
    from sparsort.kernels.blocksparse.budgets import Budget

# Setting → the condition on the selector under which the setting is read; see `sparsort.conditions`. A seed is accepted even if
# the selector uses no random numbers.
READ_BY: Table = {
    setting: (among("selector", SELECTORS.reading(setting), of=SELECTORS),)
    for setting in ("threshold", "top_p", "index_dim", "index_norm", "alignment_weight")
} | dict.fromkeys(("selector", "block_size", "blocks", "layers", "seed"), ALWAYS)
_MOST = 2**31 - 1  # The kernels count in int32.
_LARGEST_BLOCK = 2**20  # The largest block size that the kernels accept.


class SparseAttentionOptions(TypedDict, total=False):
    """The fields of `SparseAttentionConfig`, as the type of the keyword arguments of functions that accept them."""

    selector: SelectorKind
    block_size: int
    blocks: int
    threshold: float | None
    top_p: float | None
    index_dim: int | None
    index_norm: bool | None
    alignment_weight: float
    layers: tuple[int, ...] | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    """The settings of a model's sparse attention.

    Attributes:
        selector: how blocks are chosen; each selector has a file in `attention/selectors/`, which cites its paper.
        block_size: W, the number of keys in a block.
        blocks: number of blocks that a query token attends to, including its own; with `threshold` or `top_p`, the maximum.
        threshold: take every block whose share of the softmax over block scores is at least this, in [0, 1].
        top_p: take the fewest blocks whose shares sum to at least this, in (0, 1].
        index_dim: I, the width of the selector's own small queries and keys (index queries and keys, or gates). It must be
            even, because the rotary embedding rotates pairs of coordinates. None: the layer's head width.
        index_norm: whether index queries and keys get an RMSNorm; None: only if the layer's own queries and keys do.
        alignment_weight: λ in the total loss L_LM + λ·Σ_layers L_selector, 0 or more.
        layers: numbers of the layers that become sparse, from 0; None: every layer without a sliding window.
        seed: seed for the selector's initial weights, and for the blocks of "random".
        stored: whether the settings come from a checkpoint; if so, settings that the selector does not read are kept.

    Raises:
        SparsortError: the selector is unknown, a number is out of range, both `threshold` and `top_p` are given, or the
            selector does not read a given setting.
    """

    selector: SelectorKind = "index_branch"
    block_size: int = 128
    blocks: int = 16
    threshold: float | None = None
    top_p: float | None = None
    index_dim: int | None = None
    index_norm: bool | None = True
    alignment_weight: float = 1.0
    layers: tuple[int, ...] | None = None
    seed: int = 0
    stored: InitVar[bool] = False

    def __post_init__(self, stored: bool) -> None:
        SELECTORS.check(self.selector)
        # Each number is stored as the plain Python number that it equals, so that NumPy scalars also survive JSON.
        self._keep("block_size", whole("block_size", self.block_size, 1, most=_LARGEST_BLOCK))
        self._keep("blocks", whole("blocks", self.blocks, 1, most=_MOST))
        self._keep("seed", whole("seed", self.seed, 0))
        if self.index_dim is not None:
            self._keep("index_dim", whole("index_dim", self.index_dim, 1, most=_MOST))
            if self.index_dim % 2:
                raise SparsortError(
                    f"index_dim is {self.index_dim}; expected an even number, because the rotary embedding rotates pairs of "
                    f"coordinates. Use {self.index_dim + 1}, for example."
                )
        if self.index_norm is not None and not isinstance(self.index_norm, bool):
            raise SparsortError(
                f"index_norm is {self.index_norm!r}; expected True, False, or None to follow the layer."
            )
        if self.threshold is not None and self.top_p is not None:
            raise SparsortError(
                f"both threshold ({self.threshold}) and top_p ({self.top_p}) are given; expected at most one. Remove one of "
                "them."
            )
        for name in ("threshold", "top_p", "alignment_weight"):
            if name == "alignment_weight" or getattr(self, name) is not None:
                self._keep(name, _number(name, getattr(self, name)))
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise SparsortError(f"threshold is {self.threshold}; expected a share between 0 and 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SparsortError(f"top_p is {self.top_p}; expected a share above 0 and at most 1.")
        if not 0 <= self.alignment_weight < math.inf:
            raise SparsortError(
                f"alignment_weight is {self.alignment_weight}; expected a finite number of 0 or more. 1.0 is the default."
            )
        if self.layers is not None:
            self._keep("layers", _layer_numbers(self.layers))
        # A checkpoint may have settings that its selector does not read; they are kept as they are.
        if not stored:
            refuse_unread_fields(self, READ_BY)

    def _keep(self, name: str, value: Any) -> None:
        # A frozen dataclass refuses plain assignment, even in its own __post_init__.
        object.__setattr__(self, name, value)

    def budget(self) -> Budget:
        """Return the budget of blocks for each query token, in the form that the kernels take."""
        from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget

        if self.threshold is not None:
            return ThresholdBudget(threshold=self.threshold, most=self.blocks)
        if self.top_p is not None:
            return TopPBudget(p=self.top_p, most=self.blocks)
        return FixedBudget(blocks=self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return every field as a JSON value, for `from_json`."""
        return {**dataclasses.asdict(self), "layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, stored: bool = False) -> SparseAttentionConfig:
        """Read the result of `to_json`. Missing fields take their defaults; `stored` is explained in the class docstring.

        Raises:
            SparsortError: `values` is not a mapping, a field is unknown, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise SparsortError(
                f"the settings of sparse attention are {values!r}; they must be read from a table such as "
                "{'selector': 'moba', 'blocks': 16}."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown_choice("setting of sparse attention", name, names)
        return cls(**values, stored=stored)


def _layer_numbers(given: Any) -> tuple[int, ...]:
    """Check that layer numbers are whole, distinct and at least one, and return them as a tuple."""
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
        raise SparsortError(
            f"layers is {given!r}; expected layer numbers such as [0, 2], or None for every full-attention layer."
        )
    layers = tuple(whole("a number in layers", layer, 0) for layer in given)
    if not layers or len(set(layers)) < len(layers):
        problem = "names a layer twice" if layers else "names no layer"
        raise SparsortError(
            f"layers = {list(layers)} {problem}; name each layer once, or pass None for every full-attention layer."
        )
    return layers


def whole(name: str, given: Any, lowest: int, *, most: int | None = None) -> int:
    """Convert an integer of Python, NumPy or another library to a Python int.

    Args:
        name: name of the setting, for the error message.
        given: the value to convert.
        lowest, most: inclusive bounds.

    Raises:
        SparsortError: the value is not a whole number, or is out of range.
    """
    # In Python a bool is an Integral number, but True as a count is a mistake.
    number = None if isinstance(given, bool) or not isinstance(given, numbers.Integral) else operator.index(given)
    if number is None or number < lowest:
        raise SparsortError(f"{name} is {given!r}; expected a whole number of at least {lowest}.")
    if most is not None and number > most:
        raise SparsortError(f"{name} is {given!r}; expected at most {most}.")
    return number


def _number(name: str, given: Any) -> float:
    """Convert a real number of Python, NumPy or another library to a Python float."""
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise SparsortError(f"{name} is {given!r}; expected a number.")
    try:
        return float(given)
    except OverflowError as error:
        raise SparsortError(f"{name} is a number beyond the range of a float; expected a smaller one.") from error
