"""Megatron-BERT: BERT with norms before attention and MLP, as Megatron-Core's BertModel is.

Which heads there are follows from the class, and where a file has more than its class (weights of pre-training under
the name of a masked language model), from its tensors.  Checked by equal logits in Megatron-Core 0.16's BertModel.

Megatron-LM and NeMo 1 always build the head of a language model, and NeMo 2 at least the bias of its output layer; a
model without one is for the encoder alone.  NeMo 1 has token types only in a model with ``bert_binary_head``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied, OfClass, Words
from anyckpt.config.encoder_keys import HEADS
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2, Variant
from anyckpt.indexing import Shape
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule, has, lacks

_LAYER = "bert.encoder.layer.*"
_HUB = "encoder.layers.*"
PARTS = ("weight", "bias")


def embeddings() -> tuple[Rule, ...]:
    """Of words, positions, and types of tokens."""
    return (
        Rule(("bert.embeddings.word_embeddings.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
        Rule(("bert.embeddings.position_embeddings.weight",), "embedding.position_embeddings.weight",
             ("positions", "hidden")),
        Rule(("bert.embeddings.token_type_embeddings.weight",), "embedding.tokentype_embeddings.weight",
             ("token-types", "hidden"), when=has("num_tokentypes")),
    )  # fmt: skip


def matrices() -> tuple[Rule, ...]:
    """A layer's linear maps."""
    own, attention, mlp = f"{_LAYER}.attention", f"{_HUB}.self_attention", f"{_HUB}.mlp"
    query_key_value = tuple(f"{own}.self.{name}" for name in ("query", "key", "value"))
    return (
        *linear(query_key_value, f"{attention}.linear_qkv", ("qkv", "hidden"), INTERLEAVED_QKV),
        *linear(f"{own}.output.dense", f"{attention}.linear_proj", ("hidden", "attention")),
        *linear(f"{_LAYER}.intermediate.dense", f"{mlp}.linear_fc1", ("fc1", "hidden")),
        *linear(f"{_LAYER}.output.dense", f"{mlp}.linear_fc2", ("hidden", "ffn")),
    )


def heads() -> tuple[Rule, ...]:
    """Behind the encoder: the pooler, the head of the language model, the classifier of two classes."""
    transform = "cls.predictions.transform"
    lm_head, pooler, binary = has("add_lm_head"), has("add_pooler"), has("bert_binary_head")
    return (
        *linear("bert.pooler.dense", "pooler.dense", ("hidden", "hidden"), when=pooler),
        *linear(f"{transform}.dense", "lm_head.dense", ("hidden", "hidden"), when=lm_head),
        *norm(f"{transform}.LayerNorm", "lm_head.layer_norm.", lm_head),
        Rule(("cls.predictions.decoder.weight",), "output_layer.weight", ("vocabulary", "hidden"),
             when=decoder.untied_head),
        Rule(("cls.predictions.bias",), "output_layer.bias", ("vocabulary",), when=lm_head),
        Rule((), "output_layer.bias", ("vocabulary",), when=lacks("add_lm_head"), optional=True),
        *linear("cls.seq_relationship", "binary_head", ("two", "hidden"), when=binary),
    )  # fmt: skip


RULES = (
    *embeddings(),
    *norm(f"{_LAYER}.attention.ln", f"{_HUB}.self_attention.linear_qkv.layer_norm_"),
    *norm(f"{_LAYER}.ln", f"{_HUB}.mlp.linear_fc1.layer_norm_"),
    *matrices(),
    *norm("bert.encoder.ln", "encoder.final_layernorm."),
    *heads(),
)

