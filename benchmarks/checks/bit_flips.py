"""Flip single bits in every kind of file that sparsort writes and later trusts, and classify what its readers do.

Each flip is made in a fresh copy of a small folder, which its public reader then opens. The outcome is one of:

    refused     a SparsortError
    recomputed  the values are unchanged, and a warning reports what was computed again or skipped
    partial     a warning reports what is missing; the rest is unchanged (an outcome store sets damaged blocks aside)
    identical   the values are unchanged, and nothing was reported: white space, or bits that no value depends on
    different   other values without a warning. Must not happen.
    traceback   an error that is not a SparsortError. Must not happen.

Every file is divided into its head, its body and its foot (in a Parquet file, the seal and the footer). Each part gets as many
flips as any other part of its kind, because a footer is small but important. Bounds are exact (Clopper and Pearson), one-sided,
95 %. Files without digests, as the first sparsort 0.1 wrote them, are counted separately.

    python benchmarks/checks/bit_flips.py --save
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bit_flips_kinds import KINDS, Kind, Values
from common import Report, add_output_options
from scipy.stats import beta

from sparsort.errors import SparsortError
from sparsort.terminal.progress import progress

OUTCOMES = ("refused", "recomputed", "partial", "identical", "different", "traceback")
_HEAD = 64
_FOOT = 256
# No reader trusts these files: they are for people or for the hub. Locks are empty, and are excluded by their size.
_NOT_READ = ("README.md", ".gitattributes", "GEMMA_TERMS.html", "NOTICE.md")


@dataclass(frozen=True)
class Flip:
    """One bit of one region of a file."""

    file: str
    region: str
    byte: int
    bit: int


@dataclass
class Tally:
    """The outcomes of the flips of one kind, by region, with the first examples of outcomes that must not happen."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, flip: Flip, outcome: str, detail: str) -> None:
        self.counts.setdefault(flip.region, Counter())[outcome] += 1
        if outcome in ("different", "traceback") and len(self.examples) < 20:
            self.examples.append(f"{flip.file} ({flip.region}), bit {flip.bit} of byte {flip.byte}: {outcome}{detail}")

    def total(self) -> Counter[str]:
        """The outcomes over all regions."""
        return sum(self.counts.values(), Counter())


