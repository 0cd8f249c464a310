"""Train a causal language model on a file of rows under a curriculum. The recipe behind `sparsort train`.

Contract: everything lies in one folder: `run.json` as it was asked for, `plan/`, `tokens/`, `checkpoints/`, `history.jsonl`
and, at the end, `model/` and `result.json`. Killed at any time and called again with the same arguments, it goes on from
the newest intact checkpoint and ends, on the same machine, with the losses of a run that was not stopped; the same arguments
over a finished folder give the result again; other arguments are refused with what differs. Under torchrun or
`accelerate launch` every process calls it.

Trainer seeds the global generators of torch, NumPy and `random`; they are put back, like transformers' verbosity, when
`train` returns.
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
from sparsort.recipes.train.run import Run
from sparsort.storage import integrity

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.recipes.train.text import TrainText
    from sparsort.scoring.data.rows import RowSource


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        loss: of the last step's tokens, with the selector's where there is one; None where it is not finite.
        eval_loss: mean over the tokens of the held-out rows at the end; None without such rows.
        steps: optimiser steps of the whole run.
        rows, eval_rows: trained on and held out.
        tokens: of the rows trained on, each counted once.
        parameters: of the model.
        out: the folder.
        model: where the model and its tokenizer are, for `from_pretrained`.
        history: JSON lines: step, loss, learning rate, and what the curriculum did.
        plan: the fingerprint of the plan.
        sparse: what sparse attention came to, as `sparse.summary` gives it; None for dense attention.
        notes: what a reader should know of the data and the run, one sentence each.
        resumed: the step that this call went on from: 0 for a run from the start, `steps` for one that was finished.
        seconds: of this call.
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
        data: rows, as `open_rows` takes them: a path, a list of dicts, a `datasets.Dataset`.
        text: format string over their columns. An end-of-text token follows each text. A row whose text is empty is
            refused, not left out.
        messages: instead of text, the column that holds whole conversations (see `prompts.conversations`), which the
            model's chat template makes into texts. All their tokens are learnt.
        out: the folder to work in; called again it goes on where it was.
        plan: a plan of exactly these rows, in their order. All ids and contents are compared with those that it was made for.
        scores: instead of a plan: `Scores` or their path, several by name, or one difficulty a row, (N,). They are matched
            to the rows by id or content. Not needed where the curriculum does not look at them.
        curriculum: with scores, the settings of `CurriculumSettings`. `batch_size` is per_device_batch × accumulate ×
            processes unless given; a pool has as many steps as the run.
        groups: with scores, the column that names each row's group.
        eval_data: held-out rows, of the same columns.
        id_column: the column that identifies a row.
        columns: names of the columns of `data` and `eval_data`, if these are CSV or TSV files without a header.
        fingerprint: with a plan, your own name for the data. Where the plan was made with a name too, the names are compared
            instead of the rows.
        verify: False takes a plan for any data with as many rows.
        config: how to train; `changes` are fields of it that differ.
        recipe: "sparse" or another of `RECIPES`, a TOML file, or tables as it has them: settings of training, curriculum and
            sparse attention, which `curriculum` and `changes` go before. Its [train] stands for `config`. Its order of batches
            is left out where `curriculum` names another schedule or mode, and its whole curriculum with a plan.

    Raises:
        SparsortError: rows, texts, scores, plan and settings that do not fit; a folder with another run; no model.
        KeyboardInterrupt: it was interrupted; a checkpoint of the last step was written, unless there are several processes.
    """
    from sparsort.recipes.train.text import TrainText

    begin = time.perf_counter()
    curriculum = dict(curriculum or {})
    given = {name for name, value in {"plan": plan, "eval_data": eval_data}.items() if value is not None}
    asked = read_recipe(recipe).without({*given, *curriculum, *changes})
    if config is not None and asked.train:
        raise SparsortError(
            f"the recipe sets {', '.join(asked.train)}, and config would set all of training. Give what differs from the recipe "
            "by name instead, such as learning_rate=1e-3."
        )
    read = TrainText(template=text, messages=messages)
    config = make_config(config, {**asked.train, **changes})
    run = Run(
        config=config,
        out=Path(out).expanduser(),
        source=_open(data, read, id_column, columns),
        text=read,
        held=None if eval_data is None else _open(eval_data, read, id_column, columns),
        curriculum={**asked.curriculum, **curriculum},
        groups=groups,
        fingerprint=fingerprint,
        verify=verify,
        plan=_opened(plan),
        scores=scores,
        sparse=asked.sparse and asked.sparse.seeded(config.seed),
    )
    run.check()
    need("accelerate", "train", "training")
    with _global_state_kept():
        result = run.result()
    # The result of a finished run is read from its folder.
    with integrity.as_written(Path(out) / "result.json", next_step="Train again in another folder (--out)."):
        return TrainResult(**{**result, "seconds": round(time.perf_counter() - begin, 3)})


def _opened(plan: str | Path | CurriculumPlan | None) -> CurriculumPlan | None:
    """The plan, refused here, before anything is written, where it is missing or damaged."""
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

    return CurriculumPlan.open(plan) if isinstance(plan, str | Path) else plan


def _open(data: Any, text: TrainText, id_column: str | None, columns: Sequence[str] | None) -> RowSource:
    from sparsort.scoring.data.rows import open_rows

    source = open_rows(data, id_column=id_column, columns=columns)
    text.check(source)
    return source


@contextlib.contextmanager
def _global_state_kept() -> Iterator[None]:
    """Put back what transformers moves: the global generators, its verbosity and its bars."""
    import random

    import torch
    from transformers.utils import logging as told

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()
