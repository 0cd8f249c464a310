"""The ordering study: run it (or take what its store holds), and write docs/results/ordering-study.md with its figures.

One command makes it again; it takes hours and can be stopped and started at any moment. Two processes at once, with one thread
each (OMP_NUM_THREADS=1), take half the time:

    python benchmarks/ordering_study.py --data FOLDER --save

FOLDER holds icl/{trec,mr,sst5,rte,cb}.{train,dev_subsample}.jsonl as prepared for arXiv 2104.08786. It begins with what
benchmarks/results/ordering-study-outcomes.parquet holds of the model's answers, and asks for the rest; with --fresh a new study
begins with nothing. With --no-run the page is written from what is there, finished or not; how much that is stands in its
head. Nothing in the page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ordering_study_outcomes import pack, unpack

from sparsort.curriculum.ablation.design import Ablation, units
from sparsort.curriculum.ablation.store import OutcomeStore
from sparsort.files import write_atomically
from sparsort.locks import locked
from sparsort.recipes.ablate import ablate
from sparsort.recipes.report import make_report

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "ordering-study-outcomes.parquet"
PAGE = ROOT / "docs" / "results" / "ordering-study.md"
TITLE = "Which orders of demonstrations help: a study on five tasks with Gemma 3 270M"


def head(report: dict[str, Any], planned: int) -> str:
    """What a reader has to know before the numbers."""
    sets = [cell["sets"] for cell in report["cells"]]
    done = sum(sets) // len({cell["calibrated"] for cell in report["cells"]})
    state = f"All {planned} demonstration sets are done."
    if done < planned:
        state = f"**The study is unfinished: {done} of {planned} demonstration sets are done.** What stands here holds for those."
    elif report["provenance"]["incomplete"]:
        state += " **Not yet under every orderer**: what is left out stands among the notes."
    return (
        f"{state} Made by `python benchmarks/ordering_study.py --data FOLDER --save`, "
        "which asks the model only for what its store lacks; the recipe is "
        "[recipes/ordering_study.toml](../../recipes/ordering_study.toml). "
        "How orders, choosers and intervals are defined: [ablation](../ablation.md).\n\n"
        "ConE is not among the choosers: it reads the whole vocabulary behind every token of a query, several times the cost of "
        "all else. What was searched for an orderer from sparsity: [the search](orderer-search.md)."
    )


def main() -> None:
    """Run, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with icl/*.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ordering-study", help="folder of the study")
    parser.add_argument("--fresh", action="store_true", help="do not begin with the answers that are kept")
    parser.add_argument("--no-run", action="store_true", help="ask the model nothing")
    parser.add_argument("--no-compile", action="store_true", help="run the model as it is, without a C++ compiler")
    parser.add_argument("--save", action="store_true", help="write the page, its figures and benchmarks/results/")
    args = parser.parse_args()
    recipe = replace(Ablation.from_toml(ROOT / "recipes" / "ordering_study.toml"), data=args.data.resolve())
    store = args.out / "store"
    if args.fresh and store.exists():
        sys.exit(f"{store} holds a study already. Take it away, or name another folder (--out).")
    if KEPT.exists() and not store.exists() and not args.fresh:
        print(f"taking up the answers that {KEPT.name} holds", file=sys.stderr)
        unpack(KEPT, store)
    done = ablate(
        recipe,
        out=args.out,
        run=not args.no_run,
        report=False,
        compile=not args.no_compile,
    )
    written = make_report(done.results, args.out / "report", title=TITLE)
    report: dict[str, Any] = dict(written.report)
    planned = len(list(units(recipe)))
    text = (args.out / "report" / "report.md").read_text(encoding="utf-8")
    text = text.replace(f"# {TITLE}\n", f"# {TITLE}\n\n{head(report, planned)}\n", 1)
    if not args.save:
        print(text)
        return
    # Two processes of one study end at about the same time.
    with locked(args.out / "save.lock", wait=True):
        save(report, text, args.out, recipe)


def save(report: dict[str, Any], text: str, out: Path, recipe: Ablation) -> None:
    """Write the page, its figures, the numbers and the answers."""
    figures = PAGE.parent / "ordering-study"
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    for path in sorted((out / "report" / "figures").glob("*.png")):
        shutil.copy(path, figures / path.name)
    with write_atomically(PAGE) as temporary:
        temporary.write_text(text.replace("](figures/", "](ordering-study/"), encoding="utf-8")
    kept = {name: report[name] for name in ("title", "provenance", "findings", "pooled", "cells")}
    for cell in kept["cells"]:
        for held in (cell["random"], *cell["arms"]):
            for name in [name for name in held if name.startswith(("label_", "entropy_"))]:
                del held[name]
    target = ROOT / "benchmarks" / "results" / "ordering-study.json"
    # Numbers for programs: one line, as the page holds the same for readers.
    with write_atomically(target) as temporary:
        temporary.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    pack(OutcomeStore.existing(out / "store"), recipe, KEPT)
    print(f"{PAGE}\n{target}\n{KEPT}")


if __name__ == "__main__":
    main()