def regions(path: Path) -> dict[str, range]:
    """Head, body and foot of a file as ranges of bytes, without empty ones."""
    content = path.read_bytes()
    size = len(content)
    # A small file still has a body between its head and its foot.
    foot = min(_FOOT, size // 4)
    if content[-4:] == b"PAR1":
        # The last 8 bytes are the footer's length and the magic. The seal is between the pages and the footer, and its JSON is
        # shorter than twice _FOOT.
        foot = min(size // 2, 8 + int.from_bytes(content[-8:-4], "little") + 2 * _FOOT)
    head = min(_HEAD, size - foot)
    parts = {"head": range(head), "body": range(head, size - foot), "foot": range(size - foot, size)}
    return {name: places for name, places in parts.items() if len(places)}


def files(folder: Path) -> list[str]:
    """The files whose bits are flipped, relative to the folder, in a fixed order."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path.relative_to(folder).as_posix() for path in found if path.name not in _NOT_READ)


def draw(folder: Path, count: int, seed: int) -> Iterator[Flip]:
    """Draw flips from each region of each file in turn, so that all regions get equally many, except for the last round."""
    rng = np.random.default_rng(seed)
    strata = [(name, region, places) for name in files(folder) for region, places in regions(folder / name).items()]
    # Shuffled, so that a small number of flips does not favour the files that come first by name.
    strata = [strata[place] for place in rng.permutation(len(strata))]
    for number in range(count):
        name, region, places = strata[number % len(strata)]
        yield Flip(name, region, int(places[int(rng.integers(len(places)))]), int(rng.integers(8)))


def flip_bit(path: Path, byte: int, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def judge(kind: Kind, folder: Path, expected: Values, usual: Collection[str]) -> tuple[str, str]:
    """Open a folder with the kind's reader, and return the outcome with details if it must not happen.

    Args:
        kind: the kind of file.
        folder: a folder of this kind with one flipped bit.
        expected: the values that its reader returns without the flip.
        usual: the warnings that it reports without the flip.
    """
    with _warnings() as reported:
        try:
            found = kind.read(folder)
        except SparsortError:
            return "refused", ""
        except Exception as error:  # noqa: BLE001  any other error is what this script looks for
            return "traceback", f" {type(error).__name__}: {str(error)[:200]}"
    is_reported = any(sentence not in usual for sentence in reported)
    if found == expected:
        return ("recomputed" if is_reported else "identical"), ""
    # A subset of the expected values, with a warning: the reader skipped what was damaged.
    if is_reported and all(name in expected and expected[name] == value for name, value in found.items()):
        return "partial", ""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return "different", f" in {', '.join(names[:5])}"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings of sparsort inside the block, and keep them off the terminal."""
    reported: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reported.append(record.getMessage())

    logger, handler = logging.getLogger("sparsort"), Keep(logging.WARNING)
    # Other handlers would print the warnings on the terminal.
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield reported
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def flip_kind(
    kind: Kind, flips: Callable[[Path], Sequence[Flip]], folder: Path, advance: Callable[[int], None] = lambda _n: None
) -> Tally:
    """Create a folder of one kind, flip its bits one at a time, and read it after each flip.

    Args:
        kind: the kind of file.
        flips: takes the new folder and returns the flips to try.
        folder: an empty folder to work in.
        advance: called with 1 after each flip.

    Raises:
        RuntimeError: the reader gives other values the second time, without any flip.
    """
    made, copy, tally = folder / "made", folder / "copy", Tally()
    made.mkdir(parents=True)
    kind.make(made)
    shutil.copytree(made, copy)
    with _warnings() as usual:
        expected = kind.read(copy)
    shutil.rmtree(copy)
    shutil.copytree(made, copy)
    if judge(kind, copy, expected, usual)[0] != "identical":
        raise RuntimeError(f"{kind.name}: reading it twice does not give the same")
    for flip in flips(made):
        shutil.rmtree(copy)
        shutil.copytree(made, copy)
        flip_bit(copy / flip.file, flip.byte, flip.bit)
        tally.add(flip, *judge(kind, copy, expected, usual))
        advance(1)
    return tally


def upper_bound(events: int, trials: int) -> float:
    """The exact upper bound of a share, one-sided at 95 % (Clopper and Pearson 1934)."""
    return 1.0 if events >= trials else float(beta.ppf(0.95, events + 1, trials - events))


@dataclass
class FlipReport(Report):
    """The report with the counts of every kind and region."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        kinds = {}
        for name, tally in self.tallies.items():
            total = tally.total()
            kinds[name] = {
                "flips": total.total(),
                **{outcome: total[outcome] for outcome in OUTCOMES},
                "different_at_most": upper_bound(total["different"], total.total()),
                "regions": {region: dict(counts) for region, counts in tally.counts.items()},
                "examples": tally.examples,
            }
        return super().to_json() | {"seed": self.seed, "kinds": kinds}

    def add_totals(self) -> None:
        """Add the figures over all kinds with digests, and over those without."""
        for with_digests in (True, False):
            names = [kind.name for kind in KINDS if kind.has_digests is with_digests and kind.name in self.tallies]
            if not names:
                continue
            total = sum((self.tallies[name].total() for name in names), Counter())
            n, what = total.total(), "" if with_digests else "_without_digests"
            counts = ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES if total[outcome])
            self.add(f"flips{what}", n, "bits", note=f"{len(names)} kinds: {counts}")
            for outcome in ("different", "traceback"):
                note = f"of all flips at most {upper_bound(total[outcome], n):.2g} (exact, one-sided, 95 %)"
                floor = 0.0 if with_digests else None
                self.add(f"{outcome}{what}", total[outcome], "flips", floor=floor, better="lower", note=note)
        for name, tally in self.tallies.items():
            total = tally.total()
            counts = ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES if total[outcome])
            self.add(name, total["different"], "different", better="lower", note=f"{total.total()} flips: {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10_000, help="number of flips over all kinds with digests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="names separated by commas; each selects the kinds whose names begin with it")
    add_output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    chosen = [kind for kind in KINDS if _is_chosen(kind.name, arguments.kinds)]
    flips = arguments.flips // 50 if arguments.quick else arguments.flips
    per_share = flips / sum(kind.share for kind in chosen if kind.has_digests or len(chosen) == 1)
    report = FlipReport("bit_flips", torch.device("cpu"), seed=arguments.seed)
    for kind in chosen:
        # Kinds with slow readers get fewer flips.
        count = math.ceil(per_share * kind.share)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, progress(kind.name, count) as advance:
            report.tallies[kind.name] = flip_kind(
                kind, lambda made, n=count: list(draw(made, n, arguments.seed)), Path(folder), advance
            )
        tally = report.tallies[kind.name]
        print(f"{kind.name}: {dict(tally.total())} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for example in tally.examples[:5]:
            print(f"    {example}", file=sys.stderr)
    report.add_totals()
    report.finish(arguments)


def _is_chosen(name: str, wanted: str | None) -> bool:
    return wanted is None or any(name.startswith(part.strip()) for part in wanted.split(","))


if __name__ == "__main__":
    main()
