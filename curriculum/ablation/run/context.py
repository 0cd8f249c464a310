"""Whether a task's prompts fit into the model's context: told before anything runs, where the sets are known by then.

Contract: no model. The longest test query is counted whole behind the first random order of every set, which is asked for sure.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsort.curriculum.ablation.recipe.ablation import Ablation, Unit
from sparsort.curriculum.ablation.recipe.selectors import looks_at_query
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.errors import SparsortError


def check_context(
    ablation: Ablation, data: TaskData, texts: Texts, count: Callable[[str], int], limit: int | None
) -> None:
    """Refuse a task of which a set that the recipe draws is too long for the model.

    Args:
        ablation: the recipe.
        data: the task with its rows.
        texts: its prompts.
        count: a whole prompt's number of tokens.
        limit: the most tokens that the model was made for; None where nobody knows.

    Raises:
        SparsortError: a prompt is too long; says of which set, and by how much.
    """
    if limit is None:
        return
    task = data.task
    nothing = count("")
    room = task.max_new_tokens if task.is_generation else max(count(text) for text in texts.answers) - nothing
    longest = max(data.test_texts, key=count)
    for selector in ablation.selectors:
        for k in ablation.shots:
            for seed in ablation.seeds:
                unit = Unit(task=task.name, selector=selector, k=k, seed=seed)
                if looks_at_query(selector) or data.reads_pool(unit):
                    continue
                demos = data.show(unit).demos(0, ablation.orders(k, seed)[0])
                tokens = count("".join(texts.prefix(demos)) + texts.query(demos, longest))
                if tokens + room > limit:
                    raise SparsortError(
                        f"the task {task.name!r} has prompts of {tokens} tokens with k = {k} (set {seed}), and {room} more for "
                        f"an answer; the model was made for {limit}. Use fewer shots, or leave out long demonstrations "
                        "(max_demo_chars)."
                    )
