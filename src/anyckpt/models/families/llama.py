"""Llama 2, 3, 3.1, 3.2, Code Llama, and what shares their map (homogeneous Llama-Nemotron, SmolLM, Yi, ...).

The map and the configuration fields were checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge
0.3.1: equal logits both ways, tied and untied, with plain and with llama3-scaled rope.
"""

from __future__ import annotations

from typing import Any

from anyckpt.config.hugging_face import COMMON
from anyckpt.config.meta_names import LLAMA
from anyckpt.config.model import Field, ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule

_LAYER = "model.layers.*"
_HUB = "decoder.layers.*"
_ATTENTION = f"{_LAYER}.self_attn"


def biased(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether all linear layers have biases."""
    return config.add_bias_linear


def _biased_qkv(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.add_bias_linear or config.add_qkv_bias


def untied(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether there is an output layer of its own."""
    return not config.share_embeddings_and_output_weights


RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
    Rule((f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
         f"{_HUB}.self_attention.linear_qkv.weight", ("qkv", "hidden"), INTERLEAVED_QKV),
    Rule((f"{_ATTENTION}.q_proj.bias", f"{_ATTENTION}.k_proj.bias", f"{_ATTENTION}.v_proj.bias"),
         f"{_HUB}.self_attention.linear_qkv.bias", ("qkv",), INTERLEAVED_QKV, _biased_qkv),
    Rule((f"{_ATTENTION}.o_proj.weight",), f"{_HUB}.self_attention.linear_proj.weight", ("hidden", "attention")),
    Rule((f"{_ATTENTION}.o_proj.bias",), f"{_HUB}.self_attention.linear_proj.bias", ("hidden",), when=biased),
    Rule((f"{_LAYER}.post_attention_layernorm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule((f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"), f"{_HUB}.mlp.linear_fc1.weight",
         ("fc1", "hidden"), GATE_UP),
    Rule((f"{_LAYER}.mlp.gate_proj.bias", f"{_LAYER}.mlp.up_proj.bias"), f"{_HUB}.mlp.linear_fc1.bias", ("fc1",),
         GATE_UP, biased),
    Rule((f"{_LAYER}.mlp.down_proj.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule((f"{_LAYER}.mlp.down_proj.bias",), f"{_HUB}.mlp.linear_fc2.bias", ("hidden",), when=biased),
    Rule(("model.norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=untied),
)  # fmt: skip

IGNORABLE = (
    ("model.layers.*.self_attn.rotary_emb.inv_freq", "rope frequencies, which follow from the configuration"),
    ("model.rotary_emb.inv_freq", "rope frequencies, which follow from the configuration"),
)

TRAITS = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "activation": "silu",
    "gated_linear_unit": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
}

_LLAMA_3 = {
    "num_query_groups": 8,
    "init_method_std": 0.01,
    "rotary_base": 500_000,
    "seq_length": 8192,
}
_LLAMA_31 = {
    **_LLAMA_3,
    "init_method_std": 0.02,
    "seq_length": 131_072,
    "scale_factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "old_context_len": 8192,
}
_LLAMA_32 = {**_LLAMA_31, "scale_factor": 32, "share_embeddings_and_output_weights": True}
_CODE = {"rotary_base": 1_000_000, "seq_length": 16_384}


def size(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, int]:
    """What a NeMo 2 class of one model size fixes."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
    }


NEMO2_CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Llama2Config7B": size(32, 4096, 11008, 32, 32),
    "Llama2Config13B": size(40, 5120, 13824, 40, 40),
    "Llama2Config70B": size(80, 8192, 28672, 64, 8),
    "Llama3Config": {**_LLAMA_3, "rotary_base": 10_000, "seq_length": 4096},
    "Llama3Config8B": {**_LLAMA_3, **size(32, 4096, 14336, 32, 8)},
    "Llama3Config70B": {**_LLAMA_3, **size(80, 8192, 28672, 64, 8), "init_method_std": 0.008944},
    "Llama31Config": {**_LLAMA_31, "rotary_base": 10_000, "seq_length": 4096},
    "Llama31Config8B": {**_LLAMA_31, **size(32, 4096, 14336, 32, 8)},
    "Llama31Config70B": {**_LLAMA_31, **size(80, 8192, 28672, 64, 8)},
    "Llama31Config405B": {**_LLAMA_31, **size(126, 16384, 53248, 128, 8)},
    "Llama32Config1B": {**_LLAMA_32, **size(16, 2048, 8192, 32, 8), "seq_length": 4096},
    "Llama32Config3B": {**_LLAMA_32, **size(28, 3072, 8192, 24, 8), "seq_length": 4096},
    "CodeLlamaConfig7B": {**_CODE, **size(32, 4096, 11008, 32, 32)},
    "CodeLlamaConfig13B": {**_CODE, **size(40, 5120, 13824, 40, 40)},
    "CodeLlamaConfig34B": {**_CODE, **size(48, 8192, 22016, 64, 8)},
    "CodeLlamaConfig70B": size(80, 8192, 28672, 64, 8),
    "Llama31NemotronNano8BConfig": {**_LLAMA_31, **size(32, 4096, 14336, 32, 8)},
    "Llama31Nemotron70BConfig": {**_LLAMA_31, **size(80, 8192, 28672, 64, 8)},
}  # fmt: skip
"""NeMo 2.5's classes with the defaults by which they differ from ``LlamaConfig``; the last two are Llama-Nemotron's."""


def _nemo2_class(config: ModelConfig) -> str:
    scaled = config.rope_scaling is not None and config.rope_scaling.get("rope_type") == "llama3"
    return "Llama31Config" if scaled else "LlamaConfig"


FAMILY = Family(
    name="llama",
    title="Llama 2, 3, 3.1, 3.2, Code Llama",
    rules=RULES,
    ignorable=IGNORABLE,
    traits=TRAITS,
    recognise=lambda config: config.window_size is None,
    hugging_face=HuggingFace(
        model_types=("llama",),
        architectures=("LlamaForCausalLM",),
        registered=DECODER,
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fields=(
            *COMMON,
            Field("layernorm_epsilon", "rms_norm_eps", "number"),
            Field("add_bias_linear", "mlp_bias", "flag", False),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.llama",
        model="LlamaModel",
        configs=NEMO2_CONFIGS,
        choose=_nemo2_class,
    ),
    meta=LLAMA,
)
