"""How a format keeps an optimizer's state."""

from __future__ import annotations

from collections.abc import Callable

from anyckpt.checkpoint.opened import Checkpoint
from anyckpt.checkpoint.training import OptimizerState
from anyckpt.data_classes import dataclass


@dataclass(frozen=True)
class OptimizerForm:
    """How a format keeps an optimizer's state; a reader of the form gives it as ``Checkpoint.optimizer``.

    Attributes:
        name: state stays as it is stored between formats with forms of one name.
        write: gets the weights under the format's names and the state under the same names, and gives the checkpoint
            that ``Format.plan`` lays out: with the state among tensors and objects, or as ``Checkpoint.optimizer``.
            Raises MappingError for state that has no place.  None if state can only stay as it is stored.
        adam_only: it has a place for Adam's state only.
    """

    name: str
    write: Callable[[Checkpoint, OptimizerState], Checkpoint] | None = None
    adam_only: bool = False
