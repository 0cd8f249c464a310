"""A curriculum that learns from training how hard its examples are: observe, fold, re-plan at a stage's edge, go on.

Contract: an order once planned never changes under way. At a stage's edge every rank gathers the observations of the stage
(the one collective), folds them, and gets the same revised plan: in pool mode from that batch on, in one pass from the next
epoch on. `save` between two steps and `load` in a new process, also with another number of ranks, go on bitwise as if training
had not stopped, because a checkpoint only cuts the folding between steps, which changes nothing (`running_difficulty`).

That holds for the order as far as training itself repeats bitwise: observations are the model's own, and another number of
ranks rounds its sums otherwise. An order that was planned is saved, so only later revisions can differ, by rows that tie.
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
_WITHOUT_DIGEST = 1  # still read
_FIELDS = {"format", "version", "base", "measure", "loader", "running", "plan"}


class OnlineCurriculum:
    """Measures what the model trains on and re-plans the loader.

    Args:
        model: a causal language model, also wrapped; see `OnlineDifficulty.attach`.
        loader: whose batches it trains on. Its `on_stage` is taken.
        online: what is measured; by default the Hoyer sparsity of each example's last token.
        running: how it is averaged; by default with the plan's difficulty as the prior, and a half-life of one epoch.
        automatic: measure every training pass by itself, taking the examples for those that the loader handed out last. A
            loop that fetches several micro-batches before it trains on them passes False, and calls `online.begin()` and
            `online.collect(rows, step)` itself, with `step` = epoch · n_batches + number of the global batch.
        group: of torch.distributed; None: all ranks.

    Raises:
        SparsortError: a plan whose batches cannot be revised, or a running difficulty of other rows.

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
        self._measured: tuple[int, int, bytes] | None = None
        self._handles: list[Any] = []
        self.online = (online or OnlineDifficulty()).attach(model)
        if automatic:
            inner = unwrap(model)
            # torch.compile must not trace the loader's arithmetic. Any: torch does not type it.
            untraced: Any = torch.compiler.disable
            # Prepended: the hook of `online` waits for `begin`.
            self._handles = [
                inner.register_forward_pre_hook(untraced(self._before), prepend=True),
                inner.register_forward_hook(untraced(self._after)),
            ]
        loader.on_stage = self.on_stage

    def close(self) -> None:
        """Let go of model and loader. The plan stays as it was last revised."""
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
        """What the loader calls at a stage's edge, on every rank: the plan from here on, or None for the one it has."""
        plan = loader.plan
        step = loader.epoch * plan.n_batches + loader.batch
        at = {"epoch": loader.epoch, "start": loader.batch}
        if plan.revision is not None and {name: plan.revision[name] for name in at} == at:
            # A resume from a checkpoint that was taken after this revision and before its first step.
            return None
        self._fold(step)
        if plan.settings.mode == "one_pass" and loader.batch > 0:
            return None
        return plan.revised(self.running.difficulty(step), **at)

    def save(self, folder: Path | str) -> None:
        """Write everything that a resume needs, the loader's state and a revised plan included. Every rank calls it.

        Call it between two steps. `online.json` is written last and names the other files, so a kill leaves the checkpoint
        that was there before. Every file carries digests of what it holds.
        """
        folder, loader = Path(folder), self.loader
        position = loader.state_dict()
        plan = loader.plan
        step = position["epoch"] * plan.n_batches + position["batch"]
        self._fold(step)
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
        """Resume from what `save` wrote: the loader, its plan, and what is known of each example.

        Raises:
            SparsortError: nothing was saved there, by another version, for another plan, or measured otherwise; or a file has
                changed since.
        """
        folder = Path(folder)
        about = _read(folder)
        with integrity.as_written(folder / _FILE, next_step="Resume from another checkpoint."):
            if about["base"] != self._base:
                raise SparsortError(
                    f"{folder} was saved for the plan {about['base']}, and the loader's is {self._base}. Load with the plan and "
                    "the scores that training began with."
                )
            if about["measure"] != self._measure():
                raise SparsortError(
                    f"{folder} holds {about['measure']}, and this run measures {self._measure()}: they cannot be averaged. "
                    "Measure as before, or start again."
                )
            self.running = RunningDifficulty.load(folder / about["running"], fingerprint=self._base)
            if about["plan"] is not None:
                # Not mapped from the checkpoint, which may be rotated away while it is followed.
                self.loader.replace_plan(CurriculumPlan.open(folder / about["plan"]).in_memory())
            self.loader.load_state_dict(about["loader"])
        self.online.drain()
        self._pending, self._measured = Observations.join([]), None

    def _fold(self, step: int) -> None:
        """Fold what every rank measured before `step`, and keep the rest for the next time."""
        done, self._pending = Observations.join([self._pending, self.online.drain()]).split(step)
        self.running.fold(gather(done, self._group))

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
        # A second pass over the same micro-batch (two losses, a penalty) is not a second observation.
        now = (epoch, number, np.ascontiguousarray(rows).tobytes())
        if now != self._measured:
            self._measured = now
            self.online.collect(rows, epoch * loader.plan.n_batches + number)


def _read(folder: Path) -> dict[str, Any]:
    """What `online.json` says, checked."""
    path = folder / _FILE
    try:
        about = integrity.parse_own_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparsortError(
            f"cannot read an online curriculum from {path}: {error}. The checkpoint was written without one, or in part: "
            "resume without online=, or from another checkpoint."
        ) from error
    given = (about.get("format"), about.get("version")) if isinstance(about, dict) else (None, None)
    if given not in ((_FORMAT, _VERSION), (_FORMAT, _WITHOUT_DIGEST)):
        raise SparsortError(
            f"{path} is version {given[1]!r} of {given[0]!r}; expected version {_VERSION} of {_FORMAT!r}. Use the sparsort "
            "that wrote it, or start again."
        )
    next_step = "Resume from another checkpoint."
    if given[1] == _VERSION:
        integrity.check_seal(about, path, next_step=next_step)
    elif about.keys() != _FIELDS:
        raise SparsortError(f"{path} is damaged: it has other fields than were written. {next_step}")
    return dict(about)


def check_revisable(plan: CurriculumPlan) -> None:
    """Refuse a plan that could not be revised, before training rather than at its first edge.

    Raises:
        SparsortError: no easy and hard end, or batches that were cut by length for the order they have.
    """
    settings = plan.settings
    if settings.schedule in ("shuffle", "as_given") or settings.direction == "random":
        raise SparsortError(
            f"schedule={settings.schedule!r} with direction={settings.direction!r} does not look at difficulty, so there is "
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
            f"the running difficulty is of {len(running)} rows of the plan {running.fingerprint!r}, the loader's plan of "
            f"{plan.n_rows} rows is {_base(plan)!r}. Make it with RunningDifficulty(plan.n_rows, prior=plan.difficulty)."
        )
    running.fingerprint = _base(plan)


def _base(plan: CurriculumPlan) -> str:
    """The fingerprint of the plan that training began with."""
    return str(plan.notes.get("revises", plan.fingerprint))


def _tidy(folder: Path, named: set[str | None]) -> None:
    """Remove what earlier checkpoints left in this folder."""
    for path in (*folder.glob("running-*.safetensors"), *folder.glob("plan-*")):
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
