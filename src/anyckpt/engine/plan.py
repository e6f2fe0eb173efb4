"""A plan: the files of an output, and for each the parts that it consists of, in order.

A plan is plain data.  It can be printed (``--dry-run``), divided between workers, interrupted and resumed, and
whatever the order in which its blocks are written, the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class Literal:
    """Bytes known when planning: headers, metadata, configuration."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class TensorData:
    """A tensor's elements in C order, little-endian.

    Attributes:
        name: the tensor's stored name in the output; the manifest lists its digest under it.
        tensor: where the elements come from.
        piece: which part of the tensor called ``name`` this is, for messages and the manifest, if it is cut.
    """

    name: str
    tensor: LazyTensor
    piece: str = ""

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


@dataclass(frozen=True)
class SourceData:
    """A whole source, verbatim: an artifact, a tokenizer file."""

    source: ByteSource

    @property
    def nbytes(self) -> int:
        return self.source.size


@dataclass(frozen=True)
class Computed:
    """Bytes that depend on checksums of other parts of the same file: a zip's descriptors and directory.

    Attributes:
        nbytes: how many, known when planning.
        parts: indices in the file's ``parts`` of the parts whose CRC-32 is needed (Literal, TensorData, SourceData).
        build: from the CRC-32 of each of these, in order, to the bytes.
    """

    nbytes: int
    parts: tuple[int, ...]
    build: Callable[[Sequence[int]], bytes] = field(compare=False)


Part = Literal | TensorData | SourceData | Computed


@dataclass(frozen=True)
class OutputFile:
    """One file of an output.

    Attributes:
        path: relative to the output directory, with ``/``; empty if the output is this single file.
        parts: what it consists of.
        stage: files are finished in rising stage; a later stage is written only when all before it are durable.
            0 holds data, 1 metadata, 2 what marks a checkpoint as complete.
    """

    path: str
    parts: tuple[Part, ...]
    stage: int = 0

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """Everything that an output consists of.

    Attributes:
        format: name of the output's format.
        files: the files; exactly one with an empty path if the output is a single file.
        ignored: source names that the output leaves out, with the reason.
        casts: "float32 -> bfloat16" -> number of tensors.
        notes: what a user should know about the output (a tie resolved, a tokenizer missing).
        links: symbolic links to make: path -> target, both relative; for formats whose directories have them.
        carried: files of the source whose contents are in the output in another form than their bytes.
        formed: of what the source says beside elements, types and shapes (``Checkpoint.forms``), what the output says
            too, or tells in notes.
    """

    format: str
    files: tuple[OutputFile, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    casts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    formed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise OutputError("a plan names a file twice", path=twice)

    @property
    def is_directory(self) -> bool:
        return any(file.path for file in self.files)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def tensors(self) -> list[TensorData]:
        """Every piece of a tensor that the output holds."""
        return [part for file in self.files for part in file.parts if isinstance(part, TensorData)]


def small_file(path: str, data: bytes | str, stage: int = 1) -> OutputFile:
    """A file known when planning.

    Raises:
        UsageError: the text is not Unicode.
    """
    try:
        content = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError:
        raise UsageError(
            f"{path} would hold a name or value with half of a surrogate pair",
            expected="Unicode text",
            remedy="leave it out",
        ) from None
    return OutputFile(path, (Literal(content),), stage)


def describe(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, for ``--dry-run --json``."""
    return {
        "format": plan.format,
        "bytes": plan.nbytes,
        "files": [
            {
                "path": file.path,
                "bytes": file.nbytes,
                "tensors": sum(isinstance(p, TensorData) for p in file.parts),
            }
            for file in plan.files
        ],
        "ignored": [{"name": name, "reason": reason} for name, reason in plan.ignored.items()],
        "casts": dict(plan.casts),
        "notes": list(plan.notes),
    }
