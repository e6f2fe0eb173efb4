"""GLM-5: DeepSeek-V3.2's map, with an indexer whose rotary embedding is interleaved.

Names are those of Megatron-Bridge 0.6.2; outputs were checked against transformers 5.24.  Layers that share the tokens
that another one's indexer chose are refused, for Megatron-Core 0.16 has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from anyckpt.config.codecs import Fixed
from anyckpt.config.model import ModelConfig
from anyckpt.models.families import deepseek_v32


def _caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    yield from deepseek_v32.FAMILY.caveats(config, kind)
    if kind == "megatron-args":
        yield (
            "Megatron-Core 0.16's indexer rotates halves, GLM-5's neighbouring channels: build the model with a "
            "release that has dsa_indexer_rope_interleaved, such as 0.19"
        )


FAMILY = replace(
    deepseek_v32.FAMILY,
    name="glm-moe-dsa",
    title="GLM-5",
    recognise=lambda config: False,  # nothing but its name tells it from DeepSeek-V3.2
    caveats=_caveats,
    megatron_keys=lambda config: {"dsa_indexer_rope_interleaved": True},
    hugging_face=replace(
        deepseek_v32.KNOWN,
        model_types=("glm_moe_dsa",),
        defaults_of="glm_moe_dsa",
        architectures=("GlmMoeDsaForCausalLM",),
        expected={**deepseek_v32.KNOWN.expected, "indexer_rope_interleave": True, "index_topk_freq": 1},
        codecs=(
            *deepseek_v32.KNOWN.codecs,
            Fixed({"indexer_types": lambda found: ["full"] * found["num_layers"]}, "what Megatron-Core's layers are"),
            Fixed({"index_topk_pattern": None}, "what Megatron-Core's layers are", written=False),
        ),
        keys=deepseek_v32.KNOWN.keys | {"index_skip_topk_offset", "indexer_rope_interleave", "index_topk_freq"},
    ),
)
