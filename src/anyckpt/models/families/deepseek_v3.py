"""DeepSeek-V3, R1, Kimi K2, Moonlight: latent attention, dense layers, then experts chosen from groups with a bias.

All tensors but the fused gate and up projections are Megatron-Core's as they are; the norm before the MLP has another
name in dense layers than in those with experts.  Checked against transformers 5.23, Megatron-Core 0.16 and
Megatron-Bridge 0.3.1.  transformers 5 leaves ``scoring_func`` and ``topk_method`` out of ``config.json``: scores are
sigmoids in every model of the type.  Kimi K2 is DeepSeek-V3 under a type of its own (Megatron-Bridge 0.6 maps it by the
same table); transformers loads it as ``deepseek_v3``, which is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied, Noted, Written, same_as
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Condition, Rule, has, lacks

_ATTENTION = f"{sparse.LAYER}.self_attn"
_HUB_ATTENTION = f"{sparse.HUB}.self_attention"


_narrow, _wide = has("q_lora_rank"), lacks("q_lora_rank")


def _biased(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.moe_router_enable_expert_bias and config.is_sparse(indices[0])


def _as_last_layer(inner: Condition) -> Condition:
    def condition(config: ModelConfig, indices: tuple[int, ...]) -> bool:
        return inner(config, (config.num_layers - 1, *indices[1:]))

    return condition


OF_EXPERTS = (
    *sparse.DENSE,
    *sparse.experts(),
    Rule((f"{sparse.LAYER}.mlp.gate.e_score_correction_bias",), f"{sparse.HUB}.mlp.router.expert_bias", ("experts",),
         when=_biased),
    *sparse.shared_experts(),
)  # fmt: skip
"""All of a layer but its attention."""

RULES = (
    *sparse.LEADING,
    Rule((f"{sparse.LAYER}.input_layernorm.weight",), f"{sparse.HUB}.input_layernorm.weight", ("hidden",)),
    Rule((f"{_ATTENTION}.q_proj.weight",), f"{_HUB_ATTENTION}.linear_q_proj.weight", ("queries", "hidden"), when=_wide),
    Rule((f"{_ATTENTION}.q_a_proj.weight",), f"{_HUB_ATTENTION}.linear_q_down_proj.weight", ("q-latent", "hidden"),
         when=_narrow),
    Rule((f"{_ATTENTION}.q_a_layernorm.weight",), f"{_HUB_ATTENTION}.linear_q_up_proj.layer_norm_weight",
         ("q-latent",), when=_narrow),
    Rule((f"{_ATTENTION}.q_b_proj.weight",), f"{_HUB_ATTENTION}.linear_q_up_proj.weight", ("queries", "q-latent"),
         when=_narrow),
    Rule((f"{_ATTENTION}.kv_a_proj_with_mqa.weight",), f"{_HUB_ATTENTION}.linear_kv_down_proj.weight",
         ("kv-latent-and-rope", "hidden")),
    Rule((f"{_ATTENTION}.kv_a_layernorm.weight",), f"{_HUB_ATTENTION}.linear_kv_up_proj.layer_norm_weight",
         ("kv-latent",)),
    Rule((f"{_ATTENTION}.kv_b_proj.weight",), f"{_HUB_ATTENTION}.linear_kv_up_proj.weight",
         ("keys-and-values", "kv-latent")),
    Rule((f"{_ATTENTION}.o_proj.weight",), f"{_HUB_ATTENTION}.linear_proj.weight", ("hidden", "values")),
    *OF_EXPERTS,
    *sparse.TRAILING,
)  # fmt: skip

_MTP = "mtp.layers.*"
_MTP_LAYER = f"{_MTP}.transformer_layer"


def multi_token(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Multi-token prediction: layers after the last, each like it, where these are the rules; from sources."""
    return (
        Rule((f"{sparse.LAYER}.enorm.weight",), f"{_MTP}.enorm.weight", ("hidden",), axes=("mtp",), after="layers"),
        Rule((f"{sparse.LAYER}.hnorm.weight",), f"{_MTP}.hnorm.weight", ("hidden",), axes=("mtp",), after="layers"),
        Rule((f"{sparse.LAYER}.eh_proj.weight",), f"{_MTP}.eh_proj.weight", ("hidden", "twice-hidden"), axes=("mtp",),
             after="layers"),
        *(
            replace(rule, hub=rule.hub.replace(sparse.HUB, _MTP_LAYER), when=_as_last_layer(rule.when),
                    axes=("mtp", "expert"), after="layers")
            for rule in rules
            if rule.hub.startswith(sparse.HUB)
        ),
        Rule((f"{sparse.LAYER}.shared_head.norm.weight",), f"{_MTP}.final_layernorm.weight", ("hidden",), axes=("mtp",),
             after="layers"),
    )  # fmt: skip


COPIED = (
    ("model.layers.*.embed_tokens.weight", "the embedding again, in a layer of multi-token prediction"),
    ("model.layers.*.shared_head.head.weight", "the output layer again, in a layer of multi-token prediction"),
)
"""Names to ignore in these layers."""

