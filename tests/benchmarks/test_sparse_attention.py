"""The benchmark `sparse_attention.py`: it times the documented phases, derives its figures from them, and applies its floors.

Both devices' measuring runs here at tiny size on the CPU; the numbers themselves say nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.reference import attend_ref, support
from sparsort.kernels.blocksparse.selection import Selection, every_block

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules, and `tiny`, the setting of quick runs on the CPU."""
    for folder in (BENCHMARKS, BENCHMARKS / "speed", BENCHMARKS / "speed" / "sparse_attention"):
        monkeypatch.syspath_prepend(folder)
    import gpu_check
    import sparse_attention
    import sparse_attention_cpu
    import sparse_attention_cuda
    import sparse_attention_peers
    import sparse_attention_report
    import sparse_attention_setting
    import sparse_attention_timing

    return argparse.Namespace(
        gpu_check=gpu_check,
        main=sparse_attention.main,
        cpu=sparse_attention_cpu,
        cuda=sparse_attention_cuda,
        peers=sparse_attention_peers,
        report=sparse_attention_report,
        setting=sparse_attention_setting,
        timing=sparse_attention_timing,
        tiny=sparse_attention_cpu.SMALL,
    )


def rounds_of(bench, *times):
    return [{name: bench.timing.Took(wall, 2 * wall) for name, wall in phases.items()} for phases in times]


def test_dense_is_causal_attention_over_every_block_in_either_form(bench):
    inputs = bench.setting.make_inputs(bench.tiny, 50)
    every = every_block(inputs.layout, bench.tiny.groups, bench.tiny.block_size)
    scale = bench.tiny.head_dim**-0.5
    exact, _ = attend_ref(inputs.query, inputs.key, inputs.value, every, inputs.layout, scale=scale)
    for form in bench.setting.DENSE_FORMS:
        torch.testing.assert_close(bench.setting.dense_attend(inputs, form), exact, atol=1e-5, rtol=1e-4)


def test_a_step_gives_every_input_its_gradient_in_named_phases(bench):
    inputs, clock = bench.setting.make_inputs(bench.tiny, 100), bench.timing.Clock()
    bench.setting.sparse_step(inputs, bench.tiny, clock)
    assert list(clock.phases) == ["choose", "attend", "align", "attend_backward", "align_backward"]
    assert all(leaf.grad.abs().sum() > 0 for leaf in inputs.leaves)


def test_clustered_neighbours_share_more_blocks_than_random_ones(bench):
    unions = {}
    for kind in ("random", "clustered"):
        inputs = bench.setting.make_inputs(bench.tiny, 2048, kind)
        unions[kind] = bench.setting.shared_by_neighbours(bench.setting.choose(inputs, bench.tiny))
    assert unions["clustered"] < 0.8 * unions["random"]


def test_selected_pairs_are_those_of_the_support(bench):
    layout = Layout.from_lengths([[37, 5], [48]])
    index = torch.Generator().manual_seed(0)
    inputs = bench.setting.make_inputs(bench.tiny, 48, batch=2)
    rows = torch.randn(inputs.index_query.shape, generator=index)
    from sparsort.kernels.blocksparse.ops import index_select

    selection = index_select(rows, inputs.index_key, layout, bench.tiny.budget, block_size=8)
    pairs = int(support(selection, layout)[0].sum())
    assert bench.setting.selected_pairs(selection, layout) == pairs
    heads = bench.tiny.heads // bench.tiny.groups
    assert bench.setting.selected_flops(bench.tiny, pairs) == 3.5 * 4 * bench.tiny.head_dim * heads * pairs


def test_a_ratio_is_the_median_of_rounds_and_sees_only_the_phases_wanted(bench):
    dense = rounds_of(bench, {"forward": 4.0}, {"forward": 6.0}, {"forward": 8.0})
    ours = rounds_of(bench, {"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 9.0}, {"a": 1.0, "b": 9.0})
    found = bench.timing.ratio(dense, ours, ("a",))
    assert (found.median, found.lowest, found.highest, found.of_best) == (4.0, 3.0, 8.0, 4.0)
    assert bench.timing.ratio(dense, ours).median == pytest.approx(6 / 11)


def test_steps_take_turns_in_being_first(bench):
    order = []
    steps = {name: lambda clock, name=name: order.append(name) for name in "abc"}
    bench.timing.in_turns(steps, 3)
    assert "".join(order) == "abcbcacab"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({1024: 0.5, 2048: 2.0}, 1024 * 2**0.5),
        ({1024: 1.0, 2048: 2.0}, None),
        ({2048: 0.9, 1024: 0.5}, None),
        ({512: 0.5, 1024: 0.25, 2048: 1.0, 4096: 3.0}, 2048.0),
    ],
)
def test_the_crossover_is_where_ratios_rise_through_one(bench, ratios, expected):
    found = bench.report.crossing(ratios)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_figure_that_was_not_measured_misses_its_floor_except_in_a_quick_run(bench):
    def too_large():
        raise torch.OutOfMemoryError("no room\nfor it")

    judged = bench.cuda.judged_figures(131072)
    for quick, missed in ((False, list(judged)), (True, [])):
        report = bench.report.SparseReport("sparse_attention", torch.device("cpu"), quick=quick)
        report.attempt("131072 tokens", too_large, judged)
        assert report.missed == missed
        assert report.notes == ["131072 tokens: out of memory (no room)"]


