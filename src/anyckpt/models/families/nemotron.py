"""Nemotron-3 and -4 (8B, 15B, 22B, 340B, Minitron): LayerNorm that stores gamma - 1, squared ReLU, half of rope.

transformers' ``LayerNorm1P`` and Megatron store gamma - 1 alike.  The map was checked against transformers 5.23,
Megatron-Core 0.16 and Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

from typing import Any

from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import Field
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.models.families import llama
from anyckpt.models.families.starcoder2 import NORM_BIASES, WITHOUT_MLP, plain_mlp
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

_BASE = {
    "normalization": "LayerNorm",
    "activation": "squared_relu",
    "gated_linear_unit": False,
    "rotary_percent": 0.5,
    "layernorm_zero_centered_gamma": True,
}


def _size(layers: int, hidden: int, ffn: int, heads: int, groups: int, std: float, head: int) -> dict[str, Any]:
    return {**_BASE, **llama.size(layers, hidden, ffn, heads, groups), "init_method_std": std, "kv_channels": head}


_4B = _size(32, 3072, 9216, 24, 8, 0.0134, 128)

FAMILY = Family(
    name="nemotron",
    title="Nemotron-3, Nemotron-4, Minitron",
    rules=(*WITHOUT_MLP, *NORM_BIASES, *plain_mlp("up_proj", "down_proj")),
    ignorable=llama.IGNORABLE,
    traits={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu",
        "gated_linear_unit": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "parallel_residual": False,
    },
    hugging_face=HuggingFace(
        model_types=("nemotron",),
        architectures=("NemotronForCausalLM",),
        registered=DECODER,
        defaults={
            "vocab_size": 256000,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 32,
            "num_attention_heads": 48,
            "max_position_embeddings": 4096,
            "hidden_act": "relu2",
            "initializer_range": 0.0134,
            "norm_eps": 1e-5,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        fields=(
            *COMMON,
            Field("layernorm_epsilon", "norm_eps", "number"),
            Field("add_bias_linear", "mlp_bias", "flag", False),
        ),
        rotary_percent=0.5,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.nemotron",
        model="NemotronModel",
        configs={
            "NemotronConfig": _4B,
            "Nemotron3Config4B": _4B,
            "Nemotron3Config8B": _size(32, 4096, 16384, 32, 32, 0.01, 128),
            "Nemotron3Config22B": _size(40, 6144, 24576, 48, 48, 0.008, 128),
            "Nemotron4Config15B": _size(32, 6144, 24576, 48, 8, 0.0134, 128),
            "Nemotron4Config340B": _size(96, 18432, 73728, 96, 8, 0.0063, 192),
        },
        choose=lambda config: "NemotronConfig",
    ),
)
