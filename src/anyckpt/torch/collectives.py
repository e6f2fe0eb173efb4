"""Small records passed between ranks, with one rule: if one fails, all fail, with its error, and none waits for ever.

``Ranks`` is a group of processes that save or load together.  Whatever may fail on one of them is done inside
``gather`` or ``together``: the error is passed round instead of the result and raised everywhere.  Without an
initialised process group there is one rank, and nothing is passed.

A rank that is gone, or does not come, ends the others' wait when the group's time-out is over, with ``RankError``.
Records travel as pickles between processes of one job, which trust one another as they do in torch's own collectives.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from anyckpt.errors import AnyckptError
from anyckpt.indexing import Array

T = TypeVar("T")

_SMALL = 16 << 10
_FIRST = 2048
"""Bytes that are exchanged at first: the length of a record, and as much of it as there is room for."""
_LENGTH = 8
_hosts: dict[tuple[Any, float | None], Any] = {}
"""Groups that were made, by the group whose ranks they have and the time-out."""


class RankError(AnyckptError):
    """Another rank failed, or did not come to where all ranks meet."""


class Ranks:
    """The processes that do something together, as one of them sees them.

    Making one is collective where it needs a group of its own (``timeout``, or a group that is of accelerators only).

    Args:
        group: torch's process group; the whole world if None.
        timeout: seconds after which a rank that does not come is an error; the group's own time-out if None.

    Attributes:
        rank: this process's number in the group, from 0; 0 without an initialised process group.
        size: how many there are.
        group: torch's group over which records are passed; None without one, or for the world's own.
    """

    def __init__(self, group: Any = None, *, timeout: float | None = None) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise RankError("this process is not of the group that saves or loads", remedy="call it in its ranks")
            self.group = _for_hosts(group, timeout) if self.size > 1 else group

    def gather(self, make: Callable[[], T], what: str = "") -> list[T]:
        """What ``make`` gives on each rank, in the order of the ranks, on all of them.

        Args:
            make: called once on each rank; the result must be picklable.
            what: is being done, for the message if a rank does not come.

        Raises:
            AnyckptError: ``make`` raised it on some rank; the first such rank's error, on every rank.
            RankError: ``make`` raised another error on another rank, or a rank did not come.
        """
        if self.size == 1:
            return [make()]
        value, error = _tried(make)
        try:
            arrived = self._exchanged(_packed(value, error))
        except (RuntimeError, ValueError) as failure:
            if error is not None:
                raise error from None
            raise RankError(
                f"a rank did not come{' ' * bool(what)}{what}, and this one stops",
                found=str(failure).splitlines()[0][:200],
                remedy="look at the other ranks' output: one of them failed or is gone",
            ) from failure
        found: list[tuple[Any, tuple[BaseException | None, str] | None]] = list(map(_unpacked, arrived))
        failed = next((number for number, (_, trouble) in enumerate(found) if trouble is not None), None)
        if failed is not None:
            if error is not None and failed == self.rank:
                raise error
            raise _of_rank(failed, found[failed][1]) from error
        return [one for one, _ in found]

    def _exchanged(self, data: bytes) -> list[bytes]:
        """The bytes of every rank; of short ones, as most are, it takes one exchange, which is what costs time.

        Raises:
            RuntimeError: a rank did not come.
        """
        first = np.zeros(_FIRST, dtype=np.uint8)
        first[:_LENGTH] = np.frombuffer(len(data).to_bytes(_LENGTH, "little"), dtype=np.uint8)
        begin = np.frombuffer(data[: _FIRST - _LENGTH], dtype=np.uint8)
        first[_LENGTH : _LENGTH + begin.size] = begin
        arrived = [one.tobytes() for one in self._gathered(first)]
        lengths = [int.from_bytes(one[:_LENGTH], "little") for one in arrived]
        found = [one[_LENGTH : _LENGTH + length] for one, length in zip(arrived, lengths, strict=True)]
        longest = max(lengths) - (_FIRST - _LENGTH)
        if longest > 0:
            rest = np.zeros(longest, dtype=np.uint8)
            end = np.frombuffer(data[_FIRST - _LENGTH :], dtype=np.uint8)
            rest[: end.size] = end
            more = self._gathered(rest)
            found = [
                one + other[: length - len(one)].tobytes()
                for one, other, length in zip(found, more, lengths, strict=True)
            ]
        return found

    def _gathered(self, data: Array) -> list[Array]:
        arrived = [np.empty_like(data) for _ in range(self.size)]
        group: Any = self.group or dist.group.WORLD
        dist.all_gather([torch.from_numpy(one) for one in arrived], torch.from_numpy(data), group=group)
        return arrived

    def together(self, action: Callable[[], T], what: str = "") -> T:
        """Do something on every rank, of which each keeps its own result; it is done when it is done on all.

        Raises:
            AnyckptError: as ``gather``.
        """
        kept: list[T] = []
        self.gather(lambda: kept.append(action()), what)
        return kept[0]

    def broadcast(self, make: Callable[[], T], source: int = 0, what: str = "") -> T:
        """What ``make`` gives on one rank, on all of them; it is called only there.

        Raises:
            AnyckptError: as ``gather``.
        """
        found: list[Any] = self.gather(lambda: make() if self.rank == source else None, what)
        result: T = found[source]
        return result

    def agree(self, value: T, refuse: Callable[[Sequence[T]], AnyckptError]) -> T:
        """A value that is the same on all ranks.

        Args:
            value: this rank's.
            refuse: makes the error that is raised everywhere if they differ, from all ranks' values.

        Raises:
            AnyckptError: that error.
        """
        found = self.gather(lambda: value)
        if any(one != found[0] for one in found):
            raise refuse(found)
        return value

    def numbers_of(self, group: Any) -> tuple[int, ...]:
        """The ranks of another group that are of this one, by their numbers here."""
        own = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        number = {rank: index for index, rank in enumerate(own)}
        return tuple(number[rank] for rank in dist.get_process_group_ranks(group) if rank in number)

    def transfer(self, outgoing: Mapping[int, Array], expected: Mapping[int, int]) -> dict[int, Array]:
        """Bytes sent from rank to rank; all ranks call it, and know alike who sends how many to whom.

        Args:
            outgoing: rank -> what is sent to it, arrays of bytes.
            expected: rank -> how many bytes come from it.

        Raises:
            RankError: a rank did not come.
        """
        arrived = {rank: np.empty(nbytes, dtype=np.uint8) for rank, nbytes in expected.items()}
        group: Any = self.group or dist.group.WORLD
        try:
            waiting: list[Any] = [
                dist.irecv(torch.from_numpy(data), dist.get_global_rank(group, rank), group=group)
                for rank, data in sorted(arrived.items())
            ]
            waiting += [
                dist.isend(torch.from_numpy(data), dist.get_global_rank(group, rank), group=group)
                for rank, data in sorted(outgoing.items())
            ]
            for one in waiting:
                one.wait()
        except RuntimeError as failure:
            raise RankError(
                "a rank did not send or take what it has of common blocks, and this one stops",
                found=str(failure).splitlines()[0][:200],
                remedy="look at the other ranks' output: one of them failed or is gone",
            ) from failure
        return arrived

    def distribute(self, tensors: Sequence[tuple[int, Sequence[int], torch.Tensor | None]]) -> None:
        """Bytes in the host's memory handed on by those that have them; all ranks call it, in the same order.

        Args:
            tensors: for each, who has it, who gets it, and on these ranks its bytes, one axis, which are filled in
                place.

        Raises:
            RankError: a rank did not come.
        """
        group: Any = self.group or dist.group.WORLD
        waiting: list[Any] = []
        try:
            for source, targets, data in tensors:
                if data is None or (self.rank != source and self.rank not in targets):
                    continue
                if len(targets) == self.size - 1:
                    waiting.append(dist.broadcast(data, dist.get_global_rank(group, source), group, async_op=True))
                elif self.rank == source:
                    waiting += [dist.isend(data, dist.get_global_rank(group, one), group) for one in targets]
                else:
                    waiting.append(dist.irecv(data, dist.get_global_rank(group, source), group))
            for one in waiting:
                one.wait()
        except RuntimeError as failure:
            raise _not_passed_on(failure) from failure

    def all_gather(self, data: torch.Tensor) -> list[torch.Tensor]:
        """The bytes of every rank on all of them, in the order of the ranks.

        Args:
            data: in the host's memory, one axis, of one length on all ranks.

        Raises:
            RankError: a rank did not come.
        """
        arrived = [torch.empty_like(data) for _ in range(self.size)]
        try:
            dist.all_gather(arrived, data, group=self.group or dist.group.WORLD)
        except RuntimeError as failure:
            raise _not_passed_on(failure) from failure
        return arrived


def _not_passed_on(failure: RuntimeError) -> RankError:
    return RankError(
        "a rank did not pass on or take what it shares with others, and this one stops",
        found=str(failure).splitlines()[0][:200],
        remedy="look at the other ranks' output: one of them failed or is gone",
    )


def _tried(make: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _packed(value: Any, error: BaseException | None) -> bytes:
    """What a rank passes on; records of thousands of tensors say much the same of each, and shrink to a tenth.

    A result that cannot be pickled is an error like any other.
    """
    if error is None:
        try:
            data = pickle.dumps((value, None))
        except Exception as problem:
            data = pickle.dumps((None, _portable(problem)))
    else:
        data = pickle.dumps((None, _portable(error)))
    return b"z" + zlib.compress(data, 1) if len(data) > _SMALL else b"-" + data


def _unpacked(data: bytes) -> Any:
    return pickle.loads(zlib.decompress(data[1:]) if data[:1] == b"z" else data[1:])


def _portable(error: BaseException) -> tuple[BaseException | None, str]:
    """An error as another process gets it: itself if it is one of ours and can be pickled, and its text."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, AnyckptError):
        try:
            pickle.dumps(error)
            return error, text
        except Exception:
            pass
    return None, text


def _of_rank(number: int, trouble: tuple[BaseException | None, str] | None) -> BaseException:
    error, text = trouble or (None, "")
    if isinstance(error, AnyckptError):
        error.problem += f" (on rank {number})"
        return error
    return RankError(f"rank {number} failed, and so all stop", found=text, remedy="look at that rank's output")


def _for_hosts(group: Any, timeout: float | None) -> Any:
    """A group of the same ranks that passes what is in the hosts' memory; made once for each group and time-out."""
    if timeout is None and "gloo" in str(dist.get_backend(group)):
        return group
    if timeout is None and "cpu" in str(_config(group)):
        return group
    key = (group or dist.group.WORLD, timeout)
    if key not in _hosts:
        ranks = None if group is None else dist.get_process_group_ranks(group)
        limit = None if timeout is None else timedelta(seconds=timeout)
        _hosts[key] = dist.new_group(ranks, backend="gloo", timeout=limit, use_local_synchronization=ranks is not None)
    return _hosts[key]


def _config(group: Any) -> str:
    find = getattr(dist, "get_backend_config", None)
    return "" if find is None else str(find(group))
