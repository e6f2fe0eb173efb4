"""Bringing a checkpoint's weights under the names of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from functools import cached_property

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.hugging_face import render_whole
from anyckpt.config.model import PART_OF
from anyckpt.config.nemo1 import restated
from anyckpt.config.own_part import with_vocabulary
from anyckpt.data_classes import dataclass
from anyckpt.errors import IncompleteError, MappingError, UsageError
from anyckpt.models import Hub, Model, Named
from anyckpt.models.bare_names import Bare
from anyckpt.models.dialects import spellings as dialects
from anyckpt.models.from_hub import carries_whole
from anyckpt.models.heads import complete_trunk, has_other_head
from anyckpt.models.hub import head_and_embedding, without_whole
from anyckpt.models.identify import is_foreign
from anyckpt.models.language.parameter_order import registered_order
from anyckpt.operations.steps.megatron_models import (
    changes,
    check_arguments,
    in_model,
    states_in_model,
    wants_halves,
)
from anyckpt.operations.steps.naming import Naming, identify
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.recorded_renaming import Renaming, Tensors
from anyckpt.operations.steps.unknown_family import unknown_family
from anyckpt.tensor import LazyTensor

_UNTRANSLATED = "state besides the weights, whose names are not translated between formats"


@dataclass(frozen=True)
class Renamed(Stepped):
    """A checkpoint under a target's names.

    Attributes:
        renaming: what was done to the weights.
    """

    renaming: Renaming = field(kw_only=True)


def rename_for(checkpoint: Checkpoint, naming: Naming) -> Renamed:
    """The weights under the names that a target gives them, and the configuration in its spelling.

    Where the target takes any names and none are asked for, or names weights as the source does, nothing changes.
    Else the model family's rules lead through the hub; where the family is unknown, two Megatron dialects still
    translate by name.

    Raises:
        MappingError: names, shapes or configuration do not fit the family, or the model is incomplete.
        UsageError: no rule leads from the source's names to the target's, or the target has names of its own.
    """
    if naming.experts is not None and naming.dialect != "hf":
        raise UsageError(
            "--experts says in which form Hugging Face's names have experts",
            expected="--to hf, or --names hf",
            remedy="leave it out",
        )
    if naming.dialect is None and not naming.trims:
        return unmoved(_with_dtype(checkpoint, naming.dtype))
    case = _Case(naming.described(checkpoint), naming)
    for way in (_without_wrappers, _by_family, _respelled, _alike, _by_dialect):
        renamed = way(case)
        if renamed is not None:
            return renamed
    raise unknown_family(case.checkpoint, naming.target.name, case.wanted, case.known)


@dataclass(frozen=True)
class _Case:
    """A checkpoint and the naming that it is to get, with what decides the way.

    Attributes:
        checkpoint: with the configuration that holds.
        naming: what is asked for.
    """

    checkpoint: Checkpoint
    naming: Naming

    @cached_property
    def known(self) -> str | None:
        """The naming that the weights have."""
        return self.checkpoint.dialect or dialects.detect(self.checkpoint.weights())

    @cached_property
    def wanted(self) -> str:
        """The naming that they get."""
        return self.naming.dialect or self.known or "hf"

    @cached_property
    def fits(self) -> bool:
        """Whether the configuration is spelled as the target has it, if it has any."""
        kind = self.naming.target.config_kind
        return kind is None or self.checkpoint.config_kind is None or _is_spelled(self.checkpoint, kind)

    @cached_property
    def alike(self) -> bool:
        """Whether names and configuration are as the target has them."""
        target = self.naming.target
        own = self.checkpoint.format == target.name or (target.unknown_names and bool(self.checkpoint.config))
        if changes(self.checkpoint, self.naming):
            return False
        return self.fits and (self.known == self.wanted or (self.known is None and own))

    @cached_property
    def bare(self) -> Bare | None:
        """The weights without what is wrapped around them; None where only the family's rules tell."""
        return models.bare_names(self.checkpoint) if self.alike and self.wanted == "hf" else None


def unmoved(checkpoint: Checkpoint, ignored: Mapping[str, str] | None = None, notes: Iterable[str] = ()) -> Renamed:
    """A checkpoint of which no state but its weights' can be, or whose weights are as they were."""
    return _renamed(checkpoint, checkpoint.weights(), dict, ignored or {}, notes)


def _renamed(
    checkpoint: Checkpoint,
    weights: Tensors,
    rename: Callable[[Tensors], Tensors],
    ignored: Mapping[str, str],
    notes: Iterable[str] = (),
    *,
    whole: bool = False,
) -> Renamed:
    return Renamed(checkpoint, ignored, tuple(notes), renaming=Renaming(rename, weights, whole=whole))


