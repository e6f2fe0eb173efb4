"""Arguments of the table that real libraries take."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")
pytest.importorskip("lightning")
pytestmark = pytest.mark.peer

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from tests.operations.test_migrate_config import KEYS, nested  # noqa: E402

from anyckpt.config.migration import migrate  # noqa: E402

CLASSES = {
    "trainer": Trainer,
    "checkpoint": ModelCheckpoint,
    "early_stopping": EarlyStopping,
    "optimizer": OptimizerConfig,
    "ddp": DistributedDataParallelConfig,
}


def test_arguments_exist() -> None:
    found: dict[str, set[str]] = {}
    for item in migrate(nested(dict.fromkeys(KEYS, 1))).settings:
        for section, argument in item.arguments:
            found.setdefault(section, set()).add(argument)
    assert CLASSES.keys() <= found.keys()
    for section, made in CLASSES.items():
        assert found[section] <= set(inspect.signature(made).parameters), section
