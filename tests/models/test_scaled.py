"""Rules whose values change: exact where the number is a power of two, said where it is not."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from anyckpt.config.model import ModelConfig
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.models.language.rule_operations import IDENTITY, INTERLEAVED_KV, INTERLEAVED_QKV, Leading, Scaled
from anyckpt.tensor import Constant, from_array

CONFIG = ModelConfig("t", 1, 8, 8, 2, 2, 4)
ROOT = Scaled(INTERLEAVED_QKV, lambda config: math.sqrt(config.kv_channels))
THIRD = Scaled(IDENTITY, lambda config: 1 / 3)


@pytest.mark.parametrize("kind", ["<f4", "<f8", "<f2", ml_dtypes.bfloat16])
def test_a_power_of_two_is_exact_both_ways(kind: object) -> None:
    parts = [np.random.default_rng(n).standard_normal((8, 3)).astype(kind) for n in range(3)]  # type: ignore[call-overload]
    hub = ROOT.to_hub([from_array(part) for part in parts], CONFIG)
    heads = np.concatenate([part.reshape(2, 4, 3) * factor for part, factor in zip(parts, (2, 1, 1), strict=True)], 1)
    np.testing.assert_array_equal(hub.numpy(), heads.reshape(24, 3).astype(kind))  # type: ignore[call-overload]
    for before, after in zip(parts, ROOT.from_hub(hub, CONFIG), strict=True):
        assert after.numpy().tobytes() == before.tobytes()
    assert ROOT.remark(CONFIG) is None
    assert ROOT.source_shapes((24, 3), CONFIG) == [(8, 3)] * 3


def test_another_number_is_rounded_once_and_said() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(ml_dtypes.bfloat16)
    hub = THIRD.to_hub([from_array(values)], CONFIG).numpy()
    np.testing.assert_array_equal(hub, (values.astype("f4") * np.float32(1 / 3)).astype(ml_dtypes.bfloat16))
    back = THIRD.from_hub(from_array(hub), CONFIG)[0].numpy().astype("f4")
    assert 0 < np.abs(back / values.astype("f4") - 1).max() < 2**-7
    assert "times 0.333333, rounded" in str(THIRD.remark(CONFIG))


def test_what_becomes_infinite_is_refused() -> None:
    large = from_array(np.array([1.0, 6e4], "<f2"))
    doubled = Scaled(IDENTITY, lambda config: 2.0)
    with pytest.raises(MappingError, match="too large to be scaled") as caught:
        doubled.to_hub([large], CONFIG).numpy()
    assert "6e+04" in str(caught.value)
    infinite = from_array(np.array([np.inf], "<f4"))
    assert np.isinf(doubled.to_hub([infinite], CONFIG).numpy()).all()


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(MappingError, match="does not allow"):
        THIRD.to_hub([Constant(dtype("float4_e2m1fn_x2"), (2,))], CONFIG)


def test_key_and_value_by_head() -> None:
    key, value = np.arange(16).reshape(8, 2), 100 + np.arange(16).reshape(8, 2)
    hub = INTERLEAVED_KV.to_hub([from_array(key), from_array(value)], CONFIG)
    np.testing.assert_array_equal(hub.numpy(), np.concatenate([key[:4], value[:4], key[4:], value[4:]]))
    for before, after in zip((key, value), INTERLEAVED_KV.from_hub(hub, CONFIG), strict=True):
        np.testing.assert_array_equal(after.numpy(), before)
    assert INTERLEAVED_KV.source_shapes((16, 2), CONFIG) == [(8, 2)] * 2


@pytest.mark.parametrize(("more", "source", "hub"), [(2, (5,), (1, 1, 5)), (-1, (1, 4, 5), (4, 5))])
def test_leading_axes(more: int, source: tuple[int, ...], hub: tuple[int, ...]) -> None:
    tensor = from_array(np.arange(math.prod(source)).reshape(source))
    assert Leading(more).to_hub([tensor], CONFIG).shape == hub
    assert Leading(more).from_hub(Leading(more).to_hub([tensor], CONFIG), CONFIG)[0].shape == source
    assert Leading(more).source_shapes(hub, CONFIG) == [source]
