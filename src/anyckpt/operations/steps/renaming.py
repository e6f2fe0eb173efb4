"""Bringing a checkpoint's weights under the names of a target."""

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
