"""Whether written answers can be judged at all: told before a model has written for hours.

Contract: pure; no model. Gold answers are read by the judge itself.
"""

from __future__ import annotations

from sparsort.curriculum.ablation.splits import Splits
from sparsort.curriculum.ablation.tasks import Task
from sparsort.errors import SparsortError
from sparsort.scoring.judges import MARK, check_gold


def check_answers(task: Task, splits: Splits) -> list[str]:
    """Check that gold answers can be read, and that answers like those shown would be read whole.

    Args:
        task: a task whose answers are written.
        splits: its rows.

    Returns:
        A sentence where some answers that are shown hold a stop string.

    Raises:
        SparsortError: a gold answer of a test or dev row cannot be read, or the judge's library is not installed; every answer
            that is shown holds a stop string, or none shows the mark that the judge reads.
    """
    for row in [*splits.test, *splits.dev]:
        try:
            check_gold(task.judge, task.gold_text(row))
        except SparsortError as error:
            raise SparsortError(f"row {row['id']!r} of the task {task.name!r}: {error}") from error
    shown = [task.answer_text(row) for row in splits.pool]
    if task.judge == "number" and not any(MARK in text for text in shown):
        raise SparsortError(
            f"the judge 'number' reads the number behind {MARK!r}, but no answer of the task {task.name!r} shows it, so the "
            f"model would not write it: {shown[0]!r}. Put it into the answer, as in ' {{steps}} {MARK} {{{task.label}}}', or "
            "take the judge 'exact'."
        )
    cut = {stop: sum(stop in text for text in shown) for stop in task.stop}
    if found := [stop for stop, count in cut.items() if count]:
        stop = max(found, key=cut.__getitem__)
        told = (
            f"{cut[stop]} of {len(shown)} answers of the task {task.name!r} hold the stop string {stop!r}, at which what the "
            "model writes is cut"
        )
        if cut[stop] == len(shown):
            raise SparsortError(
                f"{told}: none could be read whole. Give another stop (--stop; in a task file, stop = [...])."
            )
        return [f"{told}."]
    return []
