"""Verify that a dataset has the rows that a plan was made for: the notes of a plan about its rows, and the comparison.

Contract: the first criterion that both sides have decides: the user's own name for the data (`fingerprint=`), the ids, or the
content that was scored. If they have none in common, the dataset is refused, because without a comparison nothing is verified.

Extent of the comparison: all ids of a `datasets.Dataset`, a list or a tuple, which detects even two swapped rows. For the ids of
any other dataset, and for content, a sample of at most 144 rows: the first 16, the last, and one from each of 128 equal
parts. The sample always detects a full shuffle, a reversal or a shift. If a random share q of the rows has moved, the sample
misses that with a probability of (1 − q)^128: 1 in 700 for q = 5 %, 1 in 4 for q = 1 %. It detects two swapped rows only by
chance. For a stream, the first 16 rows are compared.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparsort.curriculum.loading.loader.resuming import random_state_restored
from sparsort.curriculum.loading.plan.shuffling import key_of
from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import digest_of
from sparsort.values import is_missing

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.scoring.store.scores import Scores

# Keys in the notes of a plan.
NAME, IDS, CONTENT = "fingerprint", "ids", "content"

# The number of rows of a stream that are compared.
_FIRST = 16
# The number of equal parts of the data, from each of which one row is compared.
_PARTS = 128
# In characters; a longer id is shortened by a digest.
_LONGEST_ID = 64
# The number of rows of an id column that are read at a time.
_CHUNK = 10_000
_NEXT_STEP = (
    "Load the data that was planned, in its order, or plan this data with plan_curriculum(scores, data=…). verify=False "
    "(--no-verify of sparsort train) skips this check."
)
_OTHER_ROWS = "these are not the rows that the plan was made for, or they are in another order"


def note_rows(
    scores: Scores | None,
    data: Any,
    *,
    ids: Sequence[Any] | None = None,
    id_column: str | None = None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """The notes of a plan about its rows: their ids, content and name, as JSON values of about 20 KiB at most.

    Args:
        scores: the scores that the plan is made from, or None for plain numbers.
        data: the rows of the plan, or None if they are the rows of the scores.
        ids: one id per row, or None to take them from the data or the scores.
        id_column: the field of the data, and of the dataset that is trained on, with the ids; None for that of the scores,
            else "id".
        fingerprint: the user's own name for the data.

    Raises:
        SparsortError: the name is not a text.
    """
    check_name(fingerprint)
    notes: dict[str, Any] = {} if fingerprint is None else {NAME: fingerprint}
    scored_column = scores.provenance.get("id_column") if scores is not None else None
    column = id_column or scored_column or "id"
    rows = None if data is None else unformatted(data)
    if ids is not None:
        names = [id_text(name) for name in ids]
    elif rows is not None:
        names = [id_text(value) for value in _ids_of(rows, column)]
    else:
        # Without an id column, the scorer numbers the rows "0", "1", …; such numbers do not identify a row.
        names = list(scores.ids) if scores is not None and scored_column is not None else []
    # Ids are noted only if every row has one and all are distinct.
    known = [name for name in names if name is not None]
    if known and len(set(known)) == len(names):
        notes[IDS] = _note_ids(known, column)
    fields = scores.provenance.get("content") if scores is not None else None
    if rows is not None:
        fields = fields if fields is not None else _common_fields(rows, column)
        notes[CONTENT] = _note_content([_content(row, fields) for row in _only(rows, fields)], fields)
    elif scores is not None:
        notes[CONTENT] = _note_content(list(scores.column("digest")), fields)
    return notes


def ids_from(data: Any, id_column: str) -> list[str]:
    """The id of each row of the data.

    Raises:
        SparsortError: a row has no id.
    """
    names = [id_text(value) for value in _ids_of(unformatted(data), id_column)]
    if None in names:
        raise SparsortError(
            f"row {names.index(None)} of the data has no {id_column!r}, and id_column={id_column!r} names the field with the id "
            "of every row. Name a field that all rows have, or omit id_column."
        )
    return [name for name in names if name is not None]


def verify_rows(plan: CurriculumPlan, dataset: Any, *, fingerprint: str | None = None) -> None:
    """Refuse a dataset whose rows differ from the plan's, within the limits above, or that cannot be compared with the plan.

    Args:
        plan: the plan, whose notes describe its rows.
        dataset: the dataset as the user passed it, before any column is removed: map-style, or a stream.
        fingerprint: the user's own name for the data. If the plan has a name too, only the names are compared, and no row is
            read.

    Raises:
        SparsortError: other rows, rows in another order, another name, or nothing that could be compared.
    """
    if _same_name(plan, fingerprint):
        return
    if not rows_agree(plan, dataset):
        raise incomparable(plan, fingerprint)


def rows_agree(plan: CurriculumPlan, dataset: Any, *, content: bool = True) -> bool:
    """Compare the rows with the plan; return True if they agree, and False if there is nothing that could be compared.

    Args:
        plan: the plan, whose notes describe its rows.
        dataset: map-style, or a stream.
        content: whether to compare contents if there are no ids.

    Raises:
        SparsortError: other rows, or rows in another order.
    """
    # Imported here because it imports torch, which a plan does not need.
    from sparsort.curriculum.loading.loader.streams import check_stream, is_stream

    with random_state_restored():
        if stream := is_stream(dataset):
            check_stream(plan, dataset, num_workers=0)
            rows = list(islice(dataset, _FIRST))
        else:
            rows = unformatted(dataset)
        expected = min(_FIRST, plan.n_rows) if stream else plan.n_rows
        if len(rows) != expected:
            raise another_size(plan, len(rows))
        if _ids_agree(plan.notes.get(IDS), rows, whole=not stream):
            return True
        return content and _content_agrees(plan.notes.get(CONTENT), rows, plan.n_rows)


def verify_every_row(plan: CurriculumPlan, rows: Iterable[Any], *, fingerprint: str | None = None) -> None:
    """As `verify_rows`, but read all rows from front to back and compare every id and every content.

    Raises:
        SparsortError: as for `verify_rows`. The message names the options of `sparsort train`.
    """
    if _same_name(plan, fingerprint):
        return
    first = _fields(next(iter(rows), {}))
    ids: dict[str, Any] = plan.notes.get(IDS) or {}
    content: dict[str, Any] = plan.notes.get(CONTENT) or {}
    if ids and ids["column"] not in first:
        ids = {}
    fields = content.get("fields")
    if not _has_different_contents(content, plan.n_rows) or any(field not in first for field in fields or ()):
        content = {}
    ids_digest, rows_digest = _Digest(), _Digest()
    for place, row in enumerate(rows if ids or content else ()):
        if ids:
            name = id_text(_fields(row).get(ids["column"]))
            _check_id(ids, place, name)
            ids_digest.add(str(name))
        if content:
            digest = _content(row, fields)
            # A sampled row can be named in the error, which the digest over all rows cannot do.
            if fields is not None and content["sample"].get(str(place), digest) != digest:
                raise _other_content(fields, place)
            rows_digest.add(digest)
    if ids and ids_digest.hex() != ids["digest"]:
        raise _other_ids(ids)
    if content and rows_digest.hex() != content["digest"]:
        if fields is not None:
            raise SparsortError(f"{_OTHER_ROWS}: the content of {' and '.join(fields)} differs. {_NEXT_STEP}")
        content = {}
    if not ids and not content:
        raise incomparable(plan, fingerprint, command=True)


def _same_name(plan: CurriculumPlan, fingerprint: str | None) -> bool:
    """Whether plan and dataset have the same name; False if one of them has no name.

    Raises:
        SparsortError: the names differ, or a name is not a text.
    """
    check_name(fingerprint)
    noted = plan.notes.get(NAME)
    if noted is None or fingerprint is None:
        return False
    if noted != fingerprint:
        raise SparsortError(
            f"the plan was made for the data fingerprint={noted!r}, and this is fingerprint={fingerprint!r}. Load the data that "
            "was planned, or plan this data with plan_curriculum(…, fingerprint=…)."
        )
    return True


def check_name(fingerprint: Any) -> None:
    """Refuse a name of the data that is not a text.

    Raises:
        SparsortError: it is neither None nor a text of at least one character.
    """
    if fingerprint is not None and (not isinstance(fingerprint, str) or not fingerprint):
        raise SparsortError(
            f"fingerprint= is your own name for the data, such as 'corpus v3, sorted by date', not {fingerprint!r}."
        )


def incomparable(plan: CurriculumPlan, fingerprint: str | None, *, command: bool = False) -> SparsortError:
    """The error for a plan and a dataset that have nothing in common to compare, with the three possible next steps.

    Args:
        plan: the plan, whose notes the message describes.
        fingerprint: the name of the dataset.
        command: whether the message names the options of `sparsort train` too.
    """
    ids, content, name = (plan.notes.get(key) for key in (IDS, CONTENT, NAME))
    known = [f"ids in the column {ids['column']!r}"] if ids else []
    if content and content["fields"]:
        known.append(f"the content of {' and '.join(map(repr, content['fields']))}")
    elif content and content["fields"] is None:
        known.append("the content of whole rows")
    if name is not None:
        known.append(f"the name fingerprint={name!r}")
    why = (
        f"the plan knows {', '.join(known)}, and the dataset has nothing to compare with that"
        if known
        else "the plan was made from numbers alone, so it knows neither ids nor contents"
    )
    keep = (
        f"Keep the column {ids['column']!r} in the dataset" if ids else "Keep an id column in the data and the dataset"
    )
    plans = "" if ids or content else " (and plan with plan_curriculum(scores, data=rows))"
    names = "fingerprint='a name for the data'" if name is None else f"fingerprint={name!r}"
    here = "to this call" if not command else "here (--fingerprint)"
    skip = "verify=False (--no-verify)" if command else "verify=False"
    given = (
        f" The dataset is fingerprint={fingerprint!r}, and the plan has no name."
        if fingerprint and name is None
        else ""
    )
    return SparsortError(
        f"cannot tell whether these are the rows that the plan was made for: {why}.{given} {keep}{plans}; or pass the same "
        f"{names} to plan_curriculum, which stores it, and {here}; or pass {skip} to train without this check."
    )


def another_size(plan: CurriculumPlan, n_rows: int) -> SparsortError:
    """The error for a dataset that has another number of rows than the plan."""
    return SparsortError(
        f"the dataset has {n_rows} rows and the plan was made for {plan.n_rows}. Load the data that was planned (one split, "
        "unfiltered), or plan again for this dataset."
    )


def noted_for_other_rows(noted: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the notes of two plans describe different rows, as far as both describe them."""
    names = {notes[NAME] for notes in (noted, other) if notes.get(NAME) is not None}

    def differ(kind: str, source: str) -> bool:
        # Digests of another column or of other fields cannot be compared.
        both = [notes[kind] for notes in (noted, other) if notes.get(kind)]
        return len(both) == 2 and both[0][source] == both[1][source] and both[0]["digest"] != both[1]["digest"]

    return len(names) > 1 or differ(IDS, "column") or differ(CONTENT, "fields")


