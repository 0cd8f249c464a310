"""One flipped bit in any region of any file that sparsort trusts later is refused, repaired, or changes no value.

The fast version of `benchmarks/checks/bit_flips.py`: each region of each file of each kind once, and of the kinds whose readers
train a model a few of these.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "checks"
sys.path.insert(0, str(BENCHMARKS))
try:
    flips: Any = importlib.import_module("bit_flips")
finally:
    sys.path.remove(str(BENCHMARKS))

SLOW = 0.5  # the share of a kind whose reader takes a second
FEW = 3


@pytest.mark.parametrize("kind", flips.KINDS, ids=lambda kind: kind.name)
def test_a_flipped_bit_never_gives_other_values(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def choose(made: Path) -> list[Any]:
        count = sum(len(flips.regions(made / name)) for name in flips.files(made))
        return list(flips.draw(made, FEW if kind.share <= SLOW else max(FEW, count), seed=1))

    tally = flips.flip_kind(kind, choose, tmp_path / "work")
    capsys.readouterr()
    total = tally.total()
    assert total.total() >= FEW
    if kind.has_digests:
        assert not tally.examples
        assert total["refused"] + total["recomputed"] + total["partial"] > 0
    else:
        # Without digests a flip may change what only a person reads, such as the machine in the provenance.
        assert all(example.endswith("different in provenance") for example in tally.examples)


def test_the_judge_tells_outcomes_apart(tmp_path: Path) -> None:
    """A reader that checks nothing is caught by the same harness."""

    def make(folder: Path) -> None:
        (folder / "numbers.txt").write_text("1 2 3", encoding="utf-8")

    def read(folder: Path) -> dict[str, Any]:
        return {"numbers": [int(part) for part in (folder / "numbers.txt").read_text(encoding="utf-8").split()]}

    def choose(made: Path) -> list[Any]:
        assert flips.files(made) == ["numbers.txt"]
        # "1" becomes "0", then "q"; a space becomes "!"; "3" becomes "\x13", which splits nothing.
        return [flips.Flip("numbers.txt", "body", byte, bit) for byte, bit in ((0, 0), (0, 6), (1, 0), (2, 4))]

    tally = flips.flip_kind(flips.Kind(name="bare", make=make, read=read), choose, tmp_path / "work")
    assert tally.total() == Counter({"traceback": 3, "different": 1})
    assert tally.examples[0].endswith("different in numbers")


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    assert flips.upper_bound(0, 10_000) == pytest.approx(1 - 0.05 ** (1 / 10_000))
    assert flips.upper_bound(3, 100) == pytest.approx(0.0757, abs=5e-4)  # 7.57 %, by their table
    assert flips.upper_bound(5, 5) == 1.0


def test_a_parquet_file_has_its_footer_and_its_seal_in_its_foot(tmp_path: Path) -> None:
    flips.KINDS[3].make(tmp_path)
    path = tmp_path / "scores.parquet"
    content, parts = path.read_bytes(), flips.regions(path)
    assert content[parts["foot"].start :].count(b"sparsort") >= 2
    assert [places for part in parts.values() for places in part] == list(range(len(content)))
