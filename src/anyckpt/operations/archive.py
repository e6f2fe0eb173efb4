"""Unpacking, packing and editing ``.nemo`` and ``.qnemo`` archives, without weights passing through memory.

All three are plans of verbatim copies, so they are written, interrupted and committed as conversions are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.engine.names import MANIFEST_NAME
from anyckpt.engine.plan import OutputFile, Plan, SourceData
from anyckpt.engine.run import Progress
from anyckpt.errors import FormatError, UnsafeError, UsageError
from anyckpt.formats.nemo.container import Container, open_container
from anyckpt.formats.nemo.members import ARCHIVES as NEMO
from anyckpt.formats.shared.archive import ArchiveKind, ArchiveWriter
from anyckpt.formats.trtllm.members import ARCHIVES as QNEMO
from anyckpt.operations.steps.destination import check_destination
from anyckpt.operations.steps.writing import write
from anyckpt.plain_yaml import load_yaml
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.location import look_at
from anyckpt.storage.place import LOCAL

Path = str | os.PathLike[str]

_CONFIG_LIMIT = 64 << 20


@dataclass(frozen=True)
class ArchiveReport:
    """What was done to an archive.

    Attributes:
        output: the file or directory that was written.
        members: its files, by name.
        changed: configuration keys and members that are not as they were in the source.
        bytes_written: size of the output.
        seconds: wall time.
    """

    output: str
    members: tuple[str, ...]
    changed: tuple[str, ...]
    bytes_written: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {**vars(self), "members": list(self.members), "changed": list(self.changed)}


def unpack(
    archive: Path, directory: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> ArchiveReport:
    """Unpack a ``.nemo`` or ``.qnemo`` (plain or gzip tar) into a directory that appears only when it is whole.

    Args:
        archive: what to unpack.
        directory: what to make.
        overwrite: replace an unpacked checkpoint that is there.
        progress: called with (bytes done, bytes in all).

    Raises:
        FormatError: the archive is damaged.
        UnsafeError: a member is a link or a device, climbs out, or is there twice.
        OutputError: the directory exists or cannot be written.
    """
    container = _archive(archive)
    check_destination(os.fspath(directory), [os.fspath(archive)], overwrite=overwrite)
    names = [name for name in container.folder.names() if name != MANIFEST_NAME]
    if not names:
        raise FormatError("has no files to unpack", path=archive)
    files = tuple(OutputFile(name, (SourceData(container.folder.open(name)),)) for name in names)
    return _carry_out(Plan(_kind(names).format, files), archive, directory, names, (), overwrite, progress)


def pack(
    directory: Path, archive: Path, *, gzip: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> ArchiveReport:
    """Pack an unpacked ``.nemo`` or ``.qnemo`` into a tar archive: configuration first, weights last.

    Args:
        directory: has its configuration (``model_config.yaml``, ``config.json``) and weights at its top.
        archive: the file to make.
        gzip: compress it.
        overwrite: replace an archive that is there.
        progress: called with (bytes done, bytes in all).

    Raises:
        FormatError: the directory has no configuration, no weights, or lacks a file that its configuration names.
        UnsafeError: it has links or other things that are neither files nor directories.
        OutputError: the archive exists or cannot be written.
    """
    path = os.fspath(directory)
    location = look_at(path)
    if not location.is_directory:
        raise UsageError("is not a directory", path=path, remedy="give the directory of an unpacked .nemo")
    if location.place is not LOCAL:
        raise UsageError("is on no disk, from where alone a directory is packed", path=path, remedy="copy it to one")
    names = _files_to_pack(path)
    kind = _kind(names)
    config = _read_config(kind, open_container(location), names)
    if not any(kind.is_weight(name) for name in names):
        raise FormatError("has no weights", path=path, expected=kind.weights, found=", ".join(names[:5]))
    _check_references(kind, config, names, path)
    check_destination(os.fspath(archive), [path], overwrite=overwrite)
    writer = ArchiveWriter()
    writer.add_directory(".")
    made: set[str] = {""}
    for name in sorted(names, key=lambda name: (name != kind.config, kind.is_weight(name), name)):
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            if parent not in made:
                writer.add_directory(f"./{parent}")
                made.add(parent)
        writer.add_source(f"./{name}", LocalFile(os.path.join(path, name)))
    plan = Plan(kind.format, (writer.file(),))
    return _carry_out(plan, directory, archive, names, (), overwrite, progress, gzip=gzip)


def edit(
    archive: Path,
    *,
    set: Mapping[str, Any] | None = None,
    replace: Mapping[str, Path] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ArchiveReport:
    """Change configuration values or swap artifacts of a ``.nemo`` or ``.qnemo``.

    Everything else is copied byte for byte.  Members keep their order and names;
    a gzip archive becomes a plain one, which ``unpack`` and ``pack`` can compress again.

    Args:
        archive: what to change.
        set: dotted key of the configuration (numbers count in lists) -> new value, plain data.  The last key may
            be new, what leads to it must be there.
        replace: artifact -> file with its new contents.  An artifact is a member's name, its base name without
            the 32 digits in front, or the configuration key that refers to it.
        output: the archive to write; ``archive`` itself if None, which is then replaced at the end.
        overwrite: replace ``output`` if it exists.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: nothing to do, an unknown key or artifact.
        FormatError: the archive is damaged.
        OutputError: ``output`` exists or cannot be written.
    """
    path = os.fspath(archive)
    container = _archive(archive)
    if not set and not replace:
        raise UsageError("nothing to change", path=path, remedy="give a key to set or an artifact to replace")
    names = [name for name, member in container.members.items() if not member.is_directory]
    kind = _kind(names)
    config = _read_config(kind, container, names)
    for key, value in (set or {}).items():
        _set(config, key, value, path)
    replaced = {
        _find_artifact(kind, config, names, key, path): LocalFile(file) for key, file in (replace or {}).items()
    }
    _check_references(kind, config, names, path)
    destination = path if output is None else os.fspath(output)
    if output is not None:
        check_destination(destination, [path], overwrite=overwrite)
    writer = ArchiveWriter()
    for name, member in container.members.items():
        if member.is_directory:
            writer.add_directory(member.stored_name, member.mtime)
        elif name == kind.config and set:
            writer.add_bytes(member.stored_name, kind.dump(config).encode())
        else:
            writer.add_source(member.stored_name, replaced.get(name, member.source), member.mtime)
    changed = (*(set or {}), *replaced)
    in_place = output is None
    plan = Plan(kind.format, (writer.file(),))
    return _carry_out(plan, archive, destination, names, changed, overwrite or in_place, progress)


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` as given on a command line; the value is YAML, so ``null``, ``1e-5`` and ``[1, 2]`` mean that.

    Raises:
        UsageError: there is no ``=`` or no key.
        FormatError: the value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError("is not a setting", expected="key=value", found=text)
    return key, load_yaml(value.encode(), f"the value of {key}")


def parse_replacement(text: str) -> tuple[str, str]:
    """``name=path`` as given on a command line.

    Raises:
        UsageError: there is no ``=``, no name or no path.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise UsageError("is not a replacement", expected="name=path", found=text)
    return name, path


