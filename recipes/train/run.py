"""One training run: from arguments and rows to tokens, a plan, and the trained model in its folder.

Contract: the plan is of the rows that are trained on, in their order, and counts their tokens as this model's tokenizer
does. Nothing is written before the arguments fit each other; the folder is claimed before training, with all that decides a
loss; `result.json` is written when all else is there.
"""

from __future__ import annotations

import contextlib
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

_BATCH = 8  # of a device, where neither a plan nor the caller says
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What training needs of the data: tokens, plan, and how long it takes."""

    tokenizer: Any
    tokens: Tokens
    held: Tokens | None
    plan: CurriculumPlan
    steps: int
    per_device: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its arguments, checked against each other and the data, and what came of it."""

    config: TrainConfig
    out: Path
    source: RowSource
    text: TrainText
    held: RowSource | None
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
        return 0.0 if self.plan is not None or self.held is not None else _HELD_OUT

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def check(self) -> None:
        """Refuse arguments that exclude each other, before anything is read."""
        if self.held is not None and self.eval_share:
            raise SparsortError("held-out rows come from eval_data (--eval-data): leave eval_share (--eval-share) out.")
        if self.plan is None:
            if self.fingerprint is not None or not self.verify:
                option = "fingerprint (--fingerprint)" if self.verify else "verify=False (--no-verify)"
                raise SparsortError(
                    f"{option} concerns a plan that was made before: give one with plan (--plan), or leave it out. Scores are "
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
                f"the plan has its own settings, and {', '.join(given)} would be others. Leave them out, or give scores "
                "(--scores) instead of the plan."
            )
        if self.eval_share:
            raise SparsortError(
                f"a plan is of all rows, so none can be held out of them (eval_share={self.eval_share:g}). Give rows of their "
                "own with eval_data (--eval-data), or scores (--scores) instead of the plan."
            )

    def result(self) -> dict[str, Any]:
        """Train what is left to train, and say what came of it."""
        from sparsort.recipes.train.loop import arguments

        args = arguments(self.checkpoints, self.config)
        tokenizer = self._check_model()
        with train_folder.held(self.out) if args.should_save else contextlib.nullcontext():
            # The first process writes tokens and plan, and the others map them.
            with args.main_process_first(local=False):
                prepared = self._prepare(args, tokenizer)
            found = train_folder.result_of(self.out)
            if found is None:
                return self._train(args, prepared)
            return {**found, **self._places(), "resumed": found["steps"]}

    def _known(self) -> dict[str, Any]:
        """What decides the losses, as far as it is known before the data is read."""
        settings = {name: getattr(self.config, name) for name in IDENTITY}
        return {**self.text.identity(), **settings, **identity(self.sparse)}

    def _check_model(self) -> Any:
        """The model's tokenizer. It and the settings fit each other, and the folder: so far nothing was written into it."""
        train_folder.compare(self.out, self._known())
        tokenizer = make_tokenizer(self.config.spec)
        self.text.check_tokenizer(tokenizer)
        if self.sparse is None:
            refuse_to_drop(self.config.spec)
        else:
            self.sparse.check(self.config.spec)
        return tokenizer

    def _prepare(self, args: Any, tokenizer: Any) -> Prepared:
        from sparsort.recipes.train.text import Kept, tokenise

        began = train_folder.recorded(self.out)
        options: dict[str, Any] = {"max_length": self.config.max_length, "folder": self.out / "tokens"}
        of_held = {**options, "recorded": began.get("eval_rows")}
        out_of_data = _held_out(self.source.count(), self.eval_share, self.config.seed)
        rows = Kept(self.source, ~out_of_data)
        tokens = tokenise(rows, self.text, tokenizer, **options, recorded=began.get("rows"))
        held = None
        if self.held is not None:
            held = tokenise(Kept(self.held, np.ones(self.held.count(), dtype=bool)), self.text, tokenizer, **of_held)
        elif out_of_data.any():
            held = tokenise(Kept(self.source, out_of_data), self.text, tokenizer, **of_held)
        plan, per_device = self._plan(rows, tokens, args.world_size)
        steps = self.config.max_steps or self.config.epochs * plan.n_batches
        if self.config.warmup_steps > steps:
            raise SparsortError(
                f"warmup_steps={self.config.warmup_steps} is more than the {steps} steps of the run. Choose fewer."
            )
        if self.config.online:
            _check_online(plan, steps)
        asked = self._known() | {
            "steps": steps,
            "curriculum": plan.settings.to_json(),
            "rows": tokens.digest,
            "eval_rows": None if held is None else held.digest,
            "plan": plan.fingerprint,
        }
        train_folder.claim(self.out, asked, write=args.should_save)
        if self.plan is None:
            plan = plan.save(self.out / "plan")
        return Prepared(tokenizer=tokenizer, tokens=tokens, held=held, plan=plan, steps=steps, per_device=per_device)

    def _plan(self, rows: Kept, tokens: Tokens, processes: int) -> tuple[CurriculumPlan, int]:
        """The plan of the rows, and the batch of a device."""
        from sparsort.curriculum.loading.loader.verification import verify_every_row
        from sparsort.curriculum.loading.plan.planning import plan_curriculum
        from sparsort.curriculum.loading.plan.settings import CurriculumSettings
        from sparsort.curriculum.loading.trainer.trainer import check_global_batch

        config, settings = self.config, dict(self.curriculum)
        share = config.accumulate * processes
        if self.plan is not None:
            plan = self.plan
            _check_lengths(plan, tokens)
            if self.verify:
                verify_every_row(plan, rows, fingerprint=self.fingerprint)
        else:
            settings.setdefault("seed", config.seed)
            if settings.get("batch_size") is None and settings.get("token_budget") is None:
                settings["batch_size"] = min((config.per_device_batch or _BATCH) * share, max(1, len(rows)))
            if settings.get("mode") == "pool" and settings.get("steps") is None:
                size = settings.get("batch_size")
                each = size or max(1, settings["token_budget"] // int(tokens.lengths.max()))
                settings["steps"] = config.max_steps or config.epochs * -(-len(rows) // each)
            blind = np.zeros(len(rows)) if self.scores is None else self.scores
            # Part of a plan only where they decide something, so that the same call in Python makes the same plan.
            lengths = tokens.lengths if CurriculumSettings.from_json(settings).needs_lengths else None
            try:
                plan = plan_curriculum(blind, data=rows, groups=self.groups, lengths=lengths, **settings)
            except SparsortError as error:
                if self.sparse is None or "stages do not fit" not in str(error):
                    raise
                raise SparsortError(
                    f"{error} Unless you gave them, they are the recipe's: stages (--stages) goes before it."
                ) from error
        size = plan.settings.batch_size
        per_device = config.per_device_batch or (_BATCH if size is None else max(1, size // share))
        if size is not None:
            check_global_batch(size, per_device, config.accumulate, processes)
        return plan, per_device

    def _train(self, args: Any, prepared: Prepared) -> dict[str, Any]:
        from sparsort.recipes.train.loop import losses, run_trainer
        from sparsort.recipes.train.model import make_model

        config = self.config
        lengths = [found.lengths.max() for found in (prepared.tokens, prepared.held) if found is not None]
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
            held=None if prepared.held is None else prepared.held.dataset,
            history=self.out / "history.jsonl",
            sparse=sparse,
        )
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        last = losses(trainer.state.log_history)
        found = {
            "loss": next((entry["loss"] for entry in reversed(last) if "loss" in entry), None),
            "eval_loss": next((entry["eval_loss"] for entry in reversed(last) if "eval_loss" in entry), None),
            "steps": trainer.state.global_step,
            "rows": len(prepared.tokens.lengths),
            "eval_rows": 0 if prepared.held is None else len(prepared.held.lengths),
            "tokens": int(prepared.tokens.lengths.sum()),
            "parameters": sum(weight.numel() for weight in weights.values()),
            "plan": prepared.plan.fingerprint,
            "sparse": None if sparse is None else summary(last),
            "notes": _notes(
                prepared, set_aside=0 if self.held or prepared.held is None else len(prepared.held.lengths)
            ),
        }
        if args.should_save:
            train_folder.save_model(self.out / "model", trainer.model, prepared.tokenizer, weights)
            train_folder.write_result(self.out, found)
        return {**found, **self._places(), "resumed": resumed}

    def _places(self) -> dict[str, str]:
        places = {"model": "model", "history": "history.jsonl"}
        return {"out": str(self.out), **{name: str(self.out / place) for name, place in places.items()}}


def _ignores_difficulty(curriculum: Mapping[str, Any]) -> bool:
    return curriculum.get("schedule") in ("shuffle", "as_given") or curriculum.get("direction") == "random"


def _held_out(n: int, share: float, seed: int) -> NDArray[np.bool_]:
    """(n,) bool, which rows are held out: about `share` of them, one at least where it is above 0."""
    from sparsort.curriculum.loading.plan.shuffling import key_of, permutation

    held = np.zeros(n, dtype=bool)
    count = min(n, max(1, round(share * n))) if share else 0
    if count == n:
        raise SparsortError(
            f"of {n} rows, eval_share={share:g} would hold out {count} and leave none to train on. Use more rows, or "
            "eval_share=0 (--eval-share 0)."
        )
    held[permutation(n, key_of(seed, "held out"))[:count]] = True
    return held


def _check_lengths(plan: CurriculumPlan, tokens: Tokens) -> None:
    """Refuse a plan of another number of rows, or of shorter ones where their lengths make its batches."""
    if plan.n_rows != len(tokens.lengths):
        raise SparsortError(
            f"the plan is of {plan.n_rows} rows and the data has {len(tokens.lengths)}: it was made for other rows. "
            "Give the file that was planned, whole and in its order, or plan this one (sparsort plan)."
        )
    if plan.lengths is None or not plan.settings.needs_lengths:
        return
    found = np.minimum(tokens.lengths, plan.settings.max_length or tokens.lengths.max())
    if (other := np.flatnonzero(found > plan.lengths)).size:
        row = int(other[0])
        raise SparsortError(
            f"the plan counts {plan.lengths[row]} tokens in row {row} and this model's tokenizer {found[row]}, so that batches "
            f"would not hold to their budget ({other.size} rows are longer). Give scores (--scores) with the plan's settings "
            "instead, which counts anew, or plan with the lengths of this tokenizer."
        )


def _check_online(plan: CurriculumPlan, steps: int) -> None:
    """Refuse an online difficulty that no batch would follow."""
    from sparsort.curriculum.loading.online.online_curriculum import check_revisable

    check_revisable(plan)
    settings = plan.settings
    if settings.mode == "one_pass" and (steps <= plan.n_batches or settings.later_epochs == "shuffle"):
        raise SparsortError(
            f"in one pass an online difficulty orders the second epoch and on, and these {steps} steps have none that it could "
            f"order (an epoch has {plan.n_batches}, later_epochs={settings.later_epochs!r}). Train for more epochs, or plan "
            "with mode='pool' (--mode pool), which follows it within an epoch."
        )


def _notes(prepared: Prepared, *, set_aside: int) -> list[str]:
    notes = []
    if cut := prepared.tokens.cut:
        notes.append(f"{cut} of {len(prepared.tokens.lengths)} texts were cut at the longest length.")
    if unscored := prepared.plan.notes.get("unscored"):
        notes.append(f"{unscored} rows have no score and stand where 'unscored' puts them.")
    if (unused := prepared.plan.notes.get("unused_scores", 0) - set_aside) > 0:
        notes.append(f"{unused} scores are of rows that the data does not have.")
    return notes
