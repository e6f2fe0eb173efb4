"""The models of a merge, opened, brought under common names, and made one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.nemo1 import restated
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.models import Model
from anyckpt.models.adapters import settings_of
from anyckpt.models.complete import some
from anyckpt.models.dialects import spellings
from anyckpt.models.hub import head_and_embedding
from anyckpt.operations.merge_lora import with_adapter
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.aligned_models import Aligned, Choice, align
from anyckpt.operations.steps.beside_weights import objects_in_modules
from anyckpt.operations.steps.casts import ChangedType
from anyckpt.operations.steps.full_precision import codes_side_by_side, in_full_precision
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.layers_of_several import is_before_layers, put_together
from anyckpt.operations.steps.merge_request import OVER_BASE, MergeRequest, ModelSource, Rules
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.steps.weighted_mean import Tensors, is_averaged, made_one
from anyckpt.tensor import LazyTensor

_STATE = "training state, of which none is that of a merged model"
_OBJECT = "no tensor, and of one of the models: there is none of a merged model"


@dataclass(frozen=True)
class Made:
    """A merged model.

    Attributes:
        checkpoint: the leading model with the merged weights.
        notes: what a user should know.
        naming: how the leading model names weights, if they have other names here; None otherwise.
        made_of: the checkpoints that it was computed from.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...]
    naming: str | None
    made_of: tuple[Checkpoint, ...]


class Opener:
    """Opens each checkpoint once.

    Args:
        force: read what is marked as unfinished, too.
        rules: partition rules of the user's.
        family: the model family, where checkpoints do not tell.
    """

    def __init__(self, force: bool, rules: Mapping[str, str] | None, family: str | None) -> None:
        self._force, self._rules, self._family = force, rules, family
        self._stored: dict[str, Checkpoint] = {}
        self._joined: dict[str, Checkpoint] = {}

    def read(self, path: str) -> Checkpoint:
        """The checkpoint as it is stored."""
        if path not in self._stored:
            self._stored[path] = registry.read(path, force=self._force)
        return self._stored[path]

    def joined(self, path: str) -> Checkpoint:
        """The checkpoint with the tensors of all its ranks."""
        if path not in self._joined:
            self._joined[path] = join_ranks(self.read(path), rules=self._rules, family=self._family)
        return self._joined[path]

    def with_bases(self, request: MergeRequest) -> MergeRequest:
        """The merge with the base below each adapter that stands alone.

        Raises:
            UsageError: there is none, or a base is given that nothing is added to.
        """
        result, alone = [], 0
        for number, source in enumerate(request.models):
            if source.adapter is not None or settings_of(self.joined(source.path)) is None:
                result.append(source)
                continue
            if request.adapted is None or number == request.base:
                raise UsageError(
                    "is an adapter, and no base is given to add it to",
                    path=source.path,
                    remedy="give its model with --base, or merge adapters alone with anyckpt average",
                )
            result.append(replace(source, path=request.adapted, adapter=source.path))
            alone += 1
        if request.adapted is not None and request.base is None and not alone:
            raise UsageError(
                f"{request.method} has no base, and no source is an adapter to add to one",
                path=request.adapted,
                remedy="leave --base out, or choose another --method",
            )
        return replace(request, models=tuple(result))


