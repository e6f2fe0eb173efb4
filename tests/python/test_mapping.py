"""A checkpoint as a mapping, its tensors as arrays, and element types as people write them; without torch."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import BY_NAME, dtype
from anyckpt.errors import alike
from anyckpt.storage.read_count import bytes_read
from anyckpt.tensor import concatenate, from_array

LLAMA = "families/llama/hf"
BF16 = "families/llama_tied_bf16/hf"


def test_a_checkpoint_is_a_mapping_of_its_tensors() -> None:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    name = "model.norm.weight"
    assert checkpoint[name] is checkpoint.tensors[name]
    assert name in checkpoint
    assert "norm" not in checkpoint
    assert len(checkpoint) == 21
    assert list(checkpoint) == list(checkpoint.keys()) == list(checkpoint.tensors)
    assert dict(checkpoint.items()) == dict(checkpoint) == checkpoint.tensors
    assert list(checkpoint.values()) == list(checkpoint.tensors.values())
    assert checkpoint.get("nothing") is None


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("norm.weight", "'model.norm.weight'"), ("model.norm.wieght", "'model.norm.weight'"),
     ("base.model.norm.weight", "'model.norm.weight'"), ("zzz", "one of checkpoint.keys()")],
)  # fmt: skip
def test_a_name_that_is_not_there(asked: str, meant: str) -> None:
    path = fixture_path(LLAMA)
    with pytest.raises(anyckpt.UnknownTensorError) as caught:
        anyckpt.open(path)[asked]
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, anyckpt.AnyckptError)
    assert f"{path}: tensor {asked!r}: no tensor has this name (expected {meant}" in str(caught.value)


def test_what_is_alike_is_found_soon_among_many_names() -> None:
    names = [f"decoder.layers.{i}.mlp.weight" for i in range(200_000)]
    assert "'decoder.layers.7.mlp.weight'" in alike("layers.7.mlp.weight", names)


def test_a_state_dict_is_of_the_weights_by_the_names_of_the_model(tmp_path: Path) -> None:
    names = ["state_dict.a.weight", "optimizer.exp_avg.a.weight"]
    tensors = {name: from_array(np.full(3, number, np.float32)) for number, name in enumerate(names)}
    checkpoint = Checkpoint("x", "torch", tensors, model_prefix="state_dict.", state_prefixes=("optimizer.",))
    assert checkpoint.state_dict() == {"a.weight": tensors[names[0]]}
    assert checkpoint.state_dict("numpy")["a.weight"].tolist() == [0, 0, 0]
    with pytest.raises(anyckpt.UsageError, match="unknown framework"):
        checkpoint.state_dict("jax")


def test_asarray_is_the_file_itself() -> None:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    tensor = checkpoint["model.embed_tokens.weight"]
    before = bytes_read()
    array = np.asarray(tensor)
    assert bytes_read() == before
    assert not array.flags.writeable
    assert array.dtype == np.float32
    assert np.array_equal(array, tensor.numpy())
    assert np.shares_memory(array, np.asarray(tensor[3:5]))
    assert np.array_equal(np.asarray(tensor.T[::3]), array.T[::3])
    assert tensor.numpy().flags.writeable
    assert np.array(tensor).flags.writeable


def test_asarray_of_bfloat16_and_with_a_type() -> None:
    tensor = anyckpt.open(fixture_path(BF16))["model.embed_tokens.weight"]
    assert np.asarray(tensor).dtype == ml_dtypes.bfloat16
    wide = np.asarray(tensor, dtype=np.float32)
    assert wide.dtype == np.float32
    assert np.array_equal(wide, tensor.numpy().astype(np.float32))


def test_the_copy_argument_of_numpy_2() -> None:
    tensor = anyckpt.open(fixture_path(LLAMA))["model.norm.weight"]
    assert np.array_equal(tensor.__array__(copy=False), tensor.numpy())
    assert tensor.__array__(copy=True).flags.writeable
    with pytest.raises(ValueError, match="float16 without a copy"):
        tensor.__array__(np.float16, copy=False)
    joined = concatenate([tensor, tensor], 0)
    with pytest.raises(ValueError, match="without a copy"):
        joined.__array__(copy=False)
    assert np.array_equal(np.asarray(joined), np.concatenate([tensor.numpy()] * 2))


def test_unaligned_elements_are_copied(tmp_path: Path) -> None:
    header = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path = tmp_path / "odd.safetensors"
    values = np.array([1, 2], "<f4")
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" + values.tobytes())
    tensor = anyckpt.open(path)["w"]
    assert np.array_equal(np.asarray(tensor), values)
    with pytest.raises(ValueError, match="without a copy"):
        tensor.__array__(copy=False)


def test_a_mapping_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    anyckpt.save({"w": np.arange(2000.0)}, path, to="safetensors")
    array = np.asarray(anyckpt.open(path)["w"])
    anyckpt.save({"w": np.zeros(2000)}, path, to="safetensors", overwrite=True)
    assert array[5] == 5
    assert np.asarray(anyckpt.open(path)["w"])[5] == 0


def test_a_thousand_arrays_hold_one_file_open(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    anyckpt.save({f"w{i}": np.full(3, i, np.int16) for i in range(1000)}, path, to="safetensors")
    checkpoint = anyckpt.open(path)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    arrays = [np.asarray(tensor) for tensor in checkpoint.values()]
    assert sum(int(array[0]) for array in arrays) == 499_500
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_an_element_type_is_equal_to_what_people_call_it() -> None:
    kind = BY_NAME["bfloat16"]
    for name in ("bfloat16", "torch.bfloat16", "bf16", np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16, kind):
        assert kind == name
        assert dtype(name) is kind
    for other in ("float16", np.float32, None, 3, "nonsense", type):
        assert kind != other
    assert {"bfloat16": 1}[kind] == 1  # type: ignore[index]
    assert BY_NAME["float32"] == np.float32
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert repr(kind) == "bfloat16"


def test_torch_is_named_when_it_is_missing() -> None:
    tensor = anyckpt.open(fixture_path(LLAMA))["model.norm.weight"]
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torch"}
    for name in hidden:
        del sys.modules[name]
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        with pytest.raises(anyckpt.MissingLibraryError, match="pip install torch") as caught:
            tensor.torch()
        assert isinstance(caught.value, ImportError)
    finally:
        del sys.modules["torch"]
        sys.modules.update(hidden)


def test_dlpack_hands_on_what_numpy_has() -> None:
    tensor = anyckpt.open(fixture_path(LLAMA))["model.norm.weight"]
    assert tensor.__dlpack_device__() == (1, 0)
    assert np.array_equal(np.from_dlpack(tensor), tensor.numpy())
    narrow = anyckpt.open(fixture_path(BF16))["model.embed_tokens.weight"]
    if "torch" not in sys.modules:
        with pytest.raises(BufferError, match="bfloat16"):
            narrow.__dlpack__()