def content_digest(rows: Iterable[Any], fields: Sequence[str] | None) -> str:
    """The digest of the content of rows in their order, over `fields`, or over all fields if None. Plans note this digest."""
    return _digest_of(_content(row, fields) for row in rows)


def refuse_frame(dataset: Any) -> None:
    """Refuse a data frame, whose `[position]` would select a column.

    Raises:
        SparsortError: the dataset is a data frame of pandas or polars.
    """
    if type(dataset).__name__ == "DataFrame":
        raise SparsortError(
            "the rows of a DataFrame cannot be read by position as dataset[row]. Pass datasets.Dataset.from_pandas(frame), or "
            "frame.to_dict('records')."
        )


def unformatted(dataset: Any) -> Any:
    """A `datasets.Dataset` without its format, which may hide columns or transform rows; any other dataset unchanged.

    Raises:
        SparsortError: the dataset is a data frame.
    """
    refuse_frame(dataset)
    # If the dataset is one of this library, the library has been imported.
    datasets = sys.modules.get("datasets")
    return dataset.with_format(None) if datasets is not None and isinstance(dataset, datasets.Dataset) else dataset


def id_text(value: Any) -> str | None:
    """An id in the form that `Scores` uses; None if there is no id."""
    # Numbers of NumPy and torch have `tolist`, and print differently from Python's.
    if (plain := getattr(value, "tolist", None)) is not None:
        value = plain()
    return None if is_missing(value) else str(value)


