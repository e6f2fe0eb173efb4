"""huggingface_hub as it is used here: asked with patience, and its errors told in this project's words.

No message has an address with a query, which on the Hub's storage is a signature, nor anything that looks as a token.
Releases before 1.0 speak through requests, later ones through httpx; what differs is here.
"""

from __future__ import annotations

import logging
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from anyckpt.errors import AnyckptError, FormatError, MissingLibraryError, UnreachableError, without_secrets
from anyckpt.storage.hub.paths import parse

Answer = TypeVar("Answer")

INSTALL = "pip install 'anyckpt[hub]'"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
REACH = "check the network, proxies and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to read from the local cache"
TIMEOUT = 30.0
"""Seconds for a connection, and for each of its reads."""

PAUSE = 0.5
"""Seconds before something is asked for a second time; then twice as many each time, up to ``_LONGEST``."""

_LONGEST = 8.0
_LONGEST_ASKED = 60.0
_TRIES = 6
_PASSING = frozenset((408, 429, 500, 502, 503, 504))
_ADDRESS = re.compile(r"https?://\S+")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}|(?i:bearer)\s+\S+")


class NoRevisionError(FormatError):
    """A repository has no such revision."""


def library() -> ModuleType:
    """The module ``huggingface_hub``.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingLibraryError(f"the Hugging Face Hub needs huggingface_hub: {error}", remedy=INSTALL) from error
    return huggingface_hub


def session() -> Any:
    """The session that huggingface_hub itself uses: its proxies, certificates and offline mode."""
    return _utilities().get_session()


def headers() -> dict[str, str]:
    """What every request to the Hub carries: who asks, and the token if there is one."""
    return dict(_utilities().build_hf_headers(library_name="anyckpt"))


def _utilities() -> Any:
    return import_module("huggingface_hub.utils")


def endpoint() -> str:
    """Where the Hub is (``HF_ENDPOINT``)."""
    library()
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the user wants nothing asked of the network (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub and its session raise where the Hub or the network fails."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    spoken = sys.modules[type(session()).__module__.partition(".")[0]]
    return (HfHubHTTPError, HFValidationError, OSError, spoken.HTTPError)


def asked(call: Callable[[], Answer], path: str, *, patience: int = _TRIES) -> Answer:
    """What a call of huggingface_hub gives; made again after a while where the trouble passes.

    Args:
        call: makes it.
        path: what it is about, for messages.
        patience: how often it is made at most.

    Raises:
        FormatError: it is not there, or not for this user, which another try would not change.
        UnreachableError: another try may have an answer.
    """
    for tried in range(1, patience + 1):
        try:
            return call()
        except failures() as error:
            if tried == patience or not passes(error):
                raise explained(error, path) from None
            pause(tried, getattr(getattr(error, "response", None), "headers", None))
    raise AssertionError("unreachable")


def passes(error: Exception) -> bool:
    """Whether a failure may be another a moment later, and whoever has an answer would not wait too long for it."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    if response is not None:
        return is_passing(response.status_code, response.headers)
    own = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HFValidationError)
    return not isinstance(error, own)


def is_passing(status: int, told: Mapping[str, str]) -> bool:
    """Whether an answer may be another a moment later."""
    return status in _PASSING and (_wait_asked_for(told) or 0.0) <= _LONGEST_ASKED


def pause(tried: int, told: Mapping[str, str] | None = None) -> None:
    """Wait before the next try, longer each time, and as long as an answer's headers ask for."""
    wanted = None if told is None else _wait_asked_for(told)
    usual: float = min(PAUSE * 2 ** (tried - 1), _LONGEST) * random.uniform(0.75, 1.25)
    time.sleep(usual if wanted is None else wanted)


