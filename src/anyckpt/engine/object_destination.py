"""The commit protocol on an object store, which renames nothing: what makes files a checkpoint appears last.

Files of the first stage are objects under their final names as soon as each is whole, so that interrupted work goes on
from them.  While they are there without the rest, ``.anyckpt-unfinished`` lies among them.  Everything else waits until
all of it is written, as uploads that are not finished or in memory, and appears stage by stage when the output is
published, the last file of the plan after all others and only if nobody has made it.  Where an output is replaced, all
files wait so, and the one that is there stays as it is until then.

Beside the output, in ``.NAME.anyckpt-partial/``, lie claims, which tell writers of one another (``claim``), and notes
of the files that are whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from anyckpt.engine.claim import Claim, is_of_dead_here, tag_of_dead
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.files import Bytes
from anyckpt.engine.growing import Growing
from anyckpt.engine.manifest import parse_manifest
from anyckpt.engine.names import MANIFEST_NAME, PARTIAL, UNFINISHED_NAME
from anyckpt.engine.object_notes import Notes
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import BlockKey, BlockRecord, Trouble
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.storage.objects import ConflictError, ObjectFacts, Objects

_REQUESTS_AT_ONCE = 16
_SHOWN = 5


class ObjectDestination(Destination):
    """Objects below a key of a store, or the one object of that key.

    Args:
        objects: the store.
        key: the output's, without slashes at its ends.
        overwrite: what is there may be replaced, when all of the output is written.

    Raises:
        UsageError: the key is empty.
    """

    in_order = True

    def __init__(self, objects: Objects, key: str, *, overwrite: bool = False) -> None:
        self.name = objects.name_of(key)
        if not key:
            raise UsageError("is a whole bucket", path=self.name, remedy="name a folder or a file in it")
        self.overwrite = overwrite
        self._objects = objects
        self._key = key
        self._partial = partial_of(key)
        self._plan = Plan("", ())
        self._share: Share | None = None
        self._claim: Claim | None = None
        self._notes = Notes(objects, self._partial, self.name)
        self._lock = threading.Lock()
        self._found: dict[str, ObjectFacts] = {}
        self._old: dict[str, ObjectFacts] = {}
        self._waits: frozenset[int] = frozenset()
        self._whole: set[int] = set()
        self._growing = Growing(objects, Plan("", ()), ())
        self._publishing = False

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        self._check_possible(plan)
        self._plan, self._share = plan, share
        about = {"plan": fingerprint, "output": self.name}
        which = "" if share is None else f"-{share.number}-of-{share.of}"
        claim = Claim(self._objects, f"{self._partial}/claim{which}", self.name, about)
        claim.take()
        self._claim = claim
        try:
            self._check_alone(share, claim)
            self._begin(fingerprint, share, resume)
        except BaseException:
            claim.release()
            raise

    def _check_possible(self, plan: Plan) -> None:
        if plan.links:
            raise UsageError("holds links, which an object store does not have", path=self.name, found=plan.format)

    def _check_alone(self, share: Share | None, claim: Claim) -> None:
        """Raise unless all processes that are at work here do other shares of the same division."""
        for key in self._objects.listed(self._partial):
            kind, _, which = key.rpartition("/")[2].partition("-")
            if kind == "claim" and (not which if share is not None else bool(which)):
                tag = tag_of_dead(self._objects, key)
                if tag is None:
                    raise claim.busy()
                self._objects.delete([key])

    def _begin(self, fingerprint: str, share: Share | None, resume: bool) -> None:
        self.is_published(fingerprint)
        there = self._found = self._there()
        finished = bool(there) and UNFINISHED_NAME not in there
        if finished and not self.overwrite:
            raise OutputError("already exists", path=self.name, remedy="choose another path or pass --overwrite")
        first = min((file.stage for file in self._plan.files), default=0)
        early = {number for number, file in enumerate(self._plan.files) if file.path and file.stage == first}
        if finished or len(early) == len(self._plan.files):
            early.clear()
        if share is not None and share.of > 1:
            self._check_shared(finished, early)
        self._old = there if finished else {}
        self._waits = frozenset(range(len(self._plan.files))) - early
        self._growing = Growing(self._objects, self._plan, self._waits)
        self._notes.begin(fingerprint, share)
        self._whole = self._continued(fingerprint, there, share) if share is not None or resume else set()
        if not finished:
            self._tidy(there, share)
            if self._plan.is_directory:
                self._objects.put(self._below(UNFINISHED_NAME), self._unfinished(fingerprint))

    def _check_shared(self, finished: bool, early: Collection[int]) -> None:
        if finished:
            raise UsageError(
                "cannot be replaced by several processes in an object store",
                path=self.name,
                remedy="choose another path, remove it first, or write it with one process",
            )
        if not early:
            raise UsageError(
                "cannot be written by several processes: of a single file, an object store takes only all bytes from "
                "one",
                path=self.name,
                remedy="write it without --share",
            )

    def _continued(self, fingerprint: str, there: Mapping[str, ObjectFacts], share: Share | None) -> set[int]:
        """The files that are whole, of earlier processes' work on this plan."""
        self._notes.check(fingerprint, alone=share is None)
        self._notes.keep_only(
            lambda path, nbytes, tag: path in there and there[path].nbytes == nbytes and there[path].tag == tag
        )
        return self._notes.files()

    def _tidy(self, there: Mapping[str, ObjectFacts], share: Share | None) -> None:
        """Remove what dead processes left that is not continued."""
        if share is None:
            self._notes.clear(keep=self._whole)
        own = {self._plan.files[number].path for number in self._whole if share is None}
        if share is not None:  # others may be writing these now
            own |= {file.path for file in self._plan.files}
        gone = [path for path in there if path not in own and path not in ("", UNFINISHED_NAME)]
        strange = sorted(set(gone) - self._known_unfinished())
        if strange:
            raise OutputError(
                "holds files beside what an unfinished run left",
                path=self.name,
                found=", ".join(strange[:_SHOWN]) + (f" and {len(strange) - _SHOWN} more" if strange[_SHOWN:] else ""),
                remedy="move them elsewhere, or choose another path",
            )
        self._delete(gone)

    def _known_unfinished(self) -> set[str]:
        found = self._objects.read(self._below(UNFINISHED_NAME))
        return set(unfinished_files(found[0])) if found is not None else set()

    def _unfinished(self, fingerprint: str) -> bytes:
        names = sorted({*(file.path for file in self._plan.files), MANIFEST_NAME, *self._old})
        return json.dumps({"anyckpt_unfinished": 1, "plan": fingerprint, "files": names}).encode()

    def _there(self) -> dict[str, ObjectFacts]:
        """What has the output's name: objects below it, and that of the very name as ``""``."""
        start = len(self._key) + 1
        found = {key[start:]: facts for key, facts in self._objects.listed(self._key).items()}
        alone = self._objects.facts(self._key)
        return {**found, "": alone} if alone is not None else found

    def _below(self, path: str) -> str:
        return f"{self._key}/{path}" if path else self._key

    def _delete(self, paths: Collection[str]) -> None:
        if paths:
            self._objects.delete([self._below(path) for path in paths])

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        try:
            self._notes.check(fingerprint, alone=True)
        except BaseException:
            self.close()
            raise
        return self._notes.records()

    def write(self, file: int, offset: int, data: Bytes) -> None:
        assert self._claim is not None
        self._claim.check()
        self._growing.write(file, self._below(self._plan.files[file].path), data.tobytes())

    def sync(self, files: Collection[int]) -> None:
        """Nothing is durable of a file before it is sealed."""

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        self._notes.add(blocks)

    def seal(self, files: Collection[int]) -> None:
        for number in files:
            with self._lock:
                due = number not in self._waits and number not in self._whole
                self._whole.add(number)
            if due:
                file = self._plan.files[number]
                tag = self._growing.finish(number, self._below(file.path), before=self._tag_before(file.path))
                self._notes.whole(number, file, tag)

    def publish(self, manifest: bytes) -> None:
        """Let the rest appear, stage by stage and the last file last; of what is replaced, nothing is left before."""
        assert self._claim is not None
        self._claim.check(anew=True)
        waiting = sorted(self._waits, key=lambda number: (self._plan.files[number].stage, number))
        self._publishing = True
        if self._plan.is_directory:
            self._publish_folder(waiting, manifest)
        else:
            self._publish_file(manifest)
        self._publishing = False
        self._leave()

    def _publish_folder(self, waiting: list[int], manifest: bytes) -> None:
        *others, last = waiting
        plan = json.loads(manifest)["plan"]
        if self._old:
            self._objects.put(self._below(UNFINISHED_NAME), self._unfinished(plan))
            kept = {self._plan.files[number].path for number in others} - {""}
            self._delete([path for path in self._old if path not in kept])
            if "" in self._old:
                self._objects.delete([beside(self._key)])
        for stage in sorted({self._plan.files[number].stage for number in others}):
            self._each([number for number in others if self._plan.files[number].stage == stage], self._appear)
        self._objects.put(self._below(MANIFEST_NAME), manifest)
        self._appear(last)
        self._delete([UNFINISHED_NAME])

    def _publish_file(self, manifest: bytes) -> None:
        if self._old:  # whose bytes the manifest must not answer for, nor its manifest for others
            self._objects.delete([beside(self._key)])
            self._delete([path for path in self._old if path])
            self._appear(0)
        self._objects.put(beside(self._key), manifest)
        if not self._old:
            self._appear(0)

    def _appear(self, number: int) -> None:
        """Finish a file that waited; a new one only if nobody has made it meanwhile, as far as the store tells."""
        path = self._plan.files[number].path
        try:
            before = self._tag_before(path)
            self._growing.finish(number, self._below(path), new=path not in self._old, before=before)
        except ConflictError:
            raise OutputError(
                "has appeared meanwhile: another process writes there",
                path=self._objects.name_of(self._below(path)),
                remedy="choose another path",
            ) from None

    def _tag_before(self, path: str) -> str:
        return self._found[path].tag if path in self._found else ""

    def _each(self, numbers: list[int], work: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(pool.map(work, numbers))

    def is_published(self, fingerprint: str) -> bool:
        there = self._objects.listed(self._key)
        folder = self._below(MANIFEST_NAME) in there
        found = self._objects.read(self._below(MANIFEST_NAME) if folder else beside(self._key))
        if found is None or not holds_all(self._objects, self._key, there, found[0], fingerprint):
            return False
        self._sweep(self._below(UNFINISHED_NAME) in there)
        return True

    def _sweep(self, marked: bool) -> None:
        """Remove what a writer left that died right after the output was whole."""
        own = None if self._claim is None else self._claim.key
        there = [key for key in self._objects.listed(self._partial) if key != own]
        claims = [key for key in there if key.startswith(f"{self._partial}/claim")]
        if all(is_of_dead_here(self._objects, key) for key in claims):
            self._objects.delete(there)
            self._delete([UNFINISHED_NAME] if marked else [])

    def close(self, failure: str = "") -> None:
        self._growing.abandon()
        with suppress(OutputError):
            self._notes.write(failure)
        with suppress(OutputError):
            if self._publishing and not self._plan.is_directory and self._objects.facts(self._key) is None:
                self._objects.delete([beside(self._key)])
        self._release()

    def discard(self) -> None:
        self._growing.abandon()
        with suppress(OutputError):
            if not self._old:  # what has appeared last is the first to go
                paths = [self._plan.files[number].path for number in self._whole - self._waits]
                paths += [self._plan.files[number].path for number in self._waits if self._publishing]
                self._delete(paths[::-1])
                if self._plan.is_directory:
                    self._delete([MANIFEST_NAME, UNFINISHED_NAME])
                elif self._publishing:
                    self._objects.delete([beside(self._key)])
        self._leave()

    def _leave(self) -> None:
        with suppress(OutputError):
            claim = f"{self._partial}/claim"
            self._objects.delete([key for key in self._objects.listed(self._partial) if not key.startswith(claim)])
        self._release()

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def is_begun(self) -> bool:
        with suppress(OutputError):
            self._notes.read()
            return bool(self._notes.files())
        return False

    def troubles(self) -> dict[Share, Trouble]:
        return {share: Trouble(f"gave up: {text}") for share, text in self._notes.failures().items()}

    def weaker(self) -> tuple[str, ...]:
        return self._objects.weaker


def partial_of(key: str) -> str:
    """Where the notes and claims of an output lie."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}.{name}{PARTIAL}"


def beside(key: str) -> str:
    """Where the manifest of an output of one object lies."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}.{name}{MANIFEST_NAME}"


def unfinished_files(marker: bytes) -> list[str]:
    """What a marker of unfinished work says that belongs to it; nothing if it is damaged."""
    try:
        return [str(name) for name in json.loads(marker)["files"]]
    except (ValueError, KeyError, TypeError):
        return []


def holds_all(
    objects: Objects, key: str, there: Mapping[str, ObjectFacts], manifest: bytes, fingerprint: str | None = None
) -> bool:
    """Whether every file that a manifest, of a plan or of any, lists is there, in its size."""
    try:
        parsed = parse_manifest(manifest, objects.name_of(key))
    except FormatError:
        return False
    if fingerprint is not None and parsed.plan != fingerprint:
        return False
    found = dict(there)
    if "" in parsed.files and (alone := objects.facts(key)) is not None:
        found[key] = alone
    return all(
        (facts := found.get(f"{key}/{path}" if path else key)) is not None and facts.nbytes == nbytes
        for path, nbytes in parsed.files.items()
    )
