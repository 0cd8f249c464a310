"""Feed damaged and unusual files to every reader of sparsort. Any outcome but a result or a SparsortError is a failure.

Every kind of file (`fuzz_kinds`) is created once. Hypothesis draws changes to its bytes, values and files (`fuzz_mutations`), and
shrinks the first example of each new failure. Failures are distinguished by the type of the error and the innermost function of
sparsort. The work is done in child processes with a limit on memory, because a reader may also kill or hang its process, and
that is a failure too. The corpus, `tests/data/fuzz_corpus.json`, has the shrunk examples of past failures; it is read first.

    python benchmarks/checks/fuzz_readers.py --minutes 30 --save
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bit_flips_kinds import Kind
from common import Report, add_output_options
from fuzz_kinds import ALL, no_bars
from fuzz_mutations import MUTATIONS, Mutation, apply
from hypothesis import HealthCheck, Phase

from sparsort.errors import SparsortError

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "data" / "fuzz_corpus.json"
# Bytes of address space of a child; torch alone maps four.
_MEMORY = 12 << 30
# Processor time of a child, and the wall-clock time after which it is taken to wait for something that never comes.
_HANGS, _WAITS = 120.0, 1800.0  # seconds


class EscapedError(Exception):
    """An error that is not a SparsortError left a reader. `signature` names its type and the function of sparsort."""

    def __init__(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if "sparsort" in frame.filename or str(ROOT) in frame.filename]
        # The innermost frame of the library names the fault; frames of this script are the same for all
        # faults.
        inside = [frame for frame in inside if "/benchmarks/" not in frame.filename] or frames[-1:]
        frame = inside[-1]
        self.signature = f"{type(error).__name__} in {Path(frame.filename).name}, {frame.name}"
        super().__init__(f"{self.signature}: {str(error)[:200]}")


@dataclass
class Tally:
    """The outcomes of the examples of one kind, and the shrunk mutations of each failure with its message."""

    results: int = 0
    refused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, list[Any]]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.results += other.results
        self.refused += other.refused
        self.failures += other.failures
        self.examples = {**other.examples, **self.examples}


class Fuzzer:
    """Reads changed copies of one kind of folder.

    Args:
        kind: creates the folder and reads it.
        folder: an empty folder to work in.
    """

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self._folder = folder
        self._count = 0
        made = folder / "made"
        made.mkdir(parents=True)
        kind.make(made)
        paths = sorted(path for path in made.rglob("*") if path.is_file())
        self._files = {path.relative_to(made).as_posix(): path.read_bytes() for path in paths}
        # The unchanged files must be readable, otherwise every mutation would be refused.
        self.read([])

    def read(self, mutations: Sequence[Mutation]) -> bool:
        """Whether the reader returns a result; False if it refuses the files.

        Raises:
            EscapedError: the reader raised another error.
        """
        self._count += 1
        # Each example has its own folder, because a reader may still hold a file open that the next example replaces.
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            for path, content in apply(self._files, mutations).items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            try:
                self.kind.read(folder)
            except SparsortError:
                return False
            except Exception as error:
                raise EscapedError(error) from error
        return True

    def explore(self, examples: int, seed: int, known: Iterable[str] = ()) -> Tally:
        """Draw `examples` examples, and shrink each new failure once."""
        tally, seen = Tally(), set(known)
        # Lists, because the nested function assigns to their only element.
        shrinking = [""]
        last: list[list[Any]] = [[]]

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        )
        @hypothesis.given(MUTATIONS)
        def example(mutations: list[Any]) -> None:
            try:
                if self.read(mutations):
                    tally.results += 1
                else:
                    tally.refused += 1
            except EscapedError as error:
                tally.failures[error.signature] += 1
                # While one failure is being shrunk, another one must not replace it.
                if error.signature in seen or shrinking[0] not in ("", error.signature):
                    return
                shrinking[0] = error.signature
                last[0] = mutations
                raise

        while True:
            shrinking[0] = ""
            try:
                example()
            except EscapedError as error:
                seen.add(error.signature)
                tally.examples[error.signature] = (str(error), last[0])
            else:
                return tally


def corpus() -> list[tuple[str, list[Any]]]:
    """The examples of past failures, as (kind, mutations)."""
    return [(entry["kind"], entry["mutations"]) for entry in json.loads(CORPUS.read_text(encoding="utf-8"))]


def _child(name: str, examples: int, seed: int, known: list[str], results: Any) -> None:
    """Run one round over one kind in this child process, and send the tally."""
    # A reader that allocates without bound gets a MemoryError here instead of stopping the machine.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    kind = next(kind for kind in ALL if kind.name == name)
    with no_bars(), tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(kind, Path(folder))
        tally = Tally()
        # Past failures are replayed once, in the first round of the default seed.
        for mutations in [each for of_kind, each in corpus() if of_kind == name] if seed == 0 else ():
            try:
                fuzzer.read(mutations)
            except EscapedError as error:
                tally.failures[error.signature] += 1
                tally.examples[error.signature] = (str(error), mutations)
        tally.add(fuzzer.explore(examples, seed, [*known, *tally.examples]))
    results.send(tally)


def round_of(kind: Kind, examples: int, seed: int, known: list[str]) -> Tally:
    """Run a round in a child process. If the process dies or hangs, that is a failure without an example."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(kind.name, examples, seed, known, sender))
    child.start()
    # The parent's copy of the sending end, without which the end of the child would not be noticed.
    sender.close()
    lost = ""
    try:
        # At most a second of processor time per example, plus a fixed time.
        has_ended = _ends(child.pid or 0, receiver, _HANGS + examples)
        tally: Tally = receiver.recv() if has_ended else Tally()
        lost = "" if has_ended else "the process hangs"
    except EOFError:
        tally = Tally()
        child.join()
        lost = f"the process ended with {child.exitcode}"
    if lost:
        child.kill()
        tally.failures[lost] += 1
        tally.examples[lost] = (f"{lost}, in round {seed}", [])
    child.join()
    return tally


