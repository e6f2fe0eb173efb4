"""Codes and scales against what NVIDIA ModelOpt 0.40 wrote for the same weights, byte for byte."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import anyckpt
from anyckpt.blockwise import Tiles, keeping
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.dtypes import dtype
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, UsageError
from anyckpt.quantization.largest import ScaleOfTensor
from anyckpt.quantization.numbers import e2m1
from anyckpt.quantization.quantizing import ALGORITHMS, Options, quantized
from anyckpt.quantization.rounding import E4M3, FLOAT4
from anyckpt.tensor import LazyTensor, concatenate, from_array

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quant"
BF16, F16, F32 = (np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32))

LINEARS = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


def expected(case: str, variant: str) -> dict[str, dict[str, Any]]:
    files = json.loads((FIXTURES / case / "expected.json").read_text())["variants"][variant]["files"]
    found: dict[str, dict[str, Any]] = {}
    for file, facts in files.items():
        if file.endswith("safetensors"):
            found |= facts.get("tensors", facts)
    return found


def modules(source: str, *, fused: bool) -> dict[str, LazyTensor]:
    """Linear weights under the names of TensorRT-LLM, with q, k and v as one, or those of Hugging Face."""
    weights = anyckpt.open(FIXTURES / source / "hf").weights()
    found: dict[str, LazyTensor] = {}
    for layer in range(sum(name.endswith("o_proj.weight") for name in weights)):
        one = {name: weights[f"model.layers.{layer}.{name}.weight"] for name in LINEARS}
        if not fused:
            found |= {f"model.layers.{layer}.{name}": weight for name, weight in one.items()}
            continue
        qkv = concatenate([one[f"self_attn.{n}_proj"] for n in "qkv"], 0)
        named = {"attention.qkv": qkv, "attention.dense": one["self_attn.o_proj"]}
        named |= {f"mlp.{a}": one[f"mlp.{b}_proj"] for a, b in (("fc", "gate"), ("gate", "up"), ("proj", "down"))}
        found |= {f"transformer.layers.{layer}.{name}": weight for name, weight in named.items()}
    return found


def together(name: str, found: dict[str, LazyTensor], groups: tuple[tuple[str, ...], ...]) -> tuple[LazyTensor, ...]:
    stem, _, last = name.rpartition(".")
    return next((tuple(found[f"{stem}.{one}"] for one in group) for group in groups if last in group), ())


TENSORRT = (("fc", "gate"),)
HUGGING_FACE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

CASES = [
    ("fp8_bf16_a", "trtllm_tp1pp1", "src_llama_a", "fp8", {}, TENSORRT),
    ("fp8_bf16_a", "hf", "src_llama_a", "fp8", {"rounded": dtype("bfloat16")}, ()),
    ("fp8_pcpt_a", "trtllm_tp1pp1", "src_llama_a", "fp8_per_channel", {}, ()),
    ("int8_wo_a", "trtllm_tp1pp1", "src_llama_a", "int8_wo", {}, ()),
    ("int8_wo_a", "hf", "src_llama_a", "int8_wo", {}, ()),
    ("int4_rtn_a", "trtllm_tp1pp1", "src_llama_a", "int4", {"group_size": 32}, ()),
    ("nvfp4_b", "trtllm_tp1pp1", "src_llama_b", "nvfp4", {}, TENSORRT),
    ("nvfp4_b", "hf", "src_llama_b", "nvfp4", {}, HUGGING_FACE),
]


@pytest.mark.parametrize(
    ("case", "variant", "source", "algorithm", "options", "groups"),
    CASES,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_as_modelopt_writes_it(
    case: str, variant: str, source: str, algorithm: str, options: dict[str, Any], groups: tuple[tuple[str, ...], ...]
) -> None:
    facts, fused = expected(case, variant), variant != "hf"
    scale = "weight_scale" if not fused else "per_channel_scale" if "pcpt" in case else "weights_scaling_factor"
    names = {"weight": "weight", "scale": scale, "scale_2": f"{scale}_2"}
    found = modules(source, fused=fused)
    count = 0
    for name, weight in found.items():
        made = quantized(weight, algorithm, Options(together=together(name, found, groups), **options))
        for role, tensor in made.items():
            fact = facts[f"{name}.{names[role]}"]
            assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == fact["sha256"], (name, role)
            assert tensor.dtype.name == fact["dtype"]
            assert tensor.size == int(np.prod(fact["shape"]))
            assert not fused or list(tensor.shape) == fact["shape"]
            count += 1
    assert count >= 10


def test_blocks_are_modelopts() -> None:
    """But for q, k and v of this model, which are a block each, and which it gives one scale."""
    facts = expected("block_fp8_b", "hf")
    found = modules("src_llama_b", fused=False)
    several = {name: weight for name, weight in found.items() if not name.endswith(("q_proj", "k_proj", "v_proj"))}
    for name, weight in several.items():
        for role, tensor in quantized(weight, "fp8_blocks").items():
            fact = facts[f"{name}.{'weight_scale' if role == 'scale' else role}"]
            if tensor.size > 1 and not (role == "weight" and facts[f"{name}.weight_scale"]["shape"] == []):
                assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == fact["sha256"], (name, role)
    assert len(several) == 4


# -- the arithmetic, element by element -----------------------------------------------------------------------


def every_pattern_between(low: float, high: float) -> np.ndarray[Any, Any]:
    """Numbers around every value at which rounding changes, in float32."""
    steps = np.linspace(low, high, 4001, dtype=np.float32)
    return np.concatenate(
        [np.nextafter(steps, -np.inf, dtype=np.float32), steps, np.nextafter(steps, np.float32(np.inf))]
    )


def test_eight_bit_floats_are_rounded_once() -> None:
    halfway = np.arange(0, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ties = ((halfway[:-1] + halfway[1:]) / 2).astype(np.float32)
    near = [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))]
    random = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 10
    values = np.concatenate([*near, *(-one for one in near), random, every_pattern_between(-0.02, 0.02)])
    out = np.empty(values.size, np.uint8)
    want = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    E4M3.encode(values.copy(), out)
    np.testing.assert_array_equal(out, want)


def test_what_is_too_large_becomes_the_largest() -> None:
    values = np.array([449, 1e30, np.inf, -np.inf, -500, np.nan], np.float32)
    out = np.empty(6, np.uint8)
    E4M3.encode(values.copy(), out)
    assert out.tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0xFE, 0x7F]
    FLOAT4.encode(values.copy(), out)
    assert out.tolist() == [7, 7, 7, 15, 15, 7]


def test_four_bit_floats_round_ties_to_the_even_code() -> None:
    values = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -0.0, 0.2500001, 4.9999995, -0.1], np.float32)
    out = np.empty(values.size, np.uint8)
    FLOAT4.encode(values, out)
    assert out.tolist() == [0, 2, 2, 4, 4, 6, 6, 10, 0, 1, 6, 8]


# -- shapes, blocks and what is wrong with them ---------------------------------------------------------------


def values_of(made: dict[str, LazyTensor], algorithm: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """What codes and scales stand for, computed in the plainest way."""
    codes = made["weight"].numpy()
    scale = made["scale"].numpy()
    if algorithm == "int4":
        pairs = codes.view(np.uint8)
        halves = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*shape).astype(np.int16)
        numbers = (halves - 16 * (halves > 7)).astype(np.float64)
    elif codes.dtype == np.uint8:
        numbers = e2m1()[np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape)].astype(np.float64)
    else:
        numbers = codes.astype(np.float64)
    if algorithm == "mxfp4":
        scale = 2.0 ** (scale.astype(np.float64) - 127)
    if algorithm == "fp8":
        return numbers * float(scale[0])
    scale = scale.astype(np.float64)
    if "scale_2" in made:
        scale = scale * float(made["scale_2"].numpy())
    if scale.ndim < len(shape):
        scale = scale[..., None]
    for axis in (-2, -1):
        each = -(-shape[axis] // scale.shape[axis]) if algorithm != "fp8_blocks" else 128
        scale = np.repeat(scale, each, axis=axis)
    return numbers * scale[..., : shape[-2], : shape[-1]]


TOLERANCE = {"fp8": 1 / 14, "fp8_per_channel": 1 / 14, "fp8_blocks": 1 / 14, "int8_wo": 1 / 250, "int4": 1 / 13.9}
TOLERANCE |= {"mxfp4": 0.26, "nvfp4": 0.19}


@pytest.mark.parametrize("kind", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("shape", [(2, 128), (130, 256), (3, 6, 384), (66, 4096)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_codes_stand_for_the_weight(algorithm: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> None:
    random = np.random.default_rng(len(shape))
    weight = (random.standard_normal(shape) * 0.1).astype(kind)
    weight[..., 0, :] = 0
    made = quantized(from_array(weight), algorithm, Options(group_size=64))
    difference = np.abs(values_of(made, algorithm, shape) - weight.astype(np.float64))
    assert difference.max() <= TOLERANCE[algorithm] * np.abs(weight.astype(np.float64)).max()
    assert difference.mean() < 0.02


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_part_of_the_outputs_is_that_of_the_whole(algorithm: str) -> None:
    weight = from_array(np.random.default_rng(1).standard_normal((160, 256)).astype(BF16))
    whole = {role: tensor.numpy() for role, tensor in quantized(weight, algorithm).items()}
    with keeping(Tiles(1 << 20)):
        for role, tensor in quantized(weight, algorithm).items():
            for start in range(0, tensor.size, 777):
                part = np.empty(min(777, tensor.size - start), tensor.dtype.raw)
                tensor.read_flat(start, part)
                same = whole[role].reshape(-1)[start : start + 777]
                np.testing.assert_array_equal(part.view(np.uint8), same.view(np.uint8))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_scale_is_made_of_what_is_no_number(algorithm: str, bad: float) -> None:
    weight = np.ones((130, 128), BF16)
    weight[129, 5] = bad
    with pytest.raises(FormatError, match="infinite values or not-a-numbers") as caught:
        for tensor in quantized(from_array(weight), algorithm).values():
            tensor.numpy()
    assert "verify --deep" in str(caught.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zeros_have_scales_that_are_no_zeros(algorithm: str) -> None:
    made = quantized(from_array(np.zeros((2, 128), F32)), algorithm)
    assert not values_of(made, algorithm, (2, 128)).any()
    assert algorithm == "mxfp4" or made["scale"].numpy().astype(np.float32).all()


@pytest.mark.parametrize("algorithm", ["fp8_per_channel", "int8_wo", "int4"])
def test_a_scale_too_small_for_its_type_is_the_least_of_it(algorithm: str) -> None:
    least = np.finfo(np.float16).smallest_subnormal
    weight = from_array(np.full((2, 128), least, np.float16))
    made = quantized(weight, algorithm, Options(scale_type=dtype("float16")))
    assert (made["scale"].numpy() == least).all()
    codes = made["weight"].numpy()
    assert (codes == 0x11).all() if algorithm == "int4" else (codes.astype(F32) == 1).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        *product(("fp8_per_channel", "fp8_blocks", "int8_wo", "int4"), (BF16, F32, F16)),
        *product(["mxfp4"], (BF16, F32)),  # whose powers of two go farther than float16
    ],
)
def test_the_largest_numbers_stay_finite(algorithm: str, kind: np.dtype[Any], sign: int) -> None:
    """Of the weight's type and of a scale of that type: what is too large for the codes becomes the largest."""
    weight = np.full((2, 128), ml_dtypes.finfo(kind).max, kind) * np.array(sign, kind)
    scales = ({"scale_type": dtype(kind.name), "wider": True}, {}) if algorithm != "mxfp4" else ({},)
    for options in scales:
        made = quantized(from_array(weight), algorithm, Options(**options))
        with np.errstate(over="ignore"):
            found = values_of(made, algorithm, weight.shape).astype(kind).astype(np.float64)
        assert np.isfinite(found).all()
        assert (np.abs(found / weight.astype(np.float64) - 1) < 0.26).all()