DIMENSIONS = {
    "twice-hidden": lambda config: 2 * config.hidden_size,
    "q-latent": lambda config: config.q_lora_rank or 0,
    "kv-latent": lambda config: config.kv_lora_rank or 0,
    "kv-latent-and-rope": lambda config: (config.kv_lora_rank or 0) + (config.qk_pos_emb_head_dim or 0),
    "queries": lambda config: (
        config.num_attention_heads * ((config.qk_head_dim or 0) + (config.qk_pos_emb_head_dim or 0))
    ),
    "keys-and-values": lambda config: (
        config.num_attention_heads * ((config.qk_head_dim or 0) + (config.v_head_dim or 0))
    ),
    "values": lambda config: config.num_attention_heads * (config.v_head_dim or 0),
}

TRAITS = {
    **decoder.TRAITS,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "multi_latent_attention": True,
    "moe_shared_expert_gate": False,
}

FEATURES = frozenset({"num_moe_experts", "num_experts", "multi_latent_attention", "yarn"})

ROUTED = (
    Field("num_moe_experts", "n_routed_experts"),
    Field("moe_router_topk", "num_experts_per_tok"),
    Field("moe_ffn_hidden_size", "moe_intermediate_size"),
    Field("moe_router_num_groups", "n_group", default=None, null=True),
    Field("moe_router_group_topk", "topk_group", default=None, null=True),
    Field("moe_router_topk_scaling_factor", "routed_scaling_factor", "number"),
)

FIELDS = (
    *llama_fields_without("kv_channels"),
    Field("q_lora_rank", "q_lora_rank", default=None, null=True),
    Field("kv_lora_rank", "kv_lora_rank"),
    Field("qk_head_dim", "qk_nope_head_dim"),
    Field("qk_pos_emb_head_dim", "qk_rope_head_dim"),
    Field("v_head_dim", "v_head_dim"),
    *ROUTED,
)


class Layers(Codec):
    """Dense layers before those with experts, and experts for every token as one as wide as they are together.

    Attributes:
        of: what the layers are of, for messages.
    """

    def __init__(self, of: str = "DeepSeek") -> None:
        self.of = of

    hubs = ("moe_layer_freq", "moe_shared_expert_intermediate_size")
    keys: tuple[str, ...] = ("n_shared_experts", "first_k_dense_replace", "moe_layer_freq")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        count, first = reader.integer("n_shared_experts"), reader.integer("first_k_dense_replace")
        usual = 0 if "n_shared_experts" in reader.values else defaults["n_shared_experts"]
        count = usual if count is None else count
        first = defaults.get("first_k_dense_replace", 1) if first is None else first
        every = reader.integer("moe_layer_freq") or 1
        layers = layers_of(found["num_layers"])
        return {
            "moe_layer_freq": sparse.pattern(layer >= first and layer % every == 0 for layer in layers),
            "moe_shared_expert_intermediate_size": count * found["moe_ffn_hidden_size"] or None,
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        dense = sparse.dense_layers(config)
        width, each = config.moe_shared_expert_intermediate_size or 0, config.moe_ffn_hidden_size or 1
        if dense != list(range(len(dense))) or width % each:
            raise MappingError(
                f"transformers' {self.of} has no such layers",
                expected="dense layers first, and a shared expert as wide as so many experts",
                found=f"dense layers {dense[:8]}, widths {width} and {each}",
            )
        return {
            "n_shared_experts": width // each or None,
            "first_k_dense_replace": len(dense),
            "moe_layer_freq": 1,
        }


CODECS = (
    Implied({"kv_channels": same_as("v_head_dim"), "moe_router_pre_softmax": True}),
    Written({"head_dim": same_as("qk_pos_emb_head_dim")}),
    Layers(),
    Field("moe_aux_loss_coeff", "aux_loss_alpha", "number", 0.0, terse=True),
)
MULTI_TOKEN = (
    Field("mtp_num_layers", "num_nextn_predict_layers", "count", None, terse=True),
    Noted(
        lambda config: config.mtp_num_layers is not None,
        "layers of multi-token prediction are written without their copies of embedding and output layer; "
        "transformers does not use these layers",
    ),
)
KEYS = frozenset({"qk_head_dim", "norm_topk_prob", "scoring_func", "topk_method"})
"""Keys that are fixed, or say nothing."""

SIGMOID = Implied({"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True})

_EXPECTED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}


FAMILY = Family(
    name="deepseek-v3",
    title="DeepSeek-V3, R1, Kimi K2, Moonlight",
    rules=(*RULES, *multi_token(RULES)),
    ignorable=(*decoder.IGNORABLE, *COPIED),
    traits={**TRAITS, "moe_router_score_function": "sigmoid"},
    features=FEATURES | {"mtp_num_layers"},
    recognise=lambda config: config.num_moe_experts is not None,
    caveats=caveats.best_of_each_group(2),
    nemo1=False,
    dimensions=DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("deepseek_v3", "kimi_k2"),
        architectures=("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"),
        fields=FIELDS,
        constants={**_EXPECTED, "rope_interleave": True},
        expected=_EXPECTED,
        codecs=(
            *CODECS,
            SIGMOID,
            *MULTI_TOKEN,
        ),
        keys=KEYS,
        variants=sparse.STACKED,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.deepseek",
        model="DeepSeekModel",
        configs=("DeepSeekV3Config",),
    ),
)  # fmt: skip
