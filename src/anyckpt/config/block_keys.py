"""Experts, latent attention and Mamba-2 mixers in Megatron's and NeMo's configurations, which name them alike.

Of Megatron-Core 0.16's ``TransformerConfig`` and ``MLATransformerConfig``; Megatron-LM's arguments differ in
``num_experts`` alone.  NeMo 1 hands what it does not know to ``TransformerConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.fields import Field, render_changed, render_fields
from anyckpt.config.layer_blocks import decode
from anyckpt.config.model import ModelConfig, whole
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import Spellings
from anyckpt.errors import MappingError

_EXPERTS = (
    Field("moe_router_topk", "moe_router_topk", default=2),
    Field("moe_ffn_hidden_size", "moe_ffn_hidden_size", default=None),
    Field("moe_router_pre_softmax", "moe_router_pre_softmax", "flag", False),
    Field("moe_router_score_function", "moe_router_score_function", "text", "softmax"),
    Field("moe_router_enable_expert_bias", "moe_router_enable_expert_bias", "flag", False),
    Field("moe_router_num_groups", "moe_router_num_groups", default=None),
    Field("moe_router_group_topk", "moe_router_group_topk", default=None),
    Field("moe_router_topk_scaling_factor", "moe_router_topk_scaling_factor", "number", None),
    Field("moe_aux_loss_coeff", "moe_aux_loss_coeff", "number", 0.0),
    Field("moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=None),
    Field("moe_shared_expert_gate", "moe_shared_expert_gate", "flag", False),
    Field("moe_latent_size", "moe_latent_size", default=None, terse=True),
)
_LATENT = (
    Field("q_lora_rank", "q_lora_rank", default=None),
    Field("kv_lora_rank", "kv_lora_rank", default=512),
    Field("qk_head_dim", "qk_head_dim", default=128),
    Field("qk_pos_emb_head_dim", "qk_pos_emb_head_dim", default=64),
    Field("v_head_dim", "v_head_dim", default=128),
)
_MAMBA = (
    Field("mamba_num_heads", "mamba_num_heads", default=None),
    Field("mamba_head_dim", "mamba_head_dim", default=64),
    Field("mamba_num_groups", "mamba_num_groups", default=8, aliases=("mamba_ssm_ngroups", "ngroups_mamba")),
    Field("mamba_state_dim", "mamba_state_dim", default=128),
)
_DELTA = (
    Field("linear_conv_kernel_dim", "linear_conv_kernel_dim", default=4),
    Field("linear_key_head_dim", "linear_key_head_dim", default=128),
    Field("linear_value_head_dim", "linear_value_head_dim", default=128),
    Field("linear_num_key_heads", "linear_num_key_heads", default=16),
    Field("linear_num_value_heads", "linear_num_value_heads", default=32),
)
_VARIANT, DELTA_NET, INDEXED = "experimental_attention_variant", "gated_delta_net", "dsa"
_INDEXER = tuple(
    Field(name, name, default=None) for name in ("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk")
)
_ATTENTION = (
    Field("attention_output_gate", "attention_output_gate", "flag", False),
    Field("softmax_type", "softmax_type", "text", "vanilla"),
    Field("glu_linear_offset", "glu_linear_offset", "number", 0.0),
    Field("activation_func_clamp_value", "activation_func_clamp_value", "number", None),
    Field("moe_apply_probs_on_input", "moe_apply_probs_on_input", "flag", False),
    Field("no_rope_freq", "no_rope_freq", "frequency", None),
    Field("qk_l2_norm", "qk_l2_norm", "flag", False),
    Field("attention_chunk_size", "attention_chunk_size", default=None),
    Field("attn_temperature_tuning", "attn_temperature_tuning", "flag", False),
    Field("attn_scale", "attn_scale", "number", 0.1),
    Field("floor_scale", "floor_scale", "number", 8192.0),
)
"""The last four are ours but for NeMo 2, which has the chunks: Megatron-Core ignores them, and ``caveats`` say so."""
_YARN = {
    "factor": ("rotary_scaling_factor", 40.0),
    "original_max_position_embeddings": ("original_max_position_embeddings", 4096),
    "beta_fast": ("beta_fast", 32.0),
    "beta_slow": ("beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}
"""transformers' name -> ``MLATransformerConfig``'s, and its default; other models' names begin with ``yarn_``."""

