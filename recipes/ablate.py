"""Run an ordering ablation in one call: query the model, collect the results, write the report. The recipe for `sparsort ablate`.

Contract: one folder contains everything: `recipe.json` as it was run, `store/` with every outcome, `results/` and `report/`. A
second call, also with more sets, orders or tasks, queries the model only for missing outcomes. Two processes may work on one
folder; each ends when all outcomes are stored.
"""

from __future__ import annotations

import datetime
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from sparsort.curriculum.ablation.recipe import tables
from sparsort.curriculum.ablation.recipe.ablation import Ablation, AblationOptions, demo_sets, skipped_criteria
from sparsort.curriculum.ablation.recipe.tasks import (
    Task,
    check_row,
    load_task,
    parse_labels,
    task_from_flags,
    task_names,
)
from sparsort.errors import SparsortError
from sparsort.options import values_of
from sparsort.scoring.model.spec import ModelSpec
from sparsort.storage.files import write_json
from sparsort.terminal.progress import progress
from sparsort.trackers import NO_TRACKER, Log, Meter, ReportTo, check_trackers, tracked, tracker_names

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.recipe.task_data import TaskData
    from sparsort.curriculum.ablation.results.cells import Cell
    from sparsort.curriculum.ablation.results.collect import Collector
    from sparsort.curriculum.ablation.results.results import Results
    from sparsort.curriculum.ablation.run.cost import Cost
    from sparsort.curriculum.ablation.run.run import AblationRunner
    from sparsort.scoring.loading.load import LoadedModel

_LOG = logging.getLogger("sparsort")
# Seconds between two checks of demonstration sets that another process is running.
_WAIT_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class AblationReport:
    """The results of an ablation, and its files.

    Attributes:
        results: every arm on every item.
        out: the folder.
        report: the report's HTML file; None if it was not requested, or matplotlib is not installed.
        tokens_read: tokens that the model read in this run; 0 if all outcomes were stored before.
        seconds: the time of this run.
        notes: remarks about the data, one sentence each.
    """

    results: Results
    out: str
    report: str | None
    tokens_read: int
    seconds: float
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """The numbers of the report, without the demonstrations, as JSON values."""
        from sparsort.curriculum.ablation.report.numbers.summary import summarise

        numbers: dict[str, Any] = dict(summarise(self.results))
        for name in ("demonstrations", "texts"):
            numbers.pop(name)
        return numbers | {
            "out": self.out,
            "report": self.report,
            "tokens_read": self.tokens_read,
            "seconds": round(self.seconds, 3),
            "data_notes": self.notes,
        }


def ablate(
    recipe: Ablation | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path,
    model: Any = None,
    run: bool = True,
    report: bool = True,
    compile: bool = False,
    report_to: ReportTo = NO_TRACKER,
    **changes: Unpack[AblationOptions],
) -> AblationReport:
    """Find out whether the order of demonstrations matters, which orderers help, and how certain that is.

    Args:
        recipe: an `Ablation`, its fields as a mapping, a TOML file, or None if all fields are in `changes`.
        out: the folder to work in; a second call resumes the first.
        model: a `LoadedModel`, a `ModelSpec`, or a name or folder; None for the model of the recipe.
        run: whether to query the model for missing outcomes. If False, only the outcomes in the store are used, finished or not,
            and only the tokenizer is loaded.
        report: whether to write `report/` (needs the extra "plots").
        compile: whether to compile the model first, which takes half a minute and is faster from some million tokens on (needs a
            C++ compiler).
        report_to: trackers that get the number of finished demonstration sets, the tokens read and, after every set, the
            accuracy of random orders and the difference of each arm from it so far (see `sparsort.trackers.tracked`).
        changes: fields of `Ablation` that differ from the recipe, such as `sets=4, shots=(4,)`.

    Returns:
        The results, and the paths of the files.

    Raises:
        SparsortError: wrong input, or a folder that belongs to another model; the message says what to do.
    """
    start = time.perf_counter()
    check_trackers(report_to)
    loaded = _loaded(model)
    ablation = make_recipe(recipe, {**changes, **_naming(None if loaded is model else model)})
    ablation.check()
    folder = Path(out).expanduser()
    outcomes = _run(ablation, folder, loaded, compile, report_to) if run else _open(ablation, folder, loaded)
    results = outcomes.collector.results(outcomes.provenance)
    results.save(folder / "results")
    page = _write_report(results, folder / "report") if report else None
    return AblationReport(
        results=results,
        out=str(folder),
        report=page,
        tokens_read=outcomes.tokens_read,
        seconds=time.perf_counter() - start,
        notes=outcomes.notes,
    )


