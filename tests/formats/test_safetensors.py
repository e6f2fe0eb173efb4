"""The safetensors container: what the header may say, and what is written."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import file_bytes, fixture_path, sha256_of, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
from anyckpt.dtypes import BY_NAME
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import look_at
from anyckpt.formats.safetensors import FORMAT
from anyckpt.operations.convert import convert
from anyckpt.operations.verify import verify
from anyckpt.storage import LocalFile, MemorySource
from anyckpt.tensor import Constant, from_array

HF_FIXTURES = ("llama", "llama_tied_bf16", "llama31_ropescale", "mistral_swa")


def packed(header: Any, data: bytes = b"", *, length: int | None = None) -> MemorySource:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MemorySource((len(text) if length is None else length).to_bytes(8, "little") + text + data, "crafted")


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("name", HF_FIXTURES)
@pytest.mark.parametrize("file", ["hf/model.safetensors", "mcore_te.safetensors"])
def test_writes_the_bytes_of_the_library(name: str, file: str) -> None:
    path = fixture_path(f"families/{name}/{file}")
    checkpoint = FORMAT.read(look_at(path))
    assert FORMAT.plan is not None
    (output,) = FORMAT.plan(checkpoint, WriteOptions()).files
    assert file_bytes(output) == path.read_bytes()


def test_reads_values_and_metadata() -> None:
    data = np.arange(6, dtype="<f4")
    header = {"__metadata__": {"format": "pt"}, "a": entry(shape=[2, 2], offsets=[8, 24]), "b": entry(offsets=[0, 8])}
    tensors, metadata = read_safetensors(packed(header, data.tobytes()))
    assert metadata == {"format": "pt"}
    assert list(tensors) == ["a", "b"]
    np.testing.assert_array_equal(tensors["a"].numpy(), data[2:].reshape(2, 2))
    np.testing.assert_array_equal(tensors["b"].numpy(), data[:2])


@pytest.mark.parametrize("metadata", [None, {}, {"format": "np", "a": "1"}])
def test_a_copy_invents_no_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    source = tmp_path / "a.safetensors"
    parts = safetensors_parts({"a": from_array(np.ones(3, np.float32))}, metadata)
    source.write_bytes(file_bytes(OutputFile("", parts)))
    convert(source, tmp_path / "b.safetensors", to="safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()


def test_six_bit_numbers_travel_as_they_are(tmp_path: Path) -> None:
    header = {"q": entry("F6_E2M3", [2, 8], [0, 12]), "r": entry("F6_E3M2", [4], [12, 15])}
    source = tmp_path / "a.safetensors"
    packed_source = packed(header, bytes(range(15)))
    source.write_bytes(packed_source.read(0, packed_source.size))
    tensors, _ = read_safetensors(LocalFile(source))
    assert {name: (t.dtype.name, t.shape) for name, t in tensors.items()} == {
        "q": ("float6_e2m3fn", (2, 6)),
        "r": ("float6_e3m2fn", (3,)),
    }
    convert(source, tmp_path / "b.safetensors", to="safetensors")
    again, _ = read_safetensors(LocalFile(tmp_path / "b.safetensors"))
    assert {name: (t.dtype, t.shape, sha256_of(t)) for name, t in again.items()} == {
        name: (t.dtype, t.shape, sha256_of(t)) for name, t in tensors.items()
    }
    for to in ("torch", "dcp"):
        with pytest.raises(UsageError, match="torch has no such element type.*float6"):
            convert(source, tmp_path / "c", to=to)
    with pytest.raises(UsageError, match="tensor 'q'.*end inside a group"):
        safetensors_parts({"q": tensors["q"].narrow(1, 0, 4)})


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A pickle's names may be half of a surrogate pair, which neither JSON in UTF-8 nor a file system spells."""
    half = Checkpoint(__file__, "torch", {"a\ud800": from_array(np.ones(2, np.float32))}, objects={"b": "\udcff"})
    with pytest.raises(UsageError, match="cannot hold a name with half of a surrogate pair"):
        convert(half, tmp_path / "a.safetensors", to="safetensors")
    with pytest.raises(UsageError):
        convert(replace(half, dialect="hub", config={"x": "\ud800"}), tmp_path / "a", to="hf", names="hf")
    for to in ("torch", "dcp"):
        convert(half, tmp_path / to, to=to, optimizer="keep")
        assert verify(tmp_path / to).problems == []
        assert list(anyckpt.open(tmp_path / to).tensors) == ["a\ud800"]


def test_empty_tensors_and_scalars() -> None:
    header = {"e": entry(shape=[0, 3], offsets=[0, 0]), "s": entry(shape=[], offsets=[0, 4])}
    tensors, _ = read_safetensors(packed(header, np.float32(7).tobytes()))
    assert tensors["e"].numpy().shape == (0, 3)
    assert tensors["s"].numpy() == 7