def _archive(path: Path) -> Container:
    location = look_at(path)
    if location.is_directory:
        raise UsageError(
            "is a directory", path=path, expected="a .nemo or .qnemo archive", remedy="change its files directly"
        )
    if not location.head:
        raise FormatError("is empty", path=path, remedy="copy it again from its origin")
    return open_container(location)


def _carry_out(
    plan: Plan,
    source: Path,
    destination: Path,
    members: list[str],
    changed: tuple[str, ...],
    overwrite: bool,
    progress: Progress | None,
    *,
    gzip: bool = False,
) -> ArchiveReport:
    started = time.monotonic()
    output = os.fspath(destination)
    report = write(
        plan,
        output,
        share=None,
        gzip=gzip,
        overwrite=overwrite,
        resume=False,
        workers=None,
        memory=DEFAULT_MEMORY,
        progress=progress,
        source_paths=[os.fspath(source)],
    )
    return ArchiveReport(output, tuple(members), changed, report["bytes_written"], time.monotonic() - started)


def _kind(names: Sequence[str]) -> ArchiveKind:
    """Of which format an archive's files are; NeMo's where they are of neither."""
    is_qnemo = QNEMO.config in names and any(map(QNEMO.is_weight, names)) and NEMO.config not in names
    return QNEMO if is_qnemo else NEMO


