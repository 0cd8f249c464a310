"""What makes a model's attention sparse: the selector, the blocks, the budget, and which layers.

Contract: frozen, checked on construction, and the same again after `from_json(to_json())`. It imports no torch, so that a
recipe can be read and refused before anything heavy is loaded.
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

# The selectors that read a setting; see `sparsort.conditions`. A seed may be given where nothing is drawn.
READ_BY: Table = {
    setting: (among("selector", SELECTORS.reading(setting), of=SELECTORS),)
    for setting in ("threshold", "top_p", "index_dim", "index_norm", "alignment_weight")
} | dict.fromkeys(("selector", "block_size", "blocks", "layers", "seed"), ALWAYS)
_MOST = 2**31 - 1  # what the kernels count in
_LARGEST_BLOCK = 2**20  # that the kernels take


class SparseAttentionOptions(TypedDict, total=False):
    """The fields of `SparseAttentionConfig`, where a function takes them as keywords."""

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
    """The sparse attention of a model.

    Attributes:
        selector: how blocks are chosen; `attention/selectors/` has a file for each, with its paper.
        block_size: keys of a block.
        blocks: how many blocks a query token attends to, its own among them; with `threshold` or `top_p` the most.
        threshold: take every block whose share of the softmax over block scores is at least this, in [0, 1].
        top_p: take the fewest blocks whose shares sum to this or more, in (0, 1].
        index_dim: I, the width of index queries and keys, even (rotary pairs); None: the layer's head width.
        index_norm: RMSNorm on index queries and keys: always (True), never (False), or where the layer has it (None).
        alignment_weight: λ of the total loss L_LM + λ·Σ_layers L_selector, 0 or more.
        layers: numbers of the layers that become sparse, from 0; None: every layer with full attention.
        seed: of a selector's first weights, and of the blocks of "random".
        stored: the settings come from a checkpoint, where one that is not read is kept as it is.

    Raises:
        SparsortError: an unknown selector, a number out of its range, both `threshold` and `top_p`, or a setting that the
            selector does not read.
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
        self._keep("block_size", whole("block_size", self.block_size, 1, most=_LARGEST_BLOCK))
        self._keep("blocks", whole("blocks", self.blocks, 1, most=_MOST))
        self._keep("seed", whole("seed", self.seed, 0))
        if self.index_dim is not None:
            self._keep("index_dim", whole("index_dim", self.index_dim, 1, most=_MOST))
            if self.index_dim % 2:
                raise SparsortError(
                    f"index_dim is {self.index_dim}; the rotary embedding turns pairs of coordinates. "
                    f"Give an even number, such as {self.index_dim + 1}."
                )
        if self.index_norm is not None and not isinstance(self.index_norm, bool):
            raise SparsortError(
                f"index_norm is {self.index_norm!r}; expected True, False, or None to follow the layer."
            )
        if self.threshold is not None and self.top_p is not None:
            raise SparsortError(
                f"a budget goes by threshold ({self.threshold}) or by top_p ({self.top_p}), not by both. Give one of them."
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
                f"alignment_weight is {self.alignment_weight}; expected a number of 0 or more. 1.0 is the default."
            )
        if self.layers is not None:
            self._keep("layers", _layers(self.layers))
        if not stored:
            refuse_unread_fields(self, READ_BY)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def budget(self) -> Budget:
        """How many blocks a query token may have, as the kernels take it."""
        from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget

        if self.threshold is not None:
            return ThresholdBudget(threshold=self.threshold, most=self.blocks)
        if self.top_p is not None:
            return TopPBudget(p=self.top_p, most=self.blocks)
        return FixedBudget(blocks=self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value; `from_json` reads them back."""
        return {**dataclasses.asdict(self), "layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, stored: bool = False) -> SparseAttentionConfig:
        """What `to_json` gave; fields that are not there have their defaults. `stored`: see the class.

        Raises:
            SparsortError: not a table of fields, an unknown field, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise SparsortError(
                f"sparse attention is read from a table such as {{'selector': 'moba', 'blocks': 16}}, not from {values!r}."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown_choice("setting of sparse attention", name, names)
        return cls(**values, stored=stored)


def _layers(given: Any) -> tuple[int, ...]:
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
        raise SparsortError(
            f"layers is {given!r}; expected layer numbers such as [0, 2], or None for every full layer."
        )
    layers = tuple(whole("a number in layers", layer, 0) for layer in given)
    if not layers or len(set(layers)) < len(layers):
        what = "names a layer twice" if layers else "names no layer"
        raise SparsortError(f"layers = {list(layers)} {what}; give each once, or None for every full-attention layer.")
    return layers


def whole(name: str, given: Any, lowest: int, *, most: int | None = None) -> int:
    """A whole number of any library, as Python's.

    Raises:
        SparsortError: another value, or one out of range.
    """
    number = None if isinstance(given, bool) or not isinstance(given, numbers.Integral) else operator.index(given)
    if number is None or number < lowest:
        raise SparsortError(f"{name} is {given!r}; expected a whole number of at least {lowest}.")
    if most is not None and number > most:
        raise SparsortError(f"{name} is {given!r}; expected {most} at most.")
    return number


def _number(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise SparsortError(f"{name} is {given!r}; expected a number.")
    return float(given)
