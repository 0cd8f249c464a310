"""The GPU's part of `sparse_attention.py`: bfloat16, groups of 8 heads of width 128, k·B = 2048, 2K to 128K tokens.

Dense is SDPA with the FlashAttention backend forced. For every length N:

    forward_N, backward_N, layer_N   without the alignment loss; `layer_N_with_alignment` with it; index scores and top-k included
    peak_share_N                     time of the selected pairs' operations at the matrix peak (3.5 · 4·D for each head and
                                     counted pair), over the time of attending, forward and backward
    peak_share_whole_N               the same with the index scores' 2·G·I·N²/2 added, over the whole step
    decode_N                         one step against a cache, by the GPU's own time; by the clock as well, without a floor
    memory_N                         peak of allocated memory in a step with the loss, including inputs and gradients

Notes have operations and bytes by formula (`attention/flops.py`, `sparse_attention_setting.py`). If a length does not fit into
memory, a note reports it, and its floors count as missed. Peers: `sparse_attention_peers.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from sparse_attention_decoding import add_decoding
from sparse_attention_peers import add_peers
from sparse_attention_report import SparseReport, add_correctness, add_crossover_figures
from sparse_attention_setting import (
    DENSE_FORMS,
    DenseForm,
    Inputs,
    Setting,
    choose,
    dense_step,
    least_bytes,
    make_inputs,
    most_bytes,
    selected_flops,
    selected_pairs,
    shared_by_neighbours,
    sparse_step,
)
from sparse_attention_timing import Clock, DeviceClock, Round, in_turns, phases_in_words, ratio, seconds, total
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsort.attention.flops import choosing_flops, dense_flops

SETTING = Setting(heads=32, groups=4, head_dim=128, index_dim=128, block_size=128, blocks=16)
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
DTYPE = torch.bfloat16
LAYER_FLOORS = {32768: 3.0, 131072: 10.0}
SHARE_FLOOR, MEMORY_FLOOR, DECODE_FLOOR = 0.35, 1.3, 3.0
MEMORY_TOKENS = DECODE_TOKENS = 65536
PEER_LENGTHS = (8192, 32768)
ATTENDING = ("attend", "attend_backward")


def measure_cuda(report: SparseReport, *, quick: bool, setting: Setting = SETTING) -> None:
    """Measure correctness, then the matrix peak, then every length, decoding and the peers."""
    add_correctness(report, setting, DTYPE)
    rounds = 3 if quick else 10
    peak = matrix_peak(report.device, rounds)
    report.add("matrix_peak", peak / 1e12, "TFLOP/s", note="bfloat16, 8192 cubed, median")
    # One form for all lengths, so that ratios are comparable.
    form = _best_form(report, setting)
    ratios: dict[int, float] = {}
    for tokens in LENGTHS[:3] if quick else LENGTHS:
        judged = judged_figures(tokens)
        report.attempt(f"{tokens} tokens", partial(_add_length, report, setting, form, tokens, rounds, peak), judged)
        # A length that did not fit into memory has no figure.
        if f"layer_{tokens}" in report.figures:
            ratios[tokens] = report.figures[f"layer_{tokens}"].value
    add_crossover_figures(report, setting, ratios)
    place: dict[str, Any] = {"device": report.device, "dtype": DTYPE}
    # In a step of microseconds, Python's launches are most of the clock's time, dense or sparse. CUDA graphs remove them.
    for suffix, batch, clock, floor in (
        ("", 1, DeviceClock, DECODE_FLOOR),
        ("_by_the_clock", 1, Clock, None),
        ("_by_the_clock_batch_8", 8, Clock, None),
    ):
        options = {"batch": batch, "make_clock": clock, "suffix": suffix, **place}
        decode = partial(add_decoding, report, setting, DECODE_TOKENS, 5 * rounds, floor, **options)
        judged = (f"decode_{DECODE_TOKENS}_{setting}",) if floor else ()
        report.attempt(f"decoding{suffix}", decode, judged)
    for tokens in PEER_LENGTHS[:1] if quick else PEER_LENGTHS:
        report.attempt(f"peers at {tokens} tokens", partial(add_peers, report, setting, tokens, rounds, DTYPE))


def judged_figures(tokens: int) -> tuple[str, ...]:
    """Names of the figures of a length that have a floor."""
    names = [f"layer_{tokens}", f"layer_{tokens}_with_alignment", f"peak_share_{tokens}"]
    judged = names if tokens in LAYER_FLOORS else []
    return (*judged, *([f"memory_{tokens}"] if tokens == MEMORY_TOKENS else []))


def matrix_peak(device: torch.device, rounds: int) -> float:
    """Operations per second of a large bfloat16 product, by the device's own clock."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    out = torch.empty_like(a)
    took = []
    for _ in range(rounds + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b, out=out)
        stop.record()
        torch.cuda.synchronize(device)
        took.append(float(start.elapsed_time(stop)) / 1e3)
    # The first two products warm up.
    return 2 * size**3 / statistics.median(took[2:])


