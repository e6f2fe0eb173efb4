"""From a checkpoint to the hub and from the hub to any naming; complete, or an error that lists names.

The hub's tensors have Megatron-Core's names in Transformer Engine spelling, whole, one per layer
(``decoder.layers.3.self_attention.linear_qkv.weight``), with the vocabulary rows that are stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.config import meta_names
from anyckpt.config.hub_names import EMBEDDING, HEAD, HEADS
from anyckpt.config.megatron import has_own_modules
from anyckpt.config.model import PART_OF, WHOLE_NORMS, ModelConfig, padded
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.models.complete import SHOWN, check_complete, some
from anyckpt.models.copies import check_tied, drop_copies
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.before_core import own_names
from anyckpt.models.dialects.wrappers import unwrapped
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Instance
from anyckpt.models.language.variants import family_names, stored_name, stored_names
from anyckpt.models.spelling import Spelling, variants_of
from anyckpt.tensor import Constant, LazyTensor, Mapped, concatenate


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
    """

    model: Model
    tensors: dict[str, LazyTensor]
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    restated: dict[str, Any] = field(default_factory=dict)
    spelling: Spelling | None = None


class Named(NamedTuple):
    """Tensors under a dialect's names, what was left out on the way to the hub and from it, and all notes."""

    tensors: dict[str, LazyTensor]
    ignored: dict[str, str]
    notes: list[str]


def to_hub(checkpoint: Checkpoint, model: Model, *, widen: bool = False) -> Hub:
    """The weights of a checkpoint under the hub's names; views only, nothing is read but samples of a redundant head.

    Args:
        checkpoint: with names of any dialect.
        model: what it was identified as.
        widen: parts of one fused tensor that are of different floating-point types become float32, or float64 if one
            is, which is exact: for weights that will be cast.

    Raises:
        MappingError: a tensor or a layer is missing, a stored name is of no rule, a shape contradicts the
            configuration, or a redundant output layer differs from the embedding that it is tied to.
    """
    weights = checkpoint.weights()
    dialect = checkpoint.dialect or spellings.detect(weights)
    if dialect == "hf":
        return _from_family_names(weights, model, checkpoint.path, widen)
    if dialect in meta_names.SPELLINGS:
        return _from_meta_names(weights, model, checkpoint.path, widen)
    if dialect is None:
        raise MappingError(
            "the names are neither Hugging Face's nor Megatron's",
            path=checkpoint.path,
            found=some(weights),
            remedy="convert names unchanged, to safetensors, torch or dcp",
        )
    named, ignored = spellings.to_hub_names(weights)
    notes = list(model.notes)
    expected = model.definition.expected(model.config)
    _drop_tied_copy(named, model, ignored)
    ignored |= drop_copies(named, model.definition.twins, checkpoint.path)
    for item in expected:
        if item.rule.optional:
            named.setdefault(item.hub, Constant(dtype(model.config.dtype or "float32"), item.shape))
    check_complete([(item.hub,) for item in expected], named, model.family, checkpoint.path)
    for item in expected:
        _check_shape(item.hub, named[item.hub], item.shape, item, model, checkpoint.path)
    hub = Hub(model, {item.hub: named[item.hub] for item in expected}, ignored, notes)
    return _with_centred_norms(hub) if WHOLE_NORMS in model.config.extra else hub


def _with_centred_norms(hub: Hub) -> Hub:
    """Norms that are stored as gamma, as gamma - 1: computed in float32 and rounded to their own type."""
    config = hub.model.config
    plain = replace(config, extra={key: value for key, value in config.extra.items() if key != WHOLE_NORMS})
    tensors = {
        name: Mapped((tensor,), tensor.dtype, _less_one) if name.endswith(_NORM_WEIGHTS) else tensor
        for name, tensor in hub.tensors.items()
    }
    note = "norms are stored as gamma; the family's are gamma - 1, which is computed"
    model = replace(hub.model, config=plain)
    return Hub(model, tensors, hub.ignored, [*hub.notes, note], {"layernorm_zero_centered_gamma": True})


_NORM_WEIGHTS = ("norm.weight", "norm_weight")


