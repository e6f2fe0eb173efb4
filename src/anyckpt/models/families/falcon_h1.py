"""Falcon-H1: attention and a Mamba-2 mixer side by side in every layer, and multipliers of nearly everything.

Names are those of Megatron-Bridge 0.6, whose layers for it are of its own; outputs were checked against transformers
5.24.  Megatron-Core has no such layers, so that the family goes to containers alone; the multipliers stay in its
``config.json`` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Fixed
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder, mamba
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP
from anyckpt.models.language.rules import Rule, always, has

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"
_ATTENTION = tuple(
    rule
    for rule in decoder.RULES
    if ".self_attention." in rule.hub and not rule.hub.endswith((".bias", ".layer_norm_weight"))
)
_MLP = f"{_LAYER}.feed_forward"

RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.norm.weight", ("hidden",)),
    *_ATTENTION,
    *(
        Rule((f"{_LAYER}.mamba.{name}",), f"{_HUB}.mamba_mixer.{name}", shape, partition="alone",
             when=has("mamba_rms_norm") if name.startswith("norm.") else always)
        for name, shape in mamba.MIXER.items()
    ),
    Rule((f"{_LAYER}.pre_ff_layernorm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule((f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight"), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden"),
         GATE_UP),
    Rule((f"{_MLP}.down_proj.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule(("model.final_layernorm.weight",), "decoder.final_norm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


class _Heads(Codec):
    """How wide the mixer is: its heads times their width, which may be left to follow from the others."""

    hubs = ("mamba_head_dim",)
    keys = ("mamba_d_head", "mamba_d_ssm", "mamba_expand")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        if reader.values.get("mamba_d_head") not in (None, "auto"):
            return {"mamba_head_dim": reader.integer("mamba_d_head")}
        width = reader.integer("mamba_d_ssm")
        if width is None and "mamba_d_ssm" not in reader.values:
            width = defaults["mamba_d_ssm"]
        if width is None:
            width = (reader.integer("mamba_expand") or 2) * found["hidden_size"]
        return {"mamba_head_dim": width // max(1, found["mamba_num_heads"])}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        heads, width = config.mamba_num_heads or 0, config.mamba_head_dim or 0
        return {"mamba_d_head": width, "mamba_d_ssm": heads * width}


_FIXED = {
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "mlp_bias": False,
}

FAMILY = Family(
    name="falcon-h1",
    title="Falcon-H1",
    rules=RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    dimensions=mamba.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("falcon_h1",),
        architectures=("FalconH1ForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            Field("mamba_num_heads", "mamba_n_heads"),
            Field("mamba_num_groups", "mamba_n_groups"),
            Field("mamba_state_dim", "mamba_d_state"),
            Field("mamba_rms_norm", "mamba_rms_norm", "flag", False),
        ),
        codecs=(_Heads(), Fixed(_FIXED, "what is known")),
        carried=frozenset({
            "embedding_multiplier", "lm_head_multiplier", "mlp_multipliers", "key_multiplier", "ssm_multipliers",
            "attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
        }),
    ),
)  # fmt: skip
