"""Selection without a look at what the rows say: at random, the first, by id, or an even share of every label.

Contract: the functions of the table take `Candidates` and return places among its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.rows import listed
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.errors import SparsortError, did_you_mean
from sparsort.values import as_text, is_missing


def select_random(candidates: Candidates) -> Places:
    """k rows drawn by the seed."""
    order = np.random.default_rng(candidates.settings.seed).permutation(len(candidates.rows))
    return order[: candidates.k].astype(np.int64)


def select_first(candidates: Candidates) -> Places:
    """The first k rows."""
    return np.arange(candidates.k, dtype=np.int64)


def select_ids(candidates: Candidates) -> Places:
    """The rows of the ids asked for, in that order."""
    positions = by_id(candidates.known.pool.ids, candidates.settings.ids or (), candidates.excluded)
    return np.searchsorted(candidates.rows, positions).astype(np.int64)


def select_balanced(candidates: Candidates) -> Places:
    """As many rows of each label as k allows."""
    known, seed = candidates.known, candidates.settings.seed
    return balanced(known.labels, candidates.rows, candidates.k, field=str(known.label), seed=seed)


def by_id(pool_ids: Sequence[str], wanted: Sequence[Any], excluded: Mapping[int, str]) -> list[int]:
    """The positions of the wanted ids, in their order.

    Args:
        pool_ids: id of every pool row.
        wanted: ids, compared as text.
        excluded: rows that may not be chosen, with reasons.

    Raises:
        SparsortError: an id is unknown, named twice, borne by two rows, or belongs to an excluded row.
    """
    names = [as_text(name, field="ids", where=f"item {place} of ids=") for place, name in enumerate(wanted)]
    places: dict[str, list[int]] = {}
    for position, name in enumerate(pool_ids):
        places.setdefault(name, []).append(position)
    for name in names:
        if name not in places:
            hint = did_you_mean(name, pool_ids)
            raise SparsortError(f"the pool of {len(pool_ids)} rows has no row with the id {name!r}.{hint}")
        if names.count(name) > 1:
            raise SparsortError(
                f"the id {name!r} is asked for {names.count(name)} times; name each demonstration once."
            )
        if len(places[name]) > 1:
            raise SparsortError(f"{len(places[name])} rows of the pool have the id {name!r}; ids must tell rows apart.")
        if places[name][0] in excluded:
            raise SparsortError(
                f"the demonstration {name!r} cannot be chosen because {excluded[places[name][0]]}. Leave it out; "
                "where a query may stand among its own demonstrations, pass allow_leaks=True."
            )
    return [places[name][0] for name in names]


def balanced(values: Sequence[Any], rows: NDArray[np.int64], k: int, *, field: str, seed: int) -> NDArray[np.int64]:
    """Places in `rows` of k rows, an even share of every label of the pool.

    Every label gets k // L rows; what is left over goes to labels drawn at random among those with a row to spare. With
    more labels than k, k of them are drawn. The result is shuffled, so that no label stands in a block.

    Args:
        values: label of every pool row; None (or another missing value) where there is none.
        rows: positions that may be chosen.
        k: how many.
        field: the label's field, for errors.
        seed: of the draws.

    Raises:
        SparsortError: a row has no label, or a label has too few rows for its share.
    """
    unlabelled = [str(position) for position, value in enumerate(values) if is_missing(value)]
    if unlabelled:
        raise SparsortError(
            f"{len(unlabelled)} rows of the pool have no value in the label field {field!r}: {listed(unlabelled)} "
            "(positions from 0). Name the right field with label=, or leave those rows out."
        )
    generator = np.random.default_rng(seed)
    labels = [as_text(value, field=field, where=f"row {position} of the pool") for position, value in enumerate(values)]
    members: dict[str, list[int]] = {label: [] for label in labels}
    for place, position in enumerate(rows.tolist()):
        members[labels[position]].append(place)
    share, over = divmod(k, len(members))
    lacking = [f"{label!r} ({len(found)})" for label, found in members.items() if len(found) < share]
    spare = [label for label, found in members.items() if len(found) > share]
    if lacking or len(spare) < over:
        short = lacking or [f"{label!r} ({len(found)})" for label, found in members.items() if len(found) <= share]
        raise SparsortError(
            f"{k} demonstrations over {len(members)} labels need {share}{' or more' if over else ''} of each, but "
            f"these labels have too few rows to choose from: {listed(short)}. "
            "Ask for fewer, or add rows of those labels."
        )
    extra = {spare[index] for index in generator.permutation(len(spare))[:over].tolist()}
    chosen: list[int] = []
    for label, found in members.items():
        chosen += [found[index] for index in generator.permutation(len(found))[: share + (label in extra)].tolist()]
    return np.array(chosen, dtype=np.int64)[generator.permutation(k)]