def _ends(child: int, receiver: Any, seconds: float) -> bool:
    """Whether the child sends its result or dies within this processor time, which a busy machine does not change."""
    start = time.monotonic()
    process = psutil.Process(child)
    while not receiver.poll(5.0):
        used = process.cpu_times()
        if used.user + used.system > seconds or time.monotonic() - start > _WAITS:
            return False
    return True


@dataclass
class FuzzReport(Report):
    """The report with the counts of every kind."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        kinds = {
            name: {
                "results": tally.results,
                "refused": tally.refused,
                "failures": dict(tally.failures),
                "examples": {
                    key: {"message": message, "mutations": mutations}
                    for key, (message, mutations) in tally.examples.items()
                },
            }
            for name, tally in self.tallies.items()
        }
        return super().to_json() | {"seed": self.seed, "kinds": kinds}

    def add_totals(self, seconds: float) -> None:
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        failures = sum(total.failures.values())
        read = sum(bool(tally.results + tally.refused) for tally in self.tallies.values())
        kinds = f"{read} of {len(self.tallies)} kinds in {seconds / 60:.1f} minutes of one core"
        note = f"{kinds}: {total.results} results, {total.refused} refused"
        self.add("examples", total.results + total.refused + failures, "folders", note=note)
        note = ", ".join(total.failures) or "no error but SparsortError"
        self.add("failures", failures, "folders", floor=0.0, better="lower", note=note)


def _processor_seconds() -> float:
    """Processor seconds used by this process and by its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="processor time, in minutes of one core")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round")
    parser.add_argument("--kinds", help="only kinds whose name contains this")
    add_output_options(parser)
    arguments = parser.parse_args()
    minutes = 1.0 if arguments.quick else arguments.minutes
    chosen = [kind for kind in ALL if (arguments.kinds or "") in kind.name]
    report = FuzzReport("fuzz_readers", torch.device("cpu"), seed=arguments.seed)
    report.tallies = {kind.name: Tally() for kind in chosen}
    start, number = _processor_seconds(), arguments.seed
    while _processor_seconds() - start < 60 * minutes:
        for kind in chosen:
            if _processor_seconds() - start >= 60 * minutes:
                break
            tally = report.tallies[kind.name]
            # The first round is short, so that a short run reads every kind. Slow readers get fewer examples.
            examples = 30 if number == arguments.seed else 250
            of_round = round_of(kind, round(examples * min(1.0, kind.share) ** 2), number, list(tally.examples))
            for signature in of_round.examples.keys() - tally.examples.keys():
                print(f"{kind.name}: {of_round.examples[signature]}", file=sys.stderr, flush=True)
            tally.add(of_round)
        number += 1
    report.add_totals(_processor_seconds() - start)
    report.finish(arguments)


if __name__ == "__main__":
    main()
