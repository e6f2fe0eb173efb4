"""The architectures of llama.cpp that are read and written: their tensors' names beside Hugging Face's.

Names are those of the table of the package ``gguf`` (``tensor_mapping``); what happens to numbers on the way is what
llama.cpp's own converter does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Outside of layers: the same in all of them."""

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_NORMS_OF_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ONE_NORM = {"ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's, or one of two models that it runs as one.

    Attributes:
        name: ``general.architecture``.
        model_type: Hugging Face's.
        model_class: its class there.
        layer: what a layer's tensors are called in the file, without ``.weight`` or ``.bias`` -> at the hub.
        experts: the same of those that hold all experts one after another; a hub name for each, with its number.
        interleaved: rows of queries and keys are in the order in which ggml turns neighbours, not halves.
        tied: the output layer is the embedding in any case.
        unit_norms: norms' weights are stored with the one added that the hub leaves out.
        expert_count: what the hub's configuration calls the number of experts; "" if there are none.
        pairs_of_experts: the hub has gate and up of all experts in one tensor, row by row, and inputs in rows.
        window_every: one in so many layers looks back without limit, the others over a window; 0 if all are alike.
        fixed: keys of the hub's configuration that llama.cpp takes to have one value, which the file does not say.
        aliases: other model types of the hub that are written as this one.
    """

    name: str
    model_type: str
    model_class: str
    layer: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    tied: bool = False
    unit_norms: bool = False
    expert_count: str = ""
    pairs_of_experts: bool = False
    window_every: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}

ARCHITECTURES = (
    Architecture(
        "llama",
        "llama",
        "LlamaForCausalLM",
        {**_ATTENTION, **_ONE_NORM, **_MLP},
        interleaved=True,
        fixed=_SILU,
        aliases=("mistral",),
    ),
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        {**_ATTENTION, **_ONE_NORM, "ffn_gate_inp": "block_sparse_moe.gate"},
        {
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        },
        interleaved=True,
        expert_count="num_local_experts",
        fixed=_SILU,
    ),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", {**_ATTENTION, **_ONE_NORM, **_MLP}, fixed=_SILU),
    Architecture(
        "qwen3", "qwen3", "Qwen3ForCausalLM", {**_ATTENTION, **_NORMS_OF_HEADS, **_ONE_NORM, **_MLP}, fixed=_SILU
    ),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_ATTENTION, **_ONE_NORM, **_ROUTER, **_SHARED},
        _EXPERTS,
        expert_count="num_experts",
        fixed={**_SILU, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_NORMS_OF_HEADS, **_ONE_NORM, **_ROUTER},
        _EXPERTS,
        expert_count="num_experts",
        fixed={**_SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Architecture(
        "gemma",
        "gemma",
        "GemmaForCausalLM",
        {**_ATTENTION, **_ONE_NORM, **_MLP},
        tied=True,
        unit_norms=True,
        fixed=_GELU,
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        {**_ATTENTION, **_FOUR_NORMS, **_MLP},
        tied=True,
        unit_norms=True,
        window_every=2,
        fixed=_GELU,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_ATTENTION, **_NORMS_OF_HEADS, **_FOUR_NORMS, **_MLP},
        unit_norms=True,
        window_every=6,
        fixed=_GELU,
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        {name: f"mlp.experts.{own}_proj" for name, own in zip(_EXPERTS, ("gate", "up", "down"), strict=True)},
        expert_count="num_local_experts",
        pairs_of_experts=True,
        window_every=2,
        fixed={**_SILU, "attention_bias": True, "swiglu_limit": 7.0},
    ),
)

OF_MODEL_TYPE = {model_type: known for known in ARCHITECTURES for model_type in (known.model_type, *known.aliases)}


def architecture_of(name: str, *, experts: bool) -> Architecture | None:
    """The architecture of a file, by its name and whether it has experts; None if it is not known here."""
    return next((known for known in ARCHITECTURES if known.name == name and bool(known.experts) == experts), None)
