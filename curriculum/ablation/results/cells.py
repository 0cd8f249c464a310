"""The cells of an ablation: for every order tried, on every demonstration set, the outcome on every test item.

Contract: a `Group` is one cell of task × selector × k × contextual calibration; everything inside it shares demonstrations and
items, so its arms can be compared pairwise. All of it is checked on construction and knows no model.

Shapes: S demonstration sets, Q test items, L labels (0 for generated answers), R random orders of every set, k demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice

ArmKind = Literal["random", "named", "chosen", "oracle"]

ARM_KINDS: tuple[str, ...] = get_args(ArmKind)
_ARRAYS = ("log_p", "predicted", "correct", "tokens", "choosing_tokens")


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One way to order the demonstrations, and what came of it.

    Args:
        name: of the orderer; random orders may share one.
        kind: "random": one of the R random orders; "named": a rule on the demonstrations, or on them and the query;
            "chosen": picked with the model in the loop; "oracle": picked with the test labels.
        order: (S, k), a permutation of the set's demonstrations, first to last; None when it depends on the query.
        log_p: (S, Q, L) score of each label, in nats, contextual calibration included where the group has it.
        predicted: (S, Q) index of the predicted label; -1 for generated answers.
        correct: (S, Q) whether the answer was right.
        tokens: (S,) tokens that the model read to answer one query, shared prefixes counted once.
        choosing_tokens: (S,) further tokens read to choose the set's order; 0 for a rule.
        order_of_item: (S, Q, k) the order that each item saw, where `order` is None and this is known.

    Raises:
        SparsortError: a shape, an order or a number that does not fit.
    """

    name: str
    kind: ArmKind
    order: list[list[int]] | None
    log_p: NDArray[np.float64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    tokens: NDArray[np.float64]
    choosing_tokens: NDArray[np.float64]
    order_of_item: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ARM_KINDS:
            raise unknown_choice("kind of arm", self.kind, ARM_KINDS)
        where = f"arm {self.name!r}"
        if not self.name:
            raise SparsortError("an arm has no name. Give it the name of its orderer.")
        object.__setattr__(self, "log_p", _array(self.log_p, np.float64, where, "log_p"))
        if self.log_p.ndim != 3:
            raise SparsortError(f"{where}: log_p has the shape {self.log_p.shape}, expected (sets, items, labels).")
        sets, items, labels = self.log_p.shape
        if np.isnan(self.log_p).any():
            raise SparsortError(f"{where}: log_p has NaN. Score every label of every item, or leave the arm out.")
        for name, kind, shape in (
            ("predicted", np.int64, (sets, items)),
            ("correct", np.bool_, (sets, items)),
            ("tokens", np.float64, (sets,)),
            ("choosing_tokens", np.float64, (sets,)),
        ):
            found = _array(getattr(self, name), kind, where, name)
            if found.shape != shape:
                raise SparsortError(f"{where}: {name} has the shape {found.shape}, expected {shape} as log_p says.")
            object.__setattr__(self, name, found)
        low, high = (0, labels) if labels else (-1, 0)
        if self.predicted.size and not (low <= self.predicted.min() and self.predicted.max() < high):
            raise SparsortError(
                f"{where}: predicted has {self.predicted.min()} to {self.predicted.max()}, expected "
                + (f"0 to {labels - 1}, a label's index." if labels else "-1 throughout, as answers are generated.")
            )
        for name in ("tokens", "choosing_tokens"):
            found = getattr(self, name)
            if not (np.isfinite(found).all() and (found >= 0).all()):
                raise SparsortError(f"{where}: {name} must be finite and not negative, got {found.tolist()}.")
        self._check_orders(where, sets, items)

    def _check_orders(self, where: str, sets: int, items: int) -> None:
        if self.order is not None:
            if len(self.order) != sets or any(sorted(order) != list(range(len(order))) for order in self.order):
                raise SparsortError(f"{where}: order must be one permutation of 0 … k-1 for each of the {sets} sets.")
            if self.order_of_item is not None:
                raise SparsortError(f"{where}: give order (one a set) or order_of_item (one an item), not both.")
        if self.order_of_item is not None:
            found = _array(self.order_of_item, np.int64, where, "order_of_item")
            if found.ndim != 3 or found.shape[:2] != (sets, items):
                raise SparsortError(
                    f"{where}: order_of_item has the shape {found.shape}, expected ({sets}, {items}, k)."
                )
            if not np.array_equal(np.sort(found, axis=2), np.broadcast_to(np.arange(found.shape[2]), found.shape)):
                raise SparsortError(f"{where}: order_of_item must hold permutations of 0 … k-1.")
            object.__setattr__(self, "order_of_item", found)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(S,) share of the items answered right, by demonstration set."""
        return np.asarray(self.correct.mean(axis=1), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """One demonstration set.

    Args:
        seed: that it was drawn with.
        demo_ids: k ids in the given order, which an arm's `order` counts from; empty where demonstrations differ by item.
        demo_labels: k labels or answers, or empty.
        demo_tokens: k lengths in tokens, or empty.
        prompt: the whole prompt of the first test item under the first random order, to inspect.
    """

    seed: int
    demo_ids: list[str]
    demo_labels: list[str]
    demo_tokens: list[int]
    prompt: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One cell of task × selector × k × contextual calibration (arXiv 2102.09690).

    Args:
        task, selector: names.
        k: demonstrations in a prompt.
        calibrated: whether contextual calibration is in log_p.
        labels: L label names; empty for generated answers.
        items: Q ids of the test rows.
        gold: Q labels or answers.
        sets: S demonstration sets.
        random: R arms of kind "random"; arm r holds every set's r-th random order.
        arms: every other arm, oracles included; names differ.
        demo_ids_of_item: (S, Q, k) ids, for selectors that choose demonstrations by the query.
        demo_texts: id to text of every demonstration, question and answer, to inspect; empty where it is not kept.
        item_texts: Q questions, or empty.

    Raises:
        SparsortError: parts that do not fit together.
    """

    task: str
    selector: str
    k: int
    calibrated: bool
    labels: list[str]
    items: list[str]
    gold: list[str]
    sets: list[SetInfo]
    random: list[Arm]
    arms: list[Arm]
    demo_ids_of_item: list[list[list[str]]] | None = None
    demo_texts: dict[str, str] = field(default_factory=dict)
    item_texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        where = f"results of {self.title}"
        if self.k < 1:
            raise SparsortError(f"{where}: k is {self.k}, expected at least 1 demonstration.")
        for name, listed in (("labels", self.labels), ("items", self.items)):
            if len(set(listed)) != len(listed):
                raise SparsortError(f"{where}: {name} are not distinct; two of them could not be told apart.")
        if not self.items or len(self.gold) != len(self.items):
            raise SparsortError(
                f"{where}: {len(self.items)} items with {len(self.gold)} gold answers; one each is expected."
            )
        if len(self.item_texts) not in (0, len(self.items)):
            raise SparsortError(
                f"{where}: {len(self.item_texts)} item_texts for {len(self.items)} items; one each is expected, or none."
            )
        if not self.sets or not self.random:
            raise SparsortError(
                f"{where}: {len(self.sets)} demonstration sets and {len(self.random)} random orders; "
                "an arm is compared with random orders of the same sets, so at least one of each is needed."
            )
        self._check_sets(where)
        self._check_arms(where)

    def _check_sets(self, where: str) -> None:
        by_item = self.demo_ids_of_item is not None
        for number, one in enumerate(self.sets):
            expected = {0} if by_item else {self.k}
            if len(one.demo_ids) not in expected:
                raise SparsortError(
                    f"{where}: set {number} names {len(one.demo_ids)} demonstrations, expected {self.k}"
                    + (" by item in demo_ids_of_item, and none in the set." if by_item else ".")
                )
            for name in ("demo_labels", "demo_tokens"):
                if len(getattr(one, name)) not in (0, self.k):
                    raise SparsortError(
                        f"{where}: set {number} has {len(getattr(one, name))} {name}, expected {self.k} or none."
                    )
        if self.demo_ids_of_item is not None:
            shape = (len(self.sets), len(self.items))
            fits = len(self.demo_ids_of_item) == shape[0] and all(
                len(of_set) == shape[1] and all(len(of_item) == self.k for of_item in of_set)
                for of_set in self.demo_ids_of_item
            )
            if not fits:
                raise SparsortError(
                    f"{where}: demo_ids_of_item must be {shape[0]} sets × {shape[1]} items × {self.k} ids."
                )

    def _check_arms(self, where: str) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SparsortError(f"{where}: two arms bear the same name ({', '.join(twice)}); give each its own.")
        if any(arm.kind != "random" for arm in self.random) or any(arm.kind == "random" for arm in self.arms):
            raise SparsortError(f"{where}: arms of kind 'random' belong in `random`, all others in `arms`.")
        shape = (len(self.sets), len(self.items), len(self.labels))
        gold = None
        if self.labels:
            place = {label: index for index, label in enumerate(self.labels)}
            unknown = sorted({answer for answer in self.gold if answer not in place})
            if unknown:
                raise SparsortError(
                    f"{where}: gold answers {unknown[:5]} are none of the labels {self.labels}. Name gold answers as the labels."
                )
            gold = np.array([place[answer] for answer in self.gold])
        for arm in (*self.random, *self.arms):
            if arm.log_p.shape != shape:
                raise SparsortError(
                    f"{where}: arm {arm.name!r} holds {arm.log_p.shape} outcomes, expected {shape} (sets, items, labels)."
                )
            orders = [len(order) for order in arm.order or []]
            orders += [arm.order_of_item.shape[2]] if arm.order_of_item is not None else []
            if any(length != self.k for length in orders):
                raise SparsortError(f"{where}: arm {arm.name!r} orders {orders[0]} demonstrations, expected {self.k}.")
            if gold is not None and not np.array_equal(arm.correct, arm.predicted == gold):
                raise SparsortError(
                    f"{where}: arm {arm.name!r} calls answers right that differ from gold, or the other way round."
                )

    @property
    def key(self) -> tuple[str, str, int, bool]:
        """What tells this cell from every other: task, selector, k, calibrated."""
        return (self.task, self.selector, self.k, self.calibrated)

    @property
    def title(self) -> str:
        """The cell in words, as errors name it."""
        return f"{self.task}, {self.selector}, k = {self.k}{', contextually calibrated' if self.calibrated else ''}"

    @property
    def random_correct(self) -> NDArray[np.bool_]:
        """(R, S, Q) outcomes of the random orders."""
        return np.stack([arm.correct for arm in self.random])

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            SparsortError: there is none.
        """
        for one in self.arms:
            if one.name == name:
                return one
        raise unknown_choice("arm", name, [one.name for one in self.arms])


def _array(value: Any, kind: type[np.generic], where: str, name: str) -> NDArray[Any]:
    found = np.asarray(value)
    if not (found.dtype == kind or found.size == 0 or np.can_cast(found.dtype, kind, casting="same_kind")):
        raise SparsortError(f"{where}: {name} is {found.dtype}, expected {kind.__name__}.")
    return found.astype(kind, copy=False)


def arrays_of(arms: Sequence[Arm]) -> dict[str, NDArray[Any]]:
    """The arrays of arms of one group, stacked over arms: (A, S, Q, L), (A, S, Q), (A, S)."""
    return {name: np.stack([getattr(arm, name) for arm in arms]) for name in _ARRAYS}
