"""Which of Megatron-Core's models a decoder is written as: GPTModel, or HybridModel, whose layers are half as large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config import hybrid as arguments
from anyckpt.errors import MappingError
from anyckpt.models.dialects import hybrid as names
from anyckpt.operations.steps.naming import Naming

_KIND = "megatron-args"


def is_in_halves(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a HybridModel that is a GPTModel's blocks in halves, as its configuration says."""
    return checkpoint.config_kind == _KIND and arguments.letters_of(checkpoint.config) is not None


def wants_halves(checkpoint: Checkpoint, naming: Naming) -> bool:
    """Whether blocks are written as two layers each: as the user says, else as the source has them."""
    if naming.target.config_kind != _KIND:
        return False
    asked = naming.options.megatron_model
    return is_in_halves(checkpoint) if asked is None else asked == "hybrid"


def changes(checkpoint: Checkpoint, naming: Naming) -> bool:
    """Whether the user asks for the other model than the source is of."""
    return naming.options.megatron_model is not None and is_in_halves(checkpoint) != wants_halves(checkpoint, naming)


def in_model(checkpoint: Checkpoint, halves: bool, notes: list[str]) -> Checkpoint:
    """A checkpoint whose arguments describe the model that its weights are of, and whose modules' states go with it.

    Args:
        checkpoint: with weights under the target's names, arguments and states still of either model.
        halves: whether the weights are of a HybridModel.
        notes: what a user must do for it is appended here.

    Raises:
        MappingError: Megatron-Core has no such HybridModel, or the arguments contradict themselves.
    """
    if checkpoint.config_kind != _KIND:
        return checkpoint
    config = (
        arguments.hybrid_arguments(checkpoint.config, notes) if halves else arguments.gpt_arguments(checkpoint.config)
    )
    return replace(checkpoint, config=config)


def states_in_model(checkpoint: Checkpoint, source: Checkpoint, halves: bool) -> Checkpoint:
    """The checkpoint with its modules' states under the names of the model that its weights are of."""
    states = checkpoint.extra_states
    if states is None or is_in_halves(source) == halves:
        return checkpoint
    return replace(checkpoint, extra_states=_renamed(states, names.half_name if halves else names.block_name))


def _renamed(states: Callable[[], Mapping[str, Any]], called: Callable[[str], str]) -> Callable[[], Mapping[str, Any]]:
    def found() -> dict[str, Any]:
        return {called(name): state for name, state in states().items()}

    return found


def check_arguments(checkpoint: Checkpoint, naming: Naming) -> None:
    """Raise MappingError where the user asks for another model and no arguments tell of the one that there is."""
    if naming.options.megatron_model is not None and checkpoint.config_kind != _KIND:
        raise MappingError(
            "which of Megatron-Core's models it is cannot be told without the model's arguments",
            path=checkpoint.path,
            found=f"a configuration of kind {checkpoint.config_kind}" if checkpoint.config else "no configuration",
            remedy="name the family with --family and --config, or leave --megatron-model out",
        )
