"""Shared by all benchmarks: a description of the machine, fair timing, and figures as a table, as JSON, and on disk.

A benchmark creates one `Report`, adds figures, and ends with `report.finish(arguments)`. A figure may have a floor: a bound that
it must not fall below (or must not exceed, where lower is better). The baseline and our code are timed alternately in one run and
compared by the median of the ratios, so that a machine that slows down half-way through slows down both.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from sparsort.kernels.backend import device_name
from sparsort.storage.files import write_json

RESULTS = Path(__file__).parent / "results"


def interval(low: float, high: float, shown: Callable[[float], str]) -> str:
    """Format an interval in brackets. Too few values, or values without variance, give NaN and "(no interval)"."""
    return "(no interval)" if math.isnan(low) or math.isnan(high) else f"[{shown(low)}, {shown(high)}]"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: ends within two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--save", action="store_true", help="write the JSON object to benchmarks/results/ too")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine that the numbers are measured on."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    described = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": device_name("cpu"),
        # A container may allow fewer cores than the machine has. macOS does not report an affinity.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }
    if device.type == "cuda":
        described["cuda"] = torch.version.cuda
    return described


@dataclass(frozen=True)
class Comparison:
    """Median seconds of two functions timed alternately, and the speed of the second relative to the first."""

    baseline_s: float
    ours_s: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.lowest_ratio:.2f} to {self.highest_ratio:.2f})"


def compare(
    baseline: Callable[[], Any],
    ours: Callable[[], Any],
    rounds: int,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Comparison:
    """Time `baseline` and `ours` alternately, after one untimed call of each.

    Args:
        rounds: pairs of timed calls; which of the two goes first alternates.
        seconds: runs a function and returns how long it took; by default the wall clock.
    """
    seconds = seconds or wall_seconds
    # The first calls pay for caches, lazy imports and compilation, and are not timed.
    baseline()
    ours()
    pairs = []
    for number in range(rounds):
        # The second of two calls may profit from warm caches, so the two take turns in being first.
        if number % 2:
            b = seconds(ours)
            a = seconds(baseline)
        else:
            a = seconds(baseline)
            b = seconds(ours)
        pairs.append((a, b))
    # The ratio is taken within each pair, where the machine's speed is most nearly the same for both.
    ratios = [a / b for a, b in pairs]
    return Comparison(
        baseline_s=statistics.median(a for a, _ in pairs),
        ours_s=statistics.median(b for _, b in pairs),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
    )


def wall_seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call in seconds, without garbage collection, and including the CUDA work that it starts."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        function()
        # CUDA kernels run asynchronously: the call returns before they have finished.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class Figure:
    """One measured number. `note` has what a reader of the JSON could not guess, such as the spread."""

    value: float
    unit: str
    floor: float | None
    better: Literal["higher", "lower"]
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the floor is met; None if there is none."""
        if self.floor is None:
            return None
        return self.value >= self.floor if self.better == "higher" else self.value <= self.floor


@dataclass
class Report:
    """The figures of one benchmark."""

    name: str
    device: torch.device
    figures: dict[str, Figure] = field(default_factory=dict)

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        floor: float | None = None,
        better: Literal["higher", "lower"] = "higher",
        note: str = "",
    ) -> None:
        self.figures[name] = Figure(float(value), unit, floor, better, note)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
            "machine": machine(self.device),
            "command": _command(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def path(self) -> Path:
        """The file that `--save` writes. Its name has the benchmark and the device, or the name of the CPU and its cores."""
        described = machine(self.device)
        # CPU results are only comparable for the same CPU and number of cores.
        device = described["device"] if self.device.type == "cuda" else f"cpu-{described['cpu']}-{described['cores']}"
        return RESULTS / f"{self.name}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"

    def finish(self, arguments: argparse.Namespace) -> None:
        """Print the figures as a table or as JSON, and save them if the user passed --save."""
        if arguments.json:
            print(json.dumps(self.to_json(), indent=2))
        else:
            self.print_table()
        if arguments.save:
            write_json(self.path(), self.to_json())
            print(f"saved to {self.path()}", file=sys.stderr)

    def print_table(self) -> None:
        from rich.console import Console
        from rich.table import Table

        described = machine(self.device)
        title = f"{self.name}: {described['device']}, {described['cpu']} ({described['cores']} cores)"
        table = Table(title=f"{title}, torch {described['packages']['torch']}")
        for column in ("figure", "value", "unit", "floor", "holds", "note"):
            table.add_column(column, justify="right" if column in ("value", "floor") else "left", overflow="fold")
        for name, figure in self.figures.items():
            floor = "" if figure.floor is None else f"{'≥' if figure.better == 'higher' else '≤'} {figure.floor:g}"
            holds = {None: "", True: "yes", False: "NO"}[figure.holds]
            table.add_row(name, f"{figure.value:.4g}", figure.unit, floor, holds, figure.note)
        Console(width=None if sys.stdout.isatty() else 160).print(table)


def _command(argv: Sequence[str]) -> str:
    """The command line without paths of this machine."""
    parts = [Path(part).name if Path(part).is_absolute() else part for part in argv]
    for place, part in enumerate(parts[:-1]):
        # The folder of the data is a path of this machine.
        if part == "--data":
            parts[place + 1] = "FOLDER"
    return shlex.join(["python", *parts])
