"""Compares a table of candidates with references of its rows, which gives a `Calibration`.

Contract: no model is used, and the result depends only on the table, the references and the seed. A reference rises with
difficulty. The references `loss` (the model's own, from the same pass) and `length` come from the table. The length that is held
fixed is that of the text that a candidate reads: the prompt, or the answer for candidates of the answer. Rows are compared if the
reference and every candidate have a value. A candidate that has no value in more than a tenth of the rows, or that does not vary,
is skipped and reported.

Shape suffixes: N rows, C candidates, G kinds of length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.calibration.calibration import LENGTH, Calibration
from sparsort.scoring.calibration.correlation import Array
from sparsort.scoring.calibration.definition import Definition
from sparsort.scoring.calibration.verdict import Associations, HeldOut, Judgement, check_reference, judge
from sparsort.scoring.scorers.candidate_job import ANSWER_TOKENS, LOSS
from sparsort.scoring.scorers.candidates import Candidate
from sparsort.scoring.store.scores import Scores

# The least share of rows in which a candidate must have a value.
_ENOUGH = 0.9


@dataclass(frozen=True, kw_only=True)
class _CandidateTable:
    """The candidates, lengths and references of all rows, NaN where there is no value.

    `lengths_NG` has the tokens of the prompt and, if there are any, of the answer; `group_C` is each candidate's column of it.
    """

    names: list[str]
    x_NC: Array
    lengths_NG: Array
    group_C: NDArray[np.int64]
    references: dict[str, Array]


def compare(
    scores: Scores,
    references: Mapping[str, Array],
    *,
    target: str | None = None,
    revision: str | None = None,
    notes: Sequence[str] = (),
    n_boot: int = 1000,
    n_perm: int = 999,
    level: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """Compare every candidate with every reference and choose the score to use.

    Args:
        scores: the result of `CandidateScorer`.
        references: name → (N,) numbers that rise with difficulty, NaN where unknown; `loss` and `length` come from the table.
        target: the reference to choose by; None for the first of loss, correct, level and the others in their order.
        revision: revision of the model, to record.
        notes: sentences about what was skipped before, to record.
        n_boot, n_perm, level, seed: see `judge`.

    Raises:
        SparsortError: no reference, one that is constant or has too few rows, or no row that could be scored.
    """
    _check_numbers(n_boot, n_perm, level)
    columns = _table_of(scores, references)
    skipped = list(notes)
    target = _target_of([name for name in columns.references if name != LENGTH], target)
    judgements: dict[str, Judgement] = {}
    for rows, candidates, names in _comparable(columns, skipped):
        results = judge(
            columns.x_NC[np.ix_(rows, candidates)],
            np.stack([columns.references[name][rows] for name in names], axis=1),
            columns.lengths_NG[rows],
            columns.group_C[candidates],
            n_boot=n_boot,
            n_perm=n_perm,
            level=level,
            seed=seed,
        )
        for name, judgement in zip(names, results, strict=True):
            judgements[name] = _widened(judgement, candidates, len(columns.names), without_fixed=name == LENGTH)
    ordered = {name: judgements[name] for name in columns.references if name in judgements}
    settings = {"n_boot": n_boot, "n_perm": n_perm, "level": level, "seed": seed}
    return Calibration(
        definition=_define(scores.provenance, columns.names, ordered[target], revision),
        target=target,
        candidates=tuple(columns.names),
        judgements=ordered,
        left_out=tuple(skipped),
        n_rows=len(scores),
        settings=settings
        | {key: scores.provenance.get(key) for key in ("source", "max_length", "truncation", "environment")},
    )


def _target_of(names: Sequence[str], target: str | None) -> str:
    """Check the name of the target, or choose one of the references."""
    if not names:
        raise SparsortError(
            "there is nothing to calibrate against. Pass answer='…' (--answer) for the model's own loss, a human level "
            "(--level COLUMN) or whether each answer was right (--correct COLUMN)."
        )
    if target is None:
        return next((name for name in ("loss", "correct", "level") if name in names), names[0])
    if target not in names:
        raise unknown_choice("target", target, names)
    return target


def _table_of(scores: Scores, references: Mapping[str, Array]) -> _CandidateTable:
    # Scores on disk read a column when it is first used. There are hundreds, so the whole table is read instead.
    scores = Scores(scores.table, scores.provenance)
    ok = np.array([status == "ok" for status in scores.column("status")], dtype=bool)
    if not ok.any():
        counts = ", ".join(f"{count} {status}" for status, count in scores.counts("status").items())
        raise SparsortError(
            f"no row could be scored ({counts}); the column 'reason' of the table has the reason of each row."
        )
    names = [name for name in scores.metrics if name not in (LOSS, ANSWER_TOKENS)]
    lengths = [scores.column("n_tokens")]
    if ANSWER_TOKENS in scores.metrics:
        lengths.append(scores.column(ANSWER_TOKENS))
    known: dict[str, Array] = {}
    # The order decides in which order the references are listed.
    if LOSS in scores.metrics:
        known["loss"] = scores.column(LOSS)
    for name, values in references.items():
        if len(values) != len(scores):
            raise SparsortError(f"the reference {name!r} has {len(values)} values, and there are {len(scores)} rows.")
        known[name] = np.asarray(values, dtype=np.float64)
    known[LENGTH] = np.asarray(lengths[0], dtype=np.float64)
    return _CandidateTable(
        names=names,
        x_NC=np.stack([scores.column(name) for name in names], axis=1),
        lengths_NG=np.stack([np.asarray(length, dtype=np.float64) for length in lengths], axis=1),
        group_C=np.array([int(Candidate.of(name).reads_answer) for name in names], dtype=np.int64),
        references={name: np.where(ok & np.isfinite(values), values, np.nan) for name, values in known.items()},
    )


def _comparable(
    columns: _CandidateTable, skipped: list[str]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], list[str]]]:
    """Return groups (rows, candidates, references) that can be compared together, with the same draws and permutations.

    A sentence about everything that cannot be compared is added to `skipped`; a reference other than length is an error.
    """
    groups: dict[tuple[bytes, bytes], tuple[NDArray[np.int64], NDArray[np.int64], list[str]]] = {}
    finite_NC = np.isfinite(columns.x_NC)
    for name, values in columns.references.items():
        known = np.isfinite(values)
        # First the candidates with enough values, then the rows in which all of those have one.
        usable = finite_NC[known].sum(axis=0) >= _ENOUGH * max(1, known.sum())
        rows = np.flatnonzero(known & finite_NC[:, usable].all(axis=1))
        spread = np.ptp(columns.x_NC[rows], axis=0) if len(rows) else np.full(len(usable), np.nan)
        candidates = np.flatnonzero(usable & (spread > 0))
        try:
            check_reference(values[rows])
            if not len(candidates):
                raise SparsortError("no candidate has a value there. Look at the column 'reason' of the table.")
        except SparsortError as error:
            # Length is in every table, so nobody asked for it, and the others can be compared without it.
            if name == LENGTH:
                skipped.append(f"the reference 'length': {error}")
                continue
            n_missing = len(values) - int(known.sum())
            missing = f" ({n_missing} of {len(values)} rows lack it or a score)" if n_missing else ""
            raise SparsortError(f"the reference {name!r}{missing}: {error}") from None
        for place in np.flatnonzero(~usable | ~(spread > 0)).tolist():
            reason = "does not vary" if usable[place] else "has no value in more than a tenth of the rows"
            if (sentence := f"{columns.names[place]} {reason}") not in skipped:
                skipped.append(sentence)
        # Arrays cannot be keys of a dictionary.
        key = (rows.tobytes(), candidates.tobytes())
        groups.setdefault(key, (rows, candidates, []))[2].append(name)
    return list(groups.values())


def _widened(judgement: Judgement, candidates: NDArray[np.int64], count: int, *, without_fixed: bool) -> Judgement:
    """Return a judgement of some candidates with numbers for all `count` of them, NaN for those that were not compared."""
    wide = {}
    for column in fields(Associations):
        values = np.full(count, np.nan)
        if not (without_fixed and column.name.startswith("fixed_")):
            values[candidates] = getattr(judgement.associations, column.name)
        wide[column.name] = values

    def renumbered(part: HeldOut) -> HeldOut:
        return replace(part, chosen=(int(candidates[part.chosen[0]]), int(candidates[part.chosen[1]])))

    return replace(
        judgement,
        associations=Associations(**wide),
        plain=renumbered(judgement.plain),
        fixed=renumbered(judgement.fixed),
        best=int(candidates[judgement.best]),
    )


def _define(
    provenance: Mapping[str, Any], names: Sequence[str], judgement: Judgement, revision: str | None
) -> Definition:
    candidate = Candidate.of(names[judgement.best])
    measurement = names[judgement.best].rpartition("/")[0]
    prompt = provenance["prompt"]
    return Definition(
        candidate=candidate,
        orientation=judgement.orientation,
        # The fits have no entry for the rule "none".
        fit=provenance["fits"].get(measurement, {"rule": "none"}),
        l0_threshold=provenance["l0_threshold"],
        turns=tuple((role, text) for role, text in prompt["turns"]),
        answer=prompt["answer"] if candidate.reads_answer else None,
        model=provenance["environment"]["model"],
        revision=revision,
        weights=provenance["weights"],
        tokenizer=provenance["tokenizer"],
        dtype=provenance["dtype"],
    )


def _check_numbers(n_boot: int, n_perm: int, level: float) -> None:
    if not 0 < level < 1:
        raise SparsortError(f"level is {level}; it must be between 0 and 1, such as 0.95.")
    if n_boot < 100:
        raise SparsortError(f"n_boot is {n_boot} (--draws); an interval needs at least 100 draws.")
    # The smallest p, 1 / (n_perm + 1), must be able to reach (1 − level) / 2; the small number absorbs rounding.
    needed = int(np.ceil(2 / (1 - level) - 1e-9)) - 1
    if n_perm < needed:
        raise SparsortError(f"n_perm is {n_perm}; at a level of {level} at least {needed} permutations are needed.")
