"""ERNIE 4.5 with experts: ERNIE's attention, dense layers at the ends, a bias that chooses experts but does not weigh.

Names are those of Megatron-Bridge 0.6; outputs were checked against transformers 5.24.  Published models have a step
of multi-token prediction, too, which neither of them knows: it reads the trunk after its last norm and has none of its
own, as Megatron-Core's has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Implied, Times
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.errors import MappingError
from anyckpt.models.families import ernie4_5
from anyckpt.models.families.parts import caveats, decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import Leading
from anyckpt.models.language.rules import Rule

_BIAS = "moe_statics.e_score_correction_bias"
_FURTHER = (
    "mtp_emb_norm.*.weight", "mtp_hidden_norm.*.weight", "mtp_linear_proj.*.weight", f"mtp_block.*.*.{_BIAS}",
    *(f"mtp_block.{'.'.join('*' * parts)}.weight" for parts in range(2, 6)),
)  # fmt: skip
_LEFT_OUT = (
    "a step of multi-token prediction, which transformers does not load and Megatron-Core computes otherwise; files of "
    "any names (dcp, safetensors, torch) keep it"
)


class _Layers(Codec):
    """Every so many layers between two have experts."""

    hubs = ("moe_layer_freq",)
    keys = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = [reader.integer(key) for key in self.keys]
        first, last, every = (defaults[k] if v is None else v for k, v in zip(self.keys, stated, strict=True))
        layers = layers_of(found["num_layers"])
        last = len(layers) - 1 if last == -1 else last
        return {
            "moe_layer_freq": sparse.pattern(
                every > 0 and (layer + 1) % every == 0 and first <= layer <= last for layer in layers
            )
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        having = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
        if not having:
            return dict(zip(self.keys, (config.num_layers, config.num_layers - 1, 1), strict=True))
        every = having[1] - having[0] if len(having) > 1 else 1
        if having != list(range(having[0], having[-1] + 1, every)) or (having[0] + 1) % every:
            raise MappingError(
                "transformers' ERNIE has no such layers",
                expected="experts in every so many layers between two",
                found=f"experts in layers {having[:8]}",
            )
        return dict(zip(self.keys, (having[0], having[-1], every), strict=True))


FAMILY = Family(
    name="ernie4-5-moe",
    title="ERNIE 4.5 with experts",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        *sparse.DENSE,
        *sparse.experts(),
        Rule((f"{sparse.LAYER}.mlp.{_BIAS}",), f"{sparse.HUB}.mlp.router.expert_bias", ("experts",), Leading(-1),
             sparse.is_sparse),
        *sparse.shared_experts(),
        *sparse.TRAILING,
    ),
    ignorable=(*decoder.IGNORABLE, *((f"model.{name}", _LEFT_OUT) for name in _FURTHER)),
    traits={
        **ernie4_5.TRAITS,
        "add_bias_linear": False,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_gate": False,
    },
    features=frozenset({"num_moe_experts", "num_experts"}),
    recognise=lambda config: config.num_moe_experts is not None,
    caveats=caveats.of_kind(
        "megatron-args",
        "Megatron-Core has a bias of experts beside scores by sigmoid alone, which Megatron-Bridge takes for ERNIE; "
        "the model's scores are by softmax: what is built so weighs experts otherwise",
    ),
    nemo1=False,
    hugging_face=HuggingFace(
        model_types=("ernie4_5_moe",),
        architectures=("Ernie4_5_MoeForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            Field("num_moe_experts", "moe_num_experts"),
            Field("moe_router_topk", "moe_k"),
            Field("moe_ffn_hidden_size", "moe_intermediate_size"),
            Field("moe_aux_loss_coeff", "router_aux_loss_coef", "number"),
        ),
        constants={"use_bias": False},
        expected={"use_bias": False},
        rotary_base=ernie4_5.THETA,
        attention_bias=None,
        codecs=(
            _Layers(),
            Implied({"moe_router_enable_expert_bias": True}),
            Times("moe_shared_expert_intermediate_size", "moe_num_shared_experts", "moe_ffn_hidden_size", 2),
        ),
        keys=frozenset({"moe_norm_min"}),
        variants=(
            *sparse.STACKED,
            Variant(f"{sparse.LAYER}.mlp.gate.{_BIAS}", (f"{sparse.LAYER}.mlp.{_BIAS}",), in_memory=True),
        ),
    ),
)  # fmt: skip
