"""The speed of scoring compared with a plain loop, its exactness and its memory.

    python benchmarks/speed/scoring.py [--quick] [--json] [--save] [--data FOLDER] [--model demo]

The plain loop is what a first script does: one example at a time, with `output_hidden_states=True` and logits. Both sides read
the same rows with the same prompt, count the same tokens, and alternate in one run. FLOPs are 2 · (weights of the blocks'
matrices) · (tokens that the plan computes), without attention, head and padding. The peak is the best of several bf16 matrix
products, including the model's own shapes. `ceiling` is the ratio if our whole time were matrix products at that peak: no
implementation can exceed it on this machine.

`--data` points to a folder with `math_300.jsonl` and `icl/trec.train.jsonl`; without it the examples of this repository are read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options, compare, wall_seconds
from scipy.stats import spearmanr

import sparsort
from sparsort.kernels.backend import METRIC_NAMES, default_device
from sparsort.scoring.loading.load import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[2]
_MILLION = 1_000_000


@dataclass(frozen=True)
class Task:
    """Rows, their prompt, and their floors."""

    name: str
    rows: list[dict[str, Any]]
    prompt: str
    floor_same: float | None
    floor_fp32: float | None


def tasks(data: Path | None, quick: bool) -> list[Task]:
    """The data sets that are scored."""
    if data is None:
        graded, reviews = (_read(ROOT / "examples" / name) for name in ("graded.jsonl", "reviews.jsonl"))
        found = [
            Task("graded", graded, "Question: {question}\nAnswer:", None, None),
            Task("reviews", reviews, "Review: {text}\nLabel:", None, None),
        ]
    else:
        math, trec = _read(data / "math_300.jsonl"), _read(data / "icl" / "trec.train.jsonl")[:2000]
        instruction = "Say what the question asks for: description, entity, abbreviation, person, location or number.\n"
        found = [
            Task("math", math, "Problem: {problem}\nSolution:", 6.0, 15.0),
            Task("trec", trec, "Question: {sentence}\nType:", 25.0, 60.0),
            Task("trec_with_instruction", trec, instruction + "Question: {sentence}\nType:", None, None),
        ]
    if not quick:
        return found
    return [
        Task(t.name, t.rows[:: max(1, len(t.rows) // 40)][:40], t.prompt, t.floor_same, t.floor_fp32) for t in found
    ]


def plain_loop(loaded: LoadedModel, texts: list[str]) -> list[torch.Tensor]:
    """The baseline: the last hidden state of the last token of every text, one text at a time."""
    states = []
    with torch.inference_mode():
        for text in texts:
            ids = loaded.tokenizer(text, return_tensors="pt").input_ids.to(loaded.device.value)
            states.append(loaded.model(ids, output_hidden_states=True).hidden_states[-1][0, -1].float())
    return states


def measure_speed(report: Report, loaded: LoadedModel, found: list[Task], quick: bool) -> None:
    """Measure ratios to the plain loop in the same dtype and in fp32, the share of the peak, and the overhead over the
    backbone alone."""
    peak = matrix_peak(loaded.model.dtype, loaded.device.value)
    report.add("matrix_product_peak", peak / 1e9, "GFLOP/s", note=str(loaded.model.dtype).removeprefix("torch."))
    scorer = sparsort.SparsityScorer(loaded)
    in_fp32 = load_model(loaded.name, dtype="float32")
    flops_per_token = 2 * sum(
        m.weight.numel() for m in scorer.backbone.blocks.modules() if isinstance(m, torch.nn.Linear)
    )
    rounds = 1 if quick else 3
    for task in found:
        texts = [task.prompt.format(**row) for row in task.rows]
        # The loop is slow and its time per token is steady, so it runs an even sample of the rows.
        sample = texts[:: max(1, len(texts) // (10 if quick else 100))]
        counts = {text: len(loaded.tokenizer(text)["input_ids"]) for text in texts}
        total, sampled = sum(counts[text] for text in texts), sum(counts[text] for text in sample)
        # The ratio is per token: the loop's time is scaled from the sample's tokens to all tokens.
        scale = total / sampled
        ours = lambda t=task: scorer.score(t.rows, t.prompt)  # noqa: E731
        same = compare(lambda s=sample: plain_loop(loaded, s), ours, rounds)
        report.add(
            f"{task.name}_speedup",
            same.ratio * scale,
            "x",
            floor=task.floor_same,
            note=f"{total / same.ours_s:.0f} against {sampled / same.baseline_s:.0f} tokens/s, "
            f"{same.lowest_ratio * scale:.1f} to {same.highest_ratio * scale:.1f}",
        )
        ids = [scorer.loaded.tokenizer(text)["input_ids"] for text in texts]
        # Shared prefixes are computed once, so the plan computes fewer tokens than the texts have.
        how = scorer.backbone.plan(ids)
        report.add(
            f"{task.name}_speedup_ceiling",
            (same.baseline_s * scale) / (how.n_computed * flops_per_token / peak),
            "x",
            note=f"plan computes {how.n_computed} of {how.n_tokens} tokens",
        )
        report.add(
            f"{task.name}_share_of_peak",
            how.n_computed * flops_per_token / same.ours_s / peak,
            "",
            floor=0.4,
        )
        # The loop in fp32 is slower, so it runs half of the sample.
        few = sample[:: 1 if quick else 2]
        mixed = compare(lambda s=few: plain_loop(in_fp32, s), ours, rounds)
        scale = total / sum(counts[text] for text in few)
        report.add(
            f"{task.name}_speedup_over_fp32_loop",
            mixed.ratio * scale,
            "x",
            floor=task.floor_fp32,
            note=f"{mixed.lowest_ratio * scale:.1f} to {mixed.highest_ratio * scale:.1f}",
        )
        bare = compare(ours, lambda i=ids, h=how: _walk(scorer, i, h), 1 if quick else 3)
        report.add(f"{task.name}_time_over_bare_backbone", bare.ratio, "x", floor=1.05, better="lower", note=str(bare))


def _walk(scorer: sparsort.SparsityScorer, ids: list[list[int]], how: Any) -> None:
    for _ in scorer.backbone.walk(ids, how, []):
        pass


def measure_agreement(report: Report, loaded: LoadedModel, found: list[Task], quick: bool) -> None:
    """Measure the rank agreement of the default dtype with fp32, and of a single row with the same row in a batch."""
    in_fp32 = load_model(loaded.name, dtype="float32")
    for task in found[:2]:
        for site in ("pre_norm",) if quick else ("pre_norm", "post_norm"):
            # The threshold of the absolute L0 count is the mean magnitude of the site. With the default of 1, every
            # coordinate before the norm would be above it, and all rows would tie.
            first = sparsort.SparsityScorer(loaded, site=site).score(task.rows[:50], task.prompt)
            threshold = float(first.column("l1").mean()) / loaded.model.config.get_text_config().hidden_size
            options = {"site": site, "l0_threshold": threshold}
            ours = sparsort.SparsityScorer(loaded, **options).score(task.rows, task.prompt)
            exact = sparsort.SparsityScorer(in_fp32, **options).score(task.rows, task.prompt)
            agreement = {
                name: float(spearmanr(ours.column(name), exact.column(name)).statistic) for name in METRIC_NAMES
            }
            # The floor excludes the relative L0, which only the note reports.
            counted = {name: value for name, value in agreement.items() if name != "l0_relative"}
            lowest = min(counted, key=lambda name: counted[name])
            report.add(
                f"{task.name}_{site}_rank_agreement_with_fp32",
                counted[lowest],
                "ρ",
                floor=0.995,
                note=f"lowest, {lowest}; without the L0 counts {min(v for k, v in agreement.items() if 'l0' not in k):.4f}; "
                f"gini {agreement['gini']:.4f}, relative L0 {agreement['l0_relative']:.3f}",
            )
    rows = found[0].rows[: 20 if quick else 100]
    together = sparsort.SparsityScorer(loaded).score(rows, found[0].prompt).difficulty
    # A token budget of 1 puts each row into a batch of its own.
    alone = sparsort.SparsityScorer(loaded, token_budget=1).score(rows, found[0].prompt, shard_rows=1).difficulty
    spread = float(np.std(together))
    report.add(
        "alone_against_batched",
        float(np.abs(together - alone).max() / spread),
        "sd",
        better="lower",
        note="largest, Gini",
    )


def measure_memory(report: Report, quick: bool) -> None:
    """Measure the peak memory beyond the model for a million short rows in the whole pipeline, with a very small model."""
    count = _MILLION // 100 if quick else _MILLION
    code = _MEMORY.replace("COUNT", str(count))
    # A separate process, whose memory holds nothing of the other measurements.
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    report.add(
        "memory_beyond_model" if not quick else "memory_beyond_model_10k_rows",
        found["beyond"] / 2**30,
        "GiB",
        floor=1.0 if not quick else None,
        better="lower",
        note=f"{count} rows in {found['seconds']:.0f} s, a model of {found['weights']} weights",
    )


_MEMORY = r"""
import json, tempfile, threading, time
from pathlib import Path
import psutil
from transformers import AutoConfig, AutoModelForCausalLM
import sparsort
from sparsort.scoring.loading.demo_model import load_tokenizer
tokenizer = load_tokenizer("demo")
config = AutoConfig.for_model(
    "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=len(tokenizer), tie_word_embeddings=True,
)
model = AutoModelForCausalLM.from_config(config)
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "rows.jsonl"
    with file.open("w") as handle:
        for number in range(COUNT):
            handle.write(json.dumps({"id": f"row-{number}", "text": f"item {number % 977} of list {number % 31}"}) + "\n")
    scorer = sparsort.SparsityScorer(model, tokenizer=tokenizer)
    scorer.score([{"text": "one"}, {"text": "two words"}], "{text}")
    # Sampled, because the process's own peak may lie before this point.
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss
    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    scores = scorer.score(file, "{text}", out=Path(folder) / "scores")
    if len(scores) != COUNT or scores.counts("status") != {"ok": COUNT}:
        raise SystemExit("rows without a score")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
