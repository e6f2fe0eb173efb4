"""What several test modules need: fixtures, their expected values, and the plainest possible writer."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyckpt.engine.manifest import check_manifest, read_manifest
from anyckpt.engine.plan import Computed, Literal, OutputFile, Plan, SourceData
from anyckpt.tensor import LazyTensor

FIXTURES = Path(__file__).parent / "fixtures"


def fixture_path(relative: str) -> Path:
    """A fixture, which must exist: a missing fixture is a broken checkout, not a reason to skip."""
    path = FIXTURES / relative
    assert path.exists(), path
    return path


def expected_of(relative: str) -> Any:
    """The fixture's ``expected.json``."""
    return json.loads((fixture_path(relative) / "expected.json").read_text())


def sha256_of(tensor: LazyTensor) -> str:
    """Digest of the little-endian bytes in C order."""
    digest = hashlib.sha256()
    for chunk in tensor.chunks(1 << 16):
        digest.update(chunk.tobytes())
    return digest.hexdigest()


def assert_tensors_equal_expected(tensors: Mapping[str, LazyTensor], expected: Mapping[str, Any]) -> None:
    """Names, dtypes, shapes and digests are those of an ``expected.json`` table."""
    assert sorted(tensors) == sorted(expected)
    for name, facts in expected.items():
        tensor = tensors[name]
        found = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": sha256_of(tensor)}
        assert found == {key: facts[key] for key in found}, name


def write_plan(plan: Plan, destination: Path) -> Path:
    """Write a plan part by part, with none of the engine's machinery."""
    for file in plan.files:
        path = destination / file.path if file.path else destination
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes(file))
    for link, target in plan.links.items():
        (destination / link).symlink_to(target)
    return destination


def file_bytes(file: OutputFile) -> bytes:
    """A planned file's contents."""
    contents: list[bytes] = []
    for part in file.parts:
        if isinstance(part, Literal):
            data = part.data
        elif isinstance(part, SourceData):
            data = part.source.read(0, part.source.size)
        elif isinstance(part, Computed):
            data = part.build([zlib.crc32(contents[index]) for index in part.parts])
        else:
            data = b"".join(chunk.tobytes() for chunk in part.tensor.chunks(1 << 16))
        assert len(data) == part.nbytes
        contents.append(data)
    return b"".join(contents)


def assert_whole(plan: Plan, output: Path) -> None:
    """An output holds what the plan says, and its manifest as well."""
    for file in plan.files:
        path = output / file.path if file.path else output
        assert path.read_bytes() == file_bytes(file), file.path
    for link, target in plan.links.items():
        assert os.readlink(output / link) == target
    manifest = read_manifest(str(output))
    assert manifest is not None
    problems = [problem for _, problem in check_manifest(str(output), manifest) if problem]
    assert problems == []
    assert {entry.name for entry in manifest.entries if entry.name} == {part.name for part in plan.tensors()}
