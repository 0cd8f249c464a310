"""The model that is trained: a new one in one of two sizes, or an existing one.

Contract: "tiny" and "small" are Llamas over bytes, with ByT5's tokenizer, which needs no files: nothing is downloaded, and the
seed determines the weights. Every other name has the meaning that it has in `sparsort score`: a hub id, a folder, a .gguf file
or "demo". Weights are float32, because bfloat16 would lose the optimiser's small updates. Training may still compute in bfloat16
(autocast).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.loading.demo_model import ADAPTER
from sparsort.scoring.model.spec import ModelSpec

# Arguments of transformers' LlamaConfig for models of about 0.15 and 11 million parameters.
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
}
_CONTEXT = 4096


def make_tokenizer(model: ModelSpec | str) -> Any:
    """The tokenizer of a preset or a model.

    Raises:
        SparsortError: the model does not exist, or has no tokenizer.
    """
    model = ModelSpec.of(model)
    if model.name in PRESETS:
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer(extra_ids=0)
    _refuse_misspelt(str(model.name))
    _refuse_adapter(str(model.name))
    return model.load_tokenizer()


def make_model(model: ModelSpec | str, tokenizer: Any, seed: int, *, longest: int) -> Any:
    """Make or load a causal language model in float32 on the CPU; a new one has the tokenizer's special ids.

    Args:
        model: a preset or a model.
        tokenizer: its tokenizer.
        seed: seed for the weights of a preset. It is set in torch's global generator, which the caller restores.
        longest: tokens of the longest text.

    Raises:
        SparsortError: the model cannot be loaded, or its context is shorter than `longest`.
    """
    spec = ModelSpec.of(model, dtype="float32", device="cpu", tokenizer=tokenizer)
    name = str(spec.name)
    if name in PRESETS:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        special = {part: getattr(tokenizer, part) for part in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=_CONTEXT,
            tie_word_embeddings=True,
            **special,
            **PRESETS[name],
        )
        torch.manual_seed(seed)
        loaded = LlamaForCausalLM(config)
    else:
        from sparsort.scoring.model.early_checks import context_of, outline_of

        # The configuration is checked before the weights are loaded; some formats show it only afterwards.
        outline = outline_of(spec)
        _refuse_longer(longest, context_of(outline.config) if outline is not None else None, name)
        loaded = spec.load().model
    _refuse_longer(longest, getattr(loaded.config.get_text_config(), "max_position_embeddings", None), name)
    return loaded


def _refuse_longer(longest: int, context: int | None, name: str) -> None:
    if context is not None and longest > context:
        raise SparsortError(
            f"the longest text has {longest} tokens and the model {name!r} takes {context}. "
            f"Cut texts with max_length={context} (--cut-length {context})."
        )


def _refuse_misspelt(name: str) -> None:
    # Without this check, a misspelt preset such as "smal" would be searched for on the hub.
    if name.lower() in PRESETS or (name.isalpha() and name != "demo" and not Path(name).exists() and _is_near(name)):
        raise unknown_choice("model", name, (*PRESETS, "demo", "a folder", "a hub id"))


def _refuse_adapter(name: str) -> None:
    if (Path(name).expanduser() / ADAPTER).is_file():
        raise SparsortError(
            f"the model {name!r} is an adapter of PEFT, and this command trains all weights of a model. Merge the adapter into "
            "its base model (merge_and_unload) and train that, or train the adapter in Python with sparsort.CurriculumTrainer."
        )


def _is_near(name: str) -> bool:
    return bool(difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.7))
