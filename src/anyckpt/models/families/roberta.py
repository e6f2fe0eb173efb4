"""RoBERTa and its kin: BERT whose positions are counted from behind the padding token's number.

Checked against transformers 5.24.  Megatron-Core and NeMo count positions from 0, and NVIDIA has no converter, so that
the family goes to containers alone.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.codecs import OfClass
from anyckpt.models.families import bert
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_NAMES = {
    "bert.": "roberta.",
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.": "lm_head.",
}
"""BERT's beginnings of names, and those of this family."""


def _named(name: str) -> str:
    start = next(start for start in _NAMES if name.startswith(start))
    return _NAMES[start] + name[len(start) :]


RULES: tuple[Rule, ...] = tuple(
    replace(rule, source=tuple(map(_named, rule.source)))
    for rule in bert.RULES
    if rule.source and not rule.hub.startswith("binary_head.")
)
_BERT = bert.FAMILY.hugging_face


def family(name: str, title: str, model_type: str, stem: str, like: str = "") -> Family:
    """A family of these layers.

    Args:
        name: its name.
        title: for people.
        model_type: as transformers has it.
        stem: what the names of classes begin with.
        like: see ``Family``.
    """
    ends = {"ForMaskedLM": {"add_lm_head": True}, "ForCausalLM": {"add_lm_head": True}, "Model": {"add_pooler": True}}
    return Family(
        name=name,
        title=title,
        rules=RULES,
        ignorable=tuple((pattern.replace("bert.", "roberta.", 1), why) for pattern, why in bert.FAMILY.ignorable),
        traits=bert.FAMILY.traits,
        refine=bert.FAMILY.refine,
        recognise=lambda config: False,
        nemo1=False,
        megatron=False,
        dimensions=bert.FAMILY.dimensions,
        like=like,
        hugging_face=replace(
            _BERT,
            model_types=(model_type,),
            defaults_of=model_type,
            architectures=(f"{stem}ForMaskedLM",),
            codecs=(OfClass(stem, ends, told_by=("add_lm_head",)),),
            prefix="roberta.",
            copies=(("lm_head.decoder.bias", "lm_head.bias"),),
            variants=(),
        ),
    )


FAMILY = family("roberta", "RoBERTa", "roberta", "Roberta")
