"""A model with rows for new tokens: in the embedding, the output layer and what else has a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, OptimizerState, storage_key
from anyckpt.config.own_part import with_vocabulary
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.models import Model
from anyckpt.models.dialects import spellings
from anyckpt.models.hub import head_and_embedding
from anyckpt.models.tokens import token_facts
from anyckpt.operations.steps.layout_request import NewRows
from anyckpt.operations.steps.mean_rows import mean_rows
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.recorded_renaming import Renaming
from anyckpt.optimizer.read import with_optimizer
from anyckpt.optimizer.state import MASTER
from anyckpt.tensor import LazyTensor, concatenate

_HEAD = "output_layer.weight"
_PADDED = ("padded_vocab_size", "override_vocab_size")


@dataclass(frozen=True)
class Grown(Stepped):
    """A model with a larger vocabulary.

    Attributes:
        given: the configuration that the user gave, with that vocabulary; None if none was given.
    """

    given: dict[str, Any] | None = None


def grow_vocabulary(
    checkpoint: Checkpoint, size: int, fill: NewRows, given: Mapping[str, Any] | None, family: str | None
) -> Grown:
    """The model with this many tokens.

    Args:
        checkpoint: whole.
        size: true vocabulary, larger than the model's.
        fill: what new rows are: the mean of those that are there, or zeros.
        given: the configuration, where the user gives one.
        family: the model family, where the checkpoint does not tell.

    Raises:
        MappingError: the model is incomplete.
        UsageError: the family is not known, or the vocabulary is not smaller.
    """
    model = identify(checkpoint, family=family, config=given)
    if model is None:
        raise UsageError(
            "which rows are those of the vocabulary is not known without the model's family",
            path=checkpoint.path,
            remedy="name it with --family and --config",
        )
    weights, prefix = checkpoint.weights(), checkpoint.model_prefix
    names, stored = _of_vocabulary(checkpoint, model)
    if not names:
        raise UsageError(
            f"--new-rows fills rows of new tokens, and family {model.family} has no tensor with a row for each",
            path=checkpoint.path,
            remedy="leave --new-rows and --vocab-size out",
        )
    true = min(model.config.vocab_size or stored, stored)
    if size <= true:
        raise UsageError(
            "--new-rows fills rows of new tokens, and there are none",
            path=checkpoint.path,
            expected=f"a --vocab-size above {true}",
            found=size,
            remedy="leave --new-rows out",
        )
    by_family = (checkpoint.dialect or spellings.detect(weights)) in (None, "hf")
    rows = size if by_family else replace(model.config, vocab_size=size, padded_vocab_size=None).rows or size
    grow = partial(_grown, names=names, true=true, size=size, rows=rows)
    tensors = {prefix + name: tensor for name, tensor in grow(weights, fill=fill).items()}
    state = with_optimizer(checkpoint).optimizer
    after = replace(
        checkpoint,
        tensors={name: tensors.get(name, tensor) for name, tensor in checkpoint.tensors.items()},
        config=_said(checkpoint.config, true, size, rows, checkpoint.config_kind)
        if given is None
        else checkpoint.config,
        details=dict(_inside(checkpoint.details, true, size, rows)),
        trainer=_inside(checkpoint.trainer, true, size, rows),
        optimizer=None if state is None else partial(_state, checkpoint, grow, fill),
    )
    told = f"the vocabulary grows from {true} tokens to {size}: {_FILLED[fill]} in {', '.join(names)}"
    tokens = token_facts(checkpoint.tokenizer).count
    count = "no tokenizer goes along to compare with" if tokens is None else f"the tokenizer has {tokens} tokens"
    kind = models.config_kind(given) if given is not None else None
    changed = None if given is None else _said(given, true, size, rows, kind)
    return Grown(after, notes=(told, count), given=changed)


_FILLED = {"mean": "new rows are the mean of the others", "zeros": "new rows are zeros"}


def _of_vocabulary(checkpoint: Checkpoint, model: Model) -> tuple[list[str], int]:
    """Names of the weights that have a row for each token, and how many rows they have."""
    weights = checkpoint.weights()

    def in_hub(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        return models.to_hub(checkpoint.with_weights(tensors), model).tensors

    made = Renaming(in_hub, weights, whole=True).sources
    hub = {rule.hub for rule in model.definition.rules if rule.of_vocabulary}
    found = [name for target in made if target in hub for name in made[target]]
    rows = max((weights[name].shape[0] for name in found), default=0)
    keys = {storage_key(weights[name]) for name in found} - {None}
    ends = tuple(f".{'.'.join(name.split('.')[-2:])}" for name in (*found, head_and_embedding(model)[0], _HEAD))
    tied = [
        name
        for name, tensor in weights.items()
        if tensor.shape[:1] == (rows,) and (storage_key(tensor) in keys or f".{name}".endswith(ends))
    ]
    return [name for name in weights if name in {*found, *tied}], rows


def _grown(
    tensors: Mapping[str, LazyTensor], *, names: list[str], true: int, size: int, rows: int, fill: NewRows
) -> dict[str, LazyTensor]:
    """Tensors of the weights' names, of which those of the vocabulary have more rows; one tensor stays one."""
    made: dict[Any, LazyTensor] = {}
    result = dict(tensors)
    for name in names:
        if name not in tensors:
            continue
        tensor = tensors[name]
        key = storage_key(tensor) or name
        if key not in made:
            own = tensor.narrow(0, 0, true)
            grown = concatenate([own, mean_rows(own, size - true)], 0) if fill == "mean" else own
            made[key] = grown.pad(0, rows) if grown.shape[0] < rows else grown
        result[name] = made[key]
    return result


def _state(checkpoint: Checkpoint, grow: Any, fill: NewRows) -> OptimizerState:
    """The optimizer's state: masters as the weights, and zeros of all else for what was never trained."""
    find = with_optimizer(checkpoint).optimizer
    assert find is not None
    state = find()
    slots = {slot: grow(own, fill=fill if slot == MASTER else "zeros") for slot, own in state.slots.items()}
    return replace(state, slots=slots)


def _said(config: Mapping[str, Any], true: int, size: int, rows: int, kind: str | None) -> dict[str, Any]:
    """A configuration with the vocabulary."""
    if not config:
        return {}
    if kind == "hf":
        return with_vocabulary(config, size)
    return {**_inside(config, true, size, rows), "vocab_size": size}


def _inside(value: Any, true: int, size: int, rows: int) -> Any:
    """A configuration, or what a format keeps of a run, with the vocabulary wherever it says it."""
    if not isinstance(value, Mapping):
        return value
    inner = {key: _inside(item, true, size, rows) for key, item in value.items()}
    if inner.get("vocab_size") == true:
        inner["vocab_size"] = size
    for key in _PADDED:
        if type(inner.get(key)) is int and inner[key] >= true:
            inner[key] = rows
    return inner if any(inner[key] is not value[key] for key in inner) else value
