"""The conditions under which each option of each command has an effect, and the check that every command makes first.

Contract: `COMMANDS` has a table for every command with an option that is not always read. The table has an entry for every
parameter (see `sparsort.conditions`). Only options that the user gave are checked, never a default. No data file is read and no
model is loaded here. The module is separate from the commands because it imports the recipes, which `--help` does without.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsort.conditions import Format, Table, Values, When, always, among, excludes, needs, refuse_unread, under
from sparsort.curriculum.ablation.recipe.options import DesignOptions
from sparsort.curriculum.ablation.recipe.tasks import JUDGES, task_names
from sparsort.curriculum.demos.prompt import NOT_IN_CHAT
from sparsort.curriculum.loading.plan.combine import COMBINATIONS
from sparsort.curriculum.loading.plan.settings import RANKED
from sparsort.curriculum.loading.plan.settings import READ_BY as CURRICULUM_READ_BY
from sparsort.options import parameters_of
from sparsort.recipes.calibrate import READ_BY as CALIBRATE_READ_BY
from sparsort.recipes.choose.choose import READ_BY as CHOOSE_READ_BY
from sparsort.recipes.choose.choose import READS_QUERIES
from sparsort.recipes.classify.spec import ClassifySpec
from sparsort.recipes.cli.commands.ablate import RunFlags, TaskFlags
from sparsort.recipes.cli.commands.calibrate import CalibrateOptions
from sparsort.recipes.cli.commands.choose import ChooseOptions
from sparsort.recipes.cli.commands.order import OrderOptions
from sparsort.recipes.cli.commands.score import ScoreOptions
from sparsort.recipes.cli.commands.train import NOT_IN_TRAINING, TrainSources
from sparsort.recipes.cli.options import ExportOptions
from sparsort.recipes.order.conditions import NEEDS_MODEL, NO_CONVERSATION, SYSTEM
from sparsort.recipes.order.conditions import READ_BY as ORDER_READ_BY
from sparsort.recipes.plan import PlanOptions
from sparsort.recipes.score.config import OPTIONS_READ_BY as SCORER_READ_BY
from sparsort.recipes.score.config import read_by_scorers
from sparsort.recipes.train.config import READ_BY as TRAIN_READ_BY
from sparsort.recipes.train.config import TrainConfig
from sparsort.recipes.train.recipe import read_recipe
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec

Resolve = Callable[[dict[str, Any], Collection[str]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Command:
    """The conditions of a command's options; `resolve` computes the values of options that were not given."""

    table: Table
    resolve: Resolve = lambda values, given: values


def check(context: Any) -> None:
    """Refuse an option that the user gave to a command and that has no effect.

    Args:
        context: click's context of the command, with parsed parameters.

    Raises:
        SparsortError: an option has no effect; the message says why, and what to do.
    """
    command = COMMANDS.get(context.command.name)
    if command is None:
        return
    given = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    ]
    values = command.resolve(dict(context.params), given)
    refuse_unread(command.table, values, given, _on_the_command_line(context))


def _on_the_command_line(context: Any) -> Format:
    parameters = {parameter.name: parameter for parameter in context.command.params}

    def shown(name: str, value: Any) -> str:
        parameter = parameters[name]
        if parameter.param_type_name == "argument":
            return str(value)
        flag: str = max(parameter.opts, key=len)
        if value is False and parameter.secondary_opts:
            return str(max(parameter.secondary_opts, key=len))
        if value is None or isinstance(value, bool):
            return flag
        values = value if isinstance(value, (list, tuple)) else [value]
        return " ".join(f"{flag} {shlex.quote(str(part))}" for part in values)

    return shown


_TEXT = read_by_scorers("answer", "system", "chat", "truncation", "max_length")
# `unit` is an argument of Python alone.
_SCORER = {name: conditions for name, conditions in SCORER_READ_BY.items() if name != "unit"}

