"""Results whose truth is known, for tests of the report and the statistics without a model.

Contract: arm a has on average exactly `effect[a] · scale[task]` more accuracy than the mean random order, up to clipping far from
the rates used here. Items are hard or easy for every order alike, sets and orders differ, and a poor order leans on one
label, as real ones do. Equal arguments give equal results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, ndtr

from sparsort.curriculum.ablation.results.cells import Arm, ArmKind, Cell, SetInfo
from sparsort.curriculum.ablation.results.results import Results
from sparsort.errors import SparsortError, unknown_choice


@dataclass(frozen=True, kw_only=True)
class SimulatedTask:
    """A task: its labels with their shares, the mean accuracy, how far orders differ (sd), and the scale of every effect."""

    labels: dict[str, float]
    accuracy: float
    spread: float
    scale: float = 1.0


TASKS: dict[str, SimulatedTask] = {
    "mr": SimulatedTask(labels={"negative": 0.5, "positive": 0.5}, accuracy=0.70, spread=0.10),
    "sst5": SimulatedTask(
        labels={"terrible": 0.13, "bad": 0.29, "okay": 0.18, "good": 0.23, "great": 0.17},
        accuracy=0.36,
        spread=0.06,
        scale=0.6,
    ),
    "trec": SimulatedTask(
        labels={
            "description": 0.27,
            "entity": 0.19,
            "expression": 0.03,
            "human": 0.13,
            "location": 0.16,
            "number": 0.22,
        },
        accuracy=0.44,
        spread=0.06,
        scale=0.8,
    ),
    "rte": SimulatedTask(labels={"True": 0.5, "False": 0.5}, accuracy=0.54, spread=0.03, scale=0.1),
    "cb": SimulatedTask(labels={"True": 0.41, "False": 0.5, "Neither": 0.09}, accuracy=0.52, spread=0.08, scale=0.7),
}

# Arm -> kind, gain in accuracy over the mean random order, tokens read to choose one order (0: a rule).
ARMS: dict[str, tuple[ArmKind, float, float]] = {
    "sparse_to_dense": ("named", 0.020, 0),
    "reverse:sparse_to_dense": ("named", -0.025, 0),
    "easy_to_hard:answer_loss": ("named", 0.0, 0),
    "reverse:easy_to_hard:answer_loss": ("named", 0.0, 0),
    "u_shape": ("named", 0.005, 0),
    "inverted_u": ("named", -0.005, 0),
    "similarity_ascending": ("named", 0.010, 0),
    "perplexity_ascending": ("named", 0.0, 0),
    "length_ascending": ("named", 0.0, 0),
    "length_descending": ("named", 0.0, 0),
    "random_scores": ("named", 0.0, 0),
    "globale": ("chosen", 0.055, 26_000),
    "locale": ("chosen", 0.060, 26_000),
    "pdo": ("chosen", 0.050, 14_000),
    "best_on_dev": ("chosen", 0.070, 34_000),
    "mdl": ("chosen", 0.030, 52_000),
    "density": ("chosen", 0.035, 3_400),
    "density_readout": ("chosen", 0.040, 3_400),
    "oracle_best": ("oracle", 0.0, 0),
    "oracle_worst": ("oracle", 0.0, 0),
}
_BY_QUERY = ("similarity_ascending",)
_WORDS = """a film of rare warmth that never quite finds its feet and yet holds the eye until its last quiet scene while
the camera waits for weather music and light to say what nobody in this small town will put into words"""


def simulate(
    tasks: Sequence[str] = tuple(TASKS),
    *,
    shots: Sequence[int] = (4, 8),
    sets: int = 10,
    orders: int = 16,
    items: int = 256,
    arms: Sequence[str] = tuple(ARMS),
    calibrated: Sequence[bool] = (False, True),
    effects: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Results:
    """Results of an ablation that was never run.

    Args:
        tasks: names in `TASKS`.
        shots: demonstrations in a prompt; one cell each.
        sets: demonstration sets in a cell.
        orders: random orders of every set.
        items: test items in a cell (at most 56 for cb, as that has no more).
        arms: names in `ARMS`.
        calibrated: contextual calibration off, on, or both; it adds 0.03 to the accuracy and halves the spread over orders.
        effects: true gain in accuracy by arm, in place of that of `ARMS`; multiplied by the task's scale.
        seed: of everything.

    Raises:
        SparsortError: an unknown task or arm.
    """
    for name in tasks:
        if name not in TASKS:
            raise unknown_choice("simulated task", name, TASKS)
    for name in (*arms, *(effects or {})):
        if name not in ARMS:
            raise unknown_choice("simulated arm", name, ARMS)
    if min(sets, orders, items, *shots) < 1:
        raise SparsortError(
            f"sets={sets}, orders={orders}, items={items}, shots={list(shots)}: all must be at least 1."
        )
    effect = {name: (effects or {}).get(name, ARMS[name][1]) for name in arms}
    groups = [
        _Cell(name, k, sets, orders, min(items, 56) if name == "cb" else items, on, seed).group(effect)
        for name in tasks
        for k in shots
        for on in calibrated
    ]
    read = sum(float(arm.tokens.sum()) * len(group.items) for group in groups for arm in (*group.random, *group.arms))
    provenance = {
        "model": "simulated",
        "weights": "none",
        "dtype": "float32",
        "device": "none",
        "date": "2000-01-01T00:00:00+00:00",
        "seconds": 0.0,
        "tokens": int(read),
        "seed": seed,
        "true_effects": effect,
    }
    return Results(cells=groups, provenance=provenance)


class _Cell:
    """Draws one group; each random stream depends on the task, k and its use, so that cells pair across calibration."""

    def __init__(self, name: str, k: int, sets: int, orders: int, items: int, calibrated: bool, seed: int) -> None:
        self.name, self.task, self.k, self.calibrated = name, TASKS[name], k, calibrated
        self.S, self.R, self.Q = sets, orders, items
        self.labels = list(self.task.labels)
        self.shared = np.random.default_rng([seed, list(TASKS).index(name), k])
        self.gold_Q = self.shared.choice(len(self.labels), items, p=self._shares())
        self.ease_Q = self.shared.normal(size=items)
        self.base_S = self.task.accuracy + 0.03 * calibrated + 0.03 * self.shared.normal(size=sets)
        self.prefix_S = 12.0 * k + self.shared.integers(0, 6 * k, sets)
        self.demos_Sk = self.shared.choice(len(self.labels), (sets, k), p=self._shares())
        self.own = np.random.default_rng([seed, list(TASKS).index(name), k, 1 + calibrated])

    def _shares(self) -> NDArray[np.float64]:
        share_L = np.array(list(self.task.labels.values()))
        return np.asarray(share_L / share_L.sum(), dtype=np.float64)

    def group(self, effect: Mapping[str, float]) -> Cell:
        random = [self._arm("random", "random", 0.0, 0.0) for _ in range(self.R)]
        score_RS = np.stack([arm.accuracy for arm in random])
        arms = []
        for name, gain in effect.items():
            kind, _, price = ARMS[name]
            if kind == "oracle":
                best_S = score_RS.argmax(axis=0) if name == "oracle_best" else score_RS.argmin(axis=0)
                arms.append(self._picked(name, random, best_S))
            else:
                arms.append(self._arm(name, kind, gain * self.task.scale, price))
        return Cell(
            task=self.name,
            selector="balanced",
            k=self.k,
            contextual=self.calibrated,
            labels=self.labels,
            items=[f"{self.name}-{index}" for index in range(self.Q)],
            gold=[self.labels[index] for index in self.gold_Q],
            sets=[self._set(number) for number in range(self.S)],
            random=random,
            arms=arms,
        )

    def _arm(self, name: str, kind: ArmKind, gain: float, price: float) -> Arm:
        spread = self.task.spread * (0.5 if self.calibrated else 1.0)
        luck_S = spread * self.own.normal(size=self.S)
        rate_S = np.clip(self.base_S + gain + luck_S, 0.02, 0.98)
        noise_SQ = self.own.normal(size=(self.S, self.Q))
        # Uniform in every cell, so an item is right with probability rate_S exactly; shared ease makes arms agree on items.
        level_SQ = ndtr(np.sqrt(0.6) * self.ease_Q - np.sqrt(0.4) * noise_SQ)
        right_SQ = level_SQ > 1 - rate_S[:, None]
        predicted_SQ = np.where(right_SQ, self.gold_Q, self._wrong(luck_S / spread))
        score_SQL = self.own.normal(size=(self.S, self.Q, len(self.labels)))
        top_SQ = score_SQL.max(axis=2) + self.own.exponential(size=(self.S, self.Q))
        np.put_along_axis(score_SQL, predicted_SQ[..., None], top_SQ[..., None], axis=2)
        order_Sk = np.argsort(self.own.random((self.S, self.k)), axis=1)
        order_SQk = np.argsort(self.own.random((self.S, self.Q, self.k)), axis=2) if name in _BY_QUERY else None
        return Arm(
            name=name,
            kind=kind,
            order=order_Sk.tolist() if order_SQk is None else None,
            order_of_item=order_SQk,
            log_p=log_softmax(score_SQL, axis=2),
            predicted=predicted_SQ,
            correct=predicted_SQ == self.gold_Q,
            # Prefixes that differ by query cannot be shared.
            tokens=18.0 + self.prefix_S / (self.Q if order_SQk is None else 1),
            choosing_tokens=np.full(self.S, price * self.k / 8),
        )

    def _wrong(self, luck_S: NDArray[np.float64]) -> NDArray[np.int64]:
        """(S, Q) wrong labels: an unlucky order leans on one of them."""
        L = len(self.labels)
        lean_SL = (0.4 if self.calibrated else 1.0) * np.exp(-0.6 * luck_S)[:, None] * self.own.normal(size=(self.S, L))
        score_SQL = lean_SL[:, None, :] + self.own.gumbel(size=(self.S, self.Q, L))
        np.put_along_axis(score_SQL, np.broadcast_to(self.gold_Q[:, None], (self.S, self.Q, 1)), -np.inf, axis=2)
        return np.asarray(score_SQL.argmax(axis=2), dtype=np.int64)

    def _picked(self, name: str, random: Sequence[Arm], choice_S: NDArray[np.int64]) -> Arm:
        """The oracle that takes random order `choice_S` under every set."""
        fields = ("log_p", "predicted", "correct", "tokens", "choosing_tokens")
        picked = {
            field: np.stack([getattr(random[choice], field)[place] for place, choice in enumerate(choice_S)])
            for field in fields
        }
        order = [(random[choice].order or [])[place] for place, choice in enumerate(choice_S)]
        return Arm(name=name, kind="oracle", order=order, **picked)

    def _set(self, number: int) -> SetInfo:
        words = [
            " ".join(self.shared.choice(_WORDS.split(), int(count)).tolist())
            for count in self.shared.integers(6, 18, self.k + 1)
        ]
        labels = [self.labels[index] for index in self.demos_Sk[number]]
        shown = [f"Text: {text}\nLabel: {label}" for text, label in zip(words, labels, strict=False)]
        return SetInfo(
            seed=number,
            demo_ids=[f"{self.name}-train-{index}" for index in self.shared.choice(5000, self.k, replace=False)],
            demo_labels=labels,
            demo_tokens=[len(text.split()) + 5 for text in words[: self.k]],
            prompt="\n\n".join([*shown, f"Text: {words[-1]}\nLabel:"]),
        )
