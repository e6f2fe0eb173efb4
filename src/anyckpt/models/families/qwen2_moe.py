"""Qwen1.5-MoE and Qwen2-57B-A14B: biases of query, key and value, experts, and a gated expert for every token.

Checked by equal logits in Megatron-Core 0.16 with tensor parallel sizes 1 and 2; NeMo and Megatron-Bridge 0.3.1 have
no such models.
"""

from __future__ import annotations

from anyckpt.config.fields import Field, share_of_a_head
from anyckpt.config.spellings import HuggingFace, TrtLlm
from anyckpt.models.families import qwen3_moe
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family

FAMILY = Family(
    name="qwen2-moe",
    title="Qwen2 with experts",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        sparse.BIAS_OF_QUERY_KEY_VALUE,
        *sparse.DENSE,
        *sparse.experts(),
        *sparse.GATED_SHARED,
        *sparse.TRAILING,
    ),
    traits={
        **decoder.TRAITS,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_gate": True,
    },
    features=frozenset({"num_moe_experts", "num_experts"}),
    recognise=lambda config: config.num_moe_experts is not None,
    hugging_face=HuggingFace(
        model_types=("qwen2_moe",),
        architectures=("Qwen2MoeForCausalLM",),
        fields=(
            *llama_fields_without("kv_channels"),
            *sparse.fields("num_experts"),
            Field("moe_ffn_hidden_size", "moe_intermediate_size"),
            Field("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
        ),
        constants={"qkv_bias": True},
        expected={**qwen3_moe.EXPECTED, "qkv_bias": True},
        codecs=(*qwen3_moe.CODECS, Field("kv_channels", "head_dim", default=share_of_a_head, terse=True)),
        keys=frozenset({"layer_types", "max_window_layers"}),
        variants=sparse.STACKED,
    ),
    trtllm=TrtLlm(
        ("Qwen2MoeForCausalLM", "QWenForCausalLM"),
        "qwen",
        activation="swiglu",
        fits=lambda config: config.get("qwen_type") == "qwen2_moe",
        normalises=False,
        told=qwen3_moe.in_every_layer,
        keys=lambda config: {
            "qwen_type": "qwen2_moe",
            "attn_bias": True,
            "mlp_bias": False,
            "moe_intermediate_size": config.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        },
    ),
)  # fmt: skip
