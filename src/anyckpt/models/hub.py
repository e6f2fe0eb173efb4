"""A model of a known family, and its weights under the hub's names or any other.

The hub's tensors have Megatron-Core's names in Transformer Engine spelling, whole, one per layer
(``decoder.layers.3.self_attention.linear_qkv.weight``), with the vocabulary rows that are stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from typing import Any, NamedTuple

from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.config.meta_names import MetaNames
from anyckpt.config.model import WHOLE, WHOLE_NAMES, ModelConfig
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Instance
from anyckpt.models.spelling import Spelling
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class Model:
    """A model of a known family.

    Attributes:
        family: its name, as in ``--family``.
        config: what it is.
        definition: the family's rules and spellings.
        notes: what was concluded rather than read (a tie, the true vocabulary).
        says_vocabulary: the true vocabulary is what the configuration says, not concluded from rows.
    """

    family: str
    config: ModelConfig
    definition: Family
    notes: tuple[str, ...] = ()
    says_vocabulary: bool = True

    def with_dtype(self, name: str) -> Model:
        """The same model with its weights cast to another type."""
        return replace(self, config=replace(self.config, dtype=name))


@dataclass
class Hub:
    """A model's weights under the hub's names.

    Attributes:
        model: what the weights are of.
        tensors: hub name -> whole tensor, in the order of the family's rules.
        ignored: stored names that were knowingly left out, with the reason.
        notes: what a user should know.
        restated: keys of the configuration as stored that hold no longer for these tensors -> what holds.
        spelling: how the checkpoint spells them, and what else it holds; None if the names are not Hugging Face's.
        beside: the other parts of the larger model whose text part this one is, under Hugging Face's names that do not
            depend on the release of transformers.
    """

    model: Model
    tensors: dict[str, LazyTensor]
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    restated: dict[str, Any] = field(default_factory=dict)
    spelling: Spelling | None = None
    beside: dict[str, LazyTensor] = field(default_factory=dict)


class Named(NamedTuple):
    """Tensors under a dialect's names, what was left out on the way to the hub and from it, and all notes."""

    tensors: dict[str, LazyTensor]
    ignored: dict[str, str]
    notes: list[str]


def without_whole(model: Model) -> Model:
    """The same model as one that is no larger model's text part any more."""
    extra = {key: value for key, value in model.config.extra.items() if key not in (WHOLE, WHOLE_NAMES)}
    return replace(model, config=replace(model.config, extra=extra))


def head_and_embedding(model: Model) -> tuple[str, str]:
    """The family's names of the output layer, were it untied, and of the word embedding; "" if it has none."""
    rules = {rule.hub: rule.source[0] for rule in model.definition.rules if rule.source}
    return rules.get(HEAD, "lm_head.weight"), rules.get(EMBEDDING, "")


def names_of_meta(model: Model) -> MetaNames:
    """How Meta's code names the model's tensors.

    Raises:
        MappingError: it has no such models.
    """
    if model.definition.meta is None:
        raise MappingError(
            f"Meta's and torchtitan's code have no models of family {model.family}",
            remedy="convert to another naming, or to safetensors, torch or dcp, which keep names",
        )
    return model.definition.meta


def remarks(expected: Iterable[Instance]) -> list[str]:
    """What the operations say of their values, once for each rule."""
    by_rule = {item.rule.hub: item for item in expected if item.sources}
    said = ((name, item.rule.operation.remark(item.config)) for name, item in by_rule.items())
    return [f"{name}: {remark}" for name, remark in said if remark is not None]
