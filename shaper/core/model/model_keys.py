"""Which keys of a model's config are understood, and which change the work unseen.

A decoder is described by a few numbers (`shaper.core.model.shape`). Of each other key of its
config one of three things is true: it changes no FLOPs and no bytes (a rotary base, a
token id), it is off (null, false, 0, an empty list), or it may change the work. The
last kind is an error that names the key, as is a family of models that is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Decoders of grouped heads, a gated feed-forward part of three matrices and, in some,
# experts of the same form. Each was counted against transformers (tests/core/test_models.py).
DENSE_TYPES = frozenset(
    {
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "phi3"),
        *("gemma", "gemma2", "gemma3_text", "granite", "olmo", "olmo2", "olmo3"),
        *("cohere", "cohere2", "exaone4", "glm", "glm4", "seed_oss", "smollm3", "stablelm"),
        *("hunyuan_v1_dense", "ernie4_5"),
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text"),
    }
)
MIXTURE_TYPES = frozenset(
    {
        *("qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"),
        *("glm4_moe", "glm4v_moe_text", "ernie4_5_moe", "dots1", "solar_open"),
    }
)
# Here `intermediate_size` is the width of one expert.
EXPERT_WIDTH_TYPES = frozenset(
    {"mixtral", "gpt_oss", "minimax_m2", "granitemoe", "granitemoeshared", "olmoe", "phimoe"}
)
KNOWN_TYPES = DENSE_TYPES | MIXTURE_TYPES | EXPERT_WIDTH_TYPES

# Embedding and unembedding are one matrix where the config does not say.
TIED_TYPES = frozenset({"gemma", "gemma2", "gemma3_text", "cohere", "cohere2"})
# All layers have the window, where no list says which.
ALL_SLIDING_TYPES = frozenset({"mistral", "mixtral", "phi3", "phimoe", "ministral", "llama"})
# A missing `head_dim` is not always the hidden size over the heads.
HEAD_DIMS = {
    **dict.fromkeys(("qwen3", "qwen3_vl_text", "qwen3_vl_moe_text", "ernie4_5"), 128),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), 256),
    **dict.fromkeys(("glm", "glm4", "seed_oss", "solar_open", "minimax_m2", "ministral3"), 128),
    "gpt_oss": 64,
}

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_KEYS = ("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk")
SHARED_COUNT_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTH_KEYS = ("shared_expert_intermediate_size", "shared_intermediate_size")

_READ = frozenset(
    {
        *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
        *("max_position_embeddings", "tie_word_embeddings", "dtype", "torch_dtype"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        *("sliding_window_pattern", "moe_intermediate_size", "interleave_moe_layer_step"),
        *("first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers"),
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        *("mlp_layer_types", "quantization_config", "compression_config"),
        *(EXPERT_KEYS + CHOSEN_KEYS + SHARED_COUNT_KEYS + SHARED_WIDTH_KEYS),
    }
)
# Keys with one of these parts are about sizes, layers, heads, experts or storage.
_SUSPICIOUS = re.compile(
    r"head|expert|moe|layer|window|quant|lora|rank|dim|size|state|mamba|ssm|conv|attn|attention|"
    r"index|compress|block|sparse|linear|recurr|hybrid|pattern|top_?k|mlp|ffn|width|mult|shared|"
    r"kv|^num_|^n_|_num_|stride|chunk|memory|codebook|depth|engram|freq|interval|skip|loop|gate|"
    r"group|parallel|cross|query|adapter|latent|ratio"
)
# Suspicious by name, and without effect on the work of a step.
_HARMLESS = re.compile(
    r".*(rope|rotary).*|.*_token(_id|_ids|_index|s)?|.*(dropout|pdrop)(_prob)?|.*eps(ilon)?|"
    r".*softcap(ping)?|.*act(ivation)?(_fn|_function)?|.*init.*|router_.*|.*aux_loss.*|.*jitter.*|"
    r"output_.*|.*bias|vision.*|image.*|video.*|audio.*|mm_.*|.*projector.*|.*visual.*|"
    r"mtp_.*|num_mtp_.*|num_nextn_predict_layers|use_mtp|tokenizer_.*|_.*|.*embd?_scale|"
    r"(embedding|residual|attention|mup|lm_head|logits?|key)_(multiplier|scal(e|ing)|divisor)|"
    r"query_pre_attn_scalar|norm_topk_prob|n_group|topk_group|topk_method|scoring_func|"
    r"routed_scaling_factor|routing_.*|seq_aux|use_grouped_topk|moe_norm_min|expert_bias.*|"
    r"chunk_size_feed_forward|num_(beams|beam_groups|return_sequences|labels|logits_to_keep)|"
    r"top_(k|p)|(encoder_)?no_repeat_ngram_size|diversity_penalty|pruned_heads|is_decoder|"
    r"cross_attention_hidden_size|add_cross_attention|.*attn_implementation|initial_context_length|"
    r"original_max_position_embeddings|use_(qk_norm|flash.*|mrope|cache|swa)|qk_norm.*|"
    r"qk_layernorm|ep_size|pretraining_tp|use_parallel_residual|parallel_attn|swiglu_.*|"
    r"no_rope_layers|no_rope_layer_interval|max_sequence_length|max_model_len|seq_length|"
    r"layer_?norm_.*|norm_.*|attention_value_scale|attn_temperature_.*|floor_scale|"
    r"use_bidirectional_attention|auto_map|architectures|transformers_version|problem_type|"
    r"id2label|label2id|chat_template|base_model_.*|.*_path|gradient_checkpointing.*|"
    r"mlp_bias|head_bias|use_sliding_window|resid_.*|model_max_length|unsloth_.*|"
    r"attention_moe|.*_version|position_embedding_type|use_attn_mask"
)
_REASONS = {
    "kv_lora_rank": "latent attention (MLA)",
    "q_lora_rank": "latent attention (MLA)",
    "index_topk": "sparse attention",
    "compress_ratios": "sparse attention",
    "attention_chunk_size": "chunked local attention",
    "hybrid_override_pattern": "Mamba layers",
    "hybrid_layer_pattern": "layers of different heads",
    "block_configs": "layers of different sizes",
    "full_attention_interval": "linear attention",
    "linear_num_key_heads": "linear attention",
    "attn_output_gate": "a gate on attention's output",
}


def check_keys(text: Mapping[str, Any], label: str) -> str:
    """Checks the decoder's part of a config, and returns its `model_type`.

    Raises:
        ValueError: a key that may change the work is not understood, or the family of
            models is not known; names the key.
    """
    unknown = [key for key, value in text.items() if _may_matter(str(key), value)]
    # The key that says most comes first.
    for key in sorted(unknown, key=lambda key: (key not in _REASONS, key)):
        what = _REASONS.get(key)
        reason = f" (not modelled: {what})" if what else ""
        raise ValueError(f"{label}: config key {key!r} is not understood{reason}")
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in KNOWN_TYPES:
        raise ValueError(
            f"{label}: config key 'model_type' is {kind!r}, a kind of model that is not modelled"
        )
    return kind


def _may_matter(key: str, value: Any) -> bool:
    if key in _READ or value is None or value is False or value in (0, "", [], {}):
        return False
    return bool(_SUSPICIOUS.search(key)) and not _HARMLESS.fullmatch(key)