QUERY_SCALING = "llama_4_scaling_beta"
"""transformers' number by which queries grow with their position; ours in arguments, for Megatron-Core has none."""
_ROUND = "yarn_correction_range_round_to_int"
_COUNTS = ("num_moe_experts", "num_experts")


def block_sizes(reader: Reader, defaults: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Hub fields that say which blocks a Megatron or NeMo configuration switches on, and of what sizes.

    Args:
        reader: the configuration.
        defaults: by key, what its absence means in this model's class.
        common: hub fields that have been parsed, of every model; None where they are not said.

    Raises:
        MappingError: a key is of the wrong type.
    """
    found: dict[str, Any] = reader.fields(_ATTENTION[:1], defaults)
    pattern, further = _pattern(reader, defaults)
    found["mtp_num_layers"] = reader.integer("mtp_num_layers") or len(further) or None
    experts = next((count for key in _COUNTS if (count := reader.integer(key))), None) or defaults.get(_COUNTS[0])
    if experts and "E" in (pattern or "E"):  # NeMo 1's megatron_mamba_config.yaml has 16 of which no layer is made
        found["num_moe_experts"] = experts
    blocks = reader.text("heterogeneous_layers_config_encoded_json")
    if blocks and common["num_attention_heads"] and common["hidden_size"]:
        found["heterogeneous_blocks"] = decode(blocks, common["num_attention_heads"], common["hidden_size"])
    if reader.values.get("multi_latent_attention", defaults.get("multi_latent_attention")):
        found |= {"multi_latent_attention": True, **reader.fields(_LATENT, defaults)}
    if reader.values.get(_VARIANT, defaults.get(_VARIANT)) == INDEXED:
        found |= reader.fields(_INDEXER, defaults)
    if reader.values.get(_VARIANT, defaults.get(_VARIANT)) == DELTA_NET and common["num_layers"]:
        found["linear_attention_freq"] = _linear_layers(reader, common["num_layers"])
        found |= reader.fields(_DELTA, defaults)
    if pattern or reader.values.get("is_hybrid_model"):
        found |= {"hybrid_override_pattern": pattern, **reader.fields(_MAMBA, defaults)}
        found["mtp_hybrid_override_pattern"] = further[0] if further else None
        if found["mamba_num_heads"] is None and common["hidden_size"]:
            # Megatron-Core's default: twice the model's width
            found["mamba_num_heads"] = max(1, 2 * common["hidden_size"] // max(1, found["mamba_head_dim"]))
    return found


def parse_blocks(reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The other hub fields of the blocks that are switched on.

    Args:
        reader: the configuration.
        defaults: by key, what its absence means in this model's class.
        found: hub fields that have been parsed, with those of ``block_sizes``.

    Raises:
        MappingError: a key is of the wrong type.
    """
    fields = reader.fields(_ATTENTION[1:], defaults)
    fields["no_rope_freq"] = _without_rope(reader, fields["no_rope_freq"], found["num_layers"])
    if found.get("num_moe_experts"):
        fields |= reader.fields(_EXPERTS, defaults)
        fields["moe_ffn_hidden_size"] = fields["moe_ffn_hidden_size"] or found["ffn_hidden_size"]
        fields["moe_layer_freq"] = _layer_pattern(reader, defaults, found["num_layers"])
    return fields


def _pattern(reader: Reader, defaults: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """A letter per layer of a hybrid model, and of each step of multi-token prediction that follows.

    Megatron-Core writes ``/`` before the layers of each of these, and since its ``hybrid_layer_pattern`` ``|`` between
    pipeline stages.
    """
    stated = reader.text("hybrid_layer_pattern") or reader.text("hybrid_override_pattern")
    body, *further = (stated or defaults.get("hybrid_override_pattern") or "").split("/")
    return body.replace("|", "") or None, further


def render_blocks(config: ModelConfig, experts: str = "num_moe_experts") -> dict[str, Any]:
    """Keys of the blocks that the model has.

    Args:
        config: the model.
        experts: the key of the number of experts.
    """
    rendered: dict[str, Any] = {}
    if config.num_moe_experts is not None:
        rendered |= {experts: config.num_moe_experts, **render_fields(_EXPERTS, config)}
        rendered |= {
            "moe_layer_freq": 1 if config.moe_layer_freq is None else list(config.moe_layer_freq),
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss_coeff else "none",
        }
    if config.multi_latent_attention:
        rendered |= {"multi_latent_attention": True, **render_fields(_LATENT, config)}
    if config.hybrid_override_pattern is not None:
        steps = [config.mtp_hybrid_override_pattern or ""] * (config.mtp_num_layers or 0)
        rendered |= {
            "hybrid_override_pattern": "/".join([config.hybrid_override_pattern, *steps]),
            **render_fields(_MAMBA, config),
        }
        rendered["is_hybrid_model"] = True
    if config.dsa_indexer_n_heads is not None:
        rendered |= {_VARIANT: INDEXED, **render_fields(_INDEXER, config)}
    if config.linear_attention_freq is not None:
        rendered |= {_VARIANT: DELTA_NET, **render_fields(_DELTA, config)}
        rendered["linear_attention_freq"] = list(config.linear_attention_freq)
    if config.mtp_num_layers is not None:
        rendered["mtp_num_layers"] = config.mtp_num_layers
    return rendered | render_changed(_ATTENTION, config)


def parse_yarn(reader: Reader, defaults: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any] | None:
    """transformers' ``rope_scaling`` of a model whose rope YaRN scales, or None.

    Latent attention says so with ``rope_type``, of which YaRN is the default; other models with
    ``position_embedding_type``, which becomes ``rope`` in ``fields``.

    Raises:
        MappingError: a key is of the wrong type.
    """
    latent = bool(fields.get("multi_latent_attention"))
    if latent:
        on = (reader.text("rope_type") or defaults.get("rope_type", "yarn")) == "yarn"
    else:
        on = fields["position_embedding_type"] == "yarn"
    if not on:
        return None
    fields["position_embedding_type"] = "rope"
    scaling: dict[str, Any] = {"rope_type": "yarn"}
    for theirs, (name, default) in _YARN.items():
        if latent:
            scaling[theirs] = reader.number(name)
        else:
            scaling[theirs] = reader.number(f"yarn_{name}")
            if scaling[theirs] is None and theirs == "factor":
                scaling[theirs] = reader.number(name)  # as NeMo 2's GPT-OSS has it
            if theirs.startswith("mscale") and scaling[theirs] is None:
                del scaling[theirs]
                continue
        if scaling[theirs] is None:
            scaling[theirs] = defaults.get(name if latent else f"yarn_{name}", defaults.get(name, default))
    scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    if not latent and (scales := reader.number(QUERY_SCALING)) is not None:
        scaling[QUERY_SCALING] = scales
    rounded = reader.flag(_ROUND)
    if not latent and not (rounded if rounded is not None else defaults.get(_ROUND, True)):
        scaling["truncate"] = False
    return scaling


def render_yarn(family: Spellings, config: ModelConfig, target: str) -> dict[str, Any] | None:
    """Keys of a rope that YaRN scales, for a family whose layers Megatron-Core can scale so; None if it is not.

    Latent attention says that rope is not scaled, too, for otherwise Megatron-Core scales it.

    Raises:
        MappingError: transformers scales rope in a way that Megatron-Core does not.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0} if config.multi_latent_attention else None
    latent = config.multi_latent_attention
    if latent and scaling.get("rope_type") != "yarn":
        raise MappingError(
            f"{target}'s latent attention scales rope by YaRN alone",
            expected="rope_type yarn or default",
            found=dict(scaling),
            remedy="set up the scaling in the target yourself, and convert with --config of a configuration without it",
        )
    if "yarn" not in family.features or scaling.get("rope_type") != "yarn":
        return None
    numbers = {theirs: scaling.get(theirs, default) for theirs, (_, default) in _YARN.items()}
    if scaling.get("original_max_position_embeddings") is None:
        numbers["original_max_position_embeddings"] = config.max_position_embeddings
    truncated = scaling.get("truncate", True)
    own = {QUERY_SCALING} & scaling.keys() & family.features
    odd = scaling.keys() - {"rope_type", "truncate", *_YARN, *own} or (latent and not truncated)
    if odd or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers.values()):
        raise MappingError(
            f"{target} cannot express this rope scaling",
            expected=f"YaRN with {', '.join(_YARN)}",
            found=dict(scaling),
            remedy="set up the scaling in the target yourself, and convert with --config of a configuration without it",
        )
    if latent:
        return {"rope_type": "yarn", **{name: whole(numbers[theirs]) for theirs, (name, _) in _YARN.items()}}
    said: dict[str, Any] = {
        f"yarn_{name}": whole(numbers[theirs]) for theirs, (name, _) in _YARN.items() if theirs in scaling
    }
    if target == "NeMo 2":  # whose class has another name for it, and no others
        said["rotary_scaling_factor"] = said.pop("yarn_rotary_scaling_factor")
    else:
        said = {"yarn_mscale": None, "yarn_mscale_all_dim": None, **said, **{key: scaling[key] for key in own}}
    return {"position_embedding_type": "yarn", **said, _ROUND: bool(truncated)}


def _without_rope(reader: Reader, value: int | tuple[int, ...] | None, layers: int) -> tuple[int, ...] | None:
    """Megatron-Core's ``no_rope_freq``: none in each n-th layer, or a list of 0 and 1."""
    if not isinstance(value, int):
        return value if value and any(value) else None
    if not 0 <= value <= layers:
        raise MappingError(
            f"the {reader.what}'s no_rope_freq is not possible", expected=f"up to {layers} layers", found=value
        )
    return tuple(int((layer + 1) % value == 0) for layer in layers_of(layers)) if value else None


def _linear_layers(reader: Reader, layers: int) -> tuple[int, ...] | None:
    """Megatron-Core's ``linear_attention_freq``: all layers but every n-th, or a list of 0 and 1."""
    value = reader.values.get("linear_attention_freq")
    if type(value) is int and value > 0:
        return tuple(int((layer + 1) % value != 0) for layer in layers_of(layers))
    if isinstance(value, (list, tuple)) and all(type(one) is int and one in (0, 1) for one in value):
        return tuple(value)
    raise MappingError(
        f"the {reader.what}'s linear_attention_freq is not possible",
        expected="a number of layers, or 0 or 1 for each",
        found=repr(value)[:80],
    )


def _layer_pattern(reader: Reader, defaults: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    """Megatron-Core's ``moe_layer_freq``: every n-th layer has experts, or a list of 0 and 1."""
    value = reader.values.get("moe_layer_freq")
    value = defaults.get("moe_layer_freq", 1) if value is None else value
    if type(value) is int and 0 < value <= layers:
        pattern = tuple(int(layer % value == 0) for layer in layers_of(layers))
    elif isinstance(value, (list, tuple)) and all(type(one) is int and one in (0, 1) for one in value):
        pattern = tuple(value)
    else:
        raise MappingError(
            f"the {reader.what}'s moe_layer_freq is not possible",
            expected="a number of layers, or 0 or 1 for each",
            found=repr(value)[:80],
        )
    return None if all(pattern) and len(pattern) == layers else pattern
