"""BERT, with norms after each residual connection, and what has its names (BERT-style sentence encoders).

Megatron-Core's BertModel has its norms before; NeMo 1 (``transformer_block_type: post_ln``) and NeMo 2
(``bert_type: huggingface``) have layers of their own for it.  NeMo 2.5's, run with Megatron-Core 0.16's local layers,
gave equal outputs, but for the output layer's bias, which NeMo 2 leaves out.  NeMo 1's names were read in NVIDIA's
``convert_bert_hf_to_nemo.py``, not run.  Old files have ``gamma`` and ``beta`` in place of a norm's ``weight`` and
``bias``.
"""

from __future__ import annotations

from collections.abc import Iterable

from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.models.families import megatron_bert
from anyckpt.models.families.parts.modules import norm
from anyckpt.models.language.family import Family

_LAYER = "bert.encoder.layer.*"
_HUB = "encoder.layers.*"

RULES = (
    *megatron_bert.embeddings(),
    *norm("bert.embeddings.LayerNorm", "encoder.initial_layernorm."),
    *megatron_bert.matrices(),
    *norm(f"{_LAYER}.attention.output.LayerNorm", f"{_HUB}.post_att_layernorm."),
    *norm(f"{_LAYER}.output.LayerNorm", f"{_HUB}.post_mlp_layernorm."),
    *megatron_bert.heads(),
)

_OLD = {"weight": "gamma", "bias": "beta"}
_NORMS = [pattern for rule in RULES for pattern in rule.source if ".LayerNorm." in pattern]


def _caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    yield from megatron_bert.caveats(config, kind)
    if kind == "megatron-args":
        yield "Megatron-LM's BertModel has its norms elsewhere: build the model with NeMo's post-LN layers"
    if kind == "nemo1":
        yield (
            "NeMo 1 builds a final norm that the model has not: set model.model.module.encoder.final_layernorm to None "
            "before loading, as NVIDIA's converter does"
        )


FAMILY = Family(
    name="bert",
    title="BERT",
    rules=RULES,
    ignorable=megatron_bert.IGNORABLE,
    traits={**megatron_bert.TRAITS, "transformer_block_type": "post_ln"},
    features=frozenset({"mcore_bert"}),
    refine=megatron_bert.refine,
    nemo1_keys=megatron_bert.nemo1_keys,
    megatron_keys=megatron_bert.megatron_keys,
    caveats=_caveats,
    dimensions=megatron_bert.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("bert",),
        architectures=("BertForPreTraining",),
        fields=megatron_bert.FIELDS,
        constants=megatron_bert.CONSTANTS,
        expected=megatron_bert.EXPECTED,
        attention_bias=None,
        codecs=(megatron_bert.class_with_heads("Bert"),),
        keys=frozenset({"position_embedding_type"}),
        prefix="bert.",
        headless=megatron_bert.headless,
        copies=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
        variants=tuple(
            Variant(f"{stem}.{_OLD[part]}", (pattern,))
            for pattern in _NORMS
            for stem, _, part in (pattern.rpartition("."),)
        ),
    ),
    nemo2=megatron_bert.nemo2("huggingface", "HuggingFaceBertModel", "HuggingFaceBert"),
)
