"""Distributed checkpoints: what real savers wrote, and the layout of what we write."""

from __future__ import annotations

import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import (
    FIXTURES,
    assert_tensors_equal_expected,
    expected_of,
    file_bytes,
    fixture_path,
    sha256_of,
    write_plan,
)

from anyckpt.checkpoint import TrainingState
from anyckpt.containers.dcp import DcpContents, dcp_files, items, read_dcp
from anyckpt.containers.dcp.chunks import cut, stacked_axes
from anyckpt.containers.dcp.coverage import check_exact_cover, is_grid
from anyckpt.dtypes import BY_NAME
from anyckpt.engine.plan import Plan
from anyckpt.errors import AnyckptError, FormatError
from anyckpt.formats import dcp
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import look_at
from anyckpt.indexing import check_cover
from anyckpt.pickling.torch_objects import namespace
from anyckpt.storage.folder import LocalFolder
from anyckpt.storage.read_count import bytes_read
from anyckpt.tensor import Constant, LazyTensor, from_array

CASES = sorted(path.name for path in (FIXTURES / "mcore").iterdir() if not path.name.startswith("zarr_"))


def opened(path: Path) -> DcpContents:
    return read_dcp(LocalFolder(path))


def sample() -> dict[str, LazyTensor]:
    """Tensors of many types and shapes, with values that tell elements apart."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "decoder.layers.mlp.linear_fc1.weight": generator.standard_normal((3, 8, 5)).astype(np.float32),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": generator.integers(0, 99, (2, 3, 4, 5)),
        "embedding.weight": generator.integers(0, 1 << 16, (40, 7), dtype=np.uint16),
        "flag": np.array([True, False, True]),
        "scalar": np.array(3.5, dtype=np.float64),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    tensors: dict[str, LazyTensor] = {name: from_array(array) for name, array in arrays.items()}
    raw = from_array(generator.integers(0, 255, (6, 6), dtype=np.uint8))
    tensors["fp8"] = type(raw)(raw.source, 0, BY_NAME["float8_e4m3fn"], (6, 6))
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_stored_tensors_equal_what_was_saved(case: str) -> None:
    contents = opened(fixture_path(f"mcore/{case}/ckpt"))
    assert_tensors_equal_expected(contents.tensors, expected_of(f"mcore/{case}")["tensors"])
    assert contents.warnings == []


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dcp_")])
def test_sharded_objects_have_the_types_that_were_saved(case: str) -> None:
    contents = opened(fixture_path(f"mcore/{case}/ckpt"))
    expected = expected_of(f"mcore/{case}")["objects"]
    assert set(expected) == {name for name in contents.objects if not name.startswith("common_state")}
    for name, facts in expected.items():
        value = contents.objects[name]
        if isinstance(facts, dict):
            assert type(value).__name__ == facts["type"]
        elif facts.startswith("tensor"):
            assert isinstance(value, LazyTensor)
        else:
            assert repr(value) == facts


def test_plain_objects_and_key_paths() -> None:
    contents = opened(fixture_path("mcore/dcp_fsdp_w2/ckpt"))
    assert contents.objects["epoch"] == 3
    assert contents.objects["name"] == "run"
    assert contents.objects["optim.param_groups.0.betas"] == (0.9, 0.95)
    assert contents.paths is not None
    assert contents.paths["optim.param_groups.0.lr"] == ("optim", "param_groups", 0, "lr")
    assert contents.paths["model.layers.0.weight"] == ("model", "layers.0.weight")
    assert contents.version == "1.0.0"


def test_pieces_and_their_files_are_told() -> None:
    contents = opened(fixture_path("mcore/dcp_fsdp_w2/ckpt"))
    assert contents.chunks["model.layers.0.weight"] == 2
    assert contents.shard_files["model.layers.0.weight"] == ("__0_0.distcp", "__1_0.distcp")
    assert contents.chunks["model.layers.0.bias"] == 1, "the rank without rows stored an empty piece"
    assert contents.shard_files["model.layers.0.bias"] == ("__0_0.distcp",)


def test_flattened_tensors_are_restored() -> None:
    contents = opened(fixture_path("mcore/torchdist_v012_w4_flat/ckpt"))
    assert contents.flattened and contents.has_mcore_data
    assert contents.metadata_class == "torch.distributed.checkpoint.metadata.Metadata"
    newer = opened(fixture_path("mcore/torchdist_v015_w2_flat/ckpt"))
    assert newer.metadata_class == "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"


def test_slices_of_joined_and_flattened_tensors() -> None:
    for case in ("gpt_dense_tp2pp2", "torchdist_v012_w4_flat", "gpt_opt_dp_reshardable_dp2"):
        for tensor in opened(fixture_path(f"mcore/{case}/ckpt")).tensors.values():
            if tensor.ndim == 0 or tensor.shape[0] < 2:
                continue
            whole = tensor.numpy()
            assert tensor[1:, ...].numpy().tobytes() == whole[1:].tobytes()
            assert tensor[1].numpy().tobytes() == whole[1].tobytes()


def test_opening_reads_no_shard(tmp_path: Path) -> None:
    copy = tmp_path / "ckpt"
    shutil.copytree(fixture_path("mcore/gpt_dense_tp2pp2/ckpt"), copy)
    for shard in copy.glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    before = bytes_read()
    contents = opened(copy)
    assert bytes_read() - before == (copy / ".metadata").stat().st_size
    assert len(contents.tensors) == 9
    with pytest.raises(FormatError, match="decoder.final_layernorm.weight"):
        contents.tensors["decoder.final_layernorm.weight"].numpy()
    with pytest.raises(FormatError, match="rng_state"):
        contents.objects["rng_state/shard_0.0_2.2"]


def test_a_shard_of_another_dtype_or_shape_is_refused(tmp_path: Path) -> None:
    """The archives of two tensors of equal length change places; only what is in them tells."""
    one = np.arange(64, dtype=np.int32).reshape(8, 8)
    plan = Plan("dcp", tuple(dcp_files({"a": from_array(one), "b": from_array(one.reshape(4, 16))}, {})))
    write_plan(plan, tmp_path / "c")
    shard = tmp_path / "c" / "__0_0.distcp"
    data = shard.read_bytes()
    half = len(data) // 2
    assert data[half : half + 4] == b"PK\x03\x04"
    shard.write_bytes(data[half:] + data[:half])
    tensors = opened(tmp_path / "c").tensors
    with pytest.raises(FormatError, match=r"'a'.*not the chunk.*int32 \(8, 8\).*int32 \(4, 16\)"):
        tensors["a"].numpy()


def test_like_archives_are_told_apart_by_their_beginning(tmp_path: Path) -> None:
    """After the first chunk only the beginning of an archive is compared: a damaged one must not slip through."""
    array = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
    files = dcp_files({"decoder.layers.weight": from_array(array)}, {}, megatron=True)
    write_plan(Plan("dcp", tuple(files)), tmp_path / "c")
    shard = tmp_path / "c" / "__0_0.distcp"
    assert opened(tmp_path / "c").tensors["decoder.layers.weight"].numpy().tobytes() == array.tobytes()
    data = shard.read_bytes()
    half = len(data) // 2
    assert data[half : half + 4] == b"PK\x03\x04" and data[half:].count(b"K\x01K\x06\x86") == 2
    second = data[half:].replace(b"K\x01K\x06\x86", b"K\x02K\x03\x86", 1)
    damaged = data[:half] + second.replace(b"K\x06K\x01\x86", b"K\x03K\x01\x86", 1)
    (tmp_path / "d").mkdir()
    shutil.copy(tmp_path / "c" / ".metadata", tmp_path / "d")
    (tmp_path / "d" / "__0_0.distcp").write_bytes(damaged)
    with pytest.raises(FormatError, match=r"not the chunk.*\(1, 6\).*\(2, 3\)"):
        opened(tmp_path / "d").tensors["decoder.layers.weight"].numpy()


def test_objects_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(Plan("dcp", tuple(dcp_files({}, {"one": 1, "two": {"x": [2]}, "rng/shard_0_1": [3]}))), tmp_path / "c")
    read: list[str] = []
    archive = items.Unread.archive
    monkeypatch.setattr(items.Unread, "archive", lambda self: read.append(self._name) or archive(self))
    objects = opened(tmp_path / "c").objects
    assert list(objects) == ["one", "two", "rng/shard_0_1"] and "one" in objects and not read
    assert objects.without({"two"}).copy().unread().keys() == {"one", "rng/shard_0_1"} and not read
    assert objects["two"] == {"x": [2]} and objects["two"] == {"x": [2]} and read == ["two"]
    assert {**objects} == dict(objects) == {"one": 1, "two": {"x": [2]}, "rng/shard_0_1": 3}
    assert objects.get("none", 5) == 5 and sorted(map(str, objects.values())) == ["1", "3", "{'x': [2]}"]


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_written_is_read_back(tmp_path: Path, megatron: bool, ranks: int) -> None:
    tensors, objects = sample(), {"epoch/shard_0_1": 3, "rng/shard_0.1_1.2": {"a": [1, 2.5, None]}}
    write_plan(
        Plan("dcp", tuple(dcp_files(tensors, objects, megatron=megatron, ranks=ranks, chunk_bytes=100))), tmp_path / "c"
    )
    contents = opened(tmp_path / "c")
    assert {name: (t.dtype, t.shape) for name, t in contents.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert {name: sha256_of(t) for name, t in contents.tensors.items()} == {n: sha256_of(t) for n, t in tensors.items()}
    assert dict(contents.objects) == objects
    assert len(contents.files) == ranks
    assert contents.warnings == []


def test_shards_are_archives_without_gaps() -> None:
    files = {file.path: file_bytes(file) for file in dcp_files(sample(), {"epoch": 3}, ranks=2, prefix="weights")}
    assert set(files) == {"weights/.metadata", "weights/__0_0.distcp", "weights/__1_0.distcp"}
    for path, data in files.items():
        items = 0
        while path.endswith(".distcp") and data:
            end = data.index(b"PK\x05\x06") + 22
            with zipfile.ZipFile(BytesIO(data[:end])) as archive:
                assert archive.testzip() is None
                assert archive.namelist()[0] == "archive/data.pkl"
            data, items = data[end:], items + 1
        assert items or path.endswith(".metadata")


def test_a_layer_is_a_chunk_and_big_chunks_begin_at_pages(tmp_path: Path) -> None:
    big = Constant(BY_NAME["bfloat16"], (3, 1024, 1024))
    files = dcp_files({"decoder.layers.mlp.linear_fc1.weight": big}, {}, megatron=True)
    assert [file.stage for file in files] == [0, 1]
    position, places, pieces = 0, [], []
    for part in files[0].parts:
        if hasattr(part, "tensor"):
            places.append(position % 4096)
            pieces.append((part.name, part.piece, part.tensor.shape))
        position += part.nbytes
    assert places == [0, 0, 0]
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert pieces == [(name, f"chunk at [{layer}, 0, 0]", (1, 1024, 1024)) for layer in range(3)]


def test_repeated_elements_are_written_out(tmp_path: Path) -> None:
    row = np.arange(4, dtype=np.float32)
    expanded = from_array(row)
    expanded = type(expanded)(expanded.source, 0, expanded.dtype, (5, 4), (0, 1))
    plain = from_array(np.arange(20, dtype=np.float32).reshape(5, 4))
    tensors = {"expanded": expanded, "plain": plain, "again": expanded}
    write_plan(Plan("dcp", tuple(dcp_files(tensors, {}))), tmp_path / "c")
    found = opened(tmp_path / "c").tensors
    assert found["expanded"].numpy().tolist() == found["again"].numpy().tolist() == [row.tolist()] * 5
    assert found["plain"].numpy().tolist() == plain.numpy().tolist()


def test_bytes_are_spread_over_ranks_and_files() -> None:
    tensors = {f"t{n}": Constant(BY_NAME["float32"], (256, 1024)) for n in range(16)}
    by_rank = [file for file in dcp_files(tensors, {}, ranks=4) if file.stage == 0]
    assert [file.path for file in by_rank] == [f"__{rank}_0.distcp" for rank in range(4)]
    assert max(file.nbytes for file in by_rank) < 1.1 * min(file.nbytes for file in by_rank)
    by_size = [file for file in dcp_files(tensors, {}, file_bytes=5 << 20) if file.stage == 0]
    assert [file.path for file in by_size] == [f"__0_{n}.distcp" for n in range(4)]


def test_format_keeps_names_nesting_and_objects(tmp_path: Path) -> None:
    source = dcp.FORMAT.read(look_at(fixture_path("mcore/dcp_hsdp_tp_w4/ckpt")))
    assert source.training == TrainingState(epoch=3, has_optimizer=True)
    assert (source.model_prefix, source.state_prefixes) == ("model.", ("optim.",))
    assert "layers.0.weight" in source.weights() and "lst.0" not in source.weights()
    assert dcp.FORMAT.plan is not None
    write_plan(dcp.FORMAT.plan(source, WriteOptions()), tmp_path / "c")
    again = dcp.FORMAT.read(look_at(tmp_path / "c"))
    assert_tensors_equal_expected(again.tensors, expected_of("mcore/dcp_hsdp_tp_w4")["tensors"])
    assert again.key_paths == source.key_paths
    assert dict(again.objects) == dict(source.objects)


def test_megatron_arguments_in_a_plain_checkpoint(tmp_path: Path) -> None:
    """As Megatron FSDP saves them."""
    objects = {"args": namespace({"num_layers": 2}), "iteration": 12}
    write_plan(Plan("dcp", tuple(dcp_files(sample(), objects))), tmp_path / "c")
    checkpoint = dcp.FORMAT.read(look_at(tmp_path / "c"))
    assert (checkpoint.config, checkpoint.config_kind) == ({"num_layers": 2}, "megatron-args")
    assert checkpoint.training == TrainingState(step=12) and checkpoint.model_prefix == ""


def test_detect() -> None:
    assert dcp.FORMAT.detect(look_at(fixture_path("mcore/dcp_fsdp_w2/ckpt")))
    assert not dcp.FORMAT.detect(look_at(fixture_path("mcore/gpt_dense_tp2pp2/ckpt")))
    assert not dcp.FORMAT.detect(look_at(fixture_path("mcore/dcp_fsdp_w2")))
    assert not dcp.FORMAT.detect(look_at(fixture_path("mcore/dcp_fsdp_w2/ckpt/.metadata")))


def test_stacked_axes_are_those_of_names_without_numbers() -> None:
    assert stacked_axes("decoder.layers.mlp.linear_fc1.weight") == 1
    assert stacked_axes("optimizer.state.exp_avg.decoder.layers.mlp.experts.experts.linear_fc2.weight") == 2
    assert stacked_axes("decoder.layers.1.mlp.experts.experts.linear_fc2.weight") == 1
    assert stacked_axes("decoder.layers.11.mlp.linear_fc1.weight") == 0
    assert stacked_axes("module.embedding.word_embeddings.weight") == 0


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@settings(deadline=None)
@given(shape=shapes, stacked=st.integers(0, 2), limit=st.integers(1, 400))
def test_cuts_cover_and_are_bounded(shape: tuple[int, ...], stacked: int, limit: int) -> None:
    seen = np.zeros(shape, dtype=int)
    for start, size in cut(shape, 4, stacked=stacked, limit=limit):
        seen[tuple(slice(b, b + n) for b, n in zip(start, size, strict=True))] += 1
        row = size[-1] if size else 1
        assert 4 * int(np.prod(size)) <= limit or np.prod(size) == 1 or int(np.prod(size)) == row == 1
        assert all(n == 1 for n in size[: min(stacked, len(shape) - 1)])
    assert (seen == 1).all()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A grid over a shape, sometimes with one box changed."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    cells = list(np.ndindex(*(len(e) - 1 for e in edges)))
    starts = np.array([[edges[a][i] for a, i in enumerate(cell)] for cell in cells], dtype=np.int64)
    stops = np.array([[edges[a][i + 1] for a, i in enumerate(cell)] for cell in cells], dtype=np.int64)
    if draw(st.booleans()):
        row, axis = draw(st.integers(0, len(cells) - 1)), draw(st.integers(0, len(shape) - 1))
        side = draw(st.sampled_from([starts, stops]))
        side[row, axis] = max(0, side[row, axis] + draw(st.integers(-1, 1)))
    return shape, starts, stops


@settings(deadline=None)
@given(case=boxes())
def test_the_fast_check_agrees_with_counting(
    case: tuple[tuple[int, ...], np.ndarray[Any, Any], np.ndarray[Any, Any]],
) -> None:
    shape, starts, stops = case
    seen = np.zeros([n + 2 for n in shape], dtype=int)
    for start, stop in zip(starts, stops, strict=True):
        seen[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] += 1
    inside = tuple(slice(0, n) for n in shape)
    exact = bool((seen[inside] == 1).all()) and seen.sum() == seen[inside].sum()
    assert not is_grid(shape, starts, stops) or exact
    for check in (check_exact_cover, check_cover):
        if exact:
            check(shape, starts, stops)
        else:
            with pytest.raises(AnyckptError):
                check(shape, starts, stops)
