"""A calibration applied: the score that was chosen, on the model and prompt that it was chosen for, turned as it was found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from sparsort.errors import SparsortError
from sparsort.scoring.base import Request
from sparsort.scoring.calibration import Calibration
from sparsort.scoring.prompts import Encoder, Prompt, Turns, identify_tokenizer
from sparsort.scoring.scorers.sparsity import ModelJob, SparsityScorer
from sparsort.scoring.scores import Scores
from sparsort.scoring.sources import RowSource

_LOG = logging.getLogger("sparsort")


class CalibratedScorer(SparsityScorer):
    """Ranks examples by a calibrated score: `difficulty` rises with what the model was found to find hard.

    Its scores are of the kind "calibrated": they go with the orders `easy_to_hard` and `hard_to_easy`, not with those by
    sparsity, because a calibration may find that the denser state is the harder one. The outlier rule is the fitted one.

    Args:
        calibration: a `Calibration`, or the path of its file.
        model: None for the calibrated one by its name; else one of the same weights. Other arguments: see `ModelScorer`.

    Raises:
        SparsortError: the model's weights or tokenizer are not those that were calibrated.
    """

    kind: ClassVar[str] = "calibrated"

    def __init__(self, calibration: Calibration | str | Path, model: Any = None, **model_options: Any) -> None:
        self.calibration = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
        made = self.definition = self.calibration.definition
        if model is None:
            model = made.model
            model_options = {**model_options, "revision": model_options.get("revision") or made.revision}
        super().__init__(
            model,
            site=made.candidate.site,
            pooling=made.candidate.pooling,
            metric=made.candidate.metric,
            outliers=made.candidate.outliers,
            l0_threshold=made.l0_threshold,
            **model_options,
        )
        tokenizer = identify_tokenizer(self.loaded.tokenizer, chat=made.prompt.is_chat, recorded=made.tokenizer)
        made.refuse_other_model(self.loaded.name, self.loaded.weights, tokenizer)
        if self.calibration.verdict != "carries difficulty":
            _LOG.warning(
                "the score of this calibration is not known to carry difficulty. %s", self.calibration.sentence()
            )

    def score(self, data: Any, prompt: str | Turns | Prompt | None = None, **options: Any) -> Scores:
        """Score every row of `data`; see `Scorer.score`. Without a prompt the calibrated one is used.

        Raises:
            SparsortError: another prompt or answer than the calibrated one.
        """
        column = self.definition.prompt.messages
        if prompt is None and column is not None and options.get("messages") in (None, column):
            return super().score(data, self.definition.prompt, **{**options, "messages": None})
        if prompt is None and options.get("messages") is None:
            made = self.definition
            options = {"answer": made.answer} | {name: value for name, value in options.items() if value is not None}
            prompt = [{"role": role, "content": text} for role, text in made.turns]
            if made.turns[0][0] == "text":
                prompt = made.turns[0][1]
            elif options.pop("system", None) is not None:
                raise SparsortError("the calibrated prompt has its own turns. Leave system (--system) away.")
        return super().score(data, prompt, **options)

    def _job(self, source: RowSource, request: Request, encoder: Encoder, previous: dict[str, Any] | None) -> ModelJob:
        made = self.definition
        made.refuse_other_prompt(request.prompt)
        fitted: dict[str, Any] = {"weights": made.weights, "site": self.site.name, "pooling": self.pooling}
        fitted |= {"outliers": dict(made.fit), "tokenizer": (previous or {}).get("tokenizer")}
        job = super()._job(source, request, encoder, fitted)
        # Only the metric that was calibrated has a known direction.
        job.provenance["orientation"] = {self.metric: made.orientation}
        job.provenance["calibration"] = made.digest
        job.provenance["environment"]["calibration"] = self.calibration.sentence()
        return job