def test_words_are_whole() -> None:
    words = Options(group_size=4, packed_words=True)
    for algorithm, columns, remedy in (
        ("int8_wo", 65, "leave the module"),
        ("int4", 64, "choose another --group-size"),
    ):
        weight = from_array(np.ones((2, columns), F32))
        with pytest.raises(UsageError, match=rf"codes share a word.*multiple of \d columns.*{remedy}"):
            quantized(weight, algorithm, words)


def test_what_cannot_be_quantized() -> None:
    odd, wide = from_array(np.ones((3, 128), F32)), from_array(np.ones((2, 100), F32))
    with pytest.raises(UsageError, match=r"unknown algorithm.*fp8, fp8_per_channel.*nvfp4.*found int3"):
        quantized(odd, "int3")
    with pytest.raises(UsageError, match=r"last row is alone.*found 3.*--quantize-exclude"):
        quantized(odd, "int4")
    for algorithm, group in (("int4", 128), ("mxfp4", 32), ("nvfp4", 16)):
        with pytest.raises(UsageError, match=rf"multiple of {group} columns.*found 100 columns.*--quantize-exclude"):
            quantized(wide, algorithm)
    for thing in (np.ones(8, F32), np.ones((2, 128), np.int32), np.ones((2, 128), ml_dtypes.float8_e4m3fn)):
        with pytest.raises(UsageError, match="a matrix of floating-point numbers"):
            quantized(from_array(thing), "fp8")
    with pytest.raises(UsageError, match="a group must have columns"):
        quantized(odd, "int4", Options(group_size=0))


