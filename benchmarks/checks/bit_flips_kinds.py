"""Every kind of file that sparsort writes and later trusts: how to create a small one, and its public reader.

Contract: `make(folder)` fills an empty folder. `read(folder)` returns what a user gets from it, as a flat dictionary of values
that compare with `==`. It may repair the folder, and reports that with a warning of the logger "sparsort", as the product does.
The bytes of a file are only read through sparsort.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.store.outcomes import Outcomes
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.online.observations import Observations
from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum
from sparsort.curriculum.loading.online.running_difficulty import RunningDifficulty
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.scoring.calibration.calibration import Calibration
from sparsort.scoring.calibration.compare import compare
from sparsort.scoring.data.rows import Row, open_rows
from sparsort.scoring.loading import demo_model as embedded
from sparsort.scoring.scorers import run_shards as engine
from sparsort.scoring.store.score_tables import score_table
from sparsort.scoring.store.scores import Scores
from sparsort.storage.parquet_seal import read_seal

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from simulated_results import simulate

ROWS = [{"id": f"q{n}", "text": "word " * (n % 7)} for n in range(60)]
SHARD = 25
GROUP = "films/random/k4/seed0"
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file.

    Attributes:
        name: the kind in words.
        make: fills a folder.
        read: returns what a user gets from the folder.
        share: share of the flips, relative to the other kinds; readers that train a model take a second, others milliseconds.
        has_digests: False for files as the first sparsort 0.1 wrote them; their flips are counted separately.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Values]
    share: float = 1.0
    has_digests: bool = True


class _Lengths:
    """A scorer without a model, with two metrics; some rows have no score."""

    metrics: Sequence[str] = ("length", "vowels")

    def __init__(self) -> None:
        orientation = {"length": 1, "vowels": -1}
        environment = {"torch": "2.13.0", "threads": 2}
        self.provenance = {
            "scorer": "length",
            "metric": "length",
            "orientation": orientation,
            "prompt": "{text}",
            "environment": environment,
        }

    def score_rows(self, rows: Sequence[Row], advance: Callable[[int], None]) -> pa.Table:
        advance(len(rows))
        lengths = np.array([len(row.fields["text"]) or np.nan for row in rows], dtype=np.float64)
        vowels = np.array([row.fields["text"].count("o") / 3 for row in rows], dtype=np.float64)
        status = ["empty" if np.isnan(length) else "ok" for length in lengths]
        reason = ["the text is empty" if state == "empty" else "" for state in status]
        counts = np.arange(len(rows))
        metrics = {"length": lengths, "vowels": vowels}
        return score_table(rows, lengths, status, reason, counts, 0 * counts, metrics)


def _score(folder: Path) -> Scores:
    """Run the command `score`, which scores damaged shards again."""
    note = logging.getLogger("sparsort").warning
    return engine.run(open_rows(ROWS), _Lengths(), out=folder / "scores", shard_rows=SHARD, note=note)


def _make_unfinished_scores(folder: Path) -> None:
    engine.run_part(open_rows(ROWS), _Lengths(), out=folder / "scores", part=(0, 2), shard_rows=SHARD)


def _make_old_scores(folder: Path) -> None:
    """Write a finished folder in the first version of the format: no digests of files, and an unsealed manifest."""
    _score(folder)
    manifest = json.loads((folder / "scores" / "manifest.json").read_text(encoding="utf-8"))
    # Version 1 had neither a seal nor digests of the shards.
    del manifest["digest"]
    manifest["version"] = 1
    for shard in manifest["shards"]:
        path = folder / "scores" / shard["file"]
        facts = read_seal(path) or {}
        # In version 1 the digest of the rows was in the footer of the Parquet file.
        metadata = {"sparsort.digest": facts["digest"], "sparsort.settings": facts["settings"]}
        table = pq.read_table(path).replace_schema_metadata(metadata)
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)
        del shard["record"]
    (folder / "scores" / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _values_of_scores(scores: Scores) -> Values:
    columns: Values = {name: repr(scores.column(name).tolist()) for name in scores.table.column_names}
    return columns | {"rows": len(scores), "provenance": scores.provenance}


def _in_memory() -> Scores:
    return engine.run(open_rows(ROWS), _Lengths(), out=None)


# A store, results, a calibration, a converted model


def _make_store(folder: Path) -> None:
    rng = np.random.default_rng(0)
    store = OutcomeStore(folder, {"weights": "ab12", "engine": 1}, feature_names=("hoyer", "entropy"))
    for prefix in ("p", "r"):
        store.write(
            GROUP,
            Outcomes(
                prefix=np.array([prefix] * 8),
                query=np.array([f"q{n}" for n in range(8)]),
                log_p=-rng.exponential(size=(8, 2)),
                n_tokens=rng.integers(1, 4, size=(8, 2)),
                features=rng.normal(size=(8, 2)),
            ),
        )
    store.put_note(GROUP, "orders", {"ids": ["a", "b"], "named": {"given": [[0, 1]]}})
    store.put_note(GROUP, "spent", {"tokens": 1234, "seconds": 5.25})


def _read_store(folder: Path) -> Values:
    store = OutcomeStore.existing(folder)
    found = store.read(GROUP)
    values: Values = {
        f"{prefix} {query}": (found.log_p[n].tobytes(), found.n_tokens[n].tobytes(), found.features[n].tobytes())
        for n, (prefix, query) in enumerate(found.pairs())
    }
    notes = {name: store.get_note(GROUP, name) for name in ("orders", "spent")}
    # A damaged note is set aside, and then reads as None, like one that was never written.
    return values | {"identity": store.identity} | {name: note for name, note in notes.items() if note is not None}


def _make_results(folder: Path) -> None:
    simulate(("mr", "sst5"), shots=(4,), sets=2, orders=3, items=8, calibrated=(False,)).save(folder)


def _make_calibration(folder: Path) -> None:
    names = [f"pre_norm/{pooling}/rms/{metric}" for pooling in ("last", "answer") for metric in ("gini", "hoyer")]
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=80) for name in names}
    # Levels that correlate with one candidate, so that the calibration has a clear winner.
    level = np.digitize(values[names[1]] + 0.4 * rng.normal(size=80), (-1.0, 0.0, 1.0)).astype(float)
    rows = [Row(n, f"q{n}", {}, f"{n:032x}") for n in range(80)]
    table = score_table(rows, values[names[0]], ["ok"] * 80, [""] * 80, rng.integers(5, 50, 80), [0] * 80, values)
    fits = {f"pre_norm/{pooling}/rms": {"rule": "rms", "scale": [0.5, 0.25]} for pooling in ("last", "answer")}
    provenance = {
        "prompt": {"turns": [["text", "Q: {q}\nA:"]], "answer": " {a}"},
        "fits": fits,
        "l0_threshold": 1.0,
        "weights": f"sha256:{'a' * 64}",
        "tokenizer": f"sha256:{'b' * 64}",
        "dtype": "bfloat16",
        "environment": {"model": "some/model"},
    }
    found = compare(Scores(table, provenance), {"level": level}, n_boot=100, n_perm=100)
    found.save(folder / "calibration.json")


def _make_model_cache(folder: Path) -> None:
    with _small_conversion(folder):
        embedded.demo_folder(progress=lambda _sentence: None)


def _read_model_cache(folder: Path) -> Values:
    with _small_conversion(folder):
        found = embedded.demo_folder(progress=logging.getLogger("sparsort").warning)
    return {name: (found / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}


@contextlib.contextmanager
def _small_conversion(folder: Path) -> Iterator[None]:
    """Put the cache of the embedded model in `folder`, and replace the conversion by one that takes no time."""

    def convert(_package: Any, target: Path) -> None:
        (target / "config.json").write_text(json.dumps(embedded._CONFIG), encoding="utf-8")
        (target / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(2000))
        (target / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}', encoding="utf-8")
        files = {path.name: path.stat().st_size for path in target.iterdir()}
        record = {"layout": embedded._LAYOUT, "gguf_sha256": embedded.GGUF_SHA256, "files": files}
        (target / embedded._RECORD).write_text(json.dumps(record), encoding="utf-8")

    # The real conversion is slow, and not what is tested here.
    original, cache = embedded._convert, os.environ.get("SPARSORT_CACHE")
    embedded._convert, os.environ["SPARSORT_CACHE"] = convert, str(folder)
    try:
        yield
    finally:
        embedded._convert = original
        del os.environ["SPARSORT_CACHE"]
        if cache is not None:
            os.environ["SPARSORT_CACHE"] = cache


# Training


def _plan() -> CurriculumPlan:
    return plan_curriculum(np.random.default_rng(4).normal(size=24), seed=3, stages=2, batch_size=4)


def _read_plan(folder: Path) -> Values:
    plan = CurriculumPlan.open(folder / "plan")
    batches = [plan.batch(number, epoch).tolist() for epoch in (0, 1) for number in range(plan.n_batches)]
    return {
        "batches": batches,
        "difficulty": np.asarray(plan.difficulty).tobytes(),
        "settings": repr(plan.settings),
        "notes": dict(plan.notes),
        "fingerprint": plan.fingerprint,
    }


def _running() -> RunningDifficulty:
    running = RunningDifficulty(24, prior=np.arange(24.0), fingerprint="some plan")
    rows = np.arange(12)
    running.fold(Observations(rows=rows, steps=rows // 4, values=np.sin(rows)))
    return running


def _read_running(folder: Path) -> Values:
    running = RunningDifficulty.load(folder / "running.safetensors")
    found = running.difficulty(10).tobytes()
    return {"difficulty": found, "next_step": running.next_step, "fingerprint": running.fingerprint}


class _Toy(torch.nn.Module):
    """A language model without layers: its head reads the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embedding = torch.nn.Embedding.from_pretrained(torch.randn((24, 8), generator=generator), freeze=False)
        self.head = torch.nn.Linear(8, 24, bias=False, device="meta").to_empty(device="cpu")
        self.head.weight.data.copy_(torch.randn((24, 8), generator=generator))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def _online() -> tuple[_Toy, CurriculumLoader]:
    plan = plan_curriculum(
        np.random.default_rng(4).normal(size=24),
        seed=3,
        mode="pool",
        pacing="linear:start=0.3",
        steps=8,
        stages=4,
        batch_size=4,
    )
    rows = [{"input_ids": torch.tensor([row, row * 7 % 24])} for row in range(24)]
    # The plan is made of numbers only, so it has no ids or contents of rows to verify.
    return _Toy(), CurriculumLoader(plan, rows, verify=False)


