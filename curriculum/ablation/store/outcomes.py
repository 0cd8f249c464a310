"""Outcomes of (prefix, query) pairs: arrays in memory, and the Arrow table in which the store keeps them.

Contract: `from_tables(to_table(outcomes), …)` gives equal outcomes, bit for bit. If a pair occurs twice, the first outcome
counts. All tables of a group have one `Shape`: the same number of labels, and generated text in all of them or in none.

Shapes: N pairs, L labels, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsort.errors import SparsortError

Pair = tuple[str, str]

# The key of L in a table's metadata. With L = 0 the table has no column from which to read it.
_LABELS = b"sparsort.labels"


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """The outcomes of N pairs. Arrays are checked and converted to their dtypes on construction.

    Attributes:
        prefix: (N,) digest of the text before the query.
        query: (N,) digest of the query's text, with its labels or its generation settings.
        log_p: (N, L) float32, log-probability of each label in nats, finite; L = 0 for generation.
        n_tokens: (N, L) int32, number of tokens of each label, at least 1.
        features: (N, F) float32, in the order of the store's `feature_names`; may contain NaN.
        text: N generated continuations, or None.

    Raises:
        SparsortError: the shapes do not fit together, a log-probability is not finite, or a digest is empty.
    """

    prefix: NDArray[np.str_]
    query: NDArray[np.str_]
    log_p: NDArray[np.float32]
    n_tokens: NDArray[np.int32]
    features: NDArray[np.float32]
    text: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("prefix", "query"):
            object.__setattr__(self, name, _digests(name, getattr(self, name)))
        # A value beyond the range of float32 becomes infinite, which is refused below with its position.
        with np.errstate(over="ignore"):
            for name, dtype in (("log_p", np.float32), ("n_tokens", np.int32), ("features", np.float32)):
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        self._check_shapes()
        if not np.isfinite(self.log_p).all():
            row, label = np.argwhere(~np.isfinite(self.log_p))[0]
            raise SparsortError(
                f"log_p of row {row}, label {label} is {self.log_p[row, label]}; expected finite log-probabilities. "
                "If the model computes in float16, run it in bfloat16 or float32."
            )
        if self.n_tokens.size and self.n_tokens.min() < 1:
            raise SparsortError(f"n_tokens contains {self.n_tokens.min()}; expected at least 1 token for each label.")

    def _check_shapes(self) -> None:
        rows = len(self.prefix)
        shapes = {name: getattr(self, name).shape for name in ("query", "log_p", "n_tokens", "features")}
        if (
            any(shape[0] != rows for shape in shapes.values())
            or [len(shape) for shape in shapes.values()] != [1, 2, 2, 2]
            or shapes["log_p"] != shapes["n_tokens"]
        ):
            raise SparsortError(
                f"outcomes of {rows} prefixes have {', '.join(f'{name} {shape}' for name, shape in shapes.items())}; "
                "expected query (N,), log_p (N, L), n_tokens (N, L), features (N, F)."
            )
        if self.text is not None and (len(self.text) != rows or not all(isinstance(text, str) for text in self.text)):
            raise SparsortError(
                f"text has {len(self.text)} entries for {rows} pairs; expected one string for each pair."
            )

    def __len__(self) -> int:
        return len(self.prefix)

    @property
    def shape(self) -> Shape:
        """What all outcomes of a group have in common."""
        return Shape(labels=self.log_p.shape[1], text=self.text is not None)

    @functools.cached_property
    def row_of(self) -> dict[Pair, int]:
        """The row of each pair."""
        return {pair: row for row, pair in enumerate(self.pairs())}

    def pairs(self) -> list[Pair]:
        """The N (prefix, query) pairs."""
        return list(zip(self.prefix.tolist(), self.query.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all outcomes of a group have in common: the number of labels, and whether text was generated."""

    labels: int
    text: bool

    def __str__(self) -> str:
        return f"{self.labels} labels and {'generated' if self.text else 'no'} text"


