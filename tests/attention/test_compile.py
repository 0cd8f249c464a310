"""torch.compile of a model with an index branch: what it computes is what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Make = Callable[..., Any]
# Compiling takes a second or so for every layer.
SMALL: dict[str, Any] = {
    "llama": {"num_hidden_layers": 1},
    "qwen3": {"num_hidden_layers": 1},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo looks at the gradient of what a graph break hands on, and hides the warning where warnings are not errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), ("gemma3", True)])
def test_training_step(family: str, checkpointing: bool, sparse: Make, tokens: Make) -> None:
    model, ids = sparse(family, model=SMALL[family], alignment_weight=0.7).train(), tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    if checkpointing:
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        for _ in range(2):
            model.zero_grad()
            loss = run(**batch).loss
            (loss * 3).backward()
        found.append((loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, atol=2e-6, rtol=2e-4)


def test_evaluation_and_settings(sparse: Make, tokens: Make) -> None:
    """What is set between steps is seen by the compiled model."""
    model, ids = sparse("qwen3", model=SMALL["qwen3"]), tokens(2, 19)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for mode in ("sparse", "full", "sparse"):
            model.sparse_attention.mode = mode
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_step_of_generation(sparse: Make, tokens: Make) -> None:
    from transformers import StaticCache

    model, ids = sparse("llama", model=SMALL["llama"]), tokens(1, 12)
    compiled = torch.compile(model, backend="eager")
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        found = [compiled(ids[:, :9], past_key_values=cache).logits]
        found += [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)
