"""Tiny configurations of every family of causal language models in transformers, for `model_families.py`.

Most families are shrunk by the names of their settings. `SPECIAL` has the further settings that some families need.
"""

from __future__ import annotations

from typing import Any

LAYERS, WIDTH, HEADS, HEAD_DIM = 2, 64, 4, 16
LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
)

# Setting → value, used if the family's default configuration has the setting.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(LAYER_COUNTS, LAYERS),
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
    # With few heads, scores that are all clipped at 0 would tie, and a tie may be broken either way.
    "index_n_heads": 16,
    "index_head_dim": 16,
    **dict.fromkeys(("hidden_size_global", "adapter_in_dim", "adapter_input_size", "adapter_out_dim"), WIDTH),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "vocab_size_per_layer_input"), 512),
    "hidden_size_per_layer_input": 16,
    "backbone_hidden_size": WIDTH,
}
# The same for windows, chunks and selections, which are shorter than the texts of the sweep. A family that has none gets none.
# Doge's `keep_window_size` is not shrunk: it selects keys by their values alone, and the values of two equal tokens tie.
LIMITS: dict[str, int] = {
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("local_attention_window_len", "attention_chunk_size", "index_topk"), 16),
    **dict.fromkeys(("chunk_size", "block_size", "lsh_attn_chunk_length", "local_attn_chunk_length"), 16),
    "index_block_size": 8,
    "index_topk_blocks": 2,
}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_ASSISTANT = {
    "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": LAYERS,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "head_dim": 32,
    "num_key_value_heads": HEADS,
}
# Model type → further settings. A dictionary under the name of a part of the configuration is for that part.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * LAYERS},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": _GEMMA4,
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "attention_head_size": HEAD_DIM,
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [16, 32],
        "feed_forward_size": 2 * WIDTH,
        "hash_seed": 0,
        "is_decoder": True,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
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
    if family.endswith("_assistant"):
        # transformers 5.23 sets this to all layers, and then builds no layer because there is nothing to share.
        text.num_kv_shared_layers = 0
    return config


def _shrunk(config_class: Any, vocab_size: int, special: dict[str, Any]) -> Any:
    """A small configuration of the class with the settings in `special`."""
    given = special | _shrunk_parts(config_class, vocab_size, special)
    default = config_class(**{name: given[name] for name in getattr(config_class, "sub_configs", {}) if name in given})
    names = set(default.to_dict()) | set(getattr(config_class, "attribute_map", {}))
    options = {name: value for name, value in SIZES.items() if name in names}
    options |= {name: value for name, value in LIMITS.items() if name in names and getattr(default, name) is not None}
    if "kv_lora_rank" in names:
        # Multi-head latent attention: keys and values have as many heads as queries, and widths of their own.
        options["num_key_value_heads"] = HEADS
        options.pop("head_dim", None)
    # Where one setting has two names, the family's own name counts.
    for alias, name in getattr(config_class, "attribute_map", {}).items():
        if alias in options and name in options:
            del options[alias]
    if "vocab_size" in names:
        options["vocab_size"] = vocab_size
    kinds = {
        name: list(dict.fromkeys(given.get(name) or getattr(default, name)))
        for name in ("layer_types", "mlp_layer_types", "layers_block_type")
        if name in default.to_dict() and getattr(default, name)
    }
    # One layer of each kind.
    n_layers = max([LAYERS, *map(len, kinds.values())])
    options |= {name: n_layers for name in options if name in LAYER_COUNTS}
    options |= {name: (each * n_layers)[:n_layers] for name, each in kinds.items()}
    return config_class(**options | given)


def _shrunk_parts(config_class: Any, vocab_size: int, special: dict[str, Any]) -> dict[str, Any]:
    """The small configurations of the parts that a configuration of the class consists of, by name."""
    from transformers import CONFIG_MAPPING

    parts = {}
    for name, part_class in getattr(config_class, "sub_configs", {}).items():
        spec = config_class.sub_configs_defaults.get(name)
        if spec is not None and spec.optional:
            continue
        if not hasattr(part_class, "model_type"):
            part_class = CONFIG_MAPPING[spec.model_type]
        usual = {} if spec is None else spec.init_kwargs
        usual = {key: value for key, value in usual.items() if key not in SIZES | LIMITS and key != "vocab_size"}
        own = usual | SPECIAL.get(part_class.model_type, {}) | special.get(name, {})
        parts[name] = _shrunk(part_class, vocab_size, own)
    return parts


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
