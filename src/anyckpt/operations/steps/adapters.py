"""Converting adapters: from any naming and form to what a target's framework loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.config.hybrid import letters_of
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.format import Format
from anyckpt.models import Model
from anyckpt.models.adapters import (
    KINDS,
    Adapter,
    Layers,
    completed,
    fused,
    of_one_rank,
    read_adapter,
    separated,
    settings_of,
    spelling_of,
    with_alpha,
    without_empty,
)
from anyckpt.models.adapters.megatron import is_canonical, modules, to_megatron
from anyckpt.models.adapters.peft_writer import plain, to_peft
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.renaming import Renamed, unmoved
from anyckpt.tensor import LazyTensor

FORMS = ("canonical", "fused")
_ONE_RANK = (
    "NeMo 2.5 and Megatron-Bridge 0.4 load canonical adapters of gate and up projections in the right order of rows at "
    "tensor parallel size 1 only; the fused form (--adapter-form fused) loads at any"
)


@dataclass(frozen=True)
class AdapterRequest:
    """What a user says of an adapter.

    Attributes:
        form: ``canonical`` (an update per Hugging Face module) or ``fused`` (one per fused weight of Megatron); as
            the target keeps it without growing, if None.
        alpha: in place of what the adapter says.
    """

    form: str | None = None
    alpha: float | None = None


def opened_adapter(
    checkpoint: Checkpoint,
    request: AdapterRequest,
    *,
    target: Format | None = None,
    names: str | None = None,
    optimizer: str = "drop",
) -> AdapterSettings | None:
    """What an adapter says of itself, with what the user says; None if the checkpoint is no adapter.

    Args:
        checkpoint: an adapter or a model.
        request: what the user says of the adapter.
        target: the format to write, None if that is no matter.
        names: dialect that the user asks for, which only models have.
        optimizer: ``keep`` or ``drop``.

    Raises:
        UsageError: what is asked for is for the other.
        MappingError: it is an adapter of a model whose layers are numbered otherwise.
    """
    if request.form not in (None, *FORMS):
        raise UsageError("unknown form of adapter", expected=" or ".join(FORMS), found=request.form)
    settings = settings_of(checkpoint)
    if settings is None:
        if request != AdapterRequest():
            raise UsageError("is no adapter", path=checkpoint.path, remedy="leave --adapter-form and --alpha out")
        if target is not None and target.adapters == target.name:
            raise UsageError(
                f"is a model, and {target.name} holds adapters", path=checkpoint.path, remedy="convert it to hf"
            )
        return None
    trained = checkpoint.optimizer is not None or checkpoint.training.has_optimizer
    if names is not None or (optimizer == "keep" and trained):
        raise UsageError(
            "is an adapter, of which only the tensors are converted",
            path=checkpoint.path,
            remedy="leave --names out" if names is not None else "leave --optimizer keep out",
        )
    if checkpoint.config_kind == "megatron-args" and letters_of(checkpoint.config) is not None:
        raise MappingError(
            "is an adapter of Megatron-Core's HybridModel, whose layers are numbered as no other model's",
            path=checkpoint.path,
            expected="an adapter of a GPTModel",
            found=f"layers {letters_of(checkpoint.config)}"[:80],
            remedy="merge it in the software that trained it",
        )
    return with_alpha(settings, request.alpha)


def check_kind(checkpoint: Checkpoint, settings: AdapterSettings) -> None:
    """Raise UsageError unless it is known what an adapter changes."""
    if settings.kind not in KINDS:
        raise UsageError(
            "the adapter is of a kind that is not understood",
            path=checkpoint.path,
            expected="LoRA or DoRA",
            found=settings.kind,
            remedy="merge it into its base with the library that made it; copies to peft, safetensors, torch and dcp "
            "keep it as it is",
        )


def base_model(
    checkpoint: Checkpoint, family: str | None, config: Mapping[str, Any] | None
) -> tuple[Model | None, Checkpoint]:
    """The model that an adapter belongs to as far as it or the user tells, and the adapter with that configuration.

    Raises:
        MappingError: the configuration contradicts itself or the family.
        UsageError: it is of no known kind.
    """
    if config is not None:
        checkpoint = replace(checkpoint, config=dict(config), config_kind=models.config_kind(config))
    bare = replace(checkpoint, tensors={}, dialect=None, tokenizer=None, objects={}, state_prefixes=())
    try:
        return models.identify(bare, family=family), checkpoint
    except MappingError:
        if family is not None or config is not None:
            raise
        return None, checkpoint


def rename_adapter(
    checkpoint: Checkpoint, settings: AdapterSettings, naming: Naming, request: AdapterRequest
) -> Renamed:
    """An adapter under the names that a target gives it, in the form asked for, with the base's configuration.

    Args:
        checkpoint: the adapter.
        settings: its own.
        naming: the format to write, and what the user says of the base model.
        request: what the user says of the adapter.

    Raises:
        MappingError: tensors are missing, of no rule, or of another base model.
        UsageError: the target has no adapters, or cannot have these.
    """
    target = naming.target
    dialect = target.dialect(naming.options)
    if target.adapters is None:
        if dialect is not None:
            check_kind(checkpoint, settings)
            raise UsageError(
                f"is an adapter, and {target.name} holds models",
                path=checkpoint.path,
                remedy="convert it to peft, nemo, nemo2 or megatron-bridge, or add it to its base with merge-lora",
            )
        if request != AdapterRequest():
            check_kind(checkpoint, settings)
        if checkpoint.adapter is None:
            return unmoved(checkpoint)
        return unmoved(checkpoint, notes=(_settings_lost(settings, target.name),))
    same = checkpoint.format == target.name and checkpoint.dialect == dialect
    if same and request == AdapterRequest():
        return unmoved(replace(checkpoint, adapter=settings))
    check_kind(checkpoint, settings)
    model, described = base_model(checkpoint, naming.family, naming.config)
    layers = None if model is None else Layers(model)
    adapter = read_adapter(checkpoint, settings, layers)
    if adapter.rows:
        raise UsageError(
            "the adapter replaces rows of single tokens, which no other form or framework has a place for",
            path=checkpoint.path,
            found=next(iter(adapter.rows.values())).popitem()[1].name,
            remedy="merge it into the base with anyckpt merge-lora",
        )
    notes: list[str] = []
    if target.adapters == "peft":
        if layers is None:
            raise _base_needed(checkpoint, target.name)
        return _to_peft(checkpoint, adapter, settings, layers, request, notes)
    adapter = _in_form(adapter, request, layers, checkpoint, target.name, notes)
    tensors, told = _to_megatron(adapter, settings, target.adapters, layers, notes)
    assert dialect is not None
    if any(".mixer." in name for name in tensors):  # Megatron-Core's MambaStack numbers its layers whatever they are
        named = {spellings.by_name(dialect).prefix + name: tensor for name, tensor in tensors.items()}
    else:
        named = spellings.from_hub_names(tensors, dialect)
    configured = _configured(described, model, target.config_kind, naming.dtype, notes)
    renamed = configured.with_weights(named, objects={}, dialect=dialect, adapter=told, optimizer=None)
    return unmoved(renamed, notes=tuple(notes))


def _settings_lost(settings: AdapterSettings, target: str) -> str:
    """What a container without a place for an adapter's settings loses, and what of it --alpha cannot give back."""
    missing = "its alpha" if settings.kind in KINDS else f"that it is of kind {settings.kind}, and how large,"
    note = f"a {target} file has no place for the adapter's settings: {missing} will have to be given"
    lost = [
        name
        for name, there in (
            ("modules' own alphas (alpha_pattern)", settings.alphas),
            ("that alpha is divided by the root of the rank (use_rslora)", settings.rank_stabilized),
            ("which tokens its rows are of (trainable_token_indices)", settings.token_indices),
        )
        if there
    ]
    return f"{note}; keep adapter_config.json too, for no option gives back {', '.join(lost)}" if lost else note


