"""Which of several processes this one is, by the variables of what started it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.engine.destination import Share
from anyckpt.engine.launchers import LAUNCHERS, Launcher, launched_share
from anyckpt.errors import UsageError


@given(st.sampled_from(LAUNCHERS), st.data())
def test_every_rank_of_every_launcher_has_a_share_of_its_own(one: Launcher, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(one.sizes))
    count = data.draw(st.integers(1, 5000))
    rank = data.draw(st.integers(0, count - 1))
    assert launched_share({one.rank: str(rank), size: str(count), "HOME": "/"}) == Share(rank + 1, count)


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(2, 4)),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            Share(4, 8),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, Share(3, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1"}, Share(1, 1)),
        ({"RANK": "5", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Share(2, 2)),
        ({"RANK": "", "WORLD_SIZE": "", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Share(2, 2)),
    ],
    ids=["torchrun in srun", "Open MPI in a job", "PMI of srun", "a shell in an allocation", "half", "empty"],
)
def test_the_innermost_launcher_says_it(environment: dict[str, str], share: Share) -> None:
    assert launched_share(environment) == share


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"SLURM_PROCID": "one", "SLURM_NTASKS": "2"},
    ],
)
def test_what_is_not_possible_is_said(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError) as error:
        launched_share(environment)
    for name, value in environment.items():
        assert f"{name}={value}" in str(error.value)
    assert "--share I/N" in str(error.value)


def test_without_a_launcher_nothing_is_assumed() -> None:
    with pytest.raises(UsageError, match="found none of them") as error:
        launched_share({"HOME": "/", "SLURM_JOB_ID": "12"})
    assert all(launcher.rank in str(error.value) for launcher in LAUNCHERS)
    with pytest.raises(UsageError, match="found WORLD_SIZE alone"):
        launched_share({"WORLD_SIZE": "2"})
