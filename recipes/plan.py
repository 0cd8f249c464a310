"""A curriculum planned from score folders and a file of rows, in numbers and as a figure: the recipe behind `sparsort plan`.

Contract: the plan is that of `plan_curriculum`; lengths and groups that are only shown do not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice

if TYPE_CHECKING:
    from sparsort.curriculum.loading.inspect.summary import PlanSummary
    from sparsort.curriculum.loading.plan.combine import Combination
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.curriculum.loading.plan.settings import CurriculumSettings
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.store.scores import Scores

# What the figure calls the plan that is made, where others stand beside it.
THIS = "this plan"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, what it does, and its files."""

    plan: CurriculumPlan
    summary: PlanSummary
    out: Path | None
    figure: Path | None

    def to_json(self) -> dict[str, Any]:
        """The numbers and the files, as JSON values."""
        files = {
            name: None if path is None else str(path) for name, path in (("out", self.out), ("figure", self.figure))
        }
        return self.summary.to_json() | files


def make_plan(
    scores: str | Path | Mapping[str, str | Path],
    *,
    settings: CurriculumSettings,
    data: Any = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    groups: str | None = None,
    show_groups: str | None = None,
    lengths: str | None = None,
    combination: Combination = "rank_average",
    weights: Mapping[str, float] | None = None,
    epoch: int = 0,
    out: str | Path | None = None,
    fingerprint: str | None = None,
    draw: str | Path | None = None,
    beside: Mapping[str, str | Path] | None = None,
) -> Planned:
    """Plan every batch of a training run, and look at what an epoch of it shows.

    Args:
        scores: what `Scores.load` reads, such as a folder of `sparsort score`; several by name are combined.
        settings: of the curriculum.
        data: the rows to train on, as `open_rows` takes them; without, row i of the data is row i of the scores.
        id_column: column of the data that identifies a row; None for "id" if there is one. The plan records it.
        columns: names of the columns of the data, a CSV or TSV file without a header.
        groups: field of the data with each row's group; the curriculum then takes each group's easiest together.
        show_groups: field whose shares are shown and do not change the plan.
        lengths: field of the data with the tokens of each row, by default those that the scores counted.
        combination: of several scores.
        weights: of the scores in "rank_average".
        epoch: that is summed up and drawn.
        out: folder for the plan.
        fingerprint: your own name for the data, as of `plan_curriculum`.
        draw: file for the figure: .png, .pdf or .svg.
        beside: name → folder of a plan that was saved before, over the same rows, to draw beside this one.

    Raises:
        SparsortError: whatever does not fit together, or a folder that holds another plan.

    Example:
        >>> made = make_plan("scores", settings=CurriculumSettings(batch_size=32, stages=10), draw="plan.png")
        >>> made.summary.parts[0].difficulty.mean
    """
    from sparsort.curriculum.loading.inspect.drawing import check_figure, draw_plans
    from sparsort.curriculum.loading.inspect.summary import summarise
    from sparsort.curriculum.loading.plan.combine import COMBINATIONS
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.curriculum.loading.plan.planning import plan_curriculum
    from sparsort.curriculum.loading.plan.ranking import group_names
    from sparsort.scoring.data.rows import open_rows
    from sparsort.scoring.store.scores import Scores

    if draw is not None:
        check_figure(draw)
    elif beside:
        raise SparsortError("plans stand beside each other in a figure: say where it goes with draw (--draw FILE).")
    if combination not in COMBINATIONS:
        raise unknown_choice("way to combine scores", combination, COMBINATIONS)
    others = {name: CurriculumPlan.open(folder) for name, folder in (beside or {}).items()}
    paths = dict(scores) if isinstance(scores, Mapping) else {"difficulty": scores}
    _check_paths(paths, out)
    if epoch < 0:
        raise SparsortError(f"epoch is {epoch}; epochs count from 0.")
    if weights and len(paths) == 1:
        raise SparsortError(
            f"weights ({', '.join(weights)}) weigh several scores, and there is one. Leave them out, or pass more scores."
        )
    fields = {"groups": groups, "show_groups": show_groups, "lengths": lengths}
    if data is None and (asked := [name for name, field in fields.items() if field is not None]):
        raise SparsortError(f"{asked[0]}={fields[asked[0]]!r} names a field of the data: pass data too (--data FILE).")
    source = None if data is None else open_rows(data, id_column=id_column, columns=columns)
    if source is not None:
        source.require([field for field in fields.values() if field is not None])
    read = {name: Scores.load(path) for name, path in paths.items()}
    rows = None if source is None else _Rows(source)
    tokens = _field_numbers(rows, lengths) if lengths and rows else _counted(read, rows)
    # Lengths are a part of a plan only where they decide something, so that the same call in Python makes the same plan.
    decide = settings.needs_lengths or settings.max_length is not None
    plan = plan_curriculum(
        read if len(read) > 1 else next(iter(read.values())),
        data=rows,
        id_column=id_column,
        groups=groups,
        lengths=tokens if decide else None,
        combination=combination,
        weights=weights,
        out=out,
        fingerprint=fingerprint,
        **settings.to_json(),
    )
    shown = group_names((row[show_groups] for row in rows), show_groups) if show_groups and rows else None
    summary = summarise(plan, epoch=epoch, lengths=tokens, groups=shown)
    if draw is not None:
        draw_plans({THIS: plan, **others} if others else plan, draw, epoch=epoch, lengths=tokens, groups=shown)
    return Planned(
        plan=plan,
        summary=summary,
        out=None if out is None else Path(out),
        figure=None if draw is None else Path(draw),
    )


class _Rows(Sequence[Mapping[str, Any]]):
    """The records of a source, read again whenever they are gone over, so that no file is held in memory."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.count()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        from sparsort.terminal.progress import progress

        with progress(self._source.name, len(self)) as advance:
            for row in self._source.rows():
                yield row.fields
                advance(1)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        return next(self._source.rows(range(len(self))[place])).fields


def _check_paths(paths: Mapping[str, str | Path], out: str | Path | None) -> None:
    given = {name: Path(path).expanduser() for name, path in paths.items()}
    for path in given.values():
        if (path / "plan.json").is_file():
            raise SparsortError(
                f"{path} holds a curriculum plan, and a plan is made from scores. Pass the folder of sparsort score; "
                "CurriculumPlan.open reads this one, and beside (--beside) draws it."
            )
    if out is None:
        return
    folder = Path(out).expanduser()
    if folder.is_file():
        raise SparsortError(f"{folder} is a file; a plan is a folder. Choose another name.")
    if folder.resolve() in [path.resolve() for path in given.values()]:
        raise SparsortError(f"{folder} holds the scores. Choose another folder for the plan.")


def _field_numbers(rows: _Rows, field: str) -> NDArray[np.int64]:
    values = [row[field] for row in rows]
    wrong = next(
        (place for place, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int)), None
    )
    if wrong is not None:
        raise SparsortError(
            f"row {wrong} has {values[wrong]!r} in the field {field!r}, and lengths are whole numbers of tokens. "
            "Name a field that holds them, or leave lengths out to take those that the scores counted."
        )
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise SparsortError(f"the field {field!r} holds a number of tokens beyond 64 bits. Repair the data.") from error


def _counted(read: Mapping[str, Scores], rows: _Rows | None) -> NDArray[Any] | None:
    """Tokens of each row, of the first scores that counted them."""
    from sparsort.curriculum.loading.plan.planning import counted_tokens

    found = (counted_tokens(scores, rows) for scores in read.values())
    return next((tokens for tokens in found if tokens is not None), None)
