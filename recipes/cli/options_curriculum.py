"""The options of a curriculum, which `sparsort plan` and `sparsort train` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsort.curriculum.loading.plan.settings import ORDER_PANEL, CurriculumSettings
from sparsort.recipes.cli.options import Fields

PlannedCurriculum = Annotated[dict[str, Any], Fields(of=CurriculumSettings, given=True)]
# Training has its own seed and longest text, sets the steps of a pool, and knows no quotas.
NOT_IN_TRAINING = ("seed", "quotas", "steps", "max_length")
TrainedCurriculum = Annotated[dict[str, Any], Fields(of=CurriculumSettings, given=True, without=NOT_IN_TRAINING)]
GroupsOption = Annotated[
    str | None,
    typer.Option(help="Field of the data; each group's easiest come together.", rich_help_panel=ORDER_PANEL),
]
