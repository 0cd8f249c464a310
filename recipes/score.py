"""Score a file: the recipe behind `sparsort score`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsort.conditions import Conditions, Table, always, among, refuse_unread_fields
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.scoring.scorers import SCORERS
from sparsort.scoring.sources import RowSource, open_rows

if TYPE_CHECKING:
    from sparsort.scoring.base import Scorer
    from sparsort.scoring.calibration import Calibration
    from sparsort.scoring.prompts import Prompt, Turns
    from sparsort.scoring.scores import Scores


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Which scorer, with the options of each.

    `calibration` is the file of one, which says model, site, pooling, metric, outlier rule and direction; see `calibrated`.

    Raises:
        SparsortError: an unknown scorer, or an option that differs from its default and that the scorer does not read
            (`READ_BY`).
    """

    scorer: str = "sparsity"
    calibration: str | Path | None = None
    model: str = "demo"
    site: str = "pre_norm"
    pooling: str = "last"
    metric: str = "gini"
    outliers: str = "none"
    l0_threshold: float = 1.0
    column: str | None = None
    descending: bool = False
    seed: int = 0
    unit: Literal["tokens", "characters"] = "tokens"
    dtype: str = "auto"
    device: str = "auto"
    token_budget: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        SCORERS.check(self.scorer)
        if self.scorer in SCORERS.needing("column") and self.column is None:
            raise SparsortError(
                f"the scorer {self.scorer!r} needs the name of a numeric column. Pass column='NAME' (--column NAME)."
            )
        refuse_unread_fields(self, READ_BY)

    @property
    def kind(self) -> str:
        """What the scores are of, as `Scores.kind` will have it."""
        return self.scorer if self.calibration is None else "calibrated"

    @cached_property
    def found(self) -> Calibration | None:
        """The calibration, read from its file; None without one."""
        if self.calibration is None:
            return None
        # It imports torch and SciPy, which a score without a model does without.
        from sparsort.scoring.calibration import Calibration

        return Calibration.load(self.calibration)

    def calibrated(self) -> ScorerConfig:
        """This configuration with the options that the calibration decides; the same without one.

        The model is the calibrated one unless another than the default was asked for, which `load` refuses if its weights are
        others.

        Raises:
            SparsortError: an option was given that the calibration decides otherwise.
        """
        if self.found is None:
            return self
        made = self.found.definition
        decided = {**vars(made.candidate), "l0_threshold": made.l0_threshold}
        for name, value in decided.items():
            given, default = getattr(self, name), ScorerConfig.__dataclass_fields__[name].default
            if given not in (default, value):
                raise SparsortError(
                    f"{name} is {given!r}, but the calibration {self.calibration} is of {value!r}. "
                    "Leave it out, or calibrate that one alone."
                )
        ours = self.model == ScorerConfig.model
        model, revision = (made.model, self.revision or made.revision) if ours else (self.model, self.revision)
        return replace(self, **decided, model=model, revision=revision)

    def check_names(self) -> None:
        """Find misspelt names before a model is loaded for them.

        Raises:
            SparsortError: an unknown metric, site, pooling, outlier rule or dtype.
        """
        METRICS.check(self.metric)
        # Other scorers read none of these options (`READ_BY`), and need no torch.
        if self.runs_model:
            self._check_model_options()

    def check_model(self, *, max_length: int | None = None, chat: bool = False) -> Any:
        """Find what the model does not have before its weights are read.

        Args:
            max_length: a limit in tokens.
            chat: whether its chat template will be used.

        Returns:
            The model's tokenizer, to be passed to `load`, if this had to load it; else None.

        Raises:
            SparsortError: the model has no such site, dimensions, context or chat template.
        """
        from sparsort.scoring.chat_templates import need_chat_template
        from sparsort.scoring.early_checks import check_model
        from sparsort.scoring.embedded import load_tokenizer

        if not self.runs_model:
            return None
        named: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        check_model(self.model, sites=[self.site], outliers=[self.outliers], max_length=max_length, **named)
        if not chat:
            return None
        tokenizer = load_tokenizer(self.model, **named)
        need_chat_template(tokenizer)
        return tokenizer

    def check(self, text: TextConfig, shard_rows: int = 1) -> None:
        """Find what is wrong with the options before a model is loaded for them.

        Raises:
            SparsortError: an unknown name, a number out of range, an answer that is needed and not given.
        """
        from sparsort.scoring.prompts import check_truncation

        asked = text.read()
        if self.found is not None and asked is not None:
            self.found.definition.refuse_other_prompt(asked)
        self.check_names()
        check_truncation(text.truncation)
        numbers = {"shard_rows": shard_rows, "token_budget": self.token_budget, "max_length": text.max_length}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise SparsortError(f"{name} is {number}; it must be at least 1.")
        if self.needs_answer and text.answer is None and (asked is None or asked.answer is None):
            raise SparsortError(
                "this score reads the answer's tokens. Pass answer='…' (--answer), for example ' {answer}'."
            )

    def _check_model_options(self) -> None:
        from sparsort.scoring.loading import check_dtype
        from sparsort.scoring.pooling import check_outlier_rule, check_pooling
        from sparsort.scoring.sites import check_site

        check_site(self.site)
        check_pooling(self.pooling)
        check_outlier_rule(self.outliers)
        check_dtype(self.dtype)

    @property
    def reads_text(self) -> bool:
        """Whether the score is one of a text, and needs a prompt."""
        return self.scorer in SCORERS.needing("text")

    @property
    def needs_answer(self) -> bool:
        """Whether the score is one of an answer's tokens."""
        return self.scorer in SCORERS.needing("answer") or self.pooling == "answer"

    @property
    def runs_model(self) -> bool:
        """Whether scoring runs a forward pass."""
        return SCORERS[self.scorer].runs_model

    def load(self, loaded: Any = None, *, tokenizer: Any = None) -> Scorer:
        """Build the scorer; `loaded` is a model in memory, `tokenizer` that of a model to be loaded, if there is one already."""
        entry = SCORERS[self.scorer]
        settings = {name: getattr(self, name) for name in _ARGUMENTS if name in entry.reads}
        if entry.runs_model and loaded is None:
            settings["tokenizer"] = tokenizer
        elif entry.runs_model:
            settings = {name: value for name, value in settings.items() if name not in _LOADING} | {"model": loaded}
        if self.found is None:
            return entry.build(settings)
        from sparsort.scoring.calibrated import CalibratedScorer

        decided = vars(self.found.definition.candidate).keys() | {"l0_threshold"}
        return CalibratedScorer(self.found, **{name: settings[name] for name in settings if name not in decided})


