"""Whether a checkpoint's weights are a whole model or adapter, with names that its loaders find."""

from __future__ import annotations

from anyckpt import models, quantization
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model import PART_OF
from anyckpt.errors import FormatError, LastingError, MappingError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.models import Model, adapters
from anyckpt.models.complete import some
from anyckpt.models.heads import has_other_head, trunk_of
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.verification import Problem, Verification


def check_model(checkpoint: Checkpoint, result: Verification) -> None:
    """Whether the weights are all that the configuration asks for, and scales are numbers."""
    try:
        whole = join_ranks(checkpoint)
        told = {*result.warnings, *checkpoint.unloadable}
        result.warnings += [text for text in whole.warnings if text not in told]
        if adapters.settings_of(whole) is not None:
            _check_adapter(whole, result)
            return
        if whole.quantization is not None and not quantization.is_understood(whole.quantization):
            method = quantization.method_of(whole.quantization)
            result.warnings.append(f"whether the model is complete is not known: it is quantized by {method}")
            return
        _check_scales(whole, result)
        whole = in_full_precision(whole, "bfloat16").checkpoint
        model = identify(whole)
        if model is None:
            return
        _check_hub(_check_complete(whole, model, result), result)
    except (FormatError, MappingError) as error:
        if error.path == checkpoint.path:
            error.path = None
        result.problems.append(Problem(checkpoint.path, str(error)))


def _check_scales(whole: Checkpoint, result: Verification) -> None:
    """The numbers of a quantized model's scales; whether they fit its weights shows when these are dequantized."""
    if whole.quantization is None:
        return
    try:
        for scale in quantization.scales_checked(whole.weights(), whole.quantization):
            result.checked.scales += 1
            if scale.problem is not None:
                result.problems.append(Problem(scale.name, scale.problem))
    except LastingError as error:  # of a file that is cut short, which its pieces show too
        result.problems.append(Problem(whole.path, f"{error}; scales after it were not checked"))


def _check_hub(hub: models.Hub, result: Verification) -> None:
    """What a complete hub says of the model: all, or all of its text."""
    whole = hub.model.config.extra.get(PART_OF)
    if whole is None and not hub.beside:
        result.checked.model = True
        return
    result.checked.text = True
    if not hub.beside:
        result.warnings.append(
            f"the configuration is of a {whole} model, and no tensor is of another part of it than its text"
        )
        return
    parts = dict.fromkeys(name.partition(".")[0] for name in hub.beside)
    result.unchecked.append(
        f"whether {', '.join(parts)} of the {whole or 'larger'} model are complete: no rule knows their "
        f"{len(hub.beside)} tensors"
    )


def check_names(checkpoint: Checkpoint, result: Verification) -> None:
    """Whether weights have the names of transformers' classes in a format that these load."""
    if registry.by_name(checkpoint.format).dialect(WriteOptions()) != "hf":
        return
    try:
        bare = models.bare_names(checkpoint)
    except MappingError as error:
        result.problems.append(Problem(checkpoint.path, str(error)))
        return
    if bare is None and has_other_head(checkpoint):
        return  # their classes call the trunk by other names than its own
    if bare is None or bare.wrappers:
        before = "" if bare is None else f", for {' and '.join(bare.wrappers)} of a wrapper is in them"
        first = next(iter(checkpoint.weights()))
        problem = f"transformers does not find the weights under these names{before}: {first}; convert it with --to hf"
        result.problems.append(Problem(checkpoint.path, problem))


def _check_complete(whole: Checkpoint, model: Model, result: Verification) -> models.Hub:
    """The weights, which are those of the model, or of its trunk if its class has another head or none."""
    if not has_other_head(whole):
        try:
            return models.to_hub(whole, model, widen=True)
        except MappingError:
            if trunk_of(whole, model) is None:
                raise
    trunk = trunk_of(whole, model)
    bare = whole if trunk is None else whole.with_weights(trunk.tensors)
    hub = models.to_hub(bare, model if trunk is None else trunk.model, widen=True)
    if trunk is not None and trunk.beside:
        of = trunk.kind or "the model"
        result.unchecked.append(f"what is beside the trunk of {of}, as no rule covers it: {some(trunk.beside)}")
    return hub


def _check_adapter(checkpoint: Checkpoint, result: Verification) -> None:
    settings = adapters.settings_of(checkpoint)
    if settings is not None and settings.kind not in adapters.KINDS:
        result.warnings.append(f"whether the adapter is complete is not known: it is of kind {settings.kind}")
        return
    result.warnings += adapters.check_adapter(checkpoint)
