"""Demonstrations that are in a prompt twice: they are reported and kept, since a caller may repeat one to give it more weight.

Contract: two demonstrations are duplicates if they have the same id or the same content. Only the selector "ids" refuses
an id that the caller lists twice, because one of the two is probably a typing error.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sparsort.curriculum.demos.pool.rows import ID_FIELD, Row, id_of, listed
from sparsort.values import is_missing


def duplicates(demos: Sequence[Row], contents: Sequence[Hashable] | None = None) -> list[str]:
    """One sentence for each group of demonstrations with the same id or the same content; empty if all differ.

    Args:
        demos: K rows.
        contents: (K,) contents, such as the texts in the prompt; by default all fields except the id.
    """
    if contents is None:
        contents = [tuple(sorted((str(name), repr(row[name])) for name in row if name != ID_FIELD)) for row in demos]
    names = [id_of(row, position) for position, row in enumerate(demos)]
    # The name of a row without an id is its position. As a number, it differs from an id "3" of another row.
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
        for places in _repeated(contents)
        # Rows that share both the id and the content are in the notes already.
        if len({ids[place] for place in places}) > 1
    ]


def _repeated(keys: Sequence[Hashable]) -> list[list[int]]:
    """The positions of each key that occurs more than once, ordered by its first occurrence."""
    positions_of: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        positions_of.setdefault(key, []).append(position)
    return [positions for positions in positions_of.values() if len(positions) > 1]
