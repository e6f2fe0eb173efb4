"""Nemotron-3 and -4 (8B, 15B, 22B, 340B, Minitron): LayerNorm that stores gamma - 1, squared ReLU, half of rope.

transformers' ``LayerNorm1P`` and Megatron store gamma - 1 alike.  The map was checked against transformers 5.23,
Megatron-Core 0.16 and Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import BIAS_OF_ALL
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

FAMILY = Family(
    name="nemotron",
    title="Nemotron-3, Nemotron-4, Minitron",
    rules=(*decoder.WITHOUT_MLP, *decoder.NORM_BIASES, *decoder.plain_mlp("up_proj", "down_proj")),
    ignorable=decoder.IGNORABLE,
    traits={
        **decoder.ROTARY_TRAITS,
        "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu",
        "parallel_residual": False,
    },
    hugging_face=HuggingFace(
        model_types=("nemotron",),
        architectures=("NemotronForCausalLM",),
        registered=DECODER,
        fields=(
            *COMMON,
            Field("layernorm_epsilon", "norm_eps", "number"),
            BIAS_OF_ALL,
        ),
        rotary_percent=0.5,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.nemotron",
        model="NemotronModel",
        configs=("NemotronConfig", "Nemotron3Config*", "Nemotron4Config*"),
    ),
    trtllm=TrtLlm(
        ("NemotronForCausalLM", "GPTForCausalLM"),
        "gpt",
        fits=lambda config: config.get("hidden_act") in ("relu2", "squared-relu", "squared_relu"),
    ),
)
