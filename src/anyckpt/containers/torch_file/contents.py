"""What a torch file of any generation is found to hold."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from anyckpt.containers.torch_file.values import Storage, TensorFacts
from anyckpt.data_classes import dataclass
from anyckpt.storage.zip import ZipRecord
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class TorchContents:
    """An opened torch file.

    Attributes:
        root: the saved object: plain data and inert records, with a LazyTensor in place of each dense tensor, one of
            ``values`` for tensors of several parts, and a Storage for each storage that was saved by itself.
        generation: ``zip`` (torch 1.6 and later), ``legacy`` (0.1.10 to 1.5), ``tar`` (before), ``torchscript``, or
            ``pickle`` (a bare one).
        version: the container's version as it states it, or None.
        folder: root folder inside a zip archive, or None.
        byteorder: ``little`` or ``big``.
        storages: by key, those that the pickle refers to.
        records: members of a zip archive with their checksums; empty otherwise.
        facts: identity of each tensor in ``root`` -> the tensor and what the file says of it; see ``facts_of``.
        warnings: anything odd.
    """

    root: Any
    generation: str
    version: str | None = None
    folder: str | None = None
    byteorder: str = "little"
    storages: dict[str, Storage] = field(default_factory=dict)
    records: tuple[ZipRecord, ...] = ()
    facts: dict[int, tuple[LazyTensor, TensorFacts]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def facts_of(self, tensor: LazyTensor) -> TensorFacts:
        """What the file says of a tensor in ``root``; the default facts for any other tensor."""
        found = self.facts.get(id(tensor))
        return TensorFacts() if found is None else found[1]
