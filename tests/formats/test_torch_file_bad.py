"""Damaged, lying and hostile torch files: a typed error that names the file, or inert data, and nothing else."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.formats.torch_archives import archive, small_file, storage, tensor
from tests.support import expected_of, file_bytes, fixture_path

import anyckpt
from anyckpt.checkpoint import storage_key
from anyckpt.containers.torch_file import read_torch
from anyckpt.containers.torch_file.byteorder import SwappedSource
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError, FormatError, UnsafeError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import look_at
from anyckpt.formats.torch import FORMAT
from anyckpt.pickling import Global, Record
from anyckpt.pickling import torch_objects as objects
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor

FILES = sorted(fixture_path("legacy/malicious").glob("*.pt"))

_WATCH = """
import json, sys, time
from anyckpt.checkpoint import storage_key
from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError
from anyckpt.formats import registry
registry.formats()
before = set(sys.modules)
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        checkpoint = registry.read(path)
        outcome = "opened"
        for tensor in checkpoint.tensors.values():
            for chunk in tensor.chunks():
                pass
        repr(checkpoint)
    except AnyckptError as error:
        outcome = f"{type(error).__name__}: {error}"
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    used = int(peak.split()[1]) / 1024
    new = sorted(m for m in set(sys.modules) - before)
    print(json.dumps([path, outcome, time.process_time() - start, used, new]))
