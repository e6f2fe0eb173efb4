"""EXAONE 4: norms after attention and MLP alone, and norms of each head's queries and keys.

Where some layers have a window, the others have no rotary embedding.  Names are those of Megatron-Bridge 0.6, whose
``exaone4_layer_spec`` has such layers; outputs were checked against transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.config.codecs import Implied
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import Layers, LayerWindow, windowed
from anyckpt.models.families.parts import caveats, decoder, post_norm
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

_KEY = "sliding_window_pattern"
_SPEC = "megatron.bridge.models.exaone.exaone4.exaone4_provider.exaone4_layer_spec"


class _Pattern(Layers):
    """All layers but every n-th, or letters that repeat, L for a window."""

    keys = (_KEY,)

    def read(self, reader: Reader, layers: int) -> list[bool]:
        letters = reader.values.get(_KEY)
        if isinstance(letters, str) and letters:
            return [letters[layer % len(letters)] == "L" for layer in range(layers)]
        every = reader.integer(_KEY)
        every = 4 if every is None else every
        return [every > 0 and (layer + 1) % every != 0 for layer in range(layers)]

    def write(self, config: ModelConfig, layers: Sequence[bool]) -> Mapping[str, Any]:
        return {_KEY: "".join("GL"[layer] for layer in layers) if any(layers) else 0}


def _without_rope(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    layers = windowed(fields["window_size"], fields["window_attn_skip_freq"], fields["num_layers"])
    return tuple(int(not layer) for layer in layers) if any(layers) and not all(layers) else None


FAMILY = Family(
    name="exaone4",
    title="EXAONE 4",
    rules=(*post_norm.RULES, *decoder.QUERY_KEY_NORMS),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "qk_layernorm": True},
    features=frozenset({"no_rope_freq"}),
    recognise=lambda config: False,  # nothing but its name, or its tensors, tells it from Qwen3
    caveats=caveats.own_layers(_SPEC),
    megatron_keys=lambda config: {caveats.LAYER_SPEC: _SPEC},
    nemo1=False,
    hugging_face=HuggingFace(
        model_types=("exaone4",),
        architectures=("Exaone4ForCausalLM",),
        fields=LLAMA_FIELDS,
        codecs=(
            LayerWindow(_Pattern()),
            Implied({"no_rope_freq": _without_rope}, "EXAONE 4 rotates in layers with a window alone, or in all"),
        ),
    ),
)
