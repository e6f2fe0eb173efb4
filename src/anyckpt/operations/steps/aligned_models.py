"""Checkpoints of one model brought under names that all of them have, with what only some of them have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.nemo1 import restated
from anyckpt.config.own_part import with_vocabulary
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.models import Hub, Model
from anyckpt.models.complete import some
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.choosing import choose
from anyckpt.operations.steps.configurations import compare_configurations
from anyckpt.operations.steps.naming import Vocabulary
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.weighted_mean import Tensors, check_shares, is_averaged, means
from anyckpt.tensor import LazyTensor

_SHOWN = 5
_STATE = "training state, of which no mean is made"


@dataclass(frozen=True)
class Choice:
    """What a user says of the sources.

    Attributes:
        include: globs of the first source's names; others are left out.
        exclude: globs of names to leave out.
        family: the model family, where the sources do not tell.
        config: the model's configuration, where they have none.
        vocab_size: the true vocabulary of all of them.
        types_may_differ: tensors of one name may be of several floating-point types.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    family: str | None = None
    config: dict[str, Any] | None = None
    vocab_size: int | None = None
    types_may_differ: bool = False


@dataclass(frozen=True)
class Aligned:
    """Sources under common names.

    Attributes:
        sources: the chosen tensors of each.
        tensors: of each, by common name; all have the same names, shapes and types.
        hubs: the models that they are, if they meet under the hub's names and the family is known.
        dialect: the first source's naming if they meet under the hub's names, None if the names are its own.
        notes: what a user should know.
    """

    sources: Sequence[Checkpoint]
    tensors: Sequence[Tensors]
    hubs: Sequence[Hub] = ()
    dialect: str | None = None
    notes: tuple[str, ...] = field(default=())

    def mean(self, shares: Sequence[float]) -> Stepped:
        """The first source with the mean of all in place of its weights.

        Whatever of any source is not in it is in its ``ignored``, with the reason.

        Raises:
            MappingError: tensors that are not averaged differ.
            UsageError: the weights of those that have parts besides the text sum to nothing.
        """
        first, paths = self.sources[0], [source.path for source in self.sources]
        averaged, notes = means(self.tensors, shares, paths)
        prefix, config, ignored = first.model_prefix, first.config, dict(first.ignored)
        if self.dialect is None:
            kept = {prefix + name: tensor for name, tensor in averaged.items()}
        elif self.hubs:
            hub, told = self._with_parts(replace(self.hubs[0], tensors=averaged), shares, paths)
            named = models.from_hub(hub, self.dialect, in_place=True)
            prefix, kept, config = "", named.tensors, restated(config, hub.restated)
            ignored |= named.ignored
            notes += told
        else:
            prefix, kept = "", spellings.rename(averaged, "hub", self.dialect)[0]
        for source in self.sources:
            stored = {source.model_prefix + name for name in source.weights()}
            for name, reason in {**source.ignored, **self._lost(source)}.items():
                ignored.setdefault(name, reason)
            ignored |= {name: _STATE for name in source.tensors if name not in stored}
        ignored = {name: reason for name, reason in ignored.items() if name not in kept}
        out = replace(first, tensors=kept, model_prefix=prefix, state_prefixes=(), config=config, ignored=ignored)
        return Stepped(replace(out, optimizer=None), notes=(*self.notes, *notes))

    def averaged(self) -> list[Checkpoint]:
        """The sources with what the mean is computed of; all other tensors are the same in all of them."""
        return [
            replace(source, tensors={name: tensor for name, tensor in source.tensors.items() if is_averaged(tensor)})
            for source in self.sources
        ]

    def _lost(self, source: Checkpoint) -> Mapping[str, str]:
        """What a source's way to the common names has left out."""
        if self.dialect is None:
            return {}
        if not self.hubs:
            return spellings.to_hub_names(source.weights())[1]
        return next(hub.ignored for hub, own in zip(self.hubs, self.sources, strict=True) if own is source)

    def _with_parts(self, hub: Hub, shares: Sequence[float], paths: Sequence[str]) -> tuple[Hub, list[str]]:
        """The mean's hub with the other parts of the model whose text it is, and what to say of them."""
        spellings = {number: own.spelling for number, own in enumerate(self.hubs) if own.spelling is not None}
        holders = {number: spelling for number, spelling in spellings.items() if spelling.parts}
        if 0 not in holders:
            return hub, []
        parts = [spelling.common_parts() for spelling in holders.values()]
        if len(holders) == len(self.hubs) or len(holders) > 1:
            for common, number in zip(parts, holders, strict=True):
                check_same(parts[0], common, paths[0], paths[number])
            theirs = [shares[number] for number in holders]
            check_shares(theirs)
            averaged, notes = means(parts, theirs, [paths[number] for number in holders])
        else:
            averaged, notes = parts[0], []
        if len(holders) < len(self.hubs):
            names = dict.fromkeys(name.partition(".")[0] for name in averaged)
            those = f"{len(averaged)} tensors of {', '.join(list(names)[:_SHOWN])}"
            owners = ", ".join(os.path.basename(os.path.abspath(paths[number])) for number in holders)
            how = "are taken from it unchanged" if len(holders) == 1 else "are the mean of these alone"
            notes.append(f"{those} are in {owners} alone and {how}")
        return replace(hub, spelling=holders[0].with_parts(averaged)), notes