"""


def test_no_hostile_file_executes_hangs_or_grows(tmp_path: Path) -> None:
    assert len(FILES) == len(expected_of("legacy/malicious")["files"])
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, *map(str, FILES)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(path) for path in FILES]
    for path, outcome, seconds, megabytes, imported in lines:
        assert seconds < 1, path
        assert megabytes < 200, path
        assert not [name for name in imported if not name.startswith(("anyckpt", "encodings", "_"))], (path, imported)
        if outcome != "opened":
            assert path in outcome, outcome
            assert "\n" not in outcome
    assert not list(tmp_path.iterdir())
    opened = {Path(path).stem for path, outcome, *_ in lines if outcome == "opened"}
    must_fail = {
        "binunicode_lie", "duplicate_names", "frame_lie", "huge_expand", "missing_record", "negative_shape",
        "not_a_checkpoint", "numel_lie", "offset_oob", "raw_pickle", "stride_oob", "traversal_names", "truncated",
        "unknown_opcode", "stack_underflow",
    }  # fmt: skip
    assert not opened & must_fail


def test_a_hostile_call_is_a_record() -> None:
    root = read_torch(LocalFile(fixture_path("legacy/malicious/reduce_eval_py3.pt"))).root
    assert isinstance(root, Record)
    assert root.path == "builtins.eval"


def read_bytes(data: bytes) -> Any:
    return read_torch(MemorySource(data, "a.pt"))


def exhaust(data: bytes) -> None:
    """Open, name and read everything."""
    contents = read_bytes(data)
    for leaf in flatten(contents.root, "a.pt").tensors.values():
        for _ in leaf.chunks():
            pass
    for record in contents.records:
        record.check()


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt"])
def test_truncated_anywhere(file: str) -> None:
    data = fixture_path(f"legacy/zoo_dtypes/{file}").read_bytes()
    exhaust(data)
    for length in [*range(0, 600, 7), *range(600, len(data), 41), *range(len(data) - 150, len(data))]:
        with pytest.raises(FormatError):
            exhaust(data[:length])


def test_a_truncated_tar(tmp_path: Path) -> None:
    data = fixture_path("legacy/zoo_legacy_tar/old.pt").read_bytes()
    last = data.rstrip(b"\0")
    for length in range(0, len(last) - 8, 97):
        with pytest.raises(FormatError):
            exhaust(data[:length])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 255), st.sampled_from(["zip", "stream", "tar"]))
def test_one_changed_byte_never_escapes_the_error_types(at: int, change: int, kind: str) -> None:
    source = {
        "zip": "zoo_kinds/zip.pt",
        "stream": "zoo_views/legacy.pt",
        "tar": "zoo_legacy_tar/old.pt",
    }[kind]
    data = bytearray(fixture_path(f"legacy/{source}").read_bytes())
    data[at % len(data)] ^= change
    try:
        exhaust(bytes(data))
    except AnyckptError as error:
        assert "\n" not in str(error)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        look_at(tmp_path / "no.pt")
    with pytest.raises(FormatError, match="is empty"):
        read_bytes(b"")
    with pytest.raises(FormatError, match="is not a torch file"):
        read_bytes(b"hello" * 200)
    with pytest.raises(FormatError, match="bare pickle"):
        read_bytes(pickle.dumps({"a": 1}, protocol=2))


def test_junk_before_an_archive_is_an_error_and_after_it_is_not() -> None:
    data = small_file()
    assert read_bytes(data + b"junk" * 100).root["epoch"] == 3
    with pytest.raises(FormatError):
        read_bytes(b"PK\x03\x04" + b"junk" * 25 + data)
    with pytest.raises(FormatError, match="is not a torch file"):
        read_bytes(b"junk" + data)


def test_records_of_one_name() -> None:
    data = archive({"w": tensor()}, {"data/X": b"1"})
    with pytest.raises(FormatError, match="two records of one name"):
        read_bytes(data.replace(b"archive/data/X", b"archive/data/0"))


def test_records_that_overlap_or_lie_outside() -> None:
    data = bytearray(archive({"w": tensor()}))
    entry = data.rindex(b"archive/data/0") - 46
    for header in (1, len(data) - 100, 0xFFFFFFF0):
        struct.pack_into("<I", data, entry + 42, header)
        with pytest.raises(FormatError):
            read_bytes(bytes(data)).root["w"].numpy()


def test_a_record_that_is_not_where_the_directory_says() -> None:
    data = small_file()
    damaged = data.replace(b"archive/data/0", b"archive/data/9", 1)
    opened = read_bytes(damaged)
    with pytest.raises(FormatError, match="not where the archive's directory says"):
        opened.root["a"].numpy()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_checkpoints_do_not_use(method: int) -> None:
    with pytest.raises(FormatError, match=f"found method {method}"):
        read_bytes(archive({"w": tensor()}, method=method))


def test_a_deflated_archive_is_read_and_its_lies_are_found() -> None:
    data = archive({"w": tensor()}, method=zipfile.ZIP_DEFLATED)
    assert read_bytes(data).root["w"].numpy().tolist()[1] == [4, 5, 6, 7]
    lying = bytearray(data)
    entry = lying.rindex(b"archive/data.pkl") - 46
    struct.pack_into("<I", lying, entry + 24, 1 << 31)
    with pytest.raises(UnsafeError, match="cannot hold"):
        read_bytes(bytes(lying))


def test_a_deflated_pickle_of_many_gigabytes_is_refused() -> None:
    bomb = b"\x80\x02" + b"]0" * (33 << 20) + b"N."
    with pytest.raises(UnsafeError, match="compressed pickle is too large"):
        read_bytes(archive(None, pickle=bomb, method=zipfile.ZIP_DEFLATED))


def test_an_encrypted_record() -> None:
    data = bytearray(archive({"w": tensor()}))
    entry = data.rindex(b"archive/data/0") - 46
    struct.pack_into("<H", data, entry + 8, 1)
    with pytest.raises(FormatError, match="encrypted"):
        read_bytes(bytes(data))


def test_a_checksum_that_differs_and_one_that_was_not_computed() -> None:
    data = bytearray(small_file())
    at = data.index(struct.pack("<4f", 0, 1, 2, 3))
    data[at] ^= 1
    contents = read_bytes(bytes(data))
    assert contents.root["a"].numpy()[0, 0] != 0  # reading does not check, as torch does not
    record = next(record for record in contents.records if record.name == "archive/data/0")
    with pytest.raises(FormatError, match="checksum differs"):
        record.check()
    crc = struct.pack("<I", zlib.crc32(struct.pack("<12f", *range(12))))
    for where in (data.index(crc), data.rindex(crc)):
        data[where : where + 4] = bytes(4)
    contents = read_bytes(bytes(data))
    record = next(record for record in contents.records if record.name == "archive/data/0")
    assert record.check() is False
    assert record.source.name not in [item.name for item in stored_checksums(contents)]
    assert len(list(stored_checksums(contents))) == len(contents.records) - 1


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/passwd", "a\\..\\..\\b"])
def test_names_that_climb_out(name: str) -> None:
    with pytest.raises(UnsafeError, match="climbs out"):
        read_bytes(
            archive({"w": tensor()}, {name: b"x"} if not name.startswith("/") else {}, folder="archive")
            if not name.startswith("/")
            else archive({}, folder="/etc")
        )


def test_torchscript_and_other_zips() -> None:
    assert read_bytes(archive({}, {"constants.pkl": b"\x80\x02)."})).generation == "torchscript"
    with pytest.raises(FormatError, match="constants/0"):
        constants = archive((tensor(),), folder="x")
        with zipfile.ZipFile(io.BytesIO(constants)) as file:
            read_bytes(archive({}, {"constants.pkl": file.read("x/data.pkl")}))
    with pytest.raises(FormatError, match="one record data.pkl"):
        read_bytes(archive({}).replace(b"data.pkl", b"date.pkl"))


def test_versions_and_byte_orders() -> None:
    for version in (b"0\n", b"11\n", b"x", b"-1", b"9" * 50, "٣".encode()):
        with pytest.raises(FormatError, match="unknown version"):
            read_bytes(archive({"w": tensor()}, {"version": version}))
    assert read_bytes(archive({"w": tensor()}, {"version": b"10"})).version == "10"
    with pytest.raises(FormatError, match="byte order"):
        read_bytes(archive({"w": tensor()}, {"byteorder": b"middle"}))


BAD_VIEWS = {
    "negative size": tensor(shape=(-3, 4)),
    "negative stride": tensor(stride=(-4, 1)),
    "negative offset": tensor(offset=-1),
    "offset past the end": tensor(offset=1),
    "stride past the end": tensor(stride=(5, 1)),
    "size past the end": tensor(shape=(4, 4)),
    "overflowing size": tensor(shape=(1 << 62, 1 << 62), stride=(0, 0)),
    "overflowing stride": tensor(stride=(1 << 70, 1)),
    "huge offset": tensor(offset=10**5000),
    "endless repetition": tensor(shape=(1 << 40, 12), stride=(0, 1)),
    "sizes and strides differ in number": tensor(stride=(1,)),
    "too many axes": tensor(shape=(1,) * 65, stride=(1,) * 65),
    "a size that is no number": tensor(shape=(3.0, 4)),
    "a size that is true": tensor(shape=(True, 4)),
    "sizes that are no row": tensor(shape="34"),
    "no storage": Record(Global("torch._utils", "_rebuild_tensor_v2"), (None, 0, (1,), (1,), False, None)),
    "too few arguments": Record(Global("torch._utils", "_rebuild_tensor_v2"), (storage(), 0)),
    "too many arguments": Record(Global("torch._utils", "_rebuild_tensor_v2"), (storage(), *range(9))),
    "storage of another size": tensor(of=storage(count=13)),
    "storage of another type": tensor(of=storage(kind="float64")),
    "storage that is missing": tensor(of=storage(key="1")),
    "storage with a negative size": tensor(of=storage(count=-1)),
    "storage with an endless size": tensor(of=storage(count=10**5000)),
    "unknown dtype": Record(
        Global("torch._utils", "_rebuild_tensor_v3"), (storage(), 0, (1,), (1,), False, None, Global("torch", "load"))
    ),
    "sparse without tensors": Record(
        Global("torch._utils", "_rebuild_sparse_tensor"),
        (Record(Global("torch.serialization", "_get_layout"), ("torch.sparse_coo",)), (1, 2, (3,))),
    ),
    "sparse of unknown layout": Record(
        Global("torch._utils", "_rebuild_sparse_tensor"),
        (Record(Global("torch.serialization", "_get_layout"), ("torch.x",)), (1, 2, (3,))),
    ),
    "quantized without scheme": Record(
        Global("torch._utils", "_rebuild_qtensor"), (storage(), 0, (1,), (1,), None, False, None)
    ),
    "quantized over floats": Record(
        Global("torch._utils", "_rebuild_qtensor"), (storage(), 0, (1,), (1,), (1, 1, 1), False, None)
    ),
    "meta without size": Record(Global("torch._utils", "_rebuild_meta_tensor_no_storage"), (1,)),
    "nested of numbers": Record(Global("torch._utils", "_rebuild_nested_tensor"), (1, 2, 3, 4)),
    "parameter of nothing": Record(Global("torch._utils", "_rebuild_parameter"), ()),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_a_tensor_that_cannot_be(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_bytes(archive({"w": BAD_VIEWS[name]}))
    text = str(caught.value)
    assert "a.pt" in text
    assert "\n" not in text
    assert len(text) < 500


def test_views_at_the_very_end_and_of_nothing_are_right() -> None:
    contents = read_bytes(
        archive(
            {
                "last": tensor(11, (), ()),
                "none": tensor(400, (0, 5), (5, 1)),
                "unit": tensor(0, (1, 12), (10**15, 1)),
                "repeated": tensor(3, (2, 1000), (1, 0)),
            }
        )
    )
    assert contents.root["last"].numpy() == 11
    assert contents.root["none"].numpy().shape == (0, 5)
    assert contents.root["unit"].numpy().tolist() == [list(range(12))]
    assert contents.root["repeated"][:, 998:].numpy().tolist() == [[3, 3], [4, 4]]


@pytest.mark.parametrize(
    "identifier",
    [
        "0",
        ("storage",),
        ("module", "x", "y", "z"),
        ("storage", Global("os", "FloatStorage"), "0", "cpu", 12),
        ("storage", Global("torch", "load"), "0", "cpu", 12),
        ("storage", Global("torch", "FloatStorage"), 0, "cpu", 12),
        ("storage", Global("torch", "FloatStorage"), "../0", "cpu", 12),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", "12"),
        ("storage", [1], "0", "cpu", 12),
    ],
)
def test_references_that_are_not_to_a_storage(identifier: Any) -> None:
    reference = storage()
    reference.id = identifier
    with pytest.raises(FormatError):
        read_bytes(archive({"w": reference}))


def test_a_shared_container_is_not_walked_forever() -> None:
    nodes: list[Any] = [tensor()]
    for _ in range(40):
        nodes = [nodes, nodes]
    contents = read_bytes(archive({"bomb": nodes}))
    with pytest.raises(UnsafeError, match="endlessly"):
        flatten(contents.root, "a.pt")


def test_tensors_nested_too_deep() -> None:
    nested: Any = tensor()
    for _ in range(5000):
        nested = [nested]
    contents = read_bytes(archive({"deep": nested}))
    with pytest.raises(FormatError, match="nested too deep"):
        flatten(contents.root, "a.pt")


def test_a_container_that_holds_itself() -> None:
    loop: dict[str, Any] = {"w": tensor()}
    loop["self"] = loop
    flat = flatten(read_bytes(archive(loop)).root, "a.pt")
    assert list(flat.tensors) == ["w"]
    assert flat.objects == {}


def stream(*parts: bytes) -> bytes:
    head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001)]
    return b"".join([*head, *parts])


SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, protocol=2)


def test_streams_that_lie() -> None:
    from anyckpt.pickling import dumps

    reference = storage()
    reference.id = (*reference.id, None)
    root = dumps({"w": tensor(of=reference)})
    data = struct.pack("<12f", *range(12))

    def keys(*names: Any) -> bytes:
        return pickle.dumps(list(names), protocol=2)

    good = stream(SYSTEM, root, keys("0"), struct.pack("<q", 12), data)
    assert read_bytes(good).root["w"].numpy()[2, 3] == 11
    bad = {
        "unknown version": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(7, 2) + SYSTEM,
        "another size than the pickle says": stream(SYSTEM, root, keys("0"), struct.pack("<q", 13), data),
        "lies outside the file": stream(SYSTEM, root, keys("0"), struct.pack("<q", 12), data[:-1]),
        "is missing": stream(SYSTEM, root, keys()),
        "which is not wanted": stream(SYSTEM, root, keys("0", "0"), struct.pack("<q", 12), data),
        "not a list of names": stream(SYSTEM, root, keys(0), struct.pack("<q", 12), data),
    }
    for words, content in bad.items():
        with pytest.raises(FormatError, match=words):
            read_bytes(content)
    for view, words in {
        ("v", 11, 2): "lies outside it",
        ("v", -1, 2): "lies outside it",
        "v": "not to a storage",
    }.items():
        reference.id = (*reference.id[:5], view)
        with pytest.raises(FormatError, match=words):
            read_bytes(stream(SYSTEM, dumps({"w": tensor(of=reference)}), keys("0"), struct.pack("<q", 12), data))
    reference.id = (*reference.id[:5], ("v", 2, 3))
    view = tensor(0, (3,), (1,), of=reference)
    found = read_bytes(stream(SYSTEM, dumps({"w": view}), keys("0"), struct.pack("<q", 12), data)).root["w"]
    assert isinstance(found, LazyTensor)
    assert found.numpy().tolist() == [2, 3, 4]


def test_memory_shared_through_views_of_storages_is_told_of_when_it_is_copied(tmp_path: Path) -> None:
    from anyckpt.pickling import dumps

    def viewed(view: tuple[str, int, int] | None, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        reference = storage()
        reference.id = (*reference.id, view)
        return tensor(0, shape, strides, of=reference)

    root = {
        "w": viewed(None, (3, 4), (4, 1)), "v": viewed(("v", 2, 3), (3,), (1,)), "u": viewed(("u", 6, 2), (2,), (1,))
    }  # fmt: skip
    names = pickle.dumps(["0"], protocol=2)
    data = struct.pack("<12f", *range(12))
    for held, told in ((root, ["v", "u"]), ({"v": root["v"], "u": root["u"]}, [])):
        path = tmp_path / f"{len(held)}.pt"
        path.write_bytes(stream(SYSTEM, dumps(held), names, struct.pack("<q", 12), data))
        done = anyckpt.convert(path, path.with_suffix(".copy"), to="torch")
        notes = [note for note in done.notes if "through a view of it, which the copy does not keep" in note]
        assert [note.partition(":")[0] for note in notes] == ([", ".join(told)] if told else [])
        copied = registry.read(path.with_suffix(".copy")).tensors
        assert copied["v"].numpy().tolist() == [2, 3, 4] and copied["u"].numpy().tolist() == [6, 7]


def test_a_big_endian_stream() -> None:
    from anyckpt.pickling import dumps

    system = pickle.dumps({"protocol_version": 1001, "little_endian": False, "type_sizes": {}}, protocol=2)
    data = struct.pack(">12f", *range(12))
    content = stream(system, dumps({"w": tensor()}), pickle.dumps(["0"], 2), struct.pack(">q", 12), data)
    assert read_bytes(content).root["w"].numpy()[1].tolist() == [4, 5, 6, 7]


def test_detection_reports_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(small_file()[:-40])
    with pytest.raises(FormatError, match="truncated"):
        FORMAT.detect(look_at(path))


def nested_tuple(levels: int) -> Any:
    """A tuple whose text has two to the power of ``levels`` parts."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


