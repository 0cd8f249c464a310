"""Check the Triton kernels on this machine's GPU against float64, then time them, and save the numbers.

    python benchmarks/speed/gpu_check.py [--quick]

Runs the tests marked `gpu` of the row kernel and of the block-sparse kernels, and then the benchmarks of the kernels that pass.
These write benchmarks/results/sparsity_kernels-<device>.json and sparse_attention-<device>.json. The exit status is 1 if a test
fails or a figure misses its floor. Without a CUDA device it prints a note and exits with status 0.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent / "sparse_attention"))
# Listed by name, because the other tests of these folders need more packages and do not use the GPU.
KERNELS = {
    "sparsity_kernels": ("sparsity/test_triton_rows.py", "sparsity/test_triton_rows_gpu.py"),
    "sparse_attention": tuple(f"blocksparse/triton/test_{part}.py" for part in ("align", "attend", "select")),
}


def tests_of(benchmark: str) -> list[Path]:
    """The tests of the kernels that a benchmark times."""
    return [ROOT / "tests" / "kernels" / name for name in KERNELS[benchmark]]


def missed_floors(benchmark: str, *, quick: bool) -> list[str]:
    """Time the kernels, save the figures, and name those below their floor."""
    # The benchmark is imported only after the tests of its kernels have passed.
    report = importlib.import_module(benchmark).main(["--save", "--device", "cuda", *(["--quick"] if quick else [])])
    # The report of `sparse_attention` has `missed`, which also counts floors that could not be measured.
    below = [name for name, figure in report.figures.items() if figure.holds is False]
    return list(getattr(report, "missed", below))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device; nothing to check. The kernels' tests ran in Triton's interpreter with `make test`.")
        return 0
    status = 0
    for benchmark in KERNELS:
        # -P keeps the root off the path, as in the Makefile.
        tests = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", *map(str, tests_of(benchmark))]
        failed = subprocess.run(tests, cwd=ROOT, check=False).returncode
        if failed:
            print(f"the kernels of {benchmark} fail on this GPU; they were not timed.", file=sys.stderr)
            status = failed
            continue
        missed = missed_floors(benchmark, quick=arguments.quick)
        if missed:
            print(f"below their floor: {', '.join(missed)}", file=sys.stderr)
            status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(main())
