"""Bringing a checkpoint's weights under other names: those of a target, or those that two checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from anyckpt import models, quantization
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.hugging_face import with_vocabulary
from anyckpt.config.model import PART_OF
from anyckpt.config.nemo import restated
from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.formats.registry import Format, WriteOptions
from anyckpt.models import Hub, Model
from anyckpt.models.bare_names import Bare
from anyckpt.models.dialects import spellings as dialects
from anyckpt.models.heads import complete_trunk
from anyckpt.models.hub import head_and_embedding
from anyckpt.models.identify import is_foreign
from anyckpt.models.language.parameter_order import REGISTERED, registered_order
from anyckpt.operations.steps.full_precision import obstacle, seen_in_full_precision
from anyckpt.operations.steps.unknown_family import unknown_family
from anyckpt.tensor import LazyTensor

_UNTRANSLATED = "state besides the weights, whose names are not translated between formats"


def identify(checkpoint: Checkpoint, *, family: str | None = None, config: Any = None) -> Model | None:
    """What ``models.identify`` finds, with the file in errors about a configuration.

    Raises:
        MappingError: the configuration contradicts itself, the tensors, or what the family can be, or the weights
            are quantized.
        UsageError: the family is unknown, or the configuration is of no known kind.
    """
    if checkpoint.quantization is not None:
        raise quantization.refusal(checkpoint.quantization, checkpoint.path)
    try:
        return models.identify(checkpoint, family=family, config=config)
    except AnyckptError as error:
        error.path = error.path or (checkpoint.path if config is None else "--config")
        raise


@dataclass(frozen=True)
class Vocabulary:
    """What a user says of a model's vocabulary; None is not said.

    Attributes:
        size: the true one; rows beyond it are padding.
        divisible_by: rows are padded to a multiple of this.
        padding: what fills new rows, ``zeros`` or ``repeat-last-row``.
    """

    size: int | None = None
    divisible_by: int | None = None
    padding: str = "zeros"

    def of(self, hub: Hub) -> Hub:
        """The hub with a model that this is said of."""
        config = hub.model.config
        if self.size is not None:
            config = replace(config, vocab_size=self.size)
        if self.divisible_by is not None:
            config = replace(config, make_vocab_size_divisible_by=self.divisible_by, padded_vocab_size=None)
        return replace(hub, model=replace(hub.model, config=config))


@dataclass(frozen=True)
class Renamed:
    """A checkpoint under a target's names.

    Attributes:
        checkpoint: with the target's names and configuration.
        ignored: stored names that it leaves out -> reason.
        notes: what a user should know.
        computed: some weights are not the stored numbers, so that an optimizer's moments do not go with them.
    """

    checkpoint: Checkpoint
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    computed: bool = False


def rename_for(
    checkpoint: Checkpoint,
    target: Format,
    options: WriteOptions,
    *,
    family: str | None = None,
    config: dict[str, Any] | None = None,
    dtype: str | None = None,
    names: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> Renamed:
    """The weights under the names that ``target`` gives them, and the configuration in its spelling.

    Where the target takes any names and none are asked for, or names weights as the source does, nothing changes.
    Else the model family's rules lead through the hub; where the family is unknown, two Megatron dialects still
    translate by name.

    Args:
        checkpoint: the source.
        target: the format to write.
        options: what the user asked of it.
        family: the model family, where the checkpoint does not tell.
        config: the model's configuration, where the checkpoint has none.
        dtype: what the weights will be cast to, for the configuration to say so, or None.
        names: dialect that the user asks for, where the target takes any names.
        vocabulary: what the user says of it.

    Raises:
        MappingError: names, shapes or configuration do not fit the family, or the model is incomplete.
        UsageError: no rule leads from the source's names to the target's, or the target has names of its own.
    """
    wanted = target.dialect(options)
    if names is not None:
        if wanted not in (None, names):
            raise UsageError(
                f"{target.name} has names of its own", expected=f"{wanted} names", found=names,
                remedy="leave --names out",
            )  # fmt: skip
        wanted = names
    vocabulary = vocabulary or Vocabulary()
    trimmed = vocabulary.size is not None and (wanted is None or wanted == "hf" or names is not None)
    if wanted is None and not trimmed:
        return Renamed(_with_dtype(checkpoint, dtype))
    told = family is not None or config is not None or trimmed
    if config is not None:
        checkpoint = replace(checkpoint, config=config, config_kind=models.config_kind(config))
    elif target.config_kind is not None and not target.unknown_names:
        _check_described(checkpoint, target)
    known = checkpoint.dialect or dialects.detect(checkpoint.weights())
    if wanted is None:
        wanted = known or "hf"
    fits = target.config_kind is None or checkpoint.config_kind is None or _is_spelled(checkpoint, target.config_kind)
    own = checkpoint.format == target.name or (target.unknown_names and bool(checkpoint.config))
    alike = fits and (known == wanted or (known is None and own))
    bare = models.bare_names(checkpoint) if alike and wanted == "hf" else None
    again = partial(
        rename_for, target=target, options=options, family=family, config=config, dtype=dtype, names=names,
        vocabulary=vocabulary,
    )  # fmt: skip
    if bare is not None and bare.wrappers:
        return _unwrapped(checkpoint, bare, again)
    as_stored = alike and not told and not (wanted == "hf" and bare is None)
    model = None if as_stored else identify(checkpoint, family=family, config=config)
    if model is not None:
        try:
            renamed = _through_hub(
                checkpoint, model, wanted, target.config_kind, dtype,
                padded=options.layout is None, vocabulary=vocabulary,
            )  # fmt: skip
        except MappingError:
            if wanted != "hf" or known not in (None, "hf") or trimmed or not fits:
                raise
            other = _of_another_class(checkpoint, model, again)
            if other is None:
                raise
            return replace(other, checkpoint=_with_dtype(other.checkpoint, dtype))
        if names == "hf":
            renamed = _in_registered_order(renamed, model)
        if names == "hf" and model.config.share_embeddings_and_output_weights:
            head, embedding = head_and_embedding(model)
            left_out = f"{head} is tied to {embedding} and left out: load the state dict with strict=False"
            renamed = replace(renamed, notes=(*renamed.notes, left_out))
        return renamed
    if trimmed:
        raise UsageError(
            "which rows are those of the vocabulary is not known without the model's family", path=checkpoint.path,
            found=f"--vocab-size {vocabulary.size}", remedy="name it with --family and --config, or leave it out",
        )  # fmt: skip
    if alike and wanted == "hub" and checkpoint.dialect is None:
        # detected by its names, which may spell norms, experts and halves as the hub does not
        named, ignored = dialects.to_hub_names(checkpoint.weights())
        if list(named) != list(checkpoint.weights()):
            respelled = _with_dtype(_with_weights(checkpoint, named, wanted), dtype)
            return Renamed(respelled, {**state_of(checkpoint), **ignored})
    if alike:
        kept = "" if bare is None or config is None else bare.leading
        note = (
            f"all names begin with {kept}, which is kept, for the model family is unknown: transformers finds these "
            "weights only if its class calls them so"
        )
        return Renamed(_with_dtype(replace(checkpoint, dialect=known), dtype), notes=(note,) if kept else ())
    if dialects.is_megatron(known) and dialects.is_megatron(wanted):
        return _by_dialect(checkpoint, known, wanted, fits, dtype)
    raise unknown_family(checkpoint, target.name, wanted, known)


def _unwrapped(checkpoint: Checkpoint, bare: Bare, again: Callable[[Checkpoint], Renamed]) -> Renamed:
    """The model that was wrapped, renamed; what is left out of it is told under the names that it is stored by."""
    plain = again(_with_weights(checkpoint, bare.tensors, "hf"))
    left_out = {bare.stored.get(name, name): reason for name, reason in plain.ignored.items()}
    around = " and ".join(bare.wrappers)
    note = f"{around} is taken off the names: it is of what was wrapped around the model"
    return replace(plain, ignored={**state_of(checkpoint), **left_out}, notes=(note, *plain.notes))


def _of_another_class(checkpoint: Checkpoint, model: Model, again: Callable[[Checkpoint], Renamed]) -> Renamed | None:
    """A Hugging Face model with another head than its family's rules know, or none, under the names that it has.

    Raises:
        MappingError: its trunk is not whole, or it lacks the head that its class has.
    """
    bare = models.bare_names(checkpoint)
    if bare is None:
        return None
    named = _with_weights(checkpoint, bare.tensors, "hf")
    trunk = complete_trunk(named, model)
    if trunk is None:
        return None
    if bare.wrappers:
        return _unwrapped(checkpoint, bare, again)
    return Renamed(named, state_of(checkpoint), tuple(trunk.notes))


def _check_described(checkpoint: Checkpoint, target: Format) -> None:
    """Raise UsageError for what no framework can load: a model with its training code's hyper-parameters alone."""
    if checkpoint.config and checkpoint.config_kind is None:
        raise UsageError(
            "has hyper-parameters of the code that trained it, and no configuration of the model",
            path=checkpoint.path, expected=f"one that {target.name} or another known format has",
            found=", ".join(map(str, list(checkpoint.config)[:5])),
            remedy="give the model's own with --config, or convert to safetensors, torch or dcp, which need none",
        )  # fmt: skip


