"""An output as one commit to a repository of the Hugging Face Hub.

The Hub wants the SHA-256 of a large file before its bytes, and huggingface_hub takes a file object that it reads as it
sends.  So every byte is made twice, and nothing lies on a disk: while the engine writes in order, digests are taken;
when the output is published, the files are sent as ``PlannedFile``s, and one commit names them all.  Until then nobody
sees anything of it, and what a run that died had sent whole is not sent again, since the Hub knows it by its digest.

The protocol is that of Git LFS, which every repository takes; huggingface_hub's other one, Xet, takes paths and whole
bytes, not file objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

from anyckpt.blockwise import Tiles
from anyckpt.engine.blocks import cut_all
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.files import Bytes
from anyckpt.engine.filling import is_far
from anyckpt.engine.hub_sending import answer_of, of_output, send
from anyckpt.engine.manifest import Manifest, read_manifest
from anyckpt.engine.names import MANIFEST_NAME
from anyckpt.engine.plan import Plan
from anyckpt.engine.planned_file import Known, PlannedFile
from anyckpt.engine.records import BlockKey, BlockRecord
from anyckpt.errors import LastingError, OutputError, UsageError, few
from anyckpt.storage.hub import library
from anyckpt.storage.hub.paths import MAIN, HubPath, parse
from anyckpt.storage.hub.place import HubPlace, forget
from anyckpt.storage.hub.repository import opened
from anyckpt.storage.read_count import ReadCount

CARD = "README.md"
_FILES_AT_ONCE = 4
_TILES = 24 << 20
_OF_REPOSITORY = re.compile(
    r"(?:.*/)?(?:\.git.*|README\.md|LICEN[CS]E.*|NOTICE.*|USE_POLICY.*|.*\.(?:md|png|jpe?g|svg))"
)
"""Files that are about a model and stay when another checkpoint takes its place."""

_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|nemo|distcp|gguf|h5|msgpack|index\.json)")
_SHOWN = 5

Card = Callable[[Mapping[str, tuple[int, str]]], str]
"""The text of a model card, from the sizes and SHA-256 of the files."""


class HubDestination(Destination):
    """A repository of the Hub, or a folder or file in it.

    Args:
        path: ``hf://org/name[@branch][/folder or file]``.
        overwrite: a checkpoint that is there may be replaced; it stays in the repository's history.
        private: make the repository, if there is none, a private one.
        message: of the commit.
        card: makes a model card where the repository has none.

    Raises:
        UsageError: the path is of something that is not written to.
    """

    in_order = True
    passes = 2

    def __init__(
        self,
        path: str,
        *,
        overwrite: bool = False,
        private: bool = False,
        message: str | None = None,
        card: Card | None = None,
    ) -> None:
        self.name = path
        self._path = _writable(parse(path))
        self._overwrite = overwrite
        self._private = private
        self._message = message
        self._card = card
        self._plan = Plan("", ())
        self._fingerprint = ""
        self._parent: str | None = None
        self._there: tuple[str, ...] = ()
        self._known: list[Known] = []
        self._advance: Callable[[int], None] = lambda nbytes: None
        self._reads = ReadCount()

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        if share is not None:
            raise UsageError(
                "is one commit, which several processes cannot make together",
                path=self.name,
                remedy="leave --share out, or write to a disk and upload that",
            )
        if not plan.is_directory and not self._path.inner:
            raise UsageError(
                "is a repository, and one file is to be written",
                path=self.name,
                remedy=f"name the file: {self._path.root}/model.{plan.format}",
            )
        if plan.links:
            raise UsageError(
                "would have links, which the Hub does not keep", path=self.name, remedy="write it to a disk"
            )
        self._plan, self._fingerprint = plan, fingerprint
        self._look()
        cut = cut_all(plan.files)
        self._known = [Known.of(file, late) for file, late in zip(plan.files, cut.late, strict=True)]

    def _look(self) -> None:
        """See what is there, and that it may be written to; make the repository and branch that are not there."""
        hub = library.library()
        if library.is_offline():
            raise OutputError(
                "cannot be written to while HF_HUB_OFFLINE is set", path=self.name, remedy="unset HF_HUB_OFFLINE"
            )
        if hub.get_token() is None:
            raise OutputError("nobody has logged in to the Hub", path=self.name, remedy=library.LOG_IN)
        api, name = self._api(), self._path.repository
        if not answer_of(lambda: api.repo_exists(name), self.name):
            private = True if self._private else None  # an organization has its own mind where nothing is said
            answer_of(lambda: api.create_repo(name, private=private, exist_ok=True), self.name)
        else:
            answer_of(lambda: _check_may_write(api, name), self.name)
            if self._private and not answer_of(lambda: api.repo_info(name), self.name).private:
                raise OutputError(
                    "is there and public, and --private was asked for",
                    path=self.name,
                    remedy="choose another repository, or make this one private in its settings",
                )
        found = self._opened()
        known = HubPlace(opened(replace(self._path, revision=None))) if found is None else found  # what it begins as
        self._parent, self._there = known.repository.commit, tuple(known.repository.entries)
        self._check_absent()
        if found is None:
            answer_of(lambda: api.create_branch(name, branch=self._branch, exist_ok=True), self.name)

    @property
    def _branch(self) -> str:
        return self._path.revision or MAIN

    def _opened(self) -> HubPlace | None:
        """The branch as it is now; None if there is none."""
        try:
            with of_output():
                return HubPlace(opened(self._path))
        except library.NoRevisionError:
            return None

    def _api(self) -> Any:
        return library.library().HfApi(library_name="anyckpt")

    def _inside(self, file: str) -> str:
        return "/".join(filter(None, (self._path.inner, file)))

    def _of_output(self) -> list[str]:
        """Files that are where the output goes, and are not about the repository."""
        if not self._plan.is_directory:
            return [name for name in self._there if name == self._path.inner]
        below = self._inside("")
        found = [name for name in self._there if not below or name.startswith(f"{below}/")]
        return [name for name in found if _OF_REPOSITORY.fullmatch(name) is None]

    def _check_absent(self) -> None:
        found = self._of_output()
        if found and not self._overwrite:
            raise OutputError(
                "already has files",
                path=self.name,
                found=few(found, _SHOWN),
                remedy="choose another repository, branch or folder, or pass --overwrite",
            )

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        return {}

    def write(self, file: int, offset: int, data: Bytes) -> None:
        self._known[file].take(offset, data.tobytes())

    def sync(self, files: Collection[int]) -> None:
        """Nothing is kept before the commit."""

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        for (file, offset), record in blocks.items():
            self._known[file].records[offset] = record

    def seal(self, files: Collection[int]) -> None:
        """Nothing is kept before the commit."""

    def tell(self, advance: Callable[[int], None], reads: ReadCount) -> None:
        self._advance, self._reads = advance, reads

    def publish(self, manifest: bytes) -> None:
        hub = library.library()
        additions = self._additions(hub, manifest)
        gone = [hub.CommitOperationDelete(name) for name in self._replaced({one.path_in_repo for one in additions})]
        api = self._api()
        with library.quietly():
            send(
                self.name,
                additions,
                lambda: api.preupload_lfs_files(
                    self._path.repository,
                    additions=additions,
                    revision=self._branch,
                    num_threads=_FILES_AT_ONCE,
                    free_memory=False,
                ),
            )
            self._check_taken(additions)
            send(
                self.name,
                additions,
                lambda: api.create_commit(
                    self._path.repository,
                    operations=[*gone, *additions],
                    commit_message=self._message or f"Add a checkpoint ({self._plan.format})",
                    revision=self._branch,
                    parent_commit=self._parent,
                ),
                is_made=lambda: self.is_published(self._fingerprint),
            )
        forget(self._path.repository)

    def _additions(self, hub: Any, manifest: bytes) -> list[Any]:
        cut, tiles, far = cut_all(self._plan.files), Tiles(_TILES), is_far(self._plan)
        additions = []
        about: dict[str, tuple[int, str]] = {}
        for number, file in enumerate(self._plan.files):
            known = self._known[number]
            addition = hub.CommitOperationAdd(self._inside(file.path), b"")
            addition.path_or_fileobj = PlannedFile(
                file,
                cut.blocks[number],
                known,
                tiles,
                is_far=far,
                advance=self._advance,
                reads=self._reads,
            )
            addition.upload_info = type(addition.upload_info)(  # it would read all of the file for its digest
                size=file.nbytes, sample=known.head, sha256=known.sha256.digest()
            )
            additions.append(addition)
            about[self._inside(file.path)] = (file.nbytes, known.sha256.hexdigest())
        additions.append(hub.CommitOperationAdd(self._manifest_name(), manifest))
        named = {addition.path_in_repo for addition in additions}
        if self._card is not None and CARD not in (*self._there, *named):
            additions.append(hub.CommitOperationAdd(CARD, self._card(about).encode()))
        return additions

    def _check_taken(self, additions: Iterable[Any]) -> None:
        """Raise if the Hub would leave files out of the commit, of which huggingface_hub says nothing."""
        ignored = [addition.path_in_repo for addition in additions if getattr(addition, "_should_ignore", False)]
        if ignored:
            raise OutputError(
                "has a .gitignore by which files of the output would be left out",
                path=self.name,
                found=few(ignored),
                remedy="remove the lines from .gitignore, or choose another repository",
            )

    def _manifest_name(self) -> str:
        if self._plan.is_directory:
            return self._inside(MANIFEST_NAME)
        folder, _, name = self._path.inner.rpartition("/")
        return "/".join(filter(None, (folder, f".{name}{MANIFEST_NAME}")))

    def _replaced(self, written: Collection[str]) -> list[str]:
        """Files of a checkpoint that was there which the new one has not: those of its manifest, and other weights."""
        if not self._plan.is_directory or not self._overwrite:
            return []
        manifest = self._manifest_there()
        old = () if manifest is None else {self._inside(name) for name in manifest.files}
        return [name for name in self._of_output() if name not in written and (name in old or _WEIGHTS.fullmatch(name))]

    def _manifest_there(self) -> Manifest | None:
        try:
            return read_manifest(self.name.rstrip("/"), HubPlace(opened(self._path)))
        except LastingError:
            return None  # of a damaged one nothing is known, and whoever goes on meets what else it may be

    def is_published(self, fingerprint: str) -> bool:
        found = self._manifest_there()
        return found is not None and found.plan == fingerprint

    def close(self, failure: str = "") -> None:
        self._known = []

    def discard(self) -> None:
        self._known = []


def _writable(path: HubPath) -> HubPath:
    if path.kind != "model" or path.is_commit:
        raise UsageError(
            "is not written to",
            path=path.root,
            expected="a branch of a model's repository",
            found=f"a {path.kind}" if path.kind != "model" else "a commit",
        )
    return path


def _check_may_write(api: Any, name: str) -> None:
    """Raise what keeps the user from writing, as far as this release of huggingface_hub can ask for it."""
    if hasattr(api, "auth_check") and "write" in signature(api.auth_check).parameters:
        api.auth_check(name, write=True)
