"""Selection that does not read the rows' texts: at random, the first, by id, or an equal share of each label.

Contract: the functions take `Candidates` and return indices among its rows.
"""

from __future__ import annotations

import numpy as np

from sparsort.curriculum.demos.pool.rows import listed
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.errors import SparsortError, did_you_mean
from sparsort.values import as_text, is_missing


def select_random(candidates: Candidates) -> Places:
    """k rows, drawn at random from the seed."""
    order = np.random.default_rng(candidates.settings.seed).permutation(len(candidates.rows))
    return order[: candidates.k].astype(np.int64)


def select_first(candidates: Candidates) -> Places:
    """The first k rows."""
    return np.arange(candidates.k, dtype=np.int64)


def select_ids(candidates: Candidates) -> Places:
    """The rows with the given ids, in their order; ids are compared as text.

    Raises:
        SparsortError: an id is unknown, is listed twice, belongs to two rows, or belongs to an excluded row.
    """
    pool_ids = candidates.known.pool.ids
    names = [
        as_text(name, field="ids", where=f"item {item} of ids=")
        for item, name in enumerate(candidates.settings.ids or ())
    ]
    positions_of: dict[str, list[int]] = {}
    for position, name in enumerate(pool_ids):
        positions_of.setdefault(name, []).append(position)
    for name in names:
        if name not in positions_of:
            hint = did_you_mean(name, pool_ids)
            raise SparsortError(f"the pool of {len(pool_ids)} rows has no row with the id {name!r}.{hint}")
        if names.count(name) > 1:
            raise SparsortError(f"the id {name!r} is listed {names.count(name)} times; list each demonstration once.")
        if len(positions_of[name]) > 1:
            raise SparsortError(
                f"{len(positions_of[name])} rows of the pool have the id {name!r}, so it does not identify a row. "
                "Give each row an id of its own."
            )
        if positions_of[name][0] in candidates.excluded:
            raise SparsortError(
                f"the demonstration {name!r} cannot be chosen because {candidates.excluded[positions_of[name][0]]}. "
                "Remove it, or, if a query may be among its own demonstrations, pass allow_leaks=True."
            )
    # `rows` is ascending, so a search turns positions in the pool into indices among the candidates.
    return np.searchsorted(candidates.rows, [positions_of[name][0] for name in names]).astype(np.int64)


def select_balanced(candidates: Candidates) -> Places:
    """k rows with an equal share of each of the L labels of the pool.

    Each label gets k // L rows. The remaining rows go to labels drawn at random among those that have a row to spare. If there
    are more labels than k, k of them are drawn.

    Raises:
        SparsortError: a row has no label, or a label has too few rows for its share.
    """
    k, labels, field = candidates.k, candidates.known.labels, str(candidates.known.label)
    unlabelled = [str(position) for position, label in enumerate(labels) if is_missing(label)]
    if unlabelled:
        raise SparsortError(
            f"{len(unlabelled)} rows of the pool have no value in the label field {field!r}: {listed(unlabelled)} "
            "(positions from 0). Name the right field with label=, or remove those rows."
        )
    generator = np.random.default_rng(candidates.settings.seed)
    # All labels of the pool count, also one whose rows are all excluded, so that the shares do not depend on the query.
    members: dict[str | None, list[int]] = {label: [] for label in labels}
    for index, position in enumerate(candidates.rows.tolist()):
        members[labels[position]].append(index)
    share, remainder = divmod(k, len(members))
    too_few = [f"{label!r} ({len(rows)})" for label, rows in members.items() if len(rows) < share]
    spare = [label for label, rows in members.items() if len(rows) > share]
    if too_few or len(spare) < remainder:
        short = too_few or [f"{label!r} ({len(rows)})" for label, rows in members.items() if len(rows) <= share]
        raise SparsortError(
            f"{k} demonstrations over {len(members)} labels need {share}{' or more' if remainder else ''} of each, but "
            f"these labels have too few rows to choose from: {listed(short)}. "
            "Ask for fewer, or add rows of those labels."
        )
    extra = {spare[index] for index in generator.permutation(len(spare))[:remainder].tolist()}
    chosen: list[int] = []
    for label, rows in members.items():
        chosen += [rows[index] for index in generator.permutation(len(rows))[: share + (label in extra)].tolist()]
    # Shuffled, so that the rows of one label do not follow each other.
    return np.array(chosen, dtype=np.int64)[generator.permutation(k)]
