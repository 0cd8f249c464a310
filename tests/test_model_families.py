"""The fast part of the sweep over model families: each kind of architecture against a plain loop.

`benchmarks/model_families.py` runs all of them. Here are the ones in which faults were found, and one of each other kind.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def sweep() -> Any:
    """The script's module; its folder is on the path while it is imported, as it is for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("model_families")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "family",
    [
        "apertus",  # parameters without dimensions
        "bigbird_pegasus",  # counts positions by itself, whatever position_ids it is given
        "deepseek_v2",  # latent attention
        "gemma3_text",  # sliding windows
        "mamba",  # no attention
        "openai-gpt",  # blocks that return lists, and no cache
        "qwen3_next",  # linear attention between full attention
    ],
)
def test_a_family_equals_the_plain_loop(sweep: Any, family: str) -> None:
    with warnings.catch_warnings():
        # transformers remarks on missing kernels and on tiny configurations.
        warnings.simplefilter("ignore")
        outcome = sweep.check_family(family)
    assert (outcome.kind, outcome.detail) == ("equal", "")


def test_a_head_that_is_not_one_matrix_is_refused(sweep: Any) -> None:
    outcome = sweep.check_family("bert")
    assert outcome.kind == "refused"
    assert "computes its logits in a way that sparsort does not know" in outcome.detail


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
    assert sweep.differences(model, tokenizer, expected) == []


def test_an_outcome_other_than_equal_is_told_apart(sweep: Any) -> None:
    tokenizer = sweep.tiny_tokenizer()
    model = sweep.build("gpt2", tokenizer)
    expected = sweep.PlainLoop(model, tokenizer).everything()
    expected["loss"][0] += 0.01
    expected["greedy"][1][0] += 1
    first, second = sweep.differences(model, tokenizer, expected)
    assert first.startswith("loss differs by 0.01")
    assert second.startswith("greedy tokens differ")