def align(opened: Sequence[Checkpoint], choice: Choice) -> Aligned:
    """The sources' tensors under common names: their own if these are the same, else the hub's.

    Raises:
        MappingError: there are no common names, or tensors differ in shape or type.
        UsageError: the vocabularies differ, and nothing says which is meant.
    """
    sources = [chosen(checkpoint, opened[0], choice) for checkpoint in opened]
    first = sources[0]
    own = [checkpoint.weights() for checkpoint in sources]
    mixed = choice.types_may_differ
    alike = all(_same_shapes(own[0], other, mixed) for other in own[1:])
    known = [checkpoint.dialect or spellings.detect(weights) for checkpoint, weights in zip(sources, own, strict=True)]
    found = _said(sources, choice) if alike else _models(sources, choice)
    if found is not None and choice.vocab_size is None:
        _check_vocabularies(found, sources)
    if found is not None and not alike and None not in known:
        hubs = [models.to_hub(checkpoint, model) for checkpoint, model in zip(sources, found, strict=True)]
        notes = [*_trim(hubs, choice.vocab_size), *_unlike(sources, found)]
        if choice.vocab_size is not None:
            hubs = [Vocabulary(choice.vocab_size).of(hub) for hub in hubs]
            if first.config_kind == "hf":
                sources[0] = replace(first, config=with_vocabulary(first.config, choice.vocab_size))
        for hub, checkpoint in zip(hubs[1:], sources[1:], strict=True):
            check_same(hubs[0].tensors, hub.tensors, first.path, checkpoint.path, mixed)
        return Aligned(sources, [hub.tensors for hub in hubs], hubs, known[0], tuple(notes))
    if not alike and all(map(spellings.is_megatron, known)) and len(set(known)) > 1:
        named = [spellings.to_hub_names(weights)[0] for weights in own]
        for tensors, checkpoint in zip(named[1:], sources[1:], strict=True):
            check_same(named[0], tensors, first.path, checkpoint.path, mixed)
        note = "the model family is unknown: weights meet under Megatron's names"
        return Aligned(sources, named, (), known[0], (note,))
    for weights, checkpoint in zip(own[1:], sources[1:], strict=True):
        check_same(own[0], weights, first.path, checkpoint.path, mixed)
    return Aligned(sources, own, notes=tuple(_unlike(sources, found)))


def check_same(a: Tensors, b: Tensors, first: str, second: str, types_may_differ: bool = False) -> None:
    """Raise MappingError unless both have the same names, shapes and types, of which floating-point ones may differ."""
    missing = [name for name in a if name not in b]
    surplus = [name for name in b if name not in a]
    if missing or surplus:
        names = (missing or surplus)[:_SHOWN]
        raise MappingError(
            "the checkpoints are not of one model: their tensors have different names",
            path=second if missing else first,
            expected=", ".join(names) + (" ..." if len(missing or surplus) > _SHOWN else ""),
            found="no such tensors",
            remedy="leave tensors out with --exclude, or say which model it is with --family and --config",
        )
    for name, tensor in a.items():
        other = b[name]
        if not _same(tensor, other, types_may_differ):
            raise MappingError(
                "the checkpoints are not of one model",
                path=second,
                tensor=name,
                expected=f"{tensor.dtype.name} {tensor.shape} as in {first}",
                found=f"{other.dtype.name} {other.shape}",
                remedy="convert them to one element type first (--dtype)" if tensor.shape == other.shape else None,
            )