@dataclass(frozen=True, kw_only=True)
class _StoredOutcomes:
    """The stored outcomes of an ablation, ready to be collected into results."""

    collector: Collector
    provenance: dict[str, Any]
    notes: list[str]
    tokens_read: int = 0


def _run(
    ablation: Ablation, folder: Path, loaded: LoadedModel | None, compile: bool, report_to: ReportTo
) -> _StoredOutcomes:
    """Query the model for the outcomes that the store lacks."""
    from sparsort.curriculum.ablation.results.collect import Collector
    from sparsort.curriculum.ablation.run.model import Engine
    from sparsort.curriculum.ablation.run.run import AblationRunner
    from sparsort.curriculum.ablation.store.folder import recorded_identity
    from sparsort.curriculum.ablation.store.store import OutcomeStore

    engine = Engine(ablation, loaded, compile=compile)
    identity = engine.identity_as(recorded_identity(folder / "store"))
    store = OutcomeStore(folder / "store", identity, feature_names=engine.feature_names)
    run = AblationRunner(ablation, engine, store)
    notes = _notes(ablation, run.tasks)
    write_json(folder / "recipe.json", ablation.to_table())

    def collector() -> Collector:
        return Collector(ablation, store, run.tasks, engine.loaded.tokenizer)

    with (
        progress("demonstration sets", len(list(demo_sets(ablation)))) as advance,
        tracked(report_to, "ablate", folder=folder / "runs", config=_without_folders(ablation.to_table())) as log,
    ):
        left = run.run_all(
            _reporting(ablation, run, collector(), advance, log) if tracker_names(report_to) else advance
        )
    if left:
        _LOG.warning("%d sets are being run by another process; waiting for them.", len(left))
    while left or not all(run.run_zero_shot(name) for name in run.tasks):
        # Another process has locked these sets. When it has finished them or has died, this loop finds nothing more to do, or
        # runs the rest.
        time.sleep(_WAIT_SECONDS)
        left = [demo_set for demo_set in left if not run.run_set(demo_set)]
    model = {"model": engine.loaded.name, "device": str(engine.loaded.device.value)}
    return _StoredOutcomes(
        collector=collector(),
        provenance=_provenance(ablation, store.identity) | model,
        notes=notes,
        tokens_read=run.tokens_read,
    )


def _reporting(
    ablation: Ablation, run: AblationRunner, collector: Collector, advance: Callable[[int], None], log: Log
) -> Callable[[int], None]:
    """A function for `AblationRunner.run_all` that draws the progress, and reports it with the estimates so far."""
    sets = iter(demo_sets(ablation))
    meter = Meter(log, "sets")

    def after_set(count: int) -> None:
        advance(count)
        meter.advance(count)
        demo_set = next(sets)
        cells = collector.cells(demo_set.task, demo_set.selector, demo_set.k)
        meter.report({"progress/tokens_read": run.tokens_read, **_running_estimates(cells)})

    return after_set


def _running_estimates(cells: Sequence[Cell]) -> dict[str, float]:
    """The mean accuracy of the random orders, and each other arm's difference from it, over the complete sets of each cell."""
    values: dict[str, float] = {}
    for cell in cells:
        place = f"{cell.task}/{cell.selector}/k{cell.k}{'/contextual' if cell.contextual else ''}"
        random = float(np.mean([arm.accuracy for arm in cell.random]))
        values[f"{place}/random_accuracy"] = random
        values |= {f"{place}/difference/{arm.name}": float(arm.accuracy.mean()) - random for arm in cell.arms}
    return values


