"""Sentence vectors against a plain pass: the mean of the final states of a text's own tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.scorers.sentence_vectors import embed_rows

ROWS = [{"q": "What is 2 + 3?"}, {"q": "A train leaves at 9:40 and arrives at 11:05."}, {"q": "Rome"}]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu")


def plain(loaded: LoadedModel, text: str, *, special: bool) -> Any:
    encoded = loaded.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    with torch.inference_mode():
        states = loaded.model.model(input_ids=torch.tensor([encoded["input_ids"]])).last_hidden_state[0]
    own = [end > begin for begin, end in encoded["offset_mapping"]]
    return states[own].double().mean(dim=0).numpy()


def test_the_mean_of_a_text_s_own_final_states(loaded: LoadedModel) -> None:
    found = embed_rows(Backbone(loaded), ROWS, Prompt.of(prompt="Question: {q}\nAnswer:"))
    expected = [plain(loaded, f"Question: {row['q']}\nAnswer:", special=True) for row in ROWS]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_in_chat_the_turns_are_those_of_the_template(make_tiny_model: Callable[..., Path]) -> None:
    chatty = load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu")
    chatty.tokenizer.chat_template = CHAT
    found = embed_rows(Backbone(chatty), ROWS, Prompt.of(prompt="{q}", chat=True))
    expected = [plain(chatty, f"<user>{row['q']}\n<assistant>", special=False) for row in ROWS]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_text_over_the_context_is_cut_on_the_left_but_not_in_chat(make_tiny_model: Callable[..., Path]) -> None:
    small = load_model(str(make_tiny_model("gemma3", max_position_embeddings=16)), dtype="float32", device="cpu")
    row = {"q": "one two three four five six seven eight nine ten"}
    (found,) = embed_rows(Backbone(small), [row], Prompt.of(prompt="{q}"))
    ids = small.tokenizer(row["q"], add_special_tokens=False)["input_ids"]
    whole = small.tokenizer(row["q"])["input_ids"]
    lead = len(whole) - len(ids)
    kept = [*whole[:lead], *ids[-(16 - lead) :]]
    with torch.inference_mode():
        states = small.model.model(input_ids=torch.tensor([kept])).last_hidden_state[0]
    np.testing.assert_allclose(found, states[lead:].double().mean(dim=0).numpy(), atol=2e-5)
    small.tokenizer.chat_template = CHAT
    with pytest.raises(SparsortError, match="row 0 cannot be embedded"):
        embed_rows(Backbone(small), [row], Prompt.of(prompt="{q}", chat=True))
