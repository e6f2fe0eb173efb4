"""Models of a known family with another head than the one that its rules name, or with none.

A classifier, a reward model or a base model has the family's trunk whole, and beside it what its class has, which is of
no rule.  The facts: the classes of transformers 5.24, and what they write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model import PART_OF
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.complete import some
from anyckpt.models.dialects.wrappers import base_of, unwrapped
from anyckpt.models.hub import Model
from anyckpt.models.language.rules import Rule
from anyckpt.models.to_hub import to_hub
from anyckpt.tensor import LazyTensor

_HEADS = {
    "ForSequenceClassification": ("score.", "classifier.", "classification_head.", "sequence_summary."),
    "ForTokenClassification": ("classifier.", "score."),
    "ForQuestionAnswering": ("qa_outputs.",),
    "ForMultipleChoice": ("classifier.", "sequence_summary.", "score."),
}
"""End of a class's name -> what the names of its head begin with, one of these."""

_OWN_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_ENCODERS = ("EncoderModel", "ForTokenClassification")
"""Ends of classes that have the encoder alone of a model that has a decoder, too."""

_MAY_LACK = re.compile(r"(^|\.)pooler\.")
"""In a trunk, but only of the classes that use it."""


@dataclass(frozen=True)
class Trunk:
    """A model, and what lies beside it.

    Attributes:
        model: the model, with the rules of what its class has.
        tensors: those, and whatever else lies in the layers, by stored name.
        beside: stored names of the others, which are of no rule.
        kind: the class that the configuration names, or empty.
        is_bare: it is stored without the prefix and the head that its class may have.
    """

    model: Model
    tensors: dict[str, LazyTensor]
    beside: tuple[str, ...]
    kind: str
    is_bare: bool

    @property
    def notes(self) -> list[str]:
        """What to say of a copy with the names that it has."""
        notes = []
        if self.beside:
            of = self.kind or "the model"
            notes.append(
                f"what is beside the trunk of {of} is written as it is, for no rule covers it: {some(self.beside)}"
            )
        if self.is_bare and self.kind.endswith(_OWN_HEADS):
            notes.append(f"the head of {self.kind} is not among the weights: load them with transformers' AutoModel")
        return notes


def complete_trunk(checkpoint: Checkpoint, model: Model) -> Trunk | None:
    """The trunk of a model whose class says that it has another head or none, or which is stored so.

    Raises:
        MappingError: something of the trunk is missing or has another shape, or the class's head is missing.
    """
    trunk = trunk_of(checkpoint, model)
    if trunk is None or not (trunk.is_bare or (trunk.kind and not trunk.kind.endswith(_OWN_HEADS))):
        return None
    to_hub(checkpoint.with_weights(trunk.tensors), trunk.model, widen=True)
    return trunk


def has_other_head(checkpoint: Checkpoint) -> bool:
    """Whether a Hugging Face model says that its class has a head which no family's rules name."""
    return checkpoint.config_kind == "hf" and _class_of(checkpoint.config).endswith(tuple(_HEADS))


def trunk_of(checkpoint: Checkpoint, model: Model) -> Trunk | None:
    """The part of a Hugging Face model that its family's rules know; None of other models, and of multimodal ones.

    The head that the rules name is of it unless the class has another head or none.  A model that is stored without
    both its trunk's prefix and that head is a base model, whatever its class: embedding models are published so.

    Raises:
        MappingError: the class has a head that is known and is not there.
    """
    if checkpoint.dialect != "hf" or checkpoint.config_kind != "hf" or PART_OF in model.config.extra:
        return None
    kind, rules = _class_of(checkpoint.config), model.definition.rules
    base, weights = base_of(rules), checkpoint.weights()
    found = unwrapped(weights, rules, False)
    has_own_head = any(not _in_trunk(rule, base) and set(rule.source) & found.tensors.keys() for rule in rules)
    is_bare = found.wrapper.base != found.wrapper.prefix == "" and not has_own_head
    if is_bare or not kind.endswith(_OWN_HEADS):
        rules = tuple(rule for rule in rules if _in_trunk(rule, base) and not _is_absent(rule, found.tensors))
    if kind.endswith(_ENCODERS):
        rules = _without_decoder(rules)
    kept = _of_rules(found.tensors, rules, model)
    tensors: dict[str, LazyTensor] = {}
    beside: dict[str, str] = {}
    for here in found.tensors:
        name = found.renamed.get(here, here)
        if here in kept:
            tensors[name] = weights[name]
        else:
            beside[name] = here.removeprefix(base)
    _check_head(kind, list(beside.values()), checkpoint.path)
    return Trunk(
        replace(model, definition=replace(model.definition, rules=rules)), tensors, tuple(beside), kind, is_bare
    )


def _class_of(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else ""


def _of_rules(names: Iterable[str], rules: Iterable[Rule], model: Model) -> set[str]:
    """Names of the rules, of their other spellings, and of what is ignored; and all that lie in their layers."""
    definition = model.definition
    patterns = {pattern for rule in rules for pattern in rule.source}
    patterns |= {each for variant in definition.hugging_face.variants for each in (variant.stored, *variant.names)}
    patterns |= {pattern for pattern, _ in definition.ignorable}
    patterns |= {name for copy in definition.hugging_face.copies for name in copy}
    stacks = tuple({pattern.partition("*")[0] for pattern in patterns if "*" in pattern})
    return {name for name in names if name in patterns or (bool(stacks) and name.startswith(stacks))}


def _in_trunk(rule: Rule, base: str) -> bool:
    if base and rule.source:
        return any(name.startswith(base) for name in rule.source)
    return not rule.hub.startswith("output_layer.")


def _is_absent(rule: Rule, tensors: Mapping[str, LazyTensor]) -> bool:
    return any(map(_MAY_LACK.search, rule.source)) and not any(name in tensors for name in rule.source)


def _without_decoder(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of the encoder, if there are one and a decoder."""

    def lies_in(stack: str, rule: Rule) -> bool:
        return any(f".{stack}." in f".{name}" for name in rule.source)

    if not any(lies_in("encoder", rule) for rule in rules):
        return rules
    return tuple(rule for rule in rules if not lies_in("decoder", rule))


def _check_head(kind: str, beside: list[str], path: str) -> None:
    for end, heads in _HEADS.items():
        if kind.endswith(end) and not any(name.startswith(heads) for name in beside):
            raise MappingError(
                f"the head of {kind} is missing",
                path=path,
                expected=f"tensors named {' or '.join(f'{head}*' for head in heads)}",
                found=", ".join(beside[:5]) or "none beside the trunk",
                remedy="copy the missing files",
            )
