"""The commit protocol on a file system: an output appears whole under its name, or not at all.

Everything is written into a hidden directory beside the destination, made durable, and renamed at the end.  Journals
in that directory, one of each process, say which blocks are durable, so that interrupted work can be continued.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Mapping

from anyckpt.engine.destination import BusyError, Destination, Share
from anyckpt.engine.files import PAGE, Bytes, remove_emptied, sync_directory, sync_file, write_error
from anyckpt.engine.journals import Journals
from anyckpt.engine.living import is_signed_by_another, sign
from anyckpt.engine.manifest import beside, read_manifest
from anyckpt.engine.names import MANIFEST_NAME, PARTIAL
from anyckpt.engine.outputs import OutputFiles
from anyckpt.engine.plan import Plan
from anyckpt.engine.publishing import put_in_place, put_new
from anyckpt.engine.records import BlockKey, BlockRecord, Trouble, lock
from anyckpt.engine.shortfalls import MAY_REPLACE, NO_LOCKS, NOT_DURABLE, TWO_STEPS
from anyckpt.errors import FormatError, OutputError
from anyckpt.storage.local_file import forget_open_file


def destination_of(directory: str) -> str | None:
    """The path of the output that is prepared in a directory; None if that is no staging directory."""
    parent, name = os.path.split(directory)
    inner = name[1:].removesuffix(PARTIAL)
    return os.path.join(parent, inner) if name.startswith(".") and name.endswith(PARTIAL) and inner else None


def is_begun(destination: str) -> bool:
    """Whether interrupted work on an output has left blocks, which going on with it would not write again."""
    return StagingDirectory(destination).is_begun()


class StagingDirectory(Destination):
    """The hidden directory in which an output is prepared.

    Args:
        destination: the output's final path.
        overwrite: an existing destination may be replaced, at the end.
    """

    page = PAGE

    def __init__(self, destination: str, *, overwrite: bool = False) -> None:
        self.name = destination
        self.destination = os.path.abspath(destination)
        self.overwrite = overwrite
        parent, name = os.path.split(self.destination)
        self._directory = os.path.join(parent, f".{name}{PARTIAL}")
        self.output = os.path.join(self._directory, "output")
        self._journals = Journals(self._directory, self.name)
        self._lock = -1
        self._plan = Plan("", ())
        self._files = OutputFiles(self._plan, self.output, keep=frozenset())
        self._weaker: dict[str, None] = {}

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        self._check_absent()
        self._plan = plan
        try:
            self._lock = self._enter(fcntl.LOCK_EX if share is None else fcntl.LOCK_SH)
        except OSError as error:
            raise write_error(self.name, error) from error
        try:
            self._begin(fingerprint, share, resume)
        except BaseException as error:
            keep = share is not None or self.is_begun()
            self.close() if keep or not isinstance(error, OutputError) else self.discard()
            if isinstance(error, OSError):
                raise write_error(self.name, error) from error
            raise

    def _begin(self, fingerprint: str, share: Share | None, resume: bool) -> None:
        if share is None:
            if resume and os.path.lexists(self.output):
                self._journals.check(fingerprint, None)
            if not (resume and self.is_begun() and os.path.lexists(self.output)):
                self._clear()
        try:
            self._journals.begin(fingerprint, share)
        except BlockingIOError as error:
            raise self._busy("this share is") from error
        self._journals.check(fingerprint, share)
        self._check_room()
        if self._plan.is_directory:
            os.makedirs(self.output, exist_ok=True)
        elif share is not None:  # what is there is continued, and of a small file all bytes may be in the journals
            os.close(os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        known = range(len(self._plan.files)) if share is not None else {file for file, _ in self._journals.records()}
        self._files = OutputFiles(self._plan, self.output, keep=frozenset(known))

    def clear(self) -> None:
        """Remove what interrupted work left.

        Raises:
            BusyError: a process is at work on it.
            OutputError: the destination exists, or the system refuses.
        """
        self._check_absent()
        if os.path.lexists(self._directory):
            try:
                self._lock = self._enter(fcntl.LOCK_EX)
            except OSError as error:
                raise write_error(self.name, error) from error
            self.discard()

    def _check_absent(self) -> None:
        if os.path.lexists(self.destination) and not self.overwrite:
            raise OutputError("already exists", path=self.name, remedy="choose another path or pass --overwrite")

    def _enter(self, kind: int) -> int:
        """Lock the directory, made if it is not there, alone or together with other shares."""
        while True:
            os.makedirs(self._directory, exist_ok=True)
            path = os.path.join(self._directory, "lock")
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # another process has published the output and removed the directory meanwhile
            try:
                if not lock(descriptor, kind):
                    self._weaker[NO_LOCKS] = None
                    if kind == fcntl.LOCK_EX:
                        sign(descriptor)
                if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    self._check_absent()
                    return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                raise self._busy("is") from error
            except BaseException:
                os.close(descriptor)
                shutil.rmtree(self._directory, ignore_errors=True)
                raise
            os.close(descriptor)

    def _busy(self, what: str) -> BusyError:
        text = f"{what} being written by another process"
        return BusyError(text, path=self.destination, remedy="wait for it to finish")

    def _check_room(self) -> None:
        status = os.statvfs(os.path.dirname(self.destination))
        there = sum(
            os.stat(os.path.join(folder, name)).st_blocks * 512
            for folder, _, names in os.walk(self._directory)
            for name in names
        )
        free = status.f_bavail * status.f_frsize + there
        if self._plan.nbytes > free and status.f_blocks:  # some file systems do not tell how large they are
            raise OutputError(
                "not enough space on the disk for the output",
                path=self.destination,
                expected=f"{self._plan.nbytes:,} bytes",
                found=f"{free:,} bytes free",
                remedy="free some space or choose another disk",
            )

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        self._journals.check(fingerprint, None)
        return self._journals.records()

    def write(self, file: int, offset: int, data: Bytes) -> None:
        self._files.write(file, offset, data)

    def sync(self, files: Collection[int]) -> None:
        self._files.sync(files)

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        try:
            self._journals.record(blocks)
        except OSError as error:
            raise write_error(self.name, error) from error

    def seal(self, files: Collection[int]) -> None:
        self._files.make(files)
        self._files.sync(files)
        self._files.close(files)

    def publish(self, manifest: bytes) -> None:
        """Rename the output, which is durable, to its final name."""
        try:
            manifest_path = self._put_manifest(manifest)
            for link, target in self._plan.links.items():
                path = os.path.join(self.output, link)
                if not os.path.islink(path):
                    os.symlink(target, path)
            if self._plan.is_directory:
                for folder, _, _ in os.walk(self.output):
                    self._sync(folder)
            forget_open_file(self.destination)
            self._rename()
            if not self._plan.is_directory:
                os.replace(manifest_path, beside(self.destination))
            self._sync(os.path.dirname(self.destination))
        except OSError as error:
            raise write_error(self.destination, error) from error
        self.discard()

    def _put_manifest(self, manifest: bytes) -> str:
        path = os.path.join(self.output, MANIFEST_NAME)
        if not self._plan.is_directory:
            path = os.path.join(self._directory, "manifest")
            if os.path.lexists(beside(self.destination)):
                os.unlink(beside(self.destination))
        with open(path, "wb") as file:
            file.write(manifest)
            file.flush()
            if not sync_file(file.fileno()):
                self._weaker[NOT_DURABLE] = None
        return path

    def _sync(self, folder: str) -> None:
        if not sync_directory(folder):
            self._weaker[NOT_DURABLE] = None

    def _rename(self) -> None:
        if self.overwrite and os.path.lexists(self.destination):
            if not put_in_place(self.output, self.destination, os.path.join(self._directory, "old")):
                self._weaker[TWO_STEPS] = None
            return
        try:
            if not put_new(self.output, self.destination):
                self._weaker[MAY_REPLACE] = None
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise OutputError("has appeared meanwhile", path=self.destination, remedy="choose another path") from None

    def weaker(self) -> tuple[str, ...]:
        return tuple(self._weaker)

    def is_published(self, fingerprint: str) -> bool:
        if not os.path.lexists(self.destination):
            return False
        try:
            manifest = read_manifest(self.destination)
        except FormatError:
            return False
        if manifest is None or manifest.plan != fingerprint:
            return False
        root = self.destination
        paths = {os.path.join(root, *name.split("/")) if name else root: n for name, n in manifest.files.items()}
        return all(os.path.isfile(path) and os.path.getsize(path) == nbytes for path, nbytes in paths.items())

    @property
    def directory(self) -> str:
        """Where the output is prepared."""
        return self._directory

    def nbytes(self) -> int:
        """Bytes on the disk that unfinished work takes."""
        return sum(
            os.lstat(os.path.join(folder, name)).st_blocks * 512
            for folder, _, names in os.walk(self._directory)
            for name in names
        )

    def is_held(self) -> bool:
        """Whether a process is at work here, as far as can be seen."""
        try:
            descriptor = os.open(os.path.join(self._directory, "lock"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not lock(descriptor, fcntl.LOCK_EX) and is_signed_by_another(descriptor)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)

    def remove_abandoned(self) -> bool:
        """Remove what processes that are gone left of their work; whether there was any and nobody is at it."""
        if not os.path.isdir(self._directory):
            return False
        descriptor = os.open(os.path.join(self._directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not lock(descriptor, fcntl.LOCK_EX) and is_signed_by_another(descriptor):
                return False
        except BlockingIOError:
            return False
        else:
            shutil.rmtree(self._directory, ignore_errors=True)
        finally:
            os.close(descriptor)
        remove_emptied(self._directory)
        return True

    def close(self, failure: str = "") -> None:
        self._files.close_all()
        self._journals.close(failure)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        self._files.close_all()
        shutil.rmtree(self._directory, ignore_errors=True)
        self.close()
        remove_emptied(self._directory)

    def beat(self) -> None:
        self._journals.beat()

    def signs(self) -> dict[Share, int]:
        return self._journals.signs()

    def troubles(self) -> dict[Share, Trouble]:
        return self._journals.troubles()

    def is_begun(self) -> bool:
        """Whether blocks of the output are here."""
        return bool(self._journals.records())

    def _clear(self) -> None:
        for name in os.listdir(self._directory):
            path = os.path.join(self._directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif name != "lock":
                os.unlink(path)
        self._journals.forget()
