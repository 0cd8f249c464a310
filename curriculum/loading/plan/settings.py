"""The settings of a curriculum: one frozen, validated configuration.

Contract: the settings are exactly those that determine the sequence of batches, so two plans over the same scores with equal
settings are the same plan. Combinations without a meaning are refused on construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from sparsort.conditions import ALWAYS, Table, When, among, excludes, refuse_unread_fields
from sparsort.errors import SparsortError, unknown_choice
from sparsort.options import option, shares

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.pacing import Pacing

ORDER_PANEL = "Order"
BATCH_PANEL = "Batches"
POOL_PANEL = "Pool mode"

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
    why="one pass shows each example once",
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
# The conditions under which each setting is read; see `sparsort.conditions`. Seeds and limits may always be given.
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


class CurriculumOptions(TypedDict, total=False):
    """The fields of `CurriculumSettings`, where a function takes them as keywords; a pacing may be given as text."""

    batch_size: int | None
    token_budget: int | None
    mode: Mode
    schedule: Schedule
    direction: Direction
    pacing: Pacing | str | None
    stages: int | None
    folds: int
    warm_up: float | None
    later_epochs: Later
    steps: int | None
    quotas: Mapping[str, float] | None
    group_by_length: bool
    max_length: int | None
    packing: Packing
    pack_length: int | None
    unscored: Unscored
    seed: int


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings:
    """How examples are ordered, cut into batches and repeated.

    Attributes:
        batch_size: examples (or packed sequences) of a global batch: per device × accumulation × devices. The sizes of the
            batches of an epoch differ by at most one.
        token_budget: tokens of a global batch, including its padding (longest × count); replaces `batch_size`.
        mode: "one_pass" shows each example once per epoch; "pool" draws each batch from the share that `pacing` allows.
        schedule: one pass only. "sorted"; "folded", sorted[k::folds] for each k < folds in turn; "interleaved", one example
            from each of `folds` levels in turn; "shuffle", a plain shuffle as the control; "as_given", the order of the rows.
        direction: "easy_to_hard"; "hard_to_easy", the same order reversed; "random", a random order with the same pacing,
            stages and sizes.
        pacing: the share of the examples that is available at each step of training. Required in pool mode.
        stages: number of parts of an epoch. In one pass, the sorted order is shuffled within each stage. In a pool, an online
            difficulty can re-plan at the edge of each stage; the default is 10.
        folds: number of folds of "folded", or of levels of "interleaved".
        warm_up: one pass only: share of an epoch after which the unseen examples come in random order.
        later_epochs: one pass only: epochs after the first one "repeat" the curriculum, or "shuffle" the data.
        steps: pool only: number of batches in an epoch.
        quotas: pool only: share of each group in every batch; the shares sum to 1. By default groups keep their share of the
            data.
        group_by_length: whether examples of similar length share a batch, within their stage.
        max_length: number of tokens at which an example is cut.
        packing: "next_fit" packs consecutive examples together while they fit in `pack_length`, which keeps their order;
            "best_fit" wastes less, but reorders examples within windows of 1024; bins are in the order of their first example.
        pack_length: tokens of a packed sequence.
        unscored: position of rows without a score in "easy_to_hard"; "error" refuses them.
        seed: seed for every random draw.
        stored: whether the settings come from a saved plan; a setting that has no effect is then accepted.

    Raises:
        SparsortError: an unknown choice, a number out of range, a missing setting that another one needs, or a setting that
            has no effect (`READ_BY`).
    """

    batch_size: int | None = option(
        None, "Examples of a global batch: per device × accumulation × devices.", panel=BATCH_PANEL
    )
    token_budget: int | None = option(
        None,
        "Tokens of a global batch, including padding, instead of --batch-size.",
        panel=BATCH_PANEL,
        flag="--batch-tokens",
        retired=("--token-budget",),
    )
    mode: Mode = option(
        "one_pass", "one_pass: each example once per epoch; pool: drawn from the available share.", panel=ORDER_PANEL
    )
    schedule: Schedule = option("sorted", "sorted, folded, interleaved, shuffle or as_given.", panel=ORDER_PANEL)
    direction: Direction = option("easy_to_hard", "easy_to_hard, hard_to_easy or random.", panel=ORDER_PANEL)
    pacing: Pacing | None = option(
        None,
        "Share available over training, such as root:start=0.2,until=0.5.",
        panel=ORDER_PANEL,
        kind=str | None,
    )
    stages: int | None = option(None, "Parts of an epoch; the rows of each are shuffled.", panel=ORDER_PANEL)
    folds: int = option(4, "Folds of folded, or levels of interleaved.", panel=ORDER_PANEL)
    warm_up: float | None = option(None, "Share of an epoch after which the rest is shuffled.", panel=ORDER_PANEL)
    later_epochs: Later = option("repeat", "repeat the curriculum, or shuffle.", panel=ORDER_PANEL)
    steps: int | None = option(None, "Number of batches in an epoch.", panel=POOL_PANEL)
    quotas: Mapping[str, float] | None = option(
        None,
        "GROUP=0.7: the share of a group in every batch; once per group.",
        panel=POOL_PANEL,
        flag="--quota",
        kind=list[str] | None,
        read=shares("--quota"),
    )
    group_by_length: bool = option(False, "Similar lengths share a batch, within a stage.", panel=BATCH_PANEL)
    max_length: int | None = option(
        None,
        "Tokens at which a row is cut.",
        panel=BATCH_PANEL,
        flag="--cut-length",
        retired=("--max-length",),
    )
    packing: Packing = option("none", "none, next_fit (keeps the order) or best_fit.", panel=BATCH_PANEL)
    pack_length: int | None = option(None, "Tokens of a packed sequence.", panel=BATCH_PANEL)
    unscored: Unscored = option("last", "Rows without a score: last, first or error.", panel=ORDER_PANEL)
    seed: int = option(0, "Seed for every random draw.", panel=ORDER_PANEL)
    stored: InitVar[bool] = False

    def __post_init__(self, stored: bool) -> None:
        from sparsort.curriculum.loading.plan.pacing import Pacing

        for field in fields(self):
            value = getattr(self, field.name)
            # Convert NumPy scalars to Python numbers, which can be written as JSON and compare equal after reading.
            if getattr(value, "ndim", None) == 0:
                object.__setattr__(self, field.name, value.item())
        if isinstance(self.quotas, Mapping):
            # NumPy scalars have `item`, and Python's numbers are kept as they are.
            plain = {
                str(name): share.item() if hasattr(share, "item") else share for name, share in self.quotas.items()
            }
            object.__setattr__(self, "quotas", plain)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_choice(name.replace("_", " "), getattr(self, name), choices)
        if (self.batch_size is None) == (self.token_budget is None):
            raise SparsortError(
                f"a batch is measured either in examples or in tokens: got batch_size={self.batch_size} (--batch-size) and "
                f"token_budget={self.token_budget} (--batch-tokens). Give exactly one, such as batch_size=32."
            )
        for name in ("batch_size", "token_budget", "stages", "folds", "steps", "max_length", "pack_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                flag = {"max_length": " (--cut-length)", "token_budget": " (--batch-tokens)"}.get(name, "")
                raise SparsortError(f"{name}{flag} must be a whole number of at least 1, not {value!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise SparsortError(f"seed must be a whole number, not {self.seed!r}.")
        if not isinstance(self.pacing, Pacing | None):
            raise SparsortError(
                f"pacing must be a Pacing or its text, such as 'linear:start=0.2,until=0.8', not {self.pacing!r}."
            )
        # A plan from an older version may contain a setting that this version does not read.
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

    def describe(self) -> str:
        """Describe the curriculum in one line, without the settings that have their defaults."""
        pool = self.mode == "pool"
        parts = ["pool" if pool else self.schedule.replace("_", " ")]
        if self.schedule in ("folded", "interleaved"):
            parts[0] += f" {self.folds}"
        if self.schedule not in ("shuffle", "as_given"):
            parts.append("random order" if self.direction == "random" else self.direction.replace("_", " "))
        if self.pacing is not None:
            parts.append(str(self.pacing))
        if self.stages is not None:
            parts.append(f"{self.stages} stages")
        if self.warm_up is not None:
            parts.append(f"warm-up {100 * self.warm_up:g} %")
        if self.group_by_length:
            parts.append("by length")
        if self.packing != "none":
            parts.append(f"packed {self.packing.replace('_', ' ')} in {self.pack_length}")
        if self.later_epochs == "shuffle":
            parts.append("later epochs shuffled")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, which `from_json` reads."""
        return {**asdict(self), "pacing": None if self.pacing is None else str(self.pacing)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, stored: bool = False) -> CurriculumSettings:
        """Settings from a mapping of names to values; a pacing may be text, such as "root:start=0.2".

        Args:
            value: setting → value.
            stored: see the class.

        Raises:
            SparsortError: an unknown setting, or as on construction.
        """
        from sparsort.curriculum.loading.plan.pacing import Pacing

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
                    "pool mode needs a pacing, which is the share to draw from, such as pacing='linear:start=0.1' "
                    "(--pacing linear:start=0.1), and steps, the number of batches, such as steps=1000 (--steps 1000 of "
                    "sparsort plan)."
                )
            return
        if self.pacing is not None and self.stages is None:
            raise SparsortError(
                "one pass with a pacing needs stages, the number of times the pacing is evaluated in an epoch, "
                "such as stages=100."
            )
        if self.group_by_length and self.stages is None:
            raise SparsortError(
                "group_by_length reorders within a stage, and there are no stages. Give stages, such as stages=10."
            )
        if self.warm_up is not None and not (isinstance(self.warm_up, float | int) and 0 < self.warm_up < 1):
            raise SparsortError(f"warm_up must be a share of an epoch, between 0 and 1, not {self.warm_up!r}.")

    def _check_lengths(self) -> None:
        if (self.packing != "none") != (self.pack_length is not None):
            raise SparsortError(
                f"packing={self.packing!r} with pack_length={self.pack_length}: packing needs both, such as "
                "packing='next_fit', pack_length=2048."
            )
        if self.packing != "none" and self.token_budget is not None:
            raise SparsortError(
                "packed sequences all have pack_length tokens: give batch_size, not token_budget (--batch-tokens)."
            )
        limit = self.pack_length or self.token_budget
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise SparsortError(
                f"max_length={self.max_length} is above the {limit} tokens that one batch or packed sequence holds. "
                f"Choose max_length ≤ {limit} (--cut-length)."
            )

    def _check_quotas(self) -> None:
        if self.quotas is None:
            return
        shares = list(self.quotas.values()) if isinstance(self.quotas, Mapping) else []
        numbers = all(isinstance(share, float | int) and 0 < share <= 1 for share in shares)
        if not shares or not numbers or abs(sum(shares) - 1) > 1e-6:
            raise SparsortError(
                f"quotas must be shares above 0 that sum to 1, such as web=0.7, code=0.3; got {self.quotas!r}."
            )
        if self.batch_size is None:
            raise SparsortError(
                "quotas are counted in examples per batch: give batch_size, not token_budget (--batch-tokens)."
            )
