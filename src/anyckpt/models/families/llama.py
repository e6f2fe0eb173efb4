"""Llama 2, 3, 3.1, 3.2, Code Llama, and what shares their map (homogeneous Llama-Nemotron, SmolLM, Yi, ...).

The map and the configuration fields were checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge
0.3.1: equal logits both ways, tied and untied, with plain and with llama3-scaled rope.
"""

from __future__ import annotations

from anyckpt.config.meta_names import LLAMA
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import BIAS_OF_ALL, LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER


def _nemo2_class(config: ModelConfig) -> str:
    scaled = config.rope_scaling is not None and config.rope_scaling.get("rope_type") == "llama3"
    return "Llama31Config" if scaled else "LlamaConfig"


FAMILY = Family(
    name="llama",
    title="Llama 2, 3, 3.1, 3.2, Code Llama",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits=decoder.TRAITS,
    recognise=lambda config: config.window_size is None,
    hugging_face=HuggingFace(
        model_types=("llama",),
        architectures=("LlamaForCausalLM",),
        registered=DECODER,
        fields=(*LLAMA_FIELDS, BIAS_OF_ALL),
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
    trtllm=TrtLlm(
        ("LlamaForCausalLM", "GPTForCausalLM"),
        "llama",
        fits=lambda config: config["architecture"] == "LlamaForCausalLM" or config.get("hidden_act") == "swiglu",
    ),
)
