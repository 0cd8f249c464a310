"""Plan a curriculum from scores and a file of rows, with a summary and a figure. The recipe for `sparsort plan`.

Contract: the plan is the one that `plan_curriculum` makes. Lengths and groups that are only shown do not change it. Nothing here
imports NumPy before a plan is made, because the command line reads the options of the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.curriculum.loading.plan.settings import BATCH_PANEL, ORDER_PANEL, CurriculumSettings
from sparsort.errors import SparsortError, unknown_choice
from sparsort.options import option, shares
from sparsort.scoring.prompts.spec import DataSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsort.curriculum.loading.inspect.summary import PlanSummary
    from sparsort.curriculum.loading.plan.combine import Combination
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.store.scores import Scores

# The name of the new plan in a figure with other plans.
THIS = "this plan"


def named_paths(texts: Sequence[str] | None, kind: str = "scores") -> dict[str, str]:
    """Parse paths that may have a name, as PATH or NAME=PATH; by default a path has the name of its file.

    Args:
        texts: the paths; None for none.
        kind: the word for them in a message.

    Raises:
        SparsortError: two paths have the same name.
    """
    paths: dict[str, str] = {}
    for text in texts or ():
        name, equals, path = text.partition("=")
        # A path may contain "=" itself.
        if not equals or not name or Path(text).exists():
            name, path = Path(text).stem or text, text
        if name in paths:
            raise SparsortError(
                f"two {kind} are called {name!r}: {paths[name]} and {path}. Name them, as in first={paths[name]} second={path}."
            )
        paths[name] = path
    return paths


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned, saved and drawn, in addition to the settings of the curriculum.

    Attributes:
        data: the rows to train on, as `open_rows` takes them; None if row i of the data is row i of the scores.
        groups: field of the data that names the group of each row; the curriculum takes each group's easiest rows together.
        combination: how several scores are combined.
        weights: weight of each score in "rank_average", by name.
        lengths: field of the data with the number of tokens of each row; None for the tokens that the scores counted.
        out: folder for the plan.
        fingerprint: the caller's name for the data; see `plan_curriculum`.
        draw: file for the figure: .png, .pdf or .svg.
        compare: folders of saved plans over the same rows, by name, which the figure shows next to the new plan.
        export: file or folder for the rows in training order; see `export_plan`.
        show_groups: field whose shares are shown, without an effect on the plan.
        epoch: the epoch that is summarised, drawn and exported.
    """

    data: Any = option(None, "Rows to train on, matched to the scores [default: the scored rows].", kind=Path | None)
    groups: str | None = option(
        None, "Field of the data that names groups; the easiest rows of each group come together.", panel=ORDER_PANEL
    )
    combination: Combination = option(
        "rank_average",
        "How several scores are combined: {names}.",
        names="curriculum.loading.plan.combine:COMBINATIONS",
        panel=ORDER_PANEL,
        kind=str,
    )
    weights: Mapping[str, float] | None = option(
        None,
        "Weight of a score in rank_average, as NAME=2; may be given once per score.",
        panel=ORDER_PANEL,
        parameter="weight",
        kind=list[str] | None,
        read=shares("--weight"),
    )
    lengths: str | None = option(
        None,
        "Field of the data with the number of tokens of a row [default: the tokens that the scores counted].",
        panel=BATCH_PANEL,
    )
    out: str | Path | None = option(None, "Folder for the plan, to train with.", short="-o", kind=Path | None)
    fingerprint: str | None = option(
        None, "A name of your own for the data, for loaders that have no id or text to compare."
    )
    draw: str | Path | None = option(None, "File for the figure: .png, .pdf or .svg.", kind=Path | None)
    compare: Mapping[str, str | Path] | None = option(
        None,
        "Saved plan to draw next to this one: PATH or NAME=PATH; may be given several times.",
        retired=("--beside",),
        kind=list[str] | None,
        read=lambda texts: named_paths(texts, "plans"),
    )
    export: str | Path | None = option(
        None,
        "Write the rows of an epoch in training order: a .parquet or .jsonl file, or a folder for datasets.load_from_disk.",
        kind=Path | None,
    )
    show_groups: str | None = option(None, "Field whose shares are shown, without an effect on the plan.")
    epoch: int = option(0, "The epoch to show and to export, counted from 0.")

    @property
    def fields(self) -> dict[str, str]:
        """The fields of the data that the options name, by option."""
        named = {"groups": self.groups, "show_groups": self.show_groups, "lengths": self.lengths}
        return {name: field for name, field in named.items() if field is not None}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, its summary, and the files that were written."""

    plan: CurriculumPlan
    summary: PlanSummary
    out: Path | None
    figure: Path | None
    export: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The numbers and the files, as JSON values."""
        files = {"out": self.out, "figure": self.figure, "export": self.export}
        return self.summary.to_json() | {name: None if path is None else str(path) for name, path in files.items()}


