"""Do loaders and trainers resume exactly? Runs the cases of `conformance.py` and writes the table of docs/resuming.md.

    python benchmarks/checks/resume_conformance/resume_conformance.py [--only NAME] [--save | --page]

Systems that are not installed are skipped and named. For all of them:

    pip install accelerate torchdata mosaicml-streaming trl

To check a loader or trainer of your own, write a class with the attributes and the method of `conformance.Adapter` and pass an
instance to `conformance.check`. `--save` stores the outcomes in benchmarks/results/ and writes the page. The exit code is 1 if
one of our own loaders fails a case.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import textwrap
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import RESULTS
from conformance import CASES, Adapter, check
from loaders import (
    Accelerate,
    AcceleratePlainSampler,
    AccelerateStateful,
    AccelerateStatefulPlainSampler,
    SparsortLoader,
    Streaming,
    TorchdataLoader,
)
from trainers import PlainTrainer, SparsortGrpo, SparsortTrainer, TrlGrpo, TrlSft

from sparsort.storage.files import write_atomically, write_json

FILE = RESULTS / "resume-conformance.json"
PAGE = Path(__file__).resolve().parents[3] / "docs" / "resuming.md"
OURS: tuple[Adapter, ...] = (SparsortLoader(), SparsortTrainer(), SparsortGrpo())
OTHERS: tuple[Adapter, ...] = (
    Accelerate(),
    AcceleratePlainSampler(),
    AccelerateStateful(),
    AccelerateStatefulPlainSampler(),
    TorchdataLoader(),
    Streaming(),
    PlainTrainer(),
    TrlSft(),
    TrlGrpo(),
)


# Public reports of failures that the suite finds: (system, case) → what was read there.
_ACCELERATE = "https://github.com/huggingface/accelerate"
_DEFAULT, _STATEFUL = AcceleratePlainSampler.name, AccelerateStatefulPlainSampler.name
_UNSAVED = (
    f"Reported in [accelerate #4233]({_ACCELERATE}/pull/4233) and [#2823]({_ACCELERATE}/issues/2823): the state of the generator "
    "is saved after it has drawn the epoch's permutation."
)
_POSITION = (
    f"Reported in [accelerate #4195]({_ACCELERATE}/issues/4195): the position is restored and the permutation is not."
)
_NO_ORDER = (
    f"Reported in [accelerate #4203]({_ACCELERATE}/pull/4203): the position is restored and the permutation is not."
)
_PER_RANK = "By design: the state of a sampler belongs to one of a fixed number of ranks. We know no public report."
_PER_WORKER = (
    "By design: torchdata's state has one part per worker, as "
    "[bionemo-recipes #1212](https://github.com/NVIDIA-BioNeMo/bionemo-recipes/pull/1212) tells its users."
)
_REPEATED_EPOCH = (
    "We know no public report. `RepeatSampler` has no `set_epoch`, so the resumed epoch has the first one's order."
)
REPORTS: dict[tuple[str, str], str] = {
    **{(_DEFAULT, case.name): _UNSAVED for case in CASES},
    **{(_STATEFUL, case.name): _NO_ORDER for case in CASES},
    **{(_STATEFUL, case): _POSITION for case in ("two ranks", "other ranks")},
    **{(name, "other workers"): _PER_WORKER for name in (_STATEFUL, AccelerateStateful.name, TorchdataLoader.name)},
    (TorchdataLoader.name, "other ranks"): _PER_RANK,
    **{(TrlGrpo.name, case.name): _REPEATED_EPOCH for case in CASES},
}
LEGEND = """| case | stop, and what changes at the resume |
| --- | --- |
| first epoch, later epoch | inside the first, or the second, of three shuffled epochs |
| epoch boundary | after the last batch of an epoch |
| prefetched | inside an epoch, with batches in flight from two worker processes |
| other workers | from two worker processes to one |
| two ranks | inside an epoch, on two ranks |
| other ranks | from two ranks to one, with the same global batch |
| accumulation | with two micro-batches per optimiser step |
| packing | with several examples per sequence |"""


def versions(adapter: Adapter) -> str | None:
    """The packages of an adapter with their versions; None if one of them is not installed."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in adapter.packages)
    except PackageNotFoundError:
        return None


