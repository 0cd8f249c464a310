"""The interface of all scorers: `Request` describes one call, and `Scorer.score` runs the scorer's job over the rows."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import sys
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import SAMPLING
from sparsort.scoring.data.rows import RowSource
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import DataSpec, PromptOptions, PromptSpec
from sparsort.scoring.prompts.types import PromptWriter, Truncation, Turns
from sparsort.scoring.scorers import run_shards as engine
from sparsort.scoring.store import score_views
from sparsort.scoring.store.manifest import MANIFEST, read_manifest
from sparsort.terminal.progress import progress
from sparsort.trackers import NO_TRACKER, Meter, ReportTo, check_trackers, tracked

if TYPE_CHECKING:
    import pyarrow as pa

    from sparsort.scoring.store.row_cache import RowCache
    from sparsort.scoring.store.scores import Scores

Advance = Callable[[int], None]

_LOG = logging.getLogger("sparsort")
_NEXT_STEP = "The column 'reason' says why; scores.filter(lambda row: row['status'] != 'ok') returns these rows."


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of one call of `Scorer.score`, apart from the data."""

    prompt_or_none: Prompt | None
    truncation: Truncation
    max_length: int | None
    cache: RowCache | None = None

    @property
    def prompt(self) -> Prompt:
        """The prompt, for code that runs after `need_prompt`."""
        if self.prompt_or_none is None:
            raise SparsortError(
                "this scorer reads text. Pass prompt='…' (--prompt), for example 'Question: {question}\\nAnswer:'."
            )
        return self.prompt_or_none

    def need_prompt(self, source: RowSource) -> Prompt:
        """Return the prompt, or raise `SparsortError` with the columns that a prompt can be made of."""
        if self.prompt_or_none is None:
            first = next(iter(source.rows()), None)
            columns = ", ".join(map(str, first.fields)) if first else "none"
            raise SparsortError(
                "this scorer reads text. Pass prompt='…' (--prompt) with columns in braces, or messages='…' (--messages) for a "
                f"column of conversations; this data has: {columns}."
            )
        return self.prompt_or_none

    def provenance(self, kind: str, orientation: dict[str, int]) -> dict[str, Any]:
        """The part of the provenance that every scorer records."""
        return {
            "scorer": kind,
            "orientation": orientation,
            "prompt": self.prompt_or_none.describe() if self.prompt_or_none else None,
        }


