"""The curriculum study: train a small language model from scratch under every order, and write docs/results/curriculum-study.md.

    python benchmarks/studies/curriculum/curriculum_study.py --save
    python benchmarks/studies/curriculum/curriculum_study.py --data FILE.jsonl --text '{question} {answer}' --save

Contract: the texts are scored once per scorer, then every order of benchmarks/studies/curriculum_study.toml is trained with every
learning-rate schedule and seed. Scores and runs are stored in a folder, each run as one file that is complete or absent, so a
study that was stopped at any moment continues when it is started again. A folder of other settings or other texts is refused. No
part of the page is written by hand.

All curricula, the random control and the anti-curricula draw from a growing share of the texts (`mode="pool"`) under the same
pacing. Plain shuffle reads all texts, epoch after epoch. Texts are bytes, cut at `max_bytes` before anything reads them.

Shapes: B texts per batch, T bytes, N texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from curriculum_study_page import write_page
from numpy.typing import NDArray
from studies.graded_text import graded_texts
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum
from sparsort.curriculum.loading.online.running_difficulty import RunningDifficulty
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.scorers.base import Scorer
from sparsort.scoring.scorers.baselines import ColumnScorer, CompressionScorer, LengthScorer
from sparsort.scoring.scorers.losses import LossScorer
from sparsort.scoring.scorers.sparsity import SparsityScorer
from sparsort.scoring.store.scores import Scores
from sparsort.storage.files import write_json
from sparsort.storage.integrity import read_sealed, write_sealed
from sparsort.terminal.progress import progress

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "benchmarks" / "studies" / "curriculum_study.toml"
SCORERS = ("sparsity_last", "sparsity_mean", "loss", "length", "compression", "level")
ORDERS = ("plain", "random", "online", *SCORERS, *(f"anti_{name}" for name in SCORERS))
SCHEDULES = ("constant", "cosine")
# Bytes are counted from 3, as in ByT5, so that 0 can pad and 1 end a text.
_PAD, _END, _FIRST_BYTE, _VOCABULARY = 0, 1, 3, 259
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Study:
    """The fields of the recipe: models, orders, seeds and lengths of training."""

    orders: tuple[str, ...]
    schedules: tuple[str, ...]
    seeds: int
    texts: int
    held_out: int
    max_bytes: int
    pacing: str
    stages: int
    steps: int
    batch_size: int
    evaluate_every: int
    learning_rate: float
    warm_up: int
    weight_decay: float
    hidden: int
    layers: int
    heads: int
    intermediate: int

    def __post_init__(self) -> None:
        for kind, given, choices in (("order", self.orders, ORDERS), ("schedule", self.schedules, SCHEDULES)):
            for name in given:
                if name not in choices:
                    raise unknown_choice(kind, name, choices)
        if not {"plain", "random"} <= set(self.orders):
            raise SparsortError(
                f"orders are {list(self.orders)}; the study compares with 'plain' and 'random', so name both."
            )
        if self.seeds < 2:
            raise SparsortError(f"seeds is {self.seeds}; an interval needs at least 2.")
        if self.steps % self.evaluate_every:
            raise SparsortError(
                f"steps is {self.steps} and evaluate_every {self.evaluate_every}; expected a divisor of steps, so that the last "
                "step is measured."
            )

    @classmethod
    def from_toml(cls, path: Path) -> Study:
        """Read a recipe."""
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise unknown_choice("setting", name, cls.__dataclass_fields__)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def quick(self) -> Study:
        """Settings for a run of two minutes that only shows that everything runs; its numbers have no meaning."""
        sizes = {"texts": 160, "held_out": 30, "steps": 20, "evaluate_every": 5, "warm_up": 5}
        return replace(self, seeds=2, **sizes)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Rows with `id` and `text`, and `level` and `kind` if the text has them; and the number of texts that were cut."""

    name: str
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    cut: int

    def digest(self) -> str:
        """Digest of all rows in their order."""
        return hashlib.blake2b(json.dumps([self.train, self.held_out]).encode(), digest_size=12).hexdigest()


