"""Files that a model needs beside its weights: found when it is built, kept for when it is saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.formats.nemo.config import ARTIFACT_SCHEME, texts
from anyckpt.formats.nemo.tokenizer import artifact_name
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource
from anyckpt.torch.settings import plain, put


@dataclass(frozen=True)
class _Restoring:
    """What is known while a model is built from stored files.

    Attributes:
        files: artifacts' names and where they are now.
        stored: texts of the configuration that came with the files: they name no file of this machine.
    """

    files: Mapping[str, str]
    stored: frozenset[str]


_NOTHING = _Restoring({}, frozenset())
_restoring: ContextVar[_Restoring] = ContextVar("restoring", default=_NOTHING)


@contextmanager
def restoring(files: Mapping[str, str], config: Mapping[str, Any], given: Any = None) -> Iterator[None]:
    """While a model is built from an archive or folder.

    Args:
        files: its artifacts' names and where they are now.
        config: its configuration, which somebody else wrote: a path in it is not taken for a file of this machine,
            which would travel in whatever is saved from then on.
        given: what this program puts in its place; where that says something else, it may name any file.
    """
    before = dict(texts(plain(config)))
    stored = set(before.values()) - {text for path, text in texts(plain(given)) if before.get(path) != text}
    token = _restoring.set(_Restoring(files, frozenset(stored)))
    try:
        yield
    finally:
        _restoring.reset(token)


def find_artifact(key: str, source: str, verify: bool) -> str | None:
    """The file that a value of the configuration means.

    ``nemo:`` and a plain name that is in the archive mean the archive's; NeMo would take a file of that name in the
    working directory first.

    Args:
        key: where in the configuration, for messages.
        source: a path, ``nemo:`` and a name in the archive, or (archives of NeMo 1.0) a path whose last part is one.
        verify: whether it must exist.

    Returns:
        An absolute path; None, with a warning, if there is no such file and it need not exist.

    Raises:
        FormatError: there is no such file.
        UsageError: it is a model, which has artifacts of its own.
    """
    if source.endswith(".nemo"):
        raise UsageError(
            f"{key} is a model, not an artifact", found=source, remedy="restore it and call register_nemo_submodule"
        )
    known = _restoring.get()
    files = known.files
    name = source.removeprefix(ARTIFACT_SCHEME)
    stored = name if name != source or "/" not in name else None
    found = files.get(stored) if stored is not None else None
    if found is None and name == source:
        found = files.get(source.rpartition("/")[2])
        local = os.path.abspath(os.path.expanduser(source))
        if source not in known.stored and os.path.isfile(local):
            found = local
    if found is not None:
        return found
    if verify:
        raise FormatError(
            f"the artifact {key} is not in the archive"
            if source in known.stored
            else f"the artifact {key} does not exist",
            path=source,
            expected="a file" + (f", or one of the archive's: {', '.join(files)}" if files else ""),
            remedy=f"give {key} with override_config_path: a path that an archive has is not taken for a file here"
            if source in known.stored
            else "give its path, or pass verify_src_exists=False",
        )
    warnings.warn(f"the artifact {key} does not exist: {source}", stacklevel=3)
    return None


def stored_artifacts(registered: Mapping[str, str], config: dict[str, Any]) -> dict[str, ByteSource]:
    """Artifacts by their names in an archive; the configuration gets ``nemo:`` and the name in place of each.

    Args:
        registered: dotted key -> file.
        config: of the same model, changed in place.

    Raises:
        OutputError: a file is no longer there.
    """
    members: dict[str, ByteSource] = {}
    for key, path in registered.items():
        try:
            source = LocalFile(path)
        except FormatError as error:
            raise OutputError(
                f"the artifact {key} is no longer there", path=path, remedy="put it back, or register another file"
            ) from error
        name = artifact_name(os.path.basename(path), source)
        members[name] = source
        put(config, key, ARTIFACT_SCHEME + name)
    return members
