"""What torch and Megatron-Core make of the ``.nemo`` files that we write."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.support import expected_of, fixture_path  # noqa: E402

from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.engine.execute import execute  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.nemo import FORMAT  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402

pytestmark = pytest.mark.peer


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def written(checkpoint: Checkpoint, folder: Path, sharded: bool = False) -> Path:
    assert FORMAT.plan is not None
    execute(FORMAT.plan(checkpoint, WriteOptions(sharded=sharded)), str(folder / "m.nemo"))
    return folder / "m.nemo"


def extracted(path: Path, folder: Path) -> Path:
    """As NeMo's connector does: everything, with tarfile, plain mode."""
    with tarfile.open(path, "r:") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ["nemo1_basic_v2_5_3", "nemo1_basic_v3_0_0", "asr_ctc_conformer_v3_0_0"])
def test_torch_loads_flat_weights(name: str, tmp_path: Path) -> None:
    source = next(fixture_path(f"nemo/{name}").glob("*.nemo"))
    folder = extracted(written(FORMAT.read(look_at(source)), tmp_path), tmp_path / "x")
    expected = expected_of(f"nemo/{name}")
    state = torch.load(folder / "model_weights.ckpt", weights_only=True, mmap=True)
    assert {key: (digest(value), list(value.shape)) for key, value in state.items()} == {
        key: (facts["sha256"], facts["shape"]) for key, facts in expected["tensors"].items()
    }
    for names in expected.get("tied", []):
        assert len({state[tied].data_ptr() for tied in names}) == 1


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["nemo1_dist_tp1", "nemo1_dist_tp2"])
def test_megatron_core_loads_sharded_weights(name: str, tmp_path: Path, process_group: None) -> None:
    dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    source = next(fixture_path(f"nemo/{name}").glob("*.nemo"))
    folder = extracted(written(FORMAT.read(look_at(source)), tmp_path, sharded=True), tmp_path / "x")
    weights = str(folder / "model_weights")
    assert dist_checkpointing.load_common_state_dict(weights) == {}
    expected = expected_of(f"nemo/{name}")
    loaded = dist_checkpointing.load_plain_tensors(weights)
    assert {key: (digest(value), list(value.shape)) for key, value in loaded.items()} == {
        key: (facts["sha256"], facts["shape"]) for key, facts in expected["global_tensors_by_sharded_key"].items()
    }
    stored = set(dist_checkpointing.serialization.load_sharded_metadata(weights))
    assert {key for key in stored if "_extra_state" in key} >= {
        key for key, kind in expected["dcp_metadata"].items() if kind == "BytesStorageMetadata"
    }