def _base_needed(checkpoint: Checkpoint, target: str) -> UsageError:
    return UsageError(
        f"the base model of the adapter is not known, and {target} needs its names, heads and groups",
        path=checkpoint.path,
        remedy="give the base model's configuration, or its folder, with --config",
    )


def _in_form(
    adapter: Adapter,
    request: AdapterRequest,
    layers: Layers | None,
    checkpoint: Checkpoint,
    target: str,
    notes: list[str],
) -> Adapter:
    """The adapter in the form asked for, or, if none is, as it is."""
    if request.form is None:
        in_parts = any(target_of.part for target_of in adapter.updates)
        if in_parts and any(update.magnitude is not None for update in adapter.updates.values()):
            raise UsageError(
                "Megatron's DoRA adapts fused weights as one, at a rank that is the sum of the parts' ranks",
                path=checkpoint.path,
                remedy="choose --adapter-form fused, or merge it with anyckpt merge-lora",
            )
        return adapter
    if layers is None:
        raise _base_needed(checkpoint, f"--adapter-form {request.form}")
    if request.form == "canonical":
        return separated(adapter, layers)
    before = max((update.rank for update in adapter.updates.values()), default=0)
    joined = fused(adapter, layers)
    after = max((update.rank for update in joined.updates.values()), default=0)
    if after > before:
        notes.append(f"fused updates have rank {after} where the adapter had {before}: {target} computes more")
    return joined


