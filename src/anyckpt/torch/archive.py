"""A ``.nemo`` being restored: its configuration, its weights as tensors of torch, its artifacts as files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.formats.nemo.read import Members, read_members
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.location import look_at
from anyckpt.storage.source import ByteSource
from anyckpt.torch.settings import Settings, resolved, settings
from anyckpt.torch.tensors import in_memory
from anyckpt.views import TorchFiles

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Archive:
    """An opened ``.nemo``; no weights have been read.

    Attributes:
        path: what was opened.
        config: ``model_config.yaml``, artifacts as ``nemo:`` texts.
        artifacts: files besides configuration and weights, by name in the archive.
    """

    path: str
    config: dict[str, Any]
    artifacts: Mapping[str, ByteSource]
    _members: Members

    def state(self) -> dict[str, Any]:
        """The state dict: tensors that are the file, mapped into memory, where it has them as they are there.

        Raises:
            FormatError: it is damaged.
            UsageError: the archive has no state dict of a module, or objects in it that only executing a pickle makes.
        """
        root = self._members.state()
        if root is None:
            raise UsageError(
                "its weights are not the state dict of one module",
                path=self.path,
                expected="model_weights.ckpt",
                found="none, or weights of ranks or of a distributed checkpoint",
                remedy="convert it to a flat archive first (anyckpt convert ... --to nemo)",
            )
        state: dict[str, Any] = in_memory(root, "", TorchFiles(), self.path)
        return state


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """Open a ``.nemo`` file, or the folder of an unpacked one.

    Raises:
        FormatError: it is none, or a damaged one.
        UnsafeError: it has members that a checkpoint has no business containing.
    """
    location = look_at(path)
    if location.is_directory and "model_config.yaml" not in location.names:
        raise FormatError(
            "is not an unpacked .nemo",
            path=location.path,
            expected="model_config.yaml",
            found=", ".join(location.names[:5]) or "no files",
            remedy="name a .nemo file, or take from_pretrained for a folder with config.json",
        )
    members = read_members(location)
    return Archive(location.path, members.config, members.others, members)


def read_settings(given: Any, archive: Archive) -> Settings:
    """The configuration that is to be used in place of the archive's.

    Args:
        given: a mapping, or the path of a YAML file; what it has under ``model``, if it has that, as NeMo takes it.
        archive: which is restored.

    Raises:
        FormatError: the file is missing or no YAML mapping.
        UsageError: a reference in it leads nowhere.
    """
    name = "the configuration"
    if isinstance(given, (str, os.PathLike)):
        source = LocalFile(given)
        name = source.name
        given = load_yaml_mapping(source.read_all(limit=64 << 20), name)
    values = resolved(settings(given), name)
    section = values.get("model")
    return Settings(section if isinstance(section, Mapping) else values)


def put_artifacts(archive: Archive, folder: str | None) -> dict[str, str]:
    """Write the artifacts as files that stay.

    Args:
        archive: whose.
        folder: where; one of this process's own, removed when it ends, if None.

    Returns:
        Name in the archive -> absolute path.

    Raises:
        OutputError: they cannot be written.
    """
    if not archive.artifacts:
        return {}
    try:
        if folder is None:
            target = tempfile.mkdtemp(dir=_own_folder())
        else:
            target = os.path.abspath(folder)
            os.makedirs(target, exist_ok=True)
        paths: dict[str, str] = {}
        for name, source in archive.artifacts.items():
            paths[name] = os.path.join(target, *name.split("/"))
            os.makedirs(os.path.dirname(paths[name]), exist_ok=True)
            with open(paths[name], "wb") as file:
                for start in range(0, source.size, _CHUNK):
                    file.write(source.read(start, min(_CHUNK, source.size - start)))
    except OSError as error:
        raise OutputError(
            f"its artifacts cannot be written: {error.strerror}", path=archive.path, remedy="pass artifacts_dir"
        ) from error
    return paths


@cache
def _own_folder() -> str:
    folder = tempfile.mkdtemp(prefix="anyckpt-artifacts-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a child that was forked has the same files in use
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
