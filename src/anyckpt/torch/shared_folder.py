"""The folder in which the ranks of a job prepare a checkpoint, each its own files, and its publication by one of them.

A checkpoint that is new appears by one rename.  Where a directory is there already (a framework has put files into it,
or an earlier checkpoint is replaced), files are moved into it under names that nothing there has, and what makes them a
checkpoint, the index, is replaced by one rename: before it the directory is what it was.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from anyckpt.containers.dcp import METADATA
from anyckpt.engine.checksum import digest_of
from anyckpt.engine.destination import BusyError
from anyckpt.engine.files import sync_directory, sync_file, write_error
from anyckpt.engine.manifest import Manifest, ManifestEntry
from anyckpt.engine.names import MANIFEST_NAME
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.place import scheme_of

_SHARD = re.compile(r"__\d+_\d+\.distcp|__\d+\.metadata")


class SharedFolder:
    """Where the files of one checkpoint are put, unseen as such until all are whole.

    Args:
        path: of the checkpoint.

    Attributes:
        path: of the checkpoint, links followed.
        folder: where ranks put their files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        scheme = scheme_of(os.fspath(path))
        if scheme is not None:
            raise UsageError(
                "is no folder on a disk, which those who save with torch's or Megatron-Core's own functions share",
                path=path,
                found=f"{scheme}://",
                remedy="save with anyckpt.torch.save or a Saver, or to a disk",
            )
        self.path = os.path.realpath(path)
        # Beside the root of a file system there is another one, into which nothing can be renamed.
        inside = os.path.ismount(self.path)
        self._staging = StagingDirectory(os.path.join(self.path, "checkpoint") if inside else self.path, overwrite=True)
        self.folder = self._staging.output
        self._is_open = False

    def check_may_replace(self, overwrite: bool) -> None:
        """Raise OutputError if there is something at the path that must stay."""
        if not os.path.lexists(self.path):
            return
        if not os.path.isdir(self.path):
            raise OutputError("is a file", path=self.path, expected="a directory, or nothing", remedy="choose another")
        found = [name for name in os.listdir(self.path) if name.endswith(METADATA)]
        if found and not overwrite:
            raise OutputError("already exists", path=self.path, remedy="choose another path, or pass overwrite=True")

    def begin(self) -> None:
        """Prepare the folder, without what an earlier attempt left; done by one rank, before any writes.

        Raises:
            BusyError: another job writes the same checkpoint at this moment.
            OutputError: the system refuses.
        """
        plan = Plan("dcp", (OutputFile(METADATA, (), 1),))
        try:
            self._staging.begin(plan, "", share=None, resume=False)
        except BusyError:
            gc.collect()  # a save of this process that failed holds it until its error, and with it its writer, is gone
            self._staging.begin(plan, "", share=None, resume=False)
        self._is_open = True

    def publish(
        self,
        files: Collection[str],
        index: Callable[[Mapping[str, str]], bytes],
        entries: Sequence[ManifestEntry],
        *,
        beside: Collection[str] = (),
    ) -> None:
        """Make the files a checkpoint; done by the rank that began, when all ranks have written.

        Args:
            files: what the ranks wrote.
            index: what goes into ``.metadata``, from the name of each file to the one that it gets.
            entries: what the manifest says of the files.
            beside: files of the checkpoint that may be in the directory already, for the manifest.

        Raises:
            OutputError: a file is missing, or the system refuses; what was at the path before is untouched.
        """
        try:
            sizes = {name: os.path.getsize(os.path.join(self.folder, name)) for name in files}
        except FileNotFoundError as error:
            raise OutputError(
                "what a rank wrote is not there",
                path=str(error.filename),
                remedy="give all ranks a path that leads to the same file system",
            ) from error
        try:
            replaced = os.path.isdir(self.path)
            names = _free_names(files, os.listdir(self.path) if replaced else ())
            _write(os.path.join(self.folder, METADATA), index(names))
            whole = [*_described(self.folder, (METADATA,)), *_described(self.path, beside)]
            manifest = _manifest(names, sizes, entries, whole).to_bytes()
            if replaced:
                self._move_in(names, manifest)
            else:
                self._staging.publish(manifest)
        except OSError as error:
            self.discard()
            raise write_error(self.path, error) from error
        except BaseException:
            self.discard()
            raise
        self._is_open = False

    def _move_in(self, names: Mapping[str, str], manifest: bytes) -> None:
        before = set(os.listdir(self.path))
        try:
            for name, final in names.items():
                os.rename(os.path.join(self.folder, name), os.path.join(self.path, final))
            sync_directory(self.path)
            if MANIFEST_NAME in before:
                os.unlink(os.path.join(self.path, MANIFEST_NAME))  # no longer what the index says
            os.replace(os.path.join(self.folder, METADATA), os.path.join(self.path, METADATA))
        except BaseException:
            for final in names.values():
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, final))
            raise
        sync_directory(self.path)
        _write(os.path.join(self.folder, MANIFEST_NAME), manifest)
        os.replace(os.path.join(self.folder, MANIFEST_NAME), os.path.join(self.path, MANIFEST_NAME))
        for name in before:
            if _SHARD.fullmatch(name):
                os.unlink(os.path.join(self.path, name))
        sync_directory(self.path)
        self._staging.discard()

    def discard(self) -> None:
        """Remove every trace of what was prepared and not published; nothing if there is none."""
        if self._is_open:
            self._staging.discard()
            self._is_open = False


def discard_here(shared: SharedFolder, process: int) -> None:
    """Remove what was prepared, unless this is a process that was forked since and has only a copy."""
    if os.getpid() == process:
        shared.discard()


def _free_names(files: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """For each file a name that is not taken: its own, or with a higher number."""
    found: dict[str, str] = {}
    used = set(taken)
    for name in files:
        final = name
        stem, _, number = name.removesuffix(".distcp").rpartition("_")
        while final in used:
            number = str(int(number) + 1)
            final = f"{stem}_{number}.distcp"
        used.add(final)
        found[name] = final
    return found


def _manifest(
    names: Mapping[str, str],
    sizes: Mapping[str, int],
    entries: Sequence[ManifestEntry],
    there: Sequence[ManifestEntry],
) -> Manifest:
    files = {names[name]: size for name, size in sizes.items()}
    files.update((one.file, one.nbytes) for one in there)
    renamed = (
        ManifestEntry(one.name, one.piece, names[one.file], one.offset, one.nbytes, one.digest) for one in entries
    )
    return Manifest("dcp", "", files, (*renamed, *there))


def _described(folder: str, names: Collection[str]) -> list[ManifestEntry]:
    """What the manifest says of files as wholes; nothing of those that are not there."""
    found = []
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            source = LocalFile(path)
            found.append(ManifestEntry("", "", name, 0, source.size, digest_of(source.read, source.size)))
    return found


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())
