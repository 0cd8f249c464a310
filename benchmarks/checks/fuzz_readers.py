"""Feed damaged and unusual files to every reader of sparsort. Any outcome but a result or a SparsortError is a failure.

Every kind of file (`fuzz_kinds`) is made once; hypothesis draws changes to its bytes, values and files (`fuzz_mutations`), and
shrinks the first example of each new failure. Failures are distinguished by the type of the error and the innermost line of
sparsort. Work is done in child processes with a limit on memory, because a reader may also kill or hang its process: that
is a failure too. The corpus, `tests/data/fuzz_corpus.json`, holds the shrunk examples of failures of the past; it is read first.

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
_MEMORY = 12 << 30  # bytes of address space of a child; torch alone maps four
# Processor time of a child, and the wall-clock time after which it is taken to wait for something that never comes.
_HANGS, _WAITS = 120.0, 1800.0  # seconds


class EscapedError(Exception):
    """An error that is not a SparsortError left a reader. `signature` says which, and where in sparsort."""

    def __init__(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if "sparsort" in frame.filename or str(ROOT) in frame.filename]
        inside = [frame for frame in inside if "/benchmarks/" not in frame.filename] or frames[-1:]
        frame = inside[-1]
        self.signature = f"{type(error).__name__} in {Path(frame.filename).name}, {frame.name}"
        super().__init__(f"{self.signature}: {str(error)[:200]}")


@dataclass
class Tally:
    """What came of the examples of one kind, and the shrunk mutations of each failure with its message."""

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
        kind: makes the folder and reads it.
        folder: to work in; empty.
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
        self.read([])

    def read(self, mutations: Sequence[Mutation]) -> bool:
        """Whether the reader gives a result; False if it refuses the files.

        Raises:
            EscapedError: it does neither.
        """
        self._count += 1
        # A reader may keep a file open that was replaced by the next example: each has a folder of its own.
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
        """Draw that many examples; each failure that is not yet known is shrunk once."""
        tally, seen = Tally(), set(known)
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
                # While one failure is shrunk, no other takes its place.
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
    """The examples of past failures: kind and mutations."""
    return [(entry["kind"], entry["mutations"]) for entry in json.loads(CORPUS.read_text(encoding="utf-8"))]


def _child(name: str, examples: int, seed: int, known: list[str], results: Any) -> None:
    """One round over one kind, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    kind = next(kind for kind in ALL if kind.name == name)
    with no_bars(), tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(kind, Path(folder))
        tally = Tally()
        for mutations in [each for of_kind, each in corpus() if of_kind == name] if seed == 0 else ():
            try:
                fuzzer.read(mutations)
            except EscapedError as error:
                tally.failures[error.signature] += 1
                tally.examples[error.signature] = (str(error), mutations)
        tally.add(fuzzer.explore(examples, seed, [*known, *tally.examples]))
    results.send(tally)


def round_of(kind: Kind, examples: int, seed: int, known: list[str]) -> Tally:
    """A round in a child process; its death or its hanging is a failure without an example."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(kind.name, examples, seed, known, sender))
    child.start()
    sender.close()
    lost = ""
    try:
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
                    key: {"message": told, "mutations": found} for key, (told, found) in tally.examples.items()
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
    """What this process and its children that have ended have used."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="processor time, in minutes of one core")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
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
            # The first round is short, so that a short run reads every kind; slow readers have fewer examples.
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
