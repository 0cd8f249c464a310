"""Other loaders with a curriculum, compared with ours: the examples of one epoch, and the batches after a resume.

    python benchmarks/speed/loader/loader_peers.py [--quick] [--json] [--save]

Each loader gets the same examples with the same difficulties, with 8 examples per rank, on 1 and on 4 ranks. `loader_sessions.py`
and `loader_deepspeed.py` set up, save and rebuild them. Packages that are not installed are listed, and their loaders skipped:

    pip install torchdata deepspeed accelerate

One epoch: `draws` is the number of examples that all ranks saw, `distinct` the share of the data among them, and `repeats` the
number of draws of an example that had been drawn before. `easy again` counts the repeats after the hardest example had been
shown, and gives the easiest share of the data that they come from. Draws from a growing pool ("pool") repeat and skip examples by
design.

Resume: a run is stopped after a third of an epoch, everything is rebuilt from its saved state, and the remaining batches are
compared with those of an uninterrupted run, as ordered lists. "same" means that they are equal to the end of the second epoch;
"+3" means that the fourth batch after the resume was the first to differ. `workers a→b` and `ranks a→b` change the number of
worker processes and of ranks at the resume, with the same global batch. `state` is the size of what one rank saves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options
from loader_deepspeed import DeepSpeedSession
from loader_sessions import (
    Batch,
    Order,
    PyTorchSession,
    Session,
    Setup,
    SparsortSession,
    StatefulSession,
    TrainerSession,
)

from sparsort.storage.files import write_json

SIZES = (103, 10_000)
# Number of ranks → the other number of ranks with which a run is resumed.
RANKS = {1: 2, 4: 2}
BATCH = 8
WORKERS = 2


@dataclass(frozen=True)
class Peer:
    """A loader in one way of ordering; `package` is what must be installed for it."""

    name: str
    order: Order
    session: type[Session]
    package: str

    @property
    def label(self) -> str:
        return f"{self.name}, {self.order}"


PEERS = (
    Peer("PyTorch", "random", PyTorchSession, "torch"),
    Peer("Trainer", "random", TrainerSession, "accelerate"),
    Peer("Trainer", "sorted", TrainerSession, "accelerate"),
    Peer("StatefulDataLoader", "random", StatefulSession, "torchdata"),
    Peer("StatefulDataLoader", "sorted", StatefulSession, "torchdata"),
    Peer("DeepSpeed", "pool", DeepSpeedSession, "deepspeed"),
    Peer("sparsort", "pool", SparsortSession, "sparsort"),
    Peer("sparsort", "random", SparsortSession, "sparsort"),
    Peer("sparsort", "sorted", SparsortSession, "sparsort"),
    Peer("sparsort", "paced", SparsortSession, "sparsort"),
)


@dataclass(kw_only=True)
class Findings:
    """The measurements of one peer for one data size and number of ranks.

    Attributes:
        draws, distinct, repeats: counts of the first epoch; `distinct` is a share of n.
        easy_again, easy_again_share: repeats after the hardest example was shown, and the easiest share that they come from;
            None if the order does not end with the hardest example.
        state_bytes: size of what one rank saves, the largest over the resumes.
        resumes: name → index of the first batch after the resume that differs; None if no batch differs.
        errors: name → the peer's own error on one line.
    """

    peer: str
    order: str
    n: int
    ranks: int
    draws: int | None = None
    distinct: float | None = None
    repeats: int | None = None
    easy_again: int | None = None
    easy_again_share: float | None = None
    state_bytes: int | None = None
    resumes: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resume:
    """A stop after a third of `epoch`: the run has (ranks, workers) `before` the stop, and `after` the resume."""

    name: str
    epoch: int
    before: tuple[int, int]
    after: tuple[int, int]


def resumes(ranks: int) -> list[Resume]:
    """The resumes to measure for a run on `ranks` ranks."""
    other = RANKS[ranks]
    return [
        Resume("epoch 1", 0, (ranks, 0), (ranks, 0)),
        Resume("epoch 2", 1, (ranks, 0), (ranks, 0)),
        Resume(f"workers {WORKERS}→{WORKERS}", 0, (ranks, WORKERS), (ranks, WORKERS)),
        Resume(f"workers 0→{WORKERS}", 0, (ranks, 0), (ranks, WORKERS)),
        Resume(f"workers {WORKERS}→{WORKERS - 1}", 0, (ranks, WORKERS), (ranks, WORKERS - 1)),
        Resume(f"workers {WORKERS}→0", 0, (ranks, WORKERS), (ranks, 0)),
        Resume(f"ranks {ranks}→{other}", 0, (ranks, 0), (other, 0)),
    ]


def measure(peer: Peer, difficulty: np.ndarray, ranks: int) -> Findings:
    """Measure one peer; a failure is recorded as its error."""
    found = Findings(peer=peer.name, order=peer.order, n=len(difficulty), ranks=ranks)
    with kept_errors(found, "run"):
        whole = {workers: whole_run(peer, difficulty, ranks, workers) for workers in (0, WORKERS)}
        cover(found, difficulty, [batch for epoch, batch in whole[0] if epoch == 0])
        for resume in resumes(ranks):
            with kept_errors(found, resume.name):
                batches = [batch for _, batch in whole[resume.before[1]]]
                stop_and_go(found, peer, difficulty, resume, batches)
    return found


def whole_run(peer: Peer, difficulty: np.ndarray, ranks: int, workers: int) -> list[tuple[int, Batch]]:
    """Both epochs without an interruption."""
    with tempfile.TemporaryDirectory() as folder:
        return list(peer.session(setup(peer, difficulty, (ranks, workers), folder, ranks * BATCH)).steps())


def cover(found: Findings, difficulty: np.ndarray, batches: list[Batch]) -> None:
    """Count what the first epoch covers."""
    drawn = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])
    # `np.unique` returns the first place of each example; every other place is a repeat.
    again = np.ones(len(drawn), dtype=bool)
    again[np.unique(drawn, return_index=True)[1]] = False
    found.draws, found.repeats = len(drawn), int(again.sum())
    found.distinct = len(np.unique(drawn)) / len(difficulty)
    if found.order in ("sorted", "paced"):
        # In an order that ends with the hardest example, a repeat after it shows that the sampler wrapped
        # around.
        end = int(np.flatnonzero(drawn == np.argmax(difficulty))[0])
        late = drawn[end:][again[end:]]
        found.easy_again = len(late)
        if len(late):
            found.easy_again_share = float((difficulty <= difficulty[late].max()).mean())


def stop_and_go(found: Findings, peer: Peer, difficulty: np.ndarray, resume: Resume, batches: list[Batch]) -> None:
    """Stop a run, rebuild it from its state, and compare the remaining batches."""
    # The global batch is that of the run before the stop, so that a change of ranks does not change the batches.
    global_batch = resume.before[0] * BATCH
    per_epoch = ceil(len(difficulty) / global_batch)
    stop = resume.epoch * per_epoch + max(1, per_epoch // 3)
    with tempfile.TemporaryDirectory() as folder:
        before = peer.session(setup(peer, difficulty, resume.before, folder, global_batch))
        steps = before.steps()
        seen = [batch for _, batch in islice(steps, stop)]
        # The state is taken while the iterator is still open, as in a training loop that saves between two steps.
        states = before.states()
        if seen != batches[:stop]:
            raise RuntimeError("two runs of the same seed differ before the stop")
        found.state_bytes = max(found.state_bytes or 0, *(state.n_bytes for state in states))
        after = peer.session(setup(peer, difficulty, resume.after, folder, global_batch), states)
        rest = [batch for _, batch in after.steps()]
    found.resumes[resume.name] = first_difference(batches[stop:], rest)


def first_difference(expected: list[Batch], rest: list[Batch]) -> int | None:
    """Index of the first batch that differs as an ordered list, or that only one side has; None if all are equal."""
    for index, (a, b) in enumerate(zip(expected, rest, strict=False)):
        if a != b:
            return index
    return None if len(expected) == len(rest) else min(len(expected), len(rest))


def setup(peer: Peer, difficulty: np.ndarray, layout: tuple[int, int], folder: str, global_batch: int) -> Setup:
    """The same setup with another `layout` = (ranks, workers) and the same global batch."""
    ranks, workers = layout
    return Setup(
        difficulty=difficulty,
        order=peer.order,
        ranks=ranks,
        batch=global_batch // ranks,
        workers=workers,
        folder=Path(folder),
    )


@contextlib.contextmanager
def kept_errors(found: Findings, name: str) -> Iterator[None]:
    """Record any error of a peer as a finding, so that the benchmark continues."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
        found.errors[name] = f"{type(error).__name__}: {' '.join(message.split())[:300]}"


