"""Damaged and hostile distributed checkpoints: each is one error that names what is wrong, and nothing hangs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path, write_plan

from anyckpt.containers.dcp import dcp_files, read_dcp
from anyckpt.engine.plan import Plan
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.formats import dcp
from anyckpt.formats.registry import look_at
from anyckpt.pickling import Global, Record, dumps, load
from anyckpt.storage.folder import LocalFolder
from anyckpt.tensor import from_array

NAME = "decoder.layers.w"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint with a tensor of three chunks, one of a single chunk, and an object."""
    tensors = {
        NAME: from_array(np.arange(24, dtype=np.float32).reshape(3, 2, 4)),
        "bias": from_array(np.arange(5, dtype=np.int64)),
    }
    return write_plan(Plan("dcp", tuple(dcp_files(tensors, {"epoch": 1}, megatron=True))), tmp_path / "c")


def edit(folder: Path, change: Callable[[Record], Any]) -> None:
    """Change the index; what ``change`` returns replaces it."""
    path = folder / ".metadata"
    index = load(path.read_bytes(), name="index")
    replaced = change(index)
    path.unlink()
    path.write_bytes(dumps(index if replaced is None else replaced, protocol=4))


def tensor_entry(index: Record, name: str = NAME) -> dict[str, Any]:
    fields: dict[str, Any] = index.state["state_dict_metadata"][name].state
    return fields


def place(index: Record, name: str = NAME, number: int = 0) -> dict[str, Any]:
    """Fields of the place of one chunk."""
    found = [value.state for key, value in index.state["storage_data"].items() if key.state["fqn"] == name]
    fields: dict[str, Any] = found[number]
    return fields


def key(index: Record, name: str = NAME, number: int = 0) -> dict[str, Any]:
    found = [item.state for item in index.state["storage_data"] if item.state["fqn"] == name]
    fields: dict[str, Any] = found[number]
    return fields


def size(*numbers: Any) -> tuple[Any, ...]:
    return tuple(numbers)


def set_in(fields: dict[str, Any], **values: Any) -> None:
    fields.update(values)


def drop(container: Any, item: Any) -> None:
    """Take an item out, giving nothing."""
    container.pop(item)


def first_key(index: Record) -> Any:
    return next(iter(index.state["storage_data"]))


