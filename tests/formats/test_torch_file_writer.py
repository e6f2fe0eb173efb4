"""The archives that the writer lays out, looked at without torch: by Python's zipfile and by our own reader."""

from __future__ import annotations

import io
import zipfile
import zlib
from bisect import bisect_right
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import file_bytes, fixture_path, sha256_of, write_plan

from anyckpt.checkpoint import Checkpoint, storage_key
from anyckpt.containers.torch_file import read_torch, shift_parts, tensor_zip_parts, zip_parts
from anyckpt.containers.torch_file.flatten import flatten, unflatten
from anyckpt.containers.torch_file.layout import Record, zip_layout
from anyckpt.dtypes import BY_NAME, dtype
from anyckpt.engine.plan import Computed, Literal, OutputFile, Part, TensorData
from anyckpt.errors import UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import look_at
from anyckpt.formats.torch import FORMAT
from anyckpt.pickling import torch_objects
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.storage.zip import read_zip
from anyckpt.tensor import Constant, LazyTensor, from_array


def bytes_of(parts: tuple[Part, ...]) -> bytes:
    return file_bytes(OutputFile("", parts))


def test_what_torch_wrote_comes_out_byte_for_byte() -> None:
    path = fixture_path("legacy/zoo_dtypes/zip.pt")
    original = path.read_bytes()
    root = read_torch(MemorySource(original, "zip.pt")).root
    made = bytes_of(zip_parts(root, archive_name="zip"))
    identity = original.index(b"serialization_id")
    assert made[:identity] == original[:identity]
    assert len(made) == len(original)
    directory = original.index(b"PK\x01\x02")
    assert sum(a != b for a, b in zip(made[directory:], original[directory:], strict=True)) <= 4  # the id's CRC-32


def test_python_reads_it_and_finds_the_checksums_right() -> None:
    root = {"a": from_array(np.arange(5.0)), "b": from_array(np.zeros((0, 3), np.float32)), "n": [1, "x", None]}
    with zipfile.ZipFile(io.BytesIO(bytes_of(zip_parts(root)))) as archive:
        assert archive.testzip() is None
        names = [info.filename for info in archive.infolist()]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert names == [
        f"archive/{name}"
        for name in (
            "data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0", "data/1", "version",
            ".data/serialization_id",
        )
    ]  # fmt: skip


@pytest.mark.parametrize("file_offset", [0, 1, 100, 4096, 123_457])
def test_large_contents_begin_on_a_page_of_the_file(file_offset: int) -> None:
    big = from_array(np.arange(1 << 18, dtype=np.int32))
    root = {"small": from_array(np.ones(3)), "big": big, "small too": from_array(np.ones(4))}
    data = bytes(file_offset) + bytes_of(zip_parts(root, file_offset=file_offset))
    contents = read_torch(MemorySource(data).slice(file_offset, len(data) - file_offset))
    records = {record.name: record for record in contents.records}
    assert "archive/.format_version" not in records
    starts = {name: record.source.locate()[1] + file_offset for name, record in records.items()}
    payload = big.numpy().tobytes()
    assert data.index(payload) % 4096 == 0
    for key in ("0", "2"):
        held = records[f"archive/data/{key}"]
        assert (held.source._begin() + file_offset) % 64 == 0  # type: ignore[attr-defined]
    assert len(starts) == 7
    assert all(record.check() for record in contents.records)


def test_small_archives_do_not_depend_on_where_they_are_put() -> None:
    tensor = from_array(np.arange(9.0))
    assert bytes_of(tensor_zip_parts("w", tensor, file_offset=777)) == bytes_of(tensor_zip_parts("w", tensor))


def test_alignment() -> None:
    data = bytes_of(zip_parts({"a": from_array(np.arange(7.0))}, alignment=512))
    assert data.index(np.arange(7.0).tobytes()) % 512 == 0
    with pytest.raises(UsageError, match="align"):
        zip_parts({}, alignment=65536)
    with pytest.raises(UsageError, match="align"):
        zip_parts({}, alignment=48)
    with pytest.raises(UsageError, match="root folder"):
        zip_parts({}, archive_name="a/b")


