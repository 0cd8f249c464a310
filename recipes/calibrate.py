"""Find out whether a sparsity score measures difficulty, for a model, a prompt and data. The recipe for `sparsort calibrate`.

Contract: mistakes in the call and the data are reported before a model is loaded. The scores of every candidate come from one
pass over the rows, which is stored and resumed if there is a file for the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, When, refuse_unread_arguments
from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.scoring.prompts.types import PromptWriter, Truncation, Turns
from sparsort.values import has_text, is_missing, number_array

if TYPE_CHECKING:
    from sparsort.scoring.calibration.calibration import Calibration
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.prompts.prompt import Prompt

# The conditions under which each argument is read; see `sparsort.conditions`.
READ_BY: Table = {
    "own_loss": (
        When(
            holds=lambda values: values["answer"] is not None or values["messages"] is not None,
            why="the model's own loss is read from an answer, and there is none",
        ),
    ),
    "answer": (
        When(
            holds=lambda values: values["own_loss"] or "answer" in (values["poolings"] or ("answer",)),
            why="without the model's own loss or the pooling 'answer' nothing reads it",
        ),
    ),
}
# Names of the references that the pass over the rows computes itself.
_COMPUTED = ("loss", "length")
# Every candidate is ranked in a thousand resamples of the rows. More rows than this take minutes and gigabytes, and do not change
# the verdict.
_MOST_ROWS = 20_000
_TRUTH = {"true": 1.0, "false": 0.0}


def calibrate(
    data: Any,
    prompt: str | Turns | PromptWriter | Prompt | PromptSpec | None = None,
    *,
    messages: str | None = None,
    answer: str | None = None,
    system: str | None = None,
    chat: bool = False,
    model: Any = "demo",
    level: Any = None,
    correct: Any = None,
    references: Mapping[str, Any] | None = None,
    target: str | None = None,
    sites: Sequence[str] | None = None,
    poolings: Sequence[str] | None = None,
    outliers: Sequence[str] = ("none", "drop:3", "rms"),
    l0_threshold: float = 1.0,
    own_loss: bool = True,
    truncation: Truncation = "error",
    max_length: int | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    out: str | Path | None = None,
    shard_rows: int = 256,
    n_boot: int = 1000,
    n_perm: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    **options: Unpack[ModelOptions],
) -> Calibration:
    """Compare every candidate score with what is known about difficulty, and report whether one of them measures it.

    One forward pass gives every site × pooling × metric × outlier rule and, with an answer, the model's own loss on it. Each
    candidate is compared with each reference by Spearman's ρ, plain and with length held fixed, with bootstrap intervals and a
    correction for the number of candidates. The verdict rests on candidates that were chosen on one half of the rows and tested
    on the other (see `calibration.verdict` for the exact rule). No labels are needed if the reference is the model's own loss.

    Args:
        data: see `Scorer.score`; at least 40 rows that can be scored, and a few hundred to detect a weak signal.
        prompt: the prompt to score, without the answer; or a `PromptSpec`. See `Scorer.score`, also for `system`, `chat`,
            `truncation`, `max_length`, `id_column` and `columns`.
        messages: instead of a prompt, the column of whole conversations, whose last assistant turn is the answer.
        answer: template of the reference answer, such as " {answer}"; adds the reference `loss` and the pooling `answer`.
        model: see `ModelScorer`, also for `options`.
        level: a human level that rises with difficulty: the name of a column, or (N,) numbers.
        correct: whether the model's answer to each row was right (1 or 0): the name of a column, or (N,) numbers. The reference
            `correct` is 1 minus these numbers, so that it rises with errors.
        references: name → column or (N,) numbers, for further references that rise with difficulty.
        target: the reference by which the score is chosen; None for the first of loss, correct, level and the others.
        sites: None for those of pre_norm, post_norm and mlp that the model has.
        poolings: None for all.
        outliers: outlier rules.
        l0_threshold: threshold of `l0_absolute`.
        own_loss: whether to compare with the model's own loss, which on long answers costs as much as the rest of the pass.
        out: file for the calibration (.json). The pass is stored next to it, in a folder of the same name with the suffix
            `.rows`: the same call resumes after a stop, and further references need no further pass.
        shard_rows: rows of one shard of that pass.
        n_boot, n_perm: numbers of bootstrap draws and of permutations.
        confidence: the level of the intervals.
        seed: seed for the draws, the permutations, and the halves, which are drawn by the position of a row.

    Returns:
        The calibration: its `verdict`, `sentence()`, the numbers of every candidate, and the definition of the chosen score for
        `CalibratedScorer`, `sparsort score --calibration` and `sparsort order --calibration`.

    Raises:
        SparsortError: the input is wrong; the message says how to correct it.

    Example:
        >>> calibration = sparsort.calibrate("questions.jsonl", "Question: {question}", answer=" {answer}", level="steps")
        >>> print(calibration.sentence())
    """
    from sparsort.scoring.calibration.compare import compare
    from sparsort.scoring.model.early_checks import check_model
    from sparsort.scoring.scorers.base import warn_unscored
    from sparsort.scoring.scorers.candidates import CandidateScorer, check_grid
    from sparsort.scoring.store.score_views import unscored

    check_grid(sites, poolings, outliers)
    spec = ModelSpec.of(model, **options)
    text = PromptSpec.of(
        prompt,
        messages=messages,
        answer=answer,
        system=system,
        chat=chat,
        truncation=truncation,
        max_length=max_length,
    )
    arguments = {"own_loss": own_loss, "answer": text.answer, "messages": text.messages, "poolings": poolings}
    refuse_unread_arguments(calibrate, READ_BY, arguments)
    file = _check_out(out)
    read = text.read()
    if file is not None and read is not None and read.function is not None:
        read.function.need_hash("a calibration that is written to a file (out=)")
    source, has_answer = _open(data, text, DataSpec(id_column=id_column, columns=columns))
    if not has_answer and poolings is not None and "answer" in poolings:
        raise SparsortError(
            "pooling 'answer' reads the answer's tokens. Pass answer='…' (--answer), for example ' {answer}'."
        )
    known = _references(source, level, correct, references or {})
    if not known and not (has_answer and own_loss):
        raise SparsortError(
            "there is nothing to calibrate against. Pass answer='…' (--answer) for the model's own loss, a human level "
            "(level=, --level COLUMN) or whether each answer was right (correct=, --correct COLUMN)."
        )
    check_model(spec, max_length=text.max_length)
    scorer = CandidateScorer(
        spec, sites=sites, poolings=poolings, outliers=outliers, own_loss=own_loss, l0_threshold=l0_threshold
    )
    folder = file.with_suffix(".rows") if file is not None else None
    scores = scorer.score(source, text, out=folder, shard_rows=shard_rows)
    warn_unscored(scores, "They take no part in the calibration.")
    calibration = compare(
        scores,
        known,
        target=target,
        revision=spec.revision,
        notes=[*scorer.notes, *filter(None, [unscored(scores).removesuffix(".")])],
        n_boot=n_boot,
        n_perm=n_perm,
        level=confidence,
        seed=seed,
    )
    if file is not None:
        calibration.save(file)
    return calibration


def _open(data: Any, text: PromptSpec, rows: DataSpec) -> tuple[RowSource, bool]:
    """The rows, checked against the prompt, and whether the prompt has an answer."""
    prompt = text.read()
    source = rows.open(data, content=prompt.content if prompt is not None else None)
    if prompt is None:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces, or messages='…' (--messages) for "
            f"a column of conversations; this data has: {', '.join(source.columns())}."
        )
    source.require(prompt.fields, prompt)
    if source.count() > _MOST_ROWS:
        raise SparsortError(
            f"{source.name} has {source.count()} rows, and at most {_MOST_ROWS} are compared. "
            "Pass a sample: a few thousand rows are enough."
        )
    return source, prompt.answer is not None


def _check_out(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    file = Path(out).expanduser()
    if file.suffix != ".json" or file.is_dir():
        raise SparsortError(f"out (--out) is {file}; expected a file to write, such as calibration.json.")
    return file


def _references(
    source: RowSource, level: Any, correct: Any, others: Mapping[str, Any]
) -> dict[str, NDArray[np.float64]]:
    """The references that the caller supplies, (N,) each, rising with difficulty."""
    values_of = {"correct": correct, "level": level}
    if taken := [name for name in others if name in (*_COMPUTED, *values_of)]:
        raise SparsortError(
            f"references has the name {taken[0]!r}, which has a meaning of its own. Call it something else."
        )
    values_of = {name: values for name, values in values_of.items() if values is not None} | dict(others)
    columns = _columns(source, [values for values in values_of.values() if isinstance(values, str)])
    references = {}
    for name, values in values_of.items():
        numbers = np.array(columns[values] if isinstance(values, str) else _array(name, values), dtype=np.float64)
        if numbers.shape != (source.count(),):
            raise SparsortError(f"{name} has shape {numbers.shape}; expected one number per row, ({source.count()},).")
        if name == "correct":
            if not np.isin(numbers[np.isfinite(numbers)], (0.0, 1.0)).all():
                wrong = next(value for value in numbers.tolist() if np.isfinite(value) and value not in (0.0, 1.0))
                raise SparsortError(
                    f"correct has the value {wrong:g}; expected 1 for a right answer, 0 for a wrong one."
                )
            numbers = 1.0 - numbers
        references[name] = numbers
    return references


def _columns(source: RowSource, names: Sequence[str]) -> dict[str, list[float]]:
    """Columns of numbers, read in one pass over the rows."""
    columns: dict[str, list[float]] = {name: [] for name in names}
    for row in source.rows() if columns else ():
        for name, numbers in columns.items():
            if name not in row.fields:
                raise unknown_choice(f"column (row {row.position}, id {row.id!r})", name, map(str, row.fields))
            numbers.append(_number(row.fields[name], f"column {name!r} of {row.name}"))
    return columns


def _array(name: str, values: Any) -> NDArray[np.float64]:
    try:
        return number_array(values)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(f"{name} must be the name of a column, or one number per row ({error}).") from error


def _number(value: Any, where: str) -> float:
    if is_missing(value) or (isinstance(value, str) and not value):
        return float("nan")
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    try:
        # `float` would accept an array of one element.
        if not has_text(value):
            raise TypeError
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise SparsortError(
            f"{where} has {value!r}; expected a number that rises with difficulty (with --correct: 1 or 0). "
            "Name a numeric column, or convert it first."
        ) from None
