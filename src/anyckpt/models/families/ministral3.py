"""Ministral 3: Llama's map; YaRN scales rope, and queries grow with their position.

Checked against transformers 5.24.  Megatron-Core has YaRN; what scales queries is a layer of Megatron-Bridge's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.block_keys import QUERY_SCALING
from anyckpt.config.fields import Codec
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import Window
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

_YARN = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale_all_dim": 1.0, "mscale": 1.0, QUERY_SCALING: 0.1,
}  # fmt: skip
"""What transformers' class takes where ``config.json`` says nothing of rope."""


class _Longest(Codec):
    """transformers repeats the longest sequence among the numbers of rope, which does not read it."""

    hubs = ("rope_scaling",)
    keys = ("rope_scaling", "rope_parameters")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        scaling = found["rope_scaling"]
        return {"rope_scaling": scaling and {k: v for k, v in scaling.items() if k != "max_position_embeddings"}}


FAMILY = Family(
    name="ministral3",
    title="Ministral 3",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False},
    features=frozenset({"yarn", QUERY_SCALING}),
    recognise=lambda config: (config.rope_scaling or {}).get("rope_type") == "yarn",
    caveats=caveats.of_kind(
        "megatron-args",
        "Megatron-Core does not scale queries by position (llama_4_scaling_beta), as Megatron-Bridge's layers of "
        "Ministral 3 do: beyond original_max_position_embeddings tokens the model differs",
        lambda config: bool((config.rope_scaling or {}).get(QUERY_SCALING)),
    ),
    nemo1=False,
    like="llama",
    hugging_face=HuggingFace(
        model_types=("ministral3",),
        architectures=("Ministral3ForCausalLM",),
        registered=DECODER,
        fields=LLAMA_FIELDS,
        rotary_base=1_000_000.0,
        rope_scaling=_YARN,
        codecs=(Window(), _Longest()),
    ),
)
