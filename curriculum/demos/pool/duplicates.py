"""Demonstrations that are in a prompt twice: reported, and kept, since a caller may want to weigh one so.

Contract: two demonstrations are duplicates where their ids are equal, or what they show is. An id that is asked for twice by
name is refused by `select.named.by_id`, because there one of the two is a slip.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sparsort.curriculum.demos.pool.rows import ID_FIELD, Row, id_of, listed
from sparsort.values import is_missing


def duplicates(demos: Sequence[Row], contents: Sequence[Hashable] | None = None) -> list[str]:
    """One sentence for each set of demonstrations with one id or one content; none where all differ.

    Args:
        demos: K rows.
        contents: what each of them shows, such as its text in the prompt; by default all its fields but the id.
    """
    shown = [_content(row) for row in demos] if contents is None else list(contents)
    names = [id_of(row, position) for position, row in enumerate(demos)]
    # A row without an id is called by its position, which is no id of another.
    ids: list[Hashable] = [
        position if is_missing(row.get(ID_FIELD)) else name
        for position, (row, name) in enumerate(zip(demos, names, strict=True))
    ]
    notes = [
        f"{len(places)} demonstrations have the id {names[places[0]]!r}: they are at the positions "
        f"{listed([str(place) for place in places])}, counted from 0."
        for places in _repeated(ids)
    ]
    return notes + [
        f"{len(places)} demonstrations have the same content: {listed([repr(names[place]) for place in places])}."
        for places in _repeated(shown)
        if len({ids[place] for place in places}) > 1
    ]


def _content(row: Row) -> Hashable:
    return tuple(sorted((str(name), repr(value)) for name, value in row.items() if name != ID_FIELD))


def _repeated(keys: Sequence[Hashable]) -> list[list[int]]:
    """The positions of each key that is there more than once, in the order of their first."""
    places: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        places.setdefault(key, []).append(position)
    return [found for found in places.values() if len(found) > 1]
