"""Mamba-2: state-spaces' own models and transformers' ``mamba2``; to Megatron-Core, a hybrid of Mamba layers alone.

Checked by equal logits in Megatron-Core 0.16's MambaModel, whose kernels, which need a GPU, were replaced by the
recurrence that they compute; and by what it saves.  state-spaces' code calls the embedding ``backbone.embedding``, and
its ``config.json`` has keys of its own, whose defaults are those of its ``Mamba2`` module.  NeMo's converters tie
nothing, for NeMo's classes cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anyckpt.config.codecs import Fixed, Implied, same_as
from anyckpt.config.fields import Codec, Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import ModelConfig, padded
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2, Variant
from anyckpt.errors import MappingError
from anyckpt.models.families import nemotron_h
from anyckpt.models.language.family import Family

_MIXERS_EPSILON = 1e-5
_LENGTH = 2048
_NOT_MAMBAS = {
    "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "max_position_embeddings",
    "attention_dropout",
}  # fmt: skip

_FIXED: Mapping[str, Any] = {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}
"""What a model must be for Megatron-Core to have its mixers, and transformers' defaults."""
_OF = "what Megatron-Core's layers are"

_STATE_SPACES: Mapping[str, Any] = {
    "d_conv": 4, "bias": False, "conv_bias": True, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None,
    "D_has_hdim": False, "activation": "swish",
}  # fmt: skip
"""The same of state-spaces' module."""


def _from_state_spaces(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """transformers' keys from ``MambaConfig`` of state-spaces' code, if its layers are Mamba-2."""
    reader = Reader(config, "config.json")
    mixer = config.get("ssm_cfg")
    if not isinstance(mixer, Mapping) or mixer.get("layer") != "Mamba2" or reader.values.get("d_model") is None:
        return None
    sizes = Reader(mixer, "config.json's ssm_cfg")
    hidden = _or(reader.integer("d_model"), 0)
    expand = _or(sizes.integer("expand"), 2)
    width = _or(sizes.integer("headdim"), 64)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": _or(reader.integer("n_layer"), 64),
        "vocab_size": _or(reader.integer("vocab_size"), 50277),
        "num_heads": hidden * expand // max(1, width),
        "head_dim": width,
        "n_groups": _or(sizes.integer("ngroups"), 1),
        "state_size": _or(sizes.integer("d_state"), 128),
        "expand": expand,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **{key: mixer[key] for key in _STATE_SPACES if key in mixer},
        **{key: config[key] for key in ("d_intermediate", "attn_layer_idx", "rms_norm") if key in config},
        "pad_vocab_size_multiple": config.get("pad_vocab_size_multiple", 8),
    }


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