def test_parts_can_follow_others_in_one_file() -> None:
    first = tensor_zip_parts("a", from_array(np.arange(5.0)))
    offset = sum(part.nbytes for part in first)
    second = tensor_zip_parts("b", from_array(np.arange(300_000.0)), file_offset=offset)
    data = bytes_of((*first, *shift_parts(second, len(first))))
    whole = MemorySource(data)
    assert read_torch(whole.slice(0, offset)).root.numpy()[4] == 4
    contents = read_torch(whole.slice(offset, len(data) - offset))
    assert contents.root.numpy()[-1] == 299_999
    assert all(record.check() for record in contents.records)


def test_every_length_is_known_before_a_byte_is_read() -> None:
    class Unreadable(LazyTensor):
        def __init__(self) -> None:
            self.dtype, self.shape = dtype("bf16"), (7, 3)

        def read_box(self, start: Any, out: Any) -> None:
            raise AssertionError("read")

        def pieces(self) -> Any:
            return iter(())

    parts = zip_parts({"x": Unreadable()})
    assert [type(part) for part in parts] == [Literal, TensorData, Computed]
    assert parts[1].nbytes == 42


def test_tied_tensors_share_their_bytes_and_names_are_given() -> None:
    weight = from_array(np.arange(8.0))
    parts = zip_parts(
        {"model": {"embed": weight, "head": weight, "other": from_array(np.arange(8.0))}},
        tensor_name=lambda path: "/".join(map(str, path)),
    )
    assert [part.name for part in parts if isinstance(part, TensorData)] == ["model/embed", "model/other"]
    root = read_torch(MemorySource(bytes_of(parts))).root["model"]
    assert storage_key(root["embed"]) == storage_key(root["head"]) != storage_key(root["other"])


def test_expanded_tensors_stay_small() -> None:
    source = read_torch(MemorySource(bytes_of(zip_parts({"x": from_array(np.arange(6.0).reshape(1, 6))})))).root["x"]
    source.shape, source.strides = (1000, 6), (0, 1)
    data = bytes_of(zip_parts({"x": source}))
    assert len(data) < 3000
    again = read_torch(MemorySource(data)).root["x"]
    assert again.shape == (1000, 6)
    assert again[997].numpy().tolist() == [0, 1, 2, 3, 4, 5]


def test_tensors_of_several_parts_survive() -> None:
    path = fixture_path("legacy/zoo_kinds/zip.pt")
    root = read_torch(MemorySource(path.read_bytes())).root
    again = read_torch(MemorySource(bytes_of(zip_parts(root)))).root
    assert {name: type(value) for name, value in root.items()} == {name: type(value) for name, value in again.items()}
    before, after = flatten(root, "a").tensors, flatten(again, "b").tensors
    assert {name: sha256_of(tensor) for name, tensor in before.items()} == {
        name: sha256_of(tensor) for name, tensor in after.items()
    }
    assert (again["quint8"].scale, again["quint8"].zero_point) == (root["quint8"].scale, root["quint8"].zero_point)
    assert again["sparse_coo"].coalesced is True


# -- beyond 4 GiB -------------------------------------------------------------------------------------------------


class Holes(ByteSource):
    """A planned file whose tensors are zeros, without the zeros: nothing of 4 GiB is ever in memory or on disk."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.name, self.path = "big.pt", None
        self._pieces: list[tuple[int, bytes | None, int]] = []
        zeros: dict[int, int] = {}
        at = 0
        for index, part in enumerate(parts):
            if isinstance(part, TensorData):
                zeros[index] = part.nbytes
                self._pieces.append((at, None, part.nbytes))
            else:
                data = part.data if isinstance(part, Literal) else b""
                if isinstance(part, Computed):
                    data = part.build([crc_of_zeros(zeros[i]) for i in part.parts])
                assert len(data) == part.nbytes
                self._pieces.append((at, data, len(data)))
            at += part.nbytes
        self.size = at

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        first = bisect_right(self._pieces, offset, key=lambda piece: piece[0]) - 1
        for start, data, length in islice(self._pieces, first, None):
            low, high = max(start, offset), min(start + length, end)
            if start >= end:
                break
            if low < high:
                buffer[low - offset : high - offset] = (
                    bytes(high - low) if data is None else data[low - start : high - start]
                )


class AsFile(io.RawIOBase):
    """The same as a file object, for Python's zipfile."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self.at = source, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.source.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self.source.size - self.at)
        self.source.read_into(self.at, memoryview(buffer)[:length])
        self.at += length
        return length