class Scorer(ABC):
    """Ranks examples by difficulty. `kind` names what the difficulty is."""

    kind: ClassVar[str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.shown().items())})"

    def shown(self) -> dict[str, Any]:
        """The settings that `repr` shows."""
        return {}

    @abstractmethod
    def prepare(self, source: RowSource, request: Request, previous: dict[str, Any] | None) -> engine.Job:
        """Create the job that scores this source.

        Args:
            source: the rows.
            request: the settings of the call.
            previous: provenance of a run that `out` already holds, or of the scores passed as `like`; None without either.
        """

    def read_prompt(self, spec: PromptSpec) -> Prompt | None:
        """Return the prompt that a caller described; None if the caller described none."""
        return spec.read()

    def content(self, prompt: Prompt | None) -> Sequence[str] | None:
        """Return the names of the fields that determine a row's score; None if all of them do."""
        return prompt.content if prompt is not None else None

    @overload
    def score(
        self,
        data: Any,
        prompt: str | Turns | PromptWriter | Prompt | PromptSpec | None = None,
        *,
        messages: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        chat: bool = False,
        truncation: Truncation = "error",
        max_length: int | None = None,
        id_column: str | None = None,
        columns: Sequence[str] | None = None,
        out: str | Path | None = None,
        shard_rows: int = 2048,
        part: None = None,
        like: Scores | None = None,
        cache: RowCache | None = None,
        report_to: ReportTo = NO_TRACKER,
    ) -> Scores: ...

    @overload
    def score(
        self,
        data: Any,
        prompt: str | Turns | PromptWriter | Prompt | PromptSpec | None = None,
        *,
        messages: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        chat: bool = False,
        truncation: Truncation = "error",
        max_length: int | None = None,
        id_column: str | None = None,
        columns: Sequence[str] | None = None,
        out: str | Path,
        shard_rows: int = 2048,
        part: tuple[int, int],
        like: Scores | None = None,
        report_to: ReportTo = NO_TRACKER,
    ) -> engine.Coverage: ...

    def score(
        self,
        data: Any,
        prompt: str | Turns | PromptWriter | Prompt | PromptSpec | None = None,
        *,
        messages: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        chat: bool = False,
        truncation: Truncation = "error",
        max_length: int | None = None,
        id_column: str | None = None,
        columns: Sequence[str] | None = None,
        out: str | Path | None = None,
        shard_rows: int = 2048,
        part: tuple[int, int] | None = None,
        like: Scores | None = None,
        cache: RowCache | None = None,
        report_to: ReportTo = NO_TRACKER,
    ) -> Scores | engine.Coverage:
        """Score every row of `data`.

        Args:
            data: rows in any form that `open_rows` reads, such as a path, a list of dictionaries, a frame or a dataset.
            prompt: format string over the columns; chat turns (see `Prompt.of`); a function from a row to its text or chat turns
                (see `prompts.functions`); a `Prompt`; or a `PromptSpec`, which replaces this argument and the six that follow.
            messages: instead of a prompt, the column of whole conversations, whose last turn is the answer (`conversations`).
            answer: format string of the answer that follows the prompt; None to read the prompt alone.
            system: system turn, with `chat`.
            chat: put the prompt into the model's chat template.
            truncation: what happens to a text over the limit (see `PromptSpec`).
            max_length: limit in tokens; None for the model's own context.
            id_column: column that identifies a row; None for "id" if there is one, else the row's position.
            columns: names of the columns of a CSV or TSV file without a header.
            out: folder for durable shards; a run that was killed resumes there. None keeps everything in memory.
            shard_rows: rows per shard, the unit that is kept or redone. It changes no score beyond rounding.
            part: (k, n) to score only every n-th shard, from shard k on, as process k of n that share `out`; None to score
                all shards that no other process has claimed, and to return when all are done.
            like: earlier scores to be comparable with: their outlier rule is reused, and other settings are refused.
            cache: values that the model computed before, to which new ones are added; None for none. Not with `out`.
            report_to: trackers that get the finished rows, the rows per second, and the rows by status (see `tracked`).

        Returns:
            One row per id, in the data's order. A row that cannot be scored has a NaN difficulty, a status and a reason, and a
            `UserWarning` counts these rows by status. With `part`, the coverage of the folder, which has the scores once all
            parts are done (`Coverage.load`).

        Raises:
            SparsortError: bad input; the message says what to do.
        """
        check_trackers(report_to)
        text: PromptOptions = {"messages": messages, "answer": answer, "system": system, "chat": chat}
        text |= {"truncation": truncation, "max_length": max_length}
        spec = PromptSpec.of(prompt, **text)
        _check_call(spec, out, like, cache, part)
        source, request = self._open(data, spec, DataSpec(id_column=id_column, columns=columns), cache)
        folder = Path(out).expanduser() if out is not None else None
        if folder is None:
            job = self._prepare(source, request, None, like)
            with watched(source.name, source.count(), job.provenance, None, report_to) as (advance, scored):
                scores = engine.run(source, job, out=None, shard_rows=shard_rows, advance=advance, scored=scored)
            warn_unscored(scores)
            return scores
        with self._begin(source, request, folder, shard_rows, like) as shards:
            numbers = shards.numbers(part or (0, 1))
            rows = engine.count_rows(numbers, source.count(), shard_rows)
            with watched(source.name, rows, shards.store.provenance, folder, report_to) as (advance, scored):
                coverage = shards.run(numbers, advance, scored)
        if part is not None:
            return coverage
        scores = coverage.load()
        warn_unscored(scores)
        return scores

    def begin(self, source: RowSource, prompt: PromptSpec, *, out: Path, shard_rows: int) -> engine.ShardRun:
        """Begin or resume a run whose shards the caller chooses; see `ShardRun.begin` and, for the arguments, `score`."""
        source, request = self._open(source, prompt, DataSpec(), None)
        return self._begin(source, request, out, shard_rows, None)

    def _begin(
        self, source: RowSource, request: Request, out: Path, shard_rows: int, like: Scores | None
    ) -> engine.ShardRun:
        return engine.ShardRun.begin(
            source,
            lambda: self._prepare(source, request, out, like),
            out=out,
            shard_rows=shard_rows,
            note=_LOG.warning,
        )

    def _prepare(self, source: RowSource, request: Request, out: Path | None, like: Scores | None) -> engine.Job:
        # The scores in `like` take precedence over a run in the folder, whose store compares the provenance anyway.
        job = self.prepare(source, request, like.provenance if like is not None else _previous_provenance(out))
        if like is not None:
            _refuse_other_settings(like.provenance, job.provenance)
        return job

    def _open(
        self, data: Any, spec: PromptSpec, data_spec: DataSpec, cache: RowCache | None
    ) -> tuple[RowSource, Request]:
        prompt = self.read_prompt(spec)
        # Only these fields enter the digests of the rows, so a change of another column does not invalidate a shard.
        source = data_spec.open(data, content=self.content(prompt))
        if prompt is not None:
            prompt = prompt.for_rows(source)
            source.require(prompt.fields, prompt)
        return source, Request(
            prompt_or_none=prompt, truncation=spec.truncation, max_length=spec.max_length, cache=cache
        )