def table(findings: list[Findings], missing: dict[str, str]) -> None:
    """Print one table per size and number of ranks, and the errors below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    for n, ranks in sorted({(found.n, found.ranks) for found in findings}):
        names = [resume.name for resume in resumes(ranks)]
        shown = Table(title=f"{n:,} examples, {ranks} {'rank' if ranks == 1 else 'ranks'} × batch {BATCH}")
        for column in ("loader", "draws", "distinct", "repeats", "easy again", *names, "state"):
            shown.add_column(column, justify="left" if column == "loader" else "right", no_wrap=column == "loader")
        errors = []
        for found in findings:
            if (found.n, found.ranks) == (n, ranks):
                label = f"{found.peer}, {found.order}"
                shown.add_row(label, *cells(found), *(resumed(found, name) for name in names), state(found))
                errors += [f"{label}, {name}: {error}" for name, error in found.errors.items()]
        console.print(shown)
        for line in errors:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, package in missing.items():
        console.print(f"{name}: not installed: pip install {package}")


def cells(found: Findings) -> list[str]:
    """The table cells of a peer's first epoch."""
    if found.draws is None or found.distinct is None:
        return ["error", "", "", ""]
    again = "" if found.easy_again is None else str(found.easy_again)
    if found.easy_again_share is not None:
        again += f" (easiest {found.easy_again_share:.1%})"
    return [f"{found.draws:,}", f"{found.distinct:.2%}", f"{found.repeats:,}", again]


