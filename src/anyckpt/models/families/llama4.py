"""Llama 4, text: a shared expert beside the others, layers without rotary embedding between such that attend in chunks.

transformers stores a layer's experts in one tensor, as (in, out); quantizers store them one by one, as they store
linear layers, which is read too.  Queries and keys have a norm without weights.  Of Scout and Maverick, which also
see, the text part is taken.  Checked by equal logits in Megatron-Core 0.16.

Megatron-Core 0.16 has no attention in chunks and no scaling of queries by position, and NeMo 2 has chunks in all
layers and no scaling either: up to ``attention_chunk_size`` tokens none of it matters.  Megatron-Core's specifications
normalise queries and keys in all layers, transformers and NeMo 2 where there is rotary embedding.  NeMo's converter
drops ``low_freq_factor`` and ``high_freq_factor``, of which Scout's are not Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.config.codecs import Implied, same_as
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig, whole
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2, Variant
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP
from anyckpt.models.language.rules import Rule

_FEED = f"{sparse.LAYER}.feed_forward"
_EXPERTS = f"{_FEED}.experts"
_SHARED = f"{_FEED}.shared_expert"
_HUB_SHARED = f"{sparse.HUB}.mlp.shared_experts"
_CHUNKED, _FULL = "chunked_attention", "full_attention"
_CHUNK = 8192
_TUNING = (True, 0.1, 8192)
"""transformers' defaults: whether layers without rotary embedding scale queries, how much, and from which token on."""

RULES = (
    *sparse.LEADING,
    *sparse.ATTENTION,
    Rule((f"{sparse.LAYER}.post_attention_layernorm.weight",), f"{sparse.HUB}.mlp.linear_fc1.layer_norm_weight",
         ("hidden",), when=sparse.is_dense),
    Rule((f"{_FEED}.gate_proj.weight", f"{_FEED}.up_proj.weight"), f"{sparse.HUB}.mlp.linear_fc1.weight",
         ("fc1", "hidden"), GATE_UP, sparse.is_dense),
    Rule((f"{_FEED}.down_proj.weight",), f"{sparse.HUB}.mlp.linear_fc2.weight", ("hidden", "ffn"),
         when=sparse.is_dense),
    *sparse.experts(module="feed_forward", router="router"),
    Rule((f"{_SHARED}.gate_proj.weight", f"{_SHARED}.up_proj.weight"), f"{_HUB_SHARED}.linear_fc1.weight",
         ("shared-fc1", "hidden"), GATE_UP, sparse.is_sparse),
    Rule((f"{_SHARED}.down_proj.weight",), f"{_HUB_SHARED}.linear_fc2.weight", ("hidden", "shared-ffn"),
         when=sparse.is_sparse),
    *sparse.TRAILING,
)  # fmt: skip

_STACKED = (
    Variant(f"{_EXPERTS}.gate_up_proj", (f"{_EXPERTS}.*.gate_proj.weight", f"{_EXPERTS}.*.up_proj.weight"),
            written=True, transposed=True),
    Variant(f"{_EXPERTS}.down_proj", (f"{_EXPERTS}.*.down_proj.weight",), written=True, transposed=True),
)  # fmt: skip


def _listed(reader: Reader, key: str) -> tuple[int, ...]:
    """Whole numbers of a list; none if it is absent or empty."""
    value = reader.values.get(key)
    if value is None or (isinstance(value, list) and all(type(number) is int for number in value)):
        return tuple(value or ())
    raise MappingError(f"config.json's {key} is of the wrong type", expected="a list", found=repr(value)[:80])


