"""Label scores of rows after a set of demonstrations, read by one model under several orders.

Contract: `LabelReader.scores` returns the model's log-probabilities of every label, in nats, exactly as a pass over each whole
prompt would, to rounding. Demonstrations that several queries share are read once. The last model is kept in memory, because
cross-validation fits the same model many times.

Shapes: O orders, Q queries, L labels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.criteria.distributions import Floats
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.model.spec import ModelSpec
from sparsort.terminal.progress import progress

Row = Mapping[str, Any]

_LOCK = threading.Lock()
_LAST: dict[tuple[ModelSpec, bool], AnswerReader] = {}


class LabelReader:
    """Reads label scores with one model.

    Args:
        task: the prompt, and the words of each label.
        model: the model.

    Raises:
        SparsortError: the model cannot be loaded, or the task needs a chat template that it lacks.
    """

    def __init__(self, task: Task, model: ModelSpec) -> None:
        self.task = task
        self._reader = answer_reader(model, chat=task.chat)
        self._texts = Texts(task, self._reader.loaded.tokenizer)

    @property
    def model_name(self) -> str:
        """The name of the model."""
        return self._reader.loaded.name

    def scores(
        self, orders: Sequence[Sequence[Row]], queries: Sequence[str], *, title: str
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Log-probabilities of every label for every query under every order, (O, Q, L), and the tokens read, (O,).

        Args:
            orders: the demonstrations in each order, first to last.
            queries: texts of `Task.query_text`.
            title: what the progress bar calls the work.

        Raises:
            SparsortError: a prompt is longer than the model's context.
        """
        scores, tokens = [], []
        with progress(title, len(orders) * len(queries)) as advance:
            for demos in orders:
                texts = [self._texts.query(demos, query) for query in queries]
                answers = self._reader.answers(self._texts.prefix(demos), texts, self._texts.answers)
                tokens.append(answers.tokens_read)
                scores.append(answers.log_p)
                advance(len(queries))
        return np.stack(scores), np.array(tokens, dtype=np.int64)


def answer_reader(model: ModelSpec, *, chat: bool) -> AnswerReader:
    """The reader of this model: the one of the last call if that had the same model, otherwise a new one."""
    key = (model, chat)
    with _LOCK:
        reader = _LAST.get(key) if model.is_named else None
        if reader is None:
            loaded = model.load()
            # The previous model is dropped first, so that two are never in memory.
            _LAST.clear()
            reader = AnswerReader(loaded, chat=chat, token_budget=model.token_budget)
            if model.is_named and model.tokenizer is None:
                _LAST[key] = reader
        return reader
