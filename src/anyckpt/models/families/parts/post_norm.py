"""A decoder whose norms are after attention and MLP alone: Llama's map without the norms before them.

Hub names are those that Megatron-Bridge 0.6 has for EXAONE 4: Gemma 2's for norms after, which stock Megatron-Core's
layers have not.
"""

from __future__ import annotations

from anyckpt.models.families.parts import decoder
from anyckpt.models.language.rules import Rule

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"

_WITHOUT = tuple(rule for rule in decoder.RULES if not rule.hub.endswith(".layer_norm_weight"))

RULES = (
    *(rule for rule in _WITHOUT if "*" in rule.hub or rule.hub.startswith("embedding.")),
    Rule((f"{_LAYER}.post_attention_layernorm.weight",), f"{_HUB}.self_attention.linear_proj.post_layernorm.weight",
         ("hidden",)),
    Rule((f"{_LAYER}.post_feedforward_layernorm.weight",), f"{_HUB}.mlp.linear_fc2.post_layernorm.weight",
         ("hidden",)),
    *(rule for rule in _WITHOUT if "*" not in rule.hub and not rule.hub.startswith("embedding.")),
)  # fmt: skip
