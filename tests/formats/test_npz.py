"""NumPy's archives, written and read by NumPy itself."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import fixture_path

import anyckpt
from anyckpt.containers.npy import read_npy
from anyckpt.errors import AnyckptError, FormatError, UsageError
from anyckpt.storage.source import MemorySource

LLAMA = fixture_path("families/llama/hf")
TYPES = ("<f2", "<f4", "<f8", ">f4", ">i8", "|i1", "|u1", "<u2", "<u4", "<u8", "|b1", "<c8", ">f2")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.sampled_from(TYPES), SHAPES, st.booleans()), min_size=1))
def test_what_numpy_writes_is_read(tmp_path_factory: Any, told: dict[str, tuple[str, tuple[int, ...], bool]]) -> None:
    random = np.random.default_rng(len(told))
    arrays = {}
    for name, (kind, shape, in_columns) in told.items():
        array = random.integers(0, 100, shape).astype(kind)
        arrays[name] = np.asfortranarray(array) if in_columns else array
    folder = tmp_path_factory.mktemp("npz")
    for save in (np.savez, np.savez_compressed):
        save(folder / "a.npz", **arrays)  # type: ignore[operator]
        opened = anyckpt.open(folder / "a.npz")
        assert opened.format == "npz"
        assert opened.keys() == arrays.keys()
        for name, array in arrays.items():
            found = opened[name].numpy()
            assert found.dtype == array.dtype.newbyteorder("<")
            np.testing.assert_array_equal(found, array)


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "a.npz")
    weights = anyckpt.open(LLAMA).weights()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert found.files == list(weights)
        for name, tensor in weights.items():
            np.testing.assert_array_equal(found[name], tensor.numpy())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
    assert anyckpt.diff(LLAMA / "model.safetensors", tmp_path / "a.npz").equal
    assert not anyckpt.verify(tmp_path / "a.npz", deep=True).problems


@given(SHAPES, st.sampled_from(TYPES))
def test_members_are_numpys_own_byte_for_byte(tmp_path_factory: Any, shape: tuple[int, ...], kind: str) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape).astype(kind)
    folder = tmp_path_factory.mktemp("npz")
    np.savez(folder / "a.npz", x=array)
    anyckpt.convert(folder / "a.npz", folder / "b.npz")
    expected = io.BytesIO()
    np.save(expected, array.astype(array.dtype.newbyteorder("<")))
    with zipfile.ZipFile(folder / "b.npz") as archive:
        assert archive.namelist() == ["x.npy"]
        assert archive.read("x.npy") == expected.getvalue()


def test_a_flipped_byte_is_damage(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(1000.0))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(raw)
    assert anyckpt.verify(tmp_path / "a.npz", deep=True).problems


def test_bfloat16_is_read_and_not_written(tmp_path: Path) -> None:
    array = np.arange(6).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", x=array)
    found = anyckpt.open(tmp_path / "a.npz")["x"]
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.numpy(), array)
    with pytest.raises(UsageError, match="NumPy has no such type .*bfloat16"):
        anyckpt.convert(tmp_path / "a.npz", tmp_path / "b.npz")
    anyckpt.convert(tmp_path / "a.npz", tmp_path / "b.npz", dtype="fp32")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["x"], array.astype(np.float32))


def test_what_is_no_tensor_is_told(tmp_path: Path) -> None:
    other = {"t": np.array(["a"]), "o": np.array([{}], object), "d": np.zeros(1, "M8[s]")}
    records = np.zeros(2, [("a", "<i4"), ("b", "<f8")])
    np.savez(tmp_path / "a.npz", x=np.zeros(2), r=records, **other)
    opened = anyckpt.open(tmp_path / "a.npz")
    assert opened.keys() == {"x"}
    assert opened.ignored.keys() == {"t", "o", "d", "r"}
    np.savez(tmp_path / "b.npz", **other)
    with pytest.raises(FormatError, match="holds no array of numbers"):
        anyckpt.open(tmp_path / "b.npz")


HEAD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "__import__('os').system('true')",
        HEAD.replace("(2,)", "(3,)"),
        HEAD.replace("(2,)", "(-1,)"),
        HEAD.replace("(2,)", "(2.0,)"),
        HEAD.replace("(2,)", "(1 << 70,)"),
        HEAD.replace("(2,)", f"({'1,' * 99})"),
        HEAD.replace("False", "0"),
        HEAD.replace("'<f4'", "'<f3'"),
        HEAD.replace("'<f4'", "3"),
        HEAD.replace("'<f4'", "'" + "(" * 5000 + "'"),
        "(" * 9000,
        "9" * 9990,
    ],
)
def test_damaged_headers_are_errors(header: str) -> None:
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)
    with pytest.raises(FormatError):
        read_npy(MemorySource(raw, "x.npy"))


@given(st.binary(max_size=80))
def test_any_bytes_are_an_array_or_an_error(raw: bytes) -> None:
    for data in (raw, b"\x93NUMPY\x01\x00" + raw, b"\x93NUMPY\x03\x00" + raw):
        try:
            read_npy(MemorySource(data, "x.npy"))
        except AnyckptError:
            continue
