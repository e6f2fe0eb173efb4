"""Which weights a cast touches."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from anyckpt.errors import UsageError
from anyckpt.operations.steps.casts import cast_weights
from anyckpt.tensor import LazyTensor, from_array


def weights() -> dict[str, LazyTensor]:
    return {
        "a.weight": from_array(np.array([1.0000001, 2.0], dtype=np.float32)),
        "b.weight": from_array(np.array([1.0, 2.0], dtype=np.float16)),
        "mlp.router.expert_bias": from_array(np.array([1.0000001], dtype=np.float32)),
        "mixer.D": from_array(np.array([1.0000001], dtype=np.float32)),
        "quantized": from_array(np.array([1.0]).astype(ml_dtypes.float8_e4m3fn)),
        "steps": from_array(np.array([2**24 + 1], dtype=np.int32)),
        "mask": from_array(np.array([True])),
        "freqs": from_array(np.array([1j])),
    }


def dtypes(tensors: dict[str, LazyTensor]) -> dict[str, str]:
    return {name: tensor.dtype.name for name, tensor in tensors.items()}


def test_without_a_type_nothing_changes() -> None:
    before = weights()
    done = cast_weights(before, None)
    assert done.tensors == before
    assert (done.casts, done.notes) == ({}, ())


def test_floats_are_cast_and_counted_and_the_rest_is_kept_and_said() -> None:
    done = cast_weights(weights(), "bf16")
    assert dtypes(done.tensors) == {
        "a.weight": "bfloat16", "b.weight": "bfloat16", "mlp.router.expert_bias": "float32", "mixer.D": "float32",
        "quantized": "float8_e4m3fn", "steps": "int32", "mask": "bool", "freqs": "complex128",
    }  # fmt: skip
    assert done.casts == {"float32 -> bfloat16": 1, "float16 -> bfloat16": 1}
    assert "mlp.router.expert_bias, mixer.D" in done.notes[0]
    assert done.notes[1].startswith("1 tensors of 8-bit floats")
    assert done.tensors["a.weight"].numpy().tolist() == [1.0, 2.0]


def test_the_list_of_kept_weights_is_the_callers_choice() -> None:
    done = cast_weights(weights(), "fp16", keep=("a.*",))
    assert any("65,504" in note for note in done.notes)
    assert not any("65,504" in note for note in cast_weights(weights(), "bf16").notes)
    assert dtypes(done.tensors)["a.weight"] == "float32"
    assert dtypes(done.tensors)["mixer.D"] == "float16"


def test_casting_to_float32_loses_nothing_so_nothing_is_kept_back() -> None:
    half = {"mixer.D": from_array(np.array([1.5]).astype(ml_dtypes.bfloat16))}
    assert dtypes(cast_weights(half, "fp32").tensors) == {"mixer.D": "float32"}


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "nonsense"])
def test_other_types_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        cast_weights(weights(), name)
