"""OLMoE: experts in every layer, and norms of the queries and the keys of all heads together.

Names are those of Megatron-Bridge 0.6, whose ``olmoe_layer_spec`` has these norms; outputs were checked against
transformers 5.24.
"""

from __future__ import annotations

from anyckpt.config.codecs import Implied, negated, same_as
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

FAMILY = Family(
    name="olmoe",
    title="OLMoE",
    rules=(
        *sparse.LEADING, *sparse.ATTENTION, *decoder.WIDE_QUERY_KEY_NORMS, *sparse.experts(), *sparse.TRAILING,
    ),
    ignorable=decoder.IGNORABLE,
    traits={
        **decoder.TRAITS,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_intermediate_size": None,
        "moe_layer_freq": None,
    },
    features=frozenset({"num_moe_experts", "num_experts"}),
    recognise=lambda config: False,  # nothing but its name, or its tensors, tells it from Qwen3
    caveats=caveats.own_layers("megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec"),
    megatron_keys=lambda config: {
        caveats.LAYER_SPEC: "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec"
    },
    nemo1=False,
    like="qwen3-moe",
    hugging_face=HuggingFace(
        model_types=("olmoe",),
        architectures=("OlmoeForCausalLM",),
        fields=(*LLAMA_FIELDS, *sparse.fields("num_experts", "num_local_experts")),
        codecs=(
            negated("moe_router_pre_softmax", "norm_topk_prob", False),
            Implied({"moe_ffn_hidden_size": same_as("ffn_hidden_size")}),
        ),
        variants=sparse.STACKED,
    ),
)  # fmt: skip