class _ListedExperts(Codec):
    """Layers with experts: in a list, else every so many."""

    hubs = ("moe_layer_freq",)
    keys = ("moe_layers", "interleave_moe_layer_step")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        layers = layers_of(found["num_layers"])
        step = reader.integer("interleave_moe_layer_step")
        listed = set(_listed(reader, "moe_layers"))
        if reader.values.get("moe_layers") is None:
            listed = {layer for layer in layers if (layer + 1) % max(1, 1 if step is None else step) == 0}
        return {"moe_layer_freq": sparse.pattern(layer in listed for layer in layers)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        listed = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
        step = listed[0] + 1 if listed else config.num_layers + 1
        regular = listed == list(range(step - 1, config.num_layers, step))
        return {"moe_layers": listed, "interleave_moe_layer_step": step if regular else 1}


class _RotatedLayers(Codec):
    """Layers with rotary embedding, which attend in chunks: in a list, else all but every so many."""

    hubs = ("no_rope_freq",)
    keys = ("no_rope_layers", "no_rope_layer_interval", "layer_types")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        layers = layers_of(found["num_layers"])
        stated = _listed(reader, "no_rope_layers")
        if stated and len(stated) < len(layers):
            raise MappingError(
                "config.json's no_rope_layers is not that of the model", expected=f"{len(layers)} numbers or none",
                found=f"{len(stated)}",
            )  # fmt: skip
        interval = reader.integer("no_rope_layer_interval") or defaults["no_rope_layer_interval"]
        rotated = [bool(stated[layer]) if stated else (layer + 1) % interval != 0 for layer in layers]
        kinds = [_CHUNKED if rope else _FULL for rope in rotated]
        if reader.values.get("layer_types") not in (None, kinds):
            raise MappingError(
                "config.json's layer_types is not that of the model",
                expected=f"{_CHUNKED} in layers with rotary embedding, else {_FULL}",
                found=repr(reader.values["layer_types"])[:80],
            )
        return {"no_rope_freq": None if all(rotated) else tuple(int(not rope) for rope in rotated)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        rotated = _rotated(config)
        return {
            "no_rope_layers": [int(rope) for rope in rotated],
            "layer_types": [_CHUNKED if rope else _FULL for rope in rotated],
        }


def _chunk(config: ModelConfig) -> int:
    return config.max_position_embeddings or _CHUNK


def _rotated(config: ModelConfig) -> list[bool]:
    """For each layer whether it has rotary embedding."""
    return [not skipped for skipped in config.no_rope_freq or [0] * config.num_layers]


def _check_one_expert(config: ModelConfig) -> None:
    if config.moe_router_topk != 1:
        raise MappingError(
            "Megatron-Core weights an expert's input only where there is one for each token",
            expected=1, found=config.moe_router_topk, remedy="convert to hf",
        )  # fmt: skip


def _megatron(config: ModelConfig) -> Mapping[str, Any]:
    _check_one_expert(config)
    return {}


def _caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    if kind == "hf":
        return
    if config.attention_chunk_size is not None and kind == "megatron-args":
        yield f"Megatron-Core attends to all tokens: beyond {config.attention_chunk_size} tokens the model differs"
    if config.attention_chunk_size is not None and kind == "nemo2" and config.no_rope_freq is not None:
        yield (
            "NeMo attends in chunks in all layers, the model where it has rotary embedding: beyond "
            f"{config.attention_chunk_size} tokens they differ"
        )
    if config.attn_temperature_tuning and config.no_rope_freq is not None:
        name = "NeMo" if kind == "nemo2" else "Megatron-Core"
        yield (
            f"{name} does not scale queries by position, as layers without rotary embedding do: beyond "
            f"{whole(config.floor_scale)} tokens the model differs"
        )
    if kind == "nemo2" and (config.attn_temperature_tuning, config.attn_scale, config.floor_scale) != _TUNING:
        yield (
            "NeMo 2 has no fields for attn_temperature_tuning, attn_scale and floor_scale: on the way back they are "
            "transformers' defaults"
        )
    if config.qk_l2_norm and config.no_rope_freq is not None and kind == "megatron-args":
        yield (
            "Megatron-Core's specifications normalise queries and keys in all layers, the model where it has rotary "
            "embedding: build it with a specification whose other layers have no q_layernorm and k_layernorm"
        )


class _Interval(Codec):
    """NeMo 2 has no rotary embedding in every so many layers."""

    hubs = ("no_rope_freq",)
    keys = ("nope_layer_interval",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        interval = defaults["nope_layer_interval"]
        if "nope_layer_interval" in reader.values:
            interval = reader.integer("nope_layer_interval")
        layers = layers_of(found["num_layers"])
        skipped = tuple(int(bool(interval) and (layer + 1) % interval == 0) for layer in layers)
        return {"no_rope_freq": skipped if any(skipped) else None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        _check_one_expert(config)
        rotated = _rotated(config)
        interval = None if all(rotated) else rotated.index(False) + 1
        if interval is not None and rotated != [(layer + 1) % interval != 0 for layer in range(len(rotated))]:
            raise MappingError(
                "NeMo 2's Llama 4 cannot express which layers have rotary embedding",
                expected="all, or all but every N-th", found=list(config.no_rope_freq or ()),
                remedy="convert to megatron-core or megatron-lm",
            )  # fmt: skip
        return {"nope_layer_interval": interval}


FAMILY = Family(
    name="llama4",
    title="Llama 4 (text)",
    rules=RULES,
    ignorable=decoder.IGNORABLE,
    traits={
        **decoder.TRAITS,
        "rotary_interleaved": True,
        "add_bias_linear": False,
        "multi_latent_attention": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": False,
        "moe_shared_expert_gate": False,
        "moe_apply_probs_on_input": True,
    },
    features=frozenset({
        "num_moe_experts", "num_experts", "no_rope_freq", "qk_l2_norm", "moe_apply_probs_on_input",
    }),
    recognise=lambda config: config.num_moe_experts is not None,
    caveats=_caveats,
    nemo1=False,
    megatron_keys=_megatron,
    hugging_face=HuggingFace(
        model_types=("llama4_text",),
        architectures=("Llama4ForCausalLM",),
        fields=(
            *llama_fields_without("ffn_hidden_size"),
            Field("ffn_hidden_size", "intermediate_size_mlp"),
            Field("moe_ffn_hidden_size", "intermediate_size"),
            *sparse.fields("num_local_experts"),
            Field("qk_l2_norm", "use_qk_norm", "flag"),
            Field("attention_chunk_size", "attention_chunk_size", unset=_chunk),
            Field("attn_scale", "attn_scale", "number"),
            Field("floor_scale", "floor_scale", "number", whole=True),
        ),
        rotary_base=500_000.0,
        codecs=(
            _ListedExperts(),
            _RotatedLayers(),
            Implied(
                {"moe_shared_expert_intermediate_size": same_as("moe_ffn_hidden_size")},
                "transformers' Llama4ForCausalLM has a shared expert as wide as the others",
            ),
            Field("attn_temperature_tuning", "attn_temperature_tuning", "truth"),  # Scout's is 4
        ),
        keys=frozenset({"for_llm_compressor"}),
        variants=_STACKED,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.llama",
        model="LlamaModel",
        configs=("Llama4Config", "Llama4Experts*Config"),
        codecs=(
            _Interval(),
            Implied({"attn_temperature_tuning": True}),
            Field("attention_chunk_size", "attention_chunk_size", default=None, unset=_CHUNK),
            Field("qk_l2_norm", "qk_l2_norm", "flag", False),
        ),
        without=frozenset({"no_rope_freq", "attn_temperature_tuning", "attn_scale", "floor_scale"}),
    ),
)  # fmt: skip
