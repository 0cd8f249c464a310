"""Tiny configurations of every family of causal language models in transformers, for `model_families.py`.

Most families are shrunk by the names of their settings alone. `SPECIAL` holds what some need besides.
"""

from __future__ import annotations

from typing import Any

LAYERS, WIDTH, HEADS, HEAD_DIM = 2, 64, 4, 16

# Setting → value, given where the family's default configuration has the setting.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            "dff",
            "d_inner",
            "d_ff",
            "dim_ff",
            "shared_intermediate_size",
            "block_ff_dim",
        ),
        2 * WIDTH,
    ),
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "d_head": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": HEAD_DIM,
    "first_k_dense_replace": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "mamba_n_heads": 8,
    "mamba_d_head": HEAD_DIM,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "state_size": 16,
    "time_step_rank": 8,
    "rotary_dim": 8,
    "rotary_ndims": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 256,
}
# Family → what else it needs.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
}


def tiny_config(family: str, vocab_size: int) -> Any:
    """The family's configuration with two small layers and this vocabulary."""
    from transformers import CONFIG_MAPPING

    config = _shrunk(CONFIG_MAPPING[family], vocab_size, SPECIAL.get(family, {}))
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for part in {id(config): config, id(text): text}.values():
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 2
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    return config


def _shrunk(config_class: Any, vocab_size: int, special: dict[str, Any]) -> Any:
    default = config_class()
    names = set(default.to_dict()) | set(getattr(config_class, "attribute_map", {}))
    options = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:
        # Multi-head latent attention: keys and values have as many heads as queries, and widths of their own.
        options["num_key_value_heads"] = HEADS
        options.pop("head_dim", None)
    # One setting under two names: the family's own one counts.
    for alias, name in getattr(config_class, "attribute_map", {}).items():
        if alias in options and name in options:
            del options[alias]
    if "vocab_size" in names:
        options["vocab_size"] = vocab_size
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(default, name, None)
        if kinds and name in default.to_dict():
            # One layer of each kind, as far as two layers go.
            options[name] = (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if hasattr(part, "model_type") and getattr(default, name, None) is not None and not isinstance(part, str):
            own = special.get(name, {}) if isinstance(special.get(name, {}), dict) else {}
            options[name] = _shrunk(type(getattr(default, name)), vocab_size, own)
    options.update(
        {name: value for name, value in special.items() if name not in getattr(config_class, "sub_configs", {})}
    )
    return config_class(**{name: value for name, value in options.items() if value is not ...})


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a token in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["A question of apples: how many are left? The answer is five, yes or no."], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