class _Models:
    """Models with all their ranks, in full precision, with their adapters."""

    def __init__(self, opener: Opener, options: ConvertOptions) -> None:
        self._opener = opener
        self._options = options
        self._whole: dict[str, Checkpoint] = {}
        self.notes: dict[str, None] = {}

    @property
    def wholes(self) -> Collection[Checkpoint]:
        """Those that are opened, now and later."""
        return self._whole.values()

    def whole(self, path: str) -> Checkpoint:
        if path not in self._whole:
            step = in_full_precision(self._opener.joined(path), self._options.cast_to, self._options.given)
            self.notes.update(dict.fromkeys((*step.notes, *step.checkpoint.warnings)))
            self._whole[path] = step.checkpoint
        return self._whole[path]

    def model(self, source: ModelSource) -> Checkpoint:
        """A model; weights that an adapter changes are float32 and not rounded."""
        whole = self.whole(source.path)
        if source.adapter is None:
            return whole
        added = with_adapter(
            whole,
            self.whole(source.adapter),
            scale=source.scale,
            family=self._options.family,
            config=self._options.plain_config,
            cast=ChangedType("float32", ()),
        )
        self.notes.update(dict.fromkeys(added.notes))
        return replace(added.checkpoint, path=str(source))

    def opened(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint that was opened, with the numbers that results are computed from."""
        return tuple(
            replace(whole, tensors={name: tensor for name, tensor in whole.tensors.items() if is_averaged(tensor)})
            for whole in self.wholes
        )


def merged(
    request: MergeRequest, opener: Opener, options: ConvertOptions, include: tuple[str, ...], exclude: tuple[str, ...]
) -> Made:
    """What a merge makes of its models; views, nothing is computed before it is read.

    Args:
        request: the merge.
        opener: of its models.
        options: what the user says of the model and the output.
        include: globs of names, as the models have them in common; others are left out.
        exclude: globs of names to leave out.

    Raises:
        MappingError: the models are not of one architecture.
        UsageError: numbers do not fit the weights, or an adapter has no base.
    """
    found = _Models(opener, options)
    with codes_side_by_side(found.wholes):
        return _made_one(request, found, include, exclude, options)


def _made_one(
    request: MergeRequest, found: _Models, include: tuple[str, ...], exclude: tuple[str, ...], options: ConvertOptions
) -> Made:
    choice = Choice(
        include, exclude, options.family, options.plain_config, options.request.vocab_size, types_may_differ=True
    )
    numbers = request.stretches[0].models
    named = _roles(request, lambda number: _named(found.model(request.models[number]), choice), found.notes)
    leading = found.whole(request.models[request.leading].path)
    own = named[0] if request.models[numbers[0]].adapter is None else _named(leading, choice)
    aligned = align([one.checkpoint for one in named], choice)
    tensors = _in_common(aligned)
    embedding = [] if own.model is None else [head_and_embedding(own.model)[1]]
    names = [name for name in tensors[0] if name in embedding or is_before_layers(name)]
    target = _Target(options, own.checkpoint.weights())
    rules = Rules(request, tensors[0], names, target)
    shared, notes = _shared(tensors, aligned.sources)
    weights, more = made_one(shared, rules.make, [source.path for source in aligned.sources])
    weights = {name: weights.get(name, tensor) for name, tensor in tensors[0].items()}
    if not aligned.hubs and aligned.dialect is not None:  # of a family that is not known, under Megatron's own names
        weights = spellings.rename(weights, "hub", aligned.dialect)[0]
    respelled = own.dialect is not None
    checkpoint = replace(
        aligned.sources[0].with_weights(weights, objects={}, optimizer=None),
        path=leading.path,
        tokenizer=_tokenizer(request, found),
        ignored=_ignored(aligned, found, weights),
    )
    told = (_summary(request), *aligned.notes, *notes, *more, *found.notes)
    return Made(checkpoint, tuple(dict.fromkeys(told)), own.dialect if respelled else None, found.opened())


@dataclass(frozen=True)
class _Named:
    """A model under the names by which models meet.

    Attributes:
        checkpoint: it.
        model: what it is, if its family is known and it was renamed.
        dialect: the naming that it had before, None if it has it still.
    """

    checkpoint: Checkpoint
    model: Model | None = None
    dialect: str | None = None


def _named(checkpoint: Checkpoint, choice: Choice) -> _Named:
    """The model under Hugging Face's names where its family is known, so that its container changes no result."""
    dialect = checkpoint.dialect or spellings.detect(checkpoint.weights())
    if dialect in (None, "hf"):
        return _Named(checkpoint)
    model = identify(checkpoint, family=choice.family, config=choice.config)
    if model is None:
        return _Named(checkpoint)
    hub = models.to_hub(checkpoint, model)
    out = models.from_hub(hub, "hf", in_place=True)
    beside = {checkpoint.model_prefix + name for name in checkpoint.weights()}
    ignored = {**checkpoint.ignored, **out.ignored, **{n: _STATE for n in checkpoint.tensors if n not in beside}}
    config = restated(checkpoint.config, hub.restated)
    renamed = checkpoint.with_weights(out.tensors, objects={}, dialect="hf", config=config, ignored=ignored)
    return _Named(renamed, model, dialect)


def _roles(request: MergeRequest, model: Callable[[int], _Named], notes: dict[str, None]) -> list[_Named]:
    """What each place in the lists of models is, over all stretches of layers: a model, or one put together of several.

    Args:
        request: the merge.
        model: of a number.
        notes: get what a user should know.

    Raises:
        UsageError: a model has not the layers, or its layers are not found.
    """
    first = request.stretches[0]
    opened = {n: model(n) for n in dict.fromkeys(n for stretch in request.stretches for n in stretch.models)}
    if first.layers is None:
        return [opened[number] for number in first.models]
    result = []
    for role, number in enumerate(first.models):
        parts = [
            (opened[stretch.models[role]].checkpoint, range(*stretch.layers[role]))
            for stretch in request.stretches
            if stretch.layers is not None
        ]
        checkpoint, told = put_together(parts)
        notes.update(dict.fromkeys(told))
        result.append(replace(opened[number], checkpoint=checkpoint))
    return result


def _in_common(aligned: Aligned) -> list[Tensors]:
    """The tensors of each model; those that met in the hub, because their vocabularies differ, apart again."""
    if not aligned.hubs:
        return [dict(tensors) for tensors in aligned.tensors]
    return [models.from_hub(hub, "hf", in_place=True).tensors for hub in aligned.hubs]


def _shared(tensors: Sequence[Tensors], sources: Sequence[Checkpoint]) -> tuple[list[Tensors], list[str]]:
    """What all models have, and a note of what the first has alone."""
    common = [name for name in tensors[0] if all(name in other for other in tensors[1:])]
    alone = [name for name in tensors[0] if name not in set(common)]
    notes = []
    if alone:
        notes.append(f"{len(alone)} tensors that not all models have are those of {sources[0].path}: {some(alone)}")
    if not common:
        raise MappingError("the models have no weight in common", path=sources[0].path)
    return [{name: own[name] for name in common} for own in tensors], notes


class _Target:
    """The type that each weight is rounded to: what the user asks for, or that of the leading model."""

    def __init__(self, options: ConvertOptions, own: Tensors) -> None:
        self._cast = ChangedType(options.cast_to, options.keep_in_fp32)
        self._own = own

    def __call__(self, name: str, tensor: LazyTensor) -> DType:
        return self._cast(name, self._own.get(name, tensor))


def _tokenizer(request: MergeRequest, found: _Models) -> Any:
    """The tokenizer that goes along.

    Raises:
        UsageError: all are to be one, and are not.
    """
    owner = request.models[request.leading if request.tokenizer is None else request.tokenizer]
    tokenizer = found.whole(owner.path).tokenizer
    if request.one_tokenizer:
        files = None if tokenizer is None else {n: s.read(0, s.size) for n, s in tokenizer.files.items()}
        for source in request.models:
            other = found.whole(source.path).tokenizer
            if other is not None and {n: s.read(0, s.size) for n, s in other.files.items()} != files:
                raise UsageError(
                    "the recipe has tokenizer_source union, and the tokenizers differ: rows are not reordered here",
                    path=source.path,
                    remedy="say tokenizer_source: base, if the vocabularies are the same",
                )
    return tokenizer


def _ignored(aligned: Aligned, found: _Models, weights: Tensors) -> dict[str, str]:
    """Whatever of any model is not in the output, with the reason."""
    ignored: dict[str, str] = {}
    for source in aligned.sources:
        for name, reason in source.ignored.items():
            ignored.setdefault(name, reason)
        own = {source.model_prefix + name for name in source.weights()}
        ignored |= {name: _STATE for name in source.tensors if name not in own}
    for hub in aligned.hubs:
        for name, reason in hub.ignored.items():
            ignored.setdefault(name, reason)
    for whole in found.opened():
        ignored |= dict.fromkeys(objects_in_modules(whole), _OBJECT)
    return {name: reason for name, reason in ignored.items() if name not in weights}


def _summary(request: MergeRequest) -> str:
    numbers = [*dict.fromkeys(number for stretch in request.stretches for number in stretch.models)]
    called = [str(request.models[number]) for number in numbers]
    said = "" if request.required else _numbers(request)
    if request.method in OVER_BASE:
        own, others = called[0], ", ".join(called[1:]) or "nothing"
        return f"{request.method} of {others} over {own}, whose configuration and files go along{said}"
    return f"{request.method} of {', '.join(called)}; configuration and files are those of the first{said}"


def _numbers(request: MergeRequest) -> str:
    """The numbers of options in words."""
    own = request.stretches[0].settings[1 if request.base is not None else 0 :]
    listed = {key: [settings[key] for settings in own if key in settings] for key in ("weight", "density")}
    parts = [f"{key} {', '.join(f'{value:g}' for value in values)}" for key, values in listed.items() if values]
    parts += [f"{key} {value}" for key, value in request.settings.items()]
    parts += [f"seed {request.seed}"] if request.method.startswith("dare") else []
    return "".join(f"; {part}" for part in parts)