def test_values_whose_text_is_endless_are_not_printed() -> None:
    bomb = nested_tuple(60)
    located = storage()
    located.id = (*located.id[:3], bomb, located.id[4])
    assert read_bytes(archive({"w": tensor(of=located)})).root["w"].shape == (3, 4)
    for index in range(5):
        reference = storage()
        reference.id = (*reference.id[:index], bomb, *reference.id[index + 1 :])
        if index != 3:
            with pytest.raises(FormatError):
                read_bytes(archive({"w": reference}))
    for arguments in ((storage(), bomb, (1,), (1,)), (storage(), 0, bomb, (1,)), (bomb, 0, (1,), (1,))):
        with pytest.raises(FormatError):
            read_bytes(archive({"w": Record(Global("torch._utils", "_rebuild_tensor"), arguments)}))
    layout = Record(Global("torch.serialization", "_get_layout"), (bomb,))
    with pytest.raises(FormatError):
        read_bytes(archive({"w": Record(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, (1, 2, 3)))}))


def test_attributes_with_odd_names_are_left_out() -> None:
    state = {10**5000: 1, "partition_dim": 0, (1, 2): 3}
    arguments = (tensor(), True, None, state)
    contents = read_bytes(archive({"w": Record(Global("torch._utils", "_rebuild_parameter_with_state"), arguments)}))
    assert contents.facts_of(contents.root["w"]).attributes == {"partition_dim": 0}


