"""The report of `sparse_attention.py`: figures, notes on what was not measured, correctness, and the results of the studies.

Contract: a floor that could not be measured counts as missed. A quick run judges nothing: its figures have no floors.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Report
from sparse_attention_setting import Setting
from torch import Tensor

from sparsort.attention.flops import crossover
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.ops import align, attend, index_select
from sparsort.kernels.blocksparse.reference import align_ref, attend_ref

STUDY = "sparse-attention-study.json"
WARM_UP = "sparse_warmup-*.json"
# The error is the RMS of the difference over the RMS of the reference.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass
class SparseReport(Report):
    """A report that has notes in words as well as figures.

    Attributes:
        quick: whether floors are ignored.
        notes: what was not measured and why, and the choices that were made.
        unmeasured: names of the figures with a floor that were not measured.
    """

    quick: bool = False
    notes: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, *, floor: float | None = None, **kwargs: Any) -> None:
        super().add(name, value, unit, floor=None if self.quick else floor, **kwargs)
        # A whole run takes minutes, and these lines show its progress.
        print(f"{name}: {value:.4g} {unit}", file=sys.stderr)

    def attempt(self, what: str, measure: Callable[[], None], judged: tuple[str, ...] = ()) -> None:
        """Measure. If memory does not suffice, add a note, and count the figures `judged` as missed."""
        try:
            measure()
        except torch.OutOfMemoryError as error:
            self.notes.append(f"{what}: out of memory ({str(error).splitlines()[0]})")
            if not self.quick:
                self.unmeasured += [name for name in judged if name not in self.figures]
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def missed(self) -> list[str]:
        """Names of the figures that miss their floor, or have one and were not measured."""
        return [name for name, figure in self.figures.items() if figure.holds is False] + self.unmeasured

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "notes": self.notes, "unmeasured": self.unmeasured}

    def print_table(self) -> None:
        super().print_table()
        for note in self.notes:
            print(note)
        for name in self.unmeasured:
            print(f"not measured, so its floor is missed: {name}")


def add_correctness(report: SparseReport, setting: Setting, dtype: torch.dtype) -> None:
    """Compare with the float64 reference on packed sequences, and two runs with each other, before anything is timed."""
    # Two rows: one with two packed sequences, neither a multiple of the block, and one with a single sequence.
    lengths = [[3 * setting.block_size + 5, 17], [4 * setting.block_size]]
    layout = Layout.from_lengths(lengths)
    generator = torch.Generator(report.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=report.device).to(dtype)

    B, T, D = layout.batch, layout.queries, setting.head_dim
    given = {
        "query": normal(B, setting.heads, T, D),
        "key": normal(B, setting.groups, T, D),
        "value": normal(B, setting.groups, T, D),
        "index_query": normal(B, setting.groups, T, setting.index_dim),
        "index_key": normal(B, T, setting.index_dim),
    }
    grad = normal(B, setting.heads, T, D)
    # Two blocks are fewer than a row has, so that the selection matters.
    budget = type(setting.budget)(blocks=2)
    choices = [
        index_select(given["index_query"], given["index_key"], layout, budget, block_size=setting.block_size)
        for _ in range(2)
    ]
    scales = {"scale": D**-0.5, "index_scale": setting.index_dim**-0.5}

    def ours(x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        output, lse = attend(x["query"], x["key"], x["value"], choices[0], layout)
        loss = align(x["query"], x["key"], x["index_query"], x["index_key"], choices[0], layout, lse=lse)
        return output, loss

    def reference(x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        output, _ = attend_ref(x["query"], x["key"], x["value"], choices[0], layout, scale=scales["scale"])
        rows = align_ref(x["query"], x["key"], x["index_query"], x["index_key"], choices[0], layout, **scales)
        # `align` is the mean over tokens and groups; `align_ref` has one value per row.
        return output, rows.sum() / (layout.tokens * setting.groups)

    first, second = (_results(ours, given, grad) for _ in range(2))
    # The reference gets the same rounded inputs, so the error is that of the computation alone.
    exact = _results(reference, {name: tensor.double() for name, tensor in given.items()}, grad.double())
    errors = {name: _error(first[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: errors[name])
    name = str(dtype).removeprefix("torch.")
    report.add(
        f"error_against_fp64_{name}",
        errors[worst],
        "relative",
        floor=TOLERANCES[dtype],
        better="lower",
        note=f"worst: {worst}; output, loss and all gradients, {setting.words} at {lengths} tokens",
    )
    same = torch.equal(choices[0].blocks, choices[1].blocks) and all(
        torch.equal(first[name], second[name]) for name in first
    )
    report.add("same_bits_when_run_twice", float(same), "", floor=1, note="selection, output, loss and all gradients")


def _results(
    run: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]], given: Mapping[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    output, loss = run(leaves)
    torch.autograd.backward([output, loss], [grad, torch.ones_like(loss)])
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), "loss": loss.detach(), **gradients}


def _error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact).square().mean().sqrt()
    # The bound avoids a division by 0 if a gradient is exactly 0.
    return float(difference / exact.square().mean().sqrt().clamp_min(1e-30))


def add_crossover_figures(report: SparseReport, setting: Setting, ratios: dict[int, float]) -> None:
    """Add the length at which the measured ratios pass 1, and the N* of the formula."""
    found = crossing(ratios)
    ends = ", ".join(f"{length}: {value:.2f}x" for length, value in sorted(ratios.items()))
    if found is None:
        report.notes.append(f"crossover {setting}: no rise through 1 at the lengths measured ({ends})")
    else:
        report.add(f"crossover_{setting}", found, "tokens", better="lower", note=f"forward and backward; {ends}")
    formula = crossover(setting.attention, blocks=setting.blocks, block_size=setting.block_size)
    report.add(
        f"crossover_formula_{setting}", formula, "tokens", better="lower", note="N* of attention/flops.py, forward"
    )


def crossing(ratios: dict[int, float]) -> float | None:
    """The length at which ratios by length rise through 1, interpolated on a straight line in logarithms; None if they do not."""
    points = sorted(ratios.items())
    for (short, below), (long, above) in itertools.pairwise(points):
        if below < 1 <= above:
            # The logarithm of the ratio is 0 at the crossover.
            share = -math.log(below) / (math.log(above) - math.log(below))
            return float(short * (long / short) ** share)
    return None


def add_study(report: SparseReport, folder: Path = RESULTS) -> None:
    """Add the figures on learning from the runs that `sparse_study.py` saved, paired by seed."""
    path = folder / STUDY
    if not path.exists():
        report.notes.append(
            "loss gap, recall task, mass captured: no study here; python benchmarks/studies/sparse/sparse_study.py --save"
        )
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    runs = {(run["attention"], run["order"], run["seed"]): run for run in kept["runs"]}
    for order in dict.fromkeys(order for _, order, _ in runs):
        seeds = sorted(seed for attention, of, seed in runs if (attention, of) == ("dense", order))
        by_kind = {
            kind: [runs.get((kind, order, seed)) for seed in seeds] for kind in ("dense", "index_branch", "window")
        }

        def add(name: str, values: list[float], unit: str, order: str = order, **judged: Any) -> None:
            note = f"{min(values):.3g} to {max(values):.3g} over {len(values)} seeds, {order} order; from {STUDY}"
            # Rounded, so that a gap that equals its floor does not miss it by a rounding error.
            report.add(f"{name}_{order}", round(statistics.fmean(values), 9), unit, note=note, **judged)

        dense, joint, window = ([run for run in by_kind[kind] if run] for kind in by_kind)
        if joint and len(joint) == len(dense):
            gaps = [100 * (_end(a, "text_loss") / _end(b, "text_loss") - 1) for a, b in zip(joint, dense, strict=True)]
            add("loss_gap", gaps, "%", floor=1, better="lower")
            below = [100 * (_end(b, "far_recall") - _end(a, "far_recall")) for a, b in zip(joint, dense, strict=True)]
            add("recall_below_dense", below, "points", floor=1, better="lower")
            # There is no floor here, because in so small a model even the best blocks may have less. `add_warm_up` has the floor.
            add("mass_captured", [run["caught"]["mass"] for run in joint], "share")
            best = [one["caught"]["mass"] for one in kept["best_possible"] if one["order"] == order]
            add("mass_captured_by_best_blocks", best, "share")
        if window and len(window) == len(dense):
            below = [100 * (_end(b, "far_recall") - _end(a, "far_recall")) for a, b in zip(window, dense, strict=True)]
            add("window_below_dense", below, "points", floor=30)


def add_warm_up(report: SparseReport, folder: Path = RESULTS) -> None:
    """Add the mass that an index branch captures after its warm-up on a real model, as saved by `sparse_warmup.py`."""
    judged = [
        (path.name, figure)
        for path in sorted(folder.glob(WARM_UP))
        for figure in json.loads(path.read_text(encoding="utf-8"))["figures"].values()
        if figure["floor"] is not None
    ]
    if not judged:
        report.notes.append(
            "mass captured after the warm-up: not measured here; python benchmarks/studies/sparse/sparse_warmup.py --save"
        )
    else:
        # There is one file per machine; the lowest value counts.
        name, figure = min(judged, key=lambda one: one[1]["value"])
        note = f"{figure['note']}; from {name}"
        report.add("mass_captured_after_warm_up", figure["value"], figure["unit"], floor=figure["floor"], note=note)


def _end(run: Mapping[str, Any], name: str) -> float:
    """A measure after the last step."""
    return float(run["curve"][name][-1])
