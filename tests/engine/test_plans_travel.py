"""A plan can be sent to another process, which writes the same bytes: it is plain data, whatever it is made of."""

from __future__ import annotations

import gzip
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import file_bytes, fixture_path

import anyckpt
from anyckpt.engine import execute
from anyckpt.engine.plan import OutputFile, Plan, SourceData, TensorData
from anyckpt.formats import registry
from anyckpt.storage.location import place_of
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import from_array

SOURCES = (
    "families/llama/hf",
    "families/mixtral/hf",
    "fsdp/fsdp_2",
    "legacy/megatron_gpt_tp2_pp2",
    "legacy/megatron_distopt_tp2_dp2",
    "legacy/averaging/m--epoch=0.ckpt",
    "mcore/gpt_moe_opt_chained_ep2/ckpt",
    "mcore/zarr_v012_w2_flat/ckpt",
    "mcore/torchdist_plain_w4/ckpt",
    "nemo/nemo1_basic_v2_5_3/toy.nemo",
    "nemo/nemo2_llama_spm/model",
    "nemo/ptl_ckpt_ema_nemo3_0_0/toy--val_loss=1.0282-step=6-consumed_samples=12.0-last-EMA.ckpt",
    "quant/nvfp4_b/hf",
    "adapters/lora_halves_tp2",
)


class _PlannedError(Exception):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan | None]:
    """The plan that an operation would carry out; None if it refuses."""

    def stop(plan: Plan, *_: Any) -> Any:
        raise _PlannedError(plan)

    monkeypatch.setattr(execute, "fingerprint", stop)

    def call(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Plan | None:
        try:
            operation(*arguments, **options)
        except _PlannedError as found:
            return found.plan
        except anyckpt.AnyckptError:
            return None
        raise AssertionError("nothing was planned")

    return call


def assert_travels(plan: Plan) -> None:
    again = pickle.loads(pickle.dumps(plan))
    assert again.nbytes == plan.nbytes and again.links == plan.links
    for there, here in zip(again.files, plan.files, strict=True):
        assert (there.path, there.stage) == (here.path, here.stage)
        assert file_bytes(there) == file_bytes(here)


@pytest.mark.parametrize("source", SOURCES)
def test_conversions_to_every_format(source: str, planned: Callable[..., Plan | None], tmp_path: Path) -> None:
    path = fixture_path(source)
    plans = 0
    for name, target in registry.built_in().items():
        if target.plan is None:
            continue
        for options in ({"dtype": "bf16"}, {"optimizer": "keep"}):
            plan = planned(anyckpt.convert, path, tmp_path / "never", to=name, **options)
            if plan is not None:
                assert_travels(plan)
                plans += 1
    assert plans


def test_other_operations(planned: Callable[..., Plan | None], tmp_path: Path) -> None:
    llama, adapter = fixture_path("families/llama/hf"), fixture_path("families/lora_llama/hf_adapter")
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    grown = anyckpt.LayoutRequest(vocab_size=160, new_rows="mean")
    ranks = fixture_path("legacy/megatron_gpt_tp2_pp2")
    archive = fixture_path("nemo/nemo1_basic_v2_5_3/toy.nemo")
    for found in (
        planned(anyckpt.average, [llama, llama], tmp_path / "never", to="hf"),
        planned(anyckpt.reshard, ranks, tmp_path / "never", layout=layout),
        planned(anyckpt.unpack, archive, tmp_path / "never"),
        planned(anyckpt.edit, archive, set={"new": 1}, output=tmp_path / "never.nemo"),
        planned(anyckpt.merge_lora, llama, adapter, tmp_path / "never", to="hf"),
        planned(anyckpt.merge, [adapter], tmp_path / "never", base=llama, method="ties", density=0.3, rescale=True),
        planned(anyckpt.merge, [adapter], tmp_path / "never", base=llama, method="dare_ties", density=0.3),
        planned(anyckpt.merge, [llama, llama], tmp_path / "never", method="slerp"),
        planned(anyckpt.convert, llama, tmp_path / "never", to="nemo", layout=grown, drop_layers="0", rename="x=y"),
    ):
        assert found is not None
        assert_travels(found)


def test_members_of_compressed_archives_and_arrays(tmp_path: Path) -> None:
    inner = tmp_path / "inner.bin"
    inner.write_bytes(np.random.default_rng(1).integers(0, 9, 100_000, dtype=np.uint8).tobytes())
    packed = tmp_path / "packed.tar.gz"
    with gzip.open(packed, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(inner, "inner.bin")
    member = place_of(f"{packed}::inner.bin").open(f"{packed}::inner.bin")
    live = np.arange(5000, dtype=np.float32)
    parts = (
        SourceData(member),
        SourceData(MemorySource(b"fixed")),
        TensorData("w", from_array(live).cast("bfloat16")),
    )
    assert_travels(Plan("sample", (OutputFile("", parts),)))
