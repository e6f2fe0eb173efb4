"""Every error that anyckpt raises on purpose.

A message is one line that names the file, the tensor where there is one, what was expected, what was
found, and what to do next.  The command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

Told = TypeVar("Told", bound="AnyckptError")

_USER = re.compile(r"(https?://)[^/\s@]+@")
_ASKED = re.compile(r"(https?://[^\s?'\"]*)\?(?:(?!::)[^\s'\"])*")
_OF_THE_MOMENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ESHUTDOWN", "EPIPE"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOLINK", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)
_COMPARED = 5000
_SHOWN = 3
_FEWEST_LETTERS = 4


class AnyckptError(Exception):
    """Base of all errors; catch this to catch everything that anyckpt raises on purpose.

    Args:
        problem: what is wrong, without a final full stop.
        path: the file or directory concerned.
        tensor: the tensor's name, if one is concerned.
        expected: what should have been there.
        found: what was there.
        remedy: what the user can do next, as an imperative sentence without a final full stop.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)  # first, as an ImportError has a path of its own, which it clears
        self.problem = problem
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        where = [] if self.path is None else [self.path]
        if self.tensor is not None:
            where.append(f"tensor {self.tensor!r}")
        facts = [] if self.expected is None else [f"expected {self.expected}"]
        if self.found is not None:
            facts.append(f"found {self.found}")
        text = ": ".join([*where, self.problem])
        if facts:
            text += f" ({', '.join(facts)})"
        if self.remedy is not None:
            text += f"; {self.remedy}"
        return without_secrets(text.replace("\n", " "))

    def told_as(self, kind: type[Told], problem: str | None = None, **instead: Any) -> Told:
        """The same in an error of another kind.

        Args:
            kind: of the error.
            problem: what is wrong, in place of what this one says.
            instead: of the other arguments, those that differ from this one's.
        """
        facts = {name: getattr(self, name) for name in ("path", "tensor", "expected", "found", "remedy")}
        return kind(self.problem if problem is None else problem, **{**facts, **instead})


class UnreachableError(AnyckptError):
    """What is far away cannot be read at this moment, or another is in its place since it was found."""


class LastingError(AnyckptError):
    """An error that another try would meet again: of what was given, and not of the moment.

    Who goes on without what is damaged catches this one, so that nobody takes what a network kept for missing.
    """


class FormatError(LastingError):
    """A file or directory is missing, truncated, damaged, or not of the format that it claims."""


class UnknownFormatError(FormatError):
    """What is there is no checkpoint of any format that is read here."""


class UnfinishedError(FormatError):
    """A checkpoint that was being saved, or deleted, when that was interrupted, or still is."""


class UnsafeError(FormatError):
    """A file asks for something that a checkpoint has no business asking for (path traversal, links, bombs)."""


class MappingError(LastingError):
    """Names, shapes or configuration do not fit the model family, or a model is incomplete."""


class IncompleteError(MappingError):
    """A model lacks tensors, or has some that are of no rule.

    Attributes:
        missing: stored names that the tensors would have.
        unknown: stored names of those that no rule covers.
    """

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class OutputError(LastingError):
    """A destination cannot be written: it exists, the disk is full, the work to resume is of another plan."""


class UsageError(LastingError):
    """The options asked for contradict each other, or this source or target cannot do them."""


class MissingLibraryError(LastingError, ImportError):
    """What was asked for needs a library that is not installed: ``tensor.torch()`` without torch."""


class UnknownTensorError(LastingError, KeyError):
    """A checkpoint has no tensor of the name that was asked for."""


def reading_error(what: str, path: str | os.PathLike[str], error: OSError | ValueError) -> AnyckptError:
    """What it means that the system refuses to read.

    Args:
        what: is refused, after "cannot".
        path: of the file or directory.
        error: the system's.

    Returns:
        UnreachableError: of a mounted file system whose server does not answer, or of a disk that fails.
        FormatError: of what is missing or may not be read.
    """
    kind = UnreachableError if getattr(error, "errno", None) in _OF_THE_MOMENT else FormatError
    return kind(f"cannot {what}: {getattr(error, 'strerror', None) or error}", path=path)


def without_secrets(text: str) -> str:
    """A text in which web addresses have neither the user and token nor the signature that they may be given with."""
    return _ASKED.sub(r"\1", _USER.sub(r"\1", text)) if "http" in text else text


def alike(name: str, names: Iterable[str]) -> str:
    """Which of the names may have been meant by another one, for a message; empty if none resembles it."""
    from difflib import get_close_matches

    some = list(islice(names, _COMPARED))  # comparing takes long
    found = [known for known in some if known.endswith(f".{name}") or (known and name.endswith(f".{known}"))]
    found += [known for known in get_close_matches(name, some, _SHOWN) if known not in found]
    return " or ".join(map(repr, found[:_SHOWN]))


def did_you_mean(name: str, titles: Mapping[str, str]) -> str | None:
    """A question that names what may have been meant by a name that is not known; None if nothing resembles it.

    Args:
        name: what somebody wrote.
        titles: what there is -> its title, which a name may be taken from (``huggingface`` for a Hugging Face folder).
    """
    from difflib import get_close_matches

    wanted = _letters(name)
    spelled = {_letters(known): known for known in titles}
    found = [spelled[known] for known in get_close_matches(wanted, spelled, _SHOWN)]
    if len(wanted) >= _FEWEST_LETTERS:
        found += [known for known, title in titles.items() if wanted in _letters(title) or wanted in _letters(known)]
    few = list(dict.fromkeys(found))[:_SHOWN]
    return f"did you mean {' or '.join(few)}?" if few else None


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def few(names: Iterable[object], most: int = 8) -> str:
    """The first of many names, and how many more there are, for a message."""
    listed = list(map(str, names))
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


@contextmanager
def about(path: str) -> Iterator[None]:
    """Within, an error that names no file names this one."""
    try:
        yield
    except AnyckptError as error:
        error.path = error.path or path
        raise
