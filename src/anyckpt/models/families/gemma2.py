"""Gemma 2: Gemma with norms after attention and MLP too, soft caps, and a window in every other layer.

transformers gives layers 0, 2, ... the window; NeMo and Bridge 0.3.1 give it to the others.  The hub says what
transformers does.  Tensors were checked against Megatron-Bridge 0.3.1, logits on its model with parity, window and the
outer norms' epsilon put right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import OPTIONAL, Codec, Field, render_fields
from anyckpt.config.model import ModelConfig, whole
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.config.windows import AllBut, LayerWindow
from anyckpt.models.families import gemma
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER
from anyckpt.models.language.rules import Rule

_FC1_NORM = "decoder.layers.*.mlp.linear_fc1.layer_norm_weight"

RULES = (
    *(
        replace(rule, source=("model.layers.*.pre_feedforward_layernorm.weight",)) if rule.hub == _FC1_NORM else rule
        for rule in decoder.RULES
    ),
    Rule(("model.layers.*.post_attention_layernorm.weight",),
         "decoder.layers.*.self_attention.linear_proj.post_layernorm.weight", ("hidden",)),
    Rule(("model.layers.*.post_feedforward_layernorm.weight",),
         "decoder.layers.*.mlp.linear_fc2.post_layernorm.weight", ("hidden",)),
)  # fmt: skip

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_SCALAR = "query_pre_attn_scalar"
SCORES = (
    Field(_SCALAR, _SCALAR, "number", None, unset=lambda config: config.kv_channels, whole=True),
    *(Field(key, key, "number", None, null=True) for key in _CAPS),
)
FIELDS = (*LLAMA_FIELDS, *SCORES)


def caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    """What Megatron-LM lacks."""
    yield from gemma.CAVEATS(config, kind)
    if kind == "megatron-args":
        yield (
            "Megatron-LM has no arguments for norms after attention and MLP, and for soft caps: build the model with "
            "such layers, as Megatron-Bridge's provider does"
        )


def _caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    """And what NVIDIA's classes do in other layers."""
    yield from caveats(config, kind)
    if kind != "hf" and config.window_size is not None:
        yield (
            "NeMo and Megatron-Bridge give the window to the second, fourth, ... layer, transformers to the first, "
            "third, ...: logits differ from the window's length on"
        )


class _Alternating(Codec):
    """NeMo's class has the window in every other layer without saying so; that all have it has to be said."""

    hubs = ("window_attn_skip_freq",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        windowed = reader.pair("window_size") if "window_size" in reader.values else defaults.get("window_size")
        stated = reader.frequency("window_attn_skip_freq")
        if isinstance(stated, tuple) and all(stated):
            return {"window_attn_skip_freq": None}
        return {"window_attn_skip_freq": 2 if windowed is not None and stated is None else stated}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        everywhere = config.window_size is not None and config.window_attn_skip_freq is None
        return {"window_attn_skip_freq": [1] * config.num_layers} if everywhere else {}


def _nemo1(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "name": "megatron_gemma2",
        "apply_embedding_scaling": True,
        "mcore_customization_config": render_fields(SCORES, config),
    }


FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    rules=RULES,
    ignorable=decoder.IGNORABLE,
    traits=gemma.TRAITS,
    recognise=lambda config: config.query_pre_attn_scalar is not None or config.window_size is not None,
    caveats=_caveats,
    nemo1_keys=_nemo1,
    hugging_face=HuggingFace(
        model_types=("gemma2",),
        architectures=("Gemma2ForCausalLM",),
        registered=DECODER,
        fields=FIELDS,
        activation_key="hidden_activation",
        expected=decoder.CAUSAL,
        codecs=(LayerWindow(AllBut(2), unset=4096),),
        keys=frozenset({"hidden_act"}),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.gemma2",
        model="Gemma2Model",
        configs=("Gemma2Config*",),
        fields=tuple(row for row in OPTIONAL if row.hub in (_SCALAR, *_CAPS)),
        codecs=(_Alternating(),),
    ),
    trtllm=TrtLlm(
        ("Gemma2ForCausalLM",),
        "gemma2",
        shares_embedding=True,
        windows=True,
        keys=lambda config: {
            "query_pre_attn_scalar": whole(config.query_pre_attn_scalar or config.kv_channels),
            "final_logit_softcapping": config.final_logit_softcapping,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "inter_layernorms": True,
        },
    ),
)