def shape_of(table: pa.Table) -> Shape:
    """The shape of the outcomes in a table of `to_table`."""
    return Shape(labels=int(table.schema.metadata[_LABELS]), text="text" in table.column_names)


def pairs_of(table: pa.Table) -> list[Pair]:
    """The pairs in a table of `to_table`, without its other columns."""
    return list(zip(table["prefix"].to_pylist(), table["query"].to_pylist(), strict=True))


def to_table(outcomes: Outcomes, metadata: Mapping[str, str]) -> pa.Table:
    """The outcomes as a table of N rows. A matrix is a column of fixed-size lists; one without columns is omitted.

    Raises:
        SparsortError: a text contains a lone surrogate, which UTF-8 cannot encode.
    """
    columns = {"prefix": pa.array(outcomes.prefix.tolist()), "query": pa.array(outcomes.query.tolist())}
    matrices: dict[str, NDArray[Any]] = {
        "log_p": outcomes.log_p,
        "n_tokens": outcomes.n_tokens,
        "features": outcomes.features,
    }
    for name, values in matrices.items():
        if values.shape[1]:
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    if outcomes.text is not None:
        try:
            columns["text"] = pa.array(outcomes.text, pa.large_string())
        except UnicodeEncodeError as error:
            raise SparsortError(f"a generated text is not valid Unicode ({error}).") from error
    labels = {_LABELS.decode(): str(outcomes.shape.labels)}
    return pa.table(columns).replace_schema_metadata({**metadata, **labels})


def from_tables(tables: Mapping[str, pa.Table], n_features: int) -> Outcomes:
    """The outcomes in the tables of one group, in the order of the tables. A repeated pair keeps its first outcome.

    Args:
        tables: tables of `to_table` by their names in messages. Without tables, N = 0 and L = 0.
        n_features: F.

    Raises:
        SparsortError: the tables differ in shape.
    """
    shapes = {shape_of(table): name for name, table in tables.items()}
    if len(shapes) > 1:
        listed = "; ".join(f"{name} has {shape}" for shape, name in shapes.items())
        raise SparsortError(f"blocks of one group differ: {listed}. Move those out that do not belong to it.")
    if not tables:
        digests: NDArray[np.str_] = np.empty(0, np.str_)
        matrix: NDArray[Any] = np.empty((0, n_features), np.float32)
        return Outcomes(prefix=digests, query=digests, log_p=matrix[:, :0], n_tokens=matrix[:, :0], features=matrix)
    (shape,) = shapes
    # Tables with different metadata cannot be concatenated, and the metadata names the store.
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables.values()])
    table = table.take(pa.array(_first_of_each(table))).combine_chunks()
    return Outcomes(
        prefix=np.array(table["prefix"].to_pylist(), np.str_),
        query=np.array(table["query"].to_pylist(), np.str_),
        log_p=_matrix(table, "log_p", shape.labels, np.float32),
        n_tokens=_matrix(table, "n_tokens", shape.labels, np.int32),
        features=_matrix(table, "features", n_features, np.float32),
        text=table["text"].to_pylist() if shape.text else None,
    )


def _first_of_each(table: pa.Table) -> NDArray[np.int64]:
    """Positions of the first row of each pair, ascending."""
    # A pair is one 64-bit integer: the prefix's code in the high half, the query's in the low half. That is far faster than a set
    # of tuples of strings.
    prefix, query = (
        table[name].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        for name in ("prefix", "query")
    )
    return np.sort(np.unique(prefix << 32 | query, return_index=True)[1]).astype(np.int64)


def _matrix(table: pa.Table, name: str, width: int, dtype: type[np.generic]) -> NDArray[Any]:
    if width == 0:
        return np.empty((table.num_rows, 0), dtype)
    return np.array(table[name].combine_chunks().flatten(), dtype).reshape(-1, width)


def _digests(name: str, values: Any) -> NDArray[np.str_]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.str_)
    if array.ndim != 1 or array.dtype.kind != "U" or (array == "").any():
        raise SparsortError(
            f"{name} is {array.dtype} of shape {array.shape}; expected (N,) digests that are not empty."
        )
    return array
