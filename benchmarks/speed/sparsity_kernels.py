"""The speed and the exactness of the sparsity metrics: of the torch reference on a CPU, of the fused kernel on a GPU.

    python benchmarks/speed/sparsity_kernels.py [--quick] [--json] [--save] [--data FILE.npy] [--device cpu|cuda]

CPU: microseconds per row of the float64 reference and of plain eager float32, alternating in one run.
GPU: the fused kernel's bytes per second as a share of the copy bandwidth, measured in the same run with a cold cache, without
Gini and with either Gini; and its speed relative to plain eager torch. Only bytes that must move count: N·H states in, 13 floats
and a code out. `--data` measures all figures for a file of states (N, H) too, such as a model's, with no floor on the speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options, compare
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.backend import METRIC_NAMES, GiniMethod, default_device, sparsity_rows
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref, top_counts

FULL_METRICS: tuple[GiniMethod, ...] = ("exact", "binned")
Sizes = Iterable[tuple[str, Tensor]]
_GINI = METRIC_NAMES.index("gini")
_L0 = [METRIC_NAMES.index("l0_relative"), METRIC_NAMES.index("l0_absolute")]


def eager_metrics(states_NH: Tensor) -> Tensor:
    """The metrics (N, M) as a careful user of torch would write them in float32: one sort, one logarithm, no kernel."""
    a = states_NH.float().abs().sort(-1, descending=True).values
    e = a.square()
    d = a.shape[-1]
    l1, energy = a.sum(-1), e.sum(-1)
    columns = [e[:, :k].sum(-1) / energy for k in top_counts(d)]
    columns += [a[:, :k].sum(-1) / l1 for k in top_counts(d)]
    columns.append((a > (a.mean(-1) + a.std(-1))[:, None]).float().mean(-1))
    columns.append((a > 1.0).float().mean(-1))
    columns.append((d**0.5 - l1 / energy.sqrt()) / (d**0.5 - 1))
    rank = torch.arange(d - 1, -d, -2, device=a.device, dtype=a.dtype)
    columns.append((a * rank).sum(-1) / (d * l1))
    # 0 · log 0 counts as 0. The clamp keeps the logarithm finite, and the product with 0 is then 0.
    log_a = a.clamp(min=torch.finfo(a.dtype).tiny).log()
    columns.append((l1.log() - (a * log_a).sum(-1) / l1).exp() / d)
    columns.append((energy.log() - 2 * (e * log_a).sum(-1) / energy).exp() / d)
    columns.append(l1)
    return torch.stack(columns, 1)


def measure_cpu(report: Report, sizes: Sizes, quick: bool) -> None:
    """Measure the cost per row of the reference against eager float32, the cost of float64 in it, and the error it avoids."""
    rounds = 3 if quick else 9
    for size, states in sizes:
        eager = compare(partial(eager_metrics, states), partial(sparsity_rows_ref, states), rounds)
        single = compare(
            partial(sparsity_rows_ref, states),
            partial(sparsity_rows_ref, states, compute_dtype=torch.float32),
            rounds,
        )
        us = 1e6 / len(states)
        report.add(f"reference_fp64_us_per_row_{size}", eager.ours_s * us, "us", better="lower")
        report.add(f"eager_fp32_us_per_row_{size}", eager.baseline_s * us, "us", better="lower")
        report.add(f"reference_over_eager_{size}", eager.ratio, "x", note=str(eager))
        report.add(f"fp64_over_fp32_time_{size}", single.ratio, "x", better="lower", note=str(single))
        some = states[:512]
        error = _errors(eager_metrics(some), some).max().item()
        report.add(f"eager_fp32_error_against_fp64_{size}", error, "relative", better="lower")


def measure_cuda(report: Report, sizes: Sizes, device: torch.device, quick: bool) -> None:
    """Measure the fused kernel's share of the copy bandwidth, its speed against eager torch, and its error against float64."""
    rounds = 10 if quick else 40
    seconds = _cold_timer(device)
    copy = _copy_bandwidth(device, seconds, rounds)
    report.add("copy_bandwidth", copy / 1e9, "GB/s")
    floors: dict[GiniMethod, float] = {"none": 0.8, "binned": 0.4, "exact": 0.4}
    for size, on_cpu in sizes:
        states = on_cpu.to(device)
        # States in, and for each row one float per metric and a code of one byte out.
        moved = states.shape[0] * (states.shape[1] * states.element_size() + len(METRIC_NAMES) * 4 + 1)
        has_floor = size == "8192x4096_bfloat16"
        for gini, floor in floors.items():
            call = partial(sparsity_rows, states, gini=gini)
            # The first call compiles the kernel.
            call()
            took = statistics.median(seconds(call) for _ in range(rounds))
            share = moved / took / copy
            note = f"{took * 1e6:.0f} us, {moved / took / 1e9:.0f} GB/s"
            judged = floor if has_floor else None
            report.add(f"share_of_copy_gini_{gini}_{size}", share, "share", floor=judged, note=note)
        for gini in FULL_METRICS:
            against = compare(
                partial(eager_metrics, states),
                partial(sparsity_rows, states, gini=gini),
                max(3, rounds // 5),
                seconds,
            )
            judged = 20.0 if has_floor else None
            report.add(f"over_eager_gini_{gini}_{size}", against.ratio, "x", floor=judged, note=str(against))
        # Float64 on the CPU is slow, so errors are measured on a part of the rows.
        some = states[:512]
        exact = _errors(sparsity_rows(some).values_NM, some).max().item()
        report.add(f"error_against_fp64_{size}", exact, "relative", floor=1e-5, better="lower")
        _add_binned_errors(report, size, some)


def _add_binned_errors(report: Report, size: str, states_NH: Tensor) -> None:
    """Add the errors with the binned Gini: of the other metrics, and Gini's own as a share of its certified bound."""
    binned = sparsity_rows(states_NH, gini="binned")
    errors_NM = _errors(binned.values_NM, states_NH)
    # The binned Gini has a bound of its own, and must not count in the largest error of the others.
    gini_N = errors_NM[:, _GINI].clone()
    errors_NM[:, _GINI] = 0.0
    report.add(f"error_against_fp64_binned_{size}", errors_NM.max().item(), "relative", floor=1e-5, better="lower")
    if binned.gini_bound_N is None:
        raise SparsortError("gini='binned' returned no bound. Report this as a bug.")
    bound_N = binned.gini_bound_N.double().cpu()
    share = (gini_N / bound_N).nan_to_num(0.0).max().item()
    note = f"error up to {gini_N.max().item():.2g}, bound up to {bound_N.nan_to_num(0.0).max().item():.2g}"
    report.add(f"binned_gini_error_over_bound_{size}", share, "share", floor=1.0, better="lower", note=note)


def _errors(values_NM: Tensor, states_NH: Tensor) -> Tensor:
    """The error of each metric against float64, relative for L1; 0 for the counts and for rows without metrics."""
    truth = sparsity_rows_ref(states_NH.cpu().double())
    error = (values_NM.double().cpu() - truth.values_NM).abs() / truth.values_NM.abs().clamp(min=1.0)
    # A count may differ by one if a magnitude equals the threshold up to rounding, so counts have no relative
    # error.
    error[:, _L0] = 0.0
    error[truth.reason_N != 0] = 0.0
    return error


def _random_sizes(on_cuda: bool, quick: bool) -> Sizes:
    """Gaussian states, created when they are needed."""
    sizes = [(2048, 4096, torch.float32), (8192, 640, torch.float32)]
    if on_cuda:
        sizes = [(8192, 4096, torch.bfloat16), (8192, 4096, torch.float32), (65536, 640, torch.bfloat16)]
        sizes = sizes[:1] if quick else sizes
    for N, H, dtype in sizes:
        states = torch.randn(N, H, generator=torch.Generator().manual_seed(0)).to(dtype)
        yield f"{N}x{H}_{str(dtype).removeprefix('torch.')}" if on_cuda else f"{N}x{H}", states


def _states_of(path: Path) -> Tensor:
    """The states (N, H) of a .npy file; float64 becomes float32.

    Raises:
        SparsortError: the file cannot be read, or has no such states.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SparsortError(f"--data {path} cannot be read as .npy: {error}. Write it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise SparsortError(f"--data {path} must hold floating-point states of shape (N, H), got {found}.")
    return torch.from_numpy(array if array.dtype in (np.float16, np.float32) else array.astype(np.float32))


def _cold_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A timer of device seconds that first overwrites the cache, so that every call starts cold."""
    # 512 MiB is several times the L2 cache of current GPUs.
    cold = torch.empty(512 * 2**20, dtype=torch.int8, device=device)

    def seconds(function: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()
        # The device is busy during the launch, so that a short kernel is not charged for Python's time.
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
    # An untimed copy first, so that the memory is mapped.
    target.copy_(source)
    return 2 * source.numel() / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(rounds))


def main(argv: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    parser.add_argument("--data", type=Path, metavar="FILE", help=".npy file of states (N, H) to measure as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is a device")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device) if arguments.device else default_device().value
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here. Omit it, or pass cpu.")
    try:
        given = [] if arguments.data is None else [("data", _states_of(arguments.data))]
    except SparsortError as error:
        parser.error(str(error))
    sizes = chain(_random_sizes(device.type == "cuda", arguments.quick), given)
    report = Report("sparsity_kernels", device)
    if device.type == "cuda":
        measure_cuda(report, sizes, device, arguments.quick)
    else:
        measure_cpu(report, sizes, arguments.quick)
    report.finish(arguments)
    return report


if __name__ == "__main__":
    main()
