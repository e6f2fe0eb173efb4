"""That ranks of tests do what the other tests here rely on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks, outcomes

pytestmark = pytest.mark.peer


def own_number(add: int) -> int:
    import torch.distributed as dist

    assert dist.get_world_size() == 2
    return dist.get_rank() + add


def failing(how: str, begun: str) -> None:
    """Fail on rank 1, when rank 0 has begun: until then it waits for what rank 1 answers."""
    import torch.distributed as dist

    print("said before")
    if dist.get_rank() == 0:
        Path(begun).touch()
    else:
        while not os.path.exists(begun):
            time.sleep(0.01)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("broken on purpose")


def test_each_rank_runs_the_function() -> None:
    assert on_ranks(2, own_number, 5) == [5, 6]
    assert on_ranks(2, own_number, 7) == [7, 8]


def test_a_rank_that_raises_fails_the_test_with_its_traceback_and_output(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1: .*broken on purpose.*said before"):
        on_ranks(2, failing, "raised", str(tmp_path / "begun"))


def test_what_became_of_a_rank_that_was_killed_is_told(tmp_path: Path) -> None:
    found = outcomes(2, failing, "killed", str(tmp_path / "begun"), seconds=20)
    assert [one.status for one in found] == [0, -signal.SIGKILL]
