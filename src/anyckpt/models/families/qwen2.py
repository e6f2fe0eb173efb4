"""Qwen2 and Qwen2.5: Llama's map with biases on query, key and value.

The map was checked against transformers 5.23, Megatron-Core 0.16 and Megatron-Bridge 0.3.1.  Windows, which no
release has switched on, are in the layers from ``max_window_layers`` on unless ``layer_types`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import Field, ModelConfig, Reader
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.config.windows import read_window, windowed_layers, write_window
from anyckpt.models.families.parts import decoder
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

KEYS = frozenset({"use_sliding_window", "sliding_window", "layer_types"})


def read(reader: Reader, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Window and the layers that have it."""
    length = reader.integer("sliding_window") if "sliding_window" in reader.values else 4096
    first = reader.integer("max_window_layers")
    first = 28 if first is None else first
    usual = [layer >= first for layer in range(min(found["num_layers"], 10_000))]
    return read_window(reader, length if reader.flag("use_sliding_window") else None, usual)


def write(config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
    """The keys of ``read``."""
    layers = windowed_layers(config)
    rendered = {"use_sliding_window": any(layers), **write_window(config, notes)}
    if any(layers):
        rendered["max_window_layers"] = layers.index(True)
    return rendered


FAMILY = Family(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "add_qkv_bias": True},
    hugging_face=HuggingFace(
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM",),
        registered=DECODER,
        fields=(*COMMON, Field("layernorm_epsilon", "rms_norm_eps", "number")),
        attention_bias=None,
        read=read,
        write=write,
        keys=KEYS,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.qwen2",
        model="Qwen2Model",
        configs=("Qwen2Config*", "Qwen25Config*"),
        choose=lambda config: "Qwen2Config",
    ),
    trtllm=TrtLlm(
        ("Qwen2ForCausalLM", "QWenForCausalLM"),
        "qwen",
        fits=lambda config: config.get("qwen_type", "qwen2") == "qwen2",
        keys=lambda config: {"qwen_type": "qwen2", "attn_bias": True, "mlp_bias": False},
    ),
)  # fmt: skip
