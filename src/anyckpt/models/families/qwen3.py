"""Qwen3, dense: Llama's map with queries and keys normalised per head.

The map was checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

from anyckpt.config.codecs import Written, same_as
from anyckpt.config.meta_names import LAYER, LLAMA, Pair, in_halves
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.models.families import qwen2
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    rules=(*decoder.RULES, *decoder.QUERY_KEY_NORMS),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "qk_layernorm": True},
    hugging_face=HuggingFace(
        model_types=("qwen3",),
        architectures=("Qwen3ForCausalLM",),
        text_parts={"qwen3_vl_text": {"rope_theta": 5e5}},
        registered=DECODER,
        fields=LLAMA_FIELDS,
        codecs=(qwen2.WINDOW,),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.qwen3",
        model="Qwen3Model",
        configs=(
            "Qwen3Config",
            "Qwen3Config600M",
            "Qwen3Config1P7B",
            "Qwen3Config4B",
            "Qwen3Config8B",
            "Qwen3Config14B",
            "Qwen3Config32B",
        ),
        codecs=(Written({"max_position_embeddings": same_as("max_position_embeddings")}),),
    ),
    meta=in_halves(
        LLAMA,
        *(
            Pair(f"{LAYER}.self_attn.{name}.weight", f"layers.*.attention.{name}.weight")
            for name in ("q_norm", "k_norm")
        ),
        params=("qk_norm",),
    ),
    trtllm=TrtLlm(
        ("Qwen3ForCausalLM", "QWenForCausalLM"),
        "qwen",
        fits=lambda config: config["architecture"] == "Qwen3ForCausalLM" or config.get("qwen_type") == "qwen3",
        keys=lambda config: {"qwen_type": "qwen3", "attn_bias": False, "mlp_bias": False, "qk_layernorm": True},
    ),
)
