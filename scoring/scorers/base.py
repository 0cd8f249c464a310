"""The interface of all scorers: `Request` describes one call, and `Scorer.score` runs the scorer's job over the rows."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import SAMPLING, RowSource
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import DataSpec, PromptOptions, PromptSpec
from sparsort.scoring.prompts.types import Truncation, Turns
from sparsort.scoring.scorers import run_shards as engine
from sparsort.scoring.store.manifest import MANIFEST, read_manifest
from sparsort.terminal.progress import progress

if TYPE_CHECKING:
    from sparsort.scoring.store.row_cache import RowCache
    from sparsort.scoring.store.scores import Scores

Advance = Callable[[int], None]

_LOG = logging.getLogger("sparsort")


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
        return prompt.fields if prompt is not None else None

    @overload
    def score(
        self,
        data: Any,
        prompt: str | Turns | Prompt | PromptSpec | None = None,
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
    ) -> Scores: ...

    @overload
    def score(
        self,
        data: Any,
        prompt: str | Turns | Prompt | PromptSpec | None = None,
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
    ) -> engine.Coverage: ...

    def score(
        self,
        data: Any,
        prompt: str | Turns | Prompt | PromptSpec | None = None,
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
    ) -> Scores | engine.Coverage:
        """Score every row of `data`.

        Args:
            data: a path (see `open_rows`), a `datasets.Dataset`, or a list of dicts.
            prompt: format string over the columns, chat turns (see `Prompt.of`) or a `Prompt`; or a `PromptSpec`, which
                replaces this argument and the six that follow.
            messages: instead of a prompt, the column that holds whole conversations (see `prompts.conversations`): their
                last assistant turn is the answer, and the model's chat template is applied.
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
            like: earlier scores that the new ones must be comparable with. An outlier rule that was fitted for them is
                reused, and a setting that differs from theirs is refused.
            cache: values that the model computed before, to which new ones are added; None for none. Not with `out`.

        Returns:
            One row per id, in the data's order. A row that cannot be scored has a NaN difficulty, a status and a reason. With
            `part`, the coverage of the folder, which has the scores once all parts are done (`Coverage.load`).

        Raises:
            SparsortError: bad input; the message says what to do.
        """
        _check_sharing(out, part, cache)
        text: PromptOptions = {"messages": messages, "answer": answer, "system": system, "chat": chat}
        text |= {"truncation": truncation, "max_length": max_length}
        spec = PromptSpec.of(prompt, **text)
        source, request = self._open(data, spec, DataSpec(id_column=id_column, columns=columns), cache)
        folder = Path(out).expanduser() if out is not None else None
        if folder is None:
            job = self._prepare(source, request, None, like)
            with progress("scoring", source.count()) as advance:
                return engine.run(source, job, out=None, shard_rows=shard_rows, advance=advance)
        with self._begin(source, request, folder, shard_rows, like) as shards:
            numbers = shards.numbers(part or (0, 1))
            with progress("scoring", engine.count_rows(numbers, source.count(), shard_rows)) as advance:
                coverage = shards.run(numbers, advance)
        return coverage.load() if part is None else coverage

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
            source.require(prompt.fields, prompt)
        return source, Request(
            prompt_or_none=prompt, truncation=spec.truncation, max_length=spec.max_length, cache=cache
        )


def _check_sharing(out: str | Path | None, part: tuple[int, int] | None, cache: RowCache | None) -> None:
    if part is not None:
        engine.check_part(part)
        if out is None:
            raise SparsortError(f"part={part} needs a folder that the other parts share. Pass out='FOLDER' (--out).")
    if cache is not None and out is not None:
        raise SparsortError("out= and cache= were given. A score folder keeps the scores of every row: omit cache=.")


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
