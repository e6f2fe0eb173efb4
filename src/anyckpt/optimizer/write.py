"""Putting optimizer state into a checkpoint as a target format keeps it, for the format to write like anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.errors import UsageError
from anyckpt.optimizer.parameters import trained
from anyckpt.optimizer.state import DROP, MOMENTS, SLOTS, checked, parameters_of, unproved
from anyckpt.optimizer.write_model_space import write_model_space
from anyckpt.optimizer.write_named import write_named
from anyckpt.optimizer.write_numbered import write_numbered
from anyckpt.tensor import LazyTensor

_WRITERS: Mapping[str, Callable[[Checkpoint, OptimizerState], Checkpoint]] = {
    "megatron-core": write_model_space,
    "megatron-bridge": write_model_space,
    "lightning": write_numbered,
    "dcp": write_named,
}
BY_THEMSELVES = ("megatron-lm",)
"""Formats that lay out ``Checkpoint.optimizer`` themselves, because they write a file per rank."""

_ADAM = ("megatron-core", "megatron-bridge", *BY_THEMSELVES)
"""Formats of trainers whose own checkpoints hold Adam's state in a form of its own."""

_ALIKE = frozenset({"megatron-core", "megatron-core-zarr", "megatron-bridge"})


def has_another_form(format_name: str, source_format: str) -> bool:
    """A target keeps optimizer state in a form of its own, so that a source's cannot stay as it is stored."""
    same = format_name == source_format or {format_name, source_format} <= _ALIKE
    return not same and (format_name in _WRITERS or format_name in BY_THEMSELVES)


def laid_out(checkpoint: Checkpoint, format_name: str) -> Checkpoint:
    """The checkpoint with its optimizer's state among ``tensors`` and ``objects``, in the form of a target format.

    Args:
        checkpoint: weights under the target's names, in ``optimizer`` the state under the same names (see
            :func:`~anyckpt.optimizer.state.renamed`), and no other training state.
        format_name: the target's, as in ``--to``.

    Raises:
        FormatError: bytes of the state are missing.
        MappingError: the state does not fit the weights, or the format has no place for this optimizer's.
        UsageError: the format has no place for optimizer state.
    """
    if checkpoint.optimizer is None:
        return checkpoint
    writer = _WRITERS.get(format_name)
    if writer is None and format_name not in BY_THEMSELVES:
        raise UsageError(
            f"{format_name} has no place for optimizer state",
            path=checkpoint.path, expected=", ".join((*_WRITERS, *BY_THEMSELVES)), remedy=DROP,
        )  # fmt: skip
    weights = checkpoint.weights()
    state = checked(checkpoint.optimizer(), weights, checkpoint.path)
    _check_trained(state, weights, checkpoint.path)
    if format_name in _ADAM:
        _check_adam(state, format_name, checkpoint.path)
    if writer is None:
        return checkpoint
    training = replace(checkpoint.training, has_optimizer=True)
    return writer(replace(checkpoint, training=training, optimizer=None), state)


def _check_trained(state: OptimizerState, weights: Mapping[str, LazyTensor], path: str) -> None:
    """Raise MappingError unless all that has state can be a parameter."""
    own = trained(weights)
    unknown = next((name for name in parameters_of(state) if name not in own), None)
    if unknown is not None:
        raise unproved("has optimizer state but is no parameter", path=path, tensor=unknown)


def _check_adam(state: OptimizerState, format_name: str, path: str) -> None:
    """Raise MappingError unless it is Adam's state of at least one parameter."""
    foreign = [slot for slot in (*state.slots, *state.others) if slot not in SLOTS]
    if foreign or any(not state.slots.get(slot) for slot in MOMENTS):
        raise unproved(
            f"the optimizer is not Adam, and {format_name} has a place for Adam's state only", path=path,
            expected=", ".join(MOMENTS), found=", ".join((*state.slots, *state.others)) or "none",
        )  # fmt: skip
