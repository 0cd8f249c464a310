"""The ordering study: run it (or use the answers in its store), and write docs/results/ordering-study.md with its figures.

One command repeats the study. It takes hours, and can be stopped and resumed at any time. Two processes at once, with one thread
each (OMP_NUM_THREADS=1), take half the time:

    python benchmarks/studies/ordering/ordering_study.py --data FOLDER --save

FOLDER has icl/{trec,mr,sst5,rte,cb}.{train,dev_subsample}.jsonl as prepared for arXiv 2104.08786. With --study cone it is a
small study of ConE on one task, on the same sets and orders. Both begin with the model's answers that are in
benchmarks/results/ordering-study-outcomes.parquet, and query the model for the others; with --fresh a study begins without
answers. With --no-run the page is written from the answers that exist, and its head reports whether the study is finished. The
section "Which prior" is made from the results of `prior_shift.py --save`. Nothing in the page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ordering_study_outcomes import pack, unpack
from prior_shift_page import section

from sparsort.curriculum.ablation.recipe.ablation import Ablation, demo_sets
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.recipes.ablate import ablate
from sparsort.recipes.report import make_report
from sparsort.storage.files import write_atomically
from sparsort.storage.locks import locked

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "benchmarks" / "results" / "ordering-study-outcomes.parquet"
PRIOR_SHIFT = ROOT / "benchmarks" / "results" / "prior-shift.json"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One page: its recipe in benchmarks/studies/, its name in docs/results/, its title, and an introduction."""

    recipe: str
    page: str
    title: str
    about: str

    def read(self, data: Path) -> Ablation:
        """The recipe, with its data."""
        return replace(Ablation.from_toml(ROOT / "benchmarks" / "studies" / self.recipe), data=data.resolve())


STUDIES = {
    "all": Study(
        recipe="ordering_study.toml",
        page="ordering-study",
        title="Which orders of demonstrations help: a study on five tasks with Gemma 3 270M",
        about=(
            "ConE is not among the criteria, because it needs the whole vocabulary's probabilities after every token of a query, "
            "which costs several times as much as everything else. It was run [on trec only, with k = 4 and 64 test "
            "rows](ordering-study-cone.md). [A search](orderer-search.md) looked for an orderer based on sparsity. The section "
            "[which prior](#which-prior) compares priors for PDO when label shares shift."
        ),
    ),
    "cone": Study(
        recipe="ordering_study_cone.toml",
        page="ordering-study-cone",
        title="Does ConE's choice of an order help: a study on trec with Gemma 3 270M",
        about=(
            "ConE (arXiv 2401.12087) chooses for every question the order after which the question is least surprising to the "
            "model. Its authors choose demonstrations this way; here it chooses among 16 orders of given ones. Sets, orders and "
            "the 64 test rows are among those of [the study on five tasks](ordering-study.md), which has more orderers. The "
            "tokens and the time below include what those answers cost there."
        ),
    ),
}


def head(report: dict[str, Any], name: str, planned: int) -> str:
    """The introduction of the page: the state of the study, and how the page was made."""
    sets = [cell["sets"] for cell in report["cells"]]
    done = sum(sets) // len({cell["calibrated"] for cell in report["cells"]})
    state = f"All {planned} demonstration sets are done."
    if done < planned:
        state = f"**The study is unfinished: {done} of {planned} demonstration sets are done.** This page covers those."
    elif report["provenance"]["incomplete"]:
        state += " **Not yet under every orderer**: the caveats list those that are missing."
    study, option = STUDIES[name], "" if name == "all" else f" --study {name}"
    return (
        f"{state} Made by `python benchmarks/studies/ordering/ordering_study.py --data FOLDER{option} --save`, "
        "which queries the model only for answers that are not in its store; the recipe is "
        f"[benchmarks/studies/{study.recipe}](../../benchmarks/studies/{study.recipe}). "
        f"Orders, criteria and intervals are defined in [ablation](../ablation.md).\n\n{study.about}"
    )


def main() -> None:
    """Run the study, collect its results, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with icl/*.jsonl")
    parser.add_argument("--out", type=Path, help="folder of the study [default: by its name in runs/]")
    parser.add_argument("--study", choices=STUDIES, default="all", help="five tasks without ConE, or one with it")
    parser.add_argument("--fresh", action="store_true", help="do not begin with the stored answers")
    parser.add_argument("--no-run", action="store_true", help="do not query the model")
    parser.add_argument("--no-compile", action="store_true", help="run the model as it is, without a C++ compiler")
    parser.add_argument("--save", action="store_true", help="write the page, its figures and benchmarks/results/")
    args = parser.parse_args()
    study = STUDIES[args.study]
    recipe = study.read(args.data)
    out = args.out or ROOT / "runs" / study.page
    store = out / "store"
    if args.fresh and store.exists():
        sys.exit(f"{store} contains a study already. Remove it, or pass another folder (--out).")
    if KEPT.exists() and not store.exists() and not args.fresh:
        print(f"beginning with the answers in {KEPT.name}", file=sys.stderr)
        unpack(KEPT, store)
    done = ablate(
        recipe,
        out=out,
        run=not args.no_run,
        report=False,
        compile=not args.no_compile,
    )
    written = make_report(done.results, out / "report", title=study.title)
    report: dict[str, Any] = dict(written.report)
    planned = len(list(demo_sets(recipe)))
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    text = text.replace(f"# {study.title}\n", f"# {study.title}\n\n{head(report, args.study, planned)}\n", 1)
    if args.study == "all" and PRIOR_SHIFT.exists():
        text = f"{text.rstrip()}\n\n{section(PRIOR_SHIFT)}\n"
    if not args.save:
        print(text)
        return
    # Two processes of one study end at about the same time, and only one may write.
    with locked(out / "save.lock", wait=True):
        save(report, study, text, out / "report")
        if args.study == "all":
            pack(OutcomeStore.existing(store), recipe, KEPT)
            print(KEPT)


def save(report: dict[str, Any], study: Study, text: str, made: Path) -> None:
    """Save the page, its figures and the numbers."""
    page = ROOT / "docs" / "results" / f"{study.page}.md"
    figures = page.with_suffix("")
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    for path in sorted((made / "figures").glob("*.png")):
        shutil.copy(path, figures / path.name)
    with write_atomically(page) as temporary:
        temporary.write_text(text.replace("](figures/", f"]({study.page}/"), encoding="utf-8")
    kept = {name: report[name] for name in ("title", "provenance", "findings", "pooled", "cells")}
    for cell in kept["cells"]:
        for held in (cell["random"], *cell["arms"]):
            for name in [name for name in held if name.startswith(("label_", "entropy_"))]:
                del held[name]
    target = ROOT / "benchmarks" / "results" / f"{study.page}.json"
    # The JSON is for programs, so it has one line; readers have the page.
    with write_atomically(target) as temporary:
        temporary.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    print(f"{page}\n{target}")


if __name__ == "__main__":
    main()
