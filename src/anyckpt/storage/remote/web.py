"""Files of web servers, which list nothing: what is there is found by asking for it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from anyckpt.errors import AnyckptError, FormatError
from anyckpt.storage.folder import Folder
from anyckpt.storage.place import FILE, FOLDER, Place
from anyckpt.storage.remote.addresses import address_of, without_secret
from anyckpt.storage.remote.failures import Failure, named
from anyckpt.storage.remote.requesting import asked
from anyckpt.storage.remote.source import AT_ONCE, ObjectSource, Stamp
from anyckpt.storage.remote.stores import Store, store_at
from anyckpt.storage.requests import at_once
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tree import Tree

INDEX = "model.safetensors.index.json"
LOOKED_FOR = (
    "config.json",
    INDEX,
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files of a folder that Hugging Face's libraries write, which are asked for where nothing can be listed."""

_HUB_PAGE = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:blob|tree)/([^/]+)(/.+)?)?")
_MARKS = (INDEX, "model.safetensors", "adapter_model.safetensors")
_LARGEST_INDEX = 64 << 20

_secrets: dict[str, tuple[str, str]] = {}
"""What addresses were given with, by their public path, under which they are asked for again."""


class WebPlace(Place):
    """A file of a web server, or a folder of Hugging Face's files, whose index says what is in it.

    Args:
        path: of the file or folder; what it is signed with is kept here and nowhere shown.
    """

    is_far = True

    def __init__(self, path: str) -> None:
        address = address_of(path)
        if any(address.secret):
            _secrets[address.public] = address.secret
        else:
            address = replace(address, secret=_secrets.get(address.public, ("", "")))
        self._address = address
        self._store: Store = store_at(address)
        self._found: dict[str, ByteSource | Failure] = {}
        self._tree: _Folder | None = None
        self._lock = threading.RLock()

    def shown(self, path: str) -> str:
        return without_secret(path)

    def _ask(self, key: str) -> ByteSource | Failure:
        """The file of a key, of which its first byte is asked; or why it cannot be had."""
        if key not in self._found:
            address = replace(self._address, key=key)

            def ask() -> Stamp:
                return Stamp.of(self._store.get(key, options={"range": (0, 1)}).meta)

            def head() -> Stamp:
                return Stamp.of(self._store.head(key))

            stamp = asked(ask)
            if isinstance(stamp, Failure) and stamp.status == 416:  # it is empty
                stamp = asked(head)
            self._found[key] = stamp if isinstance(stamp, Failure) else ObjectSource(self._store, address, stamp)
        return self._found[key]

    def _is_mine(self, key: str) -> bool:
        """Whether a key is the one that the place was made for, or may be asked for beside it."""
        return key == self._address.key or not self._address.secret[1]

    def _folder(self) -> _Folder:
        if self._tree is None:
            self._tree = _Folder(self._address.public.rstrip("/"), self._address.key, self._all)
        return self._tree

    def _all(self, keys: Sequence[str]) -> dict[str, ByteSource]:
        """Those of some keys that can be had, asked for at once.

        Raises:
            UnreachableError: the server does not answer.
        """

        def ask(key: str) -> None:
            self._ask(key)

        at_once([partial(ask, key) for key in keys], AT_ONCE)
        found: dict[str, ByteSource] = {}
        for key in keys:
            source = self._found[key]
            if isinstance(source, Failure):
                if not (source.is_missing or source.is_denied):
                    raise self._error(source, key)
            else:
                found[key] = source
        return found

    def _error(self, failure: Failure, key: str) -> AnyckptError:
        return named(failure, self._address, self._address.path_of(key))

    def kind(self, path: str) -> str | None:
        key = address_of(path).key
        page = _HUB_PAGE.fullmatch(path.rstrip("/"))
        if page is not None:
            revision = f"@{page[2]}" if page[2] and page[2] != "main" else ""
            raise FormatError(
                "is a page of the Hugging Face Hub, not a file",
                path=path,
                remedy=f"give hf://{page[1]}{revision}{page[3] or ''}",
            )
        with self._lock:
            if self._tree is not None and self._tree.holds(key):
                return self._tree.kind(path)
            found = self._ask(key) if key and self._is_mine(key) else None
            if isinstance(found, ByteSource):
                return FILE
            if key == self._address.key and not self._address.secret[1] and self._folder().is_there:
                return FOLDER
            if found is None or found.is_missing:
                return None
            raise self._error(found, key)

    def names(self, path: str) -> tuple[str, ...]:
        key = address_of(path).key
        if self._tree is not None and self._tree.holds(key):
            return self._tree.names(path)
        raise FormatError(
            "cannot be listed: web servers list no folders",
            path=path,
            remedy=f"give the address of a file, or of a folder that holds {' or '.join(_MARKS)}",
        )

    def open(self, path: str) -> ByteSource:
        key = address_of(path).key
        with self._lock:
            if self._tree is not None and self._tree.holds(key):
                return self._tree.open(path)
            if not self._is_mine(key):
                raise self.nothing_at(path)
            found = self._ask(key)
        if isinstance(found, Failure):
            raise self._error(found, key)
        return found

    def folder(self, path: str) -> Folder:
        if self.kind(path) != FOLDER:
            raise self.nothing_at(path)
        return self._folder().folder(path)

    def join(self, path: str, *names: str) -> str:
        parts = (part.strip("/") for part in (address_of(path).key, *names))
        return self._address.path_of("/".join(filter(None, parts)))

    def split(self, path: str) -> tuple[str | None, str]:
        above, _, name = address_of(path).key.rpartition("/")
        return (self._address.path_of(above), name) if name else (None, self._address.holder)

    def nothing_at(self, path: str) -> FormatError:
        return FormatError(
            "does not exist, and is no folder of Hugging Face's files",
            path=without_secret(path),
            remedy=f"check the address, which is of a file, or of a folder that holds {' or '.join(_MARKS)}",
        )


