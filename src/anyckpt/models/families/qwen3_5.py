"""Qwen3.5 and 3.6, text: Qwen3-Next with a dense MLP, whose nets have an input projection for each kind of rows.

Checked by equal outputs in transformers 5.24 on the way through Megatron's names, which are Megatron-Bridge 0.6.2's,
and in Megatron-Core 0.16's own net.
"""

from __future__ import annotations

from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder, delta
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.delta_operations import Joined
from anyckpt.models.language.family import Family

_MLP = tuple(rule for rule in decoder.RULES if rule.hub.startswith(f"{sparse.HUB}.mlp.") and ".bias" not in rule.hub)


def _rows(config: ModelConfig) -> tuple[int, ...]:
    keys, values, heads = delta.key_rows(config), delta.value_rows(config), delta.value_heads(config)
    return 2 * keys + values, values, heads, heads


NETS = delta.nets(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), Joined(_rows))

FAMILY = Family(
    name="qwen3.5",
    title="Qwen3.5, Qwen3.6 (text)",
    rules=(*sparse.LEADING, *delta.ATTENTION, *NETS, *_MLP, *delta.further(_MLP), *sparse.TRAILING),
    traits={**delta.TRAITS, "num_moe_experts": None},
    features=delta.FEATURES,
    recognise=lambda config: config.linear_attention_freq is not None and config.num_moe_experts is None,
    nemo1=False,
    refine=delta.refine,
    dimensions=delta.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("qwen3_5_text",),
        architectures=("Qwen3_5ForCausalLM",),
        fields=(*LLAMA_FIELDS, *delta.FIELDS),
        rotary_percent=0.25,
        codecs=(delta.NetLayers(),),
        keys=delta.KEYS,
    ),
)