@given(arrays.arrays(np.float32, (2, 16), elements=st.floats(-1e4, 1e4, width=32)))
def test_rows_of_any_numbers(weight: np.ndarray[Any, Any]) -> None:
    made = quantized(from_array(weight), "int8_wo")
    largest = np.abs(weight.astype(np.float64)).max(axis=1, keepdims=True)
    largest = np.maximum(largest, np.finfo(np.float32).tiny)  # no scale is made of less, as ModelOpt has it
    difference = np.abs(values_of(made, "int8_wo", weight.shape) - weight)
    assert (difference <= largest / 253).all()


def test_threads_find_the_largest_together() -> None:
    weight = np.zeros((2048, 4096), BF16)
    weight[2047, 4095] = -448
    made = quantized(from_array(weight), "fp8")
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(float(made["scale"].numpy()[0]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0] * 4


def test_what_weights_have_together_is_found_once() -> None:
    weights = tuple(from_array(np.full((2, 16), number, F32)) for number in (1.0, 4.0, 2.0))
    made = [quantized(weight, "nvfp4", Options(together=weights)) for weight in weights]
    scales = [one["scale_2"] for one in made]
    assert len({id(scale.scale.largest) for scale in scales if isinstance(scale, ScaleOfTensor)}) == 1
    assert {float(scale.numpy()) for scale in scales} == {float(np.float32(4) / np.float32(2688))}


def test_words_are_those_of_pack_quantized() -> None:
    weight = np.array([[7.5, -7.5, 1, 0, 0, 0, 0, 3] + [0] * 8], F32)
    options = Options(group_size=16, packed_words=True, wider=True)
    made = quantized(from_array(weight), "int4", options)
    words = [bytes([0x0F, 0x89, 0x88, 0xB8]), b"\x88" * 4]
    assert made["weight"].numpy().tolist() == [[int.from_bytes(word, "little", signed=True) for word in words]]
    assert made["scale"].numpy().tolist() == [[1.0]]
    made = quantized(
        from_array(weight), "int8_wo", Options(packed_words=True, wider=True, scale_type=dtype("bfloat16"))
    )
    assert (made["weight"].shape, made["scale"].shape) == ((1, 4), (1, 1))
    assert made["weight"].numpy().view(np.uint8)[0, :2].tolist() == [255, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_outputs_say_what_they_are_and_pickle(algorithm: str) -> None:
    weights = anyckpt.open(FIXTURES / "src_llama_a" / "hf").weights()
    weight, other = (weights[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qo")

    def plan(one: LazyTensor) -> Plan:
        parts = safetensors_parts(quantized(one, algorithm), {})
        return Plan("hf", (OutputFile("model.safetensors", parts),))

    first, again, different = (
        fingerprint(one, []) for one in (plan(weight), pickle.loads(pickle.dumps(plan(weight))), plan(other))
    )
    assert first.obstacle is None
    assert first.value == again.value
    assert first.value != different.value