DIMENSIONS = {"token-types": lambda config: config.num_tokentypes, "two": lambda config: 2}
IGNORABLE = tuple(
    (f"{prefix}embeddings.{name}", "numbers of positions, which follow from the configuration")
    for prefix in ("", "bert.")
    for name in ("position_ids", "token_type_ids")
)
FIELDS = (
    Field("num_layers", "num_hidden_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "intermediate_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("num_tokentypes", "type_vocab_size"),
    Field("init_method_std", "initializer_range", "number", 0.02),
    Field("layernorm_epsilon", "layer_norm_eps", "number"),
    Field("attention_dropout", "attention_probs_dropout_prob", "number", 0.1),
    Field("hidden_dropout", "hidden_dropout_prob", "number", 0.1),
    Field("share_embeddings_and_output_weights", "tie_word_embeddings", "flag", True),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
TRAITS = {
    **decoder.LEARNED_TRAITS,
    "activation": "gelu",
    "vision_model_type": None,
}
CONSTANTS = {"is_decoder": False, "add_cross_attention": False}
EXPECTED = {**CONSTANTS, "position_embedding_type": "absolute"}
"""Of an encoder with absolute positions."""


def class_with_heads(stem: str) -> OfClass:
    """Heads by the end of the class's name; a bare model may lack the pooler.

    Args:
        stem: what the names of the classes begin with.
    """
    return OfClass(
        stem,
        {
            "ForPreTraining": {"add_pooler": True, "add_lm_head": True, "bert_binary_head": True},
            "ForMaskedLM": {"add_lm_head": True},
            "LMHeadModel": {"add_lm_head": True},
            "ForCausalLM": {"add_lm_head": True},
            "ForNextSentencePrediction": {"add_pooler": True, "bert_binary_head": True},
            "Model": {"add_pooler": True},
        },
        told_by=("add_lm_head", "bert_binary_head"),
    )


def headless(config: ModelConfig) -> bool:
    """Whether the class is that of the bare encoder."""
    return not (config.add_lm_head or config.bert_binary_head)


def refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """The heads that the tensors have, besides those that the configuration says."""
    types = shapes.get("embedding.tokentype_embeddings.weight")
    may_lack_pooler = headless(config) and bool(shapes)
    return replace(
        config,
        num_tokentypes=config.num_tokentypes or (types[0] if types else 0),
        add_pooler=(config.add_pooler and not may_lack_pooler)
        or any(f"pooler.dense.{part}" in shapes for part in PARTS),
        add_lm_head=config.add_lm_head or any(name.startswith("lm_head.") for name in shapes),
        bert_binary_head=config.bert_binary_head or any(f"binary_head.{part}" in shapes for part in PARTS),
    )


def nemo1_keys(config: ModelConfig) -> Mapping[str, Any]:
    """Keys of ``megatron_bert_config.yaml``."""
    return {
        "mcore_gpt": False,
        "mcore_bert": True,
        "transformer_block_type": config.transformer_block_type,
        "add_pooler": config.add_pooler,
        "add_lm_head": config.add_lm_head,
        "bert_binary_head": config.bert_binary_head,
        "num_tokentypes": config.num_tokentypes,
        "pre_process": True,
        "post_process": True,
        "megatron_legacy": False,
        "attention_backend": "fused",
        "target": "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel",
    }


def megatron_keys(config: ModelConfig) -> Mapping[str, Any]:
    """Arguments of Megatron-LM's ``pretrain_bert.py``."""
    return {"bert_binary_head": config.bert_binary_head}


def caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    """What frameworks build besides the model."""
    if kind in ("nemo1", "megatron-args") and not config.add_lm_head:
        yield (
            "the model has no lm_head, which this framework's BertModel builds: load with strict=False, and use the "
            "encoder's output"
        )
    if kind == "nemo2" and config.add_lm_head:
        yield "NeMo 2's BertModel leaves the bias of its output layer out of the logits: add output_layer.bias to them"
    if kind == "nemo1" and config.num_tokentypes and not config.bert_binary_head:
        yield "NeMo 1 has token types only in a model with bert_binary_head: set it to true to load them"


def _types(found: Mapping[str, Any]) -> int:
    stated: int | None = found["num_tokentypes"]
    return (2 if found["bert_binary_head"] else 0) if stated is None else stated


def nemo2(bert_type: str, model: str, stem: str) -> NeMo2:
    """NeMo 2.5's classes of a kind of BERT.

    Args:
        bert_type: ``megatron`` or ``huggingface``.
        model: the model's class.
        stem: what the names of configuration classes begin with.
    """

    return NeMo2(
        module="nemo.collections.llm.bert.model.bert",
        model=model,
        configs=(f"{stem}Config", f"{stem}BaseConfig", f"{stem}LargeConfig", "BertConfig"),
        codecs=(
            Words("transformer_block_type", "bert_type", {"megatron": "pre_ln", "huggingface": "post_ln"}, bert_type),
            Field("num_tokentypes", "num_tokentypes", default=None),
            *(row for row in HEADS if row.hub != "num_tokentypes"),
            Implied({"num_tokentypes": _types}),
        ),
        without=frozenset({"vocab_size"}),
    )


FAMILY = Family(
    name="megatron-bert",
    title="Megatron-BERT",
    rules=RULES,
    ignorable=IGNORABLE,
    traits={**TRAITS, "transformer_block_type": "pre_ln"},
    features=frozenset({"mcore_bert"}),
    refine=refine,
    nemo1_keys=nemo1_keys,
    megatron_keys=megatron_keys,
    caveats=caveats,
    dimensions=DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("megatron-bert",),
        architectures=("MegatronBertForPreTraining",),
        fields=FIELDS,
        constants=CONSTANTS,
        expected=EXPECTED,
        attention_bias=None,
        codecs=(class_with_heads("MegatronBert"),),
        keys=frozenset({"position_embedding_type"}),
        prefix="bert.",
        headless=headless,
        copies=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
        variants=tuple(
            Variant(f"{stem}.{old}", (f"{stem}.{new}",))
            for stem in ("cls.predictions.transform.LayerNorm",)
            for old, new in (("gamma", "weight"), ("beta", "bias"))
        ),
    ),
    nemo2=nemo2("megatron", "BertModel", "MegatronBert"),
)
