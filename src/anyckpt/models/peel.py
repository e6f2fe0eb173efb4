"""A checkpoint's tensors under the names that tell what each of them is, however it spells them.

A spelling is a wrapper's prefix, Meta's or a Megatron dialect's names, experts in one tensor, a copy under a second
name, an output layer that is tied, or what carries no weights.  All are peeled off here, and what is left knows the
stored name of each for messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.config import meta_names
from anyckpt.config.hub_names import EMBEDDING, HEADS
from anyckpt.config.model import PART_OF, WHOLE
from anyckpt.config.starred import starred
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.models.complete import SHOWN, check_complete, some
from anyckpt.models.copies import check_tied, drop_copies
from anyckpt.models.dialects import spellings, trtllm
from anyckpt.models.dialects.wrappers import unwrapped
from anyckpt.models.hub import Model, head_and_embedding, names_of_meta
from anyckpt.models.language.rules import Instance
from anyckpt.models.language.variants import family_names, fitting, stored_name
from anyckpt.models.spelling import Spelling, variants_of
from anyckpt.models.wholes import beside_from_megatron
from anyckpt.tensor import Constant, LazyTensor


@dataclass(frozen=True)
class Peeled:
    """Every tensor of a model, and no other.

    Attributes:
        model: what they are of.
        path: of the checkpoint, for messages.
        tensors: by the family's own names, or by the hub's.
        ignored: stored names of what was left out, with the reason.
        spelling: how the checkpoint spells the family's names; None if the names are the hub's.
        beside: as in ``Hub``.
    """

    model: Model
    path: str
    tensors: dict[str, LazyTensor]
    ignored: dict[str, str]
    spelling: Spelling | None = None
    beside: dict[str, LazyTensor] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The name of one of the tensors in the checkpoint, as messages have it."""
        return name if self.spelling is None else self.spelling.stored(name)


def peel(checkpoint: Checkpoint, model: Model, expected: Sequence[Instance]) -> Peeled:
    """The tensors of a model; nothing is read but samples of what is there twice.

    Args:
        checkpoint: with names of any dialect.
        model: what it was identified as.
        expected: what the model consists of.

    Raises:
        MappingError: a tensor is missing or of no rule, two are the same one, what is tied differs, or the names are
            of no dialect.
    """
    weights, path = checkpoint.weights(), checkpoint.path
    dialect = checkpoint.dialect or spellings.detect(weights)
    if dialect == "hf":
        found = unwrapped(weights, model.definition.rules, PART_OF in model.config.extra)
        spelling = _spelling(model, {name: weights[name] for name in found.others})
        peeled = _of_family(found.tensors, replace(spelling, stored=found.stored), model, expected, path)
        return replace(peeled, beside=spelling.common_parts())
    if dialect in meta_names.SPELLINGS:
        named = meta_names.to_family(weights, names_of_meta(model), model.config)
        peeled = _of_family(named.tensors, replace(_spelling(model), stored=named.stored), model, expected, path)
        return replace(peeled, ignored={**peeled.ignored, **named.ignored})
    if dialect is None:
        raise MappingError(
            "the names are neither Hugging Face's nor Megatron's",
            path=path,
            found=some(weights),
            remedy="convert names unchanged, to safetensors, torch or dcp",
        )
    return _of_hub(weights, model, expected, path)


def _of_hub(weights: dict[str, LazyTensor], model: Model, expected: Sequence[Instance], path: str) -> Peeled:
    """From TensorRT-LLM's names or a Megatron dialect; what a checkpoint may lack is made."""
    text, beside = spellings.text_and_beside(weights)
    if trtllm.is_of(weights):
        tensors, ignored = trtllm.to_hub_names(weights, model.config), dict[str, str]()
    else:
        in_blocks = model.config.hybrid_override_pattern is None
        tensors, ignored = spellings.to_hub_names(text, in_blocks=in_blocks)
    for name in list(tensors):
        reason = model.definition.reason_to_ignore(name)
        if reason is not None and model.definition.nemo_speech is not None:
            ignored[name] = reason
            del tensors[name]
    for head in HEADS:  # the last pipeline stage keeps a copy of the embedding as its output layer
        _drop_tied(tensors, ignored, head, EMBEDDING, model, None)
    ignored |= drop_copies(tensors, model.definition.twins, path)
    for item in expected:
        if item.rule.optional:
            tensors.setdefault(item.hub, Constant(dtype(model.config.dtype or "float32"), item.shape))
    check_complete([(item.hub,) for item in expected], tensors, model.family, path)
    ignored |= {name: of_another_part(model) for name in weights if name not in text}
    if WHOLE in model.config.extra:
        beside = beside_from_megatron(model, beside)
    return Peeled(model, path, tensors, ignored, beside=beside)


