"""The cells of an ablation: the outcome of every arm, on every demonstration set, for every test item.

Contract: a `Cell` is the results of one task, selector and k, with or without contextual calibration. All of its arms have the
same demonstrations and items, so they can be compared pairwise. Everything is checked on construction. No model is needed.

Shapes: S demonstration sets, Q test items, L labels (0 for generated answers), R random orders of every set, k demonstrations,
A arms.
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
    """One way to order the demonstrations, with its outcomes.

    Args:
        name: the name of the orderer, criterion or oracle. Random orders may share a name.
        kind: "random" for one of the R random orders; "named" for an orderer; "chosen" for a criterion, which chooses a random
            order with the model's help; "oracle" for a choice by the test labels.
        order: (S, k), the permutation of each set's demonstrations, first to last; None if it depends on the query.
        log_p: (S, Q, L) score of each label, in nats, after contextual calibration if the cell has it.
        predicted: (S, Q) index of the predicted label; -1 for generated answers.
        correct: (S, Q) whether the answer was right.
        tokens: (S,) tokens that the model reads to answer one query; shared prefixes are divided among their queries.
        choosing_tokens: (S,) further tokens that the model reads to choose the set's order; 0 for an orderer.
        order_of_item: (S, Q, k) the order for each item, if `order` is None and this is known.

    Raises:
        SparsortError: a shape, an order or a number is invalid.
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
        # A frozen dataclass can be changed only like this, even by its own `__post_init__`.
        object.__setattr__(self, "log_p", _array(self.log_p, np.float64, where, "log_p"))
        if self.log_p.ndim != 3:
            raise SparsortError(f"{where}: log_p has the shape {self.log_p.shape}, expected (sets, items, labels).")
        sets, items, labels = self.log_p.shape
        if np.isnan(self.log_p).any():
            raise SparsortError(f"{where}: log_p has NaN. Score every label of every item, or omit the arm.")
        for name, kind, shape in (
            ("predicted", np.int64, (sets, items)),
            ("correct", np.bool_, (sets, items)),
            ("tokens", np.float64, (sets,)),
            ("choosing_tokens", np.float64, (sets,)),
        ):
            array = _array(getattr(self, name), kind, where, name)
            if array.shape != shape:
                raise SparsortError(f"{where}: {name} has the shape {array.shape}, expected {shape} as in log_p.")
            object.__setattr__(self, name, array)
        # Without labels, the only valid prediction is -1.
        low, high = (0, labels) if labels else (-1, 0)
        if self.predicted.size and not (low <= self.predicted.min() and self.predicted.max() < high):
            raise SparsortError(
                f"{where}: predicted ranges from {self.predicted.min()} to {self.predicted.max()}, expected "
                + (f"0 to {labels - 1}, a label's index." if labels else "-1 throughout, as answers are generated.")
            )
        for name in ("tokens", "choosing_tokens"):
            counts_S = getattr(self, name)
            if not (np.isfinite(counts_S).all() and (counts_S >= 0).all()):
                raise SparsortError(f"{where}: {name} must be finite and not negative, got {counts_S.tolist()}.")
        self._check_orders(where, sets, items)

    def _check_orders(self, where: str, sets: int, items: int) -> None:
        if self.order is not None:
            if len(self.order) != sets or any(sorted(order) != list(range(len(order))) for order in self.order):
                raise SparsortError(f"{where}: order must be one permutation of 0 … k-1 for each of the {sets} sets.")
            if self.order_of_item is not None:
                raise SparsortError(f"{where}: give order (one per set) or order_of_item (one per item), not both.")
        if self.order_of_item is not None:
            orders_SQk = _array(self.order_of_item, np.int64, where, "order_of_item")
            if orders_SQk.ndim != 3 or orders_SQk.shape[:2] != (sets, items):
                raise SparsortError(
                    f"{where}: order_of_item has the shape {orders_SQk.shape}, expected ({sets}, {items}, k)."
                )
            identity = np.broadcast_to(np.arange(orders_SQk.shape[2]), orders_SQk.shape)
            if not np.array_equal(np.sort(orders_SQk, axis=2), identity):
                raise SparsortError(f"{where}: order_of_item must contain permutations of 0 … k-1.")
            object.__setattr__(self, "order_of_item", orders_SQk)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(S,) share of the items that are answered correctly."""
        return np.asarray(self.correct.mean(axis=1), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """One demonstration set.

    Args:
        seed: the seed with which it was drawn.
        demo_ids: k ids in the selector's order, which an arm's `order` permutes; empty if demonstrations differ by item.
        demo_labels: k labels or answers, or empty.
        demo_tokens: k lengths in tokens, or empty.
        prompt: the whole prompt of the first test item under the first random order, for inspection.
    """

    seed: int
    demo_ids: list[str]
    demo_labels: list[str]
    demo_tokens: list[int]
    prompt: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """The results of one task, selector and k, with or without contextual calibration (arXiv 2102.09690).

    Args:
        task, selector: names.
        k: the number of demonstrations in a prompt.
        contextual: whether log_p is contextually calibrated.
        labels: L label names; empty for generated answers.
        items: Q ids of the test rows.
        gold: Q labels or answers.
        sets: S demonstration sets.
        random: R arms of kind "random"; arm r has the r-th random order of every set.
        arms: all other arms, including oracles; their names are distinct.
        demo_ids_of_item: (S, Q, k) ids, for selectors that choose demonstrations by the query.
        demo_texts: id → text of each demonstration, question and answer, for inspection; may be empty.
        item_texts: Q questions, or empty.

    Raises:
        SparsortError: the parts do not fit together.
    """

    task: str
    selector: str
    k: int
    contextual: bool
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
        for name, values in (("labels", self.labels), ("items", self.items)):
            if len(set(values)) != len(values):
                raise SparsortError(f"{where}: {name} are not distinct.")
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
        for number, info in enumerate(self.sets):
            if len(info.demo_ids) != (0 if by_item else self.k):
                raise SparsortError(
                    f"{where}: set {number} names {len(info.demo_ids)} demonstrations, expected {self.k}"
                    + (" by item in demo_ids_of_item, and none in the set." if by_item else ".")
                )
            for name in ("demo_labels", "demo_tokens"):
                if len(getattr(info, name)) not in (0, self.k):
                    raise SparsortError(
                        f"{where}: set {number} has {len(getattr(info, name))} {name}, expected {self.k} or none."
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
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise SparsortError(f"{where}: two arms have the same name ({', '.join(repeated)}); give each its own.")
        if any(arm.kind != "random" for arm in self.random) or any(arm.kind == "random" for arm in self.arms):
            raise SparsortError(f"{where}: arms of kind 'random' belong in `random`, all others in `arms`.")
        shape = (len(self.sets), len(self.items), len(self.labels))
        gold = None
        if self.labels:
            index_of = {label: index for index, label in enumerate(self.labels)}
            unknown = sorted({answer for answer in self.gold if answer not in index_of})
            if unknown:
                raise SparsortError(
                    f"{where}: gold answers {unknown[:5]} are not among the labels {self.labels}. Use the names of the labels."
                )
            gold = np.array([index_of[answer] for answer in self.gold])
        for arm in (*self.random, *self.arms):
            if arm.log_p.shape != shape:
                raise SparsortError(
                    f"{where}: arm {arm.name!r} has {arm.log_p.shape} outcomes, expected {shape} (sets, items, labels)."
                )
            # An order that depends on the query may be unknown, in which case there is nothing to check.
            orders = [len(order) for order in arm.order or []]
            orders += [arm.order_of_item.shape[2]] if arm.order_of_item is not None else []
            if any(length != self.k for length in orders):
                raise SparsortError(f"{where}: arm {arm.name!r} orders {orders[0]} demonstrations, expected {self.k}.")
            # Generated answers are judged as text, so only predictions of labels can be compared with gold.
            if gold is not None and not np.array_equal(arm.correct, arm.predicted == gold):
                raise SparsortError(f"{where}: in arm {arm.name!r}, correct differs from predicted == gold.")

    @property
    def key(self) -> tuple[str, str, int, bool]:
        """Task, selector, k and contextual calibration, which identify the cell."""
        return (self.task, self.selector, self.k, self.contextual)

    @property
    def title(self) -> str:
        """A name for the cell in messages."""
        return f"{self.task}, {self.selector}, k = {self.k}{', contextually calibrated' if self.contextual else ''}"

    @property
    def random_correct(self) -> NDArray[np.bool_]:
        """(R, S, Q) whether each answer under each random order was right."""
        return np.stack([arm.correct for arm in self.random])

    def arm(self, name: str) -> Arm:
        """The arm with this name.

        Raises:
            SparsortError: there is no such arm.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise unknown_choice("arm", name, [arm.name for arm in self.arms])


def _array(value: Any, kind: type[np.generic], where: str, name: str) -> NDArray[Any]:
    array = np.asarray(value)
    # An empty list has the dtype float64, whatever it is a list of.
    if not (array.dtype == kind or array.size == 0 or np.can_cast(array.dtype, kind, casting="same_kind")):
        raise SparsortError(f"{where}: {name} is {array.dtype}, expected {kind.__name__}.")
    return array.astype(kind, copy=False)


def arrays_of(arms: Sequence[Arm]) -> dict[str, NDArray[Any]]:
    """The arrays of some arms of one cell, stacked over arms: (A, S, Q, L), (A, S, Q), (A, S)."""
    return {name: np.stack([getattr(arm, name) for arm in arms]) for name in _ARRAYS}
