"""The sparse-attention study: train small language models from scratch, dense and sparse, plain and on a curriculum.

    python benchmarks/studies/sparse/sparse_study.py --save
    python benchmarks/studies/sparse/sparse_study.py --quick

Contract: every kind of attention of studies/sparse_study.toml is trained in every order with every seed, on the same number of
tokens, and measured on held-out rows of studies/recall_task.py: loss of the text, and recall of facts that are farther back than
any stack of local windows reaches. "sparsity" is the curriculum by the sparsity of hidden states in a small dense model that was
trained in advance, on rows in plain order, for `reference_steps`; "random" has the same pacing and no difficulty. Each run is one
file that is complete or absent, so a study that was stopped at any moment continues when it is started again. A folder of other
settings or rows is refused. No part of docs/results/sparse-attention-study.md is written by hand.

"retrofit" attaches an index branch to the dense model of the same order and seed, and trains only this branch, for `full_steps`
steps over every block on the rows in plain order. These tokens are additional.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_study_model import EVALUATED, Study, best_possible, collator, make_model, make_tokenizer, train
from sparse_study_page import write_page
from studies.recall_task import recall_rows

import sparsort
from sparsort.attention.selectors import SELECTORS
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.scorers.sparsity import SparsityScorer
from sparsort.storage.files import write_atomically, write_json
from sparsort.storage.integrity import check_file, read_sealed, record_of, write_sealed
from sparsort.terminal.progress import progress

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "benchmarks" / "studies" / "sparse_study.toml"
ATTENTIONS = ("dense", "retrofit", *SELECTORS)
ORDERS = ("plain", "random", "sparsity", "anti_sparsity", "level")
_REFERENCE_SEED = 1_000_000
Rows = list[dict[str, Any]]
Unit = tuple[str, str, int]
_AGAIN = "Delete the runs and the weights of that seed to train them again."


def read_study(path: Path) -> Study:
    """Read a recipe.

    Raises:
        SparsortError: a setting, kind of attention or order is unknown, or numbers do not fit together.
    """
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    for name in given:
        if name not in Study.__dataclass_fields__:
            raise unknown_choice("setting", name, Study.__dataclass_fields__)
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    study = Study(**fields)
    for kind, names, choices in (("attention", study.attentions, ATTENTIONS), ("order", study.orders, ORDERS)):
        for name in names:
            if name not in choices:
                raise unknown_choice(kind, name, choices)
    if study.attentions[0] != "dense" or study.orders[0] != "plain" or study.seeds < 2:
        raise SparsortError(
            "the study compares with dense attention and with plain order, over 2 seeds or more: name them first."
        )
    if study.steps % study.evaluate_every or study.full_steps >= study.steps:
        raise SparsortError(
            f"steps is {study.steps}: expected a multiple of evaluate_every ({study.evaluate_every}), so that the last step is "
            f"measured, above full_steps ({study.full_steps})."
        )
    return study


def quick(study: Study) -> Study:
    """Settings for a run of a minute or two that only shows that everything runs; its numbers have no meaning."""
    sizes: dict[str, Any] = {
        "rows": 100,
        "held_out": 20,
        "steps": 12,
        "evaluate_every": 6,
        "full_steps": 6,
        "reference_steps": 6,
    }
    return replace(study, seeds=2, **sizes)


def score(study: Study, rows: Rows, tokenizer: Any, folder: Path) -> NDArray[np.float64]:
    """Difficulty of the rows (N,): sparsity of the reference model's states, stored in the folder."""
    kept = folder / "reference.safetensors"
    model = make_model(study, len(tokenizer), _REFERENCE_SEED)
    # The record of the weights is written last, so the weights are complete if it exists.
    if not kept.with_suffix(".json").exists():
        plan = make_plan(study, "plain", np.zeros(len(rows)), _REFERENCE_SEED)
        train(study, model, "dense", plan, rows, rows[:1], tokenizer, _REFERENCE_SEED, steps=study.reference_steps)
        _save(model, kept)
    _load(model, kept)
    scorer = SparsityScorer(model.eval(), tokenizer=tokenizer, pooling="mean_state", metric="hoyer")
    return np.asarray(scorer.score(rows, "{text}", out=folder / "scores").difficulty_of(rows), dtype=np.float64)


def make_plan(study: Study, order: str, difficulty: NDArray[np.float64], seed: int) -> CurriculumPlan:
    """The plan of one order; plain and random do not read `difficulty`."""
    if order == "plain":
        return plan_curriculum(difficulty, schedule="shuffle", batch_size=study.batch_size, seed=seed)
    direction = {"random": "random", "anti_sparsity": "hard_to_easy"}.get(order, "easy_to_hard")
    return plan_curriculum(
        difficulty,
        mode="pool",
        pacing=study.pacing,
        direction=direction,
        stages=study.stages,
        steps=study.steps,
        batch_size=study.batch_size,
        seed=seed,
    )


def _path(folder: Path, unit: Unit) -> Path:
    return folder / "runs" / f"{'-'.join(map(str, unit))}.json"


def _weights(folder: Path, unit: Unit) -> Path:
    return folder / "weights" / f"{'-'.join(map(str, unit))}.safetensors"


