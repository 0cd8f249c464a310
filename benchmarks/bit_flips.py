"""Single-bit flips in the files that sparsort writes and later trusts: how many give other values without an error?

    python benchmarks/bit_flips.py [--json] [--save] [--flips 3400]

Each kind of folder is written once. Then, `--flips` times: one bit of one file is flipped, the folder is read as the library
reads it, and the bit is flipped back. Files are drawn alike, and within a file its first 128 bytes, its last 64 and the rest
alike, so that headers and footers are not drowned by the body. A flip is `refused` (an error that names the file, or, of what
training can make again, damage that is noticed), `harmless` (nothing that was read differs, as with white space in JSON) or
`unnoticed` (other values were read), of which there must be none.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Report, add_output_options

from sparsort import SparsortError, plan_curriculum
from sparsort.curriculum.loading.checkpoints import check_checkpoint
from sparsort.curriculum.loading.plan import CurriculumPlan
from sparsort.curriculum.loading.running import Observations, RunningDifficulty
from sparsort.manifests import FILE
from sparsort.recipes import train_folder
from sparsort.recipes.train import train
from sparsort.recipes.train_text import is_intact

HEAD, TAIL = 128, 64
N = 200


def write_plan(folder: Path) -> None:
    lengths = np.random.default_rng(0).integers(4, 60, N)
    settings: dict[str, Any] = {"batch_size": 8, "packing": "best_fit", "pack_length": 64, "stages": 3}
    groups = ["web"] * 150 + ["code"] * 50
    difficulty = np.random.default_rng(1).random(N)
    plan_curriculum(difficulty, ids=[str(-n) for n in range(N)], lengths=lengths, groups=groups, out=folder, **settings)


def read_plan(folder: Path) -> Any:
    plan = CurriculumPlan.open(folder)
    return plan._described(), {name: array.tobytes() for name, array in plan._arrays.items()}


def write_running(folder: Path) -> None:
    running = RunningDifficulty(N, prior=np.arange(N), fingerprint="plan")
    rows = np.arange(50)
    running.fold(Observations(rows=rows, steps=rows // 5, values=rows * 0.1))
    running.save(folder / "running.safetensors")


def read_running(folder: Path) -> Any:
    running = RunningDifficulty.load(folder / "running.safetensors")
    arrays = {name: array.tobytes() for name, array in running._arrays().items()}
    return running.fingerprint, running.next_step, running._settings, arrays


def write_run(folder: Path) -> None:
    rows = [{"text": f"{n} and {n} are {2 * n}", "id": f"r{n:03d}"} for n in range(12)]
    options: dict[str, Any] = {"max_length": 16, "save_steps": 2, "eval_share": 0.0, "online": True, "epochs": 2}
    train(rows, "{text}", out=folder, scores=np.arange(12.0), curriculum={"batch_size": 4, "stages": 2}, **options)


def read_run(folder: Path) -> Any:
    found = {path.relative_to(folder).as_posix(): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    train_folder.compare(folder, {})
    if train_folder.result_of(folder) is None:
        raise SparsortError("the run is not finished.")
    CurriculumPlan.open(folder / "plan")
    for checkpoint in (folder / "checkpoints").iterdir():
        check_checkpoint(checkpoint)
    for tokens in (folder / "tokens").glob("*.arrow"):
        if not is_intact(tokens):
            raise SparsortError(f"{tokens} is made again.")
    return found


def content(path: Path) -> Any:
    """What a file says; of our own JSON, the values."""
    if path.name in (FILE, "run.json", "result.json", "plan.json") or path.name.startswith("tokens-"):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return path.read_bytes()
    return path.read_bytes()


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "plan": (write_plan, read_plan),
    "running": (write_running, read_running),
    "run": (write_run, read_run),
}


def flip(path: Path, generator: random.Random) -> tuple[int, int]:
    """Flip one bit of a file and return its byte and mask."""
    size = path.stat().st_size
    regions = [range(min(HEAD, size)), range(max(0, size - TAIL), size), range(HEAD, max(HEAD, size - TAIL))]
    place, mask = (
        generator.choice(generator.choice([region for region in regions if region])),
        1 << generator.randrange(8),
    )
    change(path, place, mask)
    return place, mask


def change(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ mask]))


def measure(kind: str, folder: Path, flips: int) -> dict[str, int]:
    """How many flips were refused, harmless and unnoticed."""
    write, read = KINDS[kind]
    folder.mkdir()
    write(folder)
    whole = read(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    generator = random.Random(kind)
    counts = {"refused": 0, "harmless": 0, "unnoticed": 0}
    for _ in range(flips):
        path = generator.choice(paths)
        place, mask = flip(path, generator)
        try:
            counts["harmless" if read(folder) == whole else "unnoticed"] += 1
        except SparsortError:
            counts["refused"] += 1
        finally:
            change(path, place, mask)
    if read(folder) != whole:
        raise SystemExit(f"{kind}: a flip was not put back, so the counts mean nothing.")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=3400, help="of each kind of folder")
    add_output_options(parser)
    arguments = parser.parse_args()
    logging.getLogger("sparsort").setLevel(logging.ERROR)
    report = Report("bit-flips", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as made:
        for kind in KINDS:
            counts = measure(kind, Path(made) / kind, arguments.flips)
            note = f"of {arguments.flips:,} flips; {counts['refused']:,} refused, {counts['harmless']:,} harmless"
            report.add(f"unnoticed_{kind}", counts["unnoticed"], "flips", floor=0, better="lower", note=note)
    report.finish(arguments)


if __name__ == "__main__":
    main()
