"""Trackers and notebooks as they are: a score that reports to each installed tracker, and a notebook that shows its progress.

    pip install wandb trackio ipykernel nbclient
    python benchmarks/checks/trackers.py

The tests use substitutes for these packages, which the extra `dev` does not have. wandb runs in offline mode, and trackio with a
local database; nothing is sent anywhere. The script prints the version of each package, and what it found of the run:

* a tracker passes if the run's files exist, nothing was dropped, and stdout has the JSON result alone;
* the notebook passes if each of its two cells has one output for its bar, with the final count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where each tracker leaves the files of a run, relative to the folder of the script.
FILES = {"tensorboard": "scores.runs/*/events*", "wandb": "scores.runs/wandb/offline-run-*", "trackio": "trackio/*.db"}
CELLS = (
    'from sparsort import LengthScorer\n_ = LengthScorer("characters").score([{"text": "a" * n} for n in range(500)], "{text}")',
    'from sparsort.terminal.progress import progress\nwith progress("work", 300) as advance:\n'
    "    for _ in range(300):\n        advance(1)",
)
COUNTS = ("scoring: 500 of 500", "work: 300 of 300")


def check_tracker(name: str, folder: Path) -> str:
    """Score in a process of its own, and look for the files of the run."""
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-P", "-m", "sparsort", "score", str(ROOT / "examples" / "graded.jsonl")]
    command += ["--prompt", "{question}", "--scorer", "compression", "--json"]
    command += ["--out", str(folder / "scores"), "--report-to", name]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or "nothing more is reported" in done.stderr:
        return f"FAILED: {done.stderr[-500:]}"
    rows = json.loads(done.stdout)["rows"]
    return f"{rows} rows reported" if list(folder.glob(FILES[name])) else "FAILED: the run left no files"


def check_notebook() -> str:
    """Execute a notebook, and compare the outputs of its cells."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, kernel_name="python3").execute()
    for cell, count in zip(notebook.cells, COUNTS, strict=True):
        texts = [output.get("data", {}).get("text/plain", str(output)) for output in cell.outputs]
        if len(texts) != 1 or not texts[0].startswith(count):
            return f"FAILED: {texts}"
    return "one output for each bar"


def main() -> int:
    """Check everything that is installed; 1 if something failed."""
    failures = 0
    for name in (*FILES, "ipykernel"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            print(f"{name}: not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = check_tracker(name, Path(folder)) if name in FILES else check_notebook()
        failures += outcome.startswith("FAILED")
        print(f"{name} {installed}: {outcome}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
