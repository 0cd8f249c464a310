"""plan_curriculum: scores, of some rows or of a data set, into a plan.

Contract: difficulty, length and group are brought into the order of the rows first; whatever does not fit is refused
with its name; everything that is decided for the user (rows without a score, rows that are cut, scores that no row
uses) is counted in the plan's notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.conditions import Table, When, refuse_unread_arguments
from sparsort.curriculum.loading.loader.verification import check_name, ids_from, note_rows
from sparsort.curriculum.loading.plan import batches
from sparsort.curriculum.loading.plan.arrays import Spans, available, base_order, cut, fewest, rows_at
from sparsort.curriculum.loading.plan.combine import COMBINATIONS, Combination, combine
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.ranking import by_id, group_names, row_type
from sparsort.curriculum.loading.plan.settings import CurriculumOptions, CurriculumSettings
from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import spell
from sparsort.scoring.scores import Scores
from sparsort.values import as_text, is_missing, number_array

Given = Scores | str | Path | ArrayLike
# What an argument of `plan_curriculum` needs to be read; see `sparsort.conditions`.
READ_BY: Table = {
    "combination": (
        When(
            holds=lambda values: len(values["scores"]) > 1 or values["combination"] not in COMBINATIONS,
            why="several scores are combined, and there is one",
        ),
    ),
    "id_column": (
        When(
            holds=lambda values: (
                values["data"] is not None
                or values["ids"] is not None
                or any(isinstance(given, Scores) for given in values["scores"].values())
            ),
            why="numbers have no ids, and neither data= nor ids= was given",
        ),
    ),
}
_SHOWN = 5


def plan_curriculum(
    scores: Given | Mapping[str, Given],
    *,
    data: Sequence[Mapping[str, Any]] | None = None,
    ids: Sequence[str] | None = None,
    id_column: str | None = None,
    groups: str | Sequence[Any] | None = None,
    lengths: ArrayLike | None = None,
    fingerprint: str | None = None,
    combination: Combination = "rank_average",
    weights: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    **settings: Unpack[CurriculumOptions],
) -> CurriculumPlan:
    """Plan every batch of a training run.

    Args:
        scores: `Scores`, a path that `Scores.load` reads, or one difficulty a row, (N,); or several by name, combined.
        data: the rows to train on, as a `datasets.Dataset` or a sequence of mappings: scores are matched to them by id or
            content. Without, row i of the data is row i of the scores. The plan notes their ids and contents, so that a
            loader or trainer can tell whether it is given the same rows (`verification`).
        ids: one id a row; ties in difficulty break by them. Taken from scores that have an id column.
        id_column: the field of the data, and of the dataset that is trained on, with the id of each row; by default that of
            the scores, else "id". With `data` and without `ids`, the ids are taken from it.
        groups: the group of each row, or the name of the field of `data` that tells it. A curriculum then takes each
            group's easiest together, so that none is starved.
        lengths: tokens of each row; scores that count tokens bring their own.
        fingerprint: your own name for the data. A loader or trainer that is given the same name takes its dataset for these
            rows without comparing them.
        combination: of several scores: "rank_average", "lexicographic" or "intersection" (`combine`).
        weights: of the scores in "rank_average".
        out: folder to save the plan in; it is then mapped from there.
        settings: of `CurriculumSettings`; a pacing may be given as text, such as "root:start=0.2,until=0.5".

    Raises:
        SparsortError: scores, rows, groups and lengths that do not fit together, no rows, or settings without meaning.
    """
    if isinstance(groups, str) and data is None:
        raise SparsortError(f"groups={groups!r} names a field of the data: pass data too, or one group a row.")
    check_name(fingerprint)
    asked = CurriculumSettings.from_json(settings)
    read = _read(scores)
    given = {"scores": read, "data": data, "ids": ids, "combination": combination, "id_column": id_column}
    refuse_unread_arguments(plan_curriculum, READ_BY, given)
    difficulty, notes = _difficulty(read, data, combination, weights)
    n = len(difficulty)
    if ids is None and id_column is not None and data is not None:
        ids = ids_from(data, id_column)
    if n == 0:
        raise SparsortError("there are no rows to plan for. Give at least one scored row.")
    _check_size(asked, n)
    notes["unscored"] = int(np.count_nonzero(np.isnan(difficulty)))
    if notes["unscored"] and asked.unscored == "error":
        raise SparsortError(
            f"{notes['unscored']} of {n} rows have no score (NaN), such as row {int(np.flatnonzero(np.isnan(difficulty))[0])}. "
            "Say where they stand with unscored='last' or 'first', or leave them out of the data."
        )
    if asked.schedule not in ("shuffle", "as_given") and asked.direction != "random":
        _check_spread(difficulty)
    # A copy where the caller could change it; a memory map that is read-only stays one.
    shown = np.asarray(difficulty, dtype=np.float32)
    arrays: dict[str, NDArray[Any]] = {
        "difficulty": shown.copy() if shown is difficulty and shown.flags.writeable else shown
    }
    if (order := _ids(read, data, ids, n)) is not None:
        arrays["ids"] = order
    if groups is not None or asked.quotas is not None:
        arrays["groups"], notes["groups"] = _groups(groups, data, n, asked)
    if (found := _lengths(read, data, lengths, n, needed=asked.needs_lengths)) is not None:
        limit = asked.pack_length or asked.token_budget
        what = "a packed sequence" if asked.pack_length else "a batch"
        arrays["lengths"], notes["cut"] = batches.cut_lengths(found, asked.max_length, limit, what)
    notes |= note_rows(_scores_in(read), data, ids=ids, id_column=id_column, fingerprint=fingerprint)
    plan = _assemble(asked, arrays, difficulty, notes, n)
    return plan if out is None else plan.save(out)


def _assemble(
    asked: CurriculumSettings, arrays: dict[str, NDArray[Any]], difficulty: NDArray[Any], notes: dict[str, Any], n: int
) -> CurriculumPlan:
    ids, lengths = arrays.get("ids"), arrays.get("lengths")
    longest = None if lengths is None else int(lengths.max())
    arrays |= base_order(difficulty, asked, ids, arrays.get("groups"))
    stages = asked.n_stages
    spans: Spans = []
    by_count = asked.mode == "one_pass" and asked.token_budget is None and asked.packing == "none"
    if asked.mode == "pool":
        edges = [s * (asked.steps or 0) // stages for s in range(stages + 1)]
        places, smallest = [0, n], fewest(asked, n, longest)
        if asked.pacing is not None:
            wanted = asked.pacing.share(np.arange(edges[-1]), max(1, edges[-1])) * n
            notes["below_batch"] = int(np.count_nonzero(np.ceil(wanted - 1e-9) < smallest))
    elif by_count:
        k = -(-n // (asked.batch_size or 1))
        edges = [s * k // stages for s in range(stages + 1)]
        places, smallest = [edge * n // k for edge in edges], n // k
    else:
        places, smallest = [s * n // stages for s in range(stages + 1)], 0
    at = np.array(places, dtype=np.int64)
    limits = available(asked, n, at, longest)
    if lengths is not None and asked.mode == "one_pass" and not by_count:
        order = arrays.pop("order", None)
        every = np.arange(n, dtype=np.int64)
        sequence = rows_at(asked, every, order=order, ids=ids, stage_places=at, limits=limits, epoch=0)
        made, edges, spans = cut(asked, sequence.astype(row_type(n)), lengths, at)
        arrays |= made
        smallest = int(np.diff(made["batch_edges"]).min())
    if limits is not None:
        arrays["available"] = limits
    return CurriculumPlan(
        asked,
        arrays,
        n_rows=n,
        stage_edges=edges,
        stage_places=places,
        smallest_batch=smallest,
        turn_spans=spans,
        notes=notes,
    )


def _read(scores: Given | Mapping[str, Given]) -> dict[str, Scores | NDArray[Any]]:
    named = dict(scores) if isinstance(scores, Mapping) else {"difficulty": scores}
    if not named:
        raise SparsortError("no scores were given. Pass a score folder, Scores, or one difficulty a row.")
    found: dict[str, Scores | NDArray[Any]] = {}
    for name, given in named.items():
        if isinstance(given, (str, Path)):
            path = str(given)
            try:
                given = Scores.load(path)
            except SparsortError as error:
                raise error if path in str(error) else SparsortError(f"{path}: {error}") from error
        if not isinstance(given, Scores):
            try:
                given = np.asanyarray(given)
                if given.dtype == object and given.ndim == 1:
                    given = number_array(given)
            except (OverflowError, TypeError, ValueError, RuntimeError) as error:
                raise SparsortError(
                    f"{name} cannot be read as numbers ({error}). Pass Scores, the path of a score folder, or one number a "
                    "row; of a tensor, tensor.detach().float().numpy()."
                ) from error
            if given.ndim != 1 or given.dtype.kind not in "fiu":
                raise SparsortError(
                    f"{name} must be one number a row, (N,), not {given.dtype} of shape {given.shape}. "
                    "Pass Scores, the path of a score folder, or an array of difficulties."
                )
        found[name] = given
    return found


def _difficulty(
    read: Mapping[str, Scores | NDArray[Any]],
    data: Sequence[Mapping[str, Any]] | None,
    combination: Combination,
    weights: Mapping[str, float] | None,
) -> tuple[NDArray[Any], dict[str, Any]]:
    """One difficulty a row, and the notes on where it comes from."""
    columns: dict[str, NDArray[Any]] = {}
    notes: dict[str, Any] = {"scores": {}, "unused_scores": 0}
    for name, given in read.items():
        if isinstance(given, Scores):
            columns[name] = given.difficulty if data is None else given.difficulty_of(data)
            notes["scores"][name] = given.provenance
            if data is not None:
                notes["unused_scores"] = max(notes["unused_scores"], len(given) - len(columns[name]))
        else:
            columns[name] = given
            notes["scores"][name] = {"scorer": "array"}
    sizes = {name: len(column) for name, column in columns.items()}
    if data is not None:
        sizes["data"] = len(data)
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise SparsortError(
            f"the numbers of rows differ: {told}. Pass one difficulty for each row, or Scores together with the data, "
            "which are matched by id."
        )
    if data is None:
        _check_same_rows(read)
    if combination not in COMBINATIONS:
        raise unknown_choice("combination", combination, COMBINATIONS)
    if len(columns) == 1:
        if weights is not None:
            raise SparsortError(
                "weights weigh several scores against each other, and one was given. Leave weights out."
            )
        return next(iter(columns.values())), notes
    return combine(columns, combination, weights=weights), notes


def _scores_in(read: Mapping[str, Scores | NDArray[Any]]) -> Scores | None:
    return next((given for given in read.values() if isinstance(given, Scores)), None)


def _check_same_rows(read: Mapping[str, Scores | NDArray[Any]]) -> None:
    """Refuse scores that would be combined by position although they are of other rows, or of rows in another order."""
    named = [(name, given) for name, given in read.items() if isinstance(given, Scores)]
    for name, other in named[1:]:
        first_name, first = named[0]
        about = [scores.provenance for scores in (first, other)]
        if all(each.get("id_column") is not None for each in about):
            column = "id"
        elif about[0].get("content") is not None and about[0].get("content") == about[1].get("content"):
            column = "digest"
        else:
            continue
        if (differing := np.flatnonzero(first.column(column) != other.column(column))).size:
            raise SparsortError(
                f"the scores {first_name} and {name} are of other rows, or of rows in another order, such as row "
                f"{int(differing[0])}. Pass data, to which both are matched by id or content (--data FILE of sparsort plan)."
            )


def _ids(
    read: Mapping[str, Scores | NDArray[Any]],
    data: Sequence[Mapping[str, Any]] | None,
    ids: Sequence[str] | None,
    n: int,
) -> NDArray[Any] | None:
    if ids is None:
        first = next(iter(read.values()))
        column = first.provenance.get("id_column") if isinstance(first, Scores) else None
        if not isinstance(first, Scores) or column is None:
            return None
        named = first.ids if data is None else [row.get(column) for row in data]
        if any(map(is_missing, named)):  # rows that were found by their content have their place alone
            return None
        ids = [as_text(name, field=spell([column]), where=f"row {place}") for place, name in enumerate(named)]
    if len(ids) != n:
        raise SparsortError(f"{len(ids)} ids for {n} rows: pass one id a row, or none.")
    order = by_id(ids)
    return None if np.array_equal(order, np.arange(n)) else order


def _groups(
    groups: str | Sequence[Any] | None, data: Sequence[Mapping[str, Any]] | None, n: int, asked: CurriculumSettings
) -> tuple[NDArray[np.int32], list[str]]:
    if groups is None:
        raise SparsortError(
            "quotas need the group of each row: pass groups, one a row or the name of a field of the data."
        )
    if isinstance(groups, str):
        return _coded([row.get(groups) for row in data or []], groups, n, asked)
    return _coded(groups, "groups", n, asked)


def _coded(groups: Sequence[Any], field: str, n: int, asked: CurriculumSettings) -> tuple[NDArray[np.int32], list[str]]:
    """(n,) the number of each row's group, and the groups' names."""
    if len(groups) != n:
        raise SparsortError(f"{len(groups)} groups for {n} rows: pass one group a row.")
    names, codes = np.unique(np.array(group_names(groups, field)), return_inverse=True)
    found = [str(name) for name in names]
    for name, share in (asked.quotas or {}).items():
        if name not in found:
            raise unknown_choice("group in quotas, it has no examples:", name, found)
        held = int(np.count_nonzero(codes == found.index(name)))
        if (want := int(np.ceil(share * (asked.batch_size or 0) - 1e-9)) + 1) > held + 1:
            raise SparsortError(
                f"the quota {share:g} of group {name!r} is up to {want - 1} examples of a batch of {asked.batch_size}, and the "
                f"group has {held}. Lower the quota or the batch size."
            )
    if asked.quotas is not None and (left := set(found) - set(asked.quotas)):
        raise SparsortError(
            f"quotas say nothing of the group(s) {', '.join(sorted(left)[:_SHOWN])}, which would never be seen. "
            "Give every group a share, or leave its rows out of the data."
        )
    return codes.astype(np.int32), found


def _lengths(
    read: Mapping[str, Scores | NDArray[Any]],
    data: Sequence[Mapping[str, Any]] | None,
    lengths: ArrayLike | None,
    n: int,
    *,
    needed: bool,
) -> NDArray[Any] | None:
    if lengths is not None:
        found = np.asarray(lengths)
        if found.shape != (n,):
            raise SparsortError(f"lengths must be one number of tokens a row, ({n},), not of shape {found.shape}.")
        return found
    if not needed:
        return None
    for given in read.values():
        if isinstance(given, Scores) and (counted := counted_tokens(given, data)) is not None:
            return counted
    raise SparsortError(
        "batches by tokens, packing and grouping by length need the length of each row, and the scores do not tell it for "
        "these rows. Pass lengths, one number of tokens a row (--lengths FIELD of sparsort plan)."
    )


def counted_tokens(scores: Scores, data: Sequence[Mapping[str, Any]] | None = None) -> NDArray[np.int64] | None:
    """Tokens of each row as the scorer counted them, (N,); None where it did not count every row's."""
    import pyarrow as pa

    tokens = scores.column("n_tokens")
    if not tokens.size or tokens.min() < 1:
        return None
    if data is not None:
        # Scores find a row's difficulty by its id or content; here its tokens stand in that place.
        place = scores.table.schema.get_field_index("difficulty")
        table = scores.table.set_column(place, "difficulty", pa.array(tokens, pa.float64()))
        tokens = Scores(table, scores.provenance).difficulty_of(data)
    return tokens.astype(np.int64)


