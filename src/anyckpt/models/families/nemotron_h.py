"""Nemotron-H and Nemotron 3: layers of Mamba-2, attention, MLP or experts, in a pattern of letters.

Every layer has one norm, whose place in Megatron-Core depends on what the layer is.  Checked by equal logits in
Megatron-Core 0.16's MambaModel, with all four kinds of layer.  transformers 4's own code spells the pattern as letters,
transformers 5 as a list of words; both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Fixed
from anyckpt.config.fields import Codec, Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2, Variant
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import caveats, decoder, mamba
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import INTERLEAVED_QKV
from anyckpt.models.language.rules import Condition, Rule, has

_LAYER = "backbone.layers.*"
_MIXER = f"{_LAYER}.mixer"
_HUB = "decoder.layers.*"
_WORDS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
_OLD_WORDS = {"mamba": "M", "attention": "*"}
_LETTERS = {letter: word for word, letter in _WORDS.items()}


def _kind(letter: str) -> Condition:
    def is_kind(config: ModelConfig, indices: tuple[int, ...]) -> bool:
        return (config.hybrid_override_pattern or "")[indices[0] : indices[0] + 1] == letter

    return is_kind


def _shared(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.moe_shared_expert_intermediate_size is not None and _EXPERTS(config, indices)


def _biased(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.moe_router_enable_expert_bias and _EXPERTS(config, indices)


def _narrow(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.moe_latent_size is not None and _EXPERTS(config, indices)


_MAMBA, _ATTENTION, _MLP, _EXPERTS = (_kind(letter) for letter in "M*-E")

RULES = (
    Rule(("backbone.embeddings.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.norm.weight",), f"{_HUB}.mixer.in_proj.layer_norm_weight", ("hidden",), when=_MAMBA),
    Rule((f"{_MIXER}.A_log",), f"{_HUB}.mixer.A_log", ("mamba-heads",), when=_MAMBA),
    Rule((f"{_MIXER}.D",), f"{_HUB}.mixer.D", ("mamba-heads",), when=_MAMBA),
    Rule((f"{_MIXER}.dt_bias",), f"{_HUB}.mixer.dt_bias", ("mamba-heads",), when=_MAMBA),
    Rule((f"{_MIXER}.in_proj.weight",), f"{_HUB}.mixer.in_proj.weight", ("mamba-in", "hidden"), when=_MAMBA),
    Rule((f"{_MIXER}.conv1d.weight",), f"{_HUB}.mixer.conv1d.weight", ("mamba-conv", "one", "kernel"), when=_MAMBA),
    Rule((f"{_MIXER}.conv1d.bias",), f"{_HUB}.mixer.conv1d.bias", ("mamba-conv",), when=_MAMBA),
    Rule((f"{_MIXER}.norm.weight",), f"{_HUB}.mixer.norm.weight", ("mamba-inner",), when=_MAMBA),
    Rule((f"{_MIXER}.out_proj.weight",), f"{_HUB}.mixer.out_proj.weight", ("hidden", "mamba-inner"), when=_MAMBA),
    Rule((f"{_LAYER}.norm.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",),
         when=_ATTENTION),
    Rule((f"{_MIXER}.q_proj.weight", f"{_MIXER}.k_proj.weight", f"{_MIXER}.v_proj.weight"),
         f"{_HUB}.self_attention.linear_qkv.weight", ("qkv", "hidden"), INTERLEAVED_QKV, _ATTENTION),
    Rule((f"{_MIXER}.o_proj.weight",), f"{_HUB}.self_attention.linear_proj.weight", ("hidden", "attention"),
         when=_ATTENTION),
    Rule((f"{_LAYER}.norm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",), when=_MLP),
    Rule((f"{_MIXER}.up_proj.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("ffn", "hidden"), when=_MLP),
    Rule((f"{_MIXER}.down_proj.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn"), when=_MLP),
    Rule((f"{_LAYER}.norm.weight",), f"{_HUB}.pre_mlp_layernorm.weight", ("hidden",), when=_EXPERTS),
    Rule((f"{_MIXER}.gate.weight",), f"{_HUB}.mlp.router.weight", ("experts", "hidden"), when=_EXPERTS),
    Rule((f"{_MIXER}.gate.e_score_correction_bias",), f"{_HUB}.mlp.router.expert_bias", ("experts",), when=_biased),
    Rule((f"{_MIXER}.fc1_latent_proj.weight",), f"{_HUB}.mlp.fc1_latent_proj.weight", ("latent", "hidden"),
         when=_narrow, partition="replicated"),
    Rule((f"{_MIXER}.fc2_latent_proj.weight",), f"{_HUB}.mlp.fc2_latent_proj.weight", ("hidden", "latent"),
         when=_narrow, partition="replicated"),
    Rule((f"{_MIXER}.experts.*.up_proj.weight",), f"{_HUB}.mlp.experts.linear_fc1.weight*", ("expert-ffn", "latent"),
         when=_EXPERTS),
    Rule((f"{_MIXER}.experts.*.down_proj.weight",), f"{_HUB}.mlp.experts.linear_fc2.weight*", ("latent", "expert-ffn"),
         when=_EXPERTS),
    Rule((f"{_MIXER}.shared_experts.up_proj.weight",), f"{_HUB}.mlp.shared_experts.linear_fc1.weight",
         ("shared-ffn", "hidden"), when=_shared),
    Rule((f"{_MIXER}.shared_experts.down_proj.weight",), f"{_HUB}.mlp.shared_experts.linear_fc2.weight",
         ("hidden", "shared-ffn"), when=_shared),
    Rule(("backbone.norm_f.weight",), "decoder.final_norm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


_MTP, _STEP = "mtp.layers.*", "mtp.layers.0"
_MOST_LAYERS = 8


def _in_step(inner: Condition) -> Condition:
    def condition(config: ModelConfig, indices: tuple[int, ...]) -> bool:
        return inner(replace(config, hybrid_override_pattern=config.mtp_hybrid_override_pattern), indices)

    return condition


def _layers_of_step(config: ModelConfig) -> range:
    return range(len(config.mtp_hybrid_override_pattern or "") if config.mtp_num_layers else 0)


def _ends_at(layer: int) -> Condition:
    return lambda config, indices: (
        bool(config.mtp_num_layers) and len(config.mtp_hybrid_override_pattern or "") == layer
    )


MTP_RULES = (
    *(
        replace(rule, hub=rule.hub.replace(_HUB, f"{_STEP}.transformer_layer.layers.*"),
                source=tuple(name.replace(_LAYER, _MTP) for name in rule.source), when=_in_step(rule.when),
                axes=("mtp-layer", "expert"))
        for rule in RULES
        if rule.hub.startswith(_HUB)
    ),
    *(
        Rule((f"{_STEP}.{name}.weight",), f"{_STEP}.{name}.weight", shape, when=has("mtp_num_layers"))
        for name, shape in (("enorm", ("hidden",)), ("hnorm", ("hidden",)), ("eh_proj", ("hidden", "twice-hidden")))
    ),
    *(
        Rule((f"mtp.layers.{layer}.final_layernorm.weight",), f"{_STEP}.final_layernorm.weight", ("hidden",),
             when=_ends_at(layer + 1))
        for layer in range(_MOST_LAYERS)
    ),
)  # fmt: skip
"""One step of multi-token prediction: layers of its own, what joins the embedding before them, and a norm after them.

