"""The mean of PEFT's adapters, module by module and without their base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.errors import UsageError
from anyckpt.models.adapters import settings_of, spelling_of
from anyckpt.models.adapters.adapter import LowRank
from anyckpt.models.adapters.mean import mean_update
from anyckpt.models.adapters.peft_names import by_module
from anyckpt.models.adapters.peft_writer import ranks_and_alphas
from anyckpt.models.adapters.settings import scale_of
from anyckpt.operations.steps.aligned_models import check_same
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.weighted_mean import Tensors, means

_APART = "add each to its base with anyckpt merge-lora, and average the models"


def are_adapters(opened: Sequence[Checkpoint]) -> bool:
    """Whether checkpoints are adapters.

    Raises:
        UsageError: only some are, or they are of a kind or naming of which no mean is made.
    """
    settings = [settings_of(checkpoint) for checkpoint in opened]
    if all(own is None for own in settings):
        return False
    for checkpoint, own in zip(opened, settings, strict=True):
        if own is None:
            raise UsageError("is a model, and others are adapters", path=checkpoint.path, remedy=_APART)
        if own.kind != "lora" or spelling_of(checkpoint) != "peft":
            raise UsageError(
                "is an adapter of which no mean is made: a mean of factors is not the mean of their products",
                path=checkpoint.path,
                expected="LoRA with PEFT's names",
                found=own.kind,
                remedy=_APART,
            )
    return True


def mean_of_adapters(opened: Sequence[Checkpoint], shares: Sequence[float]) -> Stepped:
    """The first adapter with the exact mean of all updates, at a rank that is the sum of theirs.

    Whole tensors besides the updates are averaged as those of a model.

    Raises:
        MappingError: an adapter is damaged, or whole tensors have other names or shapes.
        UsageError: an adapter does not say its scale.
    """
    first, paths, total = opened[0], [checkpoint.path for checkpoint in opened], math.fsum(shares)
    grouped: dict[str, list[tuple[LowRank, float, tuple[str, str, str]]]] = {}
    whole: list[Tensors] = []
    for checkpoint, share in zip(opened, shares, strict=True):
        settings = settings_of(checkpoint) or AdapterSettings()
        weights = checkpoint.weights()
        stored = by_module(weights)
        used = set()
        for module, own in stored.modules.items():
            used.update(own.names)
            if own.down is None or own.up is None or own.magnitude is not None:
                raise UsageError("is no plain LoRA of two factors", path=checkpoint.path, tensor=own.names[0])
            bias = own.bias or ("", None)
            scale = scale_of(settings, module, own.down[1].shape[0])
            update = LowRank(own.down[1], own.up[1], scale, bias=bias[1], names=tuple(own.names))
            grouped.setdefault(module, []).append((update, share / total, (own.down[0], own.up[0], bias[0])))
        whole.append({name: tensor for name, tensor in weights.items() if name not in used})
    for other, path in zip(whole[1:], paths[1:], strict=True):
        check_same(whole[0], other, paths[0], path)
    tensors, notes = means(whole, shares, paths)
    scales = {}
    for module, found in grouped.items():
        update = mean_update([(one, share) for one, share, _ in found])
        names = found[0][2]
        tensors.update({names[0]: update.down, names[1]: update.up})
        if update.bias is not None:
            tensors[next(own[2] for _, _, own in found if own[2])] = update.bias
        scales[module] = (update.rank, update.scale)
    told = ranks_and_alphas(scales)
    targets = _targets(opened)
    config = {**first.config, **told, "use_rslora": False, "target_modules": targets} if first.config else {}
    settings = replace(
        settings_of(first) or AdapterSettings(),
        rank=told["r"],
        alpha=told["lora_alpha"],
        rank_stabilized=False,
        ranks=told["rank_pattern"],
        alphas=told["alpha_pattern"],
    )
    notes.append(
        f"the updates are averaged, not their factors: the rank is {told['r']}, the sum of the adapters', and alpha "
        f"{told['lora_alpha']}"
    )
    mean = replace(first, tensors=tensors, model_prefix="", config=config, adapter=settings)
    return Stepped(mean, notes=tuple(notes))


def _targets(opened: Sequence[Checkpoint]) -> str | list[str] | None:
    """What of a model the adapters adapt, in their own words."""
    said = [checkpoint.config.get("target_modules") for checkpoint in opened]
    if all(own == said[0] for own in said) or not said[0]:
        return said[0]
    if not all(isinstance(own, list) for own in said):
        raise UsageError("the adapters name their modules by different patterns", path=opened[0].path, remedy=_APART)
    return sorted({str(name) for own in said if isinstance(own, list) for name in own})
