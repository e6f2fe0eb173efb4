"""Records between ranks: what one raises all raise, and nobody waits for one that is gone."""

from __future__ import annotations

import os
import signal
import time

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks, outcomes

pytestmark = pytest.mark.peer


def exchanging() -> list[object]:
    from anyckpt.torch.collectives import Ranks

    ranks = Ranks()
    own = ranks.rank
    return [
        ranks.gather(lambda: f"of {own}"),
        ranks.broadcast(lambda: own + 10, source=1),
        ranks.together(lambda: own * 2),
    ]


def raising() -> list[str]:
    from anyckpt.errors import OutputError
    from anyckpt.torch.collectives import RankError, Ranks

    ranks = Ranks()

    def full() -> None:
        if ranks.rank == 1:
            raise OutputError("no space left for the output", path="/data/x", remedy="free some space")

    def broken() -> None:
        if ranks.rank == 0:
            raise ZeroDivisionError("by accident")

    told = []
    for action, kinds in ((full, OutputError), (broken, (RankError, ZeroDivisionError))):
        try:
            ranks.together(action)
        except kinds as error:
            told.append(f"{type(error).__name__}: {error}")
    try:
        ranks.gather(lambda: (lambda: 1) if ranks.rank else "x" * 100_000)
    except RankError as error:
        told.append(str(error)[:31])
    assert ranks.agree(5, lambda found: OutputError(str(found))) == 5
    try:
        ranks.agree(ranks.rank, lambda found: OutputError(f"differs: {found}"))
    except OutputError as error:
        told.append(str(error))
    return told


def lonely(how: str) -> str:
    from anyckpt.torch.collectives import RankError, Ranks

    ranks = Ranks(timeout=1.0)
    ranks.gather(lambda: None)
    if ranks.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2.0)
        return ""
    started = time.monotonic()
    try:
        ranks.gather(lambda: 1, "to the end of the save")
    except RankError as error:
        return f"{error} after {time.monotonic() - started:.0f}"
    return "nothing happened"


def test_records_pass() -> None:
    assert on_ranks(2, exchanging) == [[["of 0", "of 1"], 11, 0], [["of 0", "of 1"], 11, 2]]


def test_what_one_rank_raises_all_raise() -> None:
    first, second = on_ranks(2, raising)
    assert second[0] == "OutputError: /data/x: no space left for the output; free some space"
    assert first[0] == "OutputError: /data/x: no space left for the output (on rank 1); free some space"
    assert first[1] == "ZeroDivisionError: by accident"
    assert second[1].startswith("RankError: rank 0 failed, and so all stop (found ZeroDivisionError: by accident)")
    assert first[2] == second[2] == "rank 1 failed, and so all stop "
    assert first[3] == second[3] == "differs: [0, 1]"


@pytest.mark.parametrize("how", ["killed", "late"])
def test_nobody_waits_for_a_rank_that_does_not_come(how: str) -> None:
    found = outcomes(2, lonely, how, seconds=20)
    assert found[0].value is not None, found[0].told
    assert found[0].value.startswith("a rank did not come to the end of the save, and this one stops")
    assert found[0].value[-1] in "01"


def test_one_process_needs_no_group() -> None:
    from anyckpt.torch.collectives import Ranks

    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather(lambda: 3) == [3]
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 / 0)


def of_any_length(lengths: list[list[int]]) -> list[list[int]]:
    """Records of random bytes, which do not shrink; how long each rank got every rank's."""
    from anyckpt.torch.collectives import Ranks

    ranks = Ranks()
    found = []
    for row in lengths:
        data = os.urandom(row[ranks.rank])
        arrived = ranks.gather(lambda data=data: data)
        assert arrived[ranks.rank] == data
        assert len({bytes(one) for one in ranks.gather(lambda arrived=arrived: b"".join(arrived))}) == 1
        found.append([len(one) for one in arrived])
    return found


def test_records_of_any_length_arrive_whole() -> None:
    lengths = [[0, 0], [0, 5], [2000, 2030], [2031, 2040], [2048, 1], [1, 5000], [40000, 3], [70000, 90000]]
    assert on_ranks(2, of_any_length, lengths) == [lengths, lengths]
