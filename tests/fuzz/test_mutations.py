"""Checkpoints of every format, mutated in their structure: a result or an ``AnyckptError``, never anything else."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.fuzz.exercise import exercise
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import SEEDS, seed

EXAMPLES = 25
"""Of each format: seconds in all; ``tools/fuzz.py`` goes on for as long as one likes."""


class Drawn:
    """Choices that hypothesis makes, and can make smaller."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def number(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))


@pytest.mark.parametrize("name", SEEDS)
def test_the_seed_itself_is_read(name: str) -> None:
    assert exercise(seed(name)) >= 3


@pytest.mark.parametrize("name", SEEDS)
def test_a_mutated_checkpoint_is_read_or_refused(name: str) -> None:
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        exercise(mutated(seed(name), Drawn(data)), note)

    run()