CHANGES: dict[str, tuple[Callable[[Record], Any], str]] = {
    "offset past the end": (
        lambda m: set_in(place(m), offset=10**9),
        "__0_0.*outside its file",
    ),
    "length past the end": (lambda m: set_in(place(m, number=2), length=10**9), "outside its file"),
    "length zero": (lambda m: set_in(place(m), length=0), "outside its file"),
    "length negative": (lambda m: set_in(place(m), length=-1), "out of range"),
    "offset negative": (lambda m: set_in(place(m), offset=-1), "out of range"),
    "offset overflowing": (lambda m: set_in(place(m), offset=(1 << 63) - 1), "out of range"),
    "offset not a number": (lambda m: set_in(place(m), offset="0"), "out of range"),
    "length shorter than the chunk": (lambda m: set_in(place(m), length=20), "shorter than its chunks"),
    "file missing": (
        lambda m: set_in(place(m), relative_path="__9_0.distcp"),
        "__9_0.distcp.*needs cannot be opened",
    ),
    "file is a directory": (lambda m: set_in(place(m), relative_path="."), "index needs"),
    "path not a string": (lambda m: set_in(place(m), relative_path=5), "names no file"),
    "transformed": (lambda m: set_in(place(m), transform_descriptors=["zstd"]), "DCP extension.*zstd"),
    "object past the end": (lambda m: set_in(place(m, "epoch"), offset=10**9), "outside its file"),
    "no place for a chunk": (
        lambda m: drop(m.state["storage_data"], first_key(m)),
        "where an object",
    ),
    "place of another offset": (lambda m: set_in(key(m), offset=size(7, 0, 0)), "where the chunk at"),
    "place listed twice": (lambda m: set_in(key(m, number=1), offset=size(0, 0, 0)), "listed twice"),
    "no storage data": (lambda m: set_in(m.state, storage_data=None), "where its items lie"),
    "storage data of strings": (lambda m: set_in(m.state, storage_data={"a": "b"}), "place of an item"),
    "item without a name": (lambda m: set_in(key(m), fqn=None), "no name"),
    "chunk missing": (lambda m: drop(tensor_entry(m)["chunks"], -1), "pieces are missing"),
    "chunk twice": (lambda m: tensor_entry(m)["chunks"].append(tensor_entry(m)["chunks"][0]), "pieces overlap"),
    "chunk outside": (lambda m: set_in(tensor_entry(m), size=size(2, 2, 4)), "outside the tensor"),
    "tensor larger than its chunks": (lambda m: set_in(tensor_entry(m), size=size(4, 2, 4)), "pieces are missing"),
    "negative shape": (lambda m: set_in(tensor_entry(m), size=size(-3, 2, 4)), "axes are out of range"),
    "overflowing shape": (lambda m: set_in(tensor_entry(m), size=size(1 << 62, 2, 4)), "axes are out of range"),
    "shape of strings": (lambda m: set_in(tensor_entry(m), size=size("3", 2, 4)), "axes are out of range"),
    "shape not a tuple": (lambda m: set_in(tensor_entry(m), size=3), "not a list of numbers"),
    "fewer axes": (lambda m: set_in(tensor_entry(m), size=size(3, 8)), "another number of axes"),
    "negative chunk": (
        lambda m: set_in(tensor_entry(m)["chunks"][0].state, sizes=size(-1, 2, 4)),
        "sizes are out",
    ),
    "chunk of uneven axes": (lambda m: set_in(tensor_entry(m)["chunks"][0].state, sizes=size(1, 2)), "as many offsets"),
    "chunk without state": (lambda m: setattr(tensor_entry(m)["chunks"][0], "state", None), "no offsets"),
    "chunks not a list": (lambda m: set_in(tensor_entry(m), chunks=None), "no list of chunks"),
    "unknown dtype": (
        lambda m: setattr(tensor_entry(m)["properties"], "state", (Global("torch", "float3"), None)),
        "element type.*torch.float3",
    ),
    "dtype not torch's": (
        lambda m: setattr(tensor_entry(m)["properties"], "state", (Global("os", "float32"), None)),
        "element type.*os.float32",
    ),
    "no properties": (lambda m: set_in(tensor_entry(m), properties=None), "element type"),
    "entry not understood": (lambda m: set_in(m.state["state_dict_metadata"], x=5), "not understood"),
    "no entries": (lambda m: set_in(m.state, state_dict_metadata=[]), "not the index"),
    "another object": (lambda m: {"a": 1}, "not the index.*found dict"),
    "another class": (lambda m: Record(Global("os", "system"), ("true",)), "not the index.*found os.system"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_lying_index(good: Path, case: str) -> None:
    change, message = CHANGES[case]
    edit(good, change)
    with pytest.raises(FormatError, match=message) as problem:
        read_dcp(LocalFolder(good))
    assert str(good) in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b", "", "..", "a\0b", "..\\b", "a/../b"])
def test_paths_that_lead_out(good: Path, path: str) -> None:
    edit(good, lambda index: set_in(place(index), relative_path=path))
    with pytest.raises(UnsafeError, match="not inside the checkpoint"):
        read_dcp(LocalFolder(good))


def test_a_chunk_of_another_type_in_the_archive(good: Path) -> None:
    edit(good, lambda index: setattr(tensor_entry(index)["properties"], "state", (Global("torch", "int32"), None)))
    tensor = read_dcp(LocalFolder(good)).tensors[NAME]
    with pytest.raises(FormatError, match=rf"__0_0.distcp.*{NAME}.*expected int32.*found float32"):
        tensor.numpy()


def test_an_object_where_a_tensor_is_announced(good: Path) -> None:
    def swap(index: Record) -> None:
        target = place(index, "bias")
        target.update({**place(index, "epoch"), "length": target["length"]})

    edit(good, swap)
    tensor = read_dcp(LocalFolder(good)).tensors["bias"]
    with pytest.raises(FormatError, match=r"bias|archive"):
        tensor.numpy()


def test_every_truncation_of_the_index(good: Path, tmp_path: Path) -> None:
    whole = (good / ".metadata").read_bytes()
    shard = (good / "__0_0.distcp").read_bytes()
    for length in range(0, len(whole), 7):
        cut = tmp_path / f"cut{length}"
        cut.mkdir()
        (cut / ".metadata").write_bytes(whole[:length])
        (cut / "__0_0.distcp").write_bytes(shard)
        with pytest.raises(FormatError, match=r"\.metadata"):
            read_dcp(LocalFolder(cut))


def test_any_changed_byte_of_the_index_is_survived(good: Path, tmp_path: Path) -> None:
    """Whatever a flipped byte makes of the index, nothing but our own errors comes out."""
    whole = (good / ".metadata").read_bytes()
    generator = np.random.default_rng(0)
    shutil.copy(good / "__0_0.distcp", tmp_path)
    refused = 0
    for number, position in enumerate(generator.integers(0, len(whole), 400).tolist()):
        damaged = bytearray(whole)
        damaged[position] ^= int(generator.integers(1, 256))
        (tmp_path / ".metadata").unlink(missing_ok=True)
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        (folder / ".metadata").write_bytes(damaged)
        (folder / "__0_0.distcp").symlink_to(tmp_path / "__0_0.distcp")
        try:
            for tensor in read_dcp(LocalFolder(folder)).tensors.values():
                tensor.numpy()
        except FormatError:
            refused += 1
    assert refused > 100


def test_truncated_shard(good: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(good / ".metadata", cut)
    (cut / "__0_0.distcp").write_bytes((good / "__0_0.distcp").read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"__0_0.distcp.*'bias'.*outside its file"):
        read_dcp(LocalFolder(cut))


def test_missing_shard(good: Path) -> None:
    (good / "__0_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"__0_0.distcp.*a file that the index needs cannot be opened"):
        read_dcp(LocalFolder(good))


def test_unfinished_save(good: Path) -> None:
    (good / ".metadata").unlink()
    assert dcp.FORMAT.detect(look_at(good))
    with pytest.raises(FormatError, match=r"the save was not finished.*wait for"):
        dcp.FORMAT.read(look_at(good))


def test_empty_index(good: Path) -> None:
    (good / ".metadata").write_bytes(b"")
    with pytest.raises(FormatError, match=r"\.metadata: is empty"):
        read_dcp(LocalFolder(good))


def test_stale_shards_are_told(good: Path) -> None:
    (good / "__7_0.distcp").write_bytes(b"old")
    contents = read_dcp(LocalFolder(good))
    assert contents.files == ("__0_0.distcp",)
    assert any("__7_0.distcp" in warning for warning in contents.warnings)


def test_items_of_no_tensor_are_told(good: Path) -> None:
    edit(good, lambda index: drop(index.state["state_dict_metadata"], "bias"))
    assert any("1 items of no tensor" in warning for warning in read_dcp(LocalFolder(good)).warnings)


def test_a_short_tuple_of_properties_is_enough(good: Path) -> None:
    """MindSpeed's fork pickles three of the five properties."""
    for state in [(Global("torch", "float32"), False, False), {"dtype": Global("torch", "float32")}]:
        edit(good, lambda index, state=state: setattr(tensor_entry(index)["properties"], "state", state))  # type: ignore[misc]
        assert read_dcp(LocalFolder(good)).tensors[NAME].dtype.name == "float32"


def test_older_class_paths(good: Path) -> None:
    """torch 1.12 kept the classes in another package, and indices had no version and no planner data."""
    data = (good / ".metadata").read_bytes()
    index = load(data, name="index")
    for field in ("version", "storage_meta"):
        del index.state[field]
    older = load(dumps(index, protocol=2), name="older")

    def rename(record: Any) -> None:
        if isinstance(record, Record):
            if isinstance(record.type, Global):
                record.type = Global(
                    record.type.module.replace("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint"),
                    record.type.name,
                )
            rename(record.state)
        elif isinstance(record, dict):
            for name, value in record.items():
                rename(name)
                rename(value)
        elif isinstance(record, (list, tuple)):
            for value in record:
                rename(value)

    rename(older)
    (good / ".metadata").unlink()
    (good / ".metadata").write_bytes(dumps(older, protocol=2))
    contents = read_dcp(LocalFolder(good))
    assert contents.version is None
    assert contents.tensors[NAME].numpy().tolist() == np.arange(24).reshape(3, 2, 4).tolist()


FLATTENINGS: dict[str, Any] = {
    "another number of elements": (3, 2, 5),
    "fragments that do not divide": (4, 6),
    "more axes": (3, 2, 2, 2),
    "strings": ("3", 8),
    "not a tuple": 24,
    "more fragments than chunks": (24, 1),
}


@pytest.mark.parametrize("case", FLATTENINGS)
def test_lying_flattened_shapes(good: Path, case: str) -> None:
    def change(index: Record) -> None:
        index.state["mcore_data"] = {NAME: {"nd_reformulated_orig_global_shape": FLATTENINGS[case]}}

    edit(good, change)
    with pytest.raises(FormatError, match=NAME):
        read_dcp(LocalFolder(good))


def test_a_bomb_of_fragments_is_refused_at_once(tmp_path: Path) -> None:
    """One chunk that claims to hold a hundred million fragments of one element."""
    tensors = {"x": from_array(np.zeros((1000, 1), dtype=np.uint8))}
    write_plan(Plan("dcp", tuple(dcp_files(tensors, {}))), tmp_path / "c")

    def change(index: Record) -> None:
        index.state["mcore_data"] = {"x": {"nd_reformulated_orig_global_shape": (1000,)}}

    edit(tmp_path / "c", change)
    with pytest.raises(FormatError, match="not a flattening"):
        read_dcp(LocalFolder(tmp_path / "c"))


def test_an_index_per_rank(tmp_path: Path) -> None:
    """``save(use_collectives=False)``: each rank indexes its own items, replicas among them."""
    shared = from_array(np.arange(4, dtype=np.float32))
    for rank in range(2):
        rows = from_array(np.full((2, 3), rank, dtype=np.float32))
        write_plan(Plan("dcp", tuple(dcp_files({"w": rows, "norm": shared}, {"epoch": 1}))), tmp_path / f"{rank}")
        index = load((tmp_path / f"{rank}" / ".metadata").read_bytes(), name="index")
        chunk = tensor_entry(index, "w")["chunks"][0].state
        tensor_entry(index, "w")["size"] = (4, 3)
        chunk["offsets"] = key(index, "w")["offset"] = (2 * rank, 0)
        for name in ("w", "norm", "epoch"):
            place(index, name)["relative_path"] = f"__{rank}_0.distcp"
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"__{rank}.metadata").write_bytes(dumps(index, protocol=4))
        shutil.copy(tmp_path / f"{rank}" / "__0_0.distcp", tmp_path / "c" / f"__{rank}_0.distcp")
    assert dcp.FORMAT.detect(look_at(tmp_path / "c"))
    contents = read_dcp(LocalFolder(tmp_path / "c"))
    assert contents.tensors["w"].numpy().tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert contents.tensors["norm"].numpy().tolist() == [0, 1, 2, 3]
    assert contents.objects["epoch"] == 1 and list(contents.objects) == ["epoch"]


def test_ranks_that_disagree(tmp_path: Path) -> None:
    for rank in range(2):
        tensors = {"w": from_array(np.zeros(3 + rank, dtype=np.float32))}
        write_plan(Plan("dcp", tuple(dcp_files(tensors, {}))), tmp_path / f"{rank}")
        (tmp_path / "c").mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"{rank}" / ".metadata", tmp_path / "c" / f"__{rank}.metadata")
    with pytest.raises(FormatError, match="__1.metadata.*'w'.*ranks disagree"):
        read_dcp(LocalFolder(tmp_path / "c"))


def test_a_folder_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_bytes(b"x")
    (tmp_path / "d").write_bytes(b"yy")
    folder = LocalFolder(tmp_path)
    assert folder.names() == ["a/b/c.txt", "d"]
    assert folder.open("a/b/c.txt").read_all() == b"x"
    with pytest.raises(FormatError, match="cannot be listed"):
        LocalFolder(tmp_path / "none").names()
    with pytest.raises(FormatError, match="cannot be opened"):
        folder.open("e")


def test_fixture_index_with_every_class_is_read_without_torch() -> None:
    """The cached plans of Megatron-Core are dropped while reading, whatever classes they are of."""
    for case in ("torchdist_v012_w4_flat", "torchdist_v015_w2_flat", "gpt_dense_tp2pp2"):
        assert read_dcp(LocalFolder(fixture_path(f"mcore/{case}/ckpt"))).tensors
