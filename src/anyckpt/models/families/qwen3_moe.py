"""Qwen3 30B-A3B, 235B-A22B and their kin: attention with normalised queries and keys, experts in most layers.

The map and the fields were checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Written, negated, same_as
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

EXPECTED = {"use_sliding_window": False}
"""Qwen's models with experts are not released with a window."""

CODECS = (
    negated("moe_router_pre_softmax", "norm_topk_prob", False),
    sparse.SteppedLayers(),
    Written(EXPECTED),
)


def in_every_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """What TensorRT-LLM's ``config.json`` tells of experts: every layer has them, and whether shares sum to 1."""
    moe = config.get("moe")
    mode = moe.get("normalization_mode") if isinstance(moe, Mapping) else config.get("moe_normalization_mode")
    return {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": mode == 1}


FAMILY = Family(
    name="qwen3-moe",
    title="Qwen3 with experts",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        *decoder.QUERY_KEY_NORMS,
        *sparse.DENSE,
        *sparse.experts(),
        *sparse.TRAILING,
    ),
    traits={
        **decoder.TRAITS,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_intermediate_size": None,
    },
    features=frozenset({"num_moe_experts", "num_experts"}),
    recognise=lambda config: config.num_moe_experts is not None,
    hugging_face=HuggingFace(
        model_types=("qwen3_moe",),
        architectures=("Qwen3MoeForCausalLM",),
        text_parts={
            "qwen3_vl_moe_text": {"norm_topk_prob": True, "rope_theta": 5e5},
            "qwen3_omni_moe_text": {"norm_topk_prob": True, "rope_theta": 1e6},
        },
        fields=(
            *LLAMA_FIELDS,
            *sparse.fields("num_experts", "num_local_experts"),
            Field("moe_ffn_hidden_size", "moe_intermediate_size"),
        ),
        expected=EXPECTED,
        codecs=(*CODECS, Written({"num_local_experts": same_as("num_moe_experts")})),  # as 4.x and as 5.x names it
        variants=(*sparse.STACKED, *sparse.READ_TRANSPOSED),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.qwen3",
        model="Qwen3Model",
        configs=("Qwen3MoEConfig", "Qwen3Config*_A*B"),
    ),
    trtllm=TrtLlm(
        ("Qwen3MoeForCausalLM", "QWenForCausalLM"),
        "qwen",
        activation="swiglu",
        fits=lambda config: config.get("qwen_type") == "qwen3_moe",
        normalises=False,
        told=in_every_layer,
        keys=lambda config: {
            "qwen_type": "qwen3_moe",
            "attn_bias": False,
            "mlp_bias": False,
            "qk_layernorm": True,
            "moe_intermediate_size": config.moe_ffn_hidden_size,
        },
    ),
)  # fmt: skip