class _Digest:
    """BLAKE2b over texts, each followed by a newline: 128 bits as 32 hexadecimal digits."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        self._hash.update(f"{text}\n".encode("utf-8", "surrogatepass"))

    def hex(self) -> str:
        return self._hash.hexdigest()


def _digest_of(texts: Iterable[str]) -> str:
    digest = _Digest()
    for text in texts:
        digest.add(text)
    return digest.hex()


def _note_ids(names: Sequence[str], column: str) -> dict[str, Any]:
    sample = {str(place): _short(names[place]) for place in _places(len(names))}
    return {"column": column, "digest": _digest_of(names), "sample": sample}


def _note_content(digests: Sequence[str], fields: Sequence[str] | None) -> dict[str, Any]:
    sample = {str(place): digests[place] for place in _places(len(digests), digests)}
    return {"fields": None if fields is None else list(fields), "digest": _digest_of(digests), "sample": sample}


def _places(n: int, digests: Sequence[str] | None = None) -> list[int]:
    """The rows of the sample. From each part it takes a row with the rarest content, since only that identifies a position."""
    if not n:
        return []
    counts = Counter(digests)
    parts, chosen = min(_PARTS, n), {*range(min(_FIRST, n)), n - 1}
    for part in range(parts):
        among: Sequence[int] = range(part * n // parts, (part + 1) * n // parts)
        if digests is not None:
            rarest = min(counts[digests[place]] for place in among)
            among = [place for place in among if counts[digests[place]] == rarest]
        chosen.add(among[key_of("row to compare", n, part) % len(among)])
    return sorted(chosen)


def _ids_agree(noted: Mapping[str, Any] | None, rows: Any, *, whole: bool) -> bool:
    if not noted or noted["column"] not in _columns(rows):
        return False
    column = noted["column"]
    if (every := _column(rows, column) if whole else None) is None:
        places = _noted_places(noted, rows)
        for place in places:
            _check_id(noted, place, id_text(_fields(rows[place]).get(column)))
        return bool(places)
    digest = _Digest()
    for place, value in enumerate(every):
        name = id_text(value)
        _check_id(noted, place, name)
        digest.add(str(name))
    if digest.hex() != noted["digest"]:
        raise _other_ids(noted)
    return True


def _content_agrees(noted: Mapping[str, Any] | None, rows: Any, n_rows: int) -> bool:
    if not noted or not _has_different_contents(noted, n_rows):
        return False
    fields = noted["fields"]
    if fields is not None:
        if not set(fields) <= set(_columns(rows)):
            return False
        rows = _only(rows, fields)
    places = _noted_places(noted, rows)
    for place in places:
        row = _fields(rows[place])
        if fields is not None and any(field not in row for field in fields):
            return False
        if _content(row, fields) != noted["sample"][str(place)]:
            # The content of whole rows also changes if the dataset gains or loses a column.
            if fields is None:
                return False
            raise _other_content(fields, place)
    return bool(places)


def _has_different_contents(noted: Mapping[str, Any], n_rows: int) -> bool:
    """Whether the noted contents differ. Equal contents, such as objects without readable content, would agree in any order."""
    return bool(noted) and (n_rows == 1 or len(set(noted["sample"].values())) > 1)


def _noted_places(noted: Mapping[str, Any], rows: Any) -> list[int]:
    return [place for place in map(int, noted["sample"]) if place < len(rows)]


def _check_id(noted: Mapping[str, Any], place: int, name: str | None) -> None:
    expected = noted["sample"].get(str(place))
    if expected is not None and (name is None or _short(name) != expected):
        actual = "no id" if name is None else f"the id {_short(name)!r}"
        raise SparsortError(
            f"{_OTHER_ROWS}: row {place} has {actual} in the column {noted['column']!r}, and the plan's row {place} has "
            f"{expected!r}. {_NEXT_STEP}"
        )


def _other_ids(noted: Mapping[str, Any]) -> SparsortError:
    sampled = len(noted["sample"])
    return SparsortError(
        f"{_OTHER_ROWS}: the ids in the column {noted['column']!r} differ, although {sampled} of them are as planned. "
        f"{_NEXT_STEP}"
    )


def _other_content(fields: Sequence[str], place: int) -> SparsortError:
    differing = " and ".join(field or "content" for field in fields)
    return SparsortError(
        f"{_OTHER_ROWS}: row {place} has another {differing} than the plan's row {place}. {_NEXT_STEP}"
    )


def _short(name: str) -> str:
    if len(name) <= _LONGEST_ID:
        return name
    return f"{name[:16]}…{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def _fields(row: Any) -> Mapping[str, Any]:
    """A row as a mapping; a row of another type, such as a number or a tuple, becomes the field with the empty name."""
    return row if isinstance(row, Mapping) else {"": row}


def _content(row: Any, fields: Sequence[str] | None) -> str:
    return digest_of(_fields(row), fields)


def _ids_of(rows: Any, column: str) -> Iterator[Any]:
    if column not in _columns(rows):
        return iter([None] * len(rows))
    every = _column(rows, column)
    return every if every is not None else (_fields(row).get(column) for row in rows)


def _columns(rows: Any) -> list[str]:
    return list(getattr(rows, "column_names", None) or (_fields(rows[0]) if len(rows) else ()))


def _column(rows: Any, column: str) -> Iterator[Any] | None:
    """One column of every row; None if reading it would read the other columns too."""
    if isinstance(rows, list | tuple):
        return (_fields(row).get(column) for row in rows)
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(rows, datasets.Dataset):
        return None
    batches = rows.select_columns([column]).with_format("arrow").iter(batch_size=_CHUNK)
    return (value for batch in batches for value in batch.column(column).to_pylist())


def _only(rows: Any, fields: Sequence[str]) -> Any:
    """A `datasets.Dataset` with only these columns, so that no image is decoded for an id; any other dataset unchanged."""
    names = getattr(rows, "column_names", None)
    wanted = [name for name in names or () if name in fields]
    return rows.select_columns(wanted) if wanted and hasattr(rows, "select_columns") else rows


def _common_fields(rows: Any, id_column: str) -> list[str]:
    """The fields that every row has, sorted by name; the id is excluded unless it is the only one.

    Columns of a `datasets.Dataset` that need decoding, such as images and audio, are excluded.
    """
    if names := getattr(rows, "column_names", None):
        features = getattr(rows, "features", None) or {}
        common = {name for name in names if not hasattr(features.get(name), "decode_example")}
    else:
        common = set(_fields(next(iter(rows), {})))
        for row in rows:
            common &= _fields(row).keys()
    return sorted(map(str, common - {id_column} or common))
