"""Places that one listing of files with their sizes tells of: archives, and others that implement ``Tree``."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

from anyckpt.errors import FormatError
from anyckpt.storage.folder import Folder, check_inside
from anyckpt.storage.members import SEPARATOR, members
from anyckpt.storage.place import FILE, FOLDER, Place
from anyckpt.storage.source import ByteSource

_MOST_SHOWN = 8


class Tree(Place):
    """Files that one listing tells with their sizes, as those of an archive or of an object store.

    Args:
        root: the path of the folder that holds them all.
        separator: what comes between ``root`` and the name of a file.
    """

    def __init__(self, root: str, separator: str = "/") -> None:
        self.root = root
        self._separator = separator

    @abstractmethod
    def listing(self) -> Mapping[str, ByteSource]:
        """Every file by its name below the root, with ``/`` between folders."""

    @cached_property
    def _folders(self) -> dict[str, tuple[str, ...]]:
        """What is in every folder."""
        inside: dict[str, set[str]] = {"": set()}
        for name in self.listing():
            while name:
                above, _, last = name.rpartition("/")
                known = above in inside
                inside.setdefault(above, set()).add(last)
                if known:
                    break
                name = above
        return {folder: tuple(sorted(names)) for folder, names in inside.items()}

    def inner(self, path: str) -> str:
        """The name below the root of what is at ``path``; empty for the root."""
        if path.rstrip("/") == self.root.rstrip("/"):
            return ""
        return path.removeprefix(self.root).removeprefix(self._separator).strip("/")

    def path_of(self, name: str) -> str:
        """The path of what has a name below the root."""
        return f"{self.root.rstrip('/')}{self._separator}{name}"

    def folders(self) -> list[str]:
        """Paths of all folders, those that hold others before these."""
        return [self.path_of(name) for name in sorted(self._folders, key=lambda name: (name.count("/"), name))]

    def kind(self, path: str) -> str | None:
        name = self.inner(path)
        return FILE if name in self.listing() else FOLDER if name in self._folders else None

    def names(self, path: str) -> tuple[str, ...]:
        found = self._folders.get(self.inner(path))
        if found is None:
            raise self.nothing_at(path)
        return found

    def open(self, path: str) -> ByteSource:
        found = self.listing().get(self.inner(path))
        if found is None:
            raise self.nothing_at(path)
        return found

    def folder(self, path: str) -> Folder:
        return _TreeFolder(self, self.inner(path), path)

    def join(self, path: str, *names: str) -> str:
        inner = self.inner(path)
        return self.path_of("/".join(part.strip("/") for part in (inner, *names) if part.strip("/")))

    def split(self, path: str) -> tuple[str | None, str]:
        inner = self.inner(path)
        above, _, name = inner.rpartition("/")
        if not inner:
            return None, re.split(r"[/:]", path.rstrip("/:"))[-1]
        return self.path_of(above), name


class _TreeFolder:
    """A folder of a tree, as the ``Folder`` protocol says."""

    def __init__(self, tree: Tree, inner: str, name: str) -> None:
        self.name = name
        self._prefix = f"{inner}/" if inner else ""
        self._tree = tree
        self._names: list[str] | None = None

    def names(self) -> Sequence[str]:
        if self._names is None:
            listed = self._tree.listing()
            self._names = sorted(name[len(self._prefix) :] for name in listed if name.startswith(self._prefix))
        return self._names

    def open(self, name: str) -> ByteSource:
        return self._tree.open(self._tree.path_of(self._prefix + check_inside(name, self.name)))


class ArchivePlace(Tree):
    """The files of a zip or tar archive: ``models.zip::policy.pth``, and ``models.zip::`` for its top folder.

    Args:
        root: the path of the archive.
        source: its bytes.
        holder: the place that it is in.
        outer: its path in that place.

    Its methods raise FormatError where it is no archive, or a damaged one, and UnsafeError where it has members that
    no archive of checkpoints needs.
    """

    def __init__(self, root: str, source: ByteSource, holder: Place, outer: str) -> None:
        super().__init__(root, SEPARATOR)
        self.is_far = holder.is_far
        self._source = source
        self._holder = holder
        self._outer = outer

    def listing(self) -> Mapping[str, ByteSource]:
        return self._files

    @cached_property
    def _files(self) -> dict[str, ByteSource]:
        return {name.removeprefix("./"): member for name, member in members(self._source).items()}

    def on_disk(self, path: str) -> str | None:
        return self._holder.on_disk(self._outer)

    def nothing_at(self, path: str) -> FormatError:
        names = list(self._files)
        return FormatError(
            f"has no member {self.inner(path)!r}",
            path=self.root,
            found=", ".join(names[:_MOST_SHOWN]) + (" ..." if names[_MOST_SHOWN:] else ""),
            remedy="name one of its members",
        )
