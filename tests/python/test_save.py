"""Saving arrays and lazy tensors from memory; without torch."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.models.cases import facts
from tests.support import fixture_path

import anyckpt
from anyckpt.operations.steps.live import Live

LLAMA = "families/llama/hf"


def state() -> dict[str, np.ndarray[Any, Any]]:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    return {name: tensor.numpy() for name, tensor in checkpoint.items()}


@pytest.mark.parametrize(
    "to", ["safetensors", "torch", "dcp", "lightning", "hf", "nemo2", "megatron-core", "megatron-lm"]
)
def test_what_is_saved_is_what_converting_its_file_gives(to: str, tmp_path: Path) -> None:
    config = fixture_path(LLAMA) / "config.json"
    anyckpt.save(state(), tmp_path / "plain.pt", to="torch")
    saved = anyckpt.save(state(), tmp_path / "saved", to=to, config=config)
    converted = anyckpt.convert(tmp_path / "plain.pt", tmp_path / "converted", to=to, config=config)
    assert saved.ignored == converted.ignored == {}
    assert saved.bytes_written == converted.bytes_written
    assert saved.bytes_read == 0
    assert facts(anyckpt.open(tmp_path / "saved").tensors) == facts(anyckpt.open(tmp_path / "converted").tensors)
    assert anyckpt.verify(tmp_path / "saved")


def test_ranks_and_casts(tmp_path: Path) -> None:
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    config = fixture_path(LLAMA) / "config.json"
    done = anyckpt.save(state(), tmp_path / "lm", to="megatron-lm", config=config, layout=layout, dtype="bf16")
    assert done.casts == {"float32 -> bfloat16": 15}
    assert anyckpt.open(tmp_path / "lm").layout.tensor_parallel == 2


def test_lazy_tensors_are_never_read_whole(tmp_path: Path) -> None:
    source = anyckpt.open(fixture_path(LLAMA))
    tensors = {name: tensor.cast("bfloat16") for name, tensor in source.items() if tensor.ndim == 2}
    tensors["rows"] = source["model.embed_tokens.weight"][3:9]
    anyckpt.save(tensors, tmp_path / "lazy.safetensors", to="safetensors")
    found = anyckpt.open(tmp_path / "lazy.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name].numpy(), tensors[name].numpy()) for name in found)


def test_a_file_that_a_lazy_tensor_is_in_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    anyckpt.save({"w": np.ones(3)}, path, to="safetensors")
    with pytest.raises(anyckpt.UsageError, match="source and destination are the same"):
        anyckpt.save(dict(anyckpt.open(path)), path, to="safetensors", overwrite=True)
    anyckpt.save(anyckpt.open(path), tmp_path / "copy.pt", to="torch")
    assert anyckpt.open(tmp_path / "copy.pt")["w"].numpy().tolist() == [1, 1, 1]


def test_nested_state_is_written_nested_and_told_where_it_has_no_place(tmp_path: Path) -> None:
    nested = {
        "model": OrderedDict(weight=np.arange(6.0).reshape(2, 3), bias=np.ones(2)),
        "optimizer": {
            "state": {0: {"exp_avg": np.zeros((2, 3))}},
            "param_groups": [{"lr": np.float64(0.1), "params": [0]}],
        },
        "step": 3,
        "betas": (0.9, 0.95),
    }  # fmt: skip
    anyckpt.save(nested, tmp_path / "all.pt", to="torch")
    found = anyckpt.open(tmp_path / "all.pt")
    assert set(found) == {"model.weight", "model.bias", "optimizer.state.0.exp_avg"}
    assert found.objects["step"] == 3
    assert found.objects["betas"] == (0.9, 0.95)
    assert found.objects["optimizer.param_groups"] == [{"lr": 0.1, "params": [0]}]
    told = anyckpt.save(nested, tmp_path / "some.safetensors", to="safetensors").ignored
    assert set(told) == {"optimizer.state.0.exp_avg", "step", "betas", "optimizer.param_groups"}
    assert set(anyckpt.open(tmp_path / "some.safetensors")) == {"weight", "bias"}


def test_ties_stay_ties(tmp_path: Path) -> None:
    table = np.arange(60_000.0)
    done = anyckpt.save({"a": table, "b": table, "c": table.copy()}, tmp_path / "tied.pt", to="torch")
    assert 2 * table.nbytes < done.bytes_written < 2.1 * table.nbytes


def test_nothing_is_copied(tmp_path: Path) -> None:
    table = np.arange(4_000_000, dtype=np.float32).reshape(2000, 2000)
    given = {"a": table, "t": table.T, "s": table[:, ::2]}
    tracemalloc.start()
    try:
        Live().tree(given)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    anyckpt.save(given, tmp_path / "x.safetensors", to="safetensors")
    found = anyckpt.open(tmp_path / "x.safetensors")
    assert np.array_equal(found["t"].numpy(), table.T)
    assert np.array_equal(found["s"].numpy(), table[:, ::2])


def test_live_tensors_have_no_identity() -> None:
    tensor = Live().tensor(np.ones(3))
    assert tensor is not None
    assert [piece.source.identity() for piece in tensor.pieces()] == [None]


@given(
    array=arrays.arrays(
        st.sampled_from(["<f4", ">f4", "<i8", ">u2", "?", "<c8", ">c16", "i1"]),
        arrays.array_shapes(min_dims=0, min_side=0, max_side=5),
    ),
    axes=st.randoms(),
    steps=st.lists(st.sampled_from([1, 2, -1, -2]), min_size=4, max_size=4),
)
def test_every_view_of_an_array(array: np.ndarray[Any, Any], axes: Any, steps: list[int]) -> None:
    order = list(range(array.ndim))
    axes.shuffle(order)
    view = array.transpose(order)[tuple(slice(None, None, step) for step in steps[: array.ndim])]
    tensor = Live().tensor(view)
    assert tensor is not None
    assert tensor.shape == view.shape
    plain = np.ascontiguousarray(view).astype(view.dtype.newbyteorder("<"))
    assert tensor.numpy().tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (np.array(["a"]), "numpy type <U1 has no counterpart"),
        (np.array([{}], dtype=object), "numpy type object has no counterpart"),
        (np.ma.masked_array([1.0], [True]), "its mask would be lost"),
    ],
)
def test_what_is_no_tensor_of_a_checkpoint(given: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(anyckpt.UsageError, match=problem) as caught:
        anyckpt.save({"x": {"w": given}}, tmp_path / "x.pt", to="torch")
    assert caught.value.tensor == "x.w"
    assert not list(tmp_path.iterdir())


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(anyckpt.UsageError, match=r"state_dict\(\) of a module"):
        anyckpt.save([np.ones(3)], tmp_path / "x", to="torch")  # type: ignore[arg-type]
    loop: dict[str, Any] = {"w": np.ones(3)}
    loop["self"] = loop
    with pytest.raises(anyckpt.UsageError, match="hold themselves"):
        anyckpt.save(loop, tmp_path / "x", to="torch")
    with pytest.raises(anyckpt.UsageError, match="holds no weights"):
        anyckpt.save({}, tmp_path / "x", to="torch")


def test_narrow_types_of_ml_dtypes(tmp_path: Path) -> None:
    given = {
        name: np.arange(4).astype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")
    }
    anyckpt.save(given, tmp_path / "x.safetensors", to="safetensors")
    found = anyckpt.open(tmp_path / "x.safetensors")
    for name, array in given.items():
        assert found[name].dtype == name
        assert found[name].numpy().tobytes() == array.tobytes()
