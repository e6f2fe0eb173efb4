"""Phi-3, Phi-3.5, Phi-4 (dense): Llama with one tensor for query, key and value, and one for gate and up projection.

The map was checked against transformers 5.23 and Megatron-Core 0.16.  NeMo 2's importer forgets the number of key heads
and long rope; here the first is kept, and the second is refused where Megatron cannot have it.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.config.windows import Window
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER
from anyckpt.models.language.rule_operations import CONCATENATED_QKV
from anyckpt.models.language.rules import Rule

_QKV = Rule(
    ("model.layers.*.self_attn.qkv_proj.weight",), "decoder.layers.*.self_attention.linear_qkv.weight",
    ("qkv", "hidden"), CONCATENATED_QKV,
)  # fmt: skip
_BY_NAME = {rule.hub: rule for rule in (_QKV, decoder.FUSED_GATE_UP)}

FAMILY = Family(
    name="phi3",
    title="Phi-3, Phi-3.5, Phi-4",
    rules=tuple(_BY_NAME.get(rule.hub, rule) for rule in decoder.RULES if not rule.hub.endswith(".bias")),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False},
    recognise=lambda config: False,  # Megatron's arguments do not tell it from Llama, which is the same model
    hugging_face=HuggingFace(
        model_types=("phi3",),
        architectures=("Phi3ForCausalLM",),
        codecs=(Window(),),
        registered=DECODER,
        fields=(
            *llama_fields_without("kv_channels"),
            Field("hidden_dropout", "resid_pdrop", "number", 0.0),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.phi3mini",
        model="Phi3Model",
        configs=("Phi3Config*",),
    ),
)
