"""DistilBERT: BERT's layers under other names, without types of tokens and without a pooler.

Checked against transformers 5.24.  NVIDIA has no converter, so that the family goes to containers alone.
"""

from __future__ import annotations

from anyckpt.config.codecs import Fixed, Implied, OfClass
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import bert
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import TIED_AND_TOKENS
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule, has

_STEM = "distilbert"
_LAYER, _HUB = f"{_STEM}.transformer.layer.*", "encoder.layers.*"
_LM_HEAD = has("add_lm_head")


RULES = (
    Rule((f"{_STEM}.embeddings.word_embeddings.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_STEM}.embeddings.position_embeddings.weight",), "embedding.position_embeddings.weight",
         ("positions", "hidden")),
    *norm(f"{_STEM}.embeddings.LayerNorm", "encoder.initial_layernorm."),
    *linear(tuple(f"{_LAYER}.attention.{which}_lin" for which in "qkv"), f"{_HUB}.self_attention.linear_qkv",
            ("qkv", "hidden"), INTERLEAVED_QKV),
    *linear(f"{_LAYER}.attention.out_lin", f"{_HUB}.self_attention.linear_proj", ("hidden", "attention")),
    *norm(f"{_LAYER}.sa_layer_norm", f"{_HUB}.post_att_layernorm."),
    *linear(f"{_LAYER}.ffn.lin1", f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden")),
    *linear(f"{_LAYER}.ffn.lin2", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn")),
    *norm(f"{_LAYER}.output_layer_norm", f"{_HUB}.post_mlp_layernorm."),
    *linear("vocab_transform", "lm_head.dense", ("hidden", "hidden"), when=_LM_HEAD),
    *norm("vocab_layer_norm", "lm_head.layer_norm.", _LM_HEAD),
    Rule(("vocab_projector.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied_head),
    Rule(("vocab_projector.bias",), "output_layer.bias", ("vocabulary",), when=_LM_HEAD),
)  # fmt: skip

_TRAITS = {trait: value for trait, value in bert.FAMILY.traits.items() if trait != "activation"}

FAMILY = Family(
    name="distilbert",
    title="DistilBERT",
    rules=RULES,
    ignorable=tuple((pattern.replace("bert.", f"{_STEM}.", 1), why) for pattern, why in bert.FAMILY.ignorable),
    traits=_TRAITS,
    refine=bert.FAMILY.refine,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    hugging_face=HuggingFace(
        model_types=("distilbert",),
        architectures=("DistilBertForMaskedLM",),
        fields=(
            Field("num_layers", "n_layers", aliases=("num_hidden_layers",)),
            Field("hidden_size", "dim", aliases=("hidden_size",)),
            Field("ffn_hidden_size", "hidden_dim"),
            Field("num_attention_heads", "n_heads", aliases=("num_attention_heads",)),
            Field("vocab_size", "vocab_size"),
            Field("max_position_embeddings", "max_position_embeddings"),
            Field("init_method_std", "initializer_range", "number", 0.02),
            Field("attention_dropout", "attention_dropout", "number", 0.1),
            Field("hidden_dropout", "dropout", "number", 0.1),
            *TIED_AND_TOKENS,
        ),
        activation_key="activation",
        attention_bias=None,
        codecs=(
            Implied({"layernorm_epsilon": 1e-12}, "DistilBERT has one epsilon"),
            Fixed({"sinusoidal_pos_embds": False}, "what is known", written=False),
            OfClass("DistilBert", {"ForMaskedLM": {"add_lm_head": True}, "Model": {}}, told_by=("add_lm_head",)),
        ),
        keys=frozenset({"qa_dropout", "seq_classif_dropout"}),
        prefix=f"{_STEM}.",
        headless=lambda config: not config.add_lm_head,
    ),
)
