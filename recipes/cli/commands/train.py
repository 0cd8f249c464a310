"""The command `sparsort train`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.options import option, same_option, unescape
from sparsort.recipes.cli.options import Fields, JsonOption, RowsArgument, generated
from sparsort.recipes.plan import PlanOptions
from sparsort.recipes.train.config import CURRICULUM_PANEL, TRAINING_PANEL, TrainConfig
from sparsort.scoring.prompts.spec import TEXT_PANEL, DataSpec
from sparsort.terminal.printing import note, show, show_json
from sparsort.terminal.tables import Table, prose

if TYPE_CHECKING:
    from sparsort.recipes.train.train import TrainResult

_SPARSE = "Sparse attention"
# Training has a seed and a longest text of its own, computes the steps of a pool, and has no quotas.
NOT_IN_TRAINING = ("seed", "quotas", "steps", "max_length")
EXAMPLE = (
    r"Example: `sparsort train data.jsonl --text '{question}\n{answer}' --scores scores/ --stages 10 --out run/`"
    "\n\n"
    r"Sparse: `sparsort train examples/graded.jsonl --text '{question}\n{answer}' --recipe sparse --schedule shuffle --out run/`"
)


@dataclass(frozen=True, kw_only=True)
class TrainSources:
    """The options of `sparsort train` that say what is read and where the run goes; see `recipes.train.train`."""

    text: str | None = option(
        None,
        r"Format string over the columns, such as '{question}\n{answer}'. An empty text is an error.",
        panel=TEXT_PANEL,
        short="-t",
        read=unescape,
    )
    messages: str | None = option(
        None,
        "Column of whole conversations (ShareGPT, OpenAI, TRL) instead of --text; every token is trained on.",
        panel=TEXT_PANEL,
    )
    out: Path = option(
        dataclasses.MISSING, "Folder of the run; run the same command again to resume after a stop.", short="-o"
    )
    plan: Path | None = option(None, "Plan made by 'sparsort plan' for these rows.", panel=CURRICULUM_PANEL)
    fingerprint: str | None = option(
        None,
        "Your name for the data, as given to 'sparsort plan'; it is compared instead of the rows.",
        panel=CURRICULUM_PANEL,
    )
    verify: bool = option(
        True, "Compare the rows with those of --plan.", panel=CURRICULUM_PANEL, flag="--verify/--no-verify"
    )
    scores: Path | None = option(
        None, "Scores made by 'sparsort score', from which the curriculum is planned.", panel=CURRICULUM_PANEL
    )
    groups: str | None = same_option(PlanOptions, "groups")
    recipe: str | None = option(
        None,
        "{names}, or a .toml file; options that you give override it.",
        names="recipes.train.recipe:RECIPES",
        panel=_SPARSE,
    )
    eval_data: Path | None = option(None, "File of held-out rows, instead of --eval-share.", panel=TRAINING_PANEL)


@generated
def train(
    file: RowsArgument,
    sources: TrainSources,
    curriculum: Annotated[dict[str, Any], Fields(of=CurriculumSettings, given=True, without=NOT_IN_TRAINING)],
    # Options that were not given leave the settings of a recipe as they are.
    settings: Annotated[dict[str, Any], Fields(of=TrainConfig, given=True)],
    data: DataSpec,
    as_json: JsonOption = False,
) -> None:
    """Train a causal language model on FILE under a curriculum.

    Also in several processes: `torchrun --nproc-per-node 2 -m sparsort train …`, or `accelerate launch -m sparsort train …`.
    """
    from sparsort.recipes.train.train import train as run

    result = run(file, **vars(sources), **vars(data), curriculum=curriculum, **settings)
    _leave_process_group()
    # The other processes of a distributed run have the same result.
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        show_json(result.summary())
    else:
        _show(result)


def _leave_process_group() -> None:
    """Leave the group of processes, because NCCL warns about a process that exits without doing so."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _show(result: TrainResult) -> None:
    table = Table(prose(""), prose("value"))
    for name in ("loss", "eval_loss"):
        value = getattr(result, name)
        table.add_row(name.replace("eval_", "held-out "), "none" if value is None else f"{value:.4f}")
    if result.sparse is not None:
        _add_sparse(table, result.sparse)
    table.add_row("steps", str(result.steps))
    table.add_row("rows", f"{result.rows} trained on, {result.eval_rows} held out")
    table.add_row("tokens", str(result.tokens))
    table.add_row("parameters", str(result.parameters))
    table.show()
    for sentence in result.notes:
        note(f"note: {sentence}")
    if result.resumed == result.steps:
        show("The run was finished before; this is its result.")
    elif result.resumed:
        show(f"Resumed from step {result.resumed}.")
    show(f"Model: {result.model}\nLosses: {result.history}")


def _add_sparse(table: Table, sparse: dict[str, float | None]) -> None:
    """Add the measures of sparse attention, which are means over the last tenth of the run."""
    if (kl := sparse["kl"]) is not None:
        table.add_row("selector's loss (KL)", f"{kl:.4f}")
    for name, value in {"attention mass caught": sparse["mass"], "block recall": sparse["recall"]}.items():
        table.add_row(name, "no query had to choose" if value is None else f"{value:.3f}")
    if (saving := sparse["saving"]) is not None:
        times = f"{saving:.2f} times fewer than" if saving >= 1 else f"{1 / saving:.2f} times as many as"
        table.add_row("attention FLOPs", f"{times} dense attention, by formula, including the selection")
