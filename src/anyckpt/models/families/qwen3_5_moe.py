"""Qwen3.5 and 3.6 with experts, text: in every layer, with a gated one for every token.

Checked by equal outputs in transformers 5.24 on the way through Megatron's names, which are Megatron-Bridge 0.6.2's.
"""

from __future__ import annotations

from anyckpt.config.codecs import Implied, same_as
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import qwen3_5
from anyckpt.models.families.parts import delta
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family

_EXPERTS = (*sparse.experts(), *sparse.GATED_SHARED)

FAMILY = Family(
    name="qwen3.5-moe",
    title="Qwen3.5, Qwen3.6 with experts (text)",
    rules=(
        *sparse.LEADING, *delta.ATTENTION, *qwen3_5.NETS, *_EXPERTS, *delta.further(_EXPERTS), *sparse.TRAILING,
    ),
    traits={
        **delta.TRAITS,
        "moe_layer_freq": None,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_gate": True,
    },
    features=delta.FEATURES | {"num_moe_experts", "num_experts"},
    recognise=lambda config: config.linear_attention_freq is not None and config.num_moe_experts is not None,
    nemo1=False,
    refine=delta.refine,
    dimensions=delta.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("qwen3_5_moe_text",),
        architectures=("Qwen3_5MoeForCausalLM",),
        fields=(
            *llama_fields_without("ffn_hidden_size"),
            *sparse.fields("num_experts"),
            Field("moe_ffn_hidden_size", "moe_intermediate_size"),
            Field("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
            *delta.FIELDS,
        ),
        rotary_percent=0.25,
        codecs=(delta.NetLayers(), Implied({"ffn_hidden_size": same_as("moe_ffn_hidden_size")})),
        keys=delta.KEYS,
        variants=(*sparse.STACKED, *delta.further_variants(sparse.STACKED)),
    ),
)  # fmt: skip