_ARGUMENTS = tuple(one.name for one in fields(ScorerConfig) if one.name not in ("scorer", "calibration"))
# What loads a model, and does not change one that is in memory.
_LOADING = ("dtype", "device", "revision", "trust_remote_code")


def read_by_scorers(*settings: str) -> dict[str, Conditions]:
    """The conditions of settings that only some scorers read; see `sparsort.conditions`."""
    return {name: (among("scorer", SCORERS.reading(name), of=SCORERS),) for name in settings}


# The scorers that read an option of `ScorerConfig`.
READ_BY: Table = {**always("scorer"), **read_by_scorers("calibration", *_ARGUMENTS)}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a row becomes text; `prompt` is a format string, chat turns or a `Prompt`, `messages` a column of conversations."""

    prompt: str | Turns | Prompt | None = None
    messages: str | None = None
    answer: str | None = None
    system: str | None = None
    chat: bool = False
    truncation: Any = "error"
    max_length: int | None = None
    id_column: str | None = None
    columns: Sequence[str] | None = None

    def read(self) -> Prompt | None:
        """The prompt, if one was given."""
        from sparsort.scoring.prompts import Prompt

        return Prompt.given(self.prompt, messages=self.messages, answer=self.answer, system=self.system, chat=self.chat)

    def calibrated(self, found: Calibration | None) -> TextConfig:
        """This text with the prompt of a calibration, where none was given."""
        if found is None or self.prompt is not None:
            return self
        made = found.definition
        if (column := made.prompt.messages) is not None and self.messages in (None, column):
            return replace(self, prompt=made.prompt, messages=None)
        if self.messages is not None:
            return self
        if made.turns[0][0] == "text":
            return replace(self, prompt=made.turns[0][1], answer=self.answer or made.answer)
        turns = [{"role": role, "content": text} for role, text in made.turns]
        return replace(self, prompt=turns, answer=self.answer or made.answer)

    def options(self) -> dict[str, Any]:
        """The arguments of `Scorer.score`."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """What became of a file.

    Attributes:
        scores: one row a row of the file.
        seconds: the time of the whole call: checks, loading and scoring.
        loading_seconds: the part before scoring: libraries, the checks of the file, the model.
        scoring_seconds: the rest, in which rows were read and scored.
        resumed: whether rows may have been scored by an earlier call.
        out: the score folder.
        source: the rows of the file.
        prompt: how a row becomes text; None where the scorer reads no text.
        counts: rows by status.
    """

    scores: Scores
    seconds: float
    loading_seconds: float
    scoring_seconds: float
    resumed: bool
    out: str | None
    source: RowSource
    prompt: Prompt | None
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The report as JSON values; tokens are those of the rows that were scored."""
        difficulty = self.scores.difficulty
        known = difficulty[np.isfinite(difficulty)]
        quantiles = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(known) else None
        tokens = self.scores.column("n_tokens")
        return {
            "out": self.out,
            "rows": len(self.scores),
            "status": self.counts,
            "difficulty_quantiles": quantiles,
            "tokens": int(tokens[np.isfinite(difficulty)].sum()),
            "truncated_rows": int((self.scores.column("n_truncated") > 0).sum()),
            "seconds": round(self.seconds, 3),
            "loading_seconds": round(self.loading_seconds, 3),
            "scoring_seconds": round(self.scoring_seconds, 3),
            "provenance": self.scores.provenance,
        }


