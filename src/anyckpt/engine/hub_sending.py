"""Asking and sending to the Hub for an output: what it does not do is an error of the output, or of what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from anyckpt.engine.planned_file import PlannedFile
from anyckpt.errors import AnyckptError, OutputError
from anyckpt.storage.hub import library

Answer = TypeVar("Answer")

_MOVED_ON = 412
"""What the Hub answers to a commit whose parent is not the last of the branch."""


class _MetError(Exception):
    """An error of ours that huggingface_hub has wrapped in its own."""

    def __init__(self, error: AnyckptError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def of_output() -> Iterator[None]:
    """Within, what the Hub does not do is an error of the output."""
    try:
        yield
    except (OutputError, library.NoRevisionError):
        raise
    except AnyckptError as error:
        again = "check the network, proxies and HF_ENDPOINT, and run it again: what is sent is not sent again"
        raise error.told_as(OutputError, remedy=again if error.remedy == library.REACH else error.remedy) from None


def answer_of(call: Callable[[], Answer], name: str) -> Answer:
    """What a call of huggingface_hub gives; made again after a while where the trouble passes.

    Args:
        call: makes it.
        name: of the output, for messages.

    Raises:
        OutputError: there is no answer.
    """
    with of_output():
        return library.asked(call, name)


def send(
    name: str, additions: Iterable[Any], call: Callable[[], Any], *, is_made: Callable[[], bool] | None = None
) -> None:
    """Have huggingface_hub send something, again if the trouble passes.

    Args:
        name: of the output, for messages.
        additions: what is sent, or named by what is.
        call: has it sent.
        is_made: whether a commit was made after all, where the Hub says that another came before it.

    Raises:
        AnyckptError: what keeps it from being sent, or what is wrong with the bytes.
    """

    def sent() -> Any:
        for addition in additions:  # it is sent from where it stands, which after a failure is not its start
            if isinstance(addition.path_or_fileobj, PlannedFile):
                addition.path_or_fileobj.seek(0)
        try:
            return call()
        except Exception as error:
            if is_made is not None and _status(error) == _MOVED_ON and is_made():
                return None  # the answer was lost
            raise _bottom(error, name) from None

    try:
        answer_of(sent, name)
    except _MetError as met:
        raise met.error from None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _bottom(error: Exception, name: str) -> Exception:
    """What lies under the errors in which huggingface_hub wraps what its threads raise."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    own = next((one for one in chain if isinstance(one, AnyckptError)), None)
    if own is not None:
        return _MetError(own)
    if any(_status(one) == _MOVED_ON for one in chain):
        text, remedy = "somebody else has made a commit there meanwhile", "run it again: what is sent is not sent again"
        return _MetError(OutputError(text, path=name, remedy=remedy))
    failure = next((one for one in chain if isinstance(one, library.failures())), None)
    if isinstance(failure, Exception):
        return failure
    text = library.plain(str(chain[-1]))
    if isinstance(chain[-1], ValueError):  # what huggingface_hub makes of answers that refuse files
        return _MetError(OutputError(f"the Hub does not take the files: {text}", path=name))
    return ConnectionError(text)