def corpus(study: Study, data: Path | None, template: str | None) -> Corpus:
    """The texts of the generator or of a file, shuffled and without duplicates.

    Raises:
        SparsortError: the file lacks a field of the template, or has too few texts.
    """
    if data is None:
        train, held_out = graded_texts(study.texts, 0), graded_texts(study.held_out, 0, split="held_out")
        name = "graded"
    else:
        if template is None:
            raise SparsortError("--data needs --text, the columns of a text in braces, such as '{question} {answer}'.")
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
        try:
            whole = [template.format_map(row) for row in rows]
        except KeyError as error:
            raise unknown_choice(f"column of {data.name}", error.args[0], map(str, rows[0])) from error
        # Texts with the same beginning are duplicates after the cut.
        texts = list({_cut(text, study.max_bytes): text for text in whole}.values())
        random.Random(0).shuffle(texts)
        if len(texts) < study.texts + study.held_out:
            raise SparsortError(
                f"{data.name} has {len(texts)} different texts; the recipe needs {study.texts} to train on and "
                f"{study.held_out} held out. Lower texts and held_out in it."
            )
        named = [{"id": f"{number:06d}", "text": text} for number, text in enumerate(texts)]
        # Held-out texts come first, so that they stay the same if a recipe has more training texts.
        held_out, train = named[: study.held_out], named[study.held_out : study.held_out + study.texts]
        name = data.stem
    cut = sum(len(row["text"].encode()) > study.max_bytes for row in (*train, *held_out))
    for row in (*train, *held_out):
        row["text"] = _cut(row["text"], study.max_bytes)
    return Corpus(name=name, train=train, held_out=held_out, cut=cut)


def _cut(text: str, most: int) -> str:
    # A cut within a character drops its bytes.
    return text.encode()[:most].decode("utf-8", errors="ignore")


def scorer(name: str) -> Scorer:
    """The scorer of an order, with the embedded model if it needs one."""
    if name.startswith("sparsity"):
        pooling = {"sparsity_last": "last", "sparsity_mean": "mean_state"}[name]
        return SparsityScorer("demo", site="pre_norm", pooling=pooling, metric="hoyer")
    if name == "loss":
        return LossScorer("demo", on="prompt")
    return {"length": LengthScorer, "compression": CompressionScorer, "level": lambda: ColumnScorer("level")}[name]()


def score(study: Study, texts: Corpus, folder: Path) -> dict[str, Scores]:
    """Scores by name; those that the folder has are read from it."""
    found = {}
    for name in SCORERS:
        if {name, f"anti_{name}"} & set(study.orders):
            out = folder / "scores" / name
            prompt = None if name == "level" else "{text}"
            found[name] = scorer(name).score(texts.train, prompt, out=out, shard_rows=256)
    return found


def make_plan(study: Study, order: str, difficulty: NDArray[np.float64], seed: int) -> CurriculumPlan:
    """The plan of one order; plain and random do not read `difficulty`."""
    if order == "plain":
        return plan_curriculum(difficulty, schedule="shuffle", batch_size=study.batch_size, seed=seed)
    direction = "hard_to_easy" if order.startswith("anti_") else "random" if order == "random" else "easy_to_hard"
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


def train(study: Study, texts: Corpus, order: str, schedule: str, seed: int, difficulty: Any) -> dict[str, Any]:
    """Train once, and measure the held-out loss in nats per byte at every `evaluate_every`-th step.

    Args:
        difficulty: (N,) scores of the order; None for orders without scores.
    """
    began = time.process_time()
    model = _model(study, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=study.learning_rate, weight_decay=study.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(study, schedule, step))
    if difficulty is None:
        difficulty = np.random.default_rng([seed, 0]).permutation(study.texts).astype(np.float64)
    plan = make_plan(study, order, difficulty, seed)
    loader = CurriculumLoader(plan, [encode(row["text"]) for row in texts.train], collate_fn=collate, verify=False)
    held_out = [encode(row["text"]) for row in texts.held_out]
    curve = [held_out_losses(model, held_out)]
    # Online difficulty hooks into the model until the last step; the other orders open nothing.
    with ExitStack() as open_until_the_end:
        if order == "online":
            # There are no scores in advance: rows that training has not shown yet have the middle rank.
            running = RunningDifficulty(plan.n_rows, half_life_steps=study.steps)
            open_until_the_end.enter_context(OnlineCurriculum(model, loader, running=running))
        for step, batch in enumerate(_endless(loader), 1):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rates.step()
            if step % study.evaluate_every == 0:
                curve.append(held_out_losses(model, held_out))
            if step == study.steps:
                break
    losses = np.stack(curve)
    levels = np.array([row.get("level", 0) for row in texts.held_out])
    return {
        "order": order,
        "schedule": schedule,
        "seed": seed,
        "steps": list(range(0, study.steps + 1, study.evaluate_every)),
        "loss": losses.mean(axis=1).tolist(),
        "by_level": {str(level): losses[:, levels == level].mean(axis=1).tolist() for level in np.unique(levels)},
        "plan": loader.plan.fingerprint,
        "seconds": time.process_time() - began,
    }


def encode(text: str) -> torch.Tensor:
    """Token ids of a text, (T,)."""
    return torch.tensor([*(byte + _FIRST_BYTE for byte in text.encode()), _END])


