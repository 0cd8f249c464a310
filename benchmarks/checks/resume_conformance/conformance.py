"""Does a loader or trainer resume exactly? The cases, the criteria, and the protocol of an adapter.

An adapter is a class with a `run` method; see `Adapter`. For each case, the data are loaded once without an interruption, and
once with a stop, after which everything is built again from the state that was saved. Both are lists of global batches: the ids
that all ranks together see in one step, in order. A resume is exact if

- the order is restored: the batches after the resume are those of the uninterrupted run, as ordered lists;
- nothing is repeated: in the epoch of the stop, no id is seen more often than without the interruption;
- nothing is lost: in that epoch, no id is seen less often.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

Batch = list[int]

# Full batches only: a system that fills up the last batch with repeated rows is not at fault here.
ROWS, GLOBAL_BATCH, EPOCHS, SEED = 44, 4, 3, 17


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the data are loaded.

    Attributes:
        ranks: number of ranks; the global batch does not depend on it.
        workers: worker processes of each rank.
        accumulation: micro-batches of a rank per optimiser step.
        packing: whether several examples share a sequence.
        folder: for checkpoints and files.
    """

    ranks: int = 1
    workers: int = 0
    accumulation: int = 1
    packing: bool = False
    folder: Path = Path()


class Adapter(Protocol):
    """A loader or trainer under test.

    Attributes:
        name: the row of the table.
        packages: the distributions whose versions the table shows.
        supports: the names of the cases that the system has; the others are "not run".
    """

    name: str
    packages: tuple[str, ...]
    supports: frozenset[str]

    def run(self, setup: Setup, *, stop: int | None = None, state: Any = None) -> tuple[list[Batch], Any]:
        """Load `EPOCHS` epochs of `ROWS` rows, shuffled if the system can.

        Args:
            setup: how to load.
            stop: number of optimiser steps since the beginning of training after which to stop; None for the end.
            state: the state to resume from, as an earlier call returned it; None for the beginning.

        Returns:
            The global batches since the beginning or the resume, and the state after them.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of stopping and resuming.

    Attributes:
        name: the column of the table.
        place: the place of the stop in epochs.
        before, after: how the data are loaded before the stop and after the resume.
    """

    name: str
    place: float
    before: Setup = Setup()
    after: Setup = Setup()


MIDDLE, LATER = 0.4, 1.4
CASES = (
    Case(name="first epoch", place=MIDDLE),
    Case(name="later epoch", place=LATER),
    Case(name="epoch boundary", place=1.0),
    Case(name="prefetched", place=LATER, before=Setup(workers=2), after=Setup(workers=2)),
    Case(name="other workers", place=LATER, before=Setup(workers=2), after=Setup(workers=1)),
    Case(name="two ranks", place=LATER, before=Setup(ranks=2), after=Setup(ranks=2)),
    Case(name="other ranks", place=LATER, before=Setup(ranks=2), after=Setup(ranks=1)),
    Case(name="accumulation", place=LATER, before=Setup(accumulation=2), after=Setup(accumulation=2)),
    Case(name="packing", place=LATER, before=Setup(packing=True), after=Setup(packing=True)),
)
PLAIN = frozenset({"first epoch", "later epoch", "epoch boundary"})
WORKERS = frozenset({"prefetched", "other workers"})
RANKS = frozenset({"two ranks", "other ranks"})
ALL = frozenset(case.name for case in CASES)


@dataclass(frozen=True)
class Outcome:
    """What a case found.

    Attributes:
        broken: the criteria that are not met: "order", "repeated", "lost".
        error: the system's own error on one line, or "".
    """

    broken: tuple[str, ...] = ()
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.broken and not self.error


def compare(whole: list[Batch], first: list[Batch], rest: list[Batch]) -> Outcome:
    """Judge a resume.

    Args:
        whole: the batches of the uninterrupted run, over `EPOCHS` epochs of equally many steps.
        first: the batches before the stop.
        rest: the batches after the resume.
    """
    broken = [] if rest == whole[len(first) :] else ["order"]
    per_epoch = len(whole) // EPOCHS
    # A stop at a boundary is judged by the epoch that begins there.
    begin = len(first) // per_epoch * per_epoch
    expected = _count(whole[begin : begin + per_epoch])
    seen = _count((first + rest)[begin : begin + per_epoch])
    if seen - expected:
        broken.append("repeated")
    if expected - seen:
        broken.append("lost")
    return Outcome(tuple(broken))


def run_case(adapter: Adapter, case: Case, wholes: dict[Setup, list[Batch]]) -> Outcome:
    """Run one case; `wholes` keeps uninterrupted runs for the next case."""
    with tempfile.TemporaryDirectory() as folder:
        before = replace(case.before, folder=Path(folder) / "before")
        after = replace(case.after, folder=before.folder)
        if case.before not in wholes:
            wholes[case.before] = adapter.run(replace(case.before, folder=Path(folder) / "whole"))[0]
        whole = wholes[case.before]
        stop = round(case.place * len(whole) / EPOCHS)
        first, state = adapter.run(before, stop=stop)
        if first != whole[:stop]:
            return Outcome(error="two runs of the same seed differ before the stop")
        rest, _ = adapter.run(after, state=state)
    return compare(whole, first, rest)


@dataclass
class Results:
    """Outcomes by adapter and case; a case that is absent was not run."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """The failed cases as text."""
        return [
            f"{name}, {case}: {outcome.error or ', '.join(outcome.broken)}"
            for name, outcomes in self.outcomes.items()
            for case, outcome in outcomes.items()
            if not outcome.passed
        ]


def check(
    adapters: Sequence[Adapter], cases: Sequence[Case] = CASES, *, report: Callable[[str], None] = lambda line: None
) -> Results:
    """Run all cases that each adapter supports; an error of the system under test is an outcome."""
    results = Results()
    for adapter in adapters:
        wholes: dict[Setup, list[Batch]] = {}
        outcomes = results.outcomes.setdefault(adapter.name, {})
        for case in cases:
            if case.name not in adapter.supports:
                continue
            try:
                outcomes[case.name] = run_case(adapter, case, wholes)
            except Exception as error:  # noqa: BLE001  whatever a system raises is its outcome
                report(traceback.format_exc())
                text = " ".join(str(error).split())
                outcomes[case.name] = Outcome(error=f"{type(error).__name__}: {text}"[:160])
            report(f"{adapter.name}, {case.name}: {outcomes[case.name]}")
    return results


def _count(batches: list[Batch]) -> Counter[int]:
    return Counter(row for batch in batches for row in batch)