Names are those of Megatron-Bridge 0.6; transformers does not use these layers.
"""


def _in_memory(pattern: str) -> str:
    return pattern.replace("backbone.", "model.", 1)


_STACKED = tuple(
    Variant(f"{_MIXER}.experts.{name}", (f"{_MIXER}.experts.*.{name}.weight",)) for name in ("up_proj", "down_proj")
)
_VARIANTS = (
    *_STACKED,
    *(replace(variant, stored=_in_memory(variant.stored)) for variant in _STACKED),
    *(
        Variant(_in_memory(pattern), (pattern,), in_memory=True)
        for pattern in dict.fromkeys(pattern for rule in RULES for pattern in rule.source)
        if pattern.startswith("backbone.")
    ),
)


DIMENSIONS = {
    "latent": lambda config: config.moe_latent_size or config.hidden_size,
    "twice-hidden": lambda config: 2 * config.hidden_size,
    **mamba.DIMENSIONS,
}

_FIXED: Mapping[str, Any] = {
    "conv_kernel": 4,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    "norm_topk_prob": True,
}
"""What a model must be for Megatron-Core to have its layers, and transformers' defaults."""

_OF_EXPERTS = (
    Field("num_moe_experts", "n_routed_experts"),
    Field("moe_router_topk", "num_experts_per_tok"),
    Field("moe_ffn_hidden_size", "moe_intermediate_size"),
    Field("moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=None),
    Field("moe_latent_size", "moe_latent_size", default=None),
    Field("moe_router_num_groups", "n_group", default=None),
    Field("moe_router_group_topk", "topk_group", default=None),
    Field("moe_router_topk_scaling_factor", "routed_scaling_factor", "number", 1.0),
)


_ACTIVATIONS = ("squared_relu", "gelu")


class _Pattern(Codec):
    """What each layer is, in words or in letters, which are as many as layers; and what experts' routers do."""

    hubs = ("num_layers", "hybrid_override_pattern")
    keys = ("num_hidden_layers", "hybrid_override_pattern", "layers_block_type")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        words = reader.values.get("layers_block_type")
        letters = reader.text("hybrid_override_pattern")
        if letters is None and isinstance(words, list):
            known = {**_WORDS, **_OLD_WORDS}
            letters = "".join(known.get(word, "?") if isinstance(word, str) else "?" for word in words)
        if not letters or len(letters) > 10_000 or set(letters) - _LETTERS.keys():
            raise MappingError(
                "config.json does not say what each layer is",
                expected=f"layers_block_type of {', '.join(_WORDS)}, or hybrid_override_pattern of "
                f"{' '.join(_LETTERS)}",
                found=repr(letters if letters else words)[:80],
            )
        if "E" in letters:
            router = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        else:
            router = dict.fromkeys((entry.hub for entry in _OF_EXPERTS), None)
        return {"num_layers": len(letters), "hybrid_override_pattern": letters, **router}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        letters = config.hybrid_override_pattern or ""
        return {
            "num_hidden_layers": config.num_layers,
            "hybrid_override_pattern": letters,
            "layers_block_type": [_LETTERS[letter] for letter in letters],
        }


class _Step(Codec):
    """What each layer of a step of multi-token prediction is, in words or in letters."""

    hubs = ("mtp_num_layers", "mtp_hybrid_override_pattern")
    keys = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern", "mtp_layers_block_type")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        steps = reader.integer("num_nextn_predict_layers") or 0
        if not steps:
            return dict.fromkeys(self.hubs)
        words, letters = reader.values.get("mtp_layers_block_type"), reader.text("mtp_hybrid_override_pattern")
        words = ["full_attention", "moe"] if words is None else words  # as transformers' class has it
        if letters is None and isinstance(words, list):
            known = {**_WORDS, **_OLD_WORDS}
            letters = "".join(known.get(word, "?") if isinstance(word, str) else "?" for word in words)
        if steps != 1 or not letters or len(letters) > _MOST_LAYERS or set(letters) - _LETTERS.keys():
            raise MappingError(
                "config.json's layers of multi-token prediction are not those of such a model",
                expected=f"one step, and mtp_hybrid_override_pattern of up to {_MOST_LAYERS} of {' '.join(_LETTERS)}",
                found=f"{steps} of {letters if letters else words!r}"[:80],
            )
        return {"mtp_num_layers": 1, "mtp_hybrid_override_pattern": letters}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        letters = config.mtp_hybrid_override_pattern if config.mtp_num_layers else None
        if not letters:
            return {}
        notes.append("transformers does not use the layers of multi-token prediction that are written")
        return {
            "num_nextn_predict_layers": config.mtp_num_layers,
            "mtp_hybrid_override_pattern": letters,
            "mtp_layers_block_type": [_LETTERS[letter] for letter in letters],
        }


FAMILY = Family(
    name="nemotron-h",
    title="Nemotron-H, Nemotron 3 Nano, Super, Ultra",
    rules=(*RULES, *MTP_RULES),
    traits={
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "none",
        "multi_latent_attention": False,
        "moe_shared_expert_gate": False,
    },
    features=frozenset({
        "hybrid_override_pattern", "hybrid_layer_pattern", "is_hybrid_model", "num_moe_experts", "num_experts",
        "mtp_num_layers",
    }),
    axes={"mtp-layer": _layers_of_step},
    recognise=lambda config: config.hybrid_override_pattern is not None and config.activation in _ACTIVATIONS,
    caveats=caveats.of_kind(
        "nemo2",
        "NeMo 2's MambaModel has no layers with experts: build the model with a layer specification that has them",
        lambda config: "E" in (config.hybrid_override_pattern or ""),
    ),
    nemo1=False,
    dimensions=DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("nemotron_h",),
        architectures=("NemotronHForCausalLM",),
        fields=(
            *(entry for entry in COMMON if entry.key != "num_hidden_layers"),
            Field("hidden_dropout", "hidden_dropout", "number", 0.0),
            Field("layernorm_epsilon", "layer_norm_epsilon", "number", aliases=("rms_norm_eps",)),
            Field("mamba_num_heads", "mamba_num_heads"),
            Field("mamba_head_dim", "mamba_head_dim"),
            Field("mamba_num_groups", "n_groups"),
            Field("mamba_state_dim", "ssm_state_size"),
            *_OF_EXPERTS,
        ),
        activation_key="mlp_hidden_act",
        codecs=(Fixed(_FIXED, "what Megatron-Core's layers are"), _Pattern(), _Step()),
        variants=_VARIANTS,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.ssm",
        model="MambaModel",
        configs=(
            "NemotronHConfigBase", "NemotronHConfig*", "NemotronNano*", "Nemotron5HybridConfig*",
            "NVIDIAMambaHybridConfig8B",
        ),
        choose=lambda config: "NemotronHConfig8B",
    ),
)  # fmt: skip