def test_four_bit_numbers_count_bytes_in_our_shapes() -> None:
    tensors, _ = read_safetensors(packed({"q": entry("F4", [2, 4], [0, 4])}, bytes(range(4))))
    assert tensors["q"].dtype.name == "float4_e2m1fn_x2"
    assert tensors["q"].shape == (2, 2)
    literal = safetensors_parts(tensors)[0]
    assert b'"shape":[2,4]' in literal.data  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (MemorySource(b"", "crafted"), "too short"),
        (MemorySource(b"\0" * 7, "crafted"), "too short"),
        (packed({"a": entry()}, bytes(8), length=1 << 62), "header is too large"),
        (packed({"a": entry()}, bytes(8), length=200), "truncated inside its header"),
        (packed(b"[]"), "not a safetensors file"),
        (packed(b""), "not a safetensors file"),
        (packed(b"{"), "not valid JSON"),
        (packed(b'{"a": nope}'), "not valid JSON"),
        (packed(b"{\xff}"), "not valid JSON"),
        (packed(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (packed(b'{"a":' + b'{"a":' * 100_000), "nested too deeply"),
        (packed(b'{"a":1,"a":2}'), "occurs twice"),
        (packed(b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}'), "occurs twice"),
        (packed(b'{"\\ud800":{}}'), "half of a surrogate pair"),
        (packed(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
        (packed({"a": 1}), "entry is incomplete"),
        (packed({"a": {"dtype": "F32", "shape": [2]}}), "entry is incomplete"),
        (packed({"a": entry("F99")}, bytes(8)), "unknown element type"),
        (packed({"a": entry(["F32"])}, bytes(8)), "unknown element type"),  # type: ignore[arg-type]
        (packed({"a": entry(shape=2)}, bytes(8)), "invalid shape"),
        (packed({"a": entry(shape=[-2])}, bytes(8)), "invalid shape"),
        (packed({"a": entry(shape=[2.0])}, bytes(8)), "invalid shape"),
        (packed({"a": entry(shape=[True])}, bytes(8)), "invalid shape"),
        (packed({"a": entry(shape=[1 << 64])}, bytes(8)), "invalid shape"),
        (packed({"a": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)), "invalid shape"),
        (packed({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "impossible shape"),
        (packed({"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}), "impossible shape"),
        (packed({"a": entry(offsets=[0])}, bytes(8)), "invalid data_offsets"),
        (packed({"a": entry(offsets=[-8, 0])}, bytes(8)), "invalid data_offsets"),
        (packed({"a": entry(offsets="08")}, bytes(8)), "invalid data_offsets"),
        (packed({"a": entry(offsets=[0, 4])}, bytes(8)), "not as long as its shape"),
        (packed({"a": entry(offsets=[8, 0])}, bytes(8)), "not as long as its shape"),
        (packed({"a": entry("F4", [2, 3], [0, 3])}, bytes(3)), "do not end with a byte"),
        (packed({"a": entry(shape=[2], offsets=[0, 8])}, bytes(7)), "outside the file"),
        (packed({"a": entry(shape=[1 << 35], offsets=[0, 1 << 37])}, bytes(8)), "outside the file"),
        (packed({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (packed({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
        (packed({"a": entry(offsets=[4, 12])}, bytes(12)), "gap"),
        (packed({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "gap"),
        (packed({"a": entry()}, bytes(9)), "bytes after its last tensor"),
        (packed({"__metadata__": {"a": 1}}), "__metadata__"),
        (packed({"__metadata__": []}), "__metadata__"),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused(source: MemorySource, problem: str) -> None:
    started = time.process_time()
    with pytest.raises(FormatError, match=problem) as caught:
        read_safetensors(source)
    assert time.process_time() - started < 1
    assert "crafted" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=120))
def test_no_header_escapes_as_another_error(text: bytes) -> None:
    with contextlib.suppress(FormatError):
        read_safetensors(packed(b"{" + text))


@given(st.integers(0, 400), st.integers(0, 255))
def test_one_changed_byte_reads_or_is_refused(position: int, value: int) -> None:
    whole = bytearray(fixture_path("nemo/speechlm2_v3_0_0/model/model.safetensors").read_bytes())
    whole[position % len(whole)] = value
    try:
        tensors, _ = read_safetensors(MemorySource(bytes(whole)))
        for tensor in tensors.values():
            tensor.numpy()
    except FormatError:
        pass


def test_every_truncation_is_refused() -> None:
    whole = fixture_path("nemo/speechlm2_v3_0_0/model/model.safetensors").read_bytes()
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            read_safetensors(MemorySource(whole[:length]))


def test_what_the_format_cannot_hold_is_said() -> None:
    with pytest.raises(UsageError, match="cannot hold complex128"):
        safetensors_parts({"a": Constant(BY_NAME["complex128"], (2,))})
    with pytest.raises(UsageError, match="reserves this name"):
        safetensors_parts({"__metadata__": from_array(np.zeros(2, "<f4"))})


def test_training_state_is_left_out_and_listed(tmp_path: Path) -> None:
    checkpoint = FORMAT.read(look_at(fixture_path("nemo/speechlm2_v3_0_0/model/model.safetensors")))
    checkpoint.state_prefixes = ("perception.",)
    assert FORMAT.plan is not None
    plan = FORMAT.plan(checkpoint, WriteOptions())
    assert set(plan.ignored) == {"perception.bias", "perception.weight"}
    tensors, metadata = read_safetensors(LocalFile(write_plan(plan, tmp_path / "out.safetensors")))
    assert list(tensors) == ["embed_tokens.weight"]
    assert metadata == {"head.weight": "embed_tokens.weight"}