def _open(ablation: Ablation, folder: Path, loaded: LoadedModel | None) -> _StoredOutcomes:
    """Use the outcomes in the store, without the model.

    Raises:
        SparsortError: the outcomes are those of a model with another tokenizer. They are stored under token ids.
    """
    from sparsort.curriculum.ablation.recipe.task_data import TaskData
    from sparsort.curriculum.ablation.results.collect import Collector
    from sparsort.curriculum.ablation.store.store import OutcomeStore
    from sparsort.scoring.prompts.prompt import identify_tokenizer

    store = OutcomeStore.existing(folder / "store")
    tasks = {task.name: TaskData(task, ablation) for task in ablation.load_tasks()}
    tokenizer = ablation.spec.load_tokenizer() if loaded is None else loaded.tokenizer
    recorded = store.identity.get("tokenizer")
    if identify_tokenizer(tokenizer, chat=False, recorded=recorded) != recorded:
        name = ablation.model if loaded is None else loaded.name
        raise SparsortError(
            f"{store.folder} has the outcomes of a model whose tokenizer is not that of {name!r}, so they cannot be looked up. "
            "Name the model that made them with model= (--model)."
        )
    return _StoredOutcomes(
        collector=Collector(ablation, store, tasks, tokenizer),
        provenance=_provenance(ablation, store.identity) | {"model": ablation.model},
        notes=_notes(ablation, tasks),
    )


def _notes(ablation: Ablation, tasks: Mapping[str, TaskData]) -> list[str]:
    notes = [f"{name}: {note}" for name, data in tasks.items() for note in data.notes] + skipped_criteria(ablation)
    for note in notes:
        _LOG.warning("%s", note)
    return notes


def make_recipe(recipe: Ablation | Mapping[str, Any] | str | Path | None, changes: Mapping[str, Any]) -> Ablation:
    """The recipe with some fields changed.

    Raises:
        SparsortError: an unknown field, or a value that does not fit.
    """
    if isinstance(recipe, Ablation):
        ablation = recipe
    elif isinstance(recipe, (str, Path)):
        ablation = Ablation.from_toml(recipe)
    else:
        return Ablation.from_table({**(recipe or {}), **changes}, where="the recipe")
    return Ablation.from_table({**_fields(ablation), **changes}, where="the recipe") if changes else ablation


def estimate_cost(ablation: Ablation) -> tuple[Cost, list[str]]:
    """Estimate the cost of a recipe from its tokenizer alone, and collect the notes on its data; no model is run.

    Raises:
        SparsortError: files, rows or a tokenizer that do not fit.
    """
    from sparsort.curriculum.ablation.recipe.task_data import TaskData
    from sparsort.curriculum.ablation.run.checks import check_answers
    from sparsort.curriculum.ablation.run.cost import estimate, measure

    tokenizer = ablation.spec.load_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    tasks = [TaskData(task, ablation) for task in ablation.load_tasks()]
    for data in tasks:
        if data.task.is_generation:
            data.notes += check_answers(data.task, data.splits, ablation)
    notes = [f"{data.task.name}: {note}" for data in tasks for note in data.notes] + skipped_criteria(ablation)
    return estimate(ablation, [measure(data.task, data.splits, count) for data in tasks]), notes