def crc_of_zeros(nbytes: int) -> int:
    """Any number will do for gigabytes; the real one for what is read."""
    return 0x12345678 if nbytes > 1 << 20 else zlib.crc32(bytes(nbytes))


def test_records_and_offsets_beyond_4_gib() -> None:
    bf16 = BY_NAME["bfloat16"]
    root = {
        "before": Constant(bf16, (1000,)),
        "huge": Constant(bf16, (1 << 31, 1)),  # exactly 4 GiB
        "after": Constant(bf16, (77,)),
        "more": Constant(bf16, (3 << 31,)),
        "last": Constant(bf16, ()),
        "nothing": Constant(bf16, (0,)),
    }
    source = Holes(zip_parts(root))
    assert source.size > 16 << 30
    with zipfile.ZipFile(io.BufferedReader(AsFile(source))) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["archive/data/1"] == 4 << 30
        assert sizes["archive/data/3"] == 12 << 30
        assert archive.read("archive/data/2") == bytes(154)  # its checksum is checked too
        assert archive.read("archive/version") == b"3\n"
        wide = [info.filename for info in archive.infolist() if info.extra]
        assert len(wide) == 7  # two by size; all behind the first of these by offset
    contents = read_torch(source)
    assert contents.root["more"].shape == (3 << 31,)
    starts = {record.name: record.source._begin() for record in contents.records}  # type: ignore[attr-defined]
    assert starts["archive/data/1"] % 4096 == starts["archive/data/3"] % 4096 == 0
    assert starts["archive/data/2"] % 64 == 0
    descriptor = source.read(starts["archive/data/1"] + (4 << 30), 24)
    assert descriptor[:4] == b"PK\x07\x08"
    assert int.from_bytes(descriptor[8:16], "little") == 4 << 30
    assert source.read(starts["archive/data/2"] + 154, 4) == b"PK\x07\x08"
    assert source.read(starts["archive/data/2"] + 154 + 24, 4) == b"PK\x03\x04"  # a long descriptor, as torch's


def test_a_file_of_100_gb_opens_with_a_handful_of_small_reads() -> None:
    class Counting(Holes):
        reads = 0
        volume = 0

        def _read_into(self, offset: int, buffer: memoryview) -> None:
            Counting.reads += 1
            Counting.volume += len(buffer)
            super()._read_into(offset, buffer)

    source = Counting(zip_parts({f"layer.{i}": Constant(BY_NAME["float32"], (1 << 28,)) for i in range(100)}))
    assert source.size > 100 << 30
    contents = read_torch(source)
    assert len(contents.root) == 100
    assert Counting.reads < 15
    assert Counting.volume < 100_000
    assert contents.root["layer.99"][-1:].numpy() == 0


def test_more_than_65535_records() -> None:
    source = Holes(zip_layout([Record(f"archive/{i}", Literal(b"x"), 1) for i in range(66_000)], "archive", 0))
    records = read_zip(source)
    assert len(records) == 66_001
    assert records["archive/65999"].check()
    with zipfile.ZipFile(io.BufferedReader(AsFile(source))) as archive:
        assert len(archive.infolist()) == len(records)


# -- nesting ------------------------------------------------------------------------------------------------------


def test_names_that_meet_are_told_apart_and_nothing_is_lost() -> None:
    x, y, z = (from_array(np.full(2, float(i))) for i in range(3))
    root = {"a.b": x, "a": {"b": y, 0: z, "0": 7}, "c": [x, {"d": y}], "e": {"f": (1, 2)}, "g": {}}
    flat = flatten(root, "a.pt")
    assert flat.tensors == {"a.b": x, "a.b#2": y, "a.0#2": z, "c.0": x, "c.1.d": y}
    assert flat.objects == {"a.0": 7, "e": {"f": (1, 2)}, "g": {}}
    assert flat.renamed == ["a.b#2"]
    values = {**flat.tensors, **flat.objects}
    assert unflatten({name: values[name] for name in flat.paths}, flat.paths, flat.original_keys) == root


