"""The fast part of the sweep over model families: each kind of architecture against a plain loop.

`benchmarks/checks/model_families.py` runs all of them. Here are the ones in which faults were found, and one of each other kind.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsort.errors import SparsortError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "checks"


@pytest.fixture(scope="module")
def sweep() -> Any:
    """The script's module; its folder is on the path while it is imported, as it is for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("model_families")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers remarks on missing kernels and on tiny configurations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "family",
    [
        "apertus",  # parameters without dimensions
        "bigbird_pegasus",  # counts positions by itself, whatever position_ids it is given
        "deepseek_v2",  # latent attention
        "doge",  # an attention mask of its own
        "gemma3_text",  # sliding windows
        "gemma4_text",  # layers that share keys and values, and give the last state alone if no more is asked for
        "longcat_flash",  # counts attentions as layers, two in a block
        "mamba",  # no attention
        "moshi",  # a cache cut to a window that whole texts do not have
        "openai-gpt",  # blocks that return lists, and no cache
        "qwen3_next",  # linear attention between full attention
        "qwen4_exp_text",  # several streams of states between the blocks, and no final norm
        "xlstm",  # a cap on the logits under another name
    ],
)
def test_a_family_equals_the_plain_loop(sweep: Any, family: str) -> None:
    outcome = sweep.check_family(family)
    assert (outcome.kind, outcome.detail) == ("equal", "")


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("bert", "computes its logits in a way that sparsort does not know"),
        ("blt", "has no hidden_size, so this architecture is not supported"),
        ("gemma4_assistant", "does not run on token ids alone (inputs_embeds and shared_kv_states cannot be None)."),
        ("modernbert-decoder", "computes its logits in a way that sparsort does not know"),
        ("musicgen", "does not run on token ids alone"),
        ("prophetnet", "computes its logits in a way that sparsort does not know"),
        ("reformer", "Reformer hashes tokens into random buckets"),
        ("xlnet", "is not a causal decoder: its tokens see later ones"),
    ],
)
def test_a_family_is_refused_before_any_text_is_read(sweep: Any, family: str, sentence: str) -> None:
    # `check_family` counts a refusal as one only if it comes on construction.
    outcome = sweep.check_family(family)
    assert outcome.kind == "refused"
    assert sentence in outcome.detail


def test_the_sweep_covers_every_class_and_each_configuration_is_tiny(sweep: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert sweep.families() == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    too_large = {}
    for family in sweep.families():
        config = sweep.tiny_config(family, 320)
        text = config.get_text_config(decoder=True)
        layers, width = getattr(text, "num_hidden_layers", 2), getattr(text, "hidden_size", 64)
        if layers > 4 or width > 64 or getattr(text, "vocab_size", 320) != 320:
            too_large[family] = (layers, width)
    # Hierarchical reasoning: the number of blocks counts the cycles too.
    assert set(too_large) <= {"hrm_text"}


def test_a_head_that_reads_a_projection_of_the_last_state_equals_the_plain_loop(sweep: Any) -> None:
    from transformers import OPTConfig

    tokenizer = sweep.tiny_tokenizer()
    # As OPT 350M: no final norm, and a projection between the last block and the head.
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        word_embed_proj_dim=24,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        do_layer_norm_before=False,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = sweep.build_from(config)
    loop = sweep.PlainLoop(model, tokenizer)
    expected = loop.everything()
    # The site before the head is the last block's output, and `output_hidden_states` gives its projection.
    caught: list[Any] = []
    hook = model.model.decoder.layers[-1].register_forward_hook(lambda _module, _args, output: caught.append(output))
    for row in sweep.ROWS:
        loop.forward(loop.ids(row["q"]))
    hook.remove()
    expected["gini"] = [sweep.gini_of((out[0] if isinstance(out, tuple) else out)[0, -1]) for out in caught]
    assert sweep.Ours(model, tokenizer).differences(expected) == []


def test_an_outcome_other_than_equal_is_reported(sweep: Any) -> None:
    tokenizer = sweep.tiny_tokenizer()
    model = sweep.build("gpt2", tokenizer)
    expected = sweep.PlainLoop(model, tokenizer).everything()
    expected["loss"][0] += 0.01
    expected["greedy"][1][0] += 1
    first, second = sweep.Ours(model, tokenizer).differences(expected)
    assert first.startswith("loss differs by 0.01")
    assert second.startswith("greedy tokens differ")


def test_a_failure_after_construction_is_a_crash(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_arguments: Any) -> None:
        raise SparsortError("this model is refused in the middle of its rows.")

    monkeypatch.setattr(sweep.Ours, "differences", late)
    outcome = sweep.check_family("gpt2")
    assert (outcome.kind, outcome.detail) == (
        "crash",
        "SparsortError: this model is refused in the middle of its rows.",
    )


def test_an_unfinished_sweep_is_resumed(sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, ran = tmp_path / "outcomes.jsonl", []

    def check(family: str) -> Any:
        ran.append(family)
        return sweep.Outcome(family=family, model_class="X", kind="equal")

    monkeypatch.setattr(sweep, "check_family", check)
    for families in (["gpt2"], ["gpt2", "opt"]):
        monkeypatch.setattr(sys, "argv", ["model_families", *families, "--here", "--resume", str(outcomes)])
        sweep.main()
    assert ran == ["gpt2", "opt"]
    assert list(sweep.read_outcomes(outcomes)) == ["gpt2", "opt"]