def _in_registered_order(renamed: Renamed, model: Model) -> Renamed:
    """The weights as a state dict of transformers has them, and the word that they are, where the order is known."""
    checkpoint = renamed.checkpoint
    order = registered_order(checkpoint.tensors, model.definition.hugging_face.registered)
    if order is None:
        return renamed
    tensors = {name: checkpoint.tensors[name] for name in order}
    return replace(
        renamed, checkpoint=replace(checkpoint, tensors=tensors, details={**checkpoint.details, REGISTERED: True})
    )


def _by_dialect(checkpoint: Checkpoint, known: str, wanted: str, fits: bool, dtype: str | None) -> Renamed:
    renamed, ignored = dialects.rename(checkpoint.weights(), known, wanted)
    notes = ["the model family is unknown: names are translated, and completeness is not checked"]
    named = _with_weights(checkpoint, renamed, wanted)
    if not fits:
        notes.append(
            f"the configuration is left out: only that of a known family is translated from {checkpoint.config_kind}"
        )
        named = replace(named, config={}, config_kind=None)
    return Renamed(_with_dtype(named, dtype), {**state_of(checkpoint), **ignored}, tuple(notes))


def _through_hub(
    checkpoint: Checkpoint,
    model: Model,
    wanted: str,
    config_kind: str | None,
    dtype: str | None,
    *,
    padded: bool,
    vocabulary: Vocabulary,
) -> Renamed:
    hub = vocabulary.of(models.to_hub(checkpoint, model, widen=dtype is not None))
    if vocabulary.size is None and checkpoint.config_kind == "hf" and dialects.detect(checkpoint.weights()) == "hf":
        _check_vocabulary(checkpoint, hub)
    whole = hub.spelling is not None and bool(hub.spelling.parts)
    out = models.from_hub(hub, wanted, padded=padded, padding=vocabulary.padding, in_place=whole)
    renamed = _with_weights(checkpoint, out.tensors, wanted)
    spelled = config_kind is not None and _is_spelled(checkpoint, config_kind)
    if spelled and (whole or PART_OF not in hub.model.config.extra):
        config = restated(checkpoint.config, hub.restated)
        if config_kind == "hf" and vocabulary.size is not None:
            config = with_vocabulary(config, vocabulary.size)
        renamed = _with_dtype(replace(renamed, config=config), dtype)
    elif config_kind is not None:
        described = hub.model if dtype is None else hub.model.with_dtype(dtype)
        config = models.render_config(described, config_kind, notes=out.notes)
        renamed = replace(renamed, config=config, config_kind=config_kind)
    return Renamed(renamed, {**state_of(checkpoint), **out.ignored}, tuple(out.notes), bool(hub.restated))