def resumed(found: Findings, name: str) -> str:
    if name not in found.resumes:
        return "error" if name in found.errors else ""
    first = found.resumes[name]
    return "same" if first is None else f"+{first}"


def state(found: Findings) -> str:
    return "" if found.state_bytes is None else f"{found.state_bytes:,} B" if found.state_bytes else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_output_options(parser)
    parser.add_argument("--only", default="", help="only the loaders whose name contains this text")
    arguments = parser.parse_args()
    chosen = [peer for peer in PEERS if arguments.only.lower() in peer.label.lower()]
    missing = {peer.name: peer.package for peer in chosen if find_spec(peer.package) is None}
    findings = []
    for n in SIZES[:1] if arguments.quick else SIZES:
        # Distinct difficulties, so that every loader has to agree on one order.
        difficulty = np.random.default_rng(n).permutation(n).astype(np.float64)
        for peer in chosen:
            if peer.name not in missing:
                print(f"{peer.label}, {n:,} examples", file=sys.stderr)
                # DeepSpeed prints while it opens its files.
                with contextlib.redirect_stdout(io.StringIO()):
                    findings += [measure(peer, difficulty, ranks) for ranks in RANKS]
    # The DeepSpeed session creates a process group once, and leaves it open for later sessions.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    report = Report("loader-peers", torch.device("cpu"))
    result = {
        **report.to_json(),
        "figures": [asdict(found) for found in findings],
        "missing": missing,
        "packages": {peer.package: version(peer.package) for peer in chosen if peer.name not in missing},
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        table(findings, missing)
    if arguments.save:
        write_json(report.path(), result)
        print(f"saved to {report.path()}", file=sys.stderr)


if __name__ == "__main__":
    main()
