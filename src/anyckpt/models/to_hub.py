"""From a checkpoint to the hub; complete, or an error that lists names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model import WHOLE_NORMS
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.indexing import Array, Shape
from anyckpt.models.hub import Hub, Model, remarks
from anyckpt.models.language.rules import Instance
from anyckpt.models.peel import Peeled, peel, text_alone
from anyckpt.tensor import Constant, LazyTensor, Mapped

_NORM_WEIGHTS = ("norm.weight", "norm_weight")


def to_hub(checkpoint: Checkpoint, model: Model, *, widen: bool = False) -> Hub:
    """The weights of a checkpoint under the hub's names; views only, nothing is read but samples of a redundant head.

    Args:
        checkpoint: with names of any dialect.
        model: what it was identified as.
        widen: parts of one fused tensor that are of different floating-point types become float32, or float64 if one
            is, which is exact: for weights that will be cast.

    Raises:
        MappingError: a tensor or a layer is missing, a stored name is of no rule, a shape contradicts the
            configuration, or a redundant output layer differs from the embedding that it is tied to.
    """
    expected = model.definition.expected(model.config)
    peeled = peel(checkpoint, model, expected)
    if peeled.spelling is None:
        for item in expected:
            _check_shape(peeled, item.hub, item.shape, item)
        tensors = {item.hub: peeled.tensors[item.hub] for item in expected}
        notes = [*model.notes, *([text_alone(model, peeled.beside)] if peeled.beside else [])]
        hub = Hub(model, tensors, peeled.ignored, notes, beside=peeled.beside)
        if WHOLE_NORMS not in model.config.extra:
            return hub
        centred = _with_centred_norms(hub)
        return centred if checkpoint.config_kind in model.definition.whole_norms else replace(centred, restated={})
    tensors = {item.hub: _mapped(item, peeled, widen) for item in expected}
    notes = [*model.notes, *remarks(expected), *peeled.spelling.notes]
    return Hub(model, tensors, peeled.ignored, notes, spelling=peeled.spelling, beside=peeled.beside)


def _mapped(item: Instance, peeled: Peeled, widen: bool) -> LazyTensor:
    """One of the hub's tensors from the family's."""
    if not item.sources:
        return Constant(dtype(peeled.model.config.dtype or "float32"), item.shape)
    operation = item.rule.operation
    for name, shape in zip(item.sources, operation.source_shapes(item.shape, item.config), strict=True):
        _check_shape(peeled, name, shape, item)
    sources = [peeled.tensors[name] for name in item.sources]
    if any(tensor.dtype != sources[0].dtype for tensor in sources):
        sources = _of_one_type([peeled.stored(name) for name in item.sources], sources, widen, peeled.path)
    return operation.to_hub(sources, item.config)


def _with_centred_norms(hub: Hub) -> Hub:
    """Norms that are stored as gamma, as gamma - 1: computed in float32 and rounded to their own type."""
    config = hub.model.config
    plain = replace(config, extra={key: value for key, value in config.extra.items() if key != WHOLE_NORMS})
    tensors = {
        name: Mapped((tensor,), tensor.dtype, _less_one) if name.endswith(_NORM_WEIGHTS) else tensor
        for name, tensor in hub.tensors.items()
    }
    note = "norms are stored as gamma; the family's are gamma - 1, which is computed"
    model = replace(hub.model, config=plain)
    restated = {"layernorm_zero_centered_gamma": True}
    return replace(hub, model=model, tensors=tensors, notes=[*hub.notes, note], restated=restated)


def _less_one(gamma: Array) -> Array:
    wide = gamma.astype(np.float64 if gamma.dtype.itemsize == 8 else np.float32)
    return (wide - 1).astype(gamma.dtype)


def _of_one_type(names: Sequence[str], parts: list[LazyTensor], widen: bool, path: str) -> list[LazyTensor]:
    """The parts of a fused tensor, of different types, widened if they may be.

    Raises:
        MappingError: they may not.
    """
    other = next(number for number, part in enumerate(parts) if part.dtype != parts[0].dtype)
    numbers = all(part.dtype.is_floating and part.dtype.itemsize > 1 for part in parts)
    if not (numbers and widen):
        raise MappingError(
            "parts of one fused tensor have different element types",
            path=path,
            tensor=names[other],
            expected=parts[0].dtype.name,
            found=parts[other].dtype.name,
            remedy="cast all with --dtype" if numbers else "copy the weight files again from the model's origin",
        )
    widest = dtype("float64" if any(part.dtype.itemsize == 8 for part in parts) else "float32")
    return [part.cast(widest) for part in parts]


def _check_shape(peeled: Peeled, name: str, shape: Shape, item: Instance) -> None:
    """Raise MappingError unless a tensor has its shape, or is of a vocabulary and has more rows."""
    tensor = peeled.tensors[name]
    if tensor.shape == shape:
        return
    if item.rule.of_vocabulary and tensor.shape[1:] == shape[1:] and tensor.ndim == len(shape):
        true = peeled.model.config.vocab_size
        if true is None or tensor.shape[0] >= true:
            return
    raise MappingError(
        "its shape contradicts the configuration",
        path=peeled.path,
        tensor=peeled.stored(name),
        expected=shape,
        found=tensor.shape,
        remedy="give the configuration that belongs to these weights with --config",
    )
