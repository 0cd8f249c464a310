"""A curriculum that learns the difficulty of its examples during training and revises its plan at the edges of stages.

Contract: within a stage the planned order never changes. At the edge of a stage every rank gathers the observations of the stage
(the only communication), folds them into the running difficulty, and gets the same revised plan. In pool mode it applies from
that batch on, in one pass from the next epoch on. After `save` between two steps and `load` in a new process, even with another
number of ranks, training continues bitwise as without the interruption: a checkpoint only splits the folding between steps,
which does not change the result (`running_difficulty`).

For the order this holds as far as training itself is bitwise reproducible: the observations come from the model, and another
number of ranks rounds its sums differently. A planned order is saved, so only later revisions can differ, by rows that tie.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.online.gathering import gather
from sparsort.curriculum.loading.online.measure import OnlineDifficulty, unwrap
from sparsort.curriculum.loading.online.observations import Observations
from sparsort.curriculum.loading.online.running_difficulty import RunningDifficulty
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.errors import SparsortError
from sparsort.storage import integrity

_FILE, _FORMAT, _VERSION = "online.json", "sparsort-online", 2
# The first version, whose file has no digest of itself, and which is still read.
_WITHOUT_DIGEST = 1
_FIELDS = {"format", "version", "base", "measure", "loader", "running", "plan"}


class OnlineCurriculum:
    """Measures the examples that a model trains on, and revises the plan of the loader.

    Args:
        model: a causal language model, which may be wrapped; see `OnlineDifficulty.attach`.
        loader: the loader of the batches that the model trains on. Its `on_stage` is set.
        online: the measurement; by default the Hoyer sparsity of each example's last token.
        running: the running average; by default with the plan's difficulty as the prior and a half-life of one epoch.
        automatic: measure every training pass, assuming that its examples are those of the loader's latest micro-batch. A
            loop that fetches several micro-batches before it trains on them passes False, and calls `online.begin()` and
            `online.collect(rows, step)` itself, with `step` = epoch · n_batches + number of the global batch.
        group: process group of torch.distributed; None for all ranks.

    Raises:
        SparsortError: the plan cannot be revised, or the running difficulty belongs to other rows.

    Example:
        >>> online = OnlineCurriculum(model, loader)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        loader: CurriculumLoader,
        *,
        online: OnlineDifficulty | None = None,
        running: RunningDifficulty | None = None,
        automatic: bool = True,
        group: Any = None,
    ) -> None:
        plan = loader.plan
        check_revisable(plan)
        self._base = _base(plan)
        if running is None:
            running = RunningDifficulty(
                plan.n_rows, prior=plan.difficulty, half_life_steps=plan.n_batches, fingerprint=self._base
            )
        _check_running(running, plan)
        self.loader, self.running, self._group = loader, running, group
        self._pending = Observations.join([])
        # The micro-batch that was measured last: epoch, number of the global batch, and its rows.
        self._measured: tuple[int, int, bytes] | None = None
        self._handles: list[Any] = []
        self.online = (online or OnlineDifficulty()).attach(model)
        if automatic:
            inner = unwrap(model)
            # torch.compile must not trace the loader's arithmetic. The type is Any because torch does not annotate `disable`.
            untraced: Any = torch.compiler.disable
            # `prepend` makes this hook run before the one of `online`, which needs `begin` first.
            self._handles = [
                inner.register_forward_pre_hook(untraced(self._before), prepend=True),
                inner.register_forward_hook(untraced(self._after)),
            ]
        loader.on_stage = self.on_stage

    def close(self) -> None:
        """Detach from model and loader. The loader keeps the latest revision of the plan."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.online.close()
        self.loader.on_stage = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_stage(self, loader: CurriculumLoader, stage: int) -> CurriculumPlan | None:
        """Revise the plan at the edge of a stage; the loader calls this on every rank.

        Returns:
            The plan from here on, or None to keep the current one.
        """
        plan = loader.plan
        step = loader.epoch * plan.n_batches + loader.batch
        at = {"epoch": loader.epoch, "start": loader.batch}
        if plan.revision is not None and {name: plan.revision[name] for name in at} == at:
            # Training resumed from a checkpoint between this revision and its first step, so the plan is already revised.
            return None
        self._fold(step)
        # In one pass the order of the current epoch is fixed, so a revision waits for the next epoch.
        if plan.settings.mode == "one_pass" and loader.batch > 0:
            return None
        return plan.revised(self.running.difficulty(step), **at)

    def save(self, folder: Path | str) -> None:
        """Write everything that a resume needs, including the loader's state and a revised plan. Every rank must call it.

        Call it between two steps. `online.json` is written last and names the other files, so a kill leaves the previous
        checkpoint in place. Every file contains digests of its content.
        """
        folder, loader = Path(folder), self.loader
        position = loader.state_dict()
        plan = loader.plan
        step = position["epoch"] * plan.n_batches + position["batch"]
        self._fold(step)
        # Every rank takes part in the collective of `_fold`, but only the first one writes.
        if dist.is_available() and dist.is_initialized() and dist.get_rank(self._group) != 0:
            return
        running_name = f"running-{step:012d}.safetensors"
        plan_name = None if plan.revision is None else f"plan-{plan.fingerprint}"
        self.running.save(folder / running_name)
        if plan_name is not None:
            plan.save(folder / plan_name)
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "base": self._base,
            "measure": self._measure(),
            "loader": position,
        }
        integrity.write_sealed(folder / _FILE, {**about, "running": running_name, "plan": plan_name})
        _tidy(folder, {running_name, plan_name})

    def load(self, folder: Path | str) -> None:
        """Restore what `save` wrote: the loader's position, its plan, and the running difficulty.

        Raises:
            SparsortError: the folder contains no checkpoint, or one from another version, for another plan or with another
                measurement; or a file has changed since it was written.
        """
        folder = Path(folder)
        about = _read(folder)
        with integrity.as_written(folder / _FILE, next_step="Resume from another checkpoint."):
            if about["base"] != self._base:
                raise SparsortError(
                    f"{folder} was saved for the plan {about['base']}, and the loader has {self._base}. Load with the plan and "
                    "the scores that training began with."
                )
            if about["measure"] != self._measure():
                raise SparsortError(
                    f"{folder} contains {about['measure']}, and this run measures {self._measure()}: they cannot be averaged. "
                    "Measure as before, or start again."
                )
            self.running = RunningDifficulty.load(folder / about["running"], fingerprint=self._base)
            if about["plan"] is not None:
                # The plan is copied into memory, because the checkpoint may be deleted while training follows the plan.
                self.loader.replace_plan(CurriculumPlan.open(folder / about["plan"]).in_memory())
            self.loader.load_state_dict(about["loader"])
        self.online.drain()
        self._pending, self._measured = Observations.join([]), None

    def _fold(self, step: int) -> None:
        """Fold the observations of all ranks before `step`, and keep the later ones for the next call."""
        complete, self._pending = Observations.join([self._pending, self.online.drain()]).split(step)
        self.running.fold(gather(complete, self._group))

    def _measure(self) -> dict[str, Any]:
        online = self.online
        return {"metric": online.metric, "tokens": online.tokens, "per_sequence": online.per_sequence}

    def _before(self, module: nn.Module, _args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.online.begin()

    def _after(self, module: nn.Module, _args: Any, _output: Any) -> None:
        loader = self.loader
        if not (module.training and torch.is_grad_enabled()) or loader.latest is None:
            return
        rows, (epoch, number) = loader.rows, loader.latest
        # A second pass over the same micro-batch (for a second loss or a penalty) is not a second observation.
        micro_batch = (epoch, number, np.ascontiguousarray(rows).tobytes())
        if micro_batch != self._measured:
            self._measured = micro_batch
            self.online.collect(rows, epoch * loader.plan.n_batches + number)


def _read(folder: Path) -> dict[str, Any]:
    """The contents of `online.json`, after a check of its format and digest."""
    path = folder / _FILE
    try:
        about = integrity.parse_own_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparsortError(
            f"cannot read an online curriculum from {path}: {error}. The checkpoint was written without one, or in part: "
            "resume without online=, or from another checkpoint."
        ) from error
    next_step = "Resume from another checkpoint."
    if not isinstance(about, dict) or about.get("format") is None:
        raise SparsortError(
            f"{path} is damaged: it has no field 'format', which an online curriculum writes. {next_step}"
        )
    if about["format"] != _FORMAT:
        raise SparsortError(f"{path} has the format {about['format']!r}; expected {_FORMAT!r}. {next_step}")
    other = "Use the sparsort that wrote it, or start again."
    integrity.check_version(about.get("version"), (_WITHOUT_DIGEST, _VERSION), path, damaged=next_step, other=other)
    if about["version"] == _VERSION:
        integrity.check_seal(about, path, next_step=next_step)
    elif about.keys() != _FIELDS:
        raise SparsortError(f"{path} is damaged: it has other fields than were written. {next_step}")
    return dict(about)


def check_revisable(plan: CurriculumPlan) -> None:
    """Refuse a plan that cannot be revised, so that the error comes before training and not at the edge of a stage.

    Raises:
        SparsortError: the plan does not use the difficulty, or its batches were cut by length for its order.
    """
    settings = plan.settings
    if settings.schedule in ("shuffle", "as_given") or settings.direction == "random":
        raise SparsortError(
            f"schedule={settings.schedule!r} with direction={settings.direction!r} does not use the difficulty, so there is "
            "nothing to learn online. Use schedule='sorted', or mode='pool'."
        )
    if settings.mode == "one_pass" and (settings.token_budget is not None or settings.packing != "none"):
        raise SparsortError(
            "batches by tokens and packed sequences are cut for the order that the plan was made with, so an online "
            "difficulty cannot revise it. Use batch_size without packing, or mode='pool'."
        )


def _check_running(running: RunningDifficulty, plan: CurriculumPlan) -> None:
    if len(running) != plan.n_rows or running.fingerprint not in ("", _base(plan)):
        raise SparsortError(
            f"the running difficulty has {len(running)} rows of the plan {running.fingerprint!r}, and the loader's plan of "
            f"{plan.n_rows} rows is {_base(plan)!r}. Create it with RunningDifficulty(plan.n_rows, prior=plan.difficulty)."
        )
    running.fingerprint = _base(plan)


def _base(plan: CurriculumPlan) -> str:
    """The fingerprint of the plan that training began with."""
    return str(plan.notes.get("revises", plan.fingerprint))


def _tidy(folder: Path, named: set[str | None]) -> None:
    """Remove the files of earlier checkpoints from the folder."""
    for path in (*folder.glob("running-*.safetensors"), *folder.glob("plan-*")):
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
