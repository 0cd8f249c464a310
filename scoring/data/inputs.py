"""Rows in the forms in which other libraries hold them, converted to a form that `open_rows` reads.

Contract: nothing is imported that the caller has not imported already, because an object of pandas, polars, Arrow or datasets can
only be passed by someone who has its library. A row keeps its values: nothing is rounded, dropped or renamed, except that column
names become text. What can be read only once is read into memory, with a note at level INFO of the logger "sparsort".
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, cast

from sparsort.errors import SparsortError, first_line
from sparsort.values import is_missing

_LOG = logging.getLogger("sparsort")
# The field of a row that is a bare text.
TEXT_FIELD = "text"
# "hub:owner/name", "hub:owner/name:split" or "hub:owner/name:configuration:split".
_HUB = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?::([\w.-]+))?")


def readable(source: Any) -> Any:
    """`source` as a path, a list of dictionaries, a `datasets.Dataset` or a `pyarrow.Table`; anything else as it is.

    Args:
        source: texts; a dictionary of columns; a frame or a column of pandas or polars; a batch or a stream of Arrow; a stream of
            datasets, a generator or another iterator; a hub id with the prefix "hub:".

    Raises:
        SparsortError: columns of different lengths, texts mixed with other rows, or a dataset that the hub does not provide.
    """
    if isinstance(source, (str, os.PathLike)):
        # The command line passes a hub id as a path.
        match = _HUB.fullmatch(os.fspath(source))
        return _from_hub(match[0], *match.groups()) if match else source
    package = type(source).__module__.partition(".")[0]
    if (convert := _CONVERTERS.get((package, type(source).__name__))) is not None:
        source = convert(source)
    if isinstance(source, Mapping):
        # A dataset with several splits is a mapping too, whose values are not columns; `open_rows` lists the splits.
        return source if type(source).__name__ in ("DatasetDict", "IterableDatasetDict") else _from_columns(source)
    if isinstance(source, (Iterator, _iterable_dataset())):
        source = list(cast("Iterable[Any]", source))
        _note(len(source))
    if isinstance(source, (list, tuple)):
        first = next((item for item in source if not is_missing(item)), None)
        return _from_texts(source) if isinstance(first, str) else source
    return source


def is_table(source: Any) -> bool:
    """Whether `source` is a frame, or a table, batch or stream of Arrow, whose rows cannot be read by position."""
    return (type(source).__module__.partition(".")[0], type(source).__name__) in _TABLES


def is_read_once(source: Any) -> bool:
    """Whether reading `source` uses it up, so that a second reader would find no rows."""
    return isinstance(source, Iterator) or type(source).__name__ == "RecordBatchReader"


def _from_texts(texts: Sequence[Any]) -> list[dict[str, Any]]:
    for position, text in enumerate(texts):
        if not isinstance(text, str) and not is_missing(text):
            raise SparsortError(
                f"row {position} is {type(text).__name__}, and other rows are texts. Pass texts only, or a "
                "dictionary for each row."
            )
    return [{TEXT_FIELD: None if is_missing(text) else text} for text in texts]


def _from_columns(columns: Mapping[Any, Any]) -> list[dict[str, Any]]:
    lists = {}
    for name, values in columns.items():
        if isinstance(values, Mapping):
            # `DataFrame.to_dict()` gives the values of a column by the labels of the rows.
            if list(values) != list(next(iter(columns.values()))):
                raise SparsortError(
                    f"the column {name!r} has other row labels than the first column. Pass lists of values."
                )
            values = list(values.values())
        if isinstance(values, (str, bytes, Set)) or not isinstance(values, (Sequence, Iterable)):
            raise SparsortError(
                f"the column {name!r} is {type(values).__name__}; in a dictionary of columns each one is a list of values. Pass "
                "[row] for a single row."
            )
        listed = getattr(values, "tolist", None) or getattr(values, "to_list", None)
        lists[str(name)] = listed() if callable(listed) else list(values)
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise SparsortError(f"the columns have different lengths: {lengths}. Pass columns of one length.")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _from_pandas(frame: Any) -> Any:
    import pyarrow as pa

    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        raise SparsortError(f"the frame has columns of the same name: {', '.join(names)}. Rename them.")
    renamed = frame.set_axis(names, axis="columns")
    try:
        return pa.Table.from_pandas(renamed, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        # A column of several types has no Arrow type.
        return renamed.to_dict("records")


def _from_hub(name: str, dataset: str, first: str | None, second: str | None) -> Any:
    from datasets import load_dataset

    config, split = (first, second) if second else (None, first)
    try:
        loaded = load_dataset(dataset, config, split=split)
    except Exception as error:  # the hub, the network and a dataset's own files fail in many ways
        raise SparsortError(
            f"cannot load the dataset {name!r}: {first_line(error)} Write hub:owner/name:split, or "
            "hub:owner/name:configuration:split, or pass a file."
        ) from error
    if isinstance(loaded, Mapping):
        if len(loaded) > 1:
            raise SparsortError(
                f"{name!r} has several splits. Name one of them: {', '.join(f'{name}:{s}' for s in loaded)}."
            )
        return next(iter(loaded.values()))
    return loaded


def _iterable_dataset() -> type | tuple[()]:
    datasets = sys.modules.get("datasets")
    return () if datasets is None else datasets.IterableDataset


def _note(count: int) -> None:
    _LOG.info("read %d rows into memory, because they can be read only once", count)


def _read_stream(reader: Any) -> Any:
    table = reader.read_all()
    _note(table.num_rows)
    return table


def _record_batch(batch: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches([batch])


_TABLES = {
    ("pandas", "DataFrame"), ("polars", "DataFrame"), ("polars", "LazyFrame"),
    ("pyarrow", "Table"), ("pyarrow", "RecordBatch"), ("pyarrow", "RecordBatchReader"),
}  # fmt: skip
# (package, class) → how it becomes a table or a list.
_CONVERTERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("pandas", "DataFrame"): _from_pandas,
    ("pandas", "Series"): lambda series: series.tolist(),
    ("polars", "DataFrame"): lambda frame: frame.to_arrow(),
    ("polars", "LazyFrame"): lambda frame: frame.collect().to_arrow(),
    ("polars", "Series"): lambda series: series.to_list(),
    ("numpy", "ndarray"): lambda array: array.tolist() if array.ndim == 1 else array,
    ("pyarrow", "RecordBatch"): _record_batch,
    ("pyarrow", "RecordBatchReader"): _read_stream,
    ("pyarrow", "ChunkedArray"): lambda array: array.to_pylist(),
    **{
        ("pyarrow", name): lambda array: array.to_pylist()
        for name in ("StringArray", "LargeStringArray", "StringViewArray")
    },
    **{
        ("pandas", name): lambda array: array.tolist()
        for name in ("Index", "StringArray", "ArrowStringArray", "NumpyExtensionArray")
    },
}
