"""Qwen3.5 and 3.6 with experts, text: in every layer, with a gated one for every token.

Checked by equal outputs in transformers 5.24 on the way through Megatron's names, which are Megatron-Bridge 0.6.2's.
"""

from __future__ import annotations

from anyckpt.config.codecs import Implied, same_as
from anyckpt.models.families import qwen3_5
from anyckpt.models.families.parts import delta
from anyckpt.models.families.parts import experts as sparse

FAMILY = delta.family(
    "qwen3.5-moe",
    "Qwen3.5, Qwen3.6 with experts (text)",
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    nets=qwen3_5.NETS,
    mlp=(*sparse.experts(), *sparse.GATED_SHARED),
    traits={
        "moe_layer_freq": None,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_gate": True,
    },
    codecs=(Implied({"ffn_hidden_size": same_as("moe_ffn_hidden_size")}),),
    has_width=False,
)