def test_tensors_are_planned_under_their_stored_names(tmp_path: Path) -> None:
    x, y = from_array(np.zeros(2)), from_array(np.ones(2))
    path = tmp_path / "a.pt"
    path.write_bytes(bytes_of(zip_parts({"a.b": x, "a": {"b": y, 0: x, "0": y}, "c": [y]})))
    checkpoint = FORMAT.read(look_at(path))
    plan = FORMAT.plan(checkpoint, WriteOptions())  # type: ignore[misc]
    assert [part.name for part in plan.tensors()] == ["a.b", "a.b#2"]
    assert list(checkpoint.tensors) == ["a.b", "a.b#2", "a.0#2", "a.0", "c.0"]


def test_a_bare_tensor_and_a_list() -> None:
    x = from_array(np.ones(2))
    flat = flatten(x, "a.pt")
    assert flat.tensors == {"tensor": x}
    assert unflatten(flat.tensors, flat.paths, {}) is x
    flat = flatten([x, 3], "a.pt")
    assert (flat.tensors, flat.objects) == ({"0": x}, {"1": 3})
    assert unflatten({"0": x, "1": 3}, flat.paths, {}) == [x, 3]
    assert flatten(7, "a.pt").objects == {"object": 7}


def test_a_torch_file_is_rewritten_with_its_nesting(tmp_path: Path) -> None:
    path = fixture_path("legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt")
    source = FORMAT.read(look_at(path))
    write_plan(FORMAT.plan(source, WriteOptions()), tmp_path / "a.pt")  # type: ignore[misc]
    again = FORMAT.read(look_at(tmp_path / "a.pt"))
    assert {name: sha256_of(tensor) for name, tensor in source.tensors.items()} == {
        name: sha256_of(tensor) for name, tensor in again.tensors.items()
    }
    assert again.objects == source.objects
    root = read_torch(MemorySource((tmp_path / "a.pt").read_bytes())).root
    assert list(root["optimizer_states"][0]["state"]) == [0, 2, 3, 1, 4, 5, 6]


def test_renamed_weights_become_a_flat_state_dict() -> None:
    x = from_array(np.ones(2))
    checkpoint = Checkpoint(
        "a",
        "torch",
        {"new.name": x},
        objects={"epoch": 3},
        key_paths={"old": ("old",), "epoch": ("epoch",)},
    )
    plan = FORMAT.plan(checkpoint, WriteOptions())  # type: ignore[misc]
    assert plan.ignored == {"epoch": "a state dict holds tensors only"}
    root = read_torch(MemorySource(file_bytes(plan.files[0]))).root
    assert list(root) == ["new.name"]
    assert root.type == torch_objects.ORDERED_DICT


def test_a_tensor_that_was_left_out_leaves_the_rest_in_place() -> None:
    path = fixture_path("legacy/zoo_kinds/zip.pt")
    source = FORMAT.read(look_at(path))
    del source.tensors["sparse_coo.indices"]
    del source.tensors["state_dict.bias"]
    root = read_torch(MemorySource(file_bytes(FORMAT.plan(source, WriteOptions()).files[0]))).root  # type: ignore[misc]
    assert "sparse_coo" not in root
    assert list(root["state_dict"]) == ["weight"]
    assert type(root["sparse_csr"]).__name__ == "SparseTensor"


def test_what_torch_refuses_is_said() -> None:
    checkpoint = Checkpoint(
        "a",
        "torch",
        {},
        objects={"args": torch_objects.namespace({"lr": 1.0}), "seed": 1},
        key_paths={"args": ("args",), "seed": ("seed",)},
        config={"hidden": 1},
    )
    notes = FORMAT.plan(checkpoint, WriteOptions()).notes  # type: ignore[misc]
    assert "argparse.Namespace" in notes[0]
    assert "configuration" in notes[1]
