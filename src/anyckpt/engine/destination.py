"""What an output is written to: the few things that the engine asks of a directory, an object store or memory.

The engine begins, writes blocks, makes them durable, notes that, seals files stage by stage, and publishes.  Several
processes may each do a share of this; each begins for itself, and the last one publishes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

from anyckpt.data_classes import dataclass
from anyckpt.engine.files import Bytes
from anyckpt.engine.manifest import Manifest
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import BlockKey, BlockRecord, Trouble
from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.read_count import ReadCount


class BusyError(OutputError):
    """Another process writes the output at this moment."""


@dataclass(frozen=True, order=True)
class Share:
    """One of the equal parts in which processes divide the work of a plan.

    Attributes:
        number: which one, from 1.
        of: into how many the work is divided.

    Raises:
        UsageError: there is no such share.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError("there is no such share", expected="1/N to N/N", found=f"{self.number}/{self.of}")

    def __str__(self) -> str:
        return f"{self.number} of {self.of}"


class Destination(ABC):
    """Where an output is prepared, unseen as such, and published when it is whole.

    Attributes:
        name: what to call it in a message.
        in_order: bytes of a file are taken only one after another and from one process (an object store); otherwise at
            any offset and from any process.  Several files are always written at once.
        passes: how often all bytes are gone through: where digests are wanted before bytes, once more by ``publish``.
        page: processes must not write to one file closer together than this many bytes, counted from its start.
    """

    name: str
    in_order: bool = False
    passes: int = 1
    page: int = 1

    @abstractmethod
    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        """Prepare to write a plan.

        Args:
            plan: what will be written.
            fingerprint: identifies the plan and its sources; work of another fingerprint is not continued.
            share: which share this process does; others do theirs, now or later.  None: it is the only process, now.
            resume: with no share: continue what is there instead of beginning anew.  Shares always continue.

        Raises:
            OutputError: something is published there, other processes write it, there is other work to continue, or
                it has no room.
        """

    @abstractmethod
    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        """The blocks of a plan that are durable, whichever process wrote them, as far as is known now.

        Raises:
            OutputError: the work that is there is of another plan.
        """

    @abstractmethod
    def write(self, file: int, offset: int, data: Bytes) -> None:
        """Write bytes of a file (an index in the plan's files); called from several threads.

        Args:
            file: which.
            offset: first byte in it; rising without gaps if ``in_order``.
            data: lies in memory as ``files.BlockBuffer.at`` gave it; another use is made of it after the call.

        Raises:
            OutputError: the system refuses.
        """

    @abstractmethod
    def sync(self, files: Collection[int]) -> None:
        """Make what is written of some files durable.

        Raises:
            OutputError: the system refuses.
        """

    @abstractmethod
    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        """Note blocks that are durable, so that another process knows of them.

        Raises:
            OutputError: the system refuses.
        """

    @abstractmethod
    def seal(self, files: Collection[int]) -> None:
        """Some files are whole: make them durable; nothing more is written to them.  Some may be sealed before.

        Raises:
            OutputError: the system refuses.
        """

    def described(self, manifest: Manifest) -> Manifest:
        """What the manifest says of the output, whose files are sealed: what the engine wrote, unless that is changed
        on the way (compressed).
        """
        return manifest

    @abstractmethod
    def publish(self, manifest: bytes) -> None:
        """Give the output, all of whose files are sealed, its name; its manifest goes along.

        Raises:
            OutputError: the system refuses; what was there before is untouched.
        """

    @abstractmethod
    def is_published(self, fingerprint: str) -> bool:
        """Whether the output of this plan is there already, whole."""

    @abstractmethod
    def close(self, failure: str = "") -> None:
        """Leave the work as it is, to be continued by another process.

        Args:
            failure: why this process gives up, for whoever waits for its share; empty if it did what it had to.
        """

    @abstractmethod
    def discard(self) -> None:
        """Remove every trace of the work."""

    def tell(self, advance: Callable[[int], None], reads: ReadCount) -> None:  # noqa: B027 (most have nothing to tell)
        """Have ``publish`` tell what it goes through once more, where it does.

        Args:
            advance: called with numbers of bytes of the output, from any thread.
            reads: counts what is read of sources for them.
        """

    def is_begun(self) -> bool:
        """Whether interrupted work has left what going on with it would not write again."""
        return False

    def weaker(self) -> tuple[str, ...]:
        """What this place could not give of what is promised of outputs elsewhere, in sentences for a user."""
        return ()

    def beat(self) -> None:  # noqa: B027 (most have nothing to show)
        """Show whoever waits for this process's share that it is at work; called every few seconds, from a thread."""

    def signs(self) -> dict[Share, int]:
        """Shares that were begun -> a number that grows whenever the process of one has shown that it is at work.

        No clock takes part: who waits compares what it sees with what it saw before.
        """
        return {}

    def troubles(self) -> dict[Share, Trouble]:
        """Shares that no process is at work on, as far as can be seen, with what is known of why.

        A lock of a process on another host cannot be seen everywhere, so that only signs tell for sure.
        """
        return {}
