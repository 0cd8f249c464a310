"""The model of an ablation, and the numbers by which demonstrations are selected and ordered.

Contract: the model is loaded once, and each number is computed when it is first read. A demonstration's difficulty is measured on
its own text, without other demonstrations before it. All rows of a number are computed together, so their batches, and with them
the rounding, depend on these rows alone: a set that is run again gets the same orders, bit for bit. Selection and ordering
themselves are those of `curriculum.demos`.

Shapes: N rows (of a list or of the pool), Q test queries, U distinct rows of a set, k demonstrations, D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import SPARSITY, Ablation, by_similarity, kind_of
from sparsort.curriculum.ablation.recipe.task_data import SetDemos, TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.demos.demonstrator import Demonstrator
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.pool.similarity import cosine, unit_rows
from sparsort.kernels.backend import device_name
from sparsort.scoring.answers.reader import FEATURES, AnswerReader
from sparsort.scoring.data.digests import SAMPLE_ROWS, digest_of, sample_by_digest
from sparsort.scoring.loading.load import LoadedModel
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.early_checks import check_model
from sparsort.scoring.prompts.prompt import Prompt, identify_tokenizer
from sparsort.scoring.scorers.losses import LossScorer
from sparsort.scoring.scorers.sentence_vectors import embed_rows
from sparsort.scoring.scorers.sparsity import SparsityScorer
from sparsort.values import put

# Increase this when the outcome of a pair changes, so that stores of earlier versions are refused.
VERSION = 1

Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]


class Engine:
    """The loaded model of an ablation.

    Args:
        ablation: names the model, and the sparsity by which demonstrations are ordered.
        loaded: the model, if it is already loaded.
        compile: read answers with the compiled model (`scoring.model.fused`). Outcomes differ by rounding only.
    """

    # The names of the features of an outcome.
    feature_names: tuple[str, ...] = FEATURES

    def __init__(self, ablation: Ablation, loaded: LoadedModel | None = None, *, compile: bool = False) -> None:
        self._ablation, self._compile = ablation, compile
        # The configuration is checked first, because loading the weights takes long.
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
        """What outcomes depend on besides the texts, in the form that a store recorded.

        The chat template is not included, because outcomes are found by the texts that it rendered.

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
        """The name of the device, with the number of threads on a CPU, and whether the model is compiled."""
        device = self.loaded.device.value
        threads = torch.get_num_threads()
        details = [f"{threads} thread{'' if threads == 1 else 's'}"] if device.type == "cpu" else []
        details += ["compiled"] if self._compile else []
        return device_name(device) + (f" ({', '.join(details)})" if details else "")

    def reader(self, task: Task) -> AnswerReader:
        """The reader of a task's prompts."""
        if task.chat not in self._readers:
            self._readers[task.chat] = AnswerReader(
                self.loaded, token_budget=self._budget, chat=task.chat, compile=self._compile
            )
        return self._readers[task.chat]

    def sparsity(self, task: Task, rows: Rows, pool: Rows) -> Floats:
        """(N,) difficulty by sparsity. An outlier rule is fitted on a sample of `pool`, which is independent of its order."""
        options = self._prompt(task)
        like = None
        # Rows of a single set are too few for an outlier rule, so it is fitted on the pool and then applied to
        # them.
        if self._ablation.outliers != "none":
            fields = Prompt.of(**options).fields
            sample = sample_by_digest(((digest_of(row, fields), row) for row in pool), SAMPLE_ROWS)
            like = self._sparsity_scorer.score([dict(row) for row in sample], **options)
        scores = self._sparsity_scorer.score([dict(row) for row in rows], like=like, **options)
        return np.asarray(scores.difficulty, dtype=np.float64)

    def loss(self, task: Task, rows: Rows) -> Floats:
        """(N,) mean negative log-likelihood per token of each row's answer, in nats."""
        # The model reads the label's words, as in a demonstration, and not its value in the data.
        worded = [dict(row) if task.is_generation else put(row, task.label, task.gold_text(row)) for row in rows]
        scores = self._loss_scorer.score(worded, answer=task.answer, **self._prompt(task))
        return np.asarray(scores.difficulty, dtype=np.float64)

    def embeddings(self, task: Task, rows: Rows) -> NDArray[np.float32]:
        """(N, D) mean final state of each row's question."""
        return embed_rows(self._backbone, [dict(row) for row in rows], Prompt.of(**self._prompt(task)))

    @functools.cached_property
    def _backbone(self) -> Backbone:
        # Not the reader's backbone: a compiled one has other batches, whose rounding would change the order of near ties.
        return Backbone(self.loaded, token_budget=self._budget)

    @functools.cached_property
    def _sparsity_scorer(self) -> SparsityScorer:
        settings = {name: getattr(self._ablation, name) for name in ("site", "pooling", "metric", "outliers")}
        return SparsityScorer(self.loaded, token_budget=self._budget, **settings)

    @functools.cached_property
    def _loss_scorer(self) -> LossScorer:
        return LossScorer(self.loaded, token_budget=self._budget)

    @staticmethod
    def _prompt(task: Task) -> dict[str, Any]:
        return {"prompt": task.prompt, "system": task.system, "chat": task.chat}


