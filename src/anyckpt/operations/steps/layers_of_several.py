"""A model of layers of several models, or of one model's layers in another order or several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError, UsageError
from anyckpt.operations.steps.layer_settings import inside_with_layers, layers_of, with_layers
from anyckpt.operations.steps.layer_stack import Stack, find_stack, two_stacks
from anyckpt.tensor import LazyTensor

_BEFORE = ("embed", ".wte.", ".wpe.")


def is_before_layers(name: str) -> bool:
    """Whether a weight's name is that of an embedding, which a model has before its layers."""
    return any(part in f".{name}" for part in _BEFORE)


def put_together(parts: Sequence[tuple[Checkpoint, range]]) -> tuple[Checkpoint, list[str]]:
    """The first model with layers of all of them, one stretch after the other, and what to say of its configuration.

    What comes before the layers is the first model's, what comes behind them the last one's, as mergekit has it.

    Args:
        parts: models of one architecture, under the same names, and which of their layers.

    Raises:
        MappingError: the models are not of one architecture.
        UsageError: a model has not these layers, or has two stacks, or its configuration does not fit others.
    """
    first, last = parts[0][0], parts[-1][0]
    stack = _stack(first)
    tensors: dict[str, LazyTensor] = {}
    offset = 0
    for checkpoint, layers in parts:
        own = _stack(checkpoint)
        if own.name != stack.name or own.stacked:
            raise MappingError(
                "the models name their layers differently", path=checkpoint.path, expected=stack.name, found=own.name
            )
        if layers.stop > own.count:
            raise UsageError(
                "has not so many layers", path=checkpoint.path, expected=f"at most {own.count}", found=layers.stop
            )
        for name, tensor in checkpoint.weights().items():
            layer = own.layer(name)
            if layer is not None and layer in layers:
                tensors[own.at(name, offset + layer - layers.start)] = tensor
        offset += len(layers)
    behind = last.weights()
    around = {
        name: tensor if is_before_layers(name) else behind.get(name, tensor)
        for name, tensor in first.weights().items()
        if stack.layer(name) is None
    }
    taken = [layer for _, layers in parts for layer in layers]
    config, notes = with_layers(first.config, taken, first.path)
    made = replace(
        first.with_weights({**around, **tensors}),
        config=config,
        details=dict(inside_with_layers(first.details, taken, stack.count, first.path)),
        trainer=inside_with_layers(first.trainer, taken, stack.count, first.path),
    )
    return made, notes


def _stack(checkpoint: Checkpoint) -> Stack:
    two = two_stacks(checkpoint.weights())
    if two:
        raise UsageError(
            "has several stacks of layers, and a layer_range says of none which it is",
            path=checkpoint.path,
            found=", ".join(sorted(stack.name for stack in two.values())),
            remedy="leave layers out with anyckpt convert --keep-layers encoder:0-3,decoder:0-3",
        )
    return find_stack(checkpoint.weights(), layers_of(checkpoint.config), checkpoint.path)
