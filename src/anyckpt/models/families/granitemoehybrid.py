"""Granite 4: Mamba-2 mixers between layers of attention, an MLP in each, with experts beside it in larger models.

Checked against transformers 5.24.  Neither Megatron-Core nor Megatron-Bridge has Granite's multipliers, so that the
family goes to containers alone; they stay in its ``config.json`` as they are, and so does which layers have attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Fixed, Implied
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families import granitemoe
from anyckpt.models.families.parts import decoder, mamba
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.by_layer import Carried
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Condition, Rule, has, lacks

_KEYS = Carried("granitemoehybrid")
_MIXERS, _ATTENTION = ("linear_attention", "mamba"), ("full_attention", "attention")
"""Words of ``layer_types`` of today and of older files."""


def _mixes(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether a layer has a mixer, as all have where nothing is said."""
    words = _KEYS.reader(config).values.get("layer_types")
    if words is None:
        return True
    known = (*_MIXERS, *_ATTENTION)
    if not isinstance(words, (list, tuple)) or len(words) != config.num_layers or words[indices[0]] not in known:
        raise MappingError(
            "config.json's layer_types is not that of the model",
            expected=f"{' or '.join(known)} for each of {config.num_layers} layers",
            found=repr(words)[:80],
        )
    return words[indices[0]] in _MIXERS


def _attends(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not _mixes(config, indices)


def _attention() -> tuple[Rule, ...]:
    """Llama's, in layers that have it."""
    return tuple(Rule(rule.source, rule.hub, rule.shape, rule.operation, _attends) for rule in sparse.ATTENTION)


def _mlp(norm: str, hub: str, when: Condition) -> tuple[Rule, ...]:
    """The MLP of every layer, which is an expert for every token where there are others."""
    layer, into = sparse.LAYER, f"{sparse.HUB}.{hub}"
    return (
        Rule((f"{layer}.post_attention_layernorm.weight",), f"{sparse.HUB}.{norm}", ("hidden",), when=when),
        Rule((f"{layer}.shared_mlp.input_linear.weight",), f"{into}.linear_fc1.weight", ("shared-fc1", "hidden"),
             when=when),
        Rule((f"{layer}.shared_mlp.output_linear.weight",), f"{into}.linear_fc2.weight", ("hidden", "shared-ffn"),
             when=when),
    )  # fmt: skip


_EXPERTS = tuple(rule for rule in granitemoe.FAMILY.rules if ".mlp." in rule.hub)
_SPARSE = has("num_moe_experts")
RULES = (
    *sparse.LEADING,
    *_attention(),
    Rule((f"{sparse.LAYER}.input_layernorm.weight",), f"{sparse.HUB}.mixer.in_proj.layer_norm_weight", ("hidden",),
         when=_mixes),
    *(
        Rule((f"{sparse.LAYER}.mamba.{name}",), f"{sparse.HUB}.mixer.{name}", shape, when=_mixes)
        for name, shape in mamba.MIXER.items()
    ),
    *_mlp("mlp.linear_fc1.layer_norm_weight", "mlp", lacks("num_moe_experts")),
    *_mlp("pre_mlp_layernorm.weight", "mlp.shared_experts", _SPARSE),
    *_EXPERTS,
    Rule(("model.norm.weight",), "decoder.final_norm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


class _Heads(Codec):
    """How wide a mixer's heads are: a share of the mixer's width, where nothing else is said."""

    hubs = ("mamba_head_dim",)
    keys = ("mamba_d_head", "mamba_expand")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        if reader.values.get("mamba_d_head") not in (None, "auto"):
            return {"mamba_head_dim": reader.integer("mamba_d_head")}
        expand = reader.integer("mamba_expand") or defaults["mamba_expand"]
        return {"mamba_head_dim": expand * found["hidden_size"] // max(1, found["mamba_num_heads"] or 1)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        heads, width = config.mamba_num_heads or 1, config.mamba_head_dim or 1
        return {"mamba_d_head": width, "mamba_expand": heads * width // config.hidden_size}


FAMILY = Family(
    name="granitemoehybrid",
    title="Granite 4",
    rules=RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "moe_router_score_function": "softmax", "moe_layer_freq": None},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    dimensions=mamba.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("granitemoehybrid",),
        architectures=("GraniteMoeHybridForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            Field("num_moe_experts", "num_local_experts", "count", None, unset=0),
            Field("moe_router_topk", "num_experts_per_tok", "count", None),
            Field("moe_aux_loss_coeff", "router_aux_loss_coef", "number"),
            Field("moe_shared_expert_intermediate_size", "shared_intermediate_size"),
            Field("mamba_num_heads", "mamba_n_heads"),
            Field("mamba_num_groups", "mamba_n_groups"),
            Field("mamba_state_dim", "mamba_d_state"),
        ),
        codecs=(
            _Heads(),
            Implied({"moe_ffn_hidden_size": lambda of: of["ffn_hidden_size"] if of["num_moe_experts"] else None}),
            Fixed({"mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False}, "what is known"),
        ),
        carried=granitemoe.FAMILY.hugging_face.carried | {"layer_types", "layers_block_type", "position_embedding_type",
                                                          "time_step_limit"},
        variants=granitemoe.FAMILY.hugging_face.variants,
    ),
)  # fmt: skip