print(json.dumps({
    "beyond": peak[0] - before, "seconds": seconds, "weights": sum(p.numel() for p in model.parameters()),
}))
"""


def measure_help(report: Report) -> None:
    """Measure the wall time of `sparsort --help`, the best of five."""
    command = [sys.executable, "-m", "sparsort", "--help"]
    run = lambda: subprocess.run(command, capture_output=True, check=True)  # noqa: E731
    report.add(
        "help_seconds", min(wall_seconds(run) for _ in range(5)), "s", floor=0.5, better="lower", note="best of 5"
    )


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest matrix product among common shapes."""
    best = 0.0
    for m, k, n in ((4096, 4096, 4096), (2048, 2048, 2048), (1024, 640, 2048), (2048, 640, 2048), (2048, 2048, 640)):
        a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
        product = lambda a=a, b=b: torch.nn.functional.linear(a, b)  # noqa: E731
        product()
        # Small products are repeated until a measurement has about 20 GFLOP, so that the clock's resolution
        # does not matter.
        repeat = max(1, int(2e10 / (2 * m * k * n)))
        seconds = min(wall_seconds(lambda p=product, r=repeat: [p() for _ in range(r)]) for _ in range(5)) / repeat
        best = max(best, 2 * m * k * n / seconds)
    return best


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with math_300.jsonl and icl/trec.train.jsonl")
    parser.add_argument("--model", default="demo")
    add_output_options(parser)
    arguments = parser.parse_args()
    device = default_device().value
    report = Report("scoring" if arguments.data else "scoring-examples", device)
    found = tasks(arguments.data, arguments.quick)
    loaded = load_model(arguments.model)
    measure_help(report)
    measure_speed(report, loaded, found, arguments.quick)
    measure_agreement(report, loaded, found, arguments.quick)
    measure_memory(report, arguments.quick)
    report.finish(arguments)


if __name__ == "__main__":
    main()
