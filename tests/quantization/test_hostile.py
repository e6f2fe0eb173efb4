"""Whatever a configuration says of quantization: numbers, or an error of ours in one line."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.errors import AnyckptError
from anyckpt.quantization import METHODS, dequantize, method_of
from anyckpt.tensor import from_array

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.sampled_from([4, 8, 3, 2, 4.0]) | PLAIN,
        "actorder": st.sampled_from(["group", None]) | PLAIN,
        "type": st.sampled_from(["int", "float"]) | PLAIN,
        "symmetric": st.booleans() | PLAIN,
        "group_size": st.integers(-1, 40) | PLAIN,
        "block_structure": st.lists(st.integers(-1, 20), max_size=3) | PLAIN,
    },
)
FACTS = st.fixed_dictionaries(
    {
        "quant_method": st.sampled_from([*sorted(METHODS) * 4, None]).flatmap(
            lambda m: PLAIN if m is None else st.just(m)
        )
    },
    optional={
        "weight_block_size": st.lists(st.integers(-1, 1 << 40), max_size=3) | PLAIN,
        "quant_algo": st.sampled_from(["FP8", "NVFP4", "W4A8", "W4A16_AWQ", "W8A16"]) | PLAIN,
        "format": st.sampled_from(
            ["pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"]
        )
        | PLAIN,
        "bits": st.sampled_from([4, 8, 2, 4.0, True]) | PLAIN,
        "w_bit": st.sampled_from([4]) | PLAIN,
        "group_size": st.sampled_from([16, 32, 0]) | PLAIN,
        "zero_point": st.booleans() | PLAIN,
        "mode": st.sampled_from(["affine", "mxfp4", "nvfp4"]) | PLAIN,
        "a": st.fixed_dictionaries({}, optional={"bits": st.sampled_from([3, 6]) | PLAIN, "mode": PLAIN}) | PLAIN,
        "version": st.sampled_from(["gemm", "gemv"]) | PLAIN,
        "checkpoint_format": st.sampled_from(["gptq", "gptq_v2"]) | PLAIN,
        "config_groups": st.dictionaries(st.text(max_size=2), st.just({}) | PLAIN, max_size=2)
        | SETTINGS.map(lambda weights: {"group_0": {"weights": weights}}),
        "modules_to_not_convert": st.lists(st.text(max_size=6), max_size=3) | PLAIN,
        "ignore": st.lists(st.text(alphabet="a.*\\re:", max_size=8), max_size=3) | PLAIN,
    },
)
KINDS = ("u1", "i1", "<i4", "<u4", "<f4", "<i8", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16)
NAMES = (
    "a.weight", "a.weight_scale", "a.weight_scale_inv", "a.weight_scale_2", "a.weight_packed", "a.weight_shape",
    "a.weight_blocks", "a.weight_scales", "a.weight_zero_point", "a.input_scale", "b", "a.weight_global_scale",
    "a.pre_quant_scale", "a.weight_g_idx", "a.g_idx", "a.qzeros", "a.weight.nested_absmax", "a.weight_format",
)  # fmt: skip

TOGETHER: tuple[tuple[str, ...], ...] = (
    ("a.weight", "a.weight_scale_inv"), ("a.weight", "a.weight_scale"), ("a.weight_blocks", "a.weight_scales"),
    ("a.weight", "a.weight_scale", "a.weight_scale_2"), ("a.weight_packed", "a.weight_scale", "a.weight_shape"),
    ("a.qweight", "a.qzeros", "a.scales", "a.g_idx"), ("a.qweight", "a.qzeros", "a.scales"), ("a.weight", "a.SCB"),
    ("a.weight_packed", "a.weight_scale", "a.weight_shape", "a.weight_zero_point"),
    ("a.weight_packed", "a.weight_scale", "a.weight_global_scale"),
    ("a.weight", "a.weight.absmax", "a.weight.quant_map", "a.weight.quant_state.bitsandbytes__nf4"),
    ("a.weight", "a.scales", "a.biases"), ("a.weight", "a.scales"),
)  # fmt: skip
SHAPES = ((3, 32), (3, 16), (3, 4), (3, 1), (1, 1), (2,), (1,), (), (2, 3, 1, 16), (2, 3, 1))
USUAL: dict[str, tuple[Any, ...]] = {
    "a.weight": (ml_dtypes.float8_e4m3fn, "u1", "i1", "<u4"), "a.weight_packed": ("<i4",), "a.weight_scale": ("<f4",),
    "a.weight_scale_inv": ("<f4",), "a.weight_scale_2": ("<f4",), "a.weight_shape": ("<i8",),
    "a.weight_blocks": ("u1",), "a.weight_scales": ("u1",), "a.input_scale": ("<f4",), "b": ("<f4",),
    "a.qweight": ("<i4",), "a.qzeros": ("<i4",), "a.scales": ("<f4",), "a.g_idx": ("<i4",), "a.SCB": ("<f4",),
    "a.biases": ("<f4",),
    "a.weight_zero_point": ("<i4",), "a.weight_global_scale": ("<f4",), "a.weight.absmax": ("<f4",),
    "a.weight.quant_map": ("<f4",), "a.weight.quant_state.bitsandbytes__nf4": ("u1",),
}  # fmt: skip


@settings(max_examples=500)
@given(st.data(), FACTS)
def test_numbers_or_one_line(data: st.DataObject, facts: dict[str, Any]) -> None:
    tensors = {}
    usual = data.draw(st.sampled_from(TOGETHER))
    for name in {*usual, *data.draw(st.sets(st.sampled_from(NAMES), max_size=1))}:
        shape = data.draw(st.sampled_from(SHAPES) | st.lists(st.integers(0, 5), max_size=4).map(tuple))
        array = np.arange(np.prod(shape, dtype=int) * 8, dtype=np.uint8) % 3
        kind = np.dtype(data.draw(st.sampled_from((*USUAL.get(name, ()) * 8, *KINDS))))
        tensors[name] = from_array(array[: int(np.prod(shape)) * kind.itemsize].view(kind).reshape(shape))
    assert "\n" not in method_of(facts)
    try:
        done = dequantize(tensors, facts, "bfloat16", "x")
    except AnyckptError as error:
        assert "\n" not in str(error)
        return
    for name, tensor in done.tensors.items():
        assert tensor.numpy().shape == tensor.shape, name
