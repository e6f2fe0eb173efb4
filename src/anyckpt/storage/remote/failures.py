"""What goes wrong far away, as errors that say what to do.

Obstore's messages quote addresses with their signatures and what servers answered.  Only their status, their word for
the error and the kind of a failed connection are taken from them, so that no message tells a credential.
"""

from __future__ import annotations

import re

from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, FormatError, UnreachableError
from anyckpt.storage.remote.addresses import AZURE, GCS, S3, WEB, Address

_STATUS = re.compile(r"status code: (\d{3})|status: (\d{3})\b")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_EXHAUSTED = re.compile(r"after [1-9]\d* retries")
_CONNECTIONS = {
    "Connection refused": "the server takes no connection",
    "dns error": "the server's name is not known",
    "tcp connect error": "the server takes no connection",
    "timed out": "no answer came in time",
    "TimedOut": "no answer came in time",
    "certificate": "the server's certificate is not trusted",
    "Error getting credentials": "the credentials cannot be fetched",
    "Error decoding response body": "the answer broke off",
    "error decoding response body": "the answer broke off",
    "BadScheme": "the address is not one of https",
}
_NO_WAY = "Received redirect without LOCATION"
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired", "ExpiredTokenException")
_UNKNOWN_KEY = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "InvalidSecurity",
    "AuthenticationFailed",
)
_OTHER_REGION = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "TemporaryRedirect",
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")
_WHO = {
    S3: "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    GCS: "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    AZURE: "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    WEB: "use an address that is signed, or names user and token",
}
_HOLDERS = {S3: "bucket", GCS: "bucket", AZURE: "container", WEB: "server"}


@dataclass(frozen=True)
class Failure:
    """What is known of a request that failed.

    Attributes:
        status: of HTTP; None where no answer came.
        code: the server's word for it; empty if it gave none.
        reason: what became of the connection, in words; empty if it held.
        kind: the type of obstore's error.
        is_final: whether it was tried often enough.
    """

    status: int | None
    code: str
    reason: str
    kind: str
    is_final: bool

    @property
    def is_missing(self) -> bool:
        return self.kind == "FileNotFoundError" and self.code not in _NO_BUCKET

    @property
    def is_denied(self) -> bool:
        return self.kind in ("PermissionDeniedError", "UnauthenticatedError") or self.status in (401, 403)

    @property
    def is_passing(self) -> bool:
        """Whether the same request may well succeed."""
        if self.kind == "NotSupportedError" or self.is_final or self.is_missing or self.is_denied:
            return False
        return self.status is None or self.status >= 500 or self.status in (408, 429)

    @property
    def shown(self) -> str:
        """The facts, for a message."""
        status = None if self.status is None else f"status {self.status}"
        return " ".join(filter(None, (status, self.code))) or self.reason or self.kind


def failure_of(error: BaseException) -> Failure:
    """What an error of obstore says."""
    text = str(error).replace(_NO_WAY, "status code: 301")
    found = _STATUS.search(text)
    code = _CODE.search(text)
    reason = "" if found else next((words for mark, words in _CONNECTIONS.items() if mark in text), "")
    return Failure(
        int(found[1] or found[2]) if found else None,
        code[1] if code else "",
        reason,
        type(error).__name__,
        _EXHAUSTED.search(text) is not None,
    )


def named(failure: Failure, address: Address, path: str, *, unsigned: bool = False) -> AnyckptError:
    """The error that tells a user of a failure.

    Args:
        failure: what is known.
        address: of anything in the same store.
        path: what was to be read, without secrets.
        unsigned: whether requests were not signed, as no credentials were found.

    Returns:
        FormatError: for what is not there, or not to be read by this user, which another try would not change.
        UnreachableError: for what another try may change.
    """
    holder = _HOLDERS[address.kind]
    if failure.code in _NO_BUCKET:
        return FormatError(
            f"the {holder} {address.holder!r} does not exist", path=path, found=failure.shown, remedy="check its name"
        )
    if failure.code in _OTHER_REGION or failure.status in (301, 307):
        return FormatError(
            f"the {holder} {address.holder!r} is in another region than the one asked",
            path=path,
            found=failure.shown,
            remedy="set AWS_REGION to its own",
        )
    if failure.code in _EXPIRED:
        return UnreachableError(
            "the credentials have expired", path=path, found=failure.shown, remedy="log in again, and run it again"
        )
    if failure.code == "RequestTimeTooSkewed":
        return UnreachableError(
            "the server refuses it, as this machine's clock is off", path=path, remedy="set the clock"
        )
    if failure.code in _UNKNOWN_KEY:
        return FormatError(
            "the credentials are not valid there", path=path, found=failure.shown, remedy=_WHO[address.kind]
        )
    if failure.is_denied:
        problem = f"these credentials may not read it, or the {holder} does not say what is not there"
        if unsigned or address.kind == WEB:
            problem = "may not be read by everybody" + (", and no credentials were found" if unsigned else "")
        return FormatError(problem, path=path, found=failure.shown, remedy=_WHO[address.kind])
    if failure.is_missing:
        return FormatError("does not exist", path=path, remedy="check the path")
    if failure.status == 416:
        return FormatError("has become shorter since it was found", path=path, remedy="run it again")
    if failure.kind == "NotSupportedError":
        return UnreachableError(
            "the server does not send parts of files, without which all of it would be loaded",
            path=path,
            remedy="download it, and give the path on the disk",
        )
    if failure.kind == "InvalidPathError":
        return FormatError(
            "holds a name that cannot be asked for", path=path, remedy="rename what has a // in its name"
        )
    return UnreachableError(
        "cannot be reached" if failure.status is None else "cannot be read, as the server fails",
        path=path,
        found=failure.shown,
        remedy="check the address and the connection" if failure.status is None else "try again later",
    )
