"""plan_curriculum: make a plan from the scores of some rows or of a data set.

Contract: difficulty, length and group are brought into the order of the rows first. Input that does not fit is refused, and the
error names it. Everything that is decided for the user (rows without a score, rows that are cut, scores that no row uses) is
counted in the notes of the plan.
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
from sparsort.scoring.data.rows import indexed
from sparsort.scoring.store.scores import Scores
from sparsort.values import as_text, is_missing, number_array

ScoreSource = Scores | str | Path | ArrayLike
LoadedScores = Mapping[str, Scores | NDArray[Any]]
# The conditions under which `plan_curriculum` reads an argument; see `sparsort.conditions`.
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
_MOST_NAMED = 5


def plan_curriculum(
    scores: ScoreSource | Mapping[str, ScoreSource],
    *,
    data: Any = None,
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
        scores: `Scores`, a path that `Scores.load` reads, or one difficulty per row, (N,); or a mapping from names to several
            of these, which are combined.
        data: the rows to train on, in any form that `open_rows` reads, or other examples with a length and `[position]`.
            Scores are matched to them by id or content. Without `data`, row i of the training data is row i of the scores. The
            plan notes the ids and contents of the rows, so a loader or trainer can check that it gets the same rows
            (`verification`).
        ids: one id per row, which breaks ties in difficulty. By default the ids of scores that have an id column.
        id_column: the field of the data, and of the dataset that is trained on, with the id of each row; by default that of
            the scores, else "id". With `data` and without `ids`, the ids are taken from it.
        groups: the group of each row, or the name of the field of `data` that contains it. The curriculum then mixes the
            groups in proportion, so that every prefix of the order contains the easiest rows of each group.
        lengths: tokens of each row; by default the counts of scores that count tokens.
        fingerprint: your own name for the data. A loader or trainer that gets the same name accepts its dataset as these
            rows without comparing them.
        combination: how several scores are combined: "rank_average", "lexicographic" or "intersection" (`combine`).
        weights: weight of each score in "rank_average".
        out: folder to save the plan in; the returned plan is mapped from there.
        settings: fields of `CurriculumSettings`; a pacing may be given as text, such as "root:start=0.2,until=0.5".

    Raises:
        SparsortError: scores, rows, groups and lengths do not fit together, there are no rows, or the settings conflict.
    """
    if isinstance(groups, str) and data is None:
        raise SparsortError(f"groups={groups!r} names a field of the data: pass data too, or one group per row.")
    check_name(fingerprint)
    data = None if data is None else indexed(data)
    checked = CurriculumSettings.from_json(settings)
    loaded = _load_scores(scores)
    given = {"scores": loaded, "data": data, "ids": ids, "combination": combination, "id_column": id_column}
    refuse_unread_arguments(plan_curriculum, READ_BY, given)
    difficulty, notes = _difficulty(loaded, data, combination, weights)
    n = len(difficulty)
    if ids is None and id_column is not None and data is not None:
        ids = ids_from(data, id_column)
    if n == 0:
        raise SparsortError("there are no rows to plan for. Give at least one scored row.")
    _check_size(checked, n)
    notes["unscored"] = int(np.count_nonzero(np.isnan(difficulty)))
    _check_difficulty(difficulty, checked, notes["unscored"])
    arrays = _arrays_of_rows(loaded, data, ids, groups, lengths, difficulty, checked, notes)
    notes |= note_rows(_first_scores(loaded), data, ids=ids, id_column=id_column, fingerprint=fingerprint)
    plan = _assemble(checked, arrays, difficulty, notes)
    return plan if out is None else plan.save(out)


def _arrays_of_rows(
    scores: LoadedScores,
    data: Sequence[Mapping[str, Any]] | None,
    ids: Sequence[str] | None,
    groups: str | Sequence[Any] | None,
    lengths: ArrayLike | None,
    difficulty: NDArray[Any],
    settings: CurriculumSettings,
    notes: dict[str, Any],
) -> dict[str, NDArray[Any]]:
    """The arrays of a plan that have one entry per row: difficulty, ids, groups and lengths; adds to `notes`."""
    n = len(difficulty)
    # The plan copies an array that the caller could change; a read-only memory map is used as it is.
    stored = np.asarray(difficulty, dtype=np.float32)
    arrays: dict[str, NDArray[Any]] = {
        "difficulty": stored.copy() if stored is difficulty and stored.flags.writeable else stored
    }
    if (order := _order_of_ids(scores, data, ids, n)) is not None:
        arrays["ids"] = order
    if groups is not None or settings.quotas is not None:
        arrays["groups"], notes["groups"] = _groups(groups, data, n, settings)
    if (tokens := _lengths(scores, data, lengths, n, needed=settings.needs_lengths)) is not None:
        limit = settings.pack_length or settings.token_budget
        container = "a packed sequence" if settings.pack_length else "a batch"
        arrays["lengths"], notes["cut"] = batches.cut_lengths(tokens, settings.max_length, limit, container)
    return arrays