def _less_one(gamma: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    wide = gamma.astype(np.float64 if gamma.dtype.itemsize == 8 else np.float32)
    return (wide - 1).astype(gamma.dtype)


def _from_meta_names(weights: dict[str, LazyTensor], model: Model, path: str, widen: bool) -> Hub:
    named = meta_names.to_family(weights, _meta_names(model), model.config)
    hub = _from_family_names(named.tensors, model, path, widen, named.stored)
    hub.ignored |= named.ignored
    return hub


def _meta_names(model: Model) -> meta_names.MetaNames:
    if model.definition.meta is None:
        raise MappingError(
            f"Meta's and torchtitan's code have no models of family {model.family}",
            remedy="convert to another naming, or to safetensors, torch or dcp, which keep names",
        )
    return model.definition.meta


def _from_family_names(
    weights: dict[str, LazyTensor], model: Model, path: str, widen: bool, spelled: Callable[[str], str] = str
) -> Hub:
    """The hub's tensors from the family's; ``spelled`` gives stored names where the family's were made of them."""
    definition, config = model.definition, model.config
    expected = definition.expected(config)
    found = unwrapped(weights, definition.rules, PART_OF in config.extra)

    def stored(name: str) -> str:
        return spelled(found.stored(name))

    ignorable = _ignorable(found.tensors, definition)
    kept = {name: tensor for name, tensor in found.tensors.items() if name not in ignorable}
    part_of, left_out = config.extra.get(PART_OF), tuple(_left_out(found.others, config))
    spelling = Spelling(
        part_of,
        parts={name: weights[name] for name in found.others},
        buffers={
            stored(name): found.tensors[name] for name in ignorable if part_of is not None or found.stored(name) == name
        },
        variants=variants_of(kept, definition.hugging_face.variants),
        stored=stored,
        notes=left_out,
    )
    ignored = {stored(name): reason for name, reason in ignorable.items()}
    ignored |= dict.fromkeys(found.others, f"of another part of the {part_of} model than its text")
    variants = definition.hugging_face.variants
    if any(variant.written for variant in variants) and all(stored_name(name, variants) == name for name in kept):
        whole = {stored_name(name, variants): None for item in expected for name in item.sources}
        check_complete([tuple(whole)], kept, model.family, path, stored)
    kept = family_names(kept, variants)
    copies = drop_copies(kept, definition.hugging_face.copies, path)
    ignored |= {stored(name): reason for name, reason in copies.items()}
    ignored |= {stored(name): reason for name, reason in _redundant_heads(kept, model, path).items()}
    check_complete([item.sources for item in expected], kept, model.family, path, stored)
    tensors: dict[str, LazyTensor] = {}
    for item in expected:
        if not item.sources:
            tensors[item.hub] = Constant(dtype(config.dtype or "float32"), item.shape)
            continue
        operation = item.rule.operation
        sources = [kept[name] for name in item.sources]
        shapes = operation.source_shapes(item.shape, item.config)
        for name, tensor, shape in zip(item.sources, sources, shapes, strict=True):
            _check_shape(stored(name), tensor, shape, item, model, path)
        if any(tensor.dtype != sources[0].dtype for tensor in sources):
            sources = _of_one_type([stored(name) for name in item.sources], sources, widen, path)
        tensors[item.hub] = operation.to_hub(sources, item.config)
    return Hub(model, tensors, ignored, [*model.notes, *_remarks(expected), *left_out], spelling=spelling)


def _of_one_type(names: Sequence[str], parts: list[LazyTensor], widen: bool, path: str) -> list[LazyTensor]:
    """The parts of a fused tensor, of different types, widened if they may be.

    Raises:
        MappingError: they may not.
    """
    other = next(number for number, part in enumerate(parts) if part.dtype != parts[0].dtype)
    numbers = all(part.dtype.is_floating and part.dtype.itemsize > 1 for part in parts)
    if not (numbers and widen):
        raise MappingError(
            "parts of one fused tensor have different element types",
            path=path,
            tensor=names[other],
            expected=parts[0].dtype.name,
            found=parts[other].dtype.name,
            remedy="cast all with --dtype" if numbers else "copy the weight files again from the model's origin",
        )
    widest = dtype("float64" if any(part.dtype.itemsize == 8 for part in parts) else "float32")
    return [part.cast(widest) for part in parts]


def from_hub(hub: Hub, dialect: str, *, padded: bool = True, padding: str = "zeros", in_place: bool = False) -> Named:
    """The hub's tensors under another naming; views only.

    For ``hf``, and for Meta's and torchtitan's names, the vocabulary is cut to its true size; for Megatron's dialects
    (see ``dialects.DIALECTS``) it is padded to the configuration's ``rows`` with ``zeros`` or by ``repeat-last-row``.
    What is to be cut for ranks is padded when it is cut: then ``padded`` is False.

    Everything of the checkpoint that the hub was made of is among the tensors or in ``ignored``.  With ``in_place``
    Hugging Face's names are those of that checkpoint if it is a larger model of which the hub is the text part, and
    what no rule knows is among the tensors: the other parts, and buffers.

    Raises:
        MappingError: hub tensors are missing or of no rule, the true vocabulary is larger than what is stored, or a
            tensor that the family does not have is not zeros.
        UsageError: no such dialect.
    """
    notes: list[str] = []
    if _KINDS.get(dialect) in hub.model.definition.unties and hub.model.config.share_embeddings_and_output_weights:
        hub = _untied(hub, notes)
    definition, config = hub.model.definition, hub.model.config
    expected = definition.expected(config)
    check_complete([(item.hub,) for item in expected], hub.tensors, hub.model.family, None)
    by_family = dialect == "hf" or dialect in meta_names.SPELLINGS
    rows = config.vocab_size if by_family else config.rows if padded else None
    resized = {
        item.hub: _resize_vocabulary(item.hub, hub.tensors[item.hub], rows, config, notes, padding)
        if item.rule.of_vocabulary
        else hub.tensors[item.hub]
        for item in expected
    }
    if not by_family:
        numbered = config.heterogeneous_blocks is not None
        if dialect == "nemo-flat" and has_own_modules(config):
            resized = own_names(resized)
        named = spellings.from_hub_names(resized, dialect, numbered=numbered)
        prefix = definition.prefixes.get(dialect)
        if prefix is not None:
            usual = spellings.DIALECTS[dialect].prefix
            named = {prefix + name.removeprefix(usual): tensor for name, tensor in named.items()}
        return _accounted(hub, named, notes)
    tensors = _family_tensors(expected, resized, hub.model)
    notes += _remarks(expected)
    if dialect in meta_names.SPELLINGS:
        return _accounted(hub, _by_meta_names(tensors, hub.model, dialect, notes), notes)
    if not in_place or hub.spelling is None:
        return _accounted(hub, as_written(tensors, hub.model), notes)
    whole = hub.spelling.part_of is None
    named = as_written(tensors, hub.model) if whole else hub.spelling.of(tensors)
    return _accounted(hub, {**named, **hub.spelling.buffers, **hub.spelling.parts}, notes)


def _accounted(hub: Hub, named: dict[str, LazyTensor], notes: list[str]) -> Named:
    """Everything of the checkpoint that a hub was made of is among the tensors or ignored."""
    ignored = {name: reason for name, reason in hub.ignored.items() if name not in named}
    spared = hub.spelling.notes if hub.spelling is not None and hub.spelling.parts.keys() <= named.keys() else ()
    return Named(named, ignored, [*(note for note in hub.notes if note not in spared), *notes])


def _family_tensors(
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
    names = _meta_names(model)
    head, embedding = head_and_embedding(model)
    if model.config.share_embeddings_and_output_weights:
        tensors = {**tensors, head: tensors[embedding]}
    named = meta_names.from_family(tensors, names, model.config, dialect)
    if model.config.share_embeddings_and_output_weights:
        notes.append(f"{list(named)[-1]} is tied to {meta_names.EMBEDDING} and written, too, for its class has it")
    return named


def as_written(tensors: Mapping[str, LazyTensor], model: Model) -> dict[str, LazyTensor]:
    """Tensors under the family's names as they are written for the class that the model is."""
    known = model.definition.hugging_face
    named = stored_names(tensors, known.variants)
    if not known.headless(model.config):
        return named
    return {name.removeprefix(known.prefix): tensor for name, tensor in named.items()}


def _remarks(expected: Iterable[Instance]) -> list[str]:
    """What the operations say of their values, once for each rule."""
    by_rule = {item.rule.hub: item for item in expected if item.sources}
    said = ((name, item.rule.operation.remark(item.config)) for name, item in by_rule.items())
    return [f"{name}: {remark}" for name, remark in said if remark is not None]


_KINDS = {"nemo-flat": "nemo1", "nemo-sharded": "nemo1", "nemo2": "nemo2"}
"""Whose models have a dialect's names, where it is one framework alone."""


def _untied(hub: Hub, notes: list[str]) -> Hub:
    """The model with an output layer of its own, equal to its embedding."""
    notes.append("NeMo's class of the model shares no weights: its output layer is a copy of the embedding from now on")
    config = replace(hub.model.config, share_embeddings_and_output_weights=False)
    tensors = {**hub.tensors, HEAD: hub.tensors[EMBEDDING]}
    return replace(hub, model=replace(hub.model, config=config), tensors=tensors)


def _resize_vocabulary(
    name: str, tensor: LazyTensor, rows: int | None, config: ModelConfig, notes: list[str], padding: str
) -> LazyTensor:
    stored = tensor.shape[0]
    true = config.vocab_size
    if rows is None or stored == rows:
        return tensor
    if true is not None and stored < true:
        raise MappingError(
            "has fewer rows than the vocabulary",
            tensor=name,
            expected=f"at least {true}",
            found=stored,
            remedy="give the right size with --vocab-size",
        )
    if stored > rows:
        notes.append(f"{name}: {stored - rows} padding rows of the vocabulary are cut off")
        return tensor.narrow(0, 0, rows)
    if padding == "repeat-last-row" and stored:
        notes.append(f"{name}: {rows - stored} copies of the last row pad the vocabulary to {rows}")
        return concatenate([tensor] + [tensor.narrow(0, stored - 1, 1)] * (rows - stored), 0)
    notes.append(f"{name}: {rows - stored} zero rows pad the vocabulary to {rows}")
    return tensor.pad(0, rows)


# -- checks --------------------------------------------------------------------------------------------------


def _left_out(names: Sequence[str], config: ModelConfig) -> Iterator[str]:
    """What a user should know of a model that is a part of what is stored."""
    if names:
        parts = dict.fromkeys(name.removeprefix("model.").partition(".")[0] for name in names)
        yield (
            f"only the text part of the {config.extra[PART_OF]} model is taken: {len(names)} tensors of "
            f"{', '.join(list(parts)[:SHOWN])} are left out"
        )


def _check_shape(
    name: str, tensor: LazyTensor, shape: tuple[int, ...], item: Instance, model: Model, path: str | None
) -> None:
    if tensor.shape == shape:
        return
    if item.rule.of_vocabulary and tensor.shape[1:] == shape[1:] and tensor.ndim == len(shape):
        true = model.config.vocab_size
        if true is None or tensor.shape[0] >= true:
            return
    raise MappingError(
        "its shape contradicts the configuration",
        path=path,
        tensor=name,
        expected=shape,
        found=tensor.shape,
        remedy="give the configuration that belongs to these weights with --config",
    )


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


def _ignorable(weights: Mapping[str, LazyTensor], definition: Family) -> dict[str, str]:
    patterns = [
        (re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")), reason) for pattern, reason in definition.ignorable
    ]
    found: dict[str, str] = {}
    for name in weights:
        for pattern, reason in patterns:
            if pattern.fullmatch(name):
                found[name] = reason
    return found


def _redundant_heads(kept: dict[str, LazyTensor], model: Model, path: str) -> dict[str, str]:
    """Take out a stored output layer of a model that is tied: transformers ignores it too."""
    if not model.config.share_embeddings_and_output_weights:
        return {}
    head, embedding = head_and_embedding(model)
    if head not in kept or embedding not in kept:
        return {}
    check_tied(head, kept.pop(head), kept[embedding], path)
    return {head: f"tied to {embedding}"}


def head_and_embedding(model: Model) -> tuple[str, str]:
    """The family's names of the output layer, were it untied, and of the word embedding; "" if it has none."""
    rules = {rule.hub: rule.source[0] for rule in model.definition.rules if rule.source}
    return rules.get(HEAD, "lm_head.weight"), rules.get(EMBEDDING, "")


def _drop_tied_copy(named: dict[str, LazyTensor], model: Model, ignored: dict[str, str]) -> None:
    """Take out the copy of the embedding that a last pipeline stage keeps as its output layer."""
    embedding = named.get(EMBEDDING)
    for name in HEADS:
        head = named.get(name)
        if model.config.share_embeddings_and_output_weights and head is not None and embedding is not None:
            check_tied(name, head, embedding, None)
            del named[name]
            ignored[name] = f"tied to {EMBEDDING}"


def true_vocabulary(rows: int, config: ModelConfig, tokens: int | None) -> tuple[int, str | None]:
    """The true vocabulary of a Megatron checkpoint that has so many rows, and a note on how it was concluded.

    The tokenizer's count is taken if padding it by Megatron's rule, at some power-of-two tensor parallel size, gives
    the stored rows; a vocabulary may be larger than its tokenizer, so otherwise all rows are taken to be true.
    """
    if tokens is not None and tokens < rows:
        multiples = (config.make_vocab_size_divisible_by << shift for shift in range(8))
        if any(padded(tokens, multiple) == rows for multiple in multiples):
            return tokens, f"the vocabulary is taken to be the tokenizer's {tokens} tokens, padded to {rows} rows"
    if tokens == rows:
        return rows, None
    return rows, f"the true vocabulary is not recorded: all {rows} rows of the embedding are taken to be it"
