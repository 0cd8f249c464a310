"""Find out whether a sparsity score carries difficulty for a model, a prompt and data: the recipe behind `sparsort calibrate`."""

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
from sparsort.scoring.prompts.types import Truncation, Turns
from sparsort.values import has_text, is_missing, number_array

if TYPE_CHECKING:
    from sparsort.scoring.calibration.calibration import Calibration
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.prompts.prompt import Prompt

# What an argument needs to be read; see `sparsort.conditions`.
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
# Names that the pass itself gives.
_OWN = ("loss", "length")
# Every candidate of every row is ranked a thousand times over: beyond this it takes minutes and gigabytes, and says no more.
_MOST_ROWS = 20_000
_TRUTH = {"true": 1.0, "false": 0.0}


def calibrate(
    data: Any,
    prompt: str | Turns | Prompt | PromptSpec | None = None,
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
    """Compare every candidate score with what is known of difficulty, and say whether one of them carries it.

    One forward pass gives every site × pooling × metric × outlier rule and, with an answer, the model's own loss on it. Each
    candidate is compared with each reference by Spearman's ρ, plain and with length held fixed, with bootstrap intervals and
    corrected for how many were tried; the verdict rests on candidates chosen on one half of the rows and read on the other
    (see `calibration.verdict` for its exact rule). No labels are needed where the reference is the model's own loss.

    Args:
        data: see `Scorer.score`; at least 40 rows that can be scored, a few hundred to see a weak signal.
        prompt: the prompt as it will be scored, without the answer; or a `PromptSpec`. See `Scorer.score`, also for `system`,
            `chat`, `truncation`, `max_length`, `id_column` and `columns`.
        messages: instead of a prompt, the column that holds whole conversations; their last assistant turn is the answer.
        answer: the reference answer's template, such as " {answer}": gives the reference `loss` and the pooling `answer`.
        model: see `ModelScorer`, also for `options`.
        level: a human level that rises with difficulty: a column's name, or (N,) numbers.
        correct: whether the model's answer to each row was right (1 or 0): a column's name, or (N,) numbers. It is turned, so
            that the reference `correct` rises with errors.
        references: name → column or (N,) numbers, for any further reference that rises with difficulty.
        target: the reference that the score to use is chosen by; None for the first of loss, correct, level and the others.
        sites: None for pre_norm, post_norm and mlp, as far as the model has them.
        poolings: None for all.
        outliers: outlier rules.
        l0_threshold: threshold of `l0_absolute`.
        own_loss: False to leave the model's loss out; on long answers it costs as much as the rest of the pass.
        out: file for the calibration (.json). The pass is kept beside it, in a folder named like it with `.rows`: after a stop
            the same call goes on, and further references need no further pass.
        shard_rows: rows of one shard of that pass.
        n_boot: bootstrap draws; `n_perm` permutations; `confidence` of the intervals; `seed` of all three and of the halves,
            which are drawn by the position of a row.

    Returns:
        The calibration: its `verdict`, `sentence()`, every candidate's numbers, and the definition of the score to use, which
        `CalibratedScorer`, `sparsort score --calibration` and `sparsort order --calibration` take.

    Raises:
        SparsortError: bad input; the message says what to do.

    Example:
        >>> found = sparsort.calibrate("questions.jsonl", "Question: {question}\\nAnswer:", answer=" {answer}", level="steps")
        >>> print(found.sentence())
    """
    from sparsort.scoring.calibration.compare import compare
    from sparsort.scoring.model.early_checks import check_model
    from sparsort.scoring.scorers.candidates import CandidateScorer, check_grid

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
    read = {"own_loss": own_loss, "answer": text.answer, "messages": text.messages, "poolings": poolings}
    refuse_unread_arguments(calibrate, READ_BY, read)
    file = _check_out(out)
    asked = text.read()
    content = asked.fields if asked is not None else None
    source = DataSpec(id_column=id_column, columns=columns).open(data, content=content)
    if asked is None:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces, or messages='…' (--messages) for "
            f"a column of conversations; this data has: {', '.join(source.columns())}."
        )
    source.require(asked.fields, asked)
    if source.count() > _MOST_ROWS:
        raise SparsortError(
            f"{source.name} has {source.count()} rows, and at most {_MOST_ROWS} are compared. "
            "Pass a sample: a few thousand say as much."
        )
    if asked.answer is None and poolings is not None and "answer" in poolings:
        raise SparsortError(
            "pooling 'answer' reads the answer's tokens. Pass answer='…' (--answer), for example ' {answer}'."
        )
    known = _references(source, level, correct, references or {})
    if not known and (asked.answer is None or not own_loss):
        raise SparsortError(
            "there is nothing to calibrate against. Pass answer='…' (--answer) for the model's own loss, a human level "
            "(level=, --level COLUMN) or whether each answer was right (correct=, --correct COLUMN)."
        )
    check_model(spec, max_length=text.max_length)
    scorer = CandidateScorer(
        spec,
        sites=sites,
        poolings=poolings,
        outliers=outliers,
        own_loss=own_loss,
        l0_threshold=l0_threshold,
    )
    scores = scorer.score(
        source,
        text,
        out=file.with_suffix(".rows") if file is not None else None,
        shard_rows=shard_rows,
    )
    notes = list(scorer.notes)
    lost = {status: count for status, count in scores.counts("status").items() if status != "ok"}
    if lost:
        reasons = ", ".join(f"{count} {status}" for status, count in lost.items())
        notes.append(f"{sum(lost.values())} of {len(scores)} rows have no score: {reasons}")
    found = compare(
        scores,
        known,
        target=target,
        revision=spec.revision,
        notes=notes,
        n_boot=n_boot,
        n_perm=n_perm,
        level=confidence,
        seed=seed,
    )
    if file is not None:
        found.save(file)
    return found


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
    """The references that come with the data, (N,) each, rising with difficulty."""
    given = {"correct": correct, "level": level}
    if taken := [name for name in others if name in (*_OWN, *given)]:
        raise SparsortError(
            f"references has the name {taken[0]!r}, which has a meaning of its own. Call it something else."
        )
    given = {name: values for name, values in given.items() if values is not None} | dict(others)
    columns = [name for name in given.values() if isinstance(name, str)]
    read: dict[str, list[float]] = {name: [] for name in columns}
    if columns:
        for row in source.rows():
            for name in read:
                if name not in row.fields:
                    raise unknown_choice(f"column (row {row.position}, id {row.id!r})", name, map(str, row.fields))
                read[name].append(_number(row.fields[name], f"column {name!r} of {row.name}"))
    found = {}
    for name, values in given.items():
        numbers = np.array(read[values] if isinstance(values, str) else _array(name, values), dtype=np.float64)
        if numbers.shape != (source.count(),):
            raise SparsortError(f"{name} has shape {numbers.shape}; expected one number a row, ({source.count()},).")
        if name == "correct":
            if not np.isin(numbers[np.isfinite(numbers)], (0.0, 1.0)).all():
                wrong = next(value for value in numbers.tolist() if np.isfinite(value) and value not in (0.0, 1.0))
                raise SparsortError(f"correct holds {wrong:g}; expected 1 for a right answer, 0 for a wrong one.")
            numbers = 1.0 - numbers
        found[name] = numbers
    return found


def _array(name: str, values: Any) -> NDArray[np.float64]:
    try:
        return number_array(values)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(f"{name} must be a column's name or one number a row ({error}).") from error


def _number(value: Any, where: str) -> float:
    if is_missing(value) or (isinstance(value, str) and not value):
        return float("nan")
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    try:
        if not has_text(value):  # an array of one element is a number to `float`
            raise TypeError
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise SparsortError(
            f"{where} holds {value!r}; expected a number that rises with difficulty (with --correct: 1 or 0). "
            "Name a numeric column, or convert it first."
        ) from None
