"""Mistral 7B, NeMo 12B, Large and Ministral: Llama's map, a head width of its own, and a sliding window in some.

transformers' ``sliding_window`` counts the token itself, Megatron's window does not: left is one less.  NeMo's and
Bridge 0.3.1's importers write them equal, which is off by one (logits differ as soon as the window is full).  Where
some layers alone have the window, transformers' class is Ministral's.
"""

from __future__ import annotations

from anyckpt.config.meta_names import LLAMA, MetaNames
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.config.windows import Layers, LayerWindow
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

_SOME_LAYERS = "ministral"


FAMILY = Family(
    name="mistral",
    title="Mistral, Ministral",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False},
    recognise=lambda config: config.window_size is not None,
    hugging_face=HuggingFace(
        model_types=("mistral", _SOME_LAYERS),
        architectures=("MistralForCausalLM", "MinistralForCausalLM"),
        registered=DECODER,
        fields=LLAMA_FIELDS,
        codecs=(LayerWindow(Layers(), within=(_SOME_LAYERS, "MinistralForCausalLM")),),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.mistral",
        model="MistralModel",
        configs=("MistralConfig7B", "MistralNeMo*"),
    ),
    meta=MetaNames(LLAMA.pairs, params=("sliding_window", "hidden_dim")),
    trtllm=TrtLlm(("MistralForCausalLM",), "llama"),
)