def of_another_part(model: Model) -> str:
    """Why a tensor of a larger model is left out."""
    return f"of another part of the {model.config.extra.get(PART_OF, 'larger')} model than its text"


def _of_family(
    tensors: Mapping[str, LazyTensor], spelling: Spelling, model: Model, expected: Sequence[Instance], path: str
) -> Peeled:
    """From what has no wrapper any more; the spelling becomes whole."""
    known, stored = model.definition.hugging_face, spelling.stored
    kept: dict[str, LazyTensor] = {}
    buffers: dict[str, LazyTensor] = {}
    ignored: dict[str, str] = {}
    wanted = {name for item in expected for name in item.sources} if model.definition.ignorable else set[str]()
    for name, tensor in tensors.items():
        reason = None if name in wanted else model.definition.reason_to_ignore(name)
        if reason is None:
            kept[name] = tensor
            continue
        own = stored(name)
        ignored[own] = reason
        if spelling.part_of is not None or own == name:
            buffers[own] = tensor
    ignored |= dict.fromkeys(spelling.parts, of_another_part(model))
    variants = known.variants
    if len({variant.stored for variant in variants}) < len(variants):
        shapes = {
            name: tuple(shape)
            for item in expected
            for name, shape in zip(
                item.sources,
                item.rule.operation.source_shapes(item.shape, item.config) if item.sources else (),
                strict=True,
            )
        }
        variants = fitting(kept, variants, shapes)
    spelling = replace(spelling, buffers=buffers, variants=variants_of(kept, variants))
    if any(variant.written for variant in known.variants):
        _check_as_written(kept, model, expected, path, spelling)
    kept = family_names(kept, variants)
    dropped = drop_copies(kept, known.copies, path)
    _drop_tied(kept, dropped, *head_and_embedding(model), model, path)
    ignored |= {stored(name): reason for name, reason in dropped.items()}
    check_complete([item.sources for item in expected], kept, model.family, path, stored)
    return Peeled(model, path, kept, ignored, spelling)


def _check_as_written(
    kept: Mapping[str, LazyTensor], model: Model, expected: Sequence[Instance], path: str, spelling: Spelling
) -> None:
    """Where all tensors have the names that are written, those are what messages tell of."""
    variants = model.definition.hugging_face.variants
    others = [starred(variant.stored) for variant in variants if not variant.written]
    if any(other.fullmatch(name) for name in kept for other in others):
        return  # they are spelled in another way
    if all(stored_name(name, variants) == name for name in kept):
        whole = dict.fromkeys(stored_name(name, variants) for item in expected for name in item.sources)
        check_complete([tuple(whole)], kept, model.family, path, spelling.stored)


def _drop_tied(
    tensors: dict[str, LazyTensor], dropped: dict[str, str], head: str, embedding: str, model: Model, path: str | None
) -> None:
    """Take out a stored output layer of a model that is tied; transformers ignores it too."""
    if model.config.share_embeddings_and_output_weights and head in tensors and embedding in tensors:
        check_tied(head, tensors[head], tensors[embedding], path)
        del tensors[head]
        dropped[head] = f"tied to {embedding}"


def _spelling(model: Model, parts: Mapping[str, LazyTensor] | None = None) -> Spelling:
    """Of a model and the other parts of the one that it is a part of, which are told of."""
    part_of = model.config.extra.get(PART_OF)
    if not parts:
        return Spelling(part_of)
    return Spelling(part_of, parts, notes=(text_alone(model, parts),))


def text_alone(model: Model, parts: Iterable[str]) -> str:
    """What is said where only the text part of a larger model is taken."""
    names = [name.removeprefix("model.") for name in parts]
    beside = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return (
        f"only the text part of the {model.config.extra.get(PART_OF, 'larger')} model is taken: {len(names)} tensors "
        f"of {', '.join(beside[:SHOWN])} are left out"
    )
