"""From the hub to any naming; complete, or an error that lists names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from anyckpt.config import meta_names
from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.config.megatron import has_own_modules
from anyckpt.config.model import PART_OF, WHOLE
from anyckpt.config.spellings import Variant
from anyckpt.config.trtllm import class_of
from anyckpt.errors import MappingError
from anyckpt.models.complete import SHOWN, check_complete
from anyckpt.models.dialects import spellings, trtllm
from anyckpt.models.dialects.before_core import own_names
from anyckpt.models.dialects.spellings import with_beside
from anyckpt.models.hub import Hub, Model, Named, head_and_embedding, names_of_meta, remarks
from anyckpt.models.language.rules import Instance
from anyckpt.models.language.variants import stored_names, with_experts
from anyckpt.models.peel import of_another_part, text_alone
from anyckpt.models.vocabulary import resized
from anyckpt.models.wholes import as_published, beside_in_megatron, whole_of
from anyckpt.tensor import LazyTensor

_KINDS = {"nemo-flat": "nemo1", "nemo-sharded": "nemo1", "nemo2": "nemo2"}
"""Whose models have a dialect's names, where it is one framework alone."""


def from_hub(
    hub: Hub,
    dialect: str,
    *,
    padded: bool = True,
    padding: str = "zeros",
    in_place: bool = False,
    experts: str | None = None,
    in_halves: bool = False,
) -> Named:
    """The hub's tensors under another naming; views only.

    For ``hf``, and for Meta's, torchtitan's and TensorRT-LLM's names, the vocabulary is cut to its true size; for
    Megatron's dialects (see ``dialects.DIALECTS``) it is padded to the configuration's ``rows`` with ``zeros`` or by
    ``repeat-last-row``.
    What is to be cut for ranks is padded when it is cut: then ``padded`` is False.

    Everything of the checkpoint that the hub was made of is among the tensors or in ``ignored``.  With ``in_place``
    a larger model of which the hub is the text part stays whole: what no rule knows, the other parts and buffers, is
    among the tensors.  Hugging Face's names are those of that checkpoint if it has such; Megatron-Core's are those of
    its multimodal models; other namings have no such models.  ``experts`` says in which form Hugging Face's names have
    them: ``each`` or ``stacked``; as is usual if None.  With ``in_halves`` blocks are two layers each in Megatron's
    dialects, as HybridModel has them.

    Raises:
        MappingError: hub tensors are missing or of no rule, the true vocabulary is larger than what is stored, or a
            tensor that the family does not have is not zeros.
        UsageError: no such dialect.
    """
    notes: list[str] = []
    if _KINDS.get(dialect) in hub.model.definition.unties and hub.model.config.share_embeddings_and_output_weights:
        hub = _untied(hub, notes)
    model, config = hub.model, hub.model.config
    expected = model.definition.expected(config)
    check_complete([(item.hub,) for item in expected], hub.tensors, model.family, None)
    by_family = dialect == "hf" or dialect in meta_names.SPELLINGS
    rows = config.vocab_size if by_family or dialect == trtllm.NAME else config.rows if padded else None
    tensors = {item.hub: hub.tensors[item.hub] for item in expected}
    for item in expected:
        if item.rule.of_vocabulary:
            tensors[item.hub] = resized(item.hub, tensors[item.hub], rows, config, notes, padding)
    if dialect == trtllm.NAME:
        return _accounted(hub, _by_trtllm_names(tensors, model, notes), notes)
    if not by_family:
        named = _by_megatron_names(tensors, model, dialect, in_halves)
        if in_place and hub.beside and carries_whole(model, dialect):
            notes.append(_carried(hub))
            beside = beside_in_megatron(model, hub.beside)
            return _with_all_parts(hub, with_beside(named, beside, dialect, whole_of(model).language), notes)
        return _accounted(hub, named, notes)
    tensors = _by_family_names(expected, tensors, model)
    notes += remarks(expected)
    variants = with_experts(model.definition.hugging_face.variants, experts, model.family)
    if dialect in meta_names.SPELLINGS:
        named = _by_meta_names(tensors, model, dialect, notes)
    elif in_place and hub.spelling is not None:
        spelling = hub.spelling if experts is None else replace(hub.spelling, variants=variants)
        named = as_written(tensors, model, variants) if spelling.part_of is None else spelling.of(tensors)
        named |= {**hub.spelling.buffers, **hub.spelling.parts}
    elif in_place and hub.beside and carries_whole(model, dialect):
        return _with_all_parts(hub, as_published(model, tensors, hub.beside, experts), notes)
    else:
        named = as_written(tensors, model, variants)
    return _accounted(hub, named, notes)


def _accounted(hub: Hub, named: dict[str, LazyTensor], notes: list[str]) -> Named:
    """Everything of the checkpoint that a hub was made of is among the tensors or ignored."""
    ignored = {name: reason for name, reason in hub.ignored.items() if name not in named}
    spared = hub.spelling.notes if hub.spelling is not None and hub.spelling.parts.keys() <= named.keys() else ()
    return Named(named, ignored, [*(note for note in hub.notes if note not in spared), *notes])


