"""Experiment trackers to which long work reports its progress: `report_to` of `score`, `ablate` and `train`.

Contract: a tracker that is unknown or not installed is an error before any work starts. A tracker that fails later, because its
server or its disk does, is dropped with a warning, and the work continues. What a tracker prints goes to stderr, because stdout
is for results. `train` passes the names on to transformers, which has its own code for each tracker.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from sparsort.errors import first_line
from sparsort.extras import need
from sparsort.registry import Entry, Registry

NO_TRACKER = "none"
Log: TypeAlias = Callable[[Mapping[str, float], int], None]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
# A name, names separated by commas ("tensorboard,wandb"), or a list of names.
ReportTo: TypeAlias = TrackerName | Literal["none"] | str | Sequence[str]

_LOG = logging.getLogger("sparsort")
# Seconds between two reports of a meter.
_INTERVAL = 1.0


class Tracker(Protocol):
    """One run in a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report values by name at a step, which never decreases."""
        ...

    def close(self) -> None:
        """End the run."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackerEntry(Entry):
    """A tracker.

    Attributes:
        open: starts a run from its name, a folder for local files, and the settings to record, as JSON values.
    """

    open: Callable[[str, Path, Mapping[str, Any]], Tracker]

    def check(self) -> None:
        """Import the tracker's package.

        Raises:
            SparsortError: the package is not installed.
        """
        need(self.name, self.name, f"report_to={self.name!r}")


class _TensorBoard:
    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        started = time.strftime("%Y-%m-%dT%H-%M-%S")
        self._writer = SummaryWriter(str(folder / f"{run}-{started}-{os.getpid()}"))
        self._writer.add_text("settings", f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # A run that is killed keeps what it has reported.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run of wandb or of trackio, whose interfaces are the same as far as they are used here."""

    def __init__(self, package: str, run: str, config: Mapping[str, Any], **options: Any) -> None:
        project = os.environ.get(f"{package.upper()}_PROJECT", "sparsort")
        self._module = importlib.import_module(package)
        self._run = self._module.init(project=project, name=run, config=dict(config), **options)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        # Not the method of the run, after which trackio ends it again, and prints, when the interpreter exits.
        self._module.finish()


class _CallersRun:
    """A run that the caller has started. It gets the values at its own steps, and the caller ends it."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values))

    def close(self) -> None:
        pass


def _open_wandb(run: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    if (callers := importlib.import_module("wandb").run) is not None:
        return _CallersRun(callers)
    folder.mkdir(parents=True, exist_ok=True)
    return _Run("wandb", run, config, dir=str(folder))


TRACKERS: Registry[TrackerEntry] = Registry(
    "tracker for report_to",
    (
        TrackerEntry(
            name="tensorboard",
            help="event files next to the results",
            source="torch.utils.tensorboard",
            open=_TensorBoard,
        ),
        TrackerEntry(
            name="wandb",
            help="Weights & Biases; in the current run, or a new one under WANDB_PROJECT",
            source="wandb",
            open=_open_wandb,
        ),
        TrackerEntry(
            name="trackio",
            help="a local database with a dashboard; a new run under TRACKIO_PROJECT",
            source="trackio",
            open=lambda run, folder, config: _Run("trackio", run, config),
        ),
    ),
)


def tracker_names(report_to: ReportTo) -> tuple[str, ...]:
    """The names in `report_to`, each once; () for "none" and for an empty value. They are not checked."""
    parts = report_to.split(",") if isinstance(report_to, str) else report_to
    names = dict.fromkeys(name.strip() for name in parts)
    return tuple(name for name in names if name not in ("", NO_TRACKER))


def check_trackers(report_to: ReportTo) -> tuple[TrackerEntry, ...]:
    """The entries of the trackers in `report_to`.

    Raises:
        SparsortError: a tracker is unknown or not installed.
    """
    entries = tuple(TRACKERS.check(name) for name in tracker_names(report_to))
    for entry in entries:
        entry.check()
    return entries


@contextlib.contextmanager
def tracked(
    report_to: ReportTo, run: str, *, folder: Path | None = None, config: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """Start a run in each tracker, yield `log(values, step)`, and end the runs after the block.

    Args:
        report_to: "none", a tracker, several separated by commas, or a list of them.
        run: the name of the run.
        folder: for the files of trackers that write some; None for `runs` in the current folder.
        config: settings to record.

    Raises:
        SparsortError: a tracker is unknown or not installed.
    """
    trackers: dict[str, Tracker] = {}

    def each(action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(trackers.items()):
            with _dropping(name, trackers):
                action(tracker)

    for entry in check_trackers(report_to):
        with _dropping(entry.name, trackers):
            trackers[entry.name] = entry.open(run, folder or Path("runs"), config or {})
    try:
        yield lambda values, step: each(lambda tracker: tracker.log(values, step))
    finally:
        each(lambda tracker: tracker.close())


@contextlib.contextmanager
def in_trainer(names: Sequence[str]) -> Iterator[None]:
    """A block in which the Trainer of transformers reports to trackers: what they print goes to stderr, and their runs end.

    Trainer leaves the run of wandb open. A run that the caller has started stays open.
    """
    if not names:
        yield
        return
    wandb = importlib.import_module("wandb") if "wandb" in names else None
    is_ours = wandb is not None and wandb.run is None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            if wandb is not None and is_ours:
                wandb.finish()


@contextlib.contextmanager
def _dropping(name: str, trackers: dict[str, Tracker]) -> Iterator[None]:
    """Drop a tracker that fails inside the block, with a warning, and send what it prints to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # noqa: BLE001  no error of a tracker may end the work that it observes
        trackers.pop(name, None)
        _LOG.warning("%s failed, and nothing more is reported to it: %s", name, first_line(error))


class Meter:
    """Counts finished units, and reports the counts and the units per second, at most once a second.

    Args:
        log: the function from `tracked`.
        unit: the plural of a unit, such as "rows".
        clock: returns the time in seconds.
    """

    def __init__(self, log: Log, unit: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._unit, self._clock = log, unit, clock
        self._done = self._reported = 0
        self._at = clock()
        self._counts: Counter[str] = Counter()

    def advance(self, count: int) -> None:
        """Count finished units."""
        self._done += count
        if self._clock() - self._at >= _INTERVAL:
            self.report()

    def count(self, values: Mapping[str, int]) -> None:
        """Add to further counts, such as "status/ok", which the next report contains."""
        self._counts.update(values)

    def report(self, values: Mapping[str, float] | None = None) -> None:
        """Report now, together with `values`; the step is the number of finished units."""
        now = self._clock()
        rate = (self._done - self._reported) / max(now - self._at, 1e-9)
        self._reported, self._at = self._done, now
        progress = {f"progress/{self._unit}": self._done, f"progress/{self._unit}_per_second": rate}
        self._log({**progress, **self._counts, **(values or {})}, self._done)
