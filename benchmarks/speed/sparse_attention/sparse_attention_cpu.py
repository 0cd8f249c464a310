"""The CPU's part of `sparse_attention.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sparse_attention_decoding import add_decoding, add_model_decoding
from sparse_attention_report import SparseReport, add_correctness, add_crossover_figures
from sparse_attention_setting import (
    DENSE_FORMS,
    DenseForm,
    Setting,
    choose,
    dense_step,
    make_inputs,
    shared_by_neighbours,
    sparse_step,
)
from sparse_attention_timing import in_turns, phases_in_words, ratio, total

from sparsort.attention.flops import saving

SETTINGS = (
    Setting(heads=8, groups=1, head_dim=128, index_dim=64, block_size=128, blocks=8),
    Setting(heads=8, groups=2, head_dim=64, index_dim=64, block_size=128, blocks=8),
)
SMALL = Setting(heads=4, groups=2, head_dim=16, index_dim=8, block_size=16, blocks=4)
FLOOR_LAYER, FLOOR_DECODE = 4.0, 3.0
WITHOUT_LOSS = ("choose", "attend", "attend_backward")


def measure_cpu(report: SparseReport, settings: tuple[Setting, ...], tokens: int, rounds: int) -> None:
    """Measure everything: a layer of `tokens` tokens for the floor, lengths around it, and a cache of four times as many."""
    add_correctness(report, SMALL, torch.float32)
    for setting in settings:
        form = best_dense_form(report, setting, max(tokens // 8, 2 * setting.block_size))
        _add_layer(report, setting, form, tokens, rounds)
        _add_warm_up(report, setting, form, tokens // 4, rounds)
        # The crossover and the memory are measured for one setting, because they take most of the time.
        if setting == settings[0]:
            _add_crossover(report, setting, form, tokens, rounds)
            _add_memory(report, setting, form, tokens)
        add_decoding(report, setting, 4 * tokens, 10 * rounds, FLOOR_DECODE)
    add_model_decoding(report, settings[0], 4 * tokens, 4 * rounds)


def best_dense_form(report: SparseReport, setting: Setting, tokens: int) -> DenseForm:
    """The form of SDPA with the fastest forward and backward, with which all later ratios compare."""
    inputs = make_inputs(setting, tokens)
    kept = in_turns({form: partial(dense_step, inputs, form) for form in DENSE_FORMS}, 2, warm=1)
    # Processor time, so that other programs on the machine do not decide the choice.
    took = {form: min(total(phases).cpu for phases in kept[form]) for form in DENSE_FORMS}
    best = min(DENSE_FORMS, key=lambda form: took[form])
    found = ", ".join(f"{form} {took[form] * 1e3:.0f} ms" for form in DENSE_FORMS)
    report.notes.append(
        f"{setting}: dense SDPA with key/value heads {best} (processor time at {tokens} tokens: {found})"
    )
    return best


def _add_layer(report: SparseReport, setting: Setting, form: DenseForm, tokens: int, rounds: int) -> None:
    """Add forward and backward with their floor, for random and for clustered selections."""
    inputs = {"random": make_inputs(setting, tokens), "clustered": make_inputs(setting, tokens, "clustered")}
    steps: dict[str, Any] = {"dense": partial(dense_step, inputs["random"], form)}
    for kind, of_kind in inputs.items():
        steps[kind] = partial(sparse_step, of_kind, setting)
    kept = in_turns(steps, rounds)
    for kind, of_kind in inputs.items():
        floor = FLOOR_LAYER if kind == "random" else None
        union = shared_by_neighbours(choose(of_kind, setting))
        about = f"{setting.words}; 128 neighbours choose {union:.1f} times the blocks of one"
        found = ratio(kept["dense"], kept[kind], WITHOUT_LOSS)
        name = f"layer_{tokens}_{setting}_{kind}"
        report.add(name, found.median, "x", floor=floor, note=f"{found}; {about}")
        found = ratio(kept["dense"], kept[kind])
        words = phases_in_words(kept[kind])
        report.add(f"{name}_with_alignment", found.median, "x", floor=floor, note=f"{found}; {words}")


def _add_warm_up(report: SparseReport, setting: Setting, form: DenseForm, tokens: int, rounds: int) -> None:
    """Add the cost of the warm-up, which attends to every block, against dense attention."""
    inputs = make_inputs(setting, tokens)
    steps: dict[str, Any] = {
        "dense": partial(dense_step, inputs, form),
        "full": partial(sparse_step, inputs, setting, full=True),
    }
    kept = in_turns(steps, rounds)
    for suffix, wanted in (("", WITHOUT_LOSS), ("_with_alignment", None)):
        found = ratio(kept["dense"], kept["full"], wanted)
        report.add(f"warm_up_{tokens}_{setting}{suffix}", found.median, "x", note=f"every block; {found}")


def _add_crossover(report: SparseReport, setting: Setting, form: DenseForm, tokens: int, rounds: int) -> None:
    """Add ratios by length, with those of the formula, and the first length at which sparse attention is faster."""
    lengths = [tokens // 16, tokens // 8, tokens // 4, tokens // 2, tokens, 2 * tokens]
    ratios: dict[int, float] = {}
    for length in lengths:
        if length == tokens:
            # This length was already measured by `_add_layer`.
            ratios[length] = report.figures[f"layer_{tokens}_{setting}_random"].value
        else:
            inputs = make_inputs(setting, length)
            steps: dict[str, Any] = {
                "dense": partial(dense_step, inputs, form),
                "sparse": partial(sparse_step, inputs, setting),
            }
            # Dense attention at twice the length takes four times as long, so it runs once.
            kept = in_turns(steps, 1 if length > tokens else rounds)
            found = ratio(kept["dense"], kept["sparse"], WITHOUT_LOSS)
            ratios[length] = found.median
            report.add(f"layer_{length}_{setting}_random", found.median, "x", note=str(found))
        # The formula's training step includes the alignment loss; forward alone does not.
        formula = saving(setting.attention, length, setting.sparse)
        report.add(f"formula_{length}_{setting}", formula, "x", note="operations of the forward pass, saved by formula")
    add_crossover_figures(report, setting, ratios)


def _add_memory(report: SparseReport, setting: Setting, form: DenseForm, tokens: int) -> None:
    """Add the growth of the resident set in forward and backward, each in a separate process."""
    grown = {kind: _peak(kind, setting, form, tokens) / 2**20 for kind in ("dense", "sparse")}
    note = (
        f"sparse {grown['sparse']:.0f} MiB with the alignment loss, dense {grown['dense']:.0f} MiB; inputs not counted"
    )
    # A small step may fit into memory that is already allocated, and then shows no growth.
    ratio_of_both = grown["sparse"] / max(grown["dense"], 1)
    report.add(f"memory_{tokens}_{setting}", ratio_of_both, "ratio", better="lower", note=note)


def _peak(kind: str, setting: Setting, form: DenseForm, tokens: int) -> int:
    script = Path(__file__).with_name("sparse_attention_peak.py")
    command = [sys.executable, str(script), kind, str(tokens), form, json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a part of the benchmark failed:\n{done.stderr}")
    return int(done.stdout)