def test_figures_of_a_length_follow_from_its_times(bench):
    report = bench.report.SparseReport("sparse_attention", torch.device("cpu"))
    ours = {"choose": 0.5, "attend": 0.5, "align": 1.0, "attend_backward": 1.0, "align_backward": 0.0}
    kept = {
        "dense": rounds_of(bench, {"forward": 2.0, "backward": 6.0}),
        "random": rounds_of(bench, ours),
        "clustered": rounds_of(bench, ours),
    }
    setting, pairs = bench.cuda.SETTING, 10**9
    bench.cuda.add_length_figures(report, setting, 32768, kept, pairs=pairs, peak=1e14)
    value = {name: figure.value for name, figure in report.figures.items()}
    assert (value["forward_32768"], value["backward_32768"]) == (2.0, 6.0)
    assert (value["layer_32768"], value["layer_32768_with_alignment"]) == (4.0, pytest.approx(8 / 3))
    selected = 3.5 * 4 * 128 * 8 * pairs
    assert value["peak_share_32768"] == pytest.approx(selected / 1e14 / 1.5)
    index = 2 * setting.groups * setting.index_dim * 32768**2 / 2
    assert value["peak_share_whole_32768"] == pytest.approx((selected + index) / 1e14 / 2)
    assert report.missed == ["layer_32768_with_alignment", "peak_share_32768"]
    assert set(bench.cuda.judged_figures(32768)) <= set(report.figures)


def test_tiles_for_flex_attention_hold_their_last_queries_blocks(bench):
    size, tokens = 16, 64
    blocks = torch.full((1, 2, tokens, 3), -1, dtype=torch.int32)
    own = torch.arange(tokens, dtype=torch.int32) // size
    blocks[0, :, :, 0] = own
    blocks[0, 0, 63, 1:] = torch.tensor([2, 0])
    blocks[0, 1, 47, 2] = 1
    selection = Selection(blocks=blocks, block_size=size)
    number, full, partial = bench.peers.shared_blocks(selection, heads=4)
    from torch.nn.attention.flex_attention import BlockMask

    mask = BlockMask.from_kv_blocks(
        torch.ones_like(number), partial, number, full, BLOCK_SIZE=size, seq_lengths=(tokens, tokens)
    )
    expected = torch.eye(4, dtype=torch.int32).repeat(1, 4, 1, 1)
    expected[0, :2, 3, [0, 2]] = 1
    expected[0, 2:, 2, 1] = 1
    assert torch.equal(mask.to_dense(), expected)


def test_the_studys_rows_are_repeated_with_their_source(bench, tmp_path):
    def found():
        report = bench.report.SparseReport("sparse_attention", torch.device("cpu"))
        bench.report.add_study(report, tmp_path)
        return report

    assert any("sparse_study.py" in note for note in found().notes)

    def run(attention, seed, loss, recall, mass=None):
        curve = {"text_loss": [9.0, loss], "far_recall": [0.1, recall]}
        return {"attention": attention, "order": "plain", "seed": seed, "curve": curve, "caught": {"mass": mass}}

    runs = [run("dense", 0, 2.0, 1.0), run("index_branch", 1, 4.08, 0.96, 0.95), run("dense", 1, 4.0, 0.98)]
    runs += [run("index_branch", 0, 2.04, 1.0, 0.93), run("window", 0, 3.0, 0.5), run("window", 1, 3.0, 0.5)]
    best = [{"order": "plain", "seed": seed, "caught": {"mass": 0.97}} for seed in (0, 1)]
    (tmp_path / bench.report.STUDY).write_text(json.dumps({"runs": runs, "best_possible": best}))
    report = found()
    value = {name: figure.value for name, figure in report.figures.items()}
    assert value == pytest.approx(
        {
            "loss_gap_plain": 2.0,
            "recall_below_dense_plain": 1.0,
            "mass_captured_plain": 0.94,
            "mass_captured_by_best_blocks_plain": 0.97,
            "window_below_dense_plain": 49.0,
        }
    )
    assert report.missed == ["loss_gap_plain"]
    assert "0.93 to 0.95 over 2 seeds" in report.figures["mass_captured_plain"].note


