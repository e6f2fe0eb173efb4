"""Mistral 7B, NeMo 12B, Large: Llama's map, a head width of its own, and a sliding window in the first release.

transformers' ``sliding_window`` counts the token itself, Megatron's window does not: left is one less.  NeMo's and
Bridge 0.3.1's importers write them equal, which is off by one (logits differ as soon as the window is full).
"""

from __future__ import annotations

from anyckpt.models.config import Field
from anyckpt.models.config_hf import COMMON
from anyckpt.models.families import llama
from anyckpt.models.family import Family, HuggingFace, NeMo2

_SEVEN_B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "seq_length": 32768,
    "window_size": (4096, 0),
}
_LATER = {**_SEVEN_B, "kv_channels": 128, "seq_length": 4096, "window_size": None, "rotary_base": 1_000_000}
_TWELVE_B = {**_LATER, "num_layers": 40, "hidden_size": 5120}
_LARGE = {
    **_LATER,
    "num_layers": 88,
    "hidden_size": 12288,
    "ffn_hidden_size": 28672,
    "num_attention_heads": 96,
}
"""Both are called ``MistralNeMo2407Config...`` in NeMo 2.0."""

FAMILY = Family(
    name="mistral",
    title="Mistral",
    rules=llama.RULES,
    ignorable=llama.IGNORABLE,
    traits={**llama.TRAITS, "add_bias_linear": False},
    recognise=lambda config: config.window_size is not None,
    hugging_face=HuggingFace(
        model_types=("mistral",),
        architectures=("MistralForCausalLM",),
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fields=(*COMMON, Field("layernorm_epsilon", "rms_norm_eps", "number")),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.mistral",
        model="MistralModel",
        configs={
            "MistralConfig7B": _SEVEN_B,
            "MistralNeMoConfig12B": _TWELVE_B,
            "MistralNeMoConfig123B": _LARGE,
            "MistralNeMo2407Config12B": _TWELVE_B,
            "MistralNeMo2407Config123B": _LARGE,
        },
        choose=lambda config: "MistralConfig7B",
    ),
)
