"""How fast the sparsity metrics are, and how exact: on a CPU the torch reference, on a GPU the fused kernel.

    python benchmarks/sparsity_kernels.py [--quick] [--json] [--save] [--device cpu|cuda]

CPU: microseconds a row of the float64 reference and of plain eager float32, alternating in one run.
GPU: the fused kernel's bytes a second as a share of the copy bandwidth measured in the same run, with a cold cache, without Gini
and with either Gini; and its speed over plain eager torch. Bytes are what must move: N·H states in, 13 floats and a code out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Report, add_output_options, compare
from torch import Tensor

from sparsort.kernels.backend import METRICS, GiniMethod, default_device, sparsity_rows
from sparsort.kernels.sparsity.reference import sparsity_rows_ref, top_counts

FULL_METRICS: tuple[GiniMethod, ...] = ("exact", "binned")
_L0 = [METRICS.index("l0_relative"), METRICS.index("l0_absolute")]


def eager_metrics(states_NH: Tensor) -> Tensor:
    """The 13 metrics (N, 13) as a user of torch writes them, one call after another in float32."""
    h = states_NH.float()
    a = h.abs()
    e = h.square()
    d = h.shape[-1]
    l1, energy = a.sum(-1), e.sum(-1)
    columns = [e.topk(k, dim=-1).values.sum(-1) / energy for k in top_counts(d)]
    columns += [a.topk(k, dim=-1).values.sum(-1) / l1 for k in top_counts(d)]
    columns.append((a > a.mean(-1, keepdim=True) + a.std(-1, keepdim=True)).float().mean(-1))
    columns.append((a > 1.0).float().mean(-1))
    columns.append((d**0.5 - l1 / energy.sqrt()) / (d**0.5 - 1))
    rank = torch.arange(1, d + 1, device=h.device, dtype=h.dtype)
    columns.append(2 * (a.sort(-1).values * rank).sum(-1) / (d * l1) - (d + 1) / d)
    for x, total in ((a, l1), (e, energy)):
        p = x / total[:, None]
        columns.append(torch.special.entr(p).sum(-1).exp() / d)
    columns.append(l1)
    return torch.stack(columns, 1)


def measure_cpu(report: Report, quick: bool) -> None:
    """Cost a row of the reference against eager float32, and what float64 costs within the reference."""
    rounds = 3 if quick else 9
    for N, H in ((2048, 4096), (8192, 640)):
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(N, H, generator=generator)
        eager = compare(partial(eager_metrics, states), partial(sparsity_rows_ref, states), rounds)
        single = compare(
            partial(sparsity_rows_ref, states),
            partial(sparsity_rows_ref, states, compute_dtype=torch.float32),
            rounds,
        )
        size = f"{N}x{H}"
        us = 1e6 / N
        report.add(f"reference_fp64_us_per_row_{size}", eager.ours_s * us, "us", better="lower")
        report.add(f"eager_fp32_us_per_row_{size}", eager.baseline_s * us, "us", better="lower")
        report.add(f"reference_over_eager_{size}", eager.ratio, "x", note=str(eager))
        report.add(f"fp64_over_fp32_time_{size}", single.ratio, "x", better="lower", note=str(single))


def measure_cuda(report: Report, device: torch.device, quick: bool) -> None:
    """The fused kernel's share of copy bandwidth, its speed over eager torch, and its error against float64."""
    rounds = 10 if quick else 40
    seconds = _cold_timer(device)
    copy = _copy_bandwidth(device, seconds, rounds)
    report.add("copy_bandwidth", copy / 1e9, "GB/s")
    floors: dict[GiniMethod, float] = {"none": 0.8, "binned": 0.4, "exact": 0.4}
    sizes = [(8192, 4096, torch.bfloat16), (8192, 4096, torch.float32), (65536, 640, torch.bfloat16)]
    for N, H, dtype in sizes[:1] if quick else sizes:
        states = torch.randn(N, H, device=device).to(dtype)
        size = f"{N}x{H}_{str(dtype).removeprefix('torch.')}"
        moved = N * (H * states.element_size() + len(METRICS) * 4 + 1)
        for gini, floor in floors.items():
            call = partial(sparsity_rows, states, gini=gini)
            call()
            took = statistics.median(seconds(call) for _ in range(rounds))
            share = moved / took / copy
            note = f"{took * 1e6:.0f} us, {moved / took / 1e9:.0f} GB/s"
            judged = floor if (H, dtype) == (4096, torch.bfloat16) else None
            report.add(f"share_of_copy_gini_{gini}_{size}", share, "share", floor=judged, note=note)
        for gini in FULL_METRICS:
            against = compare(
                partial(eager_metrics, states),
                partial(sparsity_rows, states, gini=gini),
                max(3, rounds // 5),
                seconds,
            )
            judged = 20.0 if (H, dtype) == (4096, torch.bfloat16) else None
            report.add(f"over_eager_gini_{gini}_{size}", against.ratio, "x", floor=judged, note=str(against))
        report.add(f"error_against_fp64_{size}", _error(states[:512]), "relative", floor=1e-5, better="lower")


def _error(states: Tensor) -> float:
    """The largest error of any metric that is no count, relative for L1."""
    ours = sparsity_rows(states).values_NM.double().cpu()
    truth = sparsity_rows_ref(states.cpu()).values_NM.double()
    error = (ours - truth).abs() / truth.abs().clamp(min=1.0)
    error[:, _L0] = 0.0
    return error.max().item()


def _cold_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A stopwatch of device time in seconds that first writes more than the cache holds."""
    cold = torch.empty(512 * 2**20, dtype=torch.int8, device=device)

    def seconds(function: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()
        # Device time to hide the launch behind, so that a short kernel is not charged for Python.
        torch.cuda._sleep(2_000_000)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop)) / 1e3

    return seconds


def _copy_bandwidth(device: torch.device, seconds: Callable[[Callable[[], Any]], float], rounds: int) -> float:
    """Bytes a second, read and written, of copying 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(rounds))


def main(argv: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is a device")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device) if arguments.device else default_device().value
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here. Leave it out, or give cpu.")
    report = Report("sparsity_kernels", device)
    if device.type == "cuda":
        measure_cuda(report, device, arguments.quick)
    else:
        measure_cpu(report, arguments.quick)
    report.finish(arguments)
    return report


if __name__ == "__main__":
    main()