def _read_config(kind: ArchiveKind, container: Container, names: Sequence[str]) -> dict[str, Any]:
    """The configuration as plain data.

    Raises:
        FormatError: it is missing or invalid.
    """
    if kind.config not in names:
        elsewhere = next((name for name in names if name.endswith(f"/{kind.config}")), None)
        raise FormatError(
            f"has no {kind.config}",
            path=container.folder.name,
            expected=f"{kind.config} at the top of the archive",
            found=elsewhere or ", ".join(names[:5]) or "no files",
            remedy="pack it again from within that folder" if elsewhere else f"check that it is a {kind.suffix} file",
        )
    source = container.folder.open(kind.config)
    return kind.read(source.read_all(limit=_CONFIG_LIMIT), source.name)


def _files_to_pack(path: str) -> list[str]:
    """Every file below a directory, relative to it."""
    found: list[str] = []
    todo = [""]
    while todo:
        prefix = todo.pop()
        with os.scandir(os.path.join(path, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    todo.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    found.append(name)
                else:
                    raise UnsafeError(
                        "is neither a file nor a directory",
                        path=os.path.join(path, name),
                        found="a symbolic link" if entry.is_symlink() else "something else",
                        remedy="put a copy of what it refers to in its place",
                    )
    return [name for name in sorted(found) if name.rpartition("/")[2] != MANIFEST_NAME]


def _check_references(kind: ArchiveKind, config: dict[str, Any], names: list[str], path: str) -> None:
    for key, name in kind.missing(config, names).items():
        raise FormatError(
            f"the configuration's {key} refers to {name!r}, which is missing",
            path=path,
            remedy="add the file, or set the key to null",
        )


def _set(config: dict[str, Any], key: str, value: Any, path: str) -> None:
    parts = key.split(".")
    holder: Any = config
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        index: Any = part
        if isinstance(holder, list):
            index = int(part) if part.isdecimal() and int(part) < len(holder) else None
        if not isinstance(holder, (dict, list)) or index is None or not (last or _has(holder, index)):
            raise UsageError(
                f"the configuration has no {'.'.join(parts[: depth + 1])!r}",
                path=path,
                found=_choices(holder),
                remedy="set the whole section that it belongs to",
            )
        if last:
            holder[index] = value
        else:
            holder = holder[index]


def _has(holder: dict[str, Any] | list[Any], index: Any) -> bool:
    return isinstance(holder, list) or index in holder


def _choices(holder: Any) -> str:
    if isinstance(holder, dict):
        return ", ".join(map(str, list(holder)[:10]))
    return f"a list of {len(holder)}" if isinstance(holder, list) else f"the value {holder!r}"


def _find_artifact(kind: ArchiveKind, config: dict[str, Any], names: list[str], wanted: str, path: str) -> str:
    """The member that a user means by a name, a base name without digits, or a configuration key."""
    artifacts = [name for name in names if name != kind.config and not kind.is_weight(name)]
    references = kind.references(config)
    if references.get(wanted) in artifacts:
        return references[wanted]
    wanted = wanted.removeprefix("./")
    found = [wanted] if wanted in artifacts else [n for n in artifacts if kind.plain_name(n) == wanted]
    if len(found) != 1:
        raise UsageError(
            f"{'several artifacts are' if found else 'no artifact is'} called {wanted!r}",
            path=path,
            found=", ".join(found or artifacts) or "no artifacts",
            remedy="give the whole name of the member",
        )
    return found[0]
