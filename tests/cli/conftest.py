from __future__ import annotations

import pytest
from tests.cli.runner import Runner


@pytest.fixture
def anyckpt(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)