def chosen(checkpoint: Checkpoint, first: Checkpoint, choice: Choice) -> Checkpoint:
    """The weights that the user wants; globs are of the first source's names, and other names are left alone."""
    if checkpoint is not first and checkpoint.weights().keys() != first.weights().keys():
        return checkpoint
    kept = choose(checkpoint, choice.include, choice.exclude)
    told = [*kept.checkpoint.warnings, *(kept.notes if checkpoint is first else ())]
    return replace(kept.checkpoint, ignored={**kept.checkpoint.ignored, **kept.ignored}, warnings=told)


def _same(a: LazyTensor, b: LazyTensor, types_may_differ: bool) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or (types_may_differ and is_averaged(a) and is_averaged(b)))


def _same_shapes(a: Tensors, b: Tensors, types_may_differ: bool) -> bool:
    return a.keys() == b.keys() and all(_same(tensor, b[name], types_may_differ) for name, tensor in a.items())


def _models(opened: Sequence[Checkpoint], choice: Choice) -> list[Model] | None:
    """Every source's model, with the configuration of one that has it; None if no family is known.

    Raises:
        MappingError: the sources are of different families.
    """
    found = [models.identify(checkpoint, family=choice.family, config=choice.config) for checkpoint in opened]
    guide = next(((model, one) for model, one in zip(found, opened, strict=True) if model is not None), None)
    if guide is None:
        return None
    complete = [
        model or models.identify(checkpoint, family=guide[0].family, config=guide[1].config)
        for model, checkpoint in zip(found, opened, strict=True)
    ]
    result = [model for model in complete if model is not None]
    for model, checkpoint in zip(result, opened, strict=False):
        if model.family != guide[0].family:
            raise MappingError(
                "is of another model family",
                path=checkpoint.path,
                expected=f"{guide[0].family} as {guide[1].path}",
                found=model.family,
            )
    return result if len(result) == len(opened) else None


def _said(opened: Sequence[Checkpoint], choice: Choice) -> list[Model] | None:
    """Every source's model, None if any is not known: nothing depends on it."""
    try:
        found = [models.identify(checkpoint, family=choice.family, config=choice.config) for checkpoint in opened]
    except (MappingError, UsageError):
        return None
    known = [model for model in found if model is not None]
    return known if len(known) == len(found) else None


def _unlike(opened: Sequence[Checkpoint], found: Sequence[Model] | None) -> list[str]:
    """What to say of sources whose configurations differ, of which the first's is written."""
    notes = []
    for number, checkpoint in enumerate(opened[1:], 1):
        known = None if found is None else (found[0], found[number])
        different = compare_configurations(opened[0], checkpoint, known).different
        if different:
            shown = some(f"{setting.name} ({setting.a} and {setting.b})" for setting in different)
            notes.append(
                f"the configurations of {opened[0].path} and {checkpoint.path} differ in {shown}: "
                "that of the first is written"
            )
    return notes


def _check_vocabularies(found: Sequence[Model], sources: Sequence[Checkpoint]) -> None:
    """Raise UsageError where sources say that they have different vocabularies: rows of one may be trained."""
    stated = {
        model.config.vocab_size: source.path
        for model, source in zip(found, sources, strict=True)
        if model.says_vocabulary and model.config.vocab_size is not None
    }
    if len(stated) > 1:
        (first, a), (second, b) = list(stated.items())[:2]
        raise UsageError(
            "the checkpoints have different vocabularies, and rows beyond the smaller one may be trained",
            path=b,
            expected=f"{first} tokens, as {a} has",
            found=f"{second} tokens",
            remedy="say with --vocab-size how many rows to take: others are left out",
        )


def _trim(hubs: Sequence[Hub], said: int | None) -> list[str]:
    """Take off rows that only pad the vocabulary where sources have different numbers of them; gives notes."""
    notes = []
    sizes = [hub.model.config.vocab_size for hub in hubs if hub.model.config.vocab_size is not None]
    stated = [hub.model.config.vocab_size for hub in hubs if hub.model.says_vocabulary and hub.model.config.vocab_size]
    size = said or min(stated or sizes, default=None)
    for rule in hubs[0].model.definition.rules:
        rows = {hub.tensors[rule.hub].shape[0] for hub in hubs if rule.hub in hub.tensors}
        if not rule.of_vocabulary or len(rows) < 2 or size is None or min(rows) < size:
            continue
        for hub in hubs:
            hub.tensors[rule.hub] = hub.tensors[rule.hub].narrow(0, 0, size)
        notes.append(f"{rule.hub}: rows beyond the vocabulary of {size} tokens are padding and left out")
    return notes