def _save(model: Any, path: Path) -> None:
    with write_atomically(path) as temporary:
        save_model(model, str(temporary))
        record = record_of(temporary)
    write_sealed(path.with_suffix(".json"), {"file": record})


def _load(model: Any, path: Path) -> None:
    check_file(path, read_sealed(path.with_suffix(".json"), next_step=_AGAIN)["file"], next_step=_AGAIN)
    # The record is checked first, so that damaged weights are never loaded.
    load_model(model, path)


def _work(study: Study, data: tuple[Rows, Rows], folder: Path, unit: Unit, difficulty: NDArray[np.float64]) -> None:
    """One run in a separate process, on one core."""
    torch.set_num_threads(1)
    attention, order, seed = unit
    rows, held_out = data
    tokenizer = make_tokenizer([*rows, *held_out])
    model = make_model(study, len(tokenizer), seed)
    steps = study.steps
    # A retrofit continues from the dense model, and trains as many steps as the warm-up of the others has.
    if attention == "retrofit":
        _load(model, _weights(folder, ("dense", order, seed)))
        attention, steps = "index_branch", study.full_steps
    plan = make_plan(study, order if unit[0] != "retrofit" else "plain", difficulty, seed)
    frozen = unit[0] == "retrofit"
    found = train(study, model, attention, plan, rows, held_out, tokenizer, seed, steps=steps, frozen=frozen)
    if attention == "dense":
        _save(model, _weights(folder, unit))
    write_sealed(_path(folder, unit), {"attention": unit[0], "order": order, "seed": seed, **found})


def run(
    study: Study, data: tuple[Rows, Rows], folder: Path, processes: int
) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
    """All runs, and the difficulty of the rows; runs that the folder has are read from it.

    Raises:
        SparsortError: the folder has a study with other settings or rows.
    """
    digest = hashlib.blake2b(json.dumps(data).encode(), digest_size=12).hexdigest()
    # Seeds, orders and kinds of attention may be added to a study.
    grid = ("attentions", "orders", "seeds")
    about = {"study": {key: value for key, value in asdict(study).items() if key not in grid}, "rows": digest}
    kept = folder / "study.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != about:
        raise SparsortError(f"{folder} has a study with other settings or rows. Choose another --out, or delete it.")
    write_json(kept, about)
    tokenizer = make_tokenizer([*data[0], *data[1]])
    scores = {"sparsity": score(study, data[0], tokenizer, folder)}
    scores["level"] = np.array([row["level"] for row in data[0]], dtype=np.float64)
    # Seed by seed, so that the runs of an unfinished study can be compared.
    units = [(kind, order, seed) for seed in range(study.seeds) for order in study.orders for kind in study.attentions]
    missing = [unit for unit in units if not _path(folder, unit).exists()]
    # Processes are spawned, because forking after torch has started threads may deadlock.
    with (
        progress("training", len(units)) as advance,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        advance(len(units) - len(missing))
        # Retrofits come after the dense models from which they start.
        for retrofits in (False, True):
            futures = [
                pool.submit(_work, study, data, folder, unit, scores["level" if unit[1] == "level" else "sparsity"])
                for unit in missing
                if (unit[0] == "retrofit") == retrofits
            ]
            for future in as_completed(futures):
                future.result()
                advance(1)
    return [read_sealed(_path(folder, unit), next_step=_AGAIN) for unit in units], scores["sparsity"]


def bounds(study: Study, held_out: Rows, tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """The attention mass of each dense model that the best blocks would catch."""
    batch = collator(study, tokenizer)(held_out[:EVALUATED])
    found = []
    for order in study.orders:
        for seed in range(study.seeds):
            model = make_model(study, len(tokenizer), seed)
            _load(model, _weights(folder, ("dense", order, seed)))
            sparsort.attach_index_branch(model, selector="oracle", block_size=study.block_size, blocks=study.blocks)
            found.append({"order": order, "seed": seed, "caught": best_possible(model, batch)})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Score, train, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--out", type=Path, help="folder of the study [default: runs/sparse-study]")
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, each on one core")
    parser.add_argument("--seeds", type=int, help="in place of the recipe's")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: ends within minutes; the numbers have no meaning"
    )
    parser.add_argument("--save", action="store_true", help="write the page, its figures and benchmarks/results/")
    args = parser.parse_args(arguments)
    study = read_study(args.recipe)
    study = study if args.seeds is None else replace(study, seeds=args.seeds)
    study = quick(study) if args.quick else study
    torch.set_num_threads(1)
    data = (
        recall_rows(study.rows, 0, length=study.length),
        recall_rows(study.held_out, 0, length=study.length, split="held_out"),
    )
    folder = args.out or ROOT / "runs" / f"sparse-study{'-quick' if args.quick else ''}"
    runs, difficulty = run(study, data, folder, args.processes)
    tokenizer = make_tokenizer([*data[0], *data[1]])
    facts = {
        "study": asdict(study),
        "reach": study.reach,
        "words": len(tokenizer),
        "parameters": sum(weight.numel() for weight in make_model(study, len(tokenizer), 0).parameters()),
        "best_possible": bounds(study, data[1], tokenizer, folder),
        "difficulty": difficulty.tolist(),
        "levels": [row["level"] for row in data[0]],
    }
    write_page(facts, runs, save=args.save and not args.quick)


if __name__ == "__main__":
    main()
