"""Blocks that are filled while those before them are written, where their bytes come from afar.

A destination that takes the bytes of a file in order is written to by one thread a file.  If that waited for what it
reads before it writes, and for what it writes before it reads, each way of the link would stand still half of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextvars import copy_context

from anyckpt.engine.blocks import Block
from anyckpt.engine.files import BlockBuffer
from anyckpt.engine.filling import Filling

Fill = Callable[[Block, BlockBuffer], Filling]


def filled(blocks: Sequence[Block], fill: Fill, ahead: Callable[[], int] | None) -> Generator[Filling, None, None]:
    """Blocks in their order, each filled; what one gives is of use until the next is asked for.

    Args:
        blocks: to be filled.
        fill: fills one in the memory that it is given, in any thread.
        ahead: how many may be filled at this moment while one is in use; None if none ever, and no thread is begun.

    Raises:
        Exception: what filling a block raises, in that block's turn.
    """
    if ahead is None or len(blocks) < 2:
        buffer = BlockBuffer()
        for block in blocks:
            yield fill(block, buffer)
        return
    from concurrent.futures import Future, ThreadPoolExecutor  # here, as it takes milliseconds to import

    left = deque(blocks)
    free = [BlockBuffer()]
    going: deque[tuple[Future[Filling], BlockBuffer]] = deque()
    with ThreadPoolExecutor(len(blocks), thread_name_prefix="anyckpt-ahead") as pool:
        try:
            while left or going:
                while left and len(going) <= ahead():
                    buffer = free.pop() if free else BlockBuffer()
                    going.append((pool.submit(copy_context().run, fill, left.popleft(), buffer), buffer))
                future, buffer = going.popleft()
                yield future.result()
                free.append(buffer)
        finally:
            for future, _ in going:
                future.cancel()