def _assemble(
    settings: CurriculumSettings,
    arrays: dict[str, NDArray[Any]],
    difficulty: NDArray[Any],
    notes: dict[str, Any],
) -> CurriculumPlan:
    """The plan of checked settings; `arrays` has difficulty, ids, groups and lengths, and gains the order and the edges."""
    n = len(difficulty)
    ids, lengths = arrays.get("ids"), arrays.get("lengths")
    longest = None if lengths is None else int(lengths.max())
    # Ordered by the difficulty as it was given: in float32, as it is stored, more rows would tie.
    arrays |= base_order(difficulty, settings, ids, arrays.get("groups"))
    stages = settings.n_stages
    spans: Spans = []
    by_count = settings.mode == "one_pass" and settings.token_budget is None and settings.packing == "none"
    if settings.mode == "pool":
        edges = [s * (settings.steps or 0) // stages for s in range(stages + 1)]
        places, smallest = [0, n], fewest(settings, n, longest)
        if settings.pacing is not None:
            # At these steps the pacing alone would offer fewer rows than a batch needs; `available` raises the number.
            wanted = settings.pacing.share(np.arange(edges[-1]), max(1, edges[-1])) * n
            notes["below_batch"] = int(np.count_nonzero(np.ceil(wanted - 1e-9) < smallest))
    elif by_count:
        k = -(-n // (settings.batch_size or 1))
        edges = [s * k // stages for s in range(stages + 1)]
        places, smallest = [edge * n // k for edge in edges], n // k
    else:
        # The number of batches and their sizes are known only after the cut below.
        places, smallest = [s * n // stages for s in range(stages + 1)], 0
    at = np.array(places, dtype=np.int64)
    limits = available(settings, n, at, longest)
    if lengths is not None and settings.mode == "one_pass" and not by_count:
        order = arrays.pop("order", None)
        every = np.arange(n, dtype=np.int64)
        # The sequence of the first epoch is cut once. Later epochs show the same batches in another order.
        sequence = rows_at(settings, every, order=order, ids=ids, stage_places=at, limits=limits, epoch=0)
        cut_arrays, edges, spans = cut(settings, sequence.astype(row_type(n)), lengths, at)
        arrays |= cut_arrays
        smallest = int(np.diff(cut_arrays["batch_edges"]).min())
    if limits is not None:
        arrays["available"] = limits
    return CurriculumPlan(
        settings,
        arrays,
        n_rows=n,
        stage_edges=edges,
        stage_places=places,
        smallest_batch=smallest,
        turn_spans=spans,
        notes=notes,
    )


def _load_scores(scores: ScoreSource | Mapping[str, ScoreSource]) -> dict[str, Scores | NDArray[Any]]:
    named = dict(scores) if isinstance(scores, Mapping) else {"difficulty": scores}
    if not named:
        raise SparsortError("no scores were given. Pass a score folder, Scores, or one difficulty per row.")
    scores_by_name: dict[str, Scores | NDArray[Any]] = {}
    for name, given in named.items():
        if isinstance(given, (str, Path)):
            path = str(given)
            try:
                given = Scores.load(path)
            except SparsortError as error:
                # Every error must name the path, since several scores may have been given.
                raise error if path in str(error) else SparsortError(f"{path}: {error}") from error
        if not isinstance(given, Scores):
            try:
                given = np.asanyarray(given)
                if given.dtype == object and given.ndim == 1:
                    given = number_array(given)
            except (OverflowError, TypeError, ValueError, RuntimeError) as error:
                raise SparsortError(
                    f"{name} cannot be read as numbers ({error}). Pass Scores, the path of a score folder, or one number "
                    "per row; for a tensor, tensor.detach().float().numpy()."
                ) from error
            if given.ndim != 1 or given.dtype.kind not in "fiu":
                raise SparsortError(
                    f"{name} must be one number per row, (N,), not {given.dtype} of shape {given.shape}. "
                    "Pass Scores, the path of a score folder, or an array of difficulties."
                )
        scores_by_name[name] = given
    return scores_by_name


def _difficulty(
    scores: LoadedScores,
    data: Sequence[Mapping[str, Any]] | None,
    combination: Combination,
    weights: Mapping[str, float] | None,
) -> tuple[NDArray[Any], dict[str, Any]]:
    """One difficulty per row, and the notes on its origin."""
    columns: dict[str, NDArray[Any]] = {}
    notes: dict[str, Any] = {"scores": {}, "unused_scores": 0}
    for name, given in scores.items():
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
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise SparsortError(
            f"the numbers of rows differ: {counts}. Pass one difficulty per row, or Scores together with the data, to "
            "match them by id."
        )
    if data is None:
        _check_same_rows(scores)
    if combination not in COMBINATIONS:
        raise unknown_choice("combination", combination, COMBINATIONS)
    if len(columns) == 1:
        if weights is not None:
            raise SparsortError(
                "weights have no effect, since only one score was given. Omit weights, or pass several scores."
            )
        return next(iter(columns.values())), notes
    notes["combination"] = combination
    return combine(columns, combination, weights=weights), notes


def _first_scores(scores: LoadedScores) -> Scores | None:
    return next((given for given in scores.values() if isinstance(given, Scores)), None)


def _check_same_rows(scores: LoadedScores) -> None:
    """Refuse scores that belong to different rows, or to rows in another order, since they would be combined by position."""
    named = [(name, given) for name, given in scores.items() if isinstance(given, Scores)]
    for name, other in named[1:]:
        first_name, first = named[0]
        # Scores can be compared by id, or by a digest over the same content; otherwise their order is trusted.
        origins = [given.provenance for given in (first, other)]
        if all(origin.get("id_column") is not None for origin in origins):
            column = "id"
        elif origins[0].get("content") is not None and origins[0].get("content") == origins[1].get("content"):
            column = "digest"
        else:
            continue
        if (differing := np.flatnonzero(first.column(column) != other.column(column))).size:
            raise SparsortError(
                f"the scores {first_name} and {name} belong to different rows, or to rows in another order, such as "
                f"row {int(differing[0])}. Pass data, so that both are matched by id or content (--data FILE of sparsort plan)."
            )


def _order_of_ids(
    scores: LoadedScores,
    data: Sequence[Mapping[str, Any]] | None,
    ids: Sequence[str] | None,
    n: int,
) -> NDArray[Any] | None:
    """The rows in the order of their ids, (n,); None if there are no ids, or the rows are in that order already."""
    if ids is None:
        first = next(iter(scores.values()))
        column = first.provenance.get("id_column") if isinstance(first, Scores) else None
        if not isinstance(first, Scores) or column is None:
            return None
        named = first.ids if data is None else [row.get(column) for row in data]
        # A row without an id was matched by its content, and only its position identifies it.
        if any(map(is_missing, named)):
            return None
        ids = [as_text(name, field=spell([column]), where=f"row {place}") for place, name in enumerate(named)]
    if len(ids) != n:
        raise SparsortError(f"{len(ids)} ids for {n} rows: pass one id per row, or no ids.")
    order = by_id(ids)
    return None if np.array_equal(order, np.arange(n)) else order


def _groups(
    groups: str | Sequence[Any] | None, data: Sequence[Mapping[str, Any]] | None, n: int, settings: CurriculumSettings
) -> tuple[NDArray[np.int32], list[str]]:
    if groups is None:
        raise SparsortError(
            "quotas need the group of each row: pass groups, either one per row or the name of a field of the data."
        )
    if isinstance(groups, str):
        return _coded([row.get(groups) for row in data or []], groups, n, settings)
    return _coded(groups, "groups", n, settings)


def _coded(
    groups: Sequence[Any], field: str, n: int, settings: CurriculumSettings
) -> tuple[NDArray[np.int32], list[str]]:
    """The number of each row's group, (n,), and the names of the groups."""
    if len(groups) != n:
        raise SparsortError(f"{len(groups)} groups for {n} rows: pass one group per row.")
    # `np.unique` sorts the names, so the numbers do not depend on the order of the rows.
    names, codes = np.unique(np.array(group_names(groups, field)), return_inverse=True)
    known = [str(name) for name in names]
    for name, share in (settings.quotas or {}).items():
        if name not in known:
            raise unknown_choice("group in quotas", name, known)
        size = int(np.count_nonzero(codes == known.index(name)))
        if (most := int(np.ceil(share * (settings.batch_size or 0) - 1e-9))) > size:
            raise SparsortError(
                f"the quota {share:g} of group {name!r} is up to {most} examples of a batch of {settings.batch_size}, and the "
                f"group has {size}. Lower the quota or the batch size."
            )
    if settings.quotas is not None and (missing := set(known) - set(settings.quotas)):
        raise SparsortError(
            f"quotas have no share for the group(s) {', '.join(sorted(missing)[:_MOST_NAMED])}, which would never be shown. "
            "Give every group a share, or remove its rows from the data."
        )
    return codes.astype(np.int32), known


def _lengths(
    scores: LoadedScores,
    data: Sequence[Mapping[str, Any]] | None,
    lengths: ArrayLike | None,
    n: int,
    *,
    needed: bool,
) -> NDArray[Any] | None:
    if lengths is not None:
        given_lengths = np.asarray(lengths)
        if given_lengths.shape != (n,):
            raise SparsortError(
                f"lengths must be one number of tokens per row, ({n},), not an array of shape {given_lengths.shape}."
            )
        return given_lengths
    if not needed:
        return None
    for given in scores.values():
        if isinstance(given, Scores) and (counted := counted_tokens(given, data)) is not None:
            return counted
    raise SparsortError(
        "batches by tokens, packing and grouping by length need the length of each row, and the scores do not have it for "
        "these rows. Pass lengths, one number of tokens per row (--lengths FIELD of sparsort plan)."
    )


def counted_tokens(scores: Scores, data: Sequence[Mapping[str, Any]] | None = None) -> NDArray[np.int64] | None:
    """Tokens of each row as the scorer counted them, (N,); None if it did not count them for every row."""
    import pyarrow as pa

    tokens = scores.column("n_tokens")
    if not tokens.size or tokens.min() < 1:
        return None
    if data is not None:
        # `Scores` can look up a row's difficulty by id or content. To look up its tokens, put them into that column.
        place = scores.table.schema.get_field_index("difficulty")
        table = scores.table.set_column(place, "difficulty", pa.array(tokens, pa.float64()))
        tokens = Scores(table, scores.provenance).difficulty_of(data)
    return tokens.astype(np.int64)


def _check_size(settings: CurriculumSettings, n: int) -> None:
    if settings.batch_size is not None and settings.packing == "none" and settings.batch_size > n:
        raise SparsortError(
            f"batch_size={settings.batch_size} is above the {n} rows of the data. Choose batch_size ≤ {n}, or use more data."
        )
    # The number of batches in an epoch. Before the cut by length it is not known, but there are at most as many as rows.
    k = settings.steps if settings.mode == "pool" else n
    if settings.mode == "one_pass" and settings.batch_size and settings.packing == "none":
        k = -(-n // settings.batch_size)
    if settings.n_stages > (k or 0) and not (settings.mode == "pool" and settings.stages is None):
        raise SparsortError(f"{settings.n_stages} stages do not fit in an epoch of {k} batches. Choose stages ≤ {k}.")
    if settings.schedule in ("folded", "interleaved") and settings.folds > n:
        raise SparsortError(
            f"{settings.folds} folds need at least as many rows, and there are {n}. Choose folds ≤ {n}."
        )


def _check_difficulty(difficulty: NDArray[Any], settings: CurriculumSettings, unscored: int) -> None:
    """Refuse rows without a score if the settings do, and difficulties that give no order although the settings need one."""
    if unscored and settings.unscored == "error":
        raise SparsortError(
            f"{unscored} of {len(difficulty)} rows have no score (NaN), such as row "
            f"{int(np.flatnonzero(np.isnan(difficulty))[0])}. Place them with unscored='last' or 'first', or remove them from "
            "the data."
        )
    if settings.schedule in ("shuffle", "as_given") or settings.direction == "random":
        return
    scored = difficulty[~np.isnan(difficulty)]
    if scored.size == 0:
        raise SparsortError("no row has a score: every difficulty is NaN. Score the rows first (sparsort score).")
    if len(difficulty) > 1 and bool(np.all(scored == scored[0])):
        raise SparsortError(
            f"every scored row has the same difficulty, {scored[0]}, so the rows cannot be ordered. Use another score, or "
            "schedule='shuffle' for a plain shuffle."
        )
