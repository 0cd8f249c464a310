"""The model's side of an ablation: it is asked, and says by which numbers demonstrations are ordered.

Contract: the model is loaded once. Difficulties are those of the demonstration as the task puts it, without any other in front.
What is read here depends on the rows given alone, so a unit that is run again gets the same orders.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.kernels.backend import device_name
from sparsort.scoring.answers.reader import FEATURES, AnswerReader
from sparsort.scoring.data.rows import SAMPLE_ROWS, digest_of, sample_by_digest
from sparsort.scoring.loading.load import LoadedModel
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.early_checks import check_model
from sparsort.scoring.prompts.prompt import Prompt, identify_tokenizer
from sparsort.scoring.scorers.losses import LossScorer
from sparsort.scoring.scorers.sentence_vectors import embed_rows
from sparsort.scoring.scorers.sparsity import SparsityScorer
from sparsort.values import put

# Raised when what is computed for a pair changes, so that older outcomes are not taken for it.
VERSION = 1

Rows = Sequence[Mapping[str, Any]]


class Engine:
    """A loaded model, and what an ablation asks of it.

    Args:
        ablation: names the model, and the sparsity that orders demonstrations.
        loaded: the model, where it is loaded already.
        compile: read answers with the compiled model (`scoring.model.fused`); outcomes differ by rounding alone.
    """

    def __init__(self, ablation: Ablation, loaded: LoadedModel | None = None, *, compile: bool = False) -> None:
        self._ablation, self._compile = ablation, compile
        if loaded is None:
            check_model(ablation.spec, sites=[ablation.site], outliers=[ablation.outliers])
        self.loaded = loaded or ablation.spec.load()
        self._budget = ablation.token_budget
        self._readers: dict[bool, AnswerReader] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What outcomes depend on besides the texts."""
        return self.identity_as({})

    def identity_as(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """What outcomes depend on besides the texts, in the form in which a store recorded it.

        A chat template is not part of it, because outcomes are found by the texts that it made.

        Args:
            recorded: the identity in the store, or an empty mapping.
        """
        tokenizer = identify_tokenizer(self.loaded.tokenizer, chat=False, recorded=recorded.get("tokenizer"))
        return {
            "weights": self.loaded.weights,
            "tokenizer": tokenizer,
            "dtype": str(self.loaded.dtype.value).removeprefix("torch."),
            "engine": VERSION,
        }

    @property
    def machine(self) -> str:
        """What the model runs on, by its maker's name, and how."""
        device = self.loaded.device.value
        threads = torch.get_num_threads()
        how = [f"{threads} thread{'' if threads == 1 else 's'}"] if device.type == "cpu" else []
        how += ["compiled"] if self._compile else []
        return device_name(device) + (f" ({', '.join(how)})" if how else "")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What stands in the features of an outcome."""
        return FEATURES

    def reader(self, task: Task) -> AnswerReader:
        """The reader of a task's prompts."""
        if task.chat not in self._readers:
            self._readers[task.chat] = AnswerReader(
                self.loaded, token_budget=self._budget, chat=task.chat, compile=self._compile
            )
        return self._readers[task.chat]

    def sparsity(self, task: Task, rows: Rows, pool: Rows) -> NDArray[np.float64]:
        """(N,) difficulty by sparsity; an outlier rule is fitted on a sample of `pool`, whatever the order of its rows."""
        options = self._prompt(task)
        like = None
        if self._ablation.outliers != "none":
            fields = Prompt.of(**options).fields
            sample = sample_by_digest(((digest_of(row, fields), row) for row in pool), SAMPLE_ROWS)
            like = self._sparsity_scorer.score([dict(row) for row in sample], **options)
        scores = self._sparsity_scorer.score([dict(row) for row in rows], like=like, **options)
        return np.asarray(scores.difficulty, dtype=np.float64)

    def loss(self, task: Task, rows: Rows) -> NDArray[np.float64]:
        """(N,) mean negative log-likelihood of each row's answer in nats a token."""
        shown = [dict(row) if task.is_generation else put(row, task.label, task.gold_text(row)) for row in rows]
        scores = self._loss_scorer.score(shown, answer=task.answer, **self._prompt(task))
        return np.asarray(scores.difficulty, dtype=np.float64)

    def embeddings(self, task: Task, rows: Rows) -> NDArray[np.float32]:
        """(N, D) mean final state of each row's question."""
        return embed_rows(self._backbone, [dict(row) for row in rows], Prompt.of(**self._prompt(task)))

    @functools.cached_property
    def _backbone(self) -> Backbone:
        # Not the reader's: with other batches, as a compiled one has, states differ by rounding and near ties fall otherwise.
        return Backbone(self.loaded, token_budget=self._budget)

    @functools.cached_property
    def _sparsity_scorer(self) -> SparsityScorer:
        a = self._ablation
        return SparsityScorer(
            self.loaded,
            site=a.site,
            pooling=a.pooling,
            metric=a.metric,
            outliers=a.outliers,
            token_budget=self._budget,
        )

    @functools.cached_property
    def _loss_scorer(self) -> LossScorer:
        return LossScorer(self.loaded, token_budget=self._budget)

    @staticmethod
    def _prompt(task: Task) -> dict[str, Any]:
        return {"prompt": task.prompt, "system": task.system, "chat": task.chat}
