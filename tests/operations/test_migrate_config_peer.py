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

from anyckpt.config.migration import _table, migrate  # noqa: E402
from anyckpt.torch import Options, Retention, Saver  # noqa: E402

CLASSES = {
    "trainer": Trainer,
    "checkpoint": ModelCheckpoint,
    "early_stopping": EarlyStopping,
    "optimizer": OptimizerConfig,
    "ddp": DistributedDataParallelConfig,
}


def test_our_saver_takes_its_own() -> None:
    found: dict[str, dict[str, object]] = {"options": {}, "retention": {}, "saver": {}}
    values = {
        "model.dist_ckpt_format": "zarr",
        "model.dist_ckpt_torch_dist_multiproc": 3,
        "model.dist_ckpt_load_strictness": "log_all",
        "exp_manager.checkpoint_callback_params.mode": "max",
    }
    for item in migrate(nested({**dict.fromkeys(KEYS, 1), **values})).settings:
        for (section, argument), value in item.saver.items():
            found[section][argument] = value
    assert Options(**found["options"]).format == "megatron-core-zarr"
    assert Retention(**found["retention"]).mode == "max"
    assert set(found["saver"]) <= set(inspect.signature(Saver).parameters)


def test_arguments_exist() -> None:
    found: dict[str, set[str]] = {}
    for item in migrate(nested(dict.fromkeys(KEYS, 1))).settings:
        for section, argument in item.arguments:
            found.setdefault(section, set()).add(argument)
    assert CLASSES.keys() <= found.keys()
    for section, made in CLASSES.items():
        assert found[section] <= set(inspect.signature(made).parameters), section
    for section, words in _table()["takes"].items():
        assert set(words.split()) <= set(inspect.signature(CLASSES[section]).parameters), section