class PoolNumbers:
    """Embeddings and sparsity of a task's pool and test rows, for selectors."""

    def __init__(self, data: TaskData, engine: Engine) -> None:
        self.data, self.engine = data, engine

    @functools.cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """(N, D) of the pool."""
        return self.engine.embeddings(self.data.task, self.data.splits.pool)

    @functools.cached_property
    def query_embeddings(self) -> NDArray[np.float32]:
        """(Q, D)."""
        return self.engine.embeddings(self.data.task, self.data.splits.test)

    @functools.cached_property
    def difficulty(self) -> Floats:
        """(N,) of the pool."""
        pool = self.data.splits.pool
        return self.engine.sparsity(self.data.task, pool, pool)

    @functools.cached_property
    def query_difficulty(self) -> Floats:
        """(Q,)."""
        return self.engine.sparsity(self.data.task, self.data.splits.test, self.data.splits.pool)

    def known(self, pool: DemoPool, positions: NDArray[np.int64]) -> list[Known]:
        """What is known about part of the pool and each of the Q test queries.

        Args:
            pool: the part, created once for all queries.
            positions: the positions of its rows in the task's pool.
        """
        # All queries share these columns, so a value that depends on the pool alone is computed once.
        difficulty = RowNumbers(len(pool), lambda at: self.difficulty[positions[at]])
        embeddings = RowNumbers(len(pool), lambda at: self.embeddings[positions[at]])
        return [
            Known(
                pool,
                question,
                difficulty=difficulty,
                embeddings=embeddings,
                query_difficulty=functools.partial(self._query_difficulty_of, query),
                query_embedding=functools.partial(self._query_embedding_of, query),
            )
            for query, question in enumerate(self.data.questions)
        ]

    # Methods, so that the numbers are computed only if a selector reads them.
    def _query_difficulty_of(self, query: int) -> float:
        return float(self.query_difficulty[query])

    def _query_embedding_of(self, query: int) -> NDArray[np.float32]:
        embedding: NDArray[np.float32] = self.query_embeddings[query]
        return embedding


class SetNumbers:
    """Difficulty, similarity and length of the demonstrations of one set, for orderers.

    Args:
        set_demos: the demonstrations.
        pool: the numbers of the set's task.
    """

    def __init__(self, set_demos: SetDemos, pool: PoolNumbers) -> None:
        self._set_demos, self._pool = set_demos, pool
        self._task, self._engine = pool.data.task, pool.engine
        self._rows = DemoPool(set_demos.rows)
        self._lengths = RowNumbers.of([len(self._task.demo_text(row)) for row in set_demos.rows])

    def order(self, orderer: str, seed: int) -> NDArray[np.int64]:
        """(1, k), or (Q, k) if the order depends on the query: the permutation of each query's demonstrations.

        Args:
            orderer: an entry of `ORDERS`, or "reverse:NAME".
            seed: the seed of every draw.
        """
        demonstrator, fixed = Demonstrator(order=orderer, seed=seed), self._set_demos.fixed
        n_queries = len(self._pool.data.test_texts) if by_similarity(orderer) or not fixed else 1
        orders = []
        for query in range(n_queries):
            positions = self._set_demos.of_query[0 if fixed else query].tolist()
            orders.append(demonstrator.arrange(self._known(orderer, query), positions))
        return np.array(orders)

    def _known(self, orderer: str, query: int) -> Known:
        kind = kind_of(orderer)
        difficulty = None if kind is None else RowNumbers.of(self._sparsity if kind == SPARSITY else self._loss)
        similarity = self._similarity[query] if by_similarity(orderer) else None
        return Known(self._rows, difficulty=difficulty, kind=kind, similarity=similarity, lengths=self._lengths)

    @functools.cached_property
    def _sparsity(self) -> Floats:
        return self._engine.sparsity(self._task, self._set_demos.rows, self._pool.data.splits.pool)

    @functools.cached_property
    def _loss(self) -> Floats:
        return self._engine.loss(self._task, self._set_demos.rows)

    @functools.cached_property
    def _similarity(self) -> Floats:
        """(Q, U) cosine between every test query and every row of the set."""
        embeddings: Any = self._engine.embeddings(self._task, self._set_demos.rows)
        normalised_UD = unit_rows(embeddings)
        return np.array([cosine(query_D, normalised_UD) for query_D in self._pool.query_embeddings], dtype=np.float64)
