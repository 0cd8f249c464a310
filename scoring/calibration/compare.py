"""From a table of candidates and the references of its rows to a `Calibration`.

Contract: knows no model; what it says is decided by the table, the references and the seed. A reference rises with difficulty;
`loss` (the model's own, read in the same pass) and `length` are in the table already. The length held fixed is that of what a
candidate reads: the prompt's, for those of the answer the answer's. Rows are compared where the reference and every candidate
have a value; a candidate that lacks one in more than a tenth of the rows, or does not vary, is left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.calibration.calibration import LENGTH, Calibration, Definition
from sparsort.scoring.calibration.resampling import Array
from sparsort.scoring.calibration.verdict import Associations, HeldOut, Judgement, check_reference, judge
from sparsort.scoring.scorers.candidate_job import ANSWER_TOKENS, LOSS
from sparsort.scoring.scorers.candidates import Candidate
from sparsort.scoring.store.scores import Scores

# A candidate must have a value on this share of the rows.
_ENOUGH = 0.9


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Candidates, lengths and references of all rows, NaN where there is none."""

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
        scores: what `CandidateScorer` gave.
        references: name → (N,) numbers that rise with difficulty, NaN where unknown; `loss` and `length` come from the table.
        target: the reference to choose by; None for the first of loss, correct, level and the others as given.
        revision: of the model, to record.
        notes: what was left out before, to record.
        n_boot: bootstrap draws; `n_perm` permutations; `level` of the intervals; `seed`.

    Raises:
        SparsortError: no reference, one that is constant or has too few rows, no row that could be scored.
    """
    _check_numbers(n_boot, n_perm, level)
    problem = _problem(scores, references)
    found: dict[str, Judgement] = {}
    left_out = list(notes)
    names = [name for name in problem.references if name != LENGTH]
    if not names:
        raise SparsortError(
            "there is nothing to calibrate against. Pass answer='…' (--answer) for the model's own loss, a human level "
            "(--level COLUMN) or whether each answer was right (--correct COLUMN)."
        )
    first = [name for name in ("loss", "correct", "level") if name in names]
    target = target if target is not None else (first or names)[0]
    if target not in names:
        raise unknown_choice("target", target, names)
    for rows, columns, together in _alike(problem, left_out):
        options = {"n_boot": n_boot, "n_perm": n_perm, "level": level, "seed": seed}
        judged = judge(
            problem.x_NC[np.ix_(rows, columns)],
            np.stack([problem.references[name][rows] for name in together], axis=1),
            problem.lengths_NG[rows],
            problem.group_C[columns],
            **options,  # type: ignore[arg-type]
        )
        for name, judgement in zip(together, judged, strict=True):
            found[name] = _spread_out(judgement, columns, len(problem.names), without_fixed=name == LENGTH)
    ordered = {name: found[name] for name in problem.references if name in found}
    return Calibration(
        definition=_define(scores.provenance, problem.names, ordered[target], revision),
        target=target,
        candidates=tuple(problem.names),
        judgements=ordered,
        left_out=tuple(left_out),
        n_rows=len(scores),
        settings={
            "n_boot": n_boot,
            "n_perm": n_perm,
            "level": level,
            "seed": seed,
            "source": scores.provenance.get("source"),
            "max_length": scores.provenance.get("max_length"),
            "truncation": scores.provenance.get("truncation"),
            "environment": scores.provenance.get("environment"),
        },
    )


def _problem(scores: Scores, references: Mapping[str, Array]) -> _Problem:
    # The columns of a run on disk are read at once: there are hundreds.
    scores = Scores(scores.table, scores.provenance)
    ok = np.array([status == "ok" for status in scores.column("status")], dtype=bool)
    if not ok.any():
        counts = ", ".join(f"{count} {status}" for status, count in scores.counts("status").items())
        raise SparsortError(
            f"no row could be scored ({counts}); the column 'reason' of the table says why of each row."
        )
    names = [name for name in scores.metrics if name not in (LOSS, ANSWER_TOKENS)]
    lengths = [scores.column("n_tokens")]
    if ANSWER_TOKENS in scores.metrics:
        lengths.append(scores.column(ANSWER_TOKENS))
    known: dict[str, Array] = {}
    if LOSS in scores.metrics:
        known["loss"] = scores.column(LOSS)
    for name, values in references.items():
        if len(values) != len(scores):
            raise SparsortError(f"the reference {name!r} has {len(values)} values, and there are {len(scores)} rows.")
        known[name] = np.asarray(values, dtype=np.float64)
    known[LENGTH] = np.asarray(lengths[0], dtype=np.float64)
    return _Problem(
        names=names,
        x_NC=np.stack([scores.column(name) for name in names], axis=1),
        lengths_NG=np.stack([np.asarray(length, dtype=np.float64) for length in lengths], axis=1),
        group_C=np.array([int(Candidate.of(name).reads_answer) for name in names], dtype=np.int64),
        references={name: np.where(ok & np.isfinite(values), values, np.nan) for name, values in known.items()},
    )


def _alike(problem: _Problem, left_out: list[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64], list[str]]]:
    """(rows, candidates, references) that can be compared together; what cannot be is added to `left_out`."""
    groups: dict[tuple[bytes, bytes], tuple[NDArray[np.int64], NDArray[np.int64], list[str]]] = {}
    said: set[str] = set()
    for name, values in problem.references.items():
        known = np.isfinite(values)
        finite_NC = np.isfinite(problem.x_NC)
        usable = finite_NC[known].sum(axis=0) >= _ENOUGH * max(1, known.sum())
        rows = np.flatnonzero(known & finite_NC[:, usable].all(axis=1))
        spread = np.ptp(problem.x_NC[rows], axis=0) if len(rows) else np.full(len(usable), np.nan)
        columns = np.flatnonzero(usable & (spread > 0))
        try:
            check_reference(values[rows])
            if not len(columns):
                raise SparsortError("no candidate has a value there. Look at the column 'reason' of the table.")
        except SparsortError as error:
            if name == LENGTH:
                left_out.append(f"the reference 'length': {error}")
                continue
            missing = len(values) - int(known.sum())
            gone = f" ({missing} of {len(values)} rows lack it or a score)" if missing else ""
            raise SparsortError(f"the reference {name!r}{gone}: {error}") from None
        for place in np.flatnonzero(~usable | ~(spread > 0)).tolist():
            why = "does not vary" if usable[place] else "has no value in more than a tenth of the rows"
            sentence = f"{problem.names[place]} {why}"
            if sentence not in said:
                said.add(sentence)
                left_out.append(sentence)
        key = (rows.tobytes(), columns.tobytes())
        groups.setdefault(key, (rows, columns, []))[2].append(name)
    return list(groups.values())


def _spread_out(found: Judgement, columns: NDArray[np.int64], count: int, *, without_fixed: bool) -> Judgement:
    """The judgement with numbers for all candidates, NaN for those that were not compared."""
    wide = {}
    for column in fields(Associations):
        values = np.full(count, np.nan)
        if not (without_fixed and column.name.startswith("fixed_")):
            values[columns] = getattr(found.associations, column.name)
        wide[column.name] = values

    def renamed(held: HeldOut) -> HeldOut:
        return replace(held, chosen=(int(columns[held.chosen[0]]), int(columns[held.chosen[1]])))

    return replace(
        found,
        associations=Associations(**wide),
        plain=renamed(found.plain),
        fixed=renamed(found.fixed),
        best=int(columns[found.best]),
    )


def _define(provenance: Mapping[str, Any], names: Sequence[str], found: Judgement, revision: str | None) -> Definition:
    candidate = Candidate.of(names[found.best])
    way = names[found.best].rpartition("/")[0]
    prompt = provenance["prompt"]
    return Definition(
        candidate=candidate,
        orientation=found.orientation,
        fit=provenance["fits"].get(way, {"rule": "none"}),
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
        raise SparsortError(f"level is {level}; it must lie between 0 and 1, such as 0.95.")
    if n_boot < 100:
        raise SparsortError(f"n_boot is {n_boot} (--draws); an interval needs at least 100 draws.")
    needed = int(np.ceil(2 / (1 - level) - 1e-9)) - 1
    if n_perm < needed:
        raise SparsortError(f"n_perm is {n_perm}; at a level of {level} at least {needed} permutations are needed.")