def write_page(stored: dict[str, Any]) -> None:
    """Write docs/resuming.md from the stored outcomes."""
    columns = [case.name for case in CASES]
    lines = [f"| system | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    notes: list[str] = []
    for name, entry in stored.items():
        cells = [_cell(name, case, entry["outcomes"].get(case), notes) for case in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    tested = [f"- {name}: {entry['versions']}" for name, entry in stored.items()]
    blocks = [
        "# Does training resume exactly?",
        "A run is stopped, everything is built again from what was saved, and the rest is compared with that of a run that was "
        "never stopped. A resume is exact if the **order** of the ids in every global batch is restored, and if, in the epoch of "
        "the stop, nothing is **repeated** and nothing is **lost**.",
        LEGEND,
        "\n".join(lines),
        "“—” means that the system has no such case, or that it cannot run in one process "
        "(`tests/curriculum/loading/test_processes.py` runs ours on several). A letter refers to a note: the "
        "criteria that are not met, or the error, and a public report where we know one.",
        "\n".join(notes),
        "Tested with:",
        "\n".join(tested),
        "The table is written by `python benchmarks/checks/resume_conformance/resume_conformance.py --save`; the outcomes are "
        "in [benchmarks/results](../benchmarks/results/resume-conformance.json). `loaders.py` and `trainers.py` in that folder "
        "show how each system is set up; each resumes as its documentation describes. To check a loader or trainer of your own, "
        "write a class with one method, `run`, after the protocol `Adapter` in `conformance.py`. The tests of this repository "
        "run the cases of our own loader and trainer.",
    ]
    wrapped = (_wrap(block) for block in blocks if block)
    with write_atomically(PAGE) as temporary:
        temporary.write_text("\n\n".join(wrapped) + "\n", encoding="utf-8")


def _wrap(block: str) -> str:
    return block if block[0] in "#|-" else textwrap.fill(block, 130, break_on_hyphens=False)


def _cell(name: str, case: str, outcome: dict[str, Any] | None, notes: list[str]) -> str:
    if outcome is None:
        return "—"
    if not outcome["broken"] and not outcome["error"]:
        return "exact"
    what = f"`{outcome['error']}`" if outcome["error"] else ", ".join(outcome["broken"])
    text = f"{what}. {REPORTS.get((name, case), 'We know no public report.')}"
    letters = string.ascii_lowercase
    known = next((number for number, note in enumerate(notes) if note.split(") ", 1)[1] == text), None)
    if known is None:
        known = len(notes)
        notes.append(f"- ({letters[known]}) {text}")
    return f"**no** ({letters[known]})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the systems whose name contains this text")
    parser.add_argument("--save", action="store_true", help="store the outcomes, and write docs/resuming.md")
    parser.add_argument("--page", action="store_true", help="only write docs/resuming.md, from the stored outcomes")
    arguments = parser.parse_args()
    if arguments.page:
        write_page(json.loads(FILE.read_text()))
        return 0
    chosen = [each for each in (*OURS, *OTHERS) if (arguments.only or "").lower() in each.name.lower()]
    missing = [each.name for each in chosen if versions(each) is None]
    if missing:
        print(f"not installed, so skipped: {', '.join(missing)}", file=sys.stderr)
    found = check(
        [each for each in chosen if versions(each)], report=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print("\n".join(found.failures()) or "no failure")
    if arguments.save:
        # Outcomes of systems that were not run this time stay.
        earlier = json.loads(FILE.read_text()) if FILE.exists() else {}
        found_now = {
            each.name: {
                "versions": versions(each),
                "outcomes": {case: asdict(outcome) for case, outcome in found.outcomes[each.name].items()},
            }
            for each in chosen
            if each.name in found.outcomes
        }
        names = [each.name for each in (*OURS, *OTHERS)]
        merged = earlier | found_now
        stored = {name: merged[name] for name in names if name in merged}
        write_json(FILE, stored)
        write_page(stored)
    return (
        1 if any(not outcome.passed for each in OURS for outcome in found.outcomes.get(each.name, {}).values()) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