def test_odd_keys_have_names(tmp_path: Path) -> None:
    root = {10**5000: tensor(), None: {True: tensor(), (1, "a"): tensor()}, "optimizer": tensor(11, (), ())}
    path = tmp_path / "a.pt"
    path.write_bytes(archive(root))
    checkpoint = FORMAT.read(look_at(path))
    assert list(checkpoint.tensors) == ["<int>", "None.True", "None.<tuple>", "optimizer"]
    assert checkpoint.training.has_optimizer
    plan = FORMAT.plan(checkpoint, WriteOptions())  # type: ignore[misc]
    again = read_bytes(file_bytes(plan.files[0])).root
    assert list(again) == [10**5000, None, "optimizer"]
    assert list(again[None]) == [True, (1, "a")]


def test_storages_of_old_cuda_files() -> None:
    reference = storage()
    reference.id = ("storage", Global("torch.cuda", "FloatStorage"), "0", "cuda:3", 12)
    contents = read_bytes(archive({"w": tensor(of=reference)}))
    assert contents.root["w"].numpy()[2, 3] == 11
    assert contents.facts_of(contents.root["w"]).location == "cuda:3"


def test_big_endian_complex_and_untyped_storages() -> None:
    values = struct.pack(">4f", 1, 2, 3, 4)
    complex_numbers = objects.tensor(storage("0", 2, "complex64"), 0, (2,), (1,), dtype=dtype("complex64"))
    halves = objects.tensor(storage("1", 3, "uint16"), 1, (2,), (1,), dtype=dtype("uint16"))
    tied = objects.tensor(storage("1", 3, "uint16"), 1, (2,), (1,), dtype=dtype("uint16"))
    records = {"byteorder": b"big", "data/0": values, "data/1": struct.pack(">3H", 1, 2, 3)}
    root = read_bytes(archive({"c": complex_numbers, "u": halves, "t": tied}, records)).root
    assert root["c"].numpy().tolist() == [1 + 2j, 3 + 4j]
    assert root["u"].numpy().tolist() == [2, 3]
    assert storage_key(root["u"]) == storage_key(root["t"])


