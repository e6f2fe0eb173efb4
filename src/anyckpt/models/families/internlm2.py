"""InternLM 2 and 2.5: Llama's model, with query, key and value rows stored as Megatron-Core stores them.

Names and keys are those of ``modeling_internlm2.py`` and ``configuration_internlm2.py`` of internlm/internlm2_5-7b,
which takes ``wqkv`` apart as "b q (h gs d) -> b q h gs d": by query group, its queries, its key, its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.apart import RemoteCode
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import IDENTITY

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"
_MODEL = "modeling_internlm2.InternLM2"
_CLASSES = {
    "AutoConfig": "configuration_internlm2.InternLM2Config", "AutoModel": f"{_MODEL}Model",
    "AutoModelForCausalLM": f"{_MODEL}ForCausalLM",
}  # fmt: skip
_STORED = {
    "embedding.word_embeddings.weight": ("model.tok_embeddings.weight",),
    f"{_HUB}.self_attention.linear_qkv.layer_norm_weight": (f"{_LAYER}.attention_norm.weight",),
    f"{_HUB}.self_attention.linear_qkv.weight": (f"{_LAYER}.attention.wqkv.weight",),
    f"{_HUB}.self_attention.linear_proj.weight": (f"{_LAYER}.attention.wo.weight",),
    f"{_HUB}.mlp.linear_fc1.layer_norm_weight": (f"{_LAYER}.ffn_norm.weight",),
    f"{_HUB}.mlp.linear_fc1.weight": (f"{_LAYER}.feed_forward.w1.weight", f"{_LAYER}.feed_forward.w3.weight"),
    f"{_HUB}.mlp.linear_fc2.weight": (f"{_LAYER}.feed_forward.w2.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("output.weight",),
}
_UNBIASED = {"bias": False}


class _Scaling(Codec):
    """``rope_scaling`` as the models' own code takes it: ``type`` and ``factor``, and no other key."""

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        scaling = config.rope_scaling
        if scaling is None:
            return {}
        if scaling.get("rope_type") in ("linear", "dynamic"):
            return {"rope_scaling": {"type": scaling["rope_type"], "factor": scaling["factor"]}}
        notes.append("InternLM 2's own code has no such rope_scaling: write the model as Llama (--family llama)")
        return {}


FAMILY = Family(
    name="internlm2",
    title="InternLM 2, 2.5",
    rules=tuple(
        replace(rule, source=_STORED[rule.hub], operation=IDENTITY if "qkv" in rule.hub else rule.operation)
        for rule in decoder.RULES
        if rule.hub in _STORED
    ),
    ignorable=(("model.layers.*.attention.rotary_emb.inv_freq", decoder.FREQUENCIES),),
    traits={**decoder.TRAITS, "add_bias_linear": False},
    recognise=lambda config: False,  # nothing but its name tells it from Llama
    nemo1=False,
    hugging_face=HuggingFace(
        model_types=("internlm2",),
        architectures=("InternLM2ForCausalLM",),
        defaults={
            "vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        },
        fields=llama_fields_without("kv_channels", "attention_dropout"),
        constants=_UNBIASED,
        expected=_UNBIASED,
        attention_bias=None,
        codecs=(_Scaling(), RemoteCode("internlm/internlm2_5-7b", _CLASSES)),
    ),
)  # fmt: skip
