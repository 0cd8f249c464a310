"""Check the Triton kernels on this machine's GPU against float64, then time them, and keep the numbers.

    python benchmarks/gpu_check.py [--quick]

Runs the tests of the row kernel that are marked `gpu`, and if they pass writes
benchmarks/results/sparsity_kernels-<device>.json; ends with status 1 where a figure misses its floor. Without a CUDA
device it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size and fewer rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device; nothing to check. The kernels' tests ran in Triton's interpreter with `make test`.")
        return 0
    # By name: the other tests of the folder need more packages, and show nothing of the GPU. -P: see the Makefile.
    files = [str(ROOT / "tests" / "kernels" / name) for name in ("test_rows.py", "test_rows_gpu.py")]
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", *files]
    status = subprocess.run(tests, cwd=ROOT, check=False).returncode
    if status:
        print("the kernels fail on this GPU; nothing was timed.", file=sys.stderr)
        return status
    import sparsity_kernels

    options = ["--save", "--device", "cuda", *(["--quick"] if arguments.quick else [])]
    report = sparsity_kernels.main(options)
    missed = [name for name, figure in report.figures.items() if figure.holds is False]
    if missed:
        print(f"below their floor: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
