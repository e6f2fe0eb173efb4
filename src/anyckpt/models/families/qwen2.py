"""Qwen2 and Qwen2.5: Llama's map with biases on query, key and value.

The map was checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge 0.3.1.  Windows, which no
release has switched on, are in the layers from ``max_window_layers`` on unless ``layer_types`` says otherwise.
"""

from __future__ import annotations

from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.config.windows import From, LayerWindow
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

WINDOW = LayerWindow(From("max_window_layers", 28, switch="use_sliding_window"))

FAMILY = Family(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "add_qkv_bias": True},
    hugging_face=HuggingFace(
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM",),
        text_parts={
            "qwen2_vl_text": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
            "qwen2_5_vl_text": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
            "qwen2_5_omni_text": {"rope_theta": 1e6},
        },
        registered=DECODER,
        fields=LLAMA_FIELDS,
        attention_bias=None,
        codecs=(WINDOW,),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.qwen2",
        model="Qwen2Model",
        configs=("Qwen2Config*", "Qwen25Config*"),
    ),
    trtllm=TrtLlm(
        ("Qwen2ForCausalLM", "QWenForCausalLM"),
        "qwen",
        fits=lambda config: config.get("qwen_type", "qwen2") == "qwen2",
        keys=lambda config: {"qwen_type": "qwen2", "attn_bias": True, "mlp_bias": False},
    ),
)  # fmt: skip