def find_source(
    source: str,
    *,
    data: Path | None,
    test: Path | None,
    prompt: str | None,
    label: str | None,
    labels: str | None,
    answer: str | None = None,
    judge: str | None = None,
    stop: tuple[str, ...] | None = None,
    max_new_tokens: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The fields of an ablation from the SOURCE of a command line: a recipe, a data file, or names of ready tasks.

    On the command line, `option_conditions` has already refused options of a data file that were given with a recipe.

    Args:
        source: the path or the names.
        data: folder of the files of ready tasks.
        test: file of the test rows.
        prompt, answer, label, labels, judge, stop, max_new_tokens, chat, system: fields of the `Task` of a data file.
        id_column, columns: see `DataSpec`.

    Raises:
        SparsortError: the source is not one of these, or is a data file without a prompt.
    """
    path = Path(source).expanduser()
    names = [name.strip() for name in source.split(",") if name.strip()]
    is_ready = bool(names) and all(name in task_names() for name in names)
    # A data folder may have the name of a ready task. With a prompt it is the folder, because a ready task has its own prompt.
    if path.suffix == ".toml" or (is_ready and (prompt is None or not path.exists())):
        return {"tasks": tuple(names), "data": data} if is_ready else _from_toml(path, data)
    if path.exists():
        options: dict[str, Any] = {"answer": answer, "judge": judge, "stop": stop, "chat": chat}
        options |= {"max_new_tokens": max_new_tokens, "system": system, "id_column": id_column, "columns": columns}
        return {"tasks": (_task_of_file(path, test, prompt, label or "label", labels, options),), "data": Path()}
    raise SparsortError(
        f"{source!r} is neither a file nor a ready task. Give a data file (.jsonl, .csv, .parquet …) with a prompt (--prompt), a "
        f"recipe (.toml), or names of ready tasks with the folder of their data (--data): {', '.join(task_names())}."
    )


def _from_toml(path: Path, data: Path | None) -> dict[str, Any]:
    if "tasks" not in tables.read(path):
        return {"tasks": (load_task(path),), "data": data}
    return _fields(Ablation.from_toml(path)) | ({"data": data} if data is not None else {})


def _fields(ablation: Ablation) -> dict[str, Any]:
    return {name: getattr(ablation, name) for name in ablation.__dataclass_fields__}


def _task_of_file(
    path: Path, test: Path | None, prompt: str | None, label: str, labels: str | None, options: Mapping[str, Any]
) -> Task:
    from sparsort.scoring.data.rows import open_rows

    source = open_rows(path, id_column=options.get("id_column"), columns=options.get("columns"))
    if prompt is None:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces; "
            f"{path.name} has: {', '.join(source.columns())}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("chat"):
        # Chat templates strip the spaces around a turn. The scored answer must be the text in the prompt, so it has none either.
        given.setdefault("answer", f"{{{label}}}")
    source.check(functools.partial(check_row, prompt=prompt, label=label))
    task = task_from_flags(
        (row.fields for row in source.rows()),
        prompt=prompt,
        label=label,
        labels=parse_labels(labels) if labels else None,
        name=path.stem,
        **given,
    )
    return replace(task, train=str(path.resolve()), test=None if test is None else str(test.expanduser().resolve()))


def _naming(model: Any) -> dict[str, Any]:
    """The fields of a recipe that describe a model given by name or as a spec; no fields for None."""
    if not isinstance(model, ModelSpec):
        return {} if model is None else {"model": str(model)}
    named = {"model": str(model.name)} if model.is_named else {}
    return named | {name: value for name, value, default in values_of(model) if name != "model" and value != default}


def _loaded(model: Any) -> Any:
    """The loaded model, if the argument is one or a spec of one; None for None, a name, and a spec with a name."""
    if isinstance(model, ModelSpec):
        return None if model.is_named else _loaded(model.name)
    if model is None or isinstance(model, str | Path):
        return None
    from sparsort.scoring.loading.load import LoadedModel

    if not isinstance(model, LoadedModel):
        raise SparsortError(
            f"model is a {type(model).__name__}; expected a name, a folder or a LoadedModel. Pass "
            "sparsort.scoring.loading.load.load_model(model, tokenizer=...)."
        )
    return model


def _provenance(ablation: Ablation, identity: Mapping[str, Any]) -> dict[str, Any]:
    from sparsort.scoring.scorers.base import versions

    return {
        **identity,
        "versions": versions(),
        "recipe": _without_folders(ablation.to_table()),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def _without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the folders of this machine, because a report may be passed on."""
    tasks = [
        task
        if isinstance(task, str)
        else task | {key: Path(task[key]).name for key in ("train", "test") if task.get(key)}
        for task in recipe["tasks"]
    ]
    names = [Path(task).name if isinstance(task, str) else task for task in tasks]
    return {key: value for key, value in recipe.items() if key != "data"} | {"tasks": names}


def _write_report(results: Results, folder: Path) -> str | None:
    from sparsort.recipes.report import write_report

    try:
        return str(write_report(results, folder))
    except SparsortError as error:
        # An ablation of hours should not fail because a drawing library is missing.
        _LOG.warning("no report was written: %s", error)
        return None
