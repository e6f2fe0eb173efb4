"""What comparing two checkpoints tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.operations.steps.configurations import Setting
from anyckpt.operations.steps.looking import LookedAt
from anyckpt.operations.steps.movement import Movement, by_layer, most_moved


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is in both checkpoints, and not the same.

    Attributes:
        name: under the names that were compared.
        reason: ``shape``, ``dtype`` (the values may or may not differ too: see ``max_abs``) or ``values``.
        max_abs: largest absolute difference over elements that are finite in both, or None.
        max_rel: largest ``|a - b| / |b|`` over these, or None.
        a: type and shape in the first checkpoint.
        b: type and shape in the second.
        elements: elements that differ beyond the tolerance, or None if shapes differ.
        nonfinite: how many of these are NaN or infinite on one side at least, or None if shapes differ.
        nan: how many of these are NaN on one side at least, or None if shapes differ.
    """

    name: str
    reason: str
    max_abs: float | None
    max_rel: float | None
    a: str
    b: str
    elements: int | None = None
    nonfinite: int | None = None
    nan: int | None = None


@dataclass(frozen=True)
class Difference:
    """What two checkpoints have in common and what not; true if they differ.

    Attributes:
        compared: tensors that are in both.
        only_in_a: names of tensors that only the first has.
        only_in_b: names of tensors that only the second has.
        different: tensors that are in both and differ.
        names: ``hub``, ``weights`` (stored names without their common prefix) or ``stored``.
        notes: what a user should know about the comparison.
        configuration: what the configurations say differently.
        state: what of the training state differs that is no tensor both have: where training stood, objects,
            hyperparameters of optimizers, an optimizer or random states that one alone has.
        not_compared: what one of the two has, or both, that was not looked at.
        complete: whether weights, configurations and training state were compared, but for what formats and layouts
            keep each in its own way.
        files: with ``raw``, files of one name besides weights and configuration whose bytes differ.
        movements: how far each tensor is from the other, if ``statistics`` asks for it, else None; not of tensors
            that differ in shape, nor of types that numpy cannot compute with.
        part: what this process did of the comparing, if another one tells what differs; nothing else is told then.
    """

    compared: int
    only_in_a: list[str]
    only_in_b: list[str]
    different: list[TensorDifference]
    names: str
    notes: tuple[str, ...] = ()
    configuration: tuple[Setting, ...] = ()
    state: tuple[Setting, ...] = ()
    not_compared: tuple[str, ...] = ()
    complete: bool = True
    movements: tuple[Movement, ...] | None = None
    files: tuple[Setting, ...] = ()
    part: LookedAt | None = None

    @property
    def layers(self) -> list[Movement] | None:
        """How far each layer is from the other, in the order of the names; None without ``statistics``."""
        return None if self.movements is None else by_layer(self.movements)

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs; with ``complete``, that is all that was asked for.

        Raises:
            UsageError: this is a part of the work, and no answer.
        """
        if self.part is not None:
            raise self.part.not_known()
        beside = self.configuration or self.state or self.files
        return not (self.only_in_a or self.only_in_b or self.different or beside)

    def __bool__(self) -> bool:
        return not self.equal

    def most_moved(self, *, sort: str | None = None, top: int | None = None, layers: bool = False) -> list[Movement]:
        """The tensors or layers that differ, those that moved most first.

        Args:
            sort: ``relative``, ``max``, ``mean``, ``cosine`` (the smallest first) or ``name``; if None, ``relative``
                with ``top`` and else their order in the checkpoint.  What is NaN comes before all.
            top: how many; all of them if None.
            layers: layers in place of tensors.

        Raises:
            UsageError: there are no statistics, or there is no such way to sort.
        """
        movements = self.layers if layers else self.movements
        if movements is None:
            raise UsageError("how far tensors moved is not known", remedy="call diff with statistics=True")
        return most_moved(movements, sort or ("relative" if top is not None else None), top)

    def to_json(self, *, sort: str | None = None, top: int | None = None) -> dict[str, Any]:
        """As ``diff --json`` prints it; ``sort`` and ``top`` as of ``most_moved``."""
        if self.part is not None:
            return self.part.to_json()
        told: list[Sequence[Movement] | None] = [self.movements, self.layers]
        if self.movements is not None and (sort is not None or top is not None):
            told = [self.most_moved(sort=sort, top=top, layers=layers) for layers in (False, True)]
        movements, layers = (None if some is None else [movement.to_json() for movement in some] for some in told)
        return {
            "equal": self.equal,
            "complete": self.complete,
            "compared": self.compared,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "different": [asdict(tensor) for tensor in self.different],
            "configuration": [asdict(setting) for setting in self.configuration],
            "state": [asdict(setting) for setting in self.state],
            "files": [asdict(setting) for setting in self.files],
            "not_compared": list(self.not_compared),
            "names": self.names,
            "notes": list(self.notes),
            "movements": movements,
            "layers": layers,
        }

    def _repr_html_(self) -> str:
        from anyckpt.operations.explorer.notebook import of_difference

        return of_difference(self)
