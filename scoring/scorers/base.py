"""What every scorer shares: the request, the job that scores shards, and `score`, which runs the one over the other."""

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
from typing import TYPE_CHECKING, Any, ClassVar

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import SAMPLING, RowSource
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.scoring.prompts.types import Truncation, Turns
from sparsort.scoring.scorers import run_shards as engine
from sparsort.scoring.store.shards import MANIFEST, read_manifest
from sparsort.terminal.progress import progress

if TYPE_CHECKING:
    from sparsort.scoring.store.row_cache import RowCache
    from sparsort.scoring.store.scores import Scores

Advance = Callable[[int], None]

_LOG = logging.getLogger("sparsort")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks to have scored, apart from the data."""

    prompt_or_none: Prompt | None
    truncation: Truncation
    max_length: int | None
    cache: RowCache | None = None

    @property
    def prompt(self) -> Prompt:
        """The prompt; `need_prompt` has made sure that there is one."""
        if self.prompt_or_none is None:
            raise SparsortError(
                "this scorer reads text. Pass prompt='…' (--prompt), for example 'Question: {question}\\nAnswer:'."
            )
        return self.prompt_or_none

    def need_prompt(self, source: RowSource) -> Prompt:
        """The prompt, or an error that shows which columns there are to put into one."""
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
        """The job for this source. `previous` is the provenance of a run that `out` holds already."""

    def read_prompt(self, spec: PromptSpec) -> Prompt | None:
        """The prompt that a caller described; None where the scorer was given none."""
        return spec.read()

    def content(self, prompt: Prompt | None) -> Sequence[str] | None:
        """The fields whose values decide a row's score; None where all of them count."""
        return prompt.fields if prompt is not None else None

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
        like: Scores | None = None,
        cache: RowCache | None = None,
    ) -> Scores:
        """Score every row of `data`.

        Args:
            data: a path (.jsonl, .json, .csv, .tsv, .parquet, a saved `datasets` folder), a `datasets.Dataset`, or a list of
                dicts.
            prompt: format string over the columns, or chat turns (see `Prompt.of`); or a `Prompt`. A `PromptSpec` holds this
                and the six arguments that follow, which are left out then.
            messages: instead, the column that holds whole conversations (see `prompts.conversations`): their last
                assistant turn is the answer, and the model's chat template is applied.
            answer: format string of the answer behind the prompt; None to read the prompt alone.
            system: system turn, with `chat`.
            chat: put the prompt into the model's chat template.
            truncation: what happens to a text over the limit: "error" leaves the row unscored with a reason; "left" and
                "right" cut that end of the prompt and count what was cut.
            max_length: limit in tokens; None for the model's own context.
            id_column: column that identifies a row; None for "id" if there is one, else the row's position.
            columns: names of the columns of a CSV or TSV file without a header.
            out: folder for durable shards; run again after a kill it goes on where it was. None keeps all in memory.
            shard_rows: rows of one shard, the unit that is kept or redone. Does not change a score beyond rounding.
            like: scores made before, to be comparable with: what was fitted for them (an outlier rule) is used again,
                and a setting that differs from theirs is refused.
            cache: where to look for what the model has computed for these rows before, and to keep what it computes now;
                None to read every row, and to write nothing. Not together with `out`, which keeps the scores themselves.

        Returns:
            One row an id, in the data's order. A row that cannot be scored has a NaN difficulty, a status and a reason.

        Raises:
            SparsortError: bad input; the message says what to do.
        """
        if cache is not None and out is not None:
            raise SparsortError(
                "out= and cache= were given. A score folder keeps the scores of every row: leave cache= out."
            )
        spec = PromptSpec.of(
            prompt,
            messages=messages,
            answer=answer,
            system=system,
            chat=chat,
            truncation=truncation,
            max_length=max_length,
        )
        asked = self.read_prompt(spec)
        source = DataSpec(id_column=id_column, columns=columns).open(data, content=self.content(asked))
        if asked is not None:
            source.require(asked.fields, asked)
        request = Request(prompt_or_none=asked, truncation=spec.truncation, max_length=spec.max_length, cache=cache)
        folder = Path(out).expanduser() if out is not None else None
        job = self.prepare(source, request, like.provenance if like is not None else _previous(folder))
        if like is not None:
            _refuse_unlike(like.provenance, job.provenance)
        with progress("scoring", source.count()) as advance:
            return engine.run(source, job, out=folder, shard_rows=shard_rows, advance=advance, note=_LOG.warning)


def versions() -> dict[str, str]:
    """Versions of what computes a score."""
    found = {"sparsort": sparsort.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy"):
        with contextlib.suppress(ModuleNotFoundError):
            found[name] = version(name)
    return found


def _refuse_unlike(before: dict[str, Any], now: dict[str, Any]) -> None:
    # As JSON, the form in which the former have been kept.
    settings = {key: json.loads(json.dumps(value)) for key, value in now.items() if key != "environment"}
    differing = sorted(key for key, value in settings.items() if before.get(key) != value)
    if differing:
        shown = ", ".join(f"{key}: {before.get(key)!r} → {settings[key]!r}" for key in differing)
        raise SparsortError(f"these scores would not compare with those given: {shown}. Score both alike.")


def _previous(out: Path | None) -> dict[str, Any] | None:
    """Provenance of the run that a folder holds, if it can be read; the store reports what is wrong with one that cannot.

    Raises:
        SparsortError: the run is not finished, and its outlier rule depends on the order of the rows.
    """
    if out is None or not (out / MANIFEST).is_file():
        return None
    try:
        held = read_manifest(out)
    except SparsortError:
        return None
    if "shards" not in held:
        _refuse_sampling_by_position(held["provenance"], out)
    return dict(held["provenance"])


def _refuse_sampling_by_position(provenance: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run of an earlier version, whose outlier rules were fitted on rows at even distances.

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
