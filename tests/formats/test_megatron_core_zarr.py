"""Megatron-Core's zarr backend: what Megatron-Core 0.12.3 wrote, what we write, and damaged arrays."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path, sha256_of, write_plan

from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.containers.torch_file import read_torch
from anyckpt.containers.zarr_array import open_array, read_metadata
from anyckpt.dtypes import BY_ZARR, dtype
from anyckpt.errors import AnyckptError, FormatError, UsageError
from anyckpt.formats import megatron_core_zarr, registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core_zarr import writer
from anyckpt.pickling import Record
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import Constant, LazyTensor, from_array

CASE = "mcore/zarr_v012_w2_flat"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return shutil.copytree(fixture_path(f"{CASE}/ckpt"), tmp_path / "ckpt")


def written(checkpoint: Checkpoint, path: Path) -> Path:
    assert megatron_core_zarr.FORMAT.plan is not None
    return write_plan(megatron_core_zarr.FORMAT.plan(checkpoint, WriteOptions()), path)


def check(checkpoint: Checkpoint) -> None:
    expected = expected_of(CASE)
    assert checkpoint.format == "megatron-core-zarr"
    assert_tensors_equal_expected(checkpoint.tensors, expected["tensors"])
    assert checkpoint.objects["iteration"] == 123 and checkpoint.training.step == 123
    assert checkpoint.objects["rng_state/shard_1_2"] == {"rank": 1, "v": [1, 2.5, "x", None]}
    assert checkpoint.objects["shared_obj/shard_0_1"].numpy().tolist() == [0, 1, 2]
    assert checkpoint.state_prefixes == ("optimizer.",) and checkpoint.training.has_optimizer
    assert checkpoint.ignored.keys() == {"mod._extra_state"}
    assert checkpoint.warnings == [] and checkpoint.artifacts == {}


def test_fixture() -> None:
    check(registry.read(fixture_path(f"{CASE}/ckpt")))


def test_chunks_are_counted() -> None:
    details = registry.read(fixture_path(f"{CASE}/ckpt")).details
    assert details["backend"] == "zarr"
    assert details["chunks"]["layers.w"] == 4 and details["chunks"]["u8"] == 1
    assert details["shard_files"]["half.weight"] == ("half.weight/0.0", "half.weight/0.1")


def test_opening_reads_no_chunk(good: Path) -> None:
    """A chunk that cannot be read is noticed when its elements are asked for, not before."""
    opened = registry.read(good)
    shutil.rmtree(good / "layers.w")
    assert sha256_of(opened.tensors["u8"]) == expected_of(CASE)["tensors"]["u8"]["sha256"]
    with pytest.raises(FormatError, match=r"layers\.w"):
        opened.tensors["layers.w"].numpy()


def test_a_training_root_leads_to_its_newest_iteration(good: Path) -> None:
    (good.parent / "latest_checkpointed_iteration.txt").write_text("10")
    good.rename(good.parent / "iter_0000010")
    check(registry.read(good.parent))


def test_written_again(tmp_path: Path) -> None:
    source = registry.read(fixture_path(f"{CASE}/ckpt"))
    path = written(source, tmp_path / "ckpt")
    again = registry.read(path)
    assert_tensors_equal_expected(again.tensors, expected_of(CASE)["tensors"])
    assert again.objects["rng_state/shard_1_2"] == source.objects["rng_state/shard_1_2"]
    original = fixture_path(f"{CASE}/ckpt")
    assert (path / "metadata.json").read_bytes() == (original / "metadata.json").read_bytes()
    for key in expected_of(CASE)["tensors"]:
        ours, theirs = (json.loads((root / key / ".zarray").read_text()) for root in (path, original))
        assert {**ours, "chunks": None} == {**theirs, "chunks": None}
    for one_chunk in ("u8", "i64", "optimizer.state.exp_avg.layers", "flag"):
        names = {file.name for file in (original / one_chunk).iterdir()}
        assert names == {file.name for file in (path / one_chunk).iterdir()}
        for name in names:
            assert (path / one_chunk / name).read_bytes() == (original / one_chunk / name).read_bytes()
    rng = read_torch(LocalFile(path / "rng_state" / "shard_0_2.pt"))
    assert rng.root == {"rank": 0, "v": [1, 2.5, "x", None]} and rng.folder == "shard_0_2"


def model(**tensors: LazyTensor) -> Checkpoint:
    return Checkpoint("memory", "torch", dict(tensors))


def test_stacked_layers_have_a_chunk_each_and_the_states_that_models_ask_for(tmp_path: Path) -> None:
    name = "decoder.layers.mlp.linear_fc1.weight"
    tensor = from_array(np.arange(24, dtype=np.float32).reshape(3, 4, 2))
    tokenizer = Tokenizer("huggingface", {"tokenizer.json": MemorySource(b"{}", "tokenizer.json")})
    source = replace(model(**{name: tensor}), tokenizer=tokenizer, config={"num_layers": 3})
    path = written(replace(source, config_kind="megatron-args"), tmp_path / "m")
    assert sorted(file.name for file in (path / name).iterdir()) == [".zarray", "0.0.0", "1.0.0", "2.0.0"]
    states = sorted(file.name for file in (path / "decoder.layers.mlp.linear_fc1._extra_state").iterdir())
    assert states == ["shard_0_3.pt", "shard_1_3.pt", "shard_2_3.pt"]
    again = registry.read(path)
    assert np.array_equal(again.tensors[name].numpy(), tensor.numpy())
    assert again.config["num_layers"] == 3 and isinstance(again.objects["args"], Record)
    assert again.tokenizer is not None and again.tokenizer.files["tokenizer.json"].read_all() == b"{}"


def test_edge_chunks_are_padded_to_a_whole_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 24)
    array = np.arange(35, dtype=np.float32).reshape(7, 5)
    path = written(model(w=from_array(array)), tmp_path / "m")
    values = json.loads((path / "w" / ".zarray").read_text())
    assert values["chunks"] == [1, 5]
    path = written(model(w=from_array(array.reshape(5, 7).T[:7, :5].copy())), tmp_path / "n")
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 60)
    path = written(model(w=from_array(array)), tmp_path / "o")
    assert json.loads((path / "w" / ".zarray").read_text())["chunks"] == [3, 5]
    assert {file.stat().st_size for file in (path / "w").glob("*.*") if file.name != ".zarray"} == {60}
    assert np.array_equal(registry.read(path).tensors["w"].numpy(), array)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    name=st.sampled_from(sorted(BY_ZARR)),
    limit=st.integers(1, 64),
    key=st.sampled_from(["w", "decoder.layers.w", "decoder.layers.mlp.experts.experts.w"]),
)
def test_any_shape_type_and_chunk_size(tmp_path: Path, shape: list[int], name: str, limit: int, key: str) -> None:
    kind = BY_ZARR[name]
    raw = np.arange(int(np.prod(shape)) * kind.itemsize, dtype=np.uint32).astype(np.uint8)
    if kind.kind == "boolean":
        raw %= 2
    tensor = from_array(raw.view(kind.numpy).reshape(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_CHUNK_BYTES", limit)
        path = tmp_path / "m"
        shutil.rmtree(path, ignore_errors=True)
        again = registry.read(written(model(**{key: tensor}), path)).tensors[key]
    assert (again.shape, again.dtype) == (tensor.shape, tensor.dtype)
    assert sha256_of(again) == sha256_of(tensor)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w", Constant(dtype("float8_e4m3fn"), (2,)), "no such element type.*float8_e4m3fn"),
        ("a/b", Constant(dtype("float32"), (2,)), "directory"),
        ("..", Constant(dtype("float32"), (2,)), "directory"),
        ("w.sync", Constant(dtype("float32"), (2,)), "directory"),
        ("w" * 300, Constant(dtype("float32"), (2,)), "directory"),
    ],
)
def test_what_cannot_be_written(name: str, tensor: LazyTensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        written(model(**{name: tensor}), tmp_path / "m")


def test_object_and_tensor_of_one_name(tmp_path: Path) -> None:
    source = replace(model(w=Constant(dtype("float32"), (2,))), objects={"w/shard_0_1": 1})
    with pytest.raises(UsageError, match="share a directory"):
        written(source, tmp_path / "m")


@pytest.mark.parametrize("form", ["tar", "directory"])
def test_inside_a_nemo_archive(form: str, tmp_path: Path) -> None:
    """The default of NeMo 1 until 2024."""
    root = tmp_path / "unpacked"
    shutil.copytree(fixture_path(f"{CASE}/ckpt"), root / "model_weights")
    (root / "model_config.yaml").write_text("target: some.Model\n")
    path = root
    if form == "tar":
        path = tmp_path / "m.nemo"
        with tarfile.open(path, "w:") as tar:
            tar.add(root, arcname=".")
    checkpoint = registry.read(path)
    assert checkpoint.format == "nemo" and checkpoint.details["backend"] == "zarr"
    assert_tensors_equal_expected(checkpoint.tensors, expected_of(CASE)["tensors"])


def with_metadata(key: str, **values: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = root / key / ".zarray"
        known = json.loads(file.read_text())
        known.update(values)
        file.write_text(json.dumps({name: value for name, value in known.items() if value is not ...}))

    return damage


def with_text(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(text) and None  # type: ignore[func-returns-value]


def without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing chunk": (without("layers.w/2.0.0"), "chunk is missing and .zarray has no fill value.*2.0.0.*3 of 4"),
    "truncated chunk": (with_text("layers.w/2.0.0", b"x" * 23), "truncated.*24 bytes.*23 bytes"),
    "longer chunk": (with_text("layers.w/2.0.0", b"x" * 25), "24 bytes.*25 bytes"),
    "chunk outside": (with_text("layers.w/4.0.0", b"x" * 24), "no chunk of its array.*4.0.0"),
    "chunk of too few axes": (with_text("layers.w/1.0", b"x" * 24), "no chunk of its array"),
    "chunk spelled otherwise": (with_text("layers.w/01.0.0", b"x" * 24), "no chunk of its array"),
    "other file": (with_text("layers.w/notes.txt", b"x"), "no chunk of its array.*notes.txt"),
    "empty .zarray": (with_text("layers.w/.zarray", b""), "is not valid JSON"),
    "no JSON": (with_text("layers.w/.zarray", b"{"), "is not valid JSON"),
    "deep JSON": (with_text("layers.w/.zarray", b"[" * 100_000), "is not valid JSON"),
    "no UTF-8": (with_text("layers.w/.zarray", b"\xff\xfe{}"), "is not valid JSON"),
    "list": (with_text("layers.w/.zarray", b"[]"), "not a JSON object"),
    "huge .zarray": (with_text("layers.w/.zarray", b" " * (2 << 20)), "zarray"),
    "zarr 3": (with_metadata("layers.w", zarr_format=3), "zarr_format is not.*expected 2.*found 3"),
    "blosc": (
        with_metadata("layers.w", compressor={"id": "blosc", "cname": "lz4"}),
        "compressor.*compressed zarr arrays are not read.*blosc.*zarr library",
    ),
    "filters": (with_metadata("layers.w", filters=[{"id": "delta"}]), "filters"),
    "Fortran": (with_metadata("layers.w", order="F"), "order"),
    "big endian": (with_metadata("layers.w", dtype=">f4"), "dtype.*bfloat16.*>f4"),
    "unfinished bfloat16": (with_metadata("layers.w", dtype="<V2"), "dtype.*<V2"),
    "structured": (with_metadata("layers.w", dtype=[["a", "<f4"]]), "dtype"),
    "no dtype": (with_metadata("layers.w", dtype=...), "dtype"),
    "no shape": (with_metadata("layers.w", shape=...), "shape"),
    "negative": (with_metadata("layers.w", shape=[-1, 3, 4]), "shape"),
    "text": (with_metadata("layers.w", shape="434"), "shape"),
    "boolean": (with_metadata("layers.w", shape=[True, 3, 4]), "shape"),
    "float": (with_metadata("layers.w", shape=[4.0, 3, 4]), "shape"),
    "zero chunk": (with_metadata("layers.w", chunks=[0, 3, 4]), "chunks"),
    "fewer axes": (with_metadata("layers.w", chunks=[3, 4]), "chunks"),
    "vast": (with_metadata("layers.w", shape=[1 << 40, 1 << 40, 4]), "shape.*possible"),
    "vast grid": (with_metadata("layers.w", shape=[1 << 50, 3, 4]), "chunk is missing.*4 of"),
    "vast grid with fill": (
        with_metadata("layers.w", shape=[1 << 50, 3, 4], fill_value=0), "lacks too many chunks"
    ),
    "many axes": (with_metadata("layers.w", shape=[1] * 40, chunks=[1] * 40), "shape"),
    "fill text": (with_metadata("layers.w", fill_value="x"), "fill_value"),
    "fill of another type": (with_metadata("i32", fill_value="NaN"), "fill_value"),
    "fill out of range": (with_metadata("i32", fill_value=1 << 40), "fill_value"),
    "separator": (with_metadata("layers.w", dimension_separator="-"), "dimension_separator"),
    "common state": (with_text("common.pt", b"x"), "common.pt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(case: str, good: Path) -> None:
    damage, message = BAD[case]
    damage(good)
    with pytest.raises(FormatError, match=f"(?s){message}") as problem:
        registry.read(good)
    assert str(good) in str(problem.value)


def test_no_arrays(tmp_path: Path) -> None:
    shutil.copy(fixture_path(f"{CASE}/ckpt/metadata.json"), tmp_path)
    with pytest.raises(FormatError, match="no zarr arrays"):
        registry.read(tmp_path)


def test_damaged_object_is_noticed_when_read(good: Path) -> None:
    (good / "rng_state" / "shard_0_2.pt").write_bytes(b"x")
    objects = registry.read(good).objects
    with pytest.raises(FormatError, match="rng_state"):
        objects["rng_state/shard_0_2"]


@pytest.mark.parametrize(
    ("fill", "expected"), [(0, 0.0), (1.5, 1.5), ("NaN", np.nan), ("-Infinity", -np.inf), (True, 1.0)]
)
def test_missing_chunks_are_filled_where_a_value_is_given(fill: Any, expected: float, good: Path) -> None:
    with_metadata("layers.w", fill_value=fill)(good)
    whole = registry.read(good).tensors["layers.w"].numpy()
    (good / "layers.w" / "2.0.0").unlink()
    found = registry.read(good).tensors["layers.w"].numpy()
    assert np.array_equal(found[[0, 1, 3]], whole[[0, 1, 3]])
    assert np.array_equal(found[2].astype(np.float32), np.full((3, 4), expected, np.float32), equal_nan=True)
    for chunk in (good / "layers.w").glob("*.0.0"):
        chunk.unlink()
    found = registry.read(good).tensors["layers.w"].numpy()
    assert np.array_equal(found.astype(np.float32), np.full((4, 3, 4), expected, np.float32), equal_nan=True)


def test_separator_slash() -> None:
    text = {"zarr_format": 2, "shape": [3], "chunks": [2], "dtype": "<f4", "compressor": None, "filters": None,
            "order": "C", "fill_value": None, "dimension_separator": "/"}  # fmt: skip
    metadata = read_metadata(MemorySource(json.dumps(text).encode(), ".zarray"), "w")
    data = np.arange(4, dtype=np.float32)
    files = {"0": MemorySource(data[:2]), "1": MemorySource(data[2:])}
    assert open_array("w", metadata, files, "w").numpy().tolist() == [0, 1, 2]


def test_only_our_errors_escape(good: Path) -> None:
    file = good / "layers.w" / ".zarray"
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        try:
            registry.read(good).tensors["layers.w"].numpy()
        except AnyckptError:
            continue