class _Expand(Codec):
    """``expand``: how many times as wide as the model its mixers are, which their heads say, too."""

    keys = ("expand",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        expand, hidden = _or(reader.integer("expand"), 2), found["hidden_size"]
        heads, width = found["mamba_num_heads"], found["mamba_head_dim"]
        if expand * hidden != heads * width:
            raise MappingError(
                "config.json's expand does not fit its heads", expected=f"{heads} heads of {width}",
                found=f"{expand} times {hidden}",
            )  # fmt: skip
        return {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        inner = (config.mamba_num_heads or 0) * (config.mamba_head_dim or 0)
        if inner % config.hidden_size:
            raise MappingError(
                "transformers' Mamba2ForCausalLM has mixers of a multiple of the model's width",
                expected=f"a multiple of {config.hidden_size}", found=inner,
            )  # fmt: skip
        return {"expand": inner // config.hidden_size}


class _Padding(Codec):
    """Rows of the embedding, where a model of state-spaces says what they are a multiple of."""

    keys = ("pad_vocab_size_multiple",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        multiple = reader.integer("pad_vocab_size_multiple")
        if not multiple:
            return {}
        rows = padded(found["vocab_size"], max(1, multiple))
        return {"make_vocab_size_divisible_by": multiple, "padded_vocab_size": rows}


class _Steps(Codec):
    """Megatron-Core has no limits of time steps."""

    keys = ("time_step_limit",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        limits = reader.values.get("time_step_limit")
        ends = limits if isinstance(limits, (list, tuple)) else []
        spelled = [end.get("__float__") if isinstance(end, Mapping) else end for end in ends]
        unlimited = len(spelled) == 2 and spelled[0] == 0 and str(spelled[1]).lower() in ("inf", "infinity")
        if limits is not None and not unlimited:
            raise MappingError(
                "config.json's time_step_limit is not what Megatron-Core's layers are",
                expected="from 0 to infinity", found=repr(limits)[:80],
            )  # fmt: skip
        return {}


def _heads(found: Mapping[str, Any]) -> int:
    """As many heads of attention, which no layer has, as mixers have, if they divide the model's width."""
    heads: int = found["mamba_num_heads"]
    return heads if heads > 0 and found["hidden_size"] % heads == 0 else 1


def _caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    if kind != "hf" and config.layernorm_epsilon != _MIXERS_EPSILON:
        yield (
            f"Megatron-Core's mixers normalise with an epsilon of {_MIXERS_EPSILON:g}, whatever layernorm_epsilon "
            f"says; the model's is {config.layernorm_epsilon:g}"
        )


def _nemo1(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_mamba_model.MegatronMambaModel",
        "vocab_size": config.rows,  # of which this class makes as many rows
        "add_bias_linear": False,
        "gated_linear_unit": False,
        "mamba_ssm_ngroups": config.mamba_num_groups,
    }


_NEMO1 = {
    "hybrid_override_pattern": lambda values: "M" * len(layers_of(_count(values.get("num_layers")))),
    "add_bias_linear": False,
    "share_embeddings_and_output_weights": False,
}


def _count(value: Any) -> int:
    return value if type(value) is int else 0


FAMILY = Family(
    name="mamba2",
    title="Mamba-2",
    rules=tuple(rule for rule in nemotron_h.RULES if "*" not in rule.hub or ".mixer." in rule.hub),
    traits={
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "add_bias_linear": False,
        "position_embedding_type": "none",
        "multi_latent_attention": False,
    },
    features=frozenset({
        "hybrid_override_pattern", "hybrid_layer_pattern", "is_hybrid_model", "num_moe_experts", "num_experts",
    }),
    recognise=lambda config: set(config.hybrid_override_pattern or "") == {"M"},
    caveats=_caveats,
    unties=frozenset({"nemo1", "nemo2"}),
    nemo1_keys=_nemo1,
    nemo1_classes={"MegatronMambaModel": _NEMO1},
    dimensions=nemotron_h.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("mamba2",),
        architectures=("Mamba2ForCausalLM",),
        fields=(
            *(entry for entry in COMMON if entry.hub not in _NOT_MAMBAS),
            Field("layernorm_epsilon", "layer_norm_epsilon", "number"),
            Field("mamba_num_heads", "num_heads"),
            Field("mamba_head_dim", "head_dim"),
            Field("mamba_num_groups", "n_groups"),
            Field("mamba_state_dim", "state_size"),
        ),
        attention_bias=None,
        activation_key=None,
        codecs=(
            Fixed(_FIXED, _OF),
            Fixed({**_STATE_SPACES, "d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}, _OF, written=False),
            Field("max_position_embeddings", "max_position_embeddings", "count", _LENGTH, terse=True),
            Implied({
                "hybrid_override_pattern": lambda found: "M" * len(layers_of(found["num_layers"])),
                "ffn_hidden_size": same_as("hidden_size"),  # no layer has such; Megatron's must have positive sizes
                "num_attention_heads": _heads,
                "num_query_groups": _heads,
                "kv_channels": lambda found: max(1, found["hidden_size"] // _heads(found)),
            }),
            _Expand(),
            _Padding(),
            _Steps(),
        ),
        variants=(Variant("backbone.embedding.weight", ("backbone.embeddings.weight",)),),
        foreign=_from_state_spaces,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.ssm",
        model="MambaModel",
        configs=("SSMConfig", "BaseMambaConfig*", "NVIDIAMambaConfig8B"),
        without=frozenset({"vocab_size"}),
    ),
)  # fmt: skip
