"""Checks of a task that run before any model does: can its written answers be judged, and do its prompts fit the model?

Contract: no model. An ablation that would fail after hours of generation fails here instead, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsort.curriculum.ablation.recipe.ablation import Ablation, DemoSet
from sparsort.curriculum.ablation.recipe.selectors import looks_at_query
from sparsort.curriculum.ablation.recipe.splits import Splits
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.criteria import criterion
from sparsort.errors import SparsortError
from sparsort.scoring.answers.judges import MARK, Verdict, check_gold, judge_of

# The number of demonstrations whose answers are judged.
_SAMPLE = 64


def check_answers(task: Task, splits: Splits, ablation: Ablation) -> list[str]:
    """Check that gold answers can be read, and that a model which answers as the demonstrations do would be right.

    Args:
        task: a generation task.
        splits: its rows.
        ablation: determines whether dev rows are judged.

    Returns:
        One sentence if some demonstrations would be judged wrong.

    Raises:
        SparsortError: a gold answer that will be judged cannot be read, the judge's library is not installed, or every
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
        # The demonstration's own answer, cut as a generated answer would be: chat turns are stripped, and a stop string ends it.
        answer = _cut(task.answer_text(row).strip() if task.chat else task.answer_text(row), task.stop)
        gold = task.gold_text(row)
        try:
            verdict = judge(answer, gold)
        except SparsortError:
            # The gold answer of a demonstration is never judged in the ablation, so it may be unreadable.
            continue
        if not verdict.correct:
            wrong.append((answer, gold, verdict))
    if not wrong:
        return []
    answer, gold, verdict = wrong[0]
    problem = (
        f"{len(wrong)} of {len(rows)} demonstrations of the task {task.name!r} would be judged wrong as they are shown and cut "
        f"at a stop string, such as {answer[-80:]!r} against {gold[-80:]!r}"
    )
    if len(wrong) < len(rows):
        return [f"{problem}."]
    if task.judge == "number" and MARK not in answer:
        cause = f"The judge 'number' reads the number after {MARK!r}: write ' {{steps}} {MARK} {{{task.label}}}'."
    else:
        cause = f"The judge {task.judge!r} reads {verdict.extracted!r} there."
    raise SparsortError(
        f"{problem}. {cause} Change the answer template, the stop strings {list(task.stop)} (--stop; in a task file, "
        "stop = [...]), the label or the judge."
    )


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """A text up to the first of the stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def check_context(
    ablation: Ablation, data: TaskData, texts: Texts, count: Callable[[str], int], limit: int | None
) -> None:
    """Refuse a task if the prompts of one of its demonstration sets are too long for the model.

    Only sets that are drawn without the model can be checked in advance.

    Args:
        ablation: the recipe.
        data: the task with its rows.
        texts: its prompts.
        count: the number of tokens of a whole prompt.
        limit: the model's maximum length in tokens; None if it is unknown.

    Raises:
        SparsortError: a prompt is too long; the message names its set and both lengths.
    """
    if limit is None:
        return
    task = data.task
    special = count("")
    room = task.max_new_tokens if task.is_generation else max(count(text) for text in texts.answers) - special
    longest = max(data.test_texts, key=count)
    for selector in ablation.selectors:
        for k in ablation.shots:
            for seed in ablation.seeds:
                demo_set = DemoSet(task=task.name, selector=selector, k=k, seed=seed)
                if looks_at_query(selector) or data.reads_pool(demo_set):
                    continue
                # Every order of a set has the same length up to merges at the joints, so one order is enough. The first random
                # order is certain to be read.
                demos = data.draw(demo_set).demos(0, ablation.orders(k, seed)[0])
                tokens = count("".join(texts.prefix(demos)) + texts.query(demos, longest))
                if tokens + room > limit:
                    raise SparsortError(
                        f"the task {task.name!r} has prompts of {tokens} tokens with k = {k} (set {seed}), and {room} more for "
                        f"an answer; the model's maximum length is {limit}. Use fewer shots, or exclude long demonstrations "
                        "(max_demo_chars)."
                    )
