"""What checking a checkpoint found."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

from anyckpt.data_classes import dataclass

if TYPE_CHECKING:
    from anyckpt.operations.steps.looking import LookedAt
    from anyckpt.pickling import Callee


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        where: a file or a tensor.
        problem: what is wrong, in one line.
    """

    where: str
    problem: str


@dataclass
class Checked:
    """How much was looked at.

    Attributes:
        tensors: tensors whose pieces were found inside their files.
        pieces: stored pieces of these.
        digests: runs of bytes that agree with the manifest.
        checksums: CRCs of the container that agree with its bytes.
        published: files that agree with a digest that their publisher gives.
        proved: tensors all of whose bytes agree with a digest or a checksum; nothing says what the others should be.
        model: whether layers and weights were found complete for the model family.
        text: whether these of the text part of a larger model were, of which no more is known.
        scales: of quantized weights and activations, whose numbers were read and looked at.
        values: tensors whose elements were read and looked at.
        pickles: pickles that were looked at for what they call, those within pickles included.
    """

    tensors: int = 0
    pieces: int = 0
    digests: int = 0
    checksums: int = 0
    published: int = 0
    proved: int = 0
    model: bool = False
    text: bool = False
    scales: int = 0
    values: int = 0
    pickles: int = 0


@dataclass
class Verification:
    """The outcome; true if the checkpoint is sound.

    Attributes:
        path: what was checked.
        format: its format; empty if it could not be opened and nothing tells.
        problems: what is wrong; none if the checkpoint is sound.
        warnings: what is odd and may be right.
        checked: how much was looked at.
        unchecked: what was not looked at or not proved, and why, one line each.
        calls: names that the pickles in it ask for, those that run code first.
        opened: whether it could be opened; if not, digests of files alone were looked at.
        part: what this process did of the reading, if another one tells what was found; nothing else is told then.
    """

    path: str
    format: str
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    unchecked: list[str] = field(default_factory=list)
    calls: tuple[Callee, ...] = ()
    opened: bool = True
    part: LookedAt | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong.

        Raises:
            UsageError: this is a part of the work, and no answer.
        """
        if self.part is not None:
            raise self.part.not_known()
        return not self.problems

    @property
    def safe(self) -> bool:
        """Whether no pickle that was read names what runs code when other software loads it."""
        return not any(callee.kind == "code" for callee in self.calls)

    def __bool__(self) -> bool:
        return self.sound

    def to_json(self) -> dict[str, Any]:
        """As ``verify --json`` prints it."""
        if self.part is not None:
            return {"path": self.path, "format": self.format, **self.part.to_json()}
        return {
            "path": self.path,
            "format": self.format,
            "sound": self.sound,
            "opened": self.opened,
            "safe": self.safe,
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": self.warnings,
            "checked": asdict(self.checked),
            "unchecked": self.unchecked,
            "calls": [callee.to_json() for callee in self.calls],
        }

    def _repr_html_(self) -> str:
        from anyckpt.operations.explorer.notebook import of_verification

        return of_verification(self)
