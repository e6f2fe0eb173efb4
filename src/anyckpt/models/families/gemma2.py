"""Gemma 2: Gemma with norms after attention and MLP too, soft caps, and a window in every other layer.

transformers gives layers 0, 2, ... the window; NeMo and Bridge 0.3.1 give it to the others.  The hub says what
transformers does.  Tensors were checked against Megatron-Bridge 0.3.1, logits on its model with parity, window and the
outer norms' epsilon put right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import Field, ModelConfig, Reader, whole
from anyckpt.config.spellings import HuggingFace, NeMo2, TrtLlm
from anyckpt.config.windows import read_window, write_window
from anyckpt.models.families import gemma
from anyckpt.models.families.parts import decoder
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

FIELDS = (
    Field("layernorm_epsilon", "rms_norm_eps", "number"),
    Field("query_pre_attn_scalar", "query_pre_attn_scalar", "number", None),
    Field("attn_logit_softcapping", "attn_logit_softcapping", "number", None),
    Field("final_logit_softcapping", "final_logit_softcapping", "number", None),
)

KEYS = frozenset({"sliding_window", "layer_types", "hidden_act"})
_WINDOW = 4096


def read(reader: Reader, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Window and the layers that have it."""
    length = reader.integer("sliding_window") if "sliding_window" in reader.values else _WINDOW
    return read_window(reader, length, [layer % 2 == 0 for layer in range(min(found["num_layers"], 10_000))])


def write(config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
    """The keys of ``read``, and those for which null means something else than their absence."""
    return {
        **write_window(config, notes, _WINDOW),
        "query_pre_attn_scalar": whole(config.query_pre_attn_scalar or config.kv_channels),
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    """What Megatron-LM lacks."""
    yield from gemma.caveats(config, kind)
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


def _read_nemo2(reader: Reader, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """NeMo's class has the window in every other layer without saying so."""
    windowed = reader.pair("window_size") if "window_size" in reader.values else defaults.get("window_size")
    stated = reader.frequency("window_attn_skip_freq")
    if isinstance(stated, tuple) and all(stated):
        return {"window_attn_skip_freq": None}
    return {"window_attn_skip_freq": 2 if windowed is not None and stated is None else stated}


def _write_nemo2(config: ModelConfig) -> Mapping[str, Any]:
    """That all layers have the window, which absence does not say."""
    everywhere = config.window_size is not None and config.window_attn_skip_freq is None
    return {"window_attn_skip_freq": [1] * config.num_layers} if everywhere else {}


def _nemo1(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "name": "megatron_gemma2",
        "apply_embedding_scaling": True,
        "mcore_customization_config": {
            "query_pre_attn_scalar": whole(config.query_pre_attn_scalar or config.kv_channels),
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        },
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
        fields=(*COMMON, *FIELDS),
        activation_key="hidden_activation",
        expected=decoder.CAUSAL,
        read=read,
        write=write,
        keys=KEYS,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.gemma2",
        model="Gemma2Model",
        configs=("Gemma2Config*",),
        choose=lambda config: "Gemma2Config",
        fields=FIELDS[1:],
        read=_read_nemo2,
        write=_write_nemo2,
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