def flash_step(inputs: Inputs, form: DenseForm, clock: Clock) -> None:
    """`dense_step` by FlashAttention; torch raises an error if it cannot run."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        dense_step(inputs, form, clock)


def _best_form(report: SparseReport, setting: Setting) -> DenseForm:
    inputs = make_inputs(setting, 8192, device=report.device, dtype=DTYPE)
    took: dict[DenseForm, float] = {}
    for form in DENSE_FORMS:
        try:
            kept = in_turns({form: partial(flash_step, inputs, form)}, 5, warm=2)
        except RuntimeError as error:
            report.notes.append(f"dense, key/value heads {form}: {str(error).partition(chr(10))[0]}")
            continue
        # The shortest time, because the best form is a property of the shape and not of the load.
        took[form] = min(total(phases).wall for phases in kept[form])
    if not took:
        raise SystemExit("SDPA's FlashAttention does not run on this GPU in any form: " + "; ".join(report.notes))
    best = min(took, key=lambda form: took[form])
    found = ", ".join(f"{form} {seconds(value)}" for form, value in took.items())
    report.notes.append(f"dense: FlashAttention of SDPA, key/value heads {best} (at 8192 tokens: {found})")
    return best


def _add_length(report: SparseReport, setting: Setting, form: DenseForm, tokens: int, rounds: int, peak: float) -> None:
    place: dict[str, Any] = {"device": report.device, "dtype": DTYPE}
    inputs, clustered = make_inputs(setting, tokens, **place), make_inputs(setting, tokens, "clustered", **place)
    steps: dict[str, Callable[[Clock], object]] = {
        "dense": partial(flash_step, inputs, form),
        "random": partial(sparse_step, inputs, setting),
        "clustered": partial(sparse_step, clustered, setting),
    }
    kept = in_turns(steps, rounds, warm=2)
    selection = choose(inputs, setting)
    add_length_figures(report, setting, tokens, kept, pairs=selected_pairs(selection, inputs.layout), peak=peak)
    report.notes.append(
        f"{tokens} tokens: {work_in_words(setting, tokens)}; 128 neighbours choose {shared_by_neighbours(selection):.1f} "
        f"times the blocks of one, {shared_by_neighbours(choose(clustered, setting)):.1f} times if they are clustered"
    )
    # Memory is measured next, and these tensors would count.
    del selection, clustered, steps
    _add_memory(report, setting, form, tokens, inputs)


def add_length_figures(
    report: SparseReport, setting: Setting, tokens: int, kept: dict[str, list[Round]], *, pairs: int, peak: float
) -> None:
    """Add the figures of one length. `pairs` is the number of pairs selected at random, `peak` is in operations per second."""
    floor = LAYER_FLOORS.get(tokens)
    for suffix, of_dense, wanted in (
        ("forward", "forward", ("choose", "attend")),
        ("backward", "backward", ("attend_backward",)),
    ):
        # Forward and backward are compared phase by phase, so that the ratio has only this phase of the
        # baseline.
        dense = [{of_dense: phases[of_dense]} for phases in kept["dense"]]
        found = ratio(dense, kept["random"], wanted)
        report.add(f"{suffix}_{tokens}", found.median, "x", note=str(found))
    whole = ("choose", *ATTENDING)
    for kind, judged in (("random", floor), ("clustered", None)):
        name = f"layer_{tokens}" if kind == "random" else f"layer_{tokens}_{kind}"
        found = ratio(kept["dense"], kept[kind], whole)
        report.add(name, found.median, "x", floor=judged, note=f"{found}; {setting.words}")
        found = ratio(kept["dense"], kept[kind])
        note = f"{found}; {phases_in_words(kept[kind])}"
        report.add(f"{name}_with_alignment", found.median, "x", floor=judged, note=note)
    selected = selected_flops(setting, pairs)
    attending, step = (_median(kept["random"], wanted) for wanted in (ATTENDING, whole))
    note = f"{selected / 1e12:.3g} TFLOP selected in {seconds(attending)}"
    share = selected / peak / attending
    report.add(f"peak_share_{tokens}", share, "share", floor=None if floor is None else SHARE_FLOOR, note=note)
    chosen = selected + choosing_flops(setting.attention, tokens, setting.sparse)
    note = f"{chosen / 1e12:.3g} TFLOP selected and of index scores in {seconds(step)}"
    report.add(f"peak_share_whole_{tokens}", chosen / peak / step, "share", note=note)


def work_in_words(setting: Setting, tokens: int) -> str:
    """Operations and bytes by formula, forward and backward, in words."""
    element = DTYPE.itemsize
    dense = dense_flops(setting.attention, tokens, training=True)
    # On average, causal attention allows half of the tokens, which bounds the number of selected keys.
    pairs = min(setting.blocks * setting.block_size, tokens / 2) * tokens * setting.groups
    sparse = selected_flops(setting, round(pairs)) + choosing_flops(setting.attention, tokens, setting.sparse)
    least = [least_bytes(setting, tokens, element, sparse=kind) / 1e9 for kind in (False, True)]
    most = most_bytes(setting, tokens, element) / 1e9
    return (
        f"{dense / 1e12:.3g} TFLOP dense, {sparse / 1e12:.3g} sparse; at least {least[0]:.3g} GB dense, {least[1]:.3g} sparse, "
        f"and {most:.3g} GB of keys and values forward if no two queries shared a read"
    )


def _median(rounds: list[Round], wanted: Collection[str]) -> float:
    return statistics.median(total(phases, wanted).wall for phases in rounds)


def _add_memory(report: SparseReport, setting: Setting, form: DenseForm, tokens: int, inputs: Inputs) -> None:
    peaks = {}
    for name, step in (
        ("dense", partial(flash_step, inputs, form)),
        ("sparse", partial(sparse_step, inputs, setting)),
    ):
        for leaf in inputs.leaves:
            leaf.grad = None
        # The caching allocator would otherwise keep the gradients of the previous step.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(report.device)
        step(Clock())
        peaks[name] = torch.cuda.max_memory_allocated(report.device)
    floor = MEMORY_FLOOR if tokens == MEMORY_TOKENS else None
    note = f"sparse {peaks['sparse'] / 2**30:.2f} GiB, dense {peaks['dense'] / 2**30:.2f} GiB"
    report.add(f"memory_{tokens}", peaks["sparse"] / peaks["dense"], "ratio", floor=floor, better="lower", note=note)
