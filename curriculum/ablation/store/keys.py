"""Where the store keeps what: the names of its groups."""

from __future__ import annotations

from sparsort.curriculum.ablation.recipe.ablation import Unit
from sparsort.curriculum.ablation.recipe.tasks import Task


def group_name(task: Task, unit: Unit) -> str:
    """The group of a unit's outcomes."""
    return f"{_stem(task)}/{unit.selector}/k{unit.k}/seed{unit.seed}"


def bare_group(task: Task) -> str:
    """The group of what the model says without demonstrations."""
    return f"{_stem(task)}/none"


def loss_group(task: Task, unit: Unit) -> str:
    """The group of a unit's losses on the queries' own tokens, which "cone" reads."""
    return f"{group_name(task, unit)}/loss"


def neighbour_group(task: Task, unit: Unit) -> str:
    """The group of losses on the queries' own tokens behind single neighbours, which "topk_cone" reads whatever k is."""
    return f"{_stem(task)}/{unit.selector}/seed{unit.seed}/loss"


def _stem(task: Task) -> str:
    return f"{task.name}-{task.digest[:12]}"