def test_swapped_bytes_are_read_at_any_offset() -> None:
    source = SwappedSource(MemorySource(bytes(range(32))), 4)
    whole = source.read(0, 32)
    assert whole[:8] == bytes([3, 2, 1, 0, 7, 6, 5, 4])
    for offset in range(32):
        for length in range(32 - offset):
            assert source.read(offset, length) == whole[offset : offset + length]


def test_tensors_of_devices_that_save_numpy_arrays() -> None:
    array = Record(
        Global("numpy.core.multiarray", "_reconstruct"),
        (Global("numpy", "ndarray"), (0,), b"b"),
        state=(
            1,
            (2, 2),
            Record(Global("numpy", "dtype"), ("f4", False, True), state=(3, "<", None, None, None, -1, -1, 0)),
            False,
            struct.pack("<4f", 1, 2, 3, 4),
        ),
    )
    made = Record(
        Global("torch._utils", "_rebuild_device_tensor_from_numpy"), (array, Global("torch", "bfloat16"), "xla:0", True)
    )
    contents = read_bytes(archive({"w": made}))
    assert contents.root["w"].dtype.name == "bfloat16"
    assert contents.root["w"].numpy().astype(float).tolist() == [[1, 2], [3, 4]]
    assert contents.facts_of(contents.root["w"]).requires_grad


def test_checksums_are_told_to_verify() -> None:
    checkpoint = FORMAT.read(look_at(fixture_path("legacy/zoo_dtypes/zip.pt")))
    stored = list(checkpoint.checksums())
    assert len(stored) == 28
    for item in stored:
        assert zlib.crc32(item.source.read_all()) == item.crc32
    assert not list(FORMAT.read(look_at(fixture_path("legacy/zoo_dtypes/legacy.pt"))).checksums())
