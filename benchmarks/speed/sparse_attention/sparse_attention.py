"""Block-sparse attention compared with dense attention, measured in one run on one machine.

    python benchmarks/speed/sparse_attention/sparse_attention.py [--quick] [--json] [--save] [--device cpu|cuda]

Dense attention is torch's scaled_dot_product_attention in its fastest form for the shape. Sparse attention always includes index
scores and top-k. Forward and backward are measured without and with the alignment loss (its value and its gradients), and the
floor applies to both. Selections are either random, which is the worst case and has the floors, or clustered, as in training
(`sparse_attention_setting.py`). Steps are timed in turns. Each ratio is given with its spread, the ratio of the best times, and
the ratio of processor times (`sparse_attention_timing.py`). Threads that wait for each other spin, so if other programs occupy a
core, even processor times mislead: on a busy machine, set OMP_NUM_THREADS=1 and read the processor times.

CPU: `layer_N` forward and backward, `warm_up_N` with every block, the crossover, `memory_N`, and `decode_N` against a cache.
CUDA: the same in bfloat16 against FlashAttention, the share of the matrix peak, and peers (`sparse_attention_cuda.py`).
`sparse_study.py` (loss gap, recall task) and `sparse_warmup.py` (mass captured) measure the effects on training; their results
are repeated here.

The exit status is 1 if a floor is missed. `--quick` only shows that everything runs; its figures have no floors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import add_output_options
from sparse_attention_cpu import SETTINGS, SMALL, measure_cpu
from sparse_attention_report import SparseReport, add_study, add_warm_up

from sparsort.kernels.backend import blocksparse_implementation, default_device


def main(argv: list[str] | None = None) -> SparseReport:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is a device")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens of the layer on the CPU [default: %(default)s]"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each step [default: %(default)s]")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device) if arguments.device else default_device().value
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here. Omit it, or pass cpu.")
    if arguments.tokens < 1024 or arguments.rounds < 1:
        parser.error(f"--tokens {arguments.tokens} --rounds {arguments.rounds}: expected 1024 and 1, or more.")
    report = SparseReport("sparse_attention", device, quick=arguments.quick)
    implementation = blocksparse_implementation(device)
    report.notes.append(f"implementation: {implementation.value} ({implementation.reason})")
    if device.type == "cuda":
        from sparse_attention_cuda import measure_cuda

        measure_cuda(report, quick=arguments.quick)
    elif arguments.quick:
        measure_cpu(report, (SMALL,), 1024, 1)
    else:
        measure_cpu(report, SETTINGS, arguments.tokens, arguments.rounds)
    add_study(report)
    add_warm_up(report)
    report.finish(arguments)
    return report


if __name__ == "__main__":
    missed = main().missed
    if missed:
        print(f"below their floor: {', '.join(missed)}", file=sys.stderr)
    sys.exit(1 if missed else 0)
