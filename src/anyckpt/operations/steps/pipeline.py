"""What a step of an operation is: it takes a checkpoint and gives one, and tells what it left out, cast and found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import field

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass


@dataclass(frozen=True)
class Stepped:
    """What a step gives.

    Attributes:
        checkpoint: what the next step takes.
        ignored: stored names that are left out from here on -> reason.
        notes: what a user should know of the output.
        casts: "float32 -> bfloat16" -> number of tensors.
        moved: stored names of which an earlier step said that they are left out, or of which no byte is in the output,
            and that are in it in another form.
    """

    checkpoint: Checkpoint
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    casts: Mapping[str, int] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()


class Pipeline:
    """Collects what steps tell, one after the other.

    Attributes:
        ignored: stored names that are left out -> reason.
        notes: in the order of the steps.
        casts: of all steps together.
        moved: names of which nobody is to say that they are left out.
    """

    def __init__(self) -> None:
        self.ignored: dict[str, str] = {}
        self.notes: list[str] = []
        self.casts: Counter[str] = Counter()
        self.moved: set[str] = set()

    def take(self, step: Stepped) -> Checkpoint:
        """The step's checkpoint, after noting what it told."""
        self.moved |= step.moved
        self.ignored = self.without_moved({**self.ignored, **step.ignored})
        self.notes += step.notes
        self.casts.update(step.casts)
        return step.checkpoint

    def without_moved(self, ignored: Mapping[str, str]) -> dict[str, str]:
        """Those of which it holds that they are left out."""
        return {name: reason for name, reason in ignored.items() if name not in self.moved}
