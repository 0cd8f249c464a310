"""One training run, from arguments and rows to tokens, a plan, and the trained model in its folder.

Contract: the plan covers the rows that are trained on, in their order, and counts their tokens with this model's tokenizer.
Nothing is written before the arguments are checked against each other. The folder is claimed before training, with everything
that determines a loss, and `result.json` is written after everything else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsort.errors import SparsortError
from sparsort.recipes.train import folder as train_folder
from sparsort.recipes.train.config import IDENTITY, TrainConfig
from sparsort.recipes.train.model import make_tokenizer
from sparsort.recipes.train.sparse import SparseTraining, identity, refuse_to_drop, summary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsort.curriculum.loading.plan.plan import CurriculumPlan
    from sparsort.recipes.train.text import Kept, Tokens, TrainText
    from sparsort.scoring.data.rows import RowSource

# The batch of a device and the share of held-out rows, unless the plan or the caller decides them.
_BATCH = 8
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of training that come from the data: tokens, a plan, and the number of steps."""

    tokenizer: Any
    tokens: Tokens
    held_out: Tokens | None
    plan: CurriculumPlan
    steps: int
    per_device: int


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One run: its arguments, their checks against each other and against the data, and the training itself."""

    config: TrainConfig
    out: Path
    source: RowSource
    text: TrainText
    held_out: RowSource | None
    curriculum: dict[str, Any]
    groups: str | None
    plan: CurriculumPlan | None
    scores: Any
    sparse: SparseTraining | None = None
    fingerprint: str | None = None
    verify: bool = True

    @property
    def eval_share(self) -> float:
        if self.config.eval_share is not None:
            return self.config.eval_share
        return 0.0 if self.plan is not None or self.held_out is not None else _HELD_OUT

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def check(self) -> None:
        """Refuse arguments that exclude each other, before anything is read."""
        if self.held_out is not None and self.eval_share:
            raise SparsortError("held-out rows come from eval_data (--eval-data): omit eval_share (--eval-share).")
        if self.plan is None:
            if self.fingerprint is not None or not self.verify:
                option = "fingerprint (--fingerprint)" if self.verify else "verify=False (--no-verify)"
                raise SparsortError(
                    f"{option} concerns a plan that was made before: give one with plan (--plan), or omit it. Scores are "
                    "matched to the rows by id or content."
                )
            if self.scores is None and not _ignores_difficulty(self.curriculum):
                raise SparsortError(
                    "a curriculum needs scores: give a folder that sparsort score made (--scores FOLDER) or a plan "
                    "(--plan FOLDER). Plain training is schedule='shuffle' (--schedule shuffle)."
                )
            return
        if self.scores is not None:
            raise SparsortError(
                "a plan was made from its own scores: give plan (--plan) or scores (--scores), not both."
            )
        if given := [*self.curriculum, *(["groups"] if self.groups else [])]:
            raise SparsortError(
                f"the plan has its own settings, and {', '.join(given)} would contradict them. Omit these, or give scores "
                "(--scores) instead of the plan."
            )
        if self.eval_share:
            raise SparsortError(
                f"a plan covers all rows, so no rows of it can be held out (eval_share={self.eval_share:g}). Give other rows "
                "with eval_data (--eval-data), or scores (--scores) instead of the plan."
            )

    def result(self) -> dict[str, Any]:
        """Train from where the run stopped, and return its result as JSON values."""
        # transformers prints to stdout when it is imported, if WANDB_MODE is "offline".
        with contextlib.redirect_stdout(sys.stderr):
            from sparsort.recipes.train.loop import arguments

        args = arguments(self.checkpoints, self.config)
        tokenizer = self._check_model()
        with train_folder.locked_folder(self.out) if args.should_save else contextlib.nullcontext():
            # The first process writes tokens and plan, and the others map them.
            with args.main_process_first(local=False):
                prepared = self._prepare(args, tokenizer)
            result = train_folder.result_of(self.out)
            if result is None:
                return self._train(args, prepared)
            return {**result, **self._places(), "resumed": result["steps"]}

    def _known(self) -> dict[str, Any]:
        """The settings that determine the losses and are known before the data is read."""
        settings = {name: getattr(self.config, name) for name in IDENTITY}
        return {**self.text.identity(), **settings, **identity(self.sparse)}

    def _check_model(self) -> Any:
        """Check the settings against the folder and the model, before anything is written, and return the model's tokenizer."""
        train_folder.compare(self.out, self._known())
        tokenizer = make_tokenizer(self.config.spec)
        self.text.check_tokenizer(tokenizer)
        if self.sparse is None:
            refuse_to_drop(self.config.spec)
        else:
            self.sparse.check(self.config.spec)
        return tokenizer

    def _prepare(self, args: Any, tokenizer: Any) -> Prepared:
        tokens, held_out, rows = self._tokens(tokenizer)
        plan, per_device = self._plan(rows, tokens, args.world_size)
        steps = self.config.max_steps or self.config.epochs * plan.n_batches
        if self.config.warmup_steps > steps:
            raise SparsortError(
                f"warmup_steps={self.config.warmup_steps} is more than the {steps} steps of the run. Choose fewer."
            )
        if self.config.online:
            _check_online(plan, steps)
        settings = self._known() | {
            "steps": steps,
            "curriculum": plan.settings.to_json(),
            "rows": tokens.digest,
            "eval_rows": None if held_out is None else held_out.digest,
            "plan": plan.fingerprint,
        }
        train_folder.claim(self.out, settings, write=args.should_save)
        if self.plan is None:
            plan = plan.save(self.out / "plan")
        return Prepared(
            tokenizer=tokenizer, tokens=tokens, held_out=held_out, plan=plan, steps=steps, per_device=per_device
        )

    def _tokens(self, tokenizer: Any) -> tuple[Tokens, Tokens | None, Kept]:
        """The tokens to train on, the held-out tokens if there are any, and the rows of the former."""
        from sparsort.recipes.train.text import Kept, tokenise

        before = train_folder.recorded(self.out)

        def tokens_of(rows: Kept, digest: str) -> Tokens:
            folder = self.out / "tokens"
            return tokenise(
                rows,
                self.text,
                tokenizer,
                max_length=self.config.max_length,
                folder=folder,
                recorded=before.get(digest),
            )

        is_held_out = _held_out(self.source.count(), self.eval_share, self.config.seed)
        rows = Kept(self.source, ~is_held_out)
        tokens = tokens_of(rows, "rows")
        if self.held_out is not None:
            every = np.ones(self.held_out.count(), dtype=bool)
            return tokens, tokens_of(Kept(self.held_out, every), "eval_rows"), rows
        if is_held_out.any():
            return tokens, tokens_of(Kept(self.source, is_held_out), "eval_rows"), rows
        return tokens, None, rows

    def _plan(self, rows: Kept, tokens: Tokens, processes: int) -> tuple[CurriculumPlan, int]:
        """The plan of the rows, and the batch of a device."""
        from sparsort.curriculum.loading.loader.verification import verify_every_row
        from sparsort.curriculum.loading.trainer.trainer import check_global_batch

        # Examples of a step per example of a device's batch.
        share = self.config.accumulate * processes
        if self.plan is not None:
            plan = self.plan
            _check_lengths(plan, tokens)
            if self.verify:
                verify_every_row(plan, rows, fingerprint=self.fingerprint)
        else:
            plan = self._new_plan(rows, tokens, share)
        size = plan.settings.batch_size
        per_device = self.config.per_device_batch or (_BATCH if size is None else max(1, size // share))
        if size is not None:
            check_global_batch(size, per_device, self.config.accumulate, processes)
        return plan, per_device

    def _new_plan(self, rows: Kept, tokens: Tokens, share: int) -> CurriculumPlan:
        from sparsort.curriculum.loading.plan.planning import plan_curriculum
        from sparsort.curriculum.loading.plan.settings import CurriculumSettings

        config, settings = self.config, dict(self.curriculum)
        settings.setdefault("seed", config.seed)
        if settings.get("batch_size") is None and settings.get("token_budget") is None:
            settings["batch_size"] = min((config.per_device_batch or _BATCH) * share, max(1, len(rows)))
        if settings.get("mode") == "pool" and settings.get("steps") is None:
            # A batch of a token budget has at least as many examples as fit if all are as long as the longest.
            size = settings.get("batch_size") or max(1, settings["token_budget"] // int(tokens.lengths.max()))
            settings["steps"] = config.max_steps or config.epochs * -(-len(rows) // size)
        scores = np.zeros(len(rows)) if self.scores is None else self.scores
        # Lengths that decide nothing stay out of the plan, so that the same call in Python gives the same plan.
        lengths = tokens.lengths if CurriculumSettings.from_json(settings).needs_lengths else None
        try:
            return plan_curriculum(scores, data=rows, groups=self.groups, lengths=lengths, **settings)
        except SparsortError as error:
            if self.sparse is None or "stages do not fit" not in str(error):
                raise
            raise SparsortError(
                f"{error} Unless you gave them, the stages are those of the recipe: stages (--stages) overrides them."
            ) from error

    def _train(self, args: Any, prepared: Prepared) -> dict[str, Any]:
        from sparsort.recipes.train.loop import losses, run_trainer
        from sparsort.recipes.train.model import make_model

        config = self.config
        lengths = [tokens.lengths.max() for tokens in (prepared.tokens, prepared.held_out) if tokens is not None]
        model = make_model(config.spec, prepared.tokenizer, config.seed, longest=int(max(lengths)))
        sparse = None if self.sparse is None else self.sparse.attach(model, config.spec, prepared.steps)
        trainer, resumed = run_trainer(
            model,
            args,
            config,
            plan=prepared.plan,
            steps=prepared.steps,
            per_device=prepared.per_device,
            tokenizer=prepared.tokenizer,
            rows=prepared.tokens.dataset,
            held_out=None if prepared.held_out is None else prepared.held_out.dataset,
            history=self.out / "history.jsonl",
            sparse=sparse,
        )
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        last = losses(trainer.state.log_history)
        result = {
            "loss": next((entry["loss"] for entry in reversed(last) if "loss" in entry), None),
            "eval_loss": next((entry["eval_loss"] for entry in reversed(last) if "eval_loss" in entry), None),
            "steps": trainer.state.global_step,
            "rows": len(prepared.tokens.lengths),
            "eval_rows": 0 if prepared.held_out is None else len(prepared.held_out.lengths),
            "tokens": int(prepared.tokens.lengths.sum()),
            "parameters": sum(weight.numel() for weight in weights.values()),
            "plan": prepared.plan.fingerprint,
            "sparse": None if sparse is None else summary(last),
            "notes": _notes(
                prepared, set_aside=0 if self.held_out or prepared.held_out is None else len(prepared.held_out.lengths)
            ),
        }
        if args.should_save:
            train_folder.save_model(self.out / "model", trainer.model, prepared.tokenizer, weights)
            train_folder.write_result(self.out, result)
        return {**result, **self._places(), "resumed": resumed}

    def _places(self) -> dict[str, str]:
        """The paths in a result, which are not stored, because the folder may be moved."""
        places = {"model": "model", "history": "history.jsonl"}
        return {"out": str(self.out), **{name: str(self.out / place) for name, place in places.items()}}


def _ignores_difficulty(curriculum: Mapping[str, Any]) -> bool:
    return curriculum.get("schedule") in ("shuffle", "as_given") or curriculum.get("direction") == "random"


def _held_out(n: int, share: float, seed: int) -> NDArray[np.bool_]:
    """(n,) bool: the rows that are held out, about `share` of them, and at least one if the share is above 0."""
    from sparsort.curriculum.loading.plan.shuffling import key_of, permutation

    is_held_out = np.zeros(n, dtype=bool)
    count = min(n, max(1, round(share * n))) if share else 0
    if count == n:
        raise SparsortError(
            f"of {n} rows, eval_share={share:g} would hold out {count} and leave none to train on. Use more rows, or "
            "eval_share=0 (--eval-share 0)."
        )
    is_held_out[permutation(n, key_of(seed, "held out"))[:count]] = True
    return is_held_out


def _check_lengths(plan: CurriculumPlan, tokens: Tokens) -> None:
    """Refuse a plan for another number of rows, or with lengths that are too short, if lengths determine its batches."""
    if plan.n_rows != len(tokens.lengths):
        raise SparsortError(
            f"the plan has {plan.n_rows} rows and the data has {len(tokens.lengths)}: it was made for other rows. "
            "Give the file that was planned, complete and in its original order, or plan this one (sparsort plan)."
        )
    if plan.lengths is None or not plan.settings.needs_lengths:
        return
    counted = np.minimum(tokens.lengths, plan.settings.max_length or tokens.lengths.max())
    if (longer := np.flatnonzero(counted > plan.lengths)).size:
        row = int(longer[0])
        raise SparsortError(
            f"the plan counts {plan.lengths[row]} tokens in row {row} and this model's tokenizer {counted[row]}, so batches "
            f"would exceed their budget ({longer.size} rows are longer). Give scores (--scores) with the settings of the plan, "
            "so that the tokens are counted again, or plan with the lengths of this tokenizer."
        )


def _check_online(plan: CurriculumPlan, steps: int) -> None:
    """Refuse an online difficulty that would not affect any batch."""
    from sparsort.curriculum.loading.online.online_curriculum import check_revisable

    check_revisable(plan)
    settings = plan.settings
    if settings.mode == "one_pass" and (steps <= plan.n_batches or settings.later_epochs == "shuffle"):
        raise SparsortError(
            f"in one pass, an online difficulty orders the second epoch and later ones, and these {steps} steps have no epoch "
            f"that it could order (an epoch has {plan.n_batches}, later_epochs={settings.later_epochs!r}). Train for more "
            "epochs, or plan with mode='pool' (--mode pool), which uses it within an epoch."
        )


def _notes(prepared: Prepared, *, set_aside: int) -> list[str]:
    notes = []
    if cut := prepared.tokens.cut:
        notes.append(f"{cut} of {len(prepared.tokens.lengths)} texts were cut at the greatest length.")
    if unscored := prepared.plan.notes.get("unscored"):
        notes.append(f"{unscored} rows have no score; 'unscored' decides where they come.")
    if (unused := prepared.plan.notes.get("unused_scores", 0) - set_aside) > 0:
        notes.append(f"{unused} scores belong to rows that the data does not have.")
    return notes
