"""MiniMax-M2, M2.5 and M2.7: Mixtral's names, experts chosen with a bias, norms of all heads' queries and of all keys.

Names are those of Megatron-Bridge 0.6, whose ``minimax_m2_layer_spec`` has these norms, each rank's heads with their
part; outputs were checked against transformers 5.24.  Modules of multi-token prediction are in no released file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied, same_as
from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.models.families import mixtral
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_SPEC = "megatron.bridge.models.minimax_m2.minimax_m2_provider.minimax_m2_layer_spec"
_BIAS = f"{sparse.LAYER}.block_sparse_moe.e_score_correction_bias"
_EXPECTED = {"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True}


class _Rotated(Codec):
    """How many channels of a head are rotated, where no fraction says it."""

    hubs = ("rotary_percent",)
    keys = ("rotary_dim",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        nested, count = reader.mapping("rope_parameters"), reader.integer("rotary_dim")
        said = nested.get("partial_rotary_factor", reader.values.get("partial_rotary_factor"))
        return {} if said is not None or not count else {"rotary_percent": count / found["kv_channels"]}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {"rotary_dim": round(config.rotary_percent * config.kv_channels)}


FAMILY = Family(
    name="minimax-m2",
    title="MiniMax-M2, M2.5, M2.7",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        *(replace(rule, partition="column") for rule in decoder.WIDE_QUERY_KEY_NORMS),
        *sparse.experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
        Rule((_BIAS,), f"{sparse.HUB}.mlp.router.expert_bias", ("experts",)),
        *sparse.TRAILING,
    ),
    ignorable=decoder.IGNORABLE,
    traits={
        **decoder.TRAITS,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": None,
        "moe_layer_freq": None,
    },
    features=frozenset({"num_moe_experts", "num_experts"}),
    recognise=lambda config: False,  # nothing but its name, or its tensors, tells it from GLM-4.5
    caveats=caveats.own_layers(_SPEC),
    megatron_keys=lambda config: {caveats.LAYER_SPEC: _SPEC},
    nemo1=False,
    hugging_face=HuggingFace(
        model_types=("minimax_m2",),
        architectures=("MiniMaxM2ForCausalLM",),
        fields=(*LLAMA_FIELDS, *sparse.fields("num_local_experts")),
        expected=_EXPECTED,
        rotary_base=5_000_000.0,
        codecs=(
            _Rotated(),
            Implied({"moe_ffn_hidden_size": same_as("ffn_hidden_size"), "moe_router_enable_expert_bias": True}),
        ),
        variants=(
            *mixtral.FAMILY.hugging_face.variants,
            Variant(f"{sparse.LAYER}.mlp.e_score_correction_bias", (_BIAS,), in_memory=True),
        ),
    ),
)
