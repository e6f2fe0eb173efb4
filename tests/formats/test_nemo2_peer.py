"""What torch and Megatron-Core make of the NeMo 2 directories that we write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.support import expected_of, fixture_path  # noqa: E402

from anyckpt.engine.execute import execute  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.nemo2 import FORMAT  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402

pytestmark = pytest.mark.peer


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["nemo2_llama_spm", "nemo2_llama_hftok"])
@pytest.mark.parametrize("foreign", [False, True])
def test_megatron_core_loads_the_weights(name: str, foreign: bool, tmp_path: Path, process_group: None) -> None:
    dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    checkpoint = FORMAT.read(look_at(fixture_path(f"nemo/{name}/model")))
    if foreign:
        checkpoint = replace(checkpoint, format="hf", details={}, objects={})
    assert FORMAT.plan is not None
    execute(FORMAT.plan(checkpoint, WriteOptions()), str(tmp_path / "m"))
    weights, expected = str(tmp_path / "m/weights"), expected_of(f"nemo/{name}")
    assert dist_checkpointing.check_is_distributed_checkpoint(weights)
    common = dist_checkpointing.load_common_state_dict(weights)
    assert set(common) == set(expected["common_pt"])
    assert {key: repr(common[key]) for key in ("epoch", "global_step", "state_dict", "optimizer_states")} == {
        key: expected["common_pt"][key] for key in ("epoch", "global_step", "state_dict", "optimizer_states")
    }
    original = torch.load(fixture_path(f"nemo/{name}/model/weights/common.pt"), weights_only=True)
    assert common == original
    loaded = dist_checkpointing.load_plain_tensors(weights)
    tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    assert {key: (digest(value), list(value.shape)) for key, value in tensors.items()} == {
        key: (facts["sha256"], facts["shape"]) for key, facts in expected["tensors"].items()
    }
    stored = set(dist_checkpointing.serialization.load_sharded_metadata(weights))
    assert stored >= set(expected["bytes_entries"])
