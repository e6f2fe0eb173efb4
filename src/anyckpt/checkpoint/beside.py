"""What a checkpoint holds or says beside its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter (LoRA, DoRA) says of itself beside its tensors.

    Attributes:
        kind: ``lora`` or ``dora``.
        rank: of its updates, None if not said.
        alpha: updates are multiplied by alpha over their rank; None if not said.
        rank_stabilized: alpha is divided by the rank's square root instead (rsLoRA).
        ranks: pattern of module names -> another rank; patterns are regular expressions of the end of a name.
        alphas: pattern of module names -> another alpha.
        dropout: during training.
        targets: modules that it adapts, in the words of its writer.
        base: name or path of the model that it was trained on, None if not said.
        fan_in_fan_out: weights that it adapts are (in, out), as Conv1D of transformers has them.
        token_indices: pattern of module names -> the rows of it that are trained and stored one by one; the pattern is
            empty where there is one such module.
    """

    kind: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    base: str | None = None
    fan_in_fan_out: bool = False
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's files and how to call it; never loaded.

    Attributes:
        library: ``sentencepiece`` or ``huggingface``, or whatever the checkpoint says.
        files: file name -> contents.  For ``sentencepiece`` one file is the model; for ``huggingface`` the files
            of the folder that ``AutoTokenizer.from_pretrained`` takes.
        model_file: name in ``files`` of the sentencepiece model, or None.
        settings: what the checkpoint says besides (special tokens, chat template, legacy), spelled as NeMo does.
        hub_name: name on the Hugging Face hub if the checkpoint only names it, or None.
    """

    library: str
    files: Mapping[str, ByteSource] = field(default_factory=dict)
    model_file: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    hub_name: str | None = None


@dataclass(frozen=True)
class StoredChecksum:
    """A checksum that a container keeps of some of its bytes.

    Attributes:
        name: what the bytes are, for messages.
        source: the bytes.
        crc32: their CRC-32 as stored.
    """

    name: str
    source: ByteSource
    crc32: int


class CompositeTensor(ABC):
    """A tensor of several parts (quantized, sparse, nested): an object whose parts are tensors of their own.

    The parts of an object ``w`` are among a checkpoint's tensors, as ``w.int_repr`` and so on.
    """

    @abstractmethod
    def part_tensors(self) -> dict[str, LazyTensor]:
        """The tensors that it consists of, by the part's name."""

    @abstractmethod
    def companions(self) -> dict[str, LazyTensor]:
        """What else it consists of (a scale, a shape), as tensors by name, for formats that hold nothing else.

        Raises:
            UsageError: tensors alone do not tell what it is.
        """


class ObjectForms(ABC):
    """What a file of objects says of them besides elements, types, shapes and names.

    These are kinds of containers and tensors, strides, storages that are shared.  Only the format that read them can
    write them; the others can tell what they do not keep.
    """

    @abstractmethod
    def described(self) -> dict[str, str]:
        """All that is odd, in words by name or dotted path, so that copies can be compared."""

    @abstractmethod
    def particulars(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """What a table of elements, types and shapes by name does not say, by a tensor's name or a container's.

        Each is of a kind, and some have a detail: ``("strides", "(1, 3)")``.
        """

    @abstractmethod
    def tuples(self) -> frozenset[tuple[str | int, ...]]:
        """Paths (see ``Checkpoint.key_paths``) of the tuples that hold tensors, which paths cannot tell from lists."""

    @abstractmethod
    def whole(self, path: tuple[str | int, ...]) -> Any:
        """The tuple, or an object's record, that holds tensors at a path, as it was read; None if none is there."""

    @abstractmethod
    def holds(self, container: str, tensors: Iterable[str]) -> bool:
        """Whether a container, by its name among the particulars, holds one of these tensors."""


@dataclass(frozen=True)
class Part:
    """What a checkpoint is that holds only a part of each tensor, or of the model.

    Attributes:
        what: which part, as a message says it: "is the part of rank 1 of 2 ...".
        remedy: what to open in its place.
    """

    what: str
    remedy: str
