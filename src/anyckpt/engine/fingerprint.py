"""Telling whether interrupted work is of the same plan and of unchanged sources."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

from anyckpt.engine.plan import Literal, Plan, TensorData


def fingerprint(plan: Plan, source_paths: Sequence[str]) -> str:
    """Identifies a plan and the state of its sources: sizes and modification times of every file."""
    digest = hashlib.sha256(plan.format.encode())
    for file in plan.files:
        digest.update(f"\0file {file.path} {file.stage} {file.nbytes}".encode())
        for part in file.parts:
            if isinstance(part, Literal):
                digest.update(b"\0literal" + part.data)
            elif isinstance(part, TensorData):
                text = f"\0tensor {part.name} {part.piece} {part.tensor.dtype.name} {part.tensor.shape}"
                digest.update(text.encode("utf-8", "surrogatepass"))
            else:
                digest.update(f"\0{type(part).__name__} {part.nbytes}".encode())
    for root in source_paths:
        for path in _files_under(root):
            status = os.stat(path)
            digest.update(f"\0source {path} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files_under(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield os.path.abspath(root)
        return
    for folder, folders, names in os.walk(os.path.abspath(root)):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(folder, name)