def _is_spelled(checkpoint: Checkpoint, kind: str) -> bool:
    """Whether the configuration is one of that kind, and not one of a model's own code beside it."""
    return checkpoint.config_kind == kind and not (kind == "hf" and is_foreign(checkpoint.config))


def _check_vocabulary(checkpoint: Checkpoint, hub: Hub) -> None:
    """Raise MappingError for rows that Hugging Face's own class of the model would not have."""
    true, padded = hub.model.config.vocab_size, hub.model.config.padded_vocab_size
    for rule in hub.model.definition.rules:
        tensor = hub.tensors.get(rule.hub) if rule.of_vocabulary else None
        if tensor is not None and true is not None and tensor.shape[0] > max(true, padded or 0):
            raise MappingError(
                "has more rows than the vocabulary of the configuration",
                path=checkpoint.path, tensor=rule.hub, expected=f"{true} rows (vocab_size)",
                found=f"{tensor.shape[0]} rows", remedy="say the true vocabulary with --vocab-size",
            )  # fmt: skip


def _with_weights(checkpoint: Checkpoint, weights: dict[str, LazyTensor], dialect: str) -> Checkpoint:
    return replace(checkpoint, tensors=weights, model_prefix="", state_prefixes=(), objects={}, dialect=dialect)


def _with_dtype(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """With a configuration that says which type the weights have, where it says anything about it.

    Hugging Face's key is ``torch_dtype`` in transformers 4 and ``dtype`` in 5; without it, or with the old one,
    ``from_pretrained(dtype="auto")`` would load a cast model in another type.
    """
    stale = [key for key in ("dtype", "torch_dtype") if isinstance(checkpoint.config.get(key), str)]
    if dtype is None or not stale:
        return checkpoint
    return replace(checkpoint, config={**checkpoint.config, **dict.fromkeys(stale, dtype)})


def state_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What a checkpoint holds besides weights, where only these go through the hub."""
    weights = {checkpoint.model_prefix + name for name in checkpoint.weights()}
    return {name: _UNTRANSLATED for name in (*checkpoint.tensors, *checkpoint.objects) if name not in weights}


@dataclass(frozen=True)
class CommonNames:
    """The tensors of two checkpoints under names that make them meet.

    Attributes:
        a: those of the first.
        b: those of the second.
        kind: ``hub``, ``weights`` or ``stored``.
        notes: what a user should know.
        models: what both are, if that is known.
    """

    a: dict[str, LazyTensor]
    b: dict[str, LazyTensor]
    kind: str
    notes: tuple[str, ...] = ()
    models: tuple[Model, Model] | None = None


def common_names(a: Checkpoint, b: Checkpoint, *, raw: bool) -> CommonNames:
    """Names under which the same weights of two checkpoints meet.

    Hub names where the family of both is known, or of one whose configuration explains the other; else the weights'
    stored names without their common prefix.  Rows that only pad the vocabulary are left out.  Where one side alone
    is quantized, it is compared by its numbers in the other's type; where both are, codes and scales are.

    Args:
        a: a checkpoint.
        b: another.
        raw: all tensors under their stored names instead.
    """
    if raw:
        return CommonNames(a.tensors, b.tensors, "stored")
    if a.quantization is None or b.quantization is None:
        a, b = seen_in_full_precision(a, b), seen_in_full_precision(b, a)
    try:
        models_of = _identify_both(a, b)
        if models_of is not None:
            return _hub_names(models.to_hub(a, models_of[0]), models.to_hub(b, models_of[1]))
        why = "the model family of one side is unknown"
    except MappingError as error:
        if a.quantization is not None and b.quantization is not None:
            why = "both are quantized"
        else:
            why = f"they do not fit the model family: {obstacle(a) or obstacle(b) or error}"
    kinds = [c.dialect or dialects.detect(c.weights()) for c in (a, b)]
    first, second = a.weights(), b.weights()
    if kinds[0] != kinds[1] and all(map(dialects.is_megatron, kinds)):
        first, second = dialects.to_hub_names(first)[0], dialects.to_hub_names(second)[0]
    return CommonNames(first, second, "weights", (f"compared under stored names, because {why}",))


def _identify_both(a: Checkpoint, b: Checkpoint) -> tuple[Model, Model] | None:
    first, second = identify(a), identify(b)
    if first is not None and second is None:
        second = models.identify(b, family=first.family, config=a.config)
    elif second is not None and first is None:
        first = models.identify(a, family=second.family, config=b.config)
    return None if first is None or second is None else (first, second)


def _hub_names(a: Hub, b: Hub) -> CommonNames:
    first, second = ({**hub.tensors, **_parts(hub)} for hub in (a, b))
    notes = list(dict.fromkeys(note for hub in (a, b) for note in hub.notes if note not in _said_of_parts(hub)))
    without = {name: reason for hub in (a, b) for name, reason in hub.ignored.items() if name not in _stored_parts(hub)}
    for reason in dict.fromkeys(without.values()):
        names = [name for name in without if without[name] == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(f"not compared: {names[0]}{more} ({reason})")
    sizes = {v for v in (a.model.config.vocab_size, b.model.config.vocab_size) if v is not None}
    size = sizes.pop() if len(sizes) == 1 else None
    if sizes:
        notes.append(f"the vocabularies differ: {' and '.join(map(str, sorted(sizes)))} tokens, padding aside")
    padding = 0
    for rule in a.model.definition.rules:
        name = rule.hub
        if size is None or not rule.of_vocabulary or name not in first or name not in second:
            continue
        rows = (first[name].shape[0], second[name].shape[0])
        if min(rows) >= size:
            first[name], second[name] = (side[name].narrow(0, 0, size) for side in (first, second))
            padding = max(padding, max(rows) - size)
    if padding:
        notes.append(f"rows beyond the vocabulary of {size} tokens, up to {padding}, are padding and not compared")
    return CommonNames(first, second, "hub", tuple(notes), (a.model, b.model))


def _parts(hub: Hub) -> dict[str, LazyTensor]:
    """What no rule knows of a larger model, of which the hub has the text."""
    return {} if hub.spelling is None else hub.spelling.common_parts()


def _stored_parts(hub: Hub) -> Mapping[str, LazyTensor]:
    return {} if hub.spelling is None else hub.spelling.parts


def _said_of_parts(hub: Hub) -> tuple[str, ...]:
    return () if hub.spelling is None else hub.spelling.notes
