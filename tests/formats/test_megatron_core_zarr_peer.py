"""What the zarr library and torch make of the zarr checkpoints that we write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
zarr = pytest.importorskip("zarr")

from tests.support import expected_of, fixture_path  # noqa: E402

from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.dtypes import BY_ZARR  # noqa: E402
from anyckpt.engine.execute import execute  # noqa: E402
from anyckpt.formats import registry  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.megatron_core_zarr import FORMAT, writer  # noqa: E402
from anyckpt.tensor import from_array  # noqa: E402

pytestmark = pytest.mark.peer


def written(checkpoint: Checkpoint, path: Path) -> Path:
    assert FORMAT.plan is not None
    execute(FORMAT.plan(checkpoint, WriteOptions()), str(path))
    return path


@pytest.mark.parametrize("limit", [16, 1 << 20])
@pytest.mark.parametrize("name", sorted(set(BY_ZARR) - {"bfloat16"}))
def test_zarr_reads_every_type(name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHUNK_BYTES", limit)
    kind = BY_ZARR[name]
    array = np.random.default_rng(0).integers(0, 2, (7, 3, 5)).astype(kind.numpy)
    path = written(Checkpoint("x", "torch", {"w": from_array(array)}), tmp_path / "m")
    found = zarr.open_array(str(path / "w"), mode="r", zarr_format=2)
    assert found.shape == array.shape and found.dtype == kind.numpy
    assert np.array_equal(found[...], array)


def test_zarr_reads_the_bytes_of_bfloat16_as_megatron_core_wrote_them(tmp_path: Path) -> None:
    """zarr has no bfloat16: Megatron-Core creates the array as ``<V2`` and renames the type."""
    path = written(registry.read(fixture_path("mcore/zarr_v012_w2_flat/ckpt")), tmp_path / "m")
    for name, facts in expected_of("mcore/zarr_v012_w2_flat")["tensors"].items():
        if facts["dtype"] == "bfloat16":
            both = []
            for root in (path, fixture_path("mcore/zarr_v012_w2_flat/ckpt")):
                copy = tmp_path / root.name / name
                copy.mkdir(parents=True, exist_ok=True)
                for file in (root / name).iterdir():
                    (copy / file.name).write_bytes(file.read_bytes())
                values = json.loads((copy / ".zarray").read_text())
                assert values["dtype"] == "bfloat16"
                (copy / ".zarray").write_text(json.dumps({**values, "dtype": "<u2"}))
                both.append(zarr.open_array(str(copy), mode="r", zarr_format=2)[...])
            assert both[0].shape == tuple(facts["shape"]) and np.array_equal(both[0], both[1])


def test_torch_loads_objects_and_common_state(tmp_path: Path) -> None:
    path = written(registry.read(fixture_path("mcore/zarr_v012_w2_flat/ckpt")), tmp_path / "m")
    assert torch.load(path / "rng_state" / "shard_1_2.pt", weights_only=True) == {"rank": 1, "v": [1, 2.5, "x", None]}
    assert torch.load(path / "shared_obj" / "shard_0_1.pt", weights_only=True).tolist() == [0, 1, 2]
    common = torch.load(path / "common.pt", weights_only=True)
    assert common["iteration"] == 123 and common["args"]["name"] == "tést"


def test_we_read_what_zarr_writes(tmp_path: Path) -> None:
    """Odd edges, an array with a fill value and absent chunks, without compression."""
    root = tmp_path / "m"
    path = written(Checkpoint("x", "torch", {"w": from_array(np.zeros(1, np.float32))}), root)
    array = np.random.default_rng(1).standard_normal((5, 7)).astype(np.float32)
    made = zarr.create_array(
        str(path / "v"), shape=(5, 7), chunks=(2, 3), dtype="<f4", compressors=None, filters=None, zarr_format=2,
        fill_value=2.0,
    )  # fmt: skip
    made[:2] = array[:2]
    expected = np.full((5, 7), 2.0, np.float32)
    expected[:2] = array[:2]
    assert np.array_equal(registry.read(root).tensors["v"].numpy(), expected)
