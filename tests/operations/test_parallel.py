"""Work in threads: order, progress, and the end at the first error."""

from __future__ import annotations

import threading
import time

import pytest

from anyckpt.errors import FormatError
from anyckpt.operations.steps.threads import Advance, Meter, each


def test_results_keep_the_order_of_items() -> None:
    def work(item: int, advance: Advance) -> int:
        time.sleep(0.002 * (5 - item % 5))
        advance(1)
        return item * item

    seen: list[tuple[int, int]] = []
    found = each(work, range(20), Meter(20, lambda *now: seen.append(now)), workers=4)
    assert found == [item * item for item in range(20)]
    assert [done for done, _ in seen] == list(range(1, 21))
    assert {total for _, total in seen} == {20}


def test_the_first_error_ends_the_work() -> None:
    started: list[int] = []

    def work(item: int, advance: Advance) -> None:
        started.append(item)
        if item == 3:
            raise FormatError("damaged")
        for _ in range(1000):
            time.sleep(0.005)
            advance(1)

    begin = time.monotonic()
    with pytest.raises(FormatError, match="damaged"):
        each(work, range(1000), Meter(1, None), workers=4)
    assert time.monotonic() - begin < 2
    assert len(started) < 10


def test_nothing_to_do_is_done() -> None:
    assert each(lambda item, advance: item, [], Meter(0, None)) == []


def test_a_total_is_never_exceeded() -> None:
    seen: list[tuple[int, int]] = []
    meter = Meter(10, lambda *now: seen.append(now))
    for _ in range(3):
        meter.advance(5)
    assert seen == [(5, 10), (10, 10), (15, 15)]


def test_threads_end_with_the_work() -> None:
    each(lambda item, advance: item, range(10), Meter(0, None), workers=3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