class _Folder(Tree):
    """A folder that holds what it is asked for: the files of ``LOOKED_FOR``, and the shards that its index names.

    Args:
        root: its path.
        key: its key.
        ask: gives those of some keys that are there.
    """

    is_far = True

    def __init__(self, root: str, key: str, ask: Callable[[Sequence[str]], dict[str, ByteSource]]) -> None:
        super().__init__(root)
        self._key = key
        self._ask = ask
        self._files: dict[str, ByteSource] | None = None

    def holds(self, key: str) -> bool:
        """Whether a key is its own or below it."""
        return not self._key or key == self._key or key.startswith(f"{self._key}/")

    @property
    def is_there(self) -> bool:
        return any(mark in self.listing() for mark in _MARKS)

    def inner(self, path: str) -> str:
        return address_of(path).key[len(self._key) :].strip("/")

    def path_of(self, name: str) -> str:
        address = address_of(self.root)
        return address.path_of("/".join(filter(None, (address.key, name))))

    def listing(self) -> Mapping[str, ByteSource]:
        if self._files is None:
            files = self._of(LOOKED_FOR)
            if INDEX in files:
                files.update(self._of(_shards(files[INDEX])))
            self._files = files
        return self._files

    def _of(self, names: Sequence[str]) -> dict[str, ByteSource]:
        prefix = f"{self._key}/" if self._key else ""
        return {key[len(prefix) :]: source for key, source in self._ask([prefix + name for name in names]).items()}


def _shards(index: ByteSource) -> list[str]:
    """File names in an index of Hugging Face's; none if it is damaged, which its reader tells."""
    try:
        weights = json.loads(index.read_all(_LARGEST_INDEX))["weight_map"]
        names = {name for name in weights.values() if isinstance(name, str)}
    except (ValueError, KeyError, TypeError, AttributeError, FormatError):
        return []
    return sorted(name for name in names if name and "/" not in name and "\\" not in name)
