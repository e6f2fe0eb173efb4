"""Baichuan 2 (and 1): Llama with query, key and value in one matrix; 7B with rope, 13B with alibi (NeMo 1 alone).

The output layer of Baichuan 2 divides each of its rows by its length before it uses them (``NormHead`` of
``modeling_baichuan.py``).  Megatron's does not, so the hub has the rows as they are used, and equal logits; NVIDIA's
converters copy them as they are stored, which changes the logits.  Baichuan 1 (64,000 tokens) has a plain output layer.
A model that Megatron trained further is exact as Llama (``--family llama``), for its rows need not have length 1.

Names, shapes and keys are those of the released models' own code; vLLM and TensorRT-LLM tell the two generations
apart by the vocabulary, too.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.codecs import Present, Written, same_as
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.apart import RemoteCode
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import CONCATENATED_QKV
from anyckpt.models.language.rules import Rule
from anyckpt.models.language.unit_rows import UnitRows

_PACKED = ("model.layers.*.self_attn.W_pack.weight",)
_FIRST_GENERATION = 64_000  # tokens
_CLASSES = {
    "AutoConfig": "configuration_baichuan.BaichuanConfig",
    "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
}
_OTHERS = ("num_query_groups", "kv_channels", "attention_dropout", "max_position_embeddings")


def has_unit_head(config: ModelConfig) -> bool:
    """Whether the output layer uses rows of length 1."""
    return config.vocab_size != _FIRST_GENERATION


def _packed(rule: Rule) -> Rule:
    """Llama's rule, with Baichuan's matrix of queries, keys and values and its output layer."""
    if rule.hub.endswith("linear_qkv.weight"):
        return replace(rule, source=_PACKED, operation=CONCATENATED_QKV)
    return replace(rule, operation=UnitRows(has_unit_head)) if rule.hub == "output_layer.weight" else rule


FAMILY = Family(
    name="baichuan",
    title="Baichuan 2, Baichuan",
    rules=tuple(_packed(rule) for rule in decoder.RULES if not rule.hub.endswith(".bias")),
    ignorable=decoder.IGNORABLE,
    traits={
        **{name: value for name, value in decoder.TRAITS.items() if name != "position_embedding_type"},
        "add_bias_linear": False,
    },
    recognise=lambda config: (
        config.position_embedding_type == "alibi" and config.num_query_groups == config.num_attention_heads
    ),
    hugging_face=HuggingFace(
        model_types=("baichuan",),
        architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        defaults={
            "vocab_size": 125696,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        fields=(
            *llama_fields_without(*_OTHERS),
            Field("max_position_embeddings", "max_position_embeddings", default=None, aliases=("model_max_length",)),
        ),
        attention_bias=None,
        codecs=(
            Written({"model_max_length": same_as("max_position_embeddings")}),
            # the code of 13B knows no max_position_embeddings, for alibi has no longest sequence
            Present("position_embedding_type", "max_position_embeddings", there="rope", absent="alibi"),
            RemoteCode("baichuan-inc/Baichuan2-7B-Base (or 13B)", _CLASSES),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.baichuan",
        model="Baichuan2Model",
        configs=("Baichuan2Config*",),
        choose=lambda config: "Baichuan2Config7B" if config.hidden_size == 4096 else "Baichuan2Config",
    ),
)