def carries_whole(model: Model, dialect: str) -> bool:
    """Whether a naming has larger models of which a model is the text part."""
    return WHOLE in model.config.extra and dialect in ("hf", "megatron-core")


def _carried(hub: Hub) -> str:
    parts = list(dict.fromkeys(name.partition(".")[0] for name in hub.beside))
    language = whole_of(hub.model).language[:-1]
    return (
        f"the {hub.model.config.extra[PART_OF]} model stays whole: its text part is {language}, and "
        f"{len(hub.beside)} tensors of {', '.join(parts[:SHOWN])} are carried beside it (leave them out with --exclude "
        "for the text part alone)"
    )


def _with_all_parts(hub: Hub, named: dict[str, LazyTensor], notes: list[str]) -> Named:
    """The larger model, of which nothing is left out."""
    parts = hub.beside if hub.spelling is None else hub.spelling.parts
    told = text_alone(hub.model, parts)
    kept = {name: reason for name, reason in hub.ignored.items() if reason != of_another_part(hub.model)}
    return Named(named, kept, [*(note for note in hub.notes if note != told), *notes])


def _by_megatron_names(
    tensors: dict[str, LazyTensor], model: Model, dialect: str, in_halves: bool
) -> dict[str, LazyTensor]:
    """Under the names of a dialect of Megatron's, with what the family has before them there."""
    if dialect == "nemo-flat" and has_own_modules(model.config):
        tensors = own_names(tensors)
    numbered = model.config.heterogeneous_blocks is not None
    named = spellings.from_hub_names(tensors, dialect, numbered=numbered, in_halves=in_halves)
    prefix = model.definition.prefixes.get(dialect)
    if prefix is None:
        return named
    usual = spellings.DIALECTS[dialect].prefix
    return {prefix + name.removeprefix(usual): tensor for name, tensor in named.items()}


def _by_family_names(
    expected: Sequence[Instance], tensors: Mapping[str, LazyTensor], model: Model
) -> dict[str, LazyTensor]:
    """The hub's tensors as those of the family's own names."""
    named: dict[str, LazyTensor] = {}
    for item in expected:
        if not item.sources:
            _check_zero(item.hub, tensors[item.hub], model)
            continue
        parts = item.rule.operation.from_hub(tensors[item.hub], item.config)
        named.update(zip(item.sources, parts, strict=True))
    return named


def _by_meta_names(
    tensors: dict[str, LazyTensor], model: Model, dialect: str, notes: list[str]
) -> dict[str, LazyTensor]:
    """Under Meta's or torchtitan's names; both have an output layer, tied or not."""
    names = names_of_meta(model)
    head, embedding = head_and_embedding(model)
    if model.config.share_embeddings_and_output_weights:
        tensors = {**tensors, head: tensors[embedding]}
    named = meta_names.from_family(tensors, names, model.config, dialect)
    if model.config.share_embeddings_and_output_weights:
        notes.append(f"{list(named)[-1]} is tied to {meta_names.EMBEDDING} and written, too, for its class has it")
    return named


def _by_trtllm_names(tensors: dict[str, LazyTensor], model: Model, notes: list[str]) -> dict[str, LazyTensor]:
    """Under TensorRT-LLM's names; but for a few classes these have an output layer, tied or not."""
    known = class_of(model.definition)
    if model.config.share_embeddings_and_output_weights and not known.shares_embedding:
        tensors = {**tensors, HEAD: tensors[EMBEDDING]}
        notes.append("the output layer is tied to the embedding and written, too, for TensorRT-LLM's class has it")
    return trtllm.from_hub_names(tensors, model.config)


def as_written(
    tensors: Mapping[str, LazyTensor], model: Model, variants: tuple[Variant, ...] | None = None
) -> dict[str, LazyTensor]:
    """Tensors under the family's names as they are written for the class that the model is.

    Args:
        tensors: under the family's names.
        model: what they are of.
        variants: the family's, with those marked that are written, where that is not as usual.
    """
    known = model.definition.hugging_face
    named = stored_names(tensors, known.variants if variants is None else variants)
    if not known.headless(model.config):
        return named
    return {name.removeprefix(known.prefix): tensor for name, tensor in named.items()}


def _untied(hub: Hub, notes: list[str]) -> Hub:
    """The model with an output layer of its own, equal to its embedding."""
    notes.append("NeMo's class of the model shares no weights: its output layer is a copy of the embedding from now on")
    config = replace(hub.model.config, share_embeddings_and_output_weights=False)
    tensors = {**hub.tensors, HEAD: hub.tensors[EMBEDDING]}
    return replace(hub, model=replace(hub.model, config=config), tensors=tensors)


def _check_zero(name: str, tensor: LazyTensor, model: Model) -> None:
    """Read all of a tensor that the family has no place for: a bias, so it is small."""
    plain = tensor.dtype.numpy is not None
    if any(values.view(np.uint8).any() and not (plain and (values == 0).all()) for values in tensor.chunks()):
        raise MappingError(
            f"is not zero, and Hugging Face's models of family {model.family} have no such tensor",
            tensor=name,
            expected="zeros",
            remedy="choose another --family, or convert to one of Megatron's or NeMo's formats",
        )
