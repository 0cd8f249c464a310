"""Two processes against one on the same file: the speed of `sparsort score --workers`, and the memory that the workers share.

    python benchmarks/speed/workers.py --rows 1000000 --save

Every process has one thread. The model is a Llama with random weights (3 layers of width 64) in a temporary folder, and the
rows are short questions, so everything that is not the model weighs as much as it can. Each time is that of a whole command,
including imports, the check of the file and the list of the shards. `--memory` scores with a model of that many megabytes as
well. Of each of two workers it reports the memory (RSS), with shared pages divided by the number of their users (PSS), and
without them (USS).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options

FLOOR = 1.8
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory", type=int, default=0, help="size of the model of the measurement of memory, in MB")
    add_output_options(parser)
    arguments = parser.parse_args()
    rows = 20_000 if arguments.quick else arguments.rows
    report = Report("workers", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _save_model(folder / "model", width=64, layers=3)
        file = _write_rows(folder / "rows.jsonl", rows)
        seconds = {count: _time(file, model, folder / f"out-{count}", count) for count in (1, 2)}
        for count, (wall, cpu) in seconds.items():
            report.add(f"{rows:,} rows, {count} process(es), wall", wall, "s", better="lower")
            report.add(f"{rows:,} rows, {count} process(es), CPU", cpu, "s", better="lower")
            report.add(f"rows per second, {count} process(es)", rows / wall, "1/s")
        load = f"load average {os.getloadavg()[0]:.1f} at the end, of which this is 2"
        report.add("two processes against one, wall", seconds[1][0] / seconds[2][0], "x", floor=FLOOR, note=load)
        # What two processes would gain if they never waited: on a machine that others use, the wall time also shows their work.
        report.add("two processes against one, by CPU time", 2 * seconds[1][1] / seconds[2][1], "x")
        if arguments.memory:
            _measure_memory(report, folder, file, arguments.memory)
    report.finish(arguments)


def _time(file: Path, model: Path, out: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of a command with all of its processes."""
    command = [sys.executable, "-m", "sparsort", "score", str(file), "-p", "{question}", "-m", str(model), "--json"]
    command += ["--dtype", "float32", "--device", "cpu", "--out", str(out), "--workers", str(workers)]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **_ONE_THREAD})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _measure_memory(report: Report, folder: Path, file: Path, megabytes: int) -> None:
    # A layer of width 1024 has 17 million weights, in 4 bytes each.
    model = _save_model(folder / "large", width=1024, layers=max(1, megabytes // 67))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    command = [sys.executable, "-m", "sparsort", "score", str(file), "-p", "{question}", "-m", str(model)]
    command += ["--dtype", "float32", "--device", "cpu", "--shard-rows", "8", "--out", str(folder / "memory")]
    report.add("weights", size / 1e6, "MB")
    with subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.DEVNULL, env={**os.environ, **_ONE_THREAD}
    ) as process:
        shards = folder / "memory"
        while process.poll() is None and len(list(shards.glob("shard-*"))) < 8:
            time.sleep(0.1)
        workers = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        for number, worker in enumerate(workers):
            memory = worker.memory_full_info()
            weights = [part for part in worker.memory_maps() if part.path.endswith(".safetensors")]
            values = {"RSS": memory.rss, "PSS": memory.pss, "USS": memory.uss}
            values |= {"RSS of the weights": sum(part.rss for part in weights)}
            values |= {"PSS of the weights": sum(part.pss for part in weights)}
            for kind, value in values.items():
                report.add(f"worker {number}, {kind}", value / 1e6, "MB", better="lower")
        process.terminate()


def _save_model(folder: Path, *, width: int, layers: int) -> Path:
    """Save a Llama with random weights, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64) * 4 if width < 256 else width // 64,
        num_key_value_heads=2 if width < 256 else width // 64,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder


def _write_rows(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"id": f"q{number}", "question": f"What is {number} + {number % 7}?"}) + "\n")
    return path


if __name__ == "__main__":
    main()
