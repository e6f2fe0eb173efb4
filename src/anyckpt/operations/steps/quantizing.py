"""Quantizing a checkpoint that has its target's names, where the user asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.formats.format import Format
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.quantization import method_of
from anyckpt.quantization.calibrated import Calibration
from anyckpt.quantization.forms import ALGORITHMS, FORMS, layout_of, layouts_of, usual_form
from anyckpt.quantization.modelopt import MODELOPT_FILE
from anyckpt.quantization.stored import Request
from anyckpt.quantization.written import Written, quantize
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor

DEFAULT_GROUP = 128
"""Columns of a weight with one scale, as AWQ and GPTQ models most often have it."""

_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose linear modules are transformers' ``Conv1D``, with outputs in columns."""


@dataclass(frozen=True)
class Quantized(Stepped):
    """What the step gives.

    Attributes:
        before: the weights that were quantized, by name.
        written: what became of them.
        calibration: what calibration said of them, if there was one.
    """

    before: Mapping[str, LazyTensor] = field(default_factory=dict)
    written: Written | None = None
    calibration: Calibration | None = None


def check_request(request: Request | None, target: Format, others: Mapping[str, Any], *, keeps_state: bool) -> None:
    """Raise UsageError if what is asked of quantizing is not possible, or means nothing.

    Args:
        request: what is asked for; None if nothing is quantized.
        target: the format to write.
        others: options that mean something only with a request -> what was given, None if nothing was.
        keeps_state: whether training state is carried.
    """
    if request is None:
        given = next((option for option, value in others.items() if value is not None), None)
        if given is not None:
            raise UsageError(f"{given} means nothing without --quantize", remedy="leave it out, or say --quantize")
        return
    if not target.quantizes:
        raise UsageError(
            f"quantized weights are not written as {target.name}",
            expected="--to hf or --to trtllm",
            remedy="convert to one of these with --quantize",
        )
    form = request.form or usual_form(request.algorithm)
    held = [one for one in layouts_of(request.algorithm) if one in target.quantizes]
    if request.algorithm in ALGORITHMS and not held:
        raise UsageError(
            f"{target.name} does not hold {request.algorithm}",
            expected=", ".join(dict.fromkeys(name for one in target.quantizes for name in FORMS[one])),
            found=request.algorithm,
            remedy="choose another algorithm, or another format with --to",
        )
    if form in target.quantizes and held and form not in held:
        raise UsageError(
            f"{form} has no {request.algorithm}",
            expected=", ".join(FORMS[form]),
            found=request.algorithm,
            remedy=f"choose another form with --quantize-form: {', '.join(held)}",
        )
    layout = layout_of(request)
    if layout.algorithm != "int4" and others.get("--group-size") is not None:
        raise UsageError(
            f"--group-size means nothing with --quantize {request.algorithm}, whose scales are of a fixed size",
            expected="--quantize int4, int4_awq or w4a8_awq",
            remedy="leave it out",
        )
    if form not in target.quantizes:
        raise UsageError(
            f"{target.name} does not hold {request.algorithm} in the form {form}",
            expected=", ".join(target.quantizes),
            found=form,
            remedy="choose another --quantize-form",
        )
    if keeps_state:
        raise UsageError(
            "training state goes with weights in full precision",
            found="--optimizer keep with --quantize",
            remedy="leave one of them out",
        )


def check_quantizable(checkpoint: Checkpoint) -> None:
    """Raise UsageError if a model is quantized already, or has its linear modules in a form of their own.

    Args:
        checkpoint: under its target's names.
    """
    if checkpoint.quantization is not None:
        raise UsageError(
            f"{checkpoint.path}: the model is quantized already ({method_of(checkpoint.quantization)})",
            expected="weights in full precision",
            remedy="quantize the model that it was made from, or add --dtype bf16 to quantize what it dequantizes to",
        )
    kind = checkpoint.config.get("model_type")
    if kind in _TRANSPOSED:
        raise UsageError(
            f"{checkpoint.path}: linear modules of {kind} have their outputs in columns, and are not loaded quantized",
            remedy="leave out --quantize",
        )


def quantize_checkpoint(
    checkpoint: Checkpoint, request: Request, uncast: Checkpoint, calibration: Calibration | None = None
) -> Quantized:
    """The checkpoint with its linear weights quantized, and its configuration saying so.

    Args:
        checkpoint: under its target's names, cast as the user asks.
        request: what is asked of quantizing.
        uncast: the same before the cast.
        calibration: what the request's statistics say of it, if it has some.

    Raises:
        UsageError: it is quantized already, is no model of this kind, or a weight cannot be quantized so.
    """
    check_quantizable(checkpoint)
    weights = checkpoint.weights()
    written = quantize(weights, request, checkpoint.path, uncast.weights(), calibration)
    prefix = checkpoint.model_prefix
    others = {name: tensor for name, tensor in checkpoint.tensors.items() if name.removeprefix(prefix) not in weights}
    config = {**checkpoint.config, written.key: written.config} if written.key else checkpoint.config
    config = config if checkpoint.config else {}
    files = {name: source for name, source in checkpoint.artifacts.items() if name != MODELOPT_FILE}
    files |= {name: MemorySource(text.encode()) for name, text in written.files.items()}
    changed = replace(
        checkpoint,
        tensors={**{prefix + name: tensor for name, tensor in written.tensors.items()}, **others},
        config=config,
        artifacts=files,
        quantization=written.config,
    )
    before = {name: weights[name] for name in written.choice.weights}
    if calibration is not None:  # what a normalization has taken in is no loss
        folded = [f"{module}.weight" for module in calibration.folded]
        before |= {name: calibration.values[name] for name in folded if name in before}
    casts = Counter(f"{weights[name].dtype.name} -> {written.numbers}" for name in before)
    notes = written.notes
    if calibration is not None and calibration.norms:
        count = len(calibration.norms)
        notes = (
            *notes,
            f"{count} tensors of normalizations are multiplied by what AWQ takes out of weights after them",
        )
    if not config:
        notes = (*notes, f"without a configuration nothing says how: its quantization_config is {written.config}")
    return Quantized(changed, notes=notes, casts=casts, before=before, written=written, calibration=calibration)
