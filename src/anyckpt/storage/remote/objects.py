"""Objects through obstore: Amazon's S3 and what speaks as it does, Google Cloud Storage, Azure Blob Storage."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from anyckpt.errors import OutputError
from anyckpt.storage.objects import (
    ConflictError,
    ObjectFacts,
    Objects,
    UnfinishedUpload,
    Upload,
    part_bytes,
)
from anyckpt.storage.remote import aws
from anyckpt.storage.remote.addresses import S3, Address, address_of
from anyckpt.storage.remote.failures import Failure, failure_of, named
from anyckpt.storage.remote.requesting import asked
from anyckpt.storage.remote.stores import Store, is_anonymous, store_at

_DELETED_AT_ONCE = 1000
_ABANDON_SECONDS = 10.0
_LACKS, _AT_ONCE = 501, 409
_NO_CONDITIONS = (
    "this store creates no object only if there is none, so that another writer of the same output at the same moment "
    "would not be noticed"
)
_CONFLICTS = ("AlreadyExistsError", "PreconditionError")
_LACKING = ("NotImplementedError", "NotSupportedError")
_UPLOADS_UNSEEN = (
    "uploads that a killed run did not finish are seen only with boto3 (pip install boto3); a lifecycle rule of the "
    "bucket, AbortIncompleteMultipartUpload, removes them without it"
)
_NOT_LISTED = "unfinished uploads cannot be listed with these credentials"
Result = TypeVar("Result")


def objects_at(url: str) -> tuple[Objects, str]:
    """The store that a path is in, to be written, and what the path is called in it.

    Raises:
        MissingLibraryError: obstore is not installed.
        UsageError: the path names no bucket, or its settings contradict each other.
    """
    address = address_of(url)
    return BucketObjects(store_at(address), address), address.key


class BucketObjects(Objects):
    """The objects of a bucket or container.

    Args:
        store: obstore's.
        address: of anything in it.
    """

    def __init__(self, store: Store, address: Address) -> None:
        self._library = import_module("obstore")
        self._store = store
        self._address = address
        self.root = f"{address.root}/"

    def listed(self, prefix: str) -> dict[str, ObjectFacts]:
        def ask() -> dict[str, ObjectFacts]:
            pages = self._library.list(self._store, prefix or None)
            return {meta["path"]: _facts(meta) for page in pages for meta in page}

        return self._asked(prefix, ask)

    def facts(self, key: str) -> ObjectFacts | None:
        return self._if_there(key, lambda: _facts(self._library.head(self._store, key)))

    def read(self, key: str) -> tuple[bytes, str] | None:
        def ask() -> tuple[bytes, str]:
            found = self._library.get(self._store, key)
            return bytes(found.bytes()), found.meta["e_tag"] or ""

        return self._if_there(key, ask)

    def put(self, key: str, data: bytes, *, new: bool = False, instead_of: str | None = None) -> str:
        mode: Any = "create" if new else {"e_tag": instead_of} if instead_of else "overwrite"
        found = asked(lambda: self._put(key, data, mode))
        if not isinstance(found, Failure):
            return found
        if mode == "overwrite":
            raise self.refused(found, key)
        if found.kind in _LACKING or found.status == _LACKS:
            return self._put_without_conditions(key, data, new, instead_of)
        if found.kind not in _CONFLICTS and found.status != _AT_ONCE:
            raise self.refused(found, key)
        there = self.read(key)  # a request that was repeated may have met its own doing
        if there is None or there[0] != data:
            raise ConflictError(self.name_of(key))
        return there[1]

    def _put(self, key: str, data: bytes, mode: Any) -> str:
        return str(self._library.put(self._store, key, data, mode=mode, use_multipart=False)["e_tag"] or "")

    def _put_without_conditions(self, key: str, data: bytes, new: bool, instead_of: str | None) -> str:
        self.weaker = (_NO_CONDITIONS,)
        before = self.facts(key)
        if (new and before is not None) or (instead_of and (before is None or before.tag != instead_of)):
            raise ConflictError(self.name_of(key))
        return self.put(key, data)

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            self._delete(list(keys[start : start + _DELETED_AT_ONCE]))

    def _delete(self, keys: list[str]) -> None:
        found = asked(lambda: self._library.delete(self._store, keys))
        if isinstance(found, Failure) and found.is_missing and len(keys) > 1:
            for key in keys:
                self._delete([key])
        elif isinstance(found, Failure) and not found.is_missing:
            raise self.refused(found, keys[0])

    def _if_there(self, key: str, ask: Callable[[], Result]) -> Result | None:
        found = asked(ask)
        if isinstance(found, Failure):
            if found.is_missing:
                return None
            raise self.refused(found, key)
        return found

    def _asked(self, key: str, ask: Callable[[], Result]) -> Result:
        found = asked(ask)
        if isinstance(found, Failure):  # raised here, where no error with obstore's text is its context
            raise self.refused(found, key)
        return found

    def upload(self, key: str, nbytes: int, at_once: int) -> Upload:
        return _PartedUpload(self, self._store, key, nbytes, at_once)

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        client = self._boto3() if self._address.kind == S3 else None
        if client is None:
            self.weaker += (_UPLOADS_UNSEEN,) if self._address.kind == S3 else ()
            return []
        try:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self._address.holder, Prefix=prefix)
            found = [UnfinishedUpload(one["Key"], one["UploadId"]) for page in pages for one in page.get("Uploads", ())]
        except Exception as error:  # boto3's errors are made while it runs
            self.weaker += (f"{_NOT_LISTED} ({type(error).__name__})",)
            return []
        return [one for one in found if not prefix or one.key == prefix or one.key.startswith(f"{prefix}/")]

    def forget(self, upload: UnfinishedUpload) -> None:
        try:
            self._boto3().abort_multipart_upload(Bucket=self._address.holder, Key=upload.key, UploadId=upload.number)
        except Exception as error:
            if "NoSuchUpload" in str(error):
                return
            kind = type(error).__name__
        else:
            return
        path = self._address.path_of(upload.key)
        raise OutputError("has an unfinished upload that cannot be removed", path=path, found=kind)

    def _boto3(self) -> Any:
        """The client of boto3, which lists uploads as obstore does not; None where it is not installed."""
        try:
            boto3 = import_module("boto3")
        except ImportError:
            return None
        given = aws.settings(self._address.holder)
        return boto3.client("s3", endpoint_url=given.get("endpoint"), region_name=given.get("region"))

    def refused(self, failure: Failure, key: str) -> OutputError:
        """What to raise for a request that failed."""
        path = self._address.path_of(key)
        if failure.is_denied and failure.code in ("", "AccessDenied"):
            return OutputError(
                "may not be written with these credentials",
                path=path,
                found=failure.shown,
                remedy="use credentials that may write and delete objects there",
            )
        return named(failure, self._address, path, unsigned=is_anonymous(self._store)).told_as(OutputError)


class _PartedUpload(Upload):
    """An upload that obstore makes of what it is fed; it completes it when there is no more, and aborts it on errors.

    All uploads run in one thread's event loop, so that thousands can wait to be finished.
    """

    def __init__(self, objects: BucketObjects, store: Store, key: str, nbytes: int, at_once: int) -> None:
        self._objects = objects
        self._key = key
        self._nbytes = nbytes
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._abandoned = False

        async def put() -> str:
            done = await import_module("obstore").put_async(
                store, key, self._fed(), use_multipart=True, chunk_size=part_bytes(nbytes), max_concurrency=at_once
            )
            return str(done["e_tag"] or "")

        async def begun() -> asyncio.Task[str]:
            return asyncio.ensure_future(put())

        self._task = _in_loop(begun())

    async def _fed(self) -> AsyncIterator[bytes]:
        while (data := await self._waiting.get()) is not None:
            yield data
        if self._abandoned:
            raise _AbandonedError

    def write(self, data: bytes) -> None:
        self._told(self._feed(data))

    def finish(self, before: str = "") -> str:
        found = self._tried(self._finished())
        if not isinstance(found, Failure):
            return found
        if found.is_missing:  # no such upload: a first try may have completed it, whose answer did not arrive
            there = self._objects.facts(self._key)
            if there is not None and there.nbytes == self._nbytes and there.tag != before:
                return there.tag
        raise self._objects.refused(found, self._key)

    def _told(self, work: Coroutine[Any, Any, Result]) -> Result:
        found = self._tried(work)
        if isinstance(found, Failure):
            raise self._objects.refused(found, self._key)
        return found

    def _tried(self, work: Coroutine[Any, Any, Result]) -> Result | Failure:
        try:
            return _in_loop(work)
        except Exception as error:
            return failure_of(error)

    def abandon(self) -> None:
        self._abandoned = True
        with suppress(Exception):
            _in_loop(asyncio.wait_for(self._finished(), _ABANDON_SECONDS))

    async def _feed(self, data: bytes | None) -> None:
        if self._task.done():
            self._task.result()
        put = asyncio.ensure_future(self._waiting.put(data))
        await asyncio.wait({put, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not put.done():
            put.cancel()
            self._task.result()

    async def _finished(self) -> str:
        await self._feed(None)
        return await self._task


class _AbandonedError(Exception):
    pass


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="anyckpt-uploads", daemon=True).start()
    return loop


def _in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run_coroutine_threadsafe(work, _event_loop()).result()


def _facts(meta: Any) -> ObjectFacts:
    return ObjectFacts(meta["size"], meta["e_tag"] or "", meta["last_modified"])
