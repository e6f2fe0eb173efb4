"""Dividing the blocks of a plan between processes, in the same way in all of them.

What several files share a reading of stays together, a file is in as few shares as its size allows, and no share has
more than a block's worth more than another.  Only the first stage is divided: it holds the data.  What follows is
small and is written by who finishes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from anyckpt.engine.blocks import Block, Cut
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import BlockKey
from anyckpt.engine.together import MOST_TOGETHER, gangs
from anyckpt.errors import UsageError

_FILE_COST = 128 << 10
"""Bytes that could be written in the time that making a file durable takes besides."""


class Division:
    """Which share each block of a plan's first stage belongs to.

    Args:
        plan: whose.
        cut: its blocks.
        of: number of shares.
        destination: whether it takes files only whole, and how far apart processes must write.

    Raises:
        UsageError: bytes are owned by a process that has no share, or a file that is written whole has several owners.
    """

    def __init__(self, plan: Plan, cut: Cut, of: int, destination: Destination) -> None:
        self._cut = cut
        self._page = destination.page
        self.files = first_stage(plan)
        self.of = of
        self._share: dict[int, dict[int, int]] = {number: {} for number in self.files}  # by file and first byte
        units = [self._unowned(cut.blocks[number], plan, destination) for number in self.files]
        if not destination.in_order and of > 1:
            blocks = (block for unit in units for block in unit)
            units = [gang.blocks for gang in gangs(plan.files, blocks, MOST_TOGETHER)]
        begun: set[int] = set()
        weights = []
        for unit in units:
            new = {block.file for block in unit} - begun
            begun |= new
            weights.append(sum(block.nbytes for block in unit) + _FILE_COST * len(new))
        for unit, number in zip(units, divided(weights, of), strict=True):
            for block in unit:
                self._share[block.file][block.offset] = number
        self._shared_pages = self._find_shared_pages() if of > 1 else {}

    def _unowned(self, blocks: Sequence[Block], plan: Plan, destination: Destination) -> Sequence[Block]:
        """The blocks of a file that any process can fill; the others are their owners'."""
        owners = {block.owner for block in blocks if block.owner is not None}
        if not owners:
            return blocks
        path = plan.files[blocks[0].file].path or destination.name
        if max(owners) > self.of:
            raise UsageError(
                "is to hold bytes of a process that has no share",
                path=path,
                expected=f"owners up to {self.of}",
                found=max(owners),
                remedy="divide the work into as many shares as there are processes",
            )
        if destination.in_order and len(owners) > 1:
            raise UsageError(
                "is to hold bytes of several processes, and is written by one",
                path=path,
                found=f"owners {sorted(owners)}",
                remedy="give each process a file of its own",
            )
        alone = next(iter(owners)) if destination.in_order else None
        for block in blocks:
            owner = block.owner or alone
            if owner is not None:
                self._share[block.file][block.offset] = owner
        return [block for block in blocks if block.offset not in self._share[block.file]]

    def blocks(self, share: Share) -> Iterator[Block]:
        """Those of one share, in the order of the files."""
        for number in self.files:
            for block in self._cut.blocks[number]:
                if self._share[number][block.offset] == share.number:
                    yield block

    def missing(self, present: Container[BlockKey]) -> dict[Share, int]:
        """Shares that are not whole -> the bytes that are missing.

        Args:
            present: the blocks that are durable.
        """
        found: dict[Share, int] = {}
        for number in self.files:
            for block in self._cut.blocks[number]:
                if (number, block.offset) not in present:
                    share = Share(self._share[number][block.offset], self.of)
                    found[share] = found.get(share, 0) + block.nbytes
        return dict(sorted(found.items()))

    def ends(self, block: Block) -> tuple[int, int]:
        """Bytes at the start and at the end of a block that lie in a page in which other shares have bytes, too."""
        shared = self._shared_pages.get(block.file)
        if not shared or not block.nbytes:
            return 0, 0
        end = block.offset + block.nbytes
        first, last = block.offset // self._page, (end - 1) // self._page
        start = min(block.nbytes, (first + 1) * self._page - block.offset) if first in shared else 0
        stop = end - max(block.offset, last * self._page) if last in shared else 0
        return start, min(stop, block.nbytes - start)

    def _find_shared_pages(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for number in self.files:
            page, owner = -1, 0
            for block in self._cut.blocks[number]:
                share = self._share[number][block.offset]
                if block.nbytes and block.offset // self._page == page and share != owner:
                    found.setdefault(number, set()).add(page)
                if block.nbytes:
                    page, owner = (block.offset + block.nbytes - 1) // self._page, share
        return found


def first_stage(plan: Plan) -> list[int]:
    """Indices of the files of the first stage, which is the data."""
    stage = min((file.stage for file in plan.files), default=0)
    return [number for number, file in enumerate(plan.files) if file.stage == stage]


def divided(weights: Sequence[int], of: int) -> list[int]:
    """The share, from 1, of each of a row of things, so that neighbours stay together and shares weigh the same."""
    total = sum(weights)
    shares, before = [], 0
    for weight in weights:
        middle = 2 * before + weight
        shares.append(min(of, 1 + middle * of // (2 * total)) if total else 1)
        before += weight
    return shares
