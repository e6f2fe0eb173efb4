"""Llama 3.2 Vision's text part: Llama's layers, and between them some that look at the picture instead of the text.

Names are near those of Megatron-Core's cross attention, which has neither their norms nor their gates, so that the
family goes to containers alone; NeMo 2 has modules of its own for it.  Eight tokens more than the output layer knows
have embeddings.  Outputs were checked against transformers 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.by_layer import Carried
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import INTERLEAVED_KV
from anyckpt.models.language.rules import Rule

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"
_TYPE = "mllama_text_model"
_KEYS = Carried(_TYPE)
_CROSSING = "cross_attention_layers"
_FIRST, _EVERY = 3, 5  # of the layers that look where no key says which, as far as the largest model has them
_MORE_TOKENS = 8


def _looks(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether a layer attends to the picture."""
    listed = _KEYS.reader(config).values.get(_CROSSING)
    if listed is None:
        return indices[0] in range(_FIRST, 40, _EVERY)
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        raise MappingError(
            f"config.json's {_CROSSING} is of the wrong type", expected="a list of layers", found=repr(listed)[:80]
        )
    return indices[0] in listed


def _reads(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether a layer attends to the text."""
    return not _looks(config, indices)


def _of_llama(rule: Rule) -> Rule:
    """Llama's rule, of the layers that have such a tensor."""
    if rule.hub.startswith("embedding."):
        return replace(rule, shape=("embedded", "hidden"))
    return replace(rule, when=_reads) if "self_attention" in rule.hub else rule


def _cross(source: str, hub: str, shape: tuple[str, ...]) -> Rule:
    return Rule((f"{_LAYER}.cross_attn{source}",), f"{_HUB}.{hub}", shape, when=_looks, partition="alone")


_KEY_VALUE = tuple(f"{_LAYER}.cross_attn.{which}_proj.weight" for which in "kv")

FAMILY = Family(
    name="mllama",
    title="Llama 3.2 Vision (text)",
    rules=(
        *(_of_llama(rule) for rule in decoder.RULES if not rule.hub.endswith(".bias")),
        Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.cross_attention.linear_q.layer_norm_weight", ("hidden",),
             when=_looks),
        _cross(".q_proj.weight", "cross_attention.linear_q.weight", ("attention", "hidden")),
        Rule(_KEY_VALUE, f"{_HUB}.cross_attention.linear_kv.weight", ("key-value", "hidden"), INTERLEAVED_KV, _looks,
             partition="alone"),
        _cross(".q_norm.weight", "cross_attention.q_layernorm.weight", ("head",)),
        _cross(".k_norm.weight", "cross_attention.k_layernorm.weight", ("head",)),
        _cross(".o_proj.weight", "cross_attention.linear_proj.weight", ("hidden", "attention")),
        _cross("_attn_gate", "cross_attention.gate", ("one",)),
        _cross("_mlp_gate", "mlp.gate", ("one",)),
    ),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    unmapped=frozenset({"NeMo 2"}),
    dimensions={
        "embedded": lambda config: (config.vocab_size or 0) + _MORE_TOKENS,
        "key-value": lambda config: 2 * config.num_query_groups * config.kv_channels,
    },
    hugging_face=HuggingFace(
        model_types=(_TYPE,),
        architectures=("MllamaForCausalLM",),
        fields=(
            *llama_fields_without("attention_dropout", "kv_channels"),
            Field("attention_dropout", "dropout", "number", 0.0),
        ),
        rotary_base=500_000.0,
        attention_bias=None,
        carried=frozenset({_CROSSING}),
    ),
)  # fmt: skip
