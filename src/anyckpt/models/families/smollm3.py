"""SmolLM3: Llama's map, and no rotary embedding in every fourth layer.

Checked against transformers 5.24; Megatron-Core has ``no_rope_freq`` for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import BIAS_OF_ALL, LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER


class _WithoutRope(Codec):
    """Which layers rotate: a list, or all but every n-th."""

    hubs = ("no_rope_freq",)
    keys = ("no_rope_layers", "no_rope_layer_interval", "layer_types")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        listed, layers = reader.values.get("no_rope_layers"), layers_of(found["num_layers"])
        every = reader.integer("no_rope_layer_interval") or defaults["no_rope_layer_interval"]
        if listed is None:
            listed = [int((layer + 1) % every != 0) for layer in layers]
        if not isinstance(listed, list) or len(listed) < len(layers) or any(each not in (0, 1) for each in listed):
            raise MappingError(
                "config.json's no_rope_layers is not that of the model",
                expected=f"0 or 1 for each of {len(layers)} layers",
                found=repr(listed)[:80],
            )
        skipped = tuple(int(not listed[layer]) for layer in layers)
        return {"no_rope_freq": skipped if any(skipped) else None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        skipped = config.no_rope_freq or (0,) * config.num_layers
        return {"no_rope_layers": [1 - each for each in skipped], "layer_types": ["full_attention"] * config.num_layers}


FAMILY = Family(
    name="smollm3",
    title="SmolLM3",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits=decoder.TRAITS,
    features=frozenset({"no_rope_freq"}),
    recognise=lambda config: config.no_rope_freq is not None and config.num_moe_experts is None,
    nemo1=False,
    like="llama",
    hugging_face=HuggingFace(
        model_types=("smollm3",),
        architectures=("SmolLM3ForCausalLM",),
        registered=DECODER,
        fields=(*LLAMA_FIELDS, BIAS_OF_ALL),
        expected={"use_sliding_window": False},
        rotary_base=2_000_000.0,
        codecs=(_WithoutRope(),),
    ),
)
