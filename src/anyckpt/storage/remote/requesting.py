"""Requests of obstore made until they succeed or are known not to."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from anyckpt.storage.remote import stores
from anyckpt.storage.remote.addresses import Address
from anyckpt.storage.remote.failures import Failure, failure_of, named
from anyckpt.storage.remote.stores import Store, is_anonymous
from anyckpt.storage.requests import is_given_up

T = TypeVar("T")

TRIES = 5
_LONGEST_WAIT = 5.0
_LOOK = 0.2


class WrongAnswerError(Exception):
    """An answer that is not what was asked for; another one may be."""


def wait_before(attempt: int) -> None:
    """Sleep before another try, each time about twice as long, and not at the same moment as others."""
    time.sleep(min(_LONGEST_WAIT, stores.FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0))


class _GivenUpError(BaseException):
    """Nobody waits for the answer any more."""


def _apart(ask: Callable[[], T]) -> T:
    """What a request gives, waited for so that an interrupt from the keyboard ends it: obstore looks for none."""
    answers: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="anyckpt-request", daemon=True).start()
    while not done.wait(_LOOK):
        if is_given_up():
            raise _GivenUpError
    if errors:
        raise errors[0]
    return answers[0]


def asked(ask: Callable[[], T]) -> T | Failure:
    """What a request gives, tried a few times; or why it failed.

    Obstore itself tries again where no answer begins; an answer that breaks off is left to its caller.
    """
    for attempt in range(TRIES):
        if attempt:
            wait_before(attempt - 1)
        try:
            return _apart(ask)
        except _GivenUpError:
            raise InterruptedError from None
        except WrongAnswerError as error:
            failure = Failure(None, "", str(error), "", is_final=False)
        except Exception as error:  # obstore's errors have a common base only in its compiled part
            failure = failure_of(error)
        if not failure.is_passing:
            break
    return failure


def told(store: Store, address: Address, path: str, ask: Callable[[], T]) -> T:
    """What a request gives.

    Raises:
        FormatError, UnreachableError: see ``failures.named``.
    """
    found = asked(ask)
    if isinstance(found, Failure):  # raised here, where no error with obstore's text is its context
        raise named(found, address, path, unsigned=is_anonymous(store))
    return found
