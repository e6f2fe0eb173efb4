"""GLM-4.5, 4.6 and 4.7: plain attention that rotates half of a head, experts and their router as DeepSeek-V3's.

Names are those of Megatron-Bridge 0.6; outputs were checked against transformers 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import deepseek_v3
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import has

_LAYERS = (
    *sparse.ATTENTION,
    replace(sparse.BIAS_OF_QUERY_KEY_VALUE, when=has("add_qkv_bias")),
    *(replace(rule, when=has("qk_layernorm")) for rule in decoder.QUERY_KEY_NORMS),
    *deepseek_v3.OF_EXPERTS,
)
_TRAITS = {trait: value for trait, value in decoder.TRAITS.items() if trait not in ("add_qkv_bias", "qk_layernorm")}

FAMILY = Family(
    name="glm4-moe",
    title="GLM-4.5, 4.6, 4.7",
    rules=(*sparse.LEADING, *_LAYERS, *sparse.TRAILING, *deepseek_v3.multi_token(_LAYERS)),
    ignorable=(*decoder.IGNORABLE, *deepseek_v3.COPIED),
    traits={
        **_TRAITS,
        "add_bias_linear": False,
        "moe_router_score_function": "sigmoid",
        "moe_shared_expert_gate": False,
    },
    features=frozenset({"num_moe_experts", "num_experts", "mtp_num_layers"}),
    recognise=lambda config: config.num_moe_experts is not None,
    caveats=caveats.best_of_each_group(2),
    nemo1=False,
    dimensions=deepseek_v3.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("glm4_moe",),
        architectures=("Glm4MoeForCausalLM",),
        text_parts={"glm4v_moe_text": {"attention_bias": True}},
        fields=(
            *LLAMA_FIELDS,
            Field("add_qkv_bias", "attention_bias", "flag", False),
            Field("qk_layernorm", "use_qk_norm", "flag", False),
            *deepseek_v3.ROUTED,
        ),
        constants={"norm_topk_prob": True},
        expected={"norm_topk_prob": True},
        rotary_percent=0.5,
        attention_bias=None,
        codecs=(deepseek_v3.Layers("GLM"), deepseek_v3.SIGMOID, *deepseek_v3.MULTI_TOKEN),
        variants=sparse.STACKED,
    ),
)