_MODEL = always(*parameters_of(ModelSpec))
_DATA = always(*parameters_of(DataSpec))

SCORE: Table = {
    **always("file", "prompt", "messages", "as_json", *parameters_of(ScoreOptions)),
    **_DATA,
    **SCORER_READ_BY,
    **_TEXT,
    "system": (*_TEXT["system"], NO_CONVERSATION, SYSTEM),
    "chat": (*_TEXT["chat"], NO_CONVERSATION),
    "device": (*SCORER_READ_BY["device"], excludes("devices", "{devices} names the devices")),
    "devices": SCORER_READ_BY["device"],
    "strict": (excludes("part", "{part} reports the shards that are done, not their rows"),),
}

_EXPORT: Table = {
    **always(*parameters_of(ExportOptions)),
    "export_format": (needs("export", "nothing is exported", export="FILE"),),
}

ORDER: Table = {
    **_EXPORT,
    **always("file", "as_json", *parameters_of(OrderOptions)),
    **ORDER_READ_BY,
    "no_cache": NEEDS_MODEL,
}

CHOOSE: Table = {
    **_EXPORT,
    **always("file", "prompt", "answer", "chat", "as_json", *parameters_of(ChooseOptions)),
    **_DATA,
    **_MODEL,
    "queries": (READS_QUERIES,),
    "max_queries": (READS_QUERIES,),
    "system": (SYSTEM,),
    **CHOOSE_READ_BY,
}

CLASSIFY: Table = {
    **always("file", "test", "out", "prompt", "answer", "chat", "as_json", *parameters_of(ClassifySpec)),
    **_DATA,
    **_MODEL,
    "system": (SYSTEM,),
    "separator": (NOT_IN_CHAT,),
}

CALIBRATE: Table = {
    **always("file", "as_json", *parameters_of(PromptSpec), *parameters_of(CalibrateOptions)),
    **_DATA,
    **_MODEL,
    "answer": CALIBRATE_READ_BY["answer"],
    "system": (NO_CONVERSATION, SYSTEM),
    "chat": (NO_CONVERSATION,),
    "no_loss": CALIBRATE_READ_BY["own_loss"],
    "top": (excludes("as_json", "{as_json} prints every candidate"),),
}


def _is_recipe(values: Values) -> bool:
    """Whether the source is a recipe, a task file or names of ready tasks, all of which have their own prompt."""
    source = str(values["source"])
    names = [name.strip() for name in source.split(",") if name.strip()]
    ready = bool(names) and all(name in task_names() for name in names)
    path = Path(source).expanduser()
    # A data folder may have the name of a ready task. With a prompt it is the folder, because a ready task has its own prompt.
    return path.suffix == ".toml" or (ready and (values["prompt"] is None or not path.exists()))


_OWN_TASK = When(
    holds=lambda values: not _is_recipe(values), why="{source} has its own prompt, labels, files and judge"
)
_SCORES_LABELS = When(
    holds=lambda values: values["judge"] in (None, "labels") or values["judge"] not in JUDGES,
    why="{judge} reads written answers",
    instead={"judge": "labels"},
)
_WRITES = When(
    holds=lambda values: values["judge"] not in (None, "labels"),
    why="labels are scored, and nothing is written",
    instead={"judge": "exact"},
)
ABLATE: Table = {
    # Users append --dry-run and --no-run to a whole command, so both accept options that describe its run and its report.
    **always("source", "as_json", *parameters_of(RunFlags), *parameters_of(DesignOptions)),
    **_MODEL,
    **dict.fromkeys(("prompt", "answer", "chat", *parameters_of(TaskFlags), *_DATA), (_OWN_TASK,)),
    "system": (_OWN_TASK, SYSTEM),
    "labels": (_OWN_TASK, _SCORES_LABELS),
    "stop": (_OWN_TASK, _WRITES),
    "max_new_tokens": (_OWN_TASK, _WRITES),
    "data": (
        When(
            holds=lambda values: _is_recipe(values) or not Path(values["source"]).expanduser().exists(),
            why="it is the folder of a task's files, and {source} is a data file",
        ),
    ),
    "label_score": (_SCORES_LABELS,),
    "contextual": (_SCORES_LABELS,),
    "no_run": (excludes("dry_run", "{dry_run} neither runs anything nor reads the store"),),
}

