"""What a curriculum is: one frozen, checked configuration.

Contract: every setting that decides the sequence of batches is here, and nothing else is; two plans over the same
scores with equal settings are the same plan. Combinations that have no meaning are refused on construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from sparsort.conditions import ALWAYS, Table, When, among, excludes, refuse_unread_fields
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.errors import SparsortError, unknown_choice

Mode = Literal["one_pass", "pool"]
Schedule = Literal["sorted", "folded", "interleaved", "shuffle", "as_given"]
Direction = Literal["easy_to_hard", "hard_to_easy", "random"]
Later = Literal["repeat", "shuffle"]
Unscored = Literal["last", "first", "error"]
Packing = Literal["none", "next_fit", "best_fit"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "schedule": get_args(Schedule),
    "direction": get_args(Direction),
    "later_epochs": get_args(Later),
    "unscored": get_args(Unscored),
    "packing": get_args(Packing),
}


_ONE_PASS = When(holds=lambda v: v["mode"] != "pool", why="pool mode draws every batch by itself")
_POOL = When(
    holds=lambda v: v["mode"] != "one_pass",
    why="one pass shows each example once, as often as the data has it",
    instead={"mode": "pool"},
)
_SORTED = When(
    holds=lambda v: v["schedule"] not in ("folded", "interleaved", "shuffle", "as_given"),
    why="{schedule} has its own order",
    instead={"schedule": "sorted"},
)
RANKED = When(
    holds=lambda v: v["schedule"] not in ("shuffle", "as_given"),
    why="{schedule} has no easy and hard end",
    instead={"schedule": "sorted"},
)
# What every setting needs to be read; see `sparsort.conditions`. Seeds and limits may be given where nothing is drawn or cut.
READ_BY: Table = {
    "batch_size": ALWAYS,
    "token_budget": ALWAYS,
    "mode": ALWAYS,
    "schedule": (_ONE_PASS,),
    "direction": (RANKED,),
    "pacing": (_SORTED,),
    "stages": (_SORTED,),
    "folds": (among("schedule", ("folded", "interleaved"), of=get_args(Schedule)),),
    "warm_up": (_ONE_PASS, RANKED),
    "later_epochs": (
        _ONE_PASS,
        When(holds=lambda v: v["schedule"] != "as_given", why="{schedule} has no easy and hard end"),
    ),
    "steps": (_POOL,),
    "quotas": (_POOL,),
    "group_by_length": (
        _ONE_PASS,
        _SORTED,
        excludes("warm_up", "after {warm_up} there are no stages to group lengths in"),
    ),
    "max_length": ALWAYS,
    "packing": (_ONE_PASS,),
    "pack_length": ALWAYS,
    "unscored": (
        When(
            holds=lambda v: v["unscored"] == "error" or (RANKED.holds(v) and v["direction"] != "random"),
            why="{schedule} with {direction} does not look at scores",
        ),
    ),
    "seed": ALWAYS,
}


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings:
    """How examples are ordered, cut into batches and repeated.

    Attributes:
        batch_size: examples (or packed sequences) of a global batch: per device × accumulation × devices. Batches of
            an epoch differ by at most one.
        token_budget: instead of `batch_size`: tokens of a global batch, its padding included (longest × count).
        mode: "one_pass", each example once an epoch; "pool", each batch drawn from the share that `pacing` allows.
        schedule: one pass only. "sorted"; "folded", sorted[k::folds] one after the other for k < folds;
            "interleaved", one example of each of `folds` levels in turn; "shuffle", the plain control; "as_given", the
            order of the rows.
        direction: "easy_to_hard"; "hard_to_easy", the same order reversed; "random", a random order under the same
            pacing, stages and sizes.
        pacing: share of the examples that is available as training goes on. Needed in pool mode.
        stages: pieces of an epoch. One pass: the sorted order is shuffled within each. Pool: where an online
            difficulty may re-plan, 10 unless given.
        folds: of "folded" and "interleaved".
        warm_up: one pass only: after this share of an epoch, what is unseen comes shuffled.
        later_epochs: one pass only: the second epoch and on repeat the curriculum, or are plain shuffles.
        steps: pool only: batches of an epoch.
        quotas: pool only: share of each group in every batch; they sum to 1. Without, groups keep their share of the data.
        group_by_length: examples of like length share a batch, within their stage.
        max_length: tokens at which an example is cut.
        packing: "next_fit" puts consecutive examples together as long as they fit in `pack_length` and keeps their
            order; "best_fit" fills better, out of order within a window of 1024, its bins in the order of their first.
        pack_length: tokens of a packed sequence.
        unscored: where rows without a score stand in "easy_to_hard".
        seed: of every draw.
        stored: the settings come from a plan that was saved, where one that is not read is kept as it is.

    Raises:
        SparsortError: an unknown choice, a number out of range, settings that need others, or one that is not read (`READ_BY`).
    """

    batch_size: int | None = None
    token_budget: int | None = None
    mode: Mode = "one_pass"
    schedule: Schedule = "sorted"
    direction: Direction = "easy_to_hard"
    pacing: Pacing | None = None
    stages: int | None = None
    folds: int = 4
    warm_up: float | None = None
    later_epochs: Later = "repeat"
    steps: int | None = None
    quotas: Mapping[str, float] | None = None
    group_by_length: bool = False
    max_length: int | None = None
    packing: Packing = "none"
    pack_length: int | None = None
    unscored: Unscored = "last"
    seed: int = 0
    stored: InitVar[bool] = False

    def __post_init__(self, stored: bool) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.integer | np.floating):
                object.__setattr__(self, field.name, value.item())
        if isinstance(self.quotas, Mapping):
            plain = {
                str(name): getattr(share, "item", lambda share=share: share)() for name, share in self.quotas.items()
            }
            object.__setattr__(self, "quotas", plain)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_choice(name.replace("_", " "), getattr(self, name), choices)
        if (self.batch_size is None) == (self.token_budget is None):
            raise SparsortError(
                f"a batch is measured by examples or by tokens: got batch_size={self.batch_size} and "
                f"token_budget={self.token_budget}. Give exactly one, such as batch_size=32."
            )
        for name in ("batch_size", "token_budget", "stages", "folds", "steps", "max_length", "pack_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SparsortError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise SparsortError(f"seed must be a whole number, not {self.seed!r}.")
        if not isinstance(self.pacing, Pacing | None):
            raise SparsortError(
                f"pacing must be a Pacing or its text, such as 'linear:start=0.2,until=0.8', not {self.pacing!r}."
            )
        if not stored:
            refuse_unread_fields(self, READ_BY)
        self._check_mode()
        self._check_lengths()
        self._check_quotas()

    @property
    def needs_lengths(self) -> bool:
        return self.token_budget is not None or self.group_by_length or self.packing != "none"

    @property
    def n_stages(self) -> int:
        return self.stages or (10 if self.mode == "pool" else 1)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reads them back."""
        return {**asdict(self), "pacing": None if self.pacing is None else str(self.pacing)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, stored: bool = False) -> CurriculumSettings:
        """Settings by name; a pacing may be given as text, such as "root:start=0.2". `stored`: see the class."""
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise unknown_choice("setting", name, names)
        pacing = value.get("pacing")
        if isinstance(pacing, str):
            pacing = Pacing.parse(pacing, stored=stored)
        return cls(**{**value, "pacing": pacing}, stored=stored)

    def _check_mode(self) -> None:
        if self.mode == "pool":
            if self.pacing is None or self.steps is None:
                raise SparsortError(
                    "pool mode needs a pacing, the share to draw from, such as pacing='linear:start=0.1' "
                    "(--pacing linear:start=0.1), and steps, batches to draw, such as steps=1000 (--steps 1000 of sparsort plan)."
                )
            return
        if self.pacing is not None and self.stages is None:
            raise SparsortError(
                "one pass with a pacing needs stages, the number of times the pacing is looked at in an epoch, "
                "such as stages=100."
            )
        if self.group_by_length and self.stages is None:
            raise SparsortError(
                "group_by_length reorders within a stage, and there are no stages. Give stages, such as stages=10."
            )
        if self.warm_up is not None and not (isinstance(self.warm_up, float | int) and 0 < self.warm_up < 1):
            raise SparsortError(f"warm_up is the share of an epoch, between 0 and 1, not {self.warm_up!r}.")

    def _check_lengths(self) -> None:
        if (self.packing != "none") != (self.pack_length is not None):
            raise SparsortError(
                f"packing={self.packing!r} with pack_length={self.pack_length}: packing needs both, such as "
                "packing='next_fit', pack_length=2048."
            )
        if self.packing != "none" and self.token_budget is not None:
            raise SparsortError("packed sequences all have pack_length tokens: give batch_size, not token_budget.")
        limit = self.pack_length or self.token_budget
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise SparsortError(
                f"max_length={self.max_length} is above the {limit} tokens that one batch or packed sequence holds. "
                f"Choose max_length ≤ {limit}."
            )

    def _check_quotas(self) -> None:
        if self.quotas is None:
            return
        shares = list(self.quotas.values()) if isinstance(self.quotas, Mapping) else []
        numbers = all(isinstance(share, float | int) and 0 < share <= 1 for share in shares)
        if not shares or not numbers or abs(sum(shares) - 1) > 1e-6:
            raise SparsortError(
                f"quotas are shares above 0 that sum to 1, such as web=0.7, code=0.3; got {self.quotas!r}."
            )
        if self.batch_size is None:
            raise SparsortError("quotas count examples of a batch: give batch_size, not token_budget.")
