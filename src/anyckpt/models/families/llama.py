"""Llama 2, 3, 3.1, 3.2, Code Llama, and what shares their map (homogeneous Llama-Nemotron, SmolLM, Yi, ...).

The map and the configuration fields were checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge
0.3.1: equal logits both ways, tied and untied, with plain and with llama3-scaled rope.
"""

from __future__ import annotations

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
        fields=(
            *COMMON,
            Field("layernorm_epsilon", "rms_norm_eps", "number"),
            Field("add_bias_linear", "mlp_bias", "flag", False),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.llama",
        model="LlamaModel",
        configs=(
            "LlamaConfig",
            "Llama2Config*",
            "Llama3Config*",
            "Llama31Config*",
            "Llama32Config*",
            "CodeLlamaConfig*",
            "Llama31NemotronNano8BConfig",
            "Llama31Nemotron70BConfig",
        ),
        choose=_nemo2_class,
    ),
    meta=LLAMA,
)