def score_file(
    file: str | Path,
    *,
    scorer: ScorerConfig,
    text: TextConfig,
    out: str | Path | None = None,
    shard_rows: int = 2048,
) -> ScoreReport:
    """Score every row of `file`; see `Scorer.score`."""
    from sparsort.scoring.shards import MANIFEST

    start = time.perf_counter()
    scorer, text = scorer.calibrated(), text.calibrated(scorer.found)
    scorer.check(text, shard_rows)
    # What is wrong with the data or the prompt should not cost the loading of a model.
    prompt = text.read()
    content = [scorer.column] if scorer.column is not None else prompt.fields if prompt is not None else None
    source = open_rows(file, id_column=text.id_column, content=content, columns=text.columns)
    if prompt is not None:
        source.require(prompt.fields, prompt)
    elif scorer.reads_text:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces, or messages='…' (--messages) "
            f"with a column of conversations; this data has: {', '.join(source.columns())}."
        )
    resumed = out is not None and (Path(out).expanduser() / MANIFEST).exists()
    tokenizer = scorer.check_model(max_length=text.max_length, chat=prompt is not None and prompt.is_chat)
    loaded = scorer.load(tokenizer=tokenizer)
    scoring = time.perf_counter()
    scores = loaded.score(source, out=out, shard_rows=shard_rows, **text.options())
    end = time.perf_counter()
    return ScoreReport(
        scores=scores,
        seconds=end - start,
        loading_seconds=scoring - start,
        scoring_seconds=end - scoring,
        resumed=resumed,
        out=str(out) if out is not None else None,
        source=source,
        prompt=prompt,
        counts=scores.counts("status"),
    )
