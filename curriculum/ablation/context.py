"""Whether a task's prompts fit into the model's context: told before anything runs, where the sets are known by then.

Contract: no model. Texts are counted part by part, which may differ from the whole by a token at each seam: a prompt that is
too long by less than that is left to the reader, which counts exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsort.curriculum.ablation.data import TaskData
from sparsort.curriculum.ablation.design import Ablation, Unit
from sparsort.curriculum.ablation.splits import QUERY_SELECTORS
from sparsort.errors import SparsortError


def check_context(ablation: Ablation, data: TaskData, count: Callable[[str], int], limit: int, model: str) -> None:
    """Refuse a task of which a set that the recipe draws is too long for the model.

    Args:
        ablation: the recipe.
        data: the task with its rows.
        count: a text's number of tokens, without special tokens.
        limit: the most tokens that the model was made for.
        model: its name, for the message.

    Raises:
        SparsortError: a prompt is too long; says of which set, and by how much.
    """
    task = data.task
    room = task.max_new_tokens if task.is_generation else max(map(count, task.label_texts()))
    query = max(map(count, data.test_texts))
    lead = count((task.system or "") if task.chat else task.instruction)
    lengths: dict[str, int] = {}

    def length(row: dict[str, Any]) -> int:
        name = str(row["id"])
        if name not in lengths:
            lengths[name] = count(task.demo_text(row) + task.separator)
        return lengths[name]

    for selector in ablation.selectors:
        for k in ablation.shots:
            for seed in ablation.seeds:
                unit = Unit(task=task.name, selector=selector, k=k, seed=seed)
                if selector in QUERY_SELECTORS or data.reads_pool(unit):
                    continue
                demos = sum(map(length, data.show(unit).rows))
                tokens = lead + demos + query + room
                if tokens - (k + 2) > limit:
                    raise SparsortError(
                        f"the task {task.name!r} has prompts of some {tokens} tokens with k = {k} (set {seed}; {demos} of them "
                        f"demonstrations, {query} a query, {room} its answer); {model!r} was made for {limit}. Use fewer "
                        f"shots, or leave out long demonstrations (max_demo_chars): the longest has {max(lengths.values())}."
                    )
