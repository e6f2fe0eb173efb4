"""Cohere 2 (Command A, R7B): one LayerNorm before attention and MLP, which run side by side, and scaled logits.

Neighbouring channels are rotated together in layers with a window, and none in the others.  Checked against
transformers 5.24.  Neither Megatron-Core nor Megatron-Bridge has such layers, so that the family goes to containers
alone; ``logit_scale`` stays in its ``config.json`` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Implied
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import AllBut, LayerWindow, windowed
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family


def _without_rope(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    layers = windowed(fields["window_size"], fields["window_attn_skip_freq"], fields["num_layers"])
    return None if all(layers) else tuple(int(not layer) for layer in layers)


FAMILY = Family(
    name="cohere2",
    title="Cohere 2 (Command A, R7B)",
    rules=tuple(
        rule for rule in decoder.RULES if not rule.hub.endswith((".bias", ".mlp.linear_fc1.layer_norm_weight"))
    ),
    ignorable=decoder.IGNORABLE,
    traits={
        **decoder.TRAITS,
        "normalization": "LayerNorm",
        "add_bias_linear": False,
        "rotary_interleaved": True,
        "parallel_residual": True,
        "shared_layernorm": True,
    },
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    hugging_face=HuggingFace(
        model_types=("cohere2",),
        architectures=("Cohere2ForCausalLM",),
        fields=(
            *llama_fields_without("layernorm_epsilon"),
            Field("layernorm_epsilon", "layer_norm_eps", "number"),
        ),
        codecs=(
            LayerWindow(AllBut(4, ("sliding_window_pattern", "_sliding_window_pattern"))),
            Implied({"no_rope_freq": _without_rope}, "Cohere 2 rotates in layers with a window alone"),
        ),
        expected={"use_qk_norm": False, "use_parallel_block": True, "use_gated_activation": True},
        carried=frozenset({"logit_scale"}),
    ),
)
