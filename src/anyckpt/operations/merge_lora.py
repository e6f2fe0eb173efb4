"""Adding an adapter to its base model while the result is written, in any format and layout."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyckpt import models
from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.config.hub_names import EMBEDDING
from anyckpt.config.nemo1 import restated
from anyckpt.errors import MappingError, UsageError, about, few
from anyckpt.formats import registry
from anyckpt.models import Model
from anyckpt.models.adapters import Adapter, Layers, idle, merged, place_by_name, read_adapter
from anyckpt.models.adapters.by_name import block_of
from anyckpt.models.dialects import spellings
from anyckpt.operations.convert import Conversion, converted
from anyckpt.operations.keywords import MergeWords, check_writable, taking
from anyckpt.operations.merge_in_place import is_tied, merged_in_place
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.adapters import AdapterRequest, check_kind, opened_adapter, unused_targets
from anyckpt.operations.steps.casts import ChangedType
from anyckpt.operations.steps.choosing import choose
from anyckpt.operations.steps.destination import aimed_at
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.grown_vocabulary import grow_vocabulary
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.steps.pipeline import Pipeline, Stepped
from anyckpt.operations.steps.renaming import state_of
from anyckpt.operations.steps.user_files import read_config
from anyckpt.storage.location import public_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SHOWN = 5
_TIED = "the adapter changes the embedding, which is the output layer, too: both are changed, as peft's merge does"


@taking(MergeWords)
def merge_lora(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    scale: float = 1.0,
    alpha: float | None = None,
    family: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: LayoutRequest | None = None,
    force: bool = False,
    **others: Unpack[MergeWords],
) -> Conversion:
    """Write the base model with a LoRA or DoRA adapter in its weights.

    Base and adapter may be of any formats, forms and layouts; they meet under the hub's names.  A changed weight is
    computed in float32 block by block while it is written, and rounded once, to its own type or to ``dtype``;
    everything else is the base's, bit for bit.  The sum is that of peft's ``merge_and_unload``.

    Args:
        base: the model that the adapter was trained on; its format is detected.
        adapter: PEFT's folder, a NeMo or Megatron-Bridge adapter, or a file of such tensors.
        destination: what to write; it appears only when it is whole.
        to: name of the target format; if None, what the destination's name tells (``.nemo``), else
            the base's, in its parallel layout.
        scale: every update is multiplied by it, besides its own scale; 0.5 for half of the adapter's strength.
        alpha: in place of what the adapter says.
        family: the base's model family, where it does not tell.
        config: the base's configuration, where it has none.
        dtype: ``bf16``, ``fp16`` or ``fp32``: cast floating-point weights; a quantized base needs one.
        include: glob or globs of the adapter's tensors; others are left out.
        exclude: glob or globs of the adapter's tensors to leave out.

    Raises:
        FormatError: a source is damaged.
        MappingError: the adapter is of another model, tensors of it are missing or of no rule, or the base is
            incomplete.
        OutputError: the destination exists or cannot be written.
        UsageError: one of the two is not what it should be, or the scale is not known.
    """
    if not math.isfinite(scale):
        raise UsageError("--scale must be a number", found=scale)
    if to is not None:
        registry.by_name(to)
    origins = [public_path(base), public_path(adapter)]
    check_writable(destination, origins, others)
    stored = registry.read(base, force=force)
    options = ConvertOptions(
        **aimed_at(destination, to, stored), **others, family=family, config=read_config(config), layout=layout
    )
    steps, rules, given = Pipeline(), options.request.rules, options.plain_config
    whole = steps.take(
        in_full_precision(join_ranks(stored, rules=rules, family=family), options.cast_to, options.given)
    )
    request = options.request
    if request.new_rows is not None and request.vocab_size is not None:  # before the adapter, which may bring its own
        grown = grow_vocabulary(whole, request.vocab_size, request.new_rows, options.given, family)
        whole = steps.take(grown)
        options = replace(options, layout=replace(request, new_rows=None))
        if grown.given is not None:
            options = replace(options, config=grown.given)
        given = options.plain_config
    found = steps.take(choose(join_ranks(registry.read(adapter, force=force), rules=rules), include, exclude))
    cast = ChangedType(options.cast_to, options.keep_in_fp32)
    added = with_adapter(whole, found, scale=scale, alpha=alpha, family=family, config=given, cast=cast)
    notes = (*added.notes, *steps.notes, *whole.warnings, *found.warnings)
    ready = replace(
        added.checkpoint,
        optimizer=None,
        ignored={**added.checkpoint.ignored, **added.ignored, **steps.ignored},
        warnings=[*dict.fromkeys(notes)],
    )
    return converted(ready, destination, options.for_numbers(), sources=origins, made_of=[whole])


def with_adapter(
    whole: Checkpoint,
    found: Checkpoint,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    family: str | None = None,
    config: dict[str, Any] | None = None,
    cast: ChangedType,
) -> Stepped:
    """The base with an adapter in its weights, under its own names; views, nothing is computed before it is read.

    Args:
        whole: the base, with the tensors of all ranks.
        found: the adapter.
        scale: every update is multiplied by it.
        alpha: in place of what the adapter says.
        family: the base's model family, where it does not tell.
        config: the base's configuration, where it has none.
        cast: element type that a changed weight gets.

    Raises:
        MappingError: the adapter is of another model.
        UsageError: one of the two is not what it should be, or the scale is not known.
    """
    settings = opened_adapter(found, AdapterRequest(alpha=alpha))
    _check_roles(whole, found, settings)
    assert settings is not None
    check_kind(found, settings)
    model, unfit = _model(whole, family, config)
    tied = is_tied(whole.config if config is None else config, model)
    by_name, missing = place_by_name(found, settings, whole.weights(), tied=tied)
    with about(found.path):
        if by_name is not None:
            updates = by_name.adapter
            changed = merged_in_place(whole, found, by_name, scale=scale, cast=cast, model=model)
        else:
            if model is None:
                raise unfit or _unknown(whole, missing)
            updates = read_adapter(found, settings, Layers(model))
            changed = _merged(whole, model, updates, scale, cast)
    notes = (
        _summary(found, settings, updates, scale),
        *([_TIED] if tied and _changes_embedding(updates, whole) else []),
        *changed.notes,
        *_idle(found, settings, updates),
    )
    return replace(changed, notes=notes)


def _check_roles(base: Checkpoint, adapter: Checkpoint, settings: AdapterSettings | None) -> None:
    """Raise UsageError unless the one is a model and the other an adapter."""
    if settings is None:
        raise UsageError(
            "is no adapter",
            path=adapter.path,
            expected="lora_A and lora_B, or linear_in and linear_out, tensors",
            found=", ".join(list(adapter.weights())[:3]) or "no tensors",
            remedy="give BASE first, then ADAPTER",
        )
    if opened_adapter(base, AdapterRequest()) is not None:
        raise UsageError("is an adapter, not a model", path=base.path, remedy="give BASE first, then ADAPTER")


def _model(
    base: Checkpoint, family: str | None, config: dict[str, Any] | None
) -> tuple[Model | None, MappingError | None]:
    """What the base is, None if its family is not known, and why it is not what its configuration says."""
    try:
        return identify(base, family=family, config=config), None
    except MappingError as error:
        if base.quantization is not None or family is not None or config is not None:
            raise
        return None, error


def _unknown(base: Checkpoint, missing: list[str]) -> UsageError:
    if missing:
        return UsageError(
            f"{len(missing)} modules of the adapter are none of the base's by name, and its family is not known",
            path=base.path,
            expected=f"names such as {few(base.weights(), _SHOWN)}",
            found=few(missing, _SHOWN),
            remedy="give the base model that it was trained on, name the family with --family and --config, or leave "
            "their tensors out with --exclude",
        )
    return UsageError(
        "the base's model family is not known, so nothing says which weights the adapter changes",
        path=base.path,
        remedy="name it with --family and --config",
    )


def _merged(base: Checkpoint, model: Model, updates: Adapter, scale: float, cast: ChangedType) -> Stepped:
    """The base with changed weights, under its own names."""
    stored = models.to_hub(base, model, widen=cast.target is not None)
    hub = merged(stored, updates, scale=scale, cast=cast)
    dialect = base.dialect or spellings.detect(base.weights())
    assert dialect is not None  # to_hub has found it
    out = models.from_hub(hub, dialect, in_place=True)
    config = restated(base.config, stored.restated)
    changed = base.with_weights(out.tensors, dialect=dialect, objects={}, config=config)
    return Stepped(changed, {**state_of(base), **out.ignored})


def _changes_embedding(updates: Adapter, base: Checkpoint) -> bool:
    """Whether the embedding is changed: by its name in the hub, or as a matrix outside of layers."""
    changed = {*(target.weight for target in updates.updates), *updates.replaced, *updates.rows}
    weights = base.weights()
    outer = (name for name in changed if name in weights and not block_of(name))
    return EMBEDDING in changed or any(weights[name].ndim == 2 for name in outer)


def _summary(adapter: Checkpoint, settings: AdapterSettings, updates: Adapter, scale: float) -> str:
    ranks = sorted({update.rank for update in updates.updates.values()})
    times = "" if scale == 1 else f", times {scale:g}"
    kind = {"lora": "LoRA", "dora": "DoRA"}[settings.kind]
    changes = []
    if updates.updates:
        changes.append(f"{len(updates.updates)} updates of rank {', '.join(map(str, ranks))}{times}")
    if updates.rows:
        changes.append(f"{sum(len(rows.indices) for own in updates.rows.values() for rows in own.values())} rows")
    if updates.replaced:
        changes.append(f"{len(updates.replaced)} whole tensors")
    name = os.path.basename(os.path.abspath(adapter.path))
    return f"merged with the {kind} adapter {name}: {', and '.join(changes)}"


def _idle(adapter: Checkpoint, settings: AdapterSettings, updates: Adapter) -> list[str]:
    """What of the adapter changes nothing, for a user who expects another model."""
    notes = []
    unused = unused_targets(adapter, settings)
    if unused:
        notes.append(f"the adapter's settings name modules that it has no tensors for: {few(unused, _SHOWN)}")
    names = [str(target) for target in idle(updates)]
    if names:
        notes.append(f"{len(names)} updates are all zeros and change nothing: {few(names, _SHOWN)}")
    return notes