def collate(examples: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of the model, (B, T) each."""
    ids = pad_sequence(list(examples), batch_first=True, padding_value=_PAD)
    return {
        "input_ids": ids,
        "attention_mask": (ids != _PAD).long(),
        "labels": ids.masked_fill(ids == _PAD, _IGNORED),
    }


@torch.no_grad()
def held_out_losses(model: Any, examples: Sequence[torch.Tensor], size: int = 50) -> NDArray[np.float64]:
    """Mean loss of each text in nats per byte, (N,)."""
    model.eval()
    found = []
    for begin in range(0, len(examples), size):
        batch = collate(examples[begin : begin + size])
        # Logits at position t predict token t + 1.
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none")
        # The mean over the bytes of each text, and not over the batch, so that padding does not count.
        found.append(losses.sum(dim=1) / (labels != _IGNORED).sum(dim=1))
    model.train()
    return torch.cat(found).double().numpy()


def _model(study: Study, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=study.hidden,
        intermediate_size=study.intermediate,
        num_hidden_layers=study.layers,
        num_attention_heads=study.heads,
        max_position_embeddings=study.max_bytes + 1,
        tie_word_embeddings=True,
        pad_token_id=_PAD,
        eos_token_id=_END,
        bos_token_id=None,
    )
    # transformers draws weights from the global generator, whose state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def _rate(study: Study, schedule: str, step: int) -> float:
    warm = min(1.0, (step + 1) / study.warm_up)
    if schedule == "constant":
        return warm
    done = max(0.0, step - study.warm_up) / (study.steps - study.warm_up)
    # Cosine decay from 1 to 0 after the warm-up.
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _endless(loader: CurriculumLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def _path(folder: Path, order: str, schedule: str, seed: int) -> Path:
    return folder / "runs" / f"{order}-{schedule}-{seed}.json"


def _work(study: Study, texts: Corpus, folder: Path, unit: tuple[str, str, int], difficulty: Any) -> None:
    """One run in a separate process, on one core."""
    torch.set_num_threads(1)
    write_sealed(_path(folder, *unit), train(study, texts, *unit, difficulty))


def run(study: Study, texts: Corpus, folder: Path, processes: int) -> list[dict[str, Any]]:
    """All runs; those that the folder has are read from it.

    Raises:
        SparsortError: the folder has a study with other settings or texts.
    """
    about = {"study": json.loads(json.dumps(asdict(study))), "texts": texts.digest()}
    kept = folder / "study.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != about:
        raise SparsortError(f"{folder} has a study with other settings or texts. Choose another --out, or delete it.")
    write_json(kept, about)
    scores = {name: found.difficulty_of(texts.train) for name, found in score(study, texts, folder).items()}
    # Seed by seed, so that the runs of an unfinished study can be compared.
    units = [
        (order, schedule, seed) for seed in range(study.seeds) for schedule in study.schedules for order in study.orders
    ]
    missing = [unit for unit in units if not _path(folder, *unit).exists()]
    context = get_context("spawn")
    with (
        progress("training", len(units)) as advance,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        advance(len(units) - len(missing))
        futures = [
            pool.submit(_work, study, texts, folder, unit, scores.get(unit[0].removeprefix("anti_")))
            for unit in missing
        ]
        for future in as_completed(futures):
            future.result()
            advance(1)
    return [read_sealed(_path(folder, *unit), next_step="Delete it to train that run again.") for unit in units]


def main() -> None:
    """Score, train, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--data", type=Path, help="a .jsonl file to use instead of generated texts")
    parser.add_argument(
        "--text", help="with --data: template of a text, with columns in braces, such as '{question} {answer}'"
    )
    parser.add_argument("--out", type=Path, help="folder of the study [default: runs/curriculum-study-NAME]")
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, each on one core")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: ends within two minutes; the numbers have no meaning"
    )
    parser.add_argument("--save", action="store_true", help="write the page, its figures and benchmarks/results/")
    args = parser.parse_args()
    study = Study.from_toml(args.recipe)
    study = study.quick() if args.quick else study
    texts = corpus(study, args.data, args.text)
    if texts.name != "graded":
        study = replace(study, orders=tuple(order for order in study.orders if not order.endswith("level")))
    name = f"curriculum-study{'' if texts.name == 'graded' else f'-{texts.name}'}{'-quick' if args.quick else ''}"
    folder = args.out or ROOT / "runs" / name
    runs = run(study, texts, folder, args.processes)
    facts = {
        "study": asdict(study),
        "corpus": texts.name,
        "cut": texts.cut,
        "lengths": [len(row["text"].encode()) for row in texts.train],
        "levels": [row["level"] for row in texts.train] if "level" in texts.train[0] else None,
        "scores": {
            name: Scores.load(folder / "scores" / name).difficulty.tolist()
            for name in SCORERS
            if (folder / "scores" / name).exists()
        },
        "parameters": sum(weight.numel() for weight in _model(study, 0).parameters()),
    }
    write_page(name, facts, runs, save=args.save and not args.quick)


if __name__ == "__main__":
    main()
