"""A calibration applied: the score that was chosen, on the model and prompt that it was chosen for, turned as it was found."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

from sparsort.scoring.calibration.calibration import Calibration
from sparsort.scoring.data.rows import RowSource
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.prompt import Encoder, Prompt, identify_tokenizer
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.scorers.base import Request
from sparsort.scoring.scorers.sparsity import ModelJob, SparsityScorer

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

    def __init__(
        self, calibration: Calibration | str | Path, model: Any = None, **options: Unpack[ModelOptions]
    ) -> None:
        self.calibration = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
        made = self.definition = self.calibration.definition
        spec = ModelSpec.of(made.model if model is None else model, **options)
        if model is None:
            spec = replace(spec, revision=spec.revision or made.revision)
        super().__init__(
            spec,
            site=made.candidate.site,
            pooling=made.candidate.pooling,
            metric=made.candidate.metric,
            outliers=made.candidate.outliers,
            l0_threshold=made.l0_threshold,
        )
        tokenizer = identify_tokenizer(self.loaded.tokenizer, chat=made.prompt.is_chat, recorded=made.tokenizer)
        made.refuse_other_model(self.loaded.name, self.loaded.weights, tokenizer)
        if self.calibration.verdict != "carries difficulty":
            _LOG.warning(
                "the score of this calibration is not known to carry difficulty. %s", self.calibration.sentence()
            )

    def read_prompt(self, spec: PromptSpec) -> Prompt | None:
        """The prompt that a caller described; without one, the calibrated prompt.

        Raises:
            SparsortError: a system turn was given for the calibrated prompt.
        """
        return self.definition.complete(spec).read()

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
