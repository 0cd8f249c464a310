"""Times of steps that have phases, measured in turns, and their ratios.

Every round runs each step once, in rotating order, so that a machine that slows down affects all of them equally. A ratio is the
median of the rounds' ratios, with the lowest and the highest. `of_best` divides the shortest times of any round, and `of_cpu` the
processor times, which a busy machine extends less than the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from common import wall_seconds


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and processor seconds of all cores together."""

    wall: float
    cpu: float

    def __add__(self, other: Took) -> Took:
        return Took(self.wall + other.wall, self.cpu + other.cpu)


Round: TypeAlias = Mapping[str, Took]


class Clock:
    """Times the phases of one step, and waits for CUDA before and after each."""

    def __init__(self) -> None:
        self.phases: dict[str, Took] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        _wait()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        _wait()
        took = Took(time.perf_counter() - wall, time.process_time() - cpu)
        # A phase may occur several times in a step, and its times add up.
        self.phases[phase] = self.phases.get(phase, Took(0, 0)) + took


class DeviceClock(Clock):
    """Times of the GPU alone, as in a captured graph: a pause on the device hides the launches. CUDA only."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _wait()
        # The device sleeps for about a millisecond, in which Python can queue the launches of the phase.
        torch.cuda._sleep(2_000_000)
        start.record()
        yield
        stop.record()
        _wait()
        took = float(start.elapsed_time(stop)) / 1e3
        self.phases[phase] = self.phases.get(phase, Took(0, 0)) + Took(took, took)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    steps: Mapping[str, Callable[[Clock], object]],
    rounds: int,
    *,
    warm: int = 0,
    make_clock: Callable[[], Clock] = Clock,
) -> dict[str, list[Round]]:
    """The phases of every step in every round, after `warm` rounds that are discarded."""
    names = list(steps)
    kept: dict[str, list[Round]] = {name: [] for name in names}
    for number in range(-warm, rounds):
        # Python's modulo is not negative, so warm-up rounds, which have negative numbers, rotate too.
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            clock = make_clock()
            # `wall_seconds` is used only because it turns off garbage collection.
            wall_seconds(partial(steps[name], clock))
            if number >= 0:
                kept[name].append(clock.phases)
    return kept


def total(phases: Round, wanted: Collection[str] | None = None) -> Took:
    """The sum of the given phases, by default of all."""
    return sum((took for name, took in phases.items() if wanted is None or name in wanted), Took(0, 0))


@dataclass(frozen=True)
class Ratio:
    """Speed relative to the baseline."""

    median: float
    lowest: float
    highest: float
    of_best: float
    of_cpu: float
    baseline_s: float
    ours_s: float
    rounds: int

    def __str__(self) -> str:
        times = f"{seconds(self.baseline_s)} against {seconds(self.ours_s)}"
        if self.rounds == 1:
            return f"one round, {times}; processor time {self.of_cpu:.2f}x"
        spread = f"{self.lowest:.2f} to {self.highest:.2f} in {self.rounds} rounds"
        return f"{spread}, {times}; best of each {self.of_best:.2f}x, processor time {self.of_cpu:.2f}x"


def ratio(baseline: list[Round], ours: list[Round], wanted: Collection[str] | None = None) -> Ratio:
    """The whole time of the baseline over the time of the given phases of ours."""
    theirs, mine = [total(phases) for phases in baseline], [total(phases, wanted) for phases in ours]
    # Ratios within a round, in which the speed of the machine is most nearly the same for both.
    each = [a.wall / b.wall for a, b in zip(theirs, mine, strict=True)]
    return Ratio(
        median=statistics.median(each),
        lowest=min(each),
        highest=max(each),
        of_best=min(took.wall for took in theirs) / min(took.wall for took in mine),
        # Processor time may be 0 if a step is shorter than the resolution of its clock.
        of_cpu=min(took.cpu for took in theirs) / max(min(took.cpu for took in mine), 1e-9),
        baseline_s=statistics.median(took.wall for took in theirs),
        ours_s=statistics.median(took.wall for took in mine),
        rounds=len(each),
    )


def phases_in_words(rounds: list[Round]) -> str:
    """The median of each phase, in words."""
    return ", ".join(
        f"{name} {seconds(statistics.median(phases[name].wall for phases in rounds))}" for name in rounds[0]
    )


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