def _check_size(asked: CurriculumSettings, n: int) -> None:
    if asked.batch_size is not None and asked.packing == "none" and asked.batch_size > n:
        raise SparsortError(
            f"batch_size={asked.batch_size} is above the {n} rows of the data. Choose batch_size ≤ {n}, or use more data."
        )
    k = (
        asked.steps
        if asked.mode == "pool"
        else -(-n // asked.batch_size)
        if asked.batch_size and asked.packing == "none"
        else n
    )
    if asked.n_stages > (k or 0) and not (asked.mode == "pool" and asked.stages is None):
        raise SparsortError(f"{asked.n_stages} stages do not fit in an epoch of {k} batches. Choose stages ≤ {k}.")
    if asked.schedule in ("folded", "interleaved") and asked.folds > n:
        raise SparsortError(f"{asked.folds} folds need at least as many rows, and there are {n}. Choose folds ≤ {n}.")


def _check_spread(difficulty: NDArray[Any]) -> None:
    scored = difficulty[~np.isnan(difficulty)] if difficulty.dtype.kind == "f" else difficulty
    if scored.size == 0:
        raise SparsortError("no row has a score: every difficulty is NaN. Score the rows first (sparsort score).")
    if len(difficulty) > 1 and bool(np.all(scored == scored[0])):
        raise SparsortError(
            f"every scored row has the same difficulty, {scored[0]}: there is no easy and no hard. Use another score, or "
            "schedule='shuffle' for a plain shuffle."
        )