def _without_wrappers(case: _Case) -> Renamed | None:
    """The model that was wrapped, renamed; what is left out of it is told under the names that it is stored by."""
    if case.bare is None or not case.bare.wrappers:
        return None
    return _unwrapped(case.checkpoint, case.bare, case.naming)


def _unwrapped(checkpoint: Checkpoint, bare: Bare, naming: Naming) -> Renamed:
    plain = rename_for(_with_weights(checkpoint, bare.tensors, "hf"), naming)
    left_out = {bare.stored.get(name, name): reason for name, reason in plain.ignored.items()}
    around = " and ".join(bare.wrappers)
    note = f"{around} is taken off the names: it is of what was wrapped around the model"
    stored = {name: bare.stored.get(name, name) for name in bare.tensors}
    return replace(
        plain,
        ignored={**state_of(checkpoint), **left_out},
        notes=(note, *plain.notes),
        renaming=plain.renaming.after(stored, checkpoint.weights()),
    )


def _by_family(case: _Case) -> Renamed | None:
    """Through the hub, by the rules of the model's family; None if that is unknown or nothing needs to be done."""
    checkpoint, naming, wanted = case.checkpoint, case.naming, case.wanted
    told = naming.family is not None or naming.config is not None or naming.trims or naming.experts is not None
    if case.alike and not told and not (wanted == "hf" and case.bare is None):
        return None
    model = identify(checkpoint, family=naming.family, config=naming.config)
    if model is None and naming.trims:
        raise UsageError(
            "which rows are those of the vocabulary is not known without the model's family",
            path=checkpoint.path,
            found=f"--vocab-size {naming.vocabulary.size}",
            remedy="name it with --family and --config, or leave it out",
        )
    if model is None:
        return None
    try:
        renamed = _through_hub(checkpoint, model, naming, wanted)
    except MappingError as error:
        if wanted != "hf" and isinstance(error, IncompleteError) and has_other_head(checkpoint):
            raise _without_place_for_its_head(checkpoint, naming, error) from error
        if wanted != "hf" or case.known not in (None, "hf") or naming.trims or not case.fits:
            raise
        other = _of_another_class(checkpoint, model, naming)
        if other is None:
            raise
        return replace(other, checkpoint=_with_dtype(other.checkpoint, naming.dtype))
    if naming.names == "hf" and model.config.share_embeddings_and_output_weights:
        tied = head_and_embedding(model)
        for head, embedding in (tied,) if tied[1] else model.definition.hugging_face.copies:
            left_out = f"{head} is tied to {embedding} and left out: load the state dict with strict=False"
            renamed = replace(renamed, notes=(*renamed.notes, left_out))
    return renamed


def _respelled(case: _Case) -> Renamed | None:
    """Names found to be the hub's, which may spell norms, experts and halves as the hub does not."""
    weights = case.checkpoint.weights()
    if not case.alike or case.wanted != "hub" or case.checkpoint.dialect is not None:
        return None
    named, ignored = dialects.to_hub_names(weights, in_blocks=False)
    if list(named) == list(weights):
        return None
    respelled = _with_dtype(_with_weights(case.checkpoint, named, case.wanted), case.naming.dtype)
    left_out = {**state_of(case.checkpoint), **ignored}
    return _renamed(respelled, weights, lambda tensors: dialects.to_hub_names(tensors, in_blocks=False)[0], left_out)


def _alike(case: _Case) -> Renamed | None:
    """As it is, for its names are those of the target."""
    if not case.alike:
        return None
    kept = "" if case.bare is None or case.naming.config is None else case.bare.leading
    note = (
        f"all names begin with {kept}, which is kept, for the model family is unknown: transformers finds these "
        "weights only if its class calls them so"
    )
    as_it_is = _with_dtype(replace(case.checkpoint, dialect=case.known), case.naming.dtype)
    return unmoved(as_it_is, notes=(note,) if kept else ())


def _by_dialect(case: _Case) -> Renamed | None:
    """From one of Megatron's namings to another, without the family."""
    checkpoint, known, wanted = case.checkpoint, case.known, case.wanted
    if not (dialects.is_megatron(known) and dialects.is_megatron(wanted)):
        return None
    source: str = known
    weights = checkpoint.weights()
    check_arguments(checkpoint, case.naming)
    halves = wants_halves(checkpoint, case.naming) if changes(checkpoint, case.naming) else None
    renamed, ignored = dialects.rename(weights, source, wanted, in_halves=halves)
    notes = ["the model family is unknown: names are translated, and completeness is not checked"]
    named = _with_weights(checkpoint, renamed, wanted)
    if not case.fits:
        notes.append(
            f"the configuration is left out: only that of a known family is translated from {checkpoint.config_kind}"
        )
        named = replace(named, config={}, config_kind=None)
    if halves is not None:
        named = states_in_model(in_model(named, halves, notes), checkpoint, halves)
    return _renamed(
        _with_dtype(named, case.naming.dtype),
        weights,
        lambda tensors: dialects.rename(tensors, source, wanted, in_halves=halves)[0],
        {**state_of(checkpoint), **ignored},
        notes,
    )


