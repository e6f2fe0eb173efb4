"""Bare pickles of arrays and tensors, and files of Torch7: read in place, or refused by their name."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.torch_archives import archive, tensor
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import AnyckptError, FormatError
from anyckpt.formats import registry
from anyckpt.storage.read_count import bytes_read

MODULES = fixture_path("legacy/modules")


def opened(value: Any, path: Path, protocol: int = 4) -> Checkpoint:
    path.write_bytes(pickle.dumps(value, protocol))
    return registry.read(path)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_bare_pickles_hold_the_same_as_a_torch_file(kind: str, tmp_path: Path) -> None:
    source = MODULES / f"bare_pickle_{kind}.pkl"
    found, expected = registry.read(source), registry.read(MODULES / "state_dict.pt")
    assert found.format_version == "pickle"
    assert {name: t.shape for name, t in found.weights().items()} == {n: t.shape for n, t in expected.weights().items()}
    anyckpt.convert(source, tmp_path / "x.safetensors", to="safetensors")
    written = registry.read(tmp_path / "x.safetensors").tensors
    assert {name: sha256_of(t) for name, t in written.items()} == {n: sha256_of(t) for n, t in found.tensors.items()}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_order_and_protocol(protocol: int, tmp_path: Path) -> None:
    numbers = np.arange(6000, dtype=np.float32).reshape(3, 20, 100)
    arrays = {
        "small": numbers[0, 0, :3],
        "large": numbers,
        "fortran": np.asfortranarray(numbers),
        "big": numbers.astype(">f8"),
        "scalar": np.array(3.5),
        "whole": np.arange(900, dtype=np.int64),
        "flags": np.ones(5000, bool),
    }
    root = {"model": arrays, "in_a_list": [arrays["large"]], "__author__": "Caffe2", "names": np.array(["a", "b"])}
    checkpoint = opened(root, tmp_path / "zoo.pkl", protocol)
    for name, array in arrays.items():
        found = checkpoint.tensors[f"model.{name}"]
        assert found.dtype.name == array.dtype.name and np.array_equal(found.numpy(), array), name
    assert np.array_equal(checkpoint.tensors["in_a_list.0"].numpy(), numbers)
    assert "names" in checkpoint.objects


def test_large_arrays_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.pkl"
    path.write_bytes(pickle.dumps({"w": np.ones((1024, 1024), np.float32), "v": np.arange(5000)}, 4))
    before = bytes_read()
    checkpoint = registry.read(path)
    assert bytes_read() - before < 1 << 20
    assert checkpoint.tensors["w"][1000:1001].numpy().sum() == 1024
    assert checkpoint.tensors["v"].numpy()[-1] == 4999


def test_pickles_of_anything_else_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="without tensors or arrays"):
        opened({"vocabulary": ["a"], "size": 3}, tmp_path / "x.pkl")
    with pytest.raises(FormatError, match=r"without tensors.*eval"):
        opened(Calls(), tmp_path / "y.pkl")


class Calls:
    def __reduce__(self) -> Any:
        return eval, ("print(1)",)


def test_an_array_of_another_length_than_its_shape_is_an_error(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.arange(2048, dtype=np.float32)}, 4)
    assert data.count(b"M\x00\x08\x85") == 1
    (tmp_path / "x.pkl").write_bytes(data.replace(b"M\x00\x08\x85", b"M\x01\x08\x85"))
    with pytest.raises(FormatError, match="another number of bytes"):
        registry.read(tmp_path / "x.pkl")


def test_truncated_pickles_are_typed_errors(tmp_path: Path) -> None:
    data = (MODULES / "bare_pickle_torch.pkl").read_bytes()
    whole = pickle.dumps({"w": np.arange(2048, dtype=np.float32)}, 4)
    for text in [data[:end] for end in range(3, len(data), 97)] + [whole[:end] for end in range(3, len(whole), 211)]:
        (tmp_path / "x.pkl").write_bytes(text)
        with pytest.raises(AnyckptError):
            registry.read(tmp_path / "x.pkl")


def lua(*parts: int | bytes) -> bytes:
    return b"".join(struct.pack("<i", part) if isinstance(part, int) else part for part in parts)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (lua(4, 1, 3, b"V 1", 17, b"torch.FloatTensor", 2), "class torch.FloatTensor"),
        (b"4\n1\n3\nV 1\n13\nnn.Sequential\n3\n2\n", "class nn.Sequential"),
        (lua(3, 1, 5, 2, 5, b"model"), "Torch7"),
    ],
)
def test_files_of_torch7_are_named(head: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "old.t7"
    path.write_bytes(head + bytes(100))
    with pytest.raises(FormatError, match="Torch7") as caught:
        registry.read(path)
    assert told in str(caught.value)


def test_a_torch_file_inside_bytes_is_not_taken_for_a_storage(tmp_path: Path) -> None:
    class Nested:
        def __reduce__(self) -> Any:
            return Loader, (archive({"w": tensor()}),)

    checkpoint = opened({"w": np.ones(3), "x": Nested()}, tmp_path / "x.pkl")
    assert list(checkpoint.weights()) == ["w"] and "x" in checkpoint.objects


class Loader:
    def __init__(self, data: bytes) -> None:
        self.data = data
