"""Merging models: sums, task arithmetic, SLERP, TIES and DARE, computed block by block while they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.operations.convert import Conversion, converted
from anyckpt.operations.keywords import MergeWords, check_writable, taking
from anyckpt.operations.merged_models import Opener, merged
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.destination import aimed_at
from anyckpt.operations.steps.globs import as_patterns
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.merge_recipe import read_recipe
from anyckpt.operations.steps.merge_request import (
    OVER_BASE,
    MergeRequest,
    ModelSource,
    Settings,
    Stretch,
    check_setting,
)
from anyckpt.operations.steps.user_files import read_config
from anyckpt.storage.location import public_path

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(MergeWords)
def merge(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    method: str | None = None,
    base: str | os.PathLike[str] | None = None,
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    t: float | None = None,
    scale: float | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    seed: int = 0,
    recipe: str | os.PathLike[str] | None = None,
    to: str | None = None,
    family: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: LayoutRequest | None = None,
    force: bool = False,
    names: str | None = None,
    **others: Unpack[MergeWords],
) -> Conversion:
    """Write what a way of merging makes of several models of one architecture, of any formats and layouts.

    Models meet under Hugging Face's names where their family is known, so that results do not depend on formats.
    Numbers of 16 bits are computed with in float32 and others in float64, and rounded once, to the type of the base or
    first model; other tensors must be equal in all of them.  Training state is left out; configuration and tokenizer
    are those of the base, or of the first model.

    Args:
        sources: the models, or adapters (LoRA, DoRA) for ``base``; their formats are detected.
        destination: what to write; it appears only when it is whole.
        method: ``linear``, ``task_arithmetic``, ``slerp``, ``ties``, ``dare_linear`` or ``dare_ties``; ``linear`` if
            None.
        base: what the models were trained from, and what adapters are added to; the first of the two for ``slerp``.
        weights: one number per source, of any sign; 1 for each if None.
        density: ``ties``, ``dare_*``: the share of each update that is left; one number, or one per source.
        t: ``slerp``: 0 for the first model, 1 for the second; one half if None.
        scale: the sum of updates is multiplied by it (mergekit's ``lambda``).
        normalize: whether sums are divided by that of the weights; ``linear`` and ``ties`` do if None.
        rescale: whether what is left of an update is scaled to make up for what is not; ``dare_*`` do if None.
        seed: ``dare_*``: of what is left; the same seed gives the same bytes, whatever the formats and threads.
        recipe: a YAML file of mergekit in place of ``sources`` and all of the above.
        to: name of the target format; if None, what the destination's name tells (``.nemo``), else
            the leading model's, in its parallel layout.
        family: the model family, where checkpoints do not tell.
        config: the model's configuration, where checkpoints have none.
        include: glob or globs of weight names as the models have them in common; others are left out.
        exclude: glob or globs of weight names to leave out.

    Raises:
        FormatError: a source is damaged.
        MappingError: the models are not of one architecture: names or shapes differ, or tensors that cannot be
            computed with are not equal.
        OutputError: the destination exists or cannot be written.
        UsageError: the numbers do not fit the method, or a recipe has a key that is not done here.
    """
    if recipe is None:
        request, notes = _request(sources, method, base, weights, density, t, scale, normalize, rescale, seed)
    else:
        _check_alone(sources, method, base, weights, density, t, scale, normalize, rescale)
        request, notes = read_recipe(os.fspath(recipe), seed)
    if to is not None:
        registry.by_name(to)
    opener = Opener(force, None if layout is None else layout.rules, family)
    paths = [path for model in request.models for path in (model.path, model.adapter) if path is not None]
    origins = [*dict.fromkeys(paths if request.adapted is None else [*paths, request.adapted])]
    check_writable(destination, origins, others)
    request = opener.with_bases(request)
    if others.get("dtype") is None:
        others["dtype"] = request.dtype
    leading = opener.read(request.models[request.leading].path)
    options = ConvertOptions(
        **aimed_at(destination, to, leading),
        **others,
        family=family,
        config=read_config(config),
        layout=layout,
        names=names,
    )
    made = merged(request, opener, options, as_patterns(include), as_patterns(exclude))
    if options.names is None and made.naming is not None and options.target.dialect(options.writing) is None:
        options = replace(options, names=made.naming)
    ready: Checkpoint = replace(made.checkpoint, warnings=[*made.notes, *notes])
    return converted(ready, destination, options.for_numbers(), sources=origins, made_of=made.made_of)


def _request(
    sources: Sequence[str | os.PathLike[str]],
    method: str | None,
    base: str | os.PathLike[str] | None,
    weights: Sequence[float] | None,
    density: float | Sequence[float] | None,
    t: float | None,
    scale: float | None,
    normalize: bool | None,
    rescale: bool | None,
    seed: int,
) -> tuple[MergeRequest, list[str]]:
    """What the options ask for, and notes.

    Raises:
        UsageError: they do not fit one another.
    """
    method = method or "linear"
    if not sources:
        raise UsageError("there is nothing to merge", expected="models, or adapters of --base", found="no source")
    paths, count = [public_path(path) for path in sources], len(sources)
    given = {"--weights": weights, "--density": density, "--t": t, "--scale": scale, "--rescale": rescale}
    given["--normalize"] = normalize
    _check_known(method, given)
    shares = _each(weights, count, "--weights")
    densities = _each([density] * count if isinstance(density, (int, float)) else density, count, "--density")
    for key, value in (("weight", shares), ("density", densities), ("t", _plain(t)), ("lambda", _plain(scale))):
        if value not in (None, []):
            check_setting(key, value, method)
    own: list[Settings] = [
        {
            **({} if shares is None else {"weight": shares[number]}),
            **({} if densities is None else {"density": densities[number]}),
        }
        for number in range(count)
    ]
    adapted = None if base is None else public_path(base)
    models, each, leads = _base_first(method, adapted, paths, own)
    shared = {"t": t, "lambda": scale, "normalize": normalize, "rescale": rescale}
    stretch = Stretch(tuple(range(len(models))), None, tuple(each))
    said = {key: value for key, value in shared.items() if value is not None}
    taking_part, leading = tuple(map(ModelSource, models)), 0 if leads else None
    notes = [_LEARNED_NOTHING] if method in OVER_BASE and len(models) <= count else []
    return MergeRequest(taking_part, method, (stretch,), said, leading, adapted, seed=seed), notes


_LEARNED_NOTHING = "the base is among the sources: it has learned nothing over itself, and its numbers do not count"


def _base_first(
    method: str, base: str | None, paths: list[str], own: list[Settings]
) -> tuple[list[str], list[Settings], bool]:
    """The models with the numbers of each, and whether the first is the base, from which the method goes on.

    A base that is also a source has learned nothing over itself, and its weight does not count, as mergekit has it.
    """
    if base is None:
        return paths, own, False
    real = os.path.realpath(base)
    of_base = [number for number, path in enumerate(paths) if os.path.realpath(path) == real]
    others = [number for number in range(len(paths)) if number not in of_base]
    if method in OVER_BASE:
        return [base, *(paths[n] for n in others)], [{}, *(own[n] for n in others)], True
    order = [*of_base, *others] if method == "slerp" else range(len(paths))
    return [paths[n] for n in order], [own[n] for n in order], method == "slerp" and bool(of_base)


_OF_UPDATES = {"--weights", "--scale", "--normalize"}
_READ = {
    "linear": {"--weights", "--normalize"},
    "slerp": {"--t"},
    "passthrough": set[str](),
    "task_arithmetic": _OF_UPDATES,
}


def _check_known(method: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError for an option that a method does not read."""
    known = _READ.get(method, {*_OF_UPDATES, "--density", "--rescale"})
    surplus = next((name for name, value in given.items() if value is not None and name not in known), None)
    if surplus is not None:
        raise UsageError(
            f"{surplus} means nothing to {method}", expected=", ".join(sorted(known)), remedy="leave it out"
        )


def _check_alone(sources: Sequence[Any], *others: Any) -> None:
    """Raise UsageError unless a recipe says all by itself."""
    if sources or any(other is not None for other in others):
        raise UsageError(
            "a recipe says itself which models are merged and how", remedy="give it with no sources and no numbers"
        )


def _each(values: Sequence[float] | None, count: int, option: str) -> list[float] | None:
    if values is None:
        return None
    if len(values) != count:
        raise UsageError(f"{option} has not a number for each source", expected=f"{count}", found=len(values))
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item() if hasattr(value, "item") else value