def make_plan(
    scores: str | Path | Mapping[str, str | Path],
    *,
    settings: CurriculumSettings,
    options: PlanOptions = PlanOptions(),
    rows: DataSpec = DataSpec(),
) -> Planned:
    """Plan every batch of a training run, and summarise an epoch of it.

    Args:
        scores: anything that `Scores.load` reads, such as a folder of `sparsort score`; several, by name, are combined.
        settings: the settings of the curriculum.
        options: what is planned, saved and drawn.
        rows: how `options.data` is read. The plan records the column that identifies a row.

    Raises:
        SparsortError: inputs that do not fit together, or a folder that holds another plan.

    Example:
        >>> planned = make_plan("scores", settings=CurriculumSettings(batch_size=32, stages=10))
        >>> planned.summary.parts[0].difficulty.mean
    """
    from sparsort.curriculum.loading.export import export_plan
    from sparsort.curriculum.loading.inspect.drawing import draw_plans
    from sparsort.curriculum.loading.inspect.summary import summarise
    from sparsort.curriculum.loading.plan.planning import plan_curriculum
    from sparsort.curriculum.loading.plan.ranking import group_names
    from sparsort.scoring.store.scores import Scores

    paths = dict(scores) if isinstance(scores, Mapping) else {"difficulty": scores}
    others = _check(paths, options)
    records = _open_records(options, rows)
    tables = {name: Scores.load(path) for name, path in paths.items()}
    field = options.lengths
    tokens = _field_numbers(records, field) if field and records else _counted(tables, records)
    # Lengths that decide nothing stay out of the plan, so that the same call in Python gives the same plan.
    decide = settings.needs_lengths or settings.max_length is not None
    plan = plan_curriculum(
        tables if len(tables) > 1 else next(iter(tables.values())),
        data=records,
        id_column=rows.id_column,
        groups=options.groups,
        lengths=tokens if decide else None,
        combination=options.combination,
        weights=options.weights,
        out=options.out,
        fingerprint=options.fingerprint,
        **settings.to_json(),
    )
    field = options.show_groups
    groups = group_names((record[field] for record in records), field) if field and records else None
    summary = summarise(plan, epoch=options.epoch, lengths=tokens, groups=groups)
    figure = None if options.draw is None else Path(options.draw)
    if figure is not None:
        plans = {THIS: plan, **others} if others else plan
        draw_plans(plans, figure, epoch=options.epoch, lengths=tokens, groups=groups)
    # The tables that were made to match scores with rows are large, and no longer needed.
    del tables
    export = None if options.export is None or records is None else Path(options.export).expanduser()
    if export is not None and records is not None:
        export_plan(plan, records.source, export, epoch=options.epoch)
    return Planned(
        plan=plan, summary=summary, out=None if options.out is None else Path(options.out), figure=figure, export=export
    )


def _check(paths: Mapping[str, str | Path], options: PlanOptions) -> dict[str, CurriculumPlan]:
    """Refuse options that do not fit together, before any score is read, and open the saved plans."""
    from sparsort.curriculum.loading.export import check_export
    from sparsort.curriculum.loading.inspect.drawing import check_figure
    from sparsort.curriculum.loading.plan.combine import COMBINATIONS
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

    if options.export is not None:
        check_export(options.export)
        if options.data is None:
            raise SparsortError("an export (--export) contains the rows of the data: pass data too (--data FILE).")
    if options.draw is not None:
        check_figure(options.draw)
    elif options.compare:
        raise SparsortError("plans are compared in a figure: say where it goes with draw (--draw FILE).")
    if options.combination not in COMBINATIONS:
        raise unknown_choice("way to combine scores", options.combination, COMBINATIONS)
    others = {name: CurriculumPlan.open(folder) for name, folder in (options.compare or {}).items()}
    _check_paths(paths, options.out)
    if options.epoch < 0:
        raise SparsortError(f"epoch is {options.epoch}; epochs count from 0.")
    if options.weights and len(paths) == 1:
        raise SparsortError(
            f"weights ({', '.join(options.weights)}) weigh several scores, and there is one. Omit them, or pass more scores."
        )
    return others


def _open_records(options: PlanOptions, rows: DataSpec) -> _Records | None:
    """The records of the data, which must have the fields that the options name; None without data."""
    fields = options.fields
    if options.data is None:
        for name, field in fields.items():
            raise SparsortError(f"{name}={field!r} names a field of the data: pass data too (--data FILE).")
        return None
    source = rows.open(options.data)
    source.require(list(fields.values()))
    return _Records(source)


class _Records(Sequence[Mapping[str, Any]]):
    """The records of a source, which are read from its file on every pass, so that they need no memory."""

    def __init__(self, source: RowSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.count()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        from sparsort.terminal.progress import progress

        with progress(self.source.name, len(self)) as advance:
            for row in self.source.rows():
                yield row.fields
                advance(1)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        return next(self.source.rows(range(len(self))[place])).fields


def _check_paths(paths: Mapping[str, str | Path], out: str | Path | None) -> None:
    folders = [Path(path).expanduser() for path in paths.values()]
    for path in folders:
        if (path / "plan.json").is_file():
            raise SparsortError(
                f"{path} is a curriculum plan, and a plan is made from scores. Pass the folder of sparsort score; "
                "CurriculumPlan.open reads this plan, and compare (--compare) draws it."
            )
    if out is None:
        return
    folder = Path(out).expanduser()
    if folder.is_file():
        raise SparsortError(f"{folder} is a file; a plan is a folder. Choose another name.")
    if folder.resolve() in [path.resolve() for path in folders]:
        raise SparsortError(f"{folder} holds the scores. Choose another folder for the plan.")


def _field_numbers(records: _Records, field: str) -> NDArray[Any]:
    """(N,) int64 lengths, from a field of the data."""
    import numpy as np

    values = [record[field] for record in records]
    wrong = next(
        (place for place, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int)), None
    )
    if wrong is not None:
        raise SparsortError(
            f"row {wrong} has {values[wrong]!r} in the field {field!r}, and lengths are whole numbers of tokens. "
            "Name a field that has them, or omit lengths to use those that the scores counted."
        )
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise SparsortError(f"the field {field!r} holds a number of tokens beyond 64 bits. Repair the data.") from error


def _counted(tables: Mapping[str, Scores], records: _Records | None) -> NDArray[Any] | None:
    """(N,) tokens of each row, from the first scores that counted them; None if no scores did."""
    from sparsort.curriculum.loading.plan.planning import counted_tokens

    counts = (counted_tokens(scores, records) for scores in tables.values())
    return next((tokens for tokens in counts if tokens is not None), None)