def _of_another_class(checkpoint: Checkpoint, model: Model, naming: Naming) -> Renamed | None:
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
        return _unwrapped(checkpoint, bare, naming)
    return unmoved(named, state_of(checkpoint), tuple(trunk.notes))


def _without_place_for_its_head(checkpoint: Checkpoint, naming: Naming, error: IncompleteError) -> MappingError:
    """What to say of a classifier or a reward model that Megatron's language models have no place for."""
    kind, head = checkpoint.config["architectures"][0], error.unknown
    if not head or any(".layers." in name for name in (*head, *error.missing)):
        return error  # more is wrong than its head
    return MappingError(
        f"{naming.target.name} holds language models, which have no place for the head of {kind}",
        path=checkpoint.path,
        expected=f"the output layer {', '.join(error.missing)}" if error.missing else "no tensor beside the trunk",
        found=", ".join(head[:5]),
        remedy="convert to hf, safetensors, torch or dcp, which keep the head",
    )


def _through_hub(checkpoint: Checkpoint, model: Model, naming: Naming, wanted: str) -> Renamed:
    vocabulary, dtype, config_kind = naming.vocabulary, naming.dtype, naming.target.config_kind
    weights = checkpoint.weights()

    def hub_of(tensors: Tensors) -> Hub:
        held = checkpoint.with_weights(tensors)
        return vocabulary.of(models.to_hub(held, model, widen=dtype is not None))

    hub = hub_of(weights)
    whole = bool(hub.beside) and carries_whole(hub.model, wanted)
    if not whole:
        model = without_whole(model)
        hub = replace(hub, model=without_whole(hub.model))

    halves = wants_halves(checkpoint, naming) and hub.model.config.hybrid_override_pattern is None

    def named_from(hub: Hub) -> Named:
        padded = naming.options.layout is None
        return models.from_hub(
            hub,
            wanted,
            padded=padded,
            padding=vocabulary.padding,
            in_place=whole,
            experts=naming.experts,
            in_halves=halves,
        )

    if vocabulary.size is None and checkpoint.config_kind == "hf" and dialects.detect(weights) == "hf":
        _check_vocabulary(checkpoint, hub)
    out = named_from(hub)
    order = registered_order(out.tensors, model.definition.hugging_face.registered) if naming.names == "hf" else None
    tensors = out.tensors if order is None else {name: out.tensors[name] for name in order}
    renamed = _with_weights(checkpoint, tensors, wanted)
    spelled = config_kind is not None and _is_spelled(checkpoint, config_kind)
    if spelled and (whole or PART_OF not in hub.model.config.extra):
        config = restated(checkpoint.config, hub.restated)
        if config_kind == "hf" and vocabulary.size is not None:
            config = with_vocabulary(config, vocabulary.size)
        renamed = _with_dtype(replace(renamed, config=config), dtype)
    elif config_kind is not None:
        described = hub.model if dtype is None else hub.model.with_dtype(dtype)
        if whole and config_kind == "hf":
            config = render_whole(model.definition, described.config, out.notes)
        else:
            config = models.render_config(described, config_kind, notes=out.notes)
        renamed = replace(renamed, config=config, config_kind=config_kind)
    if hub.model.config.hybrid_override_pattern is None:
        renamed = states_in_model(in_model(renamed, halves, out.notes), checkpoint, halves)
    elif naming.options.megatron_model is not None:
        in_model(renamed, True, out.notes)  # refuses it
    if order is not None:
        renamed = replace(renamed, registered_order=True)
    names = tuple(renamed.tensors)
    if model.definition.companions is not None and config_kind is not None:
        renamed = model.definition.companions.write(hub.model.config, checkpoint, renamed, config_kind, out.notes)

    def rename(tensors: Tensors) -> Tensors:
        made = named_from(hub_of(tensors)).tensors
        return {name: made[name] for name in names}

    ignored = {**state_of(checkpoint), **out.ignored}
    if model.definition.companions is not None:  # which may have put them back
        ignored = {name: reason for name, reason in ignored.items() if name not in renamed.tensors}
    return _renamed(renamed, weights, rename, ignored, out.notes, whole=True)


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
                path=checkpoint.path,
                tensor=rule.hub,
                expected=f"{true} rows (vocab_size)",
                found=f"{tensor.shape[0]} rows",
                remedy="say the true vocabulary with --vocab-size",
            )


def _with_weights(checkpoint: Checkpoint, weights: dict[str, LazyTensor], dialect: str) -> Checkpoint:
    return checkpoint.with_weights(weights, objects={}, dialect=dialect)


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
