"""Whether written answers can be judged at all: told before a model has written for hours.

Contract: pure; no model. Gold answers, and the answers that demonstrations show, are read by the judge itself.
"""

from __future__ import annotations

from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.splits import Splits
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.demos.criteria import criterion
from sparsort.errors import SparsortError
from sparsort.scoring.answers.judges import MARK, Verdict, check_gold, judge_of

# Demonstrations whose answers are judged.
_SAMPLE = 64


def check_answers(task: Task, splits: Splits, ablation: Ablation) -> list[str]:
    """Check that gold answers can be read, and that a model which answers as demonstrations do would be right.

    Args:
        task: a task whose answers are written.
        splits: its rows.
        ablation: says whether dev rows are judged.

    Returns:
        A sentence where some demonstrations would be judged wrong.

    Raises:
        SparsortError: a gold answer that is to be judged cannot be read, the judge's library is not installed, or every
            demonstration would be judged wrong.
    """
    by_gold = any("gold" in criterion(name).needs for name in ablation.choosers)
    for row in [*splits.test, *(splits.dev if by_gold else [])]:
        try:
            check_gold(task.judge, task.gold_text(row))
        except SparsortError as error:
            raise SparsortError(f"row {row['id']!r} of the task {task.name!r}: {error}") from error
    rows = splits.pool[:_SAMPLE]
    judge = judge_of(task.judge)
    wrong: list[tuple[str, str, Verdict]] = []
    for row in rows:
        written = _cut(task.answer_text(row).strip() if task.chat else task.answer_text(row), task.stop)
        gold = task.gold_text(row)
        try:
            verdict = judge(written, gold)
        except SparsortError:
            # What is shown may have a gold answer that nobody judges.
            continue
        if not verdict.correct:
            wrong.append((written, gold, verdict))
    if not wrong:
        return []
    written, gold, verdict = wrong[0]
    told = (
        f"{len(wrong)} of {len(rows)} demonstrations of the task {task.name!r} would be judged wrong as they are shown and cut "
        f"at a stop string, such as {written[-80:]!r} against {gold[-80:]!r}"
    )
    if len(wrong) < len(rows):
        return [f"{told}."]
    if task.judge == "number" and MARK not in written:
        mend = f"The judge 'number' reads the number behind {MARK!r}: write ' {{steps}} {MARK} {{{task.label}}}'."
    else:
        mend = f"The judge {task.judge!r} reads {verdict.extracted!r} there."
    raise SparsortError(
        f"{told}. {mend} Change the answer template, the stop strings {list(task.stop)} (--stop; in a task file, stop = [...]), "
        "the label or the judge."
    )


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """A text up to the first of the stop strings, as what a model writes is cut."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
