"""Train a causal language model on a file of rows under a curriculum. The recipe for `sparsort train`.

Contract: one folder contains everything: `run.json` with the settings, `plan/`, `tokens/`, `checkpoints/`, `history.jsonl` and,
at the end, `model/` and `result.json`. A run may be killed at any time. Called again with the same arguments, it resumes from the
newest intact checkpoint, and on the same machine its losses are those of a run that was not stopped. On a finished folder, the
same arguments give the result again. Other arguments are refused with the differences. Under torchrun or `accelerate launch`,
every process calls it.

Trainer seeds the global generators of torch, NumPy and `random`. They are restored when `train` returns, and so is the
verbosity of transformers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from sparsort.errors import SparsortError
from sparsort.extras import need
from sparsort.recipes.train.config import TrainConfig, TrainOptions, make_config
from sparsort.recipes.train.recipe import read_recipe
from sparsort.recipes.train.run import TrainingRun
from sparsort.storage import integrity

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.recipes.train.text import TrainText
    from sparsort.scoring.data.rows import RowSource


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        loss: loss on the tokens of the last step, including a selector's loss; None if it is not finite.
        eval_loss: mean loss over the tokens of the held-out rows at the end; None without held-out rows.
        steps: optimiser steps of the whole run.
        rows, eval_rows: numbers of rows trained on and held out.
        tokens: tokens of the rows trained on, each row counted once.
        parameters: number of parameters of the model.
        out: the folder.
        model: the folder of the model and its tokenizer, for `from_pretrained`.
        history: file of JSON lines: step, loss, learning rate, and the state of the curriculum.
        plan: the fingerprint of the plan.
        sparse: the measures of sparse attention (see `sparse.summary`); None for dense attention.
        notes: remarks about the data and the run, one sentence each.
        resumed: the step from which this call resumed: 0 for a run from the start, `steps` for a run that was finished before.
        seconds: the time of this call.
    """

    loss: float | None
    eval_loss: float | None
    steps: int
    rows: int
    eval_rows: int
    tokens: int
    parameters: int
    out: str
    model: str
    history: str
    plan: str
    sparse: dict[str, float | None] | None = None
    notes: list[str] = field(default_factory=list)
    resumed: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def train(
    data: Any,
    text: str | None = None,
    *,
    messages: str | None = None,
    out: str | Path,
    plan: str | Path | CurriculumPlan | None = None,
    scores: Any = None,
    curriculum: Mapping[str, Any] | None = None,
    groups: str | None = None,
    eval_data: Any = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    fingerprint: str | None = None,
    verify: bool = True,
    config: TrainConfig | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    **changes: Unpack[TrainOptions],
) -> TrainResult:
    """Train a language model on the rows of `data`, in the order of a plan.

    Args:
        data: the rows, as `open_rows` takes them: a path, a list of dicts, a `datasets.Dataset`.
        text: format string over the columns. An end-of-text token follows each text. A row with an empty text is an error.
        messages: instead of `text`, the column of whole conversations (see `prompts.conversations`), which the model's chat
            template turns into texts. All their tokens are trained on.
        out: the folder to work in; a second call resumes the first.
        plan: a plan for exactly these rows, in this order. All ids and contents are compared with those that it was made for.
        scores: instead of a plan, `Scores` or their path, several of these by name, or (N,) difficulties. They are matched to the
            rows by id or content. Not needed if the curriculum does not depend on them.
        curriculum: with scores, the settings of `CurriculumSettings`. By default, `batch_size` is per_device_batch × accumulate ×
            processes, and a pool has as many steps as the run.
        groups: with scores, the column that names the group of each row.
        eval_data: held-out rows with the same columns.
        id_column: the column that identifies a row.
        columns: names of the columns of `data` and `eval_data`, if these are CSV or TSV files without a header.
        fingerprint: with a plan, the caller's name for the data. If the plan was made with a name too, the names are compared
            instead of the rows.
        verify: whether to compare the rows with the plan; if False, any data with as many rows is accepted.
        config: how to train; `changes` are fields that differ from it.
        recipe: "sparse" or another name in `RECIPES`, a TOML file, or tables like those of such a file: settings of training,
            curriculum and sparse attention, which `curriculum` and `changes` override. Its [train] replaces `config`. Its order
            of batches is ignored if `curriculum` has another schedule or mode, and its whole curriculum if there is a plan.

    Raises:
        SparsortError: rows, texts, scores, plan and settings that do not fit; a folder with another run; no such model.
        KeyboardInterrupt: the run was interrupted. A checkpoint of the last step was written, unless there are several processes.
    """
    from sparsort.recipes.train.text import TrainText

    begin = time.perf_counter()
    curriculum = dict(curriculum or {})
    replaced = {name for name, value in {"plan": plan, "eval_data": eval_data}.items() if value is not None}
    settings = read_recipe(recipe).without({*replaced, *curriculum, *changes})
    if config is not None and settings.train:
        raise SparsortError(
            f"the recipe sets {', '.join(settings.train)}, and config= would replace all settings of training. Pass "
            "only the settings that differ from the recipe, by name, such as learning_rate=1e-3."
        )
    reader = TrainText(template=text, messages=messages)
    config = make_config(config, {**settings.train, **changes})
    run = TrainingRun(
        config=config,
        out=Path(out).expanduser(),
        source=_open(data, reader, id_column, columns),
        text=reader,
        held_out=None if eval_data is None else _open(eval_data, reader, id_column, columns),
        curriculum={**settings.curriculum, **curriculum},
        groups=groups,
        fingerprint=fingerprint,
        verify=verify,
        plan=_open_plan(plan),
        scores=scores,
        sparse=settings.sparse and settings.sparse.seeded(config.seed),
    )
    run.check()
    need("accelerate", "train", "training")
    with _restored_global_state():
        result = run.result()
    # The result of a finished run comes from its folder, where it may be damaged.
    with integrity.as_written(Path(out) / "result.json", next_step="Train again in another folder (--out)."):
        return TrainResult(**{**result, "seconds": round(time.perf_counter() - begin, 3)})


def _open_plan(plan: str | Path | CurriculumPlan | None) -> CurriculumPlan | None:
    """The plan. One that is missing or damaged is refused here, before anything is written."""
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

    return CurriculumPlan.open(plan) if isinstance(plan, str | Path) else plan


def _open(data: Any, text: TrainText, id_column: str | None, columns: Sequence[str] | None) -> RowSource:
    from sparsort.scoring.data.rows import open_rows

    source = open_rows(data, id_column=id_column, columns=columns)
    text.check(source)
    return source


@contextlib.contextmanager
def _restored_global_state() -> Iterator[None]:
    """Restore the global generators, and the verbosity and progress bars of transformers, after the block."""
    import random

    import torch
    from transformers.utils import logging

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