def _make_online(folder: Path) -> None:
    toy, loader = _online()
    with OnlineCurriculum(toy, loader) as online:
        # Five of eight steps pass the end of the first stage, at which the plan is revised.
        for _, batch in zip(range(5), loader, strict=False):
            toy(**batch).logits.sum().backward()
        online.save(folder / "online")


def _read_online(folder: Path) -> Values:
    toy, loader = _online()
    with OnlineCurriculum(toy, loader) as online:
        online.load(folder / "online")
        plan = loader.plan
        return {
            "difficulty": online.running.difficulty(100).tobytes(),
            "loader": loader.state_dict(),
            "plan": [plan.batch(number, loader.epoch).tolist() for number in range(loader.batch, plan.n_batches)],
        }


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Restore the global generators, which Trainer seeds on purpose, and hide its progress bars."""
    from sparsort.scoring.loading.demo_model import quiet_transformers

    # torch's state is restored by `fork_rng`.
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _trainer(folder: Path, steps: int) -> Any:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments, default_data_collator

    from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer

    tokens = np.random.default_rng(0).integers(0, 32, (24, 5)).tolist()
    rows = datasets.Dataset.from_list([{"id": str(n), "input_ids": row, "labels": row} for n, row in enumerate(tokens)])
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = TrainingArguments(
        str(folder / "training"),
        per_device_train_batch_size=4,
        max_steps=steps,
        save_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        seed=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = CurriculumTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_dropout=0.3, **size)),
        arguments,
        curriculum=plan_curriculum(np.arange(24.0), ids=[str(n) for n in range(24)], batch_size=4),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_checkpoints(folder: Path) -> None:
    with _training():
        _trainer(folder, 4).train()


def _read_checkpoints(folder: Path) -> Values:
    """Train to the end from the newest checkpoint, or from an earlier one if that is damaged."""
    with _training():
        trainer = _trainer(folder, 6)
        trainer.train(resume_from_checkpoint=True)
    return {name: weight.numpy().tobytes() for name, weight in trainer.model.state_dict().items()}


_TRAIN: Mapping[str, Any] = {
    "curriculum": {"schedule": "shuffle", "batch_size": 4},
    **{"max_length": 16, "save_steps": 1, "eval_share": 0.0, "lr_schedule": "constant", "seed": 5},
}


def _train(folder: Path) -> Values:
    from sparsort.recipes.train.train import train

    rows = [{"text": f"{n} and {n} are {2 * n}", "id": f"r{n:03d}"} for n in range(8)]
    with _training():
        found = train(rows, "{text}", out=folder / "run", **_TRAIN)
    weights = (folder / "run" / "model" / "model.safetensors").read_bytes()
    return {"weights": weights, "loss": found.loss, "steps": found.steps, "plan": found.plan, "rows": found.rows}


def _saving(write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)

    return make


def _loading(name: str) -> Callable[[Path], Values]:
    return lambda folder: _values_of_scores(Scores.load(folder / name))


KINDS: tuple[Kind, ...] = (
    Kind(name="score folder, read", make=_saving(_score), read=_loading("scores")),
    Kind(name="score folder, scored again", make=_saving(_score), read=lambda f: _values_of_scores(_score(f))),
    Kind(
        name="unfinished score folder, scored on",
        make=_make_unfinished_scores,
        read=lambda f: _values_of_scores(_score(f)),
    ),
    Kind(
        name="scores as Parquet",
        make=_saving(lambda f: _in_memory().to_parquet(f / "scores.parquet")),
        read=_loading("scores.parquet"),
    ),
    Kind(
        name="scores as JSONL",
        make=_saving(lambda f: _in_memory().to_jsonl(f / "scores.jsonl")),
        read=_loading("scores.jsonl"),
    ),
    Kind(
        name="scores as a saved dataset",
        make=_saving(lambda f: _in_memory().to_dataset().save_to_disk(str(f / "scores"))),
        read=_loading("scores"),
    ),
    Kind(name="outcome store", make=_make_store, read=_read_store),
    Kind(name="results", make=_make_results, read=lambda f: {"results": Results.load(f).to_dict()}),
    Kind(
        name="calibration",
        make=_make_calibration,
        read=lambda f: {"calibration": Calibration.load(f / "calibration.json").to_dict()},
    ),
    Kind(name="converted model", make=_make_model_cache, read=_read_model_cache),
    Kind(name="plan", make=_saving(lambda f: _plan().save(f / "plan")), read=_read_plan),
    Kind(
        name="running difficulty",
        make=_saving(lambda f: _running().save(f / "running.safetensors")),
        read=_read_running,
    ),
    Kind(name="online curriculum", make=_make_online, read=_read_online, share=0.5),
    Kind(name="checkpoints", make=_make_checkpoints, read=_read_checkpoints, share=0.3),
    Kind(name="training folder", make=_saving(_train), read=_train, share=0.3),
    Kind(name="score folder, version 1", make=_make_old_scores, read=_loading("scores"), has_digests=False),
)
