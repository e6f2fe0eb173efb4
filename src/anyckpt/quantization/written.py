"""Weights as they are stored quantized, and what a user should know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.quantization.calibrated import Calibration, scale
from anyckpt.quantization.choosing import Choice, is_asked
from anyckpt.quantization.forms import GPT, layout_of
from anyckpt.quantization.largest import ScaleOfTensor, TensorScale, largest_in
from anyckpt.quantization.modelopt import MODELOPT_FILE
from anyckpt.quantization.quantizing import quantized
from anyckpt.quantization.rounding import E4M3, INT8
from anyckpt.quantization.stored import Facts, Layout, Request
from anyckpt.tensor import Constant, LazyTensor, from_array, stack

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("fc", "gate"))
"""Modules that are one when a model runs, and so have one scale of the whole tensor in NVFP4."""
_NUMBERS_OF = {"int8_wo": "int8"} | dict.fromkeys(("fp8", "fp8_per_channel", "fp8_blocks"), "float8_e4m3fn")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_SHOWN = 3


@dataclass(frozen=True)
class Written:
    """A folder's quantized weights.

    Attributes:
        tensors: all weights, quantized or not.
        config: the configuration's ``quantization_config``, or what the format says of it.
        key: where the configuration has it; "" if the format says it.
        files: further files of the folder -> their text.
        choice: which weights are quantized.
        made: name of a quantized weight -> names of what it became.
        numbers: what the codes are, for messages.
        notes: what a user should know.
    """

    tensors: dict[str, LazyTensor]
    config: Facts
    key: str
    files: dict[str, str]
    choice: Choice
    made: dict[str, tuple[str, ...]]
    numbers: str
    notes: tuple[str, ...]


def quantize(
    tensors: Mapping[str, LazyTensor],
    request: Request,
    path: str,
    uncast: Mapping[str, LazyTensor] | None = None,
    calibration: Calibration | None = None,
) -> Written:
    """Weights as they are stored quantized; nothing is read.

    Args:
        tensors: under the names of the form's software.
        request: what is asked for.
        path: of the checkpoint, for messages.
        uncast: the same before they were cast, if they were; see ``Layout.unrounded``.
        calibration: what was found by it, under the same names; None if the request has no statistics.

    Raises:
        UsageError: an option is not possible, or a weight cannot be quantized so, which is named.
    """
    layout = layout_of(request)
    choice = layout.choose(tensors, request.exclude)
    if not choice.weights:
        raise UsageError(
            f"{path}: no weight can be quantized",
            expected="stacked experts" if layout.experts else "matrices of linear modules in numbered layers",
            found=", ".join(f"{name} ({why})" for name, why in list(choice.spared.items())[:_SHOWN]) or "none",
        )
    spared = [module for module, why in choice.spared.items() if why not in ("an embedding", "a normalization")]
    config = layout.facts(request, _with_head(spared))
    if not layout.algorithm:
        note = (
            f"{len(choice.weights)} weights stay numbers, which are quantized ({request.algorithm}) as they are loaded"
        )
        notes = (note, *_of_no_module(request, choice, tensors))
        return Written(dict(tensors), config, layout.key, {}, Choice((), choice.spared), {}, "", notes)
    values = tensors if uncast is None or not layout.unrounded else uncast
    found = Calibration() if calibration is None else calibration
    values = {**values, **found.values}
    result: dict[str, LazyTensor] = {}
    made: dict[str, tuple[str, ...]] = {}
    chosen = set(choice.weights)
    for name, weight in tensors.items():
        if name not in chosen:
            result[name] = found.norms[name].cast(weight.dtype) if name in found.norms else weight
            continue
        try:
            parts = _parts(name, weight, values, chosen, layout, request, found)
        except AnyckptError as error:
            error.tensor, error.path = name, path
            raise
        clash = next((part for part in parts if part != name and part in tensors), None)
        if clash is not None:
            raise UsageError("a tensor has the name of a part of a quantized weight", path=path, tensor=clash)
        made[name] = tuple(parts)
        result.update(parts)
    result.update(_caches(layout, request, found, tensors))
    files = {} if layout.file is None else {MODELOPT_FILE: layout.file(config, request)}
    numbers = _NUMBERS_OF.get(layout.algorithm, layout.algorithm)
    return Written(
        result, config, layout.key, files, choice, made, numbers, tuple(_notes(choice, layout, request, tensors))
    )


def _with_head(spared: list[str]) -> list[str]:
    """With the output layer, which is a module also where its weight is the embedding's."""
    return spared if any(module.endswith("lm_head") for module in spared) else [*spared, "lm_head"]