def test_the_mass_after_the_warm_up_is_judged_by_what_the_warm_up_kept(bench, tmp_path):
    def found():
        report = bench.report.SparseReport("sparse_attention", torch.device("cpu"))
        bench.report.add_warm_up(report, tmp_path)
        return report

    assert any("sparse_warmup.py" in note for note in found().notes)
    figures = {
        "mass, index branch": {"value": 0.89, "unit": "share", "floor": 0.9, "note": "of 5"},
        "mass, oracle": {"value": 0.95, "unit": "share", "floor": None, "note": ""},
    }
    (tmp_path / "sparse_warmup-cpu.json").write_text(json.dumps({"figures": figures}))
    report = found()
    assert report.missed == ["mass_captured_after_warm_up"]
    assert report.figures["mass_captured_after_warm_up"].note == "of 5; from sparse_warmup-cpu.json"


def test_the_cpu_part_runs(bench, monkeypatch):
    monkeypatch.setattr(bench.cpu, "_peak", lambda *_: 2**21)
    report = bench.report.SparseReport("sparse_attention", torch.device("cpu"), quick=True)
    bench.cpu.measure_cpu(report, (bench.tiny,), 256, 1)
    name = str(bench.tiny)
    wanted = {f"layer_256_{name}_random_with_alignment", f"layer_512_{name}_random", f"warm_up_64_{name}"}
    wanted |= {f"decode_1024_{name}", "decode_1024_llama_static_cache", "decode_1024_llama_dynamic_cache"}
    assert wanted <= set(report.figures)
    assert report.figures["same_bits_when_run_twice"].value == 1
    assert report.figures["error_against_fp64_float32"].value < bench.report.TOLERANCES[torch.float32]
    assert all(figure.floor is None for figure in report.figures.values())
    json.dumps(report.to_json())


def test_the_dense_form_that_the_gpu_cannot_run_is_skipped(bench, monkeypatch):
    def flash(inputs, form, clock):
        if form == "shared":
            raise RuntimeError("No available kernel.")
        with clock("forward"):
            pass

    monkeypatch.setattr(bench.cuda, "flash_step", flash)
    report = bench.report.SparseReport("sparse_attention", torch.device("cpu"))
    assert bench.cuda._best_form(report, bench.tiny) == "repeated"
    assert report.notes[0] == "dense, key/value heads shared: No available kernel."


def test_the_gpu_part_runs_on_a_cpu_with_substitutes(bench, monkeypatch):
    for name, value in (
        ("LENGTHS", (256,)),
        ("LAYER_FLOORS", {256: 3.0}),
        ("DECODE_TOKENS", 1024),
        ("PEER_LENGTHS", (256,)),
    ):
        monkeypatch.setattr(bench.cuda, name, value)
    monkeypatch.setattr(bench.cuda, "matrix_peak", lambda *_: 1e12)
    monkeypatch.setattr(bench.cuda, "DeviceClock", bench.timing.Clock)
    monkeypatch.setattr(bench.cuda, "_add_memory", lambda *_: None)
    monkeypatch.setattr(bench.cuda, "_best_form", lambda *_: "shared")

    def cannot(*_):
        raise ValueError("no backward here\nand no more words")

    monkeypatch.setattr(bench.peers, "_flex_step", cannot)
    report = bench.report.SparseReport("sparse_attention", torch.device("cpu"))
    bench.cuda.measure_cuda(report, quick=False, setting=bench.tiny)
    assert set(bench.cuda.judged_figures(256)) <= {name for name, figure in report.figures.items() if figure.floor}
    assert f"decode_1024_{bench.tiny}" in report.figures
    assert report.figures["error_against_fp64_bfloat16"].holds
    assert {"fla_nsa: not installed", "flash_msa: not installed"} <= set(report.notes)
    assert "flex_attention at 256 tokens: ValueError: no backward here" in report.notes


def test_the_gpu_check_finds_the_tests_of_the_kernels(bench):
    names = [path.name for path in bench.gpu_check.tests_of("sparse_attention")]
    assert {f"test_{part}.py" for part in ("select", "attend", "align")} <= set(names)
    assert all("gpu" in path.read_text() for path in bench.gpu_check.tests_of("sparse_attention"))
    assert all(path.exists() for path in bench.gpu_check.tests_of("sparsity_kernels"))