def _to_megatron(
    adapter: Adapter, settings: AdapterSettings, spelling: str, layers: Layers | None, notes: list[str]
) -> tuple[dict[str, LazyTensor], AdapterSettings]:
    if any(target.part for target in adapter.updates) and layers is not None:
        adapter, added = completed(adapter, layers)
        if added:
            notes.append(f"{added} updates of zeros are added: Megatron adapts all parts of a fused weight or none")
    ranks = {update.rank for update in adapter.updates.values()}
    adapter, rank, alpha = of_one_rank(adapter)
    if len(ranks) > 1:
        notes.append(f"ranks {', '.join(map(str, sorted(ranks)))} are padded with zeros to {rank}: Megatron has one")
    if settings.rank_stabilized:
        notes.append(f"alpha is {plain(alpha):.6g}: rsLoRA's scale times the rank, for Megatron divides by the rank")
    kind = "dora" if any(update.magnitude is not None for update in adapter.updates.values()) else "lora"
    told = AdapterSettings(
        kind, rank, plain(alpha), dropout=settings.dropout, targets=tuple(modules(adapter)), base=settings.base
    )
    if spelling == "megatron" and any(target.part in ("gate", "up") for target in adapter.updates):
        notes.append(_ONE_RANK)
    experts = None if layers is None else layers.model.config.num_moe_experts
    return to_megatron(adapter, spelling, experts), told


def _to_peft(
    checkpoint: Checkpoint,
    adapter: Adapter,
    settings: AdapterSettings,
    layers: Layers,
    request: AdapterRequest,
    notes: list[str],
) -> Renamed:
    if request.form == "fused":
        adapter = fused(adapter, layers)
    elif request.form == "canonical":
        adapter = separated(adapter, layers)
    adapter, dropped = without_empty(adapter)
    if dropped:
        notes.append(f"{dropped} updates of zeros are left out")
    written = to_peft(adapter, layers)
    if any(re.search(r"\.experts\.\d+\.", name) for name in written.tensors):
        notes.append("every expert is a module of its own here, which peft finds in transformers 4 only")
    architecture = (layers.model.definition.hugging_face.architectures or ("",))[0]
    config = {
        **written.settings,
        "base_model_name_or_path": settings.base,
        "lora_dropout": settings.dropout,
        "task_type": "CAUSAL_LM" if architecture.endswith("CausalLM") else None,
    }
    if spelling_of(checkpoint) == "peft":
        config = {**checkpoint.config, **config, "task_type": checkpoint.config.get("task_type")}
        config["use_rslora"] = False
    for key in ("lora_bias", "target_parameters"):  # older versions of peft do not know them
        if not config[key]:
            del config[key]
    if settings.base is None:
        notes.append("the adapter does not name its base model: give it to PeftModel.from_pretrained")
    renamed = checkpoint.with_weights(
        written.tensors, objects={}, dialect="peft", optimizer=None, config=config, config_kind=None, adapter=settings
    )
    return unmoved(renamed, notes=tuple(notes))


def _configured(
    described: Checkpoint, model: Model | None, kind: str | None, dtype: str | None, notes: list[str]
) -> Checkpoint:
    """With the base model's configuration in a framework's spelling."""
    if kind is None or described.config_kind == kind:
        return described
    if model is None:
        if described.config:
            notes.append("the base model's family is not known: its configuration is left out")
        return replace(described, config={}, config_kind=None)
    named = model if dtype is None else model.with_dtype(dtype)
    return replace(described, config=models.render_config(named, kind, notes=notes), config_kind=kind)


def unused_targets(checkpoint: Checkpoint, settings: AdapterSettings) -> list[str]:
    """Modules that a PEFT adapter's settings name and its tensors do not have; patterns are not looked at."""
    if spelling_of(checkpoint) != "peft":
        return []
    names = checkpoint.weights()
    plain_names = (target for target in settings.targets if re.fullmatch(r"[A-Za-z_][\w.]*", target))
    return [target for target in plain_names if not any(f".{target}." in name for name in names)]


def facts(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What ``inspect`` says of an adapter, None of a model."""
    settings = settings_of(checkpoint)
    if settings is None:
        return None
    weights = checkpoint.weights()
    spelling = spelling_of(checkpoint)
    return {
        "kind": settings.kind,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "rank_stabilized": settings.rank_stabilized,
        "form": "canonical" if spelling != "megatron" or is_canonical(weights) else "fused",
        "names": spelling,
        "targets": list(settings.targets),
        "base": settings.base,
    }
