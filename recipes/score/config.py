"""The scorer that `sparsort score` and `sparsort order` run, with the options of each.

Contract: this module imports neither torch nor NumPy, because the command line reads the options of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsort.conditions import Conditions, Table, always, among, refuse_unread_fields
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRICS, MetricName
from sparsort.options import option, parameters_of
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.scorers import SCORERS, ScorerName

if TYPE_CHECKING:
    from sparsort.scoring.calibration.calibration import Calibration
    from sparsort.scoring.prompts.spec import PromptSpec
    from sparsort.scoring.scorers.base import Scorer

SCORER_PANEL = "Scorer"


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The name of a scorer, with the options of every scorer.

    `calibration` is a file of `sparsort calibrate`, which decides the model, site, pooling, metric, outlier rule and direction;
    see `calibrated`.

    Raises:
        SparsortError: an unknown scorer, or an option that differs from its default and that the scorer does not read
            (`READ_BY`).
    """

    scorer: ScorerName = option("sparsity", f"{SCORERS.listed()}.", panel=SCORER_PANEL)
    site: str = option("pre_norm", "pre_norm, post_norm, mlp, mlp:N or layer:N.", panel=SCORER_PANEL)
    pooling: str = option("last", "last, mean_metric, mean_state or answer.", panel=SCORER_PANEL)
    metric: MetricName = option(
        "gini", f"The metric that gives the difficulty: {METRICS.listed()}.", panel=SCORER_PANEL
    )
    outliers: str = option("none", "none, drop:n or rms.", panel=SCORER_PANEL)
    calibration: str | Path | None = option(
        None,
        "File made by 'sparsort calibrate', which decides the score.",
        panel=SCORER_PANEL,
        kind=Path | None,
    )
    l0_threshold: float = option(1.0, "Threshold of l0_absolute.", panel=SCORER_PANEL)
    column: str | None = option(None, "Numeric column for the scorer 'column'.", panel=SCORER_PANEL)
    descending: bool = option(False, "The column falls as the difficulty rises.", panel=SCORER_PANEL)
    seed: int = option(0, "Seed of the scorer 'random'.", panel=SCORER_PANEL)
    unit: Literal["tokens", "characters"] = "tokens"
    model: ModelSpec = ModelSpec()

    def __post_init__(self) -> None:
        SCORERS.check(self.scorer)
        if self.scorer in SCORERS.needing("column") and self.column is None:
            raise SparsortError(
                f"the scorer {self.scorer!r} needs the name of a numeric column. Pass column='NAME' (--column NAME)."
            )
        refuse_unread_fields(self, READ_BY)

    @property
    def kind(self) -> str:
        """The kind of the scores, which will be `Scores.kind`."""
        return self.scorer if self.calibration is None else "calibrated"

    @cached_property
    def loaded_calibration(self) -> Calibration | None:
        """The calibration, read from its file; None without one."""
        if self.calibration is None:
            return None
        # This module imports torch and SciPy, which a scorer without a model does not need.
        from sparsort.scoring.calibration.calibration import Calibration

        return Calibration.load(self.calibration)

    def calibrated(self) -> ScorerConfig:
        """This configuration with the options that the calibration decides; without a calibration, the same configuration.

        The model is the calibrated one, unless a model other than the default was given. `load` refuses a model whose weights
        differ from the calibrated ones.

        Raises:
            SparsortError: an option was given that the calibration decides differently.
        """
        if self.loaded_calibration is None:
            return self
        definition = self.loaded_calibration.definition
        decided = {**vars(definition.candidate), "l0_threshold": definition.l0_threshold}
        for name, value in decided.items():
            given, default = getattr(self, name), ScorerConfig.__dataclass_fields__[name].default
            if given not in (default, value):
                raise SparsortError(
                    f"{name} is {given!r}, but the calibration {self.calibration} chose {value!r}. "
                    f"Omit {name}, or calibrate {given!r} alone."
                )
        model = self.model
        if model.name == ModelSpec().name:
            model = replace(model, name=definition.model, revision=model.revision or definition.revision)
        return replace(self, **decided, model=model)

    def check_names(self) -> None:
        """Refuse misspelt names before a model is loaded.

        Raises:
            SparsortError: an unknown metric, site, pooling, outlier rule or dtype.
        """
        METRICS.check(self.metric)
        # Other scorers do not read these options (`READ_BY`), and need no torch.
        if self.runs_model:
            self._check_model_options()

    def check_model(self, *, max_length: int | None = None, chat: bool = False) -> Any:
        """Refuse what the model does not support, before its weights are read.

        Args:
            max_length: a limit in tokens.
            chat: whether the chat template will be used.

        Returns:
            The model's tokenizer, to be passed to `load`, if it was needed for the check; otherwise None.

        Raises:
            SparsortError: the model has no such site, dimensions, context or chat template.
        """
        from sparsort.scoring.model.early_checks import check_model
        from sparsort.scoring.prompts.chat_templates import need_chat_template

        if not self.runs_model:
            return None
        check_model(self.model, sites=[self.site], outliers=[self.outliers], max_length=max_length)
        if not chat:
            return None
        tokenizer = self.model.load_tokenizer()
        need_chat_template(tokenizer)
        return tokenizer

    def check(self, prompt: PromptSpec, shard_rows: int = 1) -> None:
        """Refuse wrong options before a model is loaded.

        Args:
            prompt: the prompt that will be scored.
            shard_rows: rows of one shard.

        Raises:
            SparsortError: an unknown name, a number out of range, or a missing answer.
        """
        from sparsort.scoring.prompts.prompt import check_truncation

        text = prompt.read()
        # Whether the prompt of a function is chat depends on the rows, which are not read yet.
        if self.loaded_calibration is not None and text is not None and text.function is None:
            self.loaded_calibration.definition.refuse_other_prompt(text)
        self.check_names()
        check_truncation(prompt.truncation)
        numbers = {"shard_rows": shard_rows, "max_length": prompt.max_length}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise SparsortError(f"{name} is {number}; it must be at least 1.")
        if self.needs_answer and prompt.answer is None and (text is None or text.answer is None):
            raise SparsortError(
                "this score reads the answer's tokens. Pass answer='…' (--answer), for example ' {answer}'."
            )

    def _check_model_options(self) -> None:
        from sparsort.scoring.model.sites import check_site
        from sparsort.scoring.scorers.pooling import check_outlier_rule, check_pooling

        check_site(self.site)
        check_pooling(self.pooling)
        check_outlier_rule(self.outliers)
        self.model.check()

    @property
    def reads_text(self) -> bool:
        """Whether the scorer reads texts, and needs a prompt."""
        return self.scorer in SCORERS.needing("text")

    @property
    def needs_answer(self) -> bool:
        """Whether the scorer reads the tokens of an answer."""
        return self.scorer in SCORERS.needing("answer") or self.pooling == "answer"

    @property
    def draws(self) -> bool:
        """Whether a seed changes the scores."""
        return self.scorer in SCORERS.reading("seed")

    @property
    def runs_model(self) -> bool:
        """Whether scoring runs a forward pass."""
        return SCORERS[self.scorer].runs_model

    def load(self, loaded: Any = None, *, tokenizer: Any = None) -> Scorer:
        """Build the scorer.

        Args:
            loaded: a model in memory; None to load the configured model.
            tokenizer: the tokenizer of the model to load, if it was loaded before.
        """
        entry = SCORERS[self.scorer]
        settings = {name: getattr(self, name) for name in _ARGUMENTS if name in entry.reads}
        model = self.model if loaded is None else replace(self.model, name=loaded)
        if loaded is None and tokenizer is not None:
            model = replace(model, tokenizer=tokenizer)
        if self.loaded_calibration is not None:
            from sparsort.scoring.calibration.calibration import CalibratedScorer

            return CalibratedScorer(self.loaded_calibration, model)
        if entry.runs_model:
            settings["model"] = model
        elif "model" in entry.reads:
            # This scorer reads only the tokenizer of the model.
            settings |= {"model": model.name, "revision": model.revision, "trust_remote_code": model.trust_remote_code}
        return entry.build(settings)


_ARGUMENTS = tuple(field.name for field in fields(ScorerConfig) if field.name not in ("scorer", "calibration", "model"))


def read_by_scorers(*settings: str) -> dict[str, Conditions]:
    """The conditions of settings that only some scorers read; see `sparsort.conditions`."""
    return {name: (among("scorer", SCORERS.reading(name), of=SCORERS),) for name in settings}


# The scorers that read each option of `ScorerConfig`.
READ_BY: Table = {**always("scorer"), **read_by_scorers("calibration", *_ARGUMENTS, *parameters_of(ModelSpec))}
# The part of the table that commands have options for: a field without `option` can be set only in Python.
OPTIONS_READ_BY: dict[str, Conditions] = {name: READ_BY[name] for name in parameters_of(ScorerConfig)}
