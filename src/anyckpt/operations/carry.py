"""Carrying an optimizer's state along while its weights are renamed and cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.optimizer import laid_out, renamed, with_masters, with_optimizer
from anyckpt.optimizer.parameters import buffers
from anyckpt.optimizer.state import tag, tagged
from anyckpt.tensor import LazyTensor

_KEPT_OBJECTS = ("args", "opt_param_scheduler", "num_floating_point_operations_so_far")
"""Objects that Megatron's formats read again, whatever the weights are called."""


def moves_state(source: Checkpoint, target: Checkpoint, cut: bool) -> bool:
    """Whether state cannot stay as it is stored: weights have other names or are cut, or ranks held it.

    Args:
        source: as opened.
        target: under the target's names.
        cut: the target is cut for ranks.
    """
    return cut or source.optimizer is not None or not set(source.tensors) <= set(target.tensors)


def carry_optimizer(
    source: Checkpoint,
    target: Checkpoint,
    to: str,
    rename: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]],
) -> tuple[Checkpoint, frozenset[str]]:
    """The target with the source's optimizer state in the form that its format keeps, and the stored names it had.

    Args:
        source: as opened, with all its state.
        target: weights under the target's names.
        to: name of the target's format.
        rename: what was done to the weights.

    Raises:
        MappingError: it cannot be proved which parameter a state is of; the numbers are told.
        UsageError: there is state that nothing here understands, or the format has no place for it.
    """
    found = with_optimizer(source)
    if found.optimizer is None:
        if source.training.has_optimizer:
            raise UsageError(
                "the optimizer's state is of a kind that is not understood",
                path=source.path,
                remedy="leave it out with --optimizer drop",
            )
        return target, frozenset()
    weights = source.weights()
    state = renamed(with_masters(found.optimizer(), weights), _with_buffers(rename, weights))
    objects = {name: source.objects[name] for name in _KEPT_OBJECTS if name in source.objects}
    ready = laid_out(
        replace(
            target,
            objects={**objects, **target.objects},
            training=replace(source.training, has_rng=False),
            optimizer=lambda: state,
        ),
        to,
    )
    own = {source.model_prefix + name for name in weights}
    return ready, frozenset({*objects, *(name for name in source.tensors if name not in own)})


def _with_buffers(
    rename: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]], weights: Mapping[str, LazyTensor]
) -> Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]]:
    """A renaming of a whole model, for its parameters alone: buffers have no state; they go along and are left out."""
    without_state = buffers(weights)
    if not without_state:
        return rename

    def apply(tensors: dict[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        lacking = {name: tensor for name, tensor in without_state.items() if name not in tensors}
        whole = rename({**tensors, **lacking})
        marks = {name: tag(tensor.shape, 0) for name, tensor in tensors.items()}
        marked = rename({**marks, **{name: tag(tensor.shape, 1) for name, tensor in lacking.items()}})
        return {name: tensor for name, tensor in whole.items() if not marked[name].size or not tagged(marked[name])}

    return apply