def _parts(
    name: str,
    weight: LazyTensor,
    values: Mapping[str, LazyTensor],
    chosen: set[str],
    layout: Layout,
    request: Request,
    calibration: Calibration,
) -> dict[str, LazyTensor]:
    """What a weight becomes, by name; its codes are made of what ``values`` has in its place."""
    options = replace(layout.options(request, weight.dtype), name=name)
    siblings = tuple(one for one in _siblings(name) if one in chosen) if layout.siblings else ()
    if len(siblings) > 1:
        options = replace(options, together=tuple(values[one] for one in siblings), names_together=siblings)
    matrix = values[name].permute((0, 2, 1)) if layout.experts else values[name]
    if layout.apart and weight.ndim > 2:
        each = [quantized(matrix[number], layout.algorithm, options) for number in range(matrix.shape[0])]
        roles = {role: stack([expert[role] for expert in each]) for role in each[0]}
    else:
        roles = quantized(matrix, layout.algorithm, options)
    for role, shape in layout.shapes.items():
        roles[role] = roles[role].reshape(shape(roles[role]))
    stem = name if layout.experts else name.removesuffix("weight")
    parts = {stem + ending: roles[role] for role, ending in layout.names.items() if role in roles}
    if "shape" in layout.names:
        parts[stem + layout.names["shape"]] = from_array(np.array(weight.shape, np.int64))
    if layout.second:
        largest = largest_in(options.together or (values[name],), options.names_together or (name,))
        parts[stem + layout.second] = ScaleOfTensor(TensorScale(largest, E4M3.largest), layout.static_shape)
    module = name.removesuffix(".weight")
    if layout.static:
        if request.statistics is None:
            static = request.scale_of(module)
        else:
            least = request.decoder in GPT and request.algorithm in ("fp8", "int8_sq")
            static = calibration.scale_of(module, layout.over, least)
        parts[stem + layout.static] = _number(static, layout.static_shape if weight.ndim == 2 else (1,))
    if layout.inputs:
        factors = calibration.factors_of(module, weight.dtype)
        columns = (*weight.shape[:-2], weight.shape[-1])
        if factors is not None:
            spread = factors if weight.ndim == 2 else stack([factors] * weight.shape[0])
            parts[stem + layout.inputs] = spread
        elif module not in calibration.folded:
            parts[stem + layout.inputs] = Constant(weight.dtype, columns, _one(weight.dtype))
    return parts


def _number(value: float, shape: tuple[int, ...]) -> LazyTensor:
    return from_array(np.array([value], np.float32)).reshape(shape)


def _caches(
    layout: Layout, request: Request, calibration: Calibration, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """The scales of keys and values that are kept in 8 bits: of floats at least 1, as ModelOpt has them."""
    kind = request.cache_kind
    if kind is None:
        return {}
    if not layout.caches or not calibration.caches:
        raise UsageError(
            "keys and values are not kept in 8 bits so",
            expected="a form that stores their scales, and a model whose attention keeps them",
            remedy="say --no-enable-kv-cache",
        )
    made: dict[str, LazyTensor] = {}
    for module, (keys, values) in calibration.caches.items():
        largest = {"k": keys, "v": values, "kv": max(keys, values)}
        for end, what in layout.caches.items():
            if "." in end and f"{module}.{end.rpartition('.')[0]}.weight" not in tensors:
                end = end.rpartition(".")[2]  # of an attention whose keys have no module of their own
            found = scale(largest[what], INT8.largest if kind == "INT8" else E4M3.largest)
            made[f"{module}.{end}"] = _number(found if kind == "INT8" else max(found, 1.0), layout.cache_shape)
    return made


def _one(kind: DType) -> bytes:
    return np.ones(1, kind.numpy).tobytes()


def _siblings(name: str) -> list[str]:
    stem, _, module = name.removesuffix(".weight").rpartition(".")
    group = next((group for group in _SIBLINGS if module in group), (module,))
    return [f"{stem}.{one}.weight" for one in group]


def _of_no_module(request: Request, choice: Choice, tensors: Mapping[str, LazyTensor]) -> list[str]:
    """A note for each glob of modules to leave as they are that matches none; names are those of the target."""
    example = choice.weights[0].removesuffix(".weight")
    return [
        f"--quantize-exclude {glob!r} matches no module, and leaves out nothing: they are named as {example}"
        for glob in request.exclude
        if not any(is_asked(name, name.removesuffix(".weight"), (glob,)) for name in tensors)
    ]


def _notes(choice: Choice, layout: Layout, request: Request, tensors: Mapping[str, LazyTensor]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for module, why in choice.spared.items():
        by_reason.setdefault(why, []).append(module)
    told = [
        f"{', '.join(found[:_SHOWN])}{f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''} ({why})"
        for why, found in by_reason.items()
    ]
    notes = [f"{len(choice.weights)} weights are quantized ({request.algorithm}); not quantized: {'; '.join(told)}"]
    notes += _of_no_module(request, choice, tensors)
    modules = {name.removesuffix(".weight") for name in choice.weights}
    unused = [module for module in request.activation_scales or {} if module not in modules]
    if unused:
        some = f"{', '.join(unused[:_SHOWN])}{' ...' if len(unused) > _SHOWN else ''}"
        notes.append(f"{len(unused)} scales of activations are of modules that are not quantized: {some}")
    experts = [name for name in choice.weights if _EXPERT.search(name)]
    if layout.experts_unread and experts:
        notes.append(
            f"{len(experts)} of them are experts, which vLLM loads so, but not transformers 5, {layout.experts_unread}"
        )
    if layout.static and not request.knows_activations:
        notes.append(
            f"{layout.static} is 1 everywhere, because no activations have been seen: say what it shall be with "
            f"--activation-scale, or choose {layout.instead}, which scales them when the model runs"
        )
    return notes
