"""Putting optimizer state into a checkpoint as a target format keeps it, for the format to write like anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint, OptimizerForm, OptimizerState
from anyckpt.optimizer.parameters import trained
from anyckpt.optimizer.state import MOMENTS, SLOTS, checked, parameters_of, unproved
from anyckpt.tensor import LazyTensor


def has_another_form(target: OptimizerForm | None, source: OptimizerForm | None) -> bool:
    """A target keeps optimizer state in a form of its own, so that a source's cannot stay as it is stored."""
    return target is not None and target.write is not None and (source is None or source.name != target.name)


def left_to_plan(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """The checkpoint with the state in ``optimizer``, for a format whose ``plan`` lays it out, as one file per rank."""
    return replace(checkpoint, optimizer=lambda: state)


def laid_out(checkpoint: Checkpoint, form: OptimizerForm, format_name: str) -> Checkpoint:
    """The checkpoint with its optimizer's state among ``tensors`` and ``objects``, in the form of a target format.

    Args:
        checkpoint: weights under the target's names, in ``optimizer`` the state under the same names (see
            :func:`~anyckpt.optimizer.state.renamed`), and no other training state.
        form: how the target keeps state, with a writer.
        format_name: the target's, for messages.

    Raises:
        FormatError: bytes of the state are missing.
        MappingError: the state does not fit the weights, or the format has no place for this optimizer's.
    """
    if checkpoint.optimizer is None:
        return checkpoint
    assert form.write is not None
    weights = checkpoint.weights()
    state = checked(checkpoint.optimizer(), weights, checkpoint.path)
    _check_trained(state, weights, checkpoint.path)
    if form.adam_only:
        _check_adam(state, format_name, checkpoint.path)
    training = replace(checkpoint.training, has_optimizer=True)
    return form.write(replace(checkpoint, training=training, optimizer=None), state)


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
            f"the optimizer is not Adam, and {format_name} has a place for Adam's state only",
            path=path,
            expected=", ".join(MOMENTS),
            found=", ".join((*state.slots, *state.others)) or "none",
        )