@contextlib.contextmanager
def watched(
    name: str, rows: int, provenance: Mapping[str, Any], out: Path | None, report_to: ReportTo
) -> Iterator[tuple[Advance, Callable[[pa.Table], None]]]:
    """Draw a progress bar, and report the progress to the trackers.

    Args:
        name: the name of the source.
        rows: the number of rows to score.
        provenance: the settings of the run, which the trackers record.
        out: the score folder.
        report_to: the trackers.

    Yields:
        A function to call with a number of rows that are done, and one to call with the table of every shard scored now.
    """
    _LOG.info("scoring %d rows of %s", rows, name)
    settings = {name: value for name, value in provenance.items() if name != "environment"}
    # Next to the score folder, which accepts no other files.
    folder = None if out is None else out.with_name(f"{out.name}.runs")
    with (
        progress("scoring", rows) as draw,
        tracked(report_to, "score", folder=folder, config=settings) as log,
    ):
        meter = Meter(log, "rows")

        def advance(count: int) -> None:
            draw(count)
            meter.advance(count)

        def scored(table: pa.Table) -> None:
            statuses = Counter(table["status"].to_pylist())
            _LOG.debug("scored a shard of %d rows: %s", len(table), dict(statuses))
            meter.count({f"status/{status}": count for status, count in statuses.items()})
            meter.report()

        yield advance, scored


def _check_call(
    spec: PromptSpec, out: str | Path | None, like: Scores | None, cache: RowCache | None, part: tuple[int, int] | None
) -> None:
    """Refuse a cache next to a folder, a part without one, and a prompt function without a hash if scores are compared."""
    if part is not None:
        engine.check_part(part)
        if out is None:
            raise SparsortError(f"part={part} needs a folder that the other parts share. Pass out='FOLDER' (--out).")
    if cache is not None and out is not None:
        raise SparsortError("out= and cache= were given. A score folder keeps the scores of every row: omit cache=.")
    prompt = None if out is None and like is None else spec.read()
    if prompt is not None and prompt.function is not None:
        prompt.function.need_hash(
            "a run with a folder (out=)" if out is not None else "a comparison with earlier scores (like=)"
        )


def warn_unscored(scores: Scores, step: str = _NEXT_STEP) -> None:
    """Warn about rows without a score, at the line that called the public function that calls this one.

    There is no warning if that line is part of sparsort, which then reports such rows in its own way.

    Args:
        scores: the scores.
        step: the sentence after the counts.
    """
    caller = sys._getframe(2)
    if caller.f_globals.get("__name__", "").partition(".")[0] == "sparsort":
        return
    if unscored := score_views.unscored(scores):
        warnings.warn(f"{unscored} {step}", stacklevel=3)


def versions() -> dict[str, str]:
    """The versions of the software that scores depend on, by name; packages that are not installed are absent."""
    installed = {"sparsort": sparsort.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy"):
        with contextlib.suppress(ModuleNotFoundError):
            installed[name] = version(name)
    return installed


def _refuse_other_settings(before: dict[str, Any], now: dict[str, Any]) -> None:
    # The earlier provenance has been through JSON, which turns tuples into lists: compare in that form.
    settings = {key: json.loads(json.dumps(value)) for key, value in now.items() if key != "environment"}
    differing = sorted(key for key, value in settings.items() if before.get(key) != value)
    if differing:
        changes = ", ".join(f"{key}: {before.get(key)!r} → {settings[key]!r}" for key in differing)
        raise SparsortError(f"these scores would not compare with those given: {changes}. Score both alike.")


def _previous_provenance(out: Path | None) -> dict[str, Any] | None:
    """Return the provenance of the run that a folder holds; None if there is none, or none that can be read.

    Raises:
        SparsortError: the run is not finished, and its outlier rule depends on the order of the rows.
    """
    if out is None or not (out / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(out)
    except SparsortError:
        # The store reads the manifest again and reports what is wrong with it.
        return None
    # Only the manifest of a finished run lists its shards.
    if "shards" not in manifest:
        _refuse_sampling_by_position(manifest["provenance"], out)
    return dict(manifest["provenance"])


def _refuse_sampling_by_position(provenance: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run of an earlier version, whose outlier rules were fitted on evenly spaced rows.

    A finished run keeps its rule, and so does a calibration, which is fitted once for all data.
    """
    fits = [provenance.get("outliers"), *(provenance.get("fits") or {}).values()]
    if "calibration" in provenance:
        return
    for fit in fits:
        if isinstance(fit, dict) and fit.get("rule", "none") != "none" and fit.get("sampling") != SAMPLING:
            raise SparsortError(
                f"{folder} holds an unfinished run of an earlier version, whose outlier rule {fit['rule']!r} depends on the "
                "order of the rows. The rule is now fitted on rows chosen by their digests. Choose another folder (--out), or "
                "delete this one to score again."
            )