_WEIGHS = When(holds=lambda values: len(values["scores"]) > 1, why="weights weigh several scores, and there is one")
_COMBINES = When(
    holds=lambda values: len(values["scores"]) > 1 or values["combination"] not in COMBINATIONS,
    why="several scores are combined, and there is one",
)
_NAMES_A_FIELD = needs("data", "it names a field of the data", data="FILE")
_SEED = When(
    holds=lambda values: (
        values["mode"] == "pool"
        or values["schedule"] == "shuffle"
        or values["direction"] == "random"
        or values["later_epochs"] == "shuffle"
        or values["stages"] is not None
        or values["warm_up"] is not None
    ),
    why="nothing in this plan is drawn at random: {schedule} without stages or a warm-up",
)
_GROUPED = When(holds=RANKED.holds, why="{schedule} does not take the easiest of each group together")
PLAN: Table = {
    **always("scores", "as_json", *parameters_of(PlanOptions)),
    **CURRICULUM_READ_BY,
    "seed": (_SEED,),
    "groups": (_NAMES_A_FIELD, _GROUPED),
    "show_groups": (_NAMES_A_FIELD,),
    "lengths": (_NAMES_A_FIELD,),
    "columns": (needs("data", "it names the columns of the data", data="FILE"),),
    "id_column": (_NAMES_A_FIELD,),
    "combination": (_COMBINES,),
    "weight": (_WEIGHS, among("combination", ("rank_average",), of=COMBINATIONS)),
    "compare": (needs("draw", "plans are drawn next to each other in a figure", draw="FILE"),),
}

_WITH_PLAN = needs("plan", "it concerns a plan that was made before", plan="FOLDER")
_WITHOUT_PLAN = excludes("plan", "{plan} has its own settings")
_TRAINED = {name: conditions for name, conditions in CURRICULUM_READ_BY.items() if name not in NOT_IN_TRAINING}
TRAIN: Table = {
    **always("file", "as_json", *parameters_of(TrainSources), *parameters_of(TrainConfig)),
    **_DATA,
    **under(_WITHOUT_PLAN, _TRAINED),
    "groups": (_WITHOUT_PLAN, _GROUPED),
    "fingerprint": (_WITH_PLAN,),
    "verify": (_WITH_PLAN,),
    **TRAIN_READ_BY,
    "eval_steps": (
        When(
            holds=lambda values: (
                values["eval_data"] is not None
                or (values["plan"] is None and values["eval_share"] != 0)
                or bool(values["eval_share"])
            ),
            why="no rows are held out",
            instead={"eval_data": "FILE"},
        ),
    ),
}


def _with_own_loss(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Add the argument `own_loss` of `calibrate`, which the conditions of its recipe read."""
    return values | {"own_loss": not values["no_loss"]}


def _with_recipe(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Set the options that were not given to the settings of the recipe."""
    recipe = read_recipe(values["recipe"]).without(set(given))
    for name, value in (recipe.train | recipe.curriculum).items():
        if name in values and name not in given:
            values[name] = value
    return values


COMMANDS: Mapping[str, Command] = {
    "score": Command(table=SCORE),
    "order": Command(table=ORDER),
    "choose": Command(table=CHOOSE),
    "classify": Command(table=CLASSIFY),
    "calibrate": Command(table=CALIBRATE, resolve=_with_own_loss),
    "ablate": Command(table=ABLATE),
    "plan": Command(table=PLAN),
    "train": Command(table=TRAIN, resolve=_with_recipe),
}