def _wait_asked_for(told: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: ``Retry-After``, or ``ratelimit: "api";r=0;t=55``, the Hub's own header."""
    after = told.get("retry-after", "")
    if after.strip().isdigit():
        return float(after)
    limit = re.search(r"\br=0;\s*t=([0-9]+)", told.get("ratelimit", "").replace(" ", ""))
    return None if limit is None else float(limit[1])


def explained(error: Exception, path: str) -> AnyckptError:
    """What a failure of huggingface_hub means, and what to do about it."""
    from huggingface_hub import errors

    if is_offline() and isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return offline(path)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable("the local cache does not have it", path)
    response = getattr(error, "response", None)
    if isinstance(error, errors.GatedRepoError):
        return _told_by_code("GatedRepo", path)
    if isinstance(error, errors.RepositoryNotFoundError):
        return _told_by_code("RepoNotFound", path)
    if isinstance(error, errors.RevisionNotFoundError):
        return _told_by_code("RevisionNotFound", path)
    if isinstance(error, errors.EntryNotFoundError):
        return _told_by_code("EntryNotFound", path)
    if response is not None:
        return answered(response.status_code, response.headers, path)
    if isinstance(error, errors.HFValidationError):
        return FormatError(f"is not understood by huggingface_hub: {plain(error)}", path=path)
    return _unreachable(plain(error) or type(error).__name__, path)


def _unreachable(why: str, path: str) -> UnreachableError:
    return UnreachableError(
        f"the Hub cannot be reached: {why}",
        path=path,
        remedy=REACH,
    )


def offline(path: str) -> FormatError:
    """What to raise where something is not in the cache, and the network may not be used."""
    return FormatError(
        "is not in the local cache, and the Hub may not be asked while HF_HUB_OFFLINE is set",
        path=path,
        remedy="unset HF_HUB_OFFLINE, or fetch it first with `hf download`",
    )


_BY_CODE = {
    "GatedRepo": ("is gated on the Hub", f"ask for access on its page, and {LOG_IN}"),
    "RepoNotFound": ("is not on the Hub, or is private", f"check the name, or {LOG_IN}"),
    "RevisionNotFound": (
        "has no such revision on the Hub, or has it no more",
        "name a branch, a tag or a whole commit",
    ),
    "EntryNotFound": ("is not in the repository at this revision", "check the name of the file"),
}
"""By what the Hub says in ``X-Error-Code``: what is wrong, and the remedy."""


def _told_by_code(code: str, path: str) -> FormatError:
    problem, remedy = _BY_CODE[code]
    with suppress(FormatError):
        remedy = remedy.replace("its page", f"{endpoint().rstrip('/')}/{parse(path).title}")
    kind = NoRevisionError if code == "RevisionNotFound" else FormatError
    return kind(problem, path=path, remedy=remedy)


def answered(status: int, told: Mapping[str, str], path: str) -> AnyckptError:
    """What an answer of the Hub without what was asked for means."""
    code = told.get("x-error-code", "")
    if code in _BY_CODE:
        return _told_by_code(code, path)
    if status == 401:
        return FormatError("the Hub does not accept the token", path=path, remedy=f"{LOG_IN} with one that is valid")
    if status == 403:
        return FormatError(
            "the Hub does not allow this with the token that is used",
            path=path,
            remedy=f"{LOG_IN} with one that has the permission",
        )
    if status == 429:
        wait = _wait_asked_for(told)
        return UnreachableError(
            "the Hub answers that it was asked too often",
            path=path,
            remedy=f"try again in {'some minutes' if wait is None else f'{wait:.0f} seconds'}; "
            "the limit is higher for who has logged in",
        )
    return UnreachableError(f"the Hub answers with HTTP {status}", path=path, remedy="try again later")


def plain(error: Exception | str) -> str:
    """An error's words on one line, without addresses and tokens."""
    return _TOKEN.sub("...", _ADDRESS.sub("...", " ".join(str(error).split())))[:200]


@contextmanager
def quietly() -> Iterator[None]:
    """Within, huggingface_hub shows no bars of its own, and logs no addresses."""
    utilities, logger = _utilities(), logging.getLogger("huggingface_hub")
    shown = not utilities.are_progress_bars_disabled()
    if shown:
        utilities.disable_progress_bars()
    for handler in logger.handlers:
        handler.addFilter(_without_addresses)
    try:
        with _without_signatures():
            yield
    finally:
        for handler in logger.handlers:
            handler.removeFilter(_without_addresses)
        if shown:
            utilities.enable_progress_bars()


def _without_addresses(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    record.msg, record.args = plain(text), ()
    return "not supported by Xet" not in text  # which is known, and nothing to do about


@contextmanager
def _without_signatures() -> Iterator[None]:
    """Within, httpx logs addresses without their queries; it logs every request where a program asks for such words."""
    logger = logging.getLogger(type(session()).__module__.partition(".")[0])
    with _counting:
        _count[0] += 1
        logger.addFilter(_without_query)
    try:
        yield
    finally:
        with _counting:
            _count[0] -= 1
            if not _count[0]:
                logger.removeFilter(_without_query)


_counting = threading.Lock()
_count = [0]


def _without_query(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


@contextmanager
def streamed(address: str, carried: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, str], Iterator[bytes]]]:
    """A GET that follows no redirect: its status, headers (by names in small letters), and body as it arrives.

    Raises:
        Exception: one of ``failures()``, also while the body is read.
    """
    speaking = session()
    if callable(speaking.stream):  # of requests it is a setting
        asked = {"headers": dict(carried), "timeout": TIMEOUT, "follow_redirects": False}
        with _without_signatures(), speaking.stream("GET", address, **asked) as response:
            yield response.status_code, response.headers, response.iter_raw()
        return
    with speaking.get(address, headers=carried, timeout=TIMEOUT, allow_redirects=False, stream=True) as response:
        yield response.status_code, response.headers, response.iter_content(1 << 16)
