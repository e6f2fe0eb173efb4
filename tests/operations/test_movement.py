"""How far tensors and layers moved."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.operations.steps import movement as module
from anyckpt.operations.steps.compare import compare
from anyckpt.operations.steps.movement import Movement, Sums, by_layer, layer_of, most_moved
from anyckpt.operations.steps.tolerances import Tolerance
from anyckpt.tensor import from_array

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_ELEMENTS", 16)


def moved(a: np.ndarray, b: np.ndarray, name: str = "x") -> Movement:
    sums = Sums()
    compare(from_array(a), from_array(b), Tolerance(), sums=sums)
    return sums.movement(name)


def expected(a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    x, y = (side.astype(np.complex128 if side.dtype.kind == "c" else np.float64).ravel() for side in (a, b))
    norms = np.linalg.norm(x), np.linalg.norm(y)
    gap = np.abs(x - y)
    return (*norms, np.linalg.norm(x - y), gap.max(), gap.mean(), np.vdot(x, y).real / (norms[0] * norms[1]))


def said(movement: Movement) -> tuple[float | None, ...]:
    m = movement
    return m.norm_a, m.norm_b, m.norm_of_difference, m.max_abs, m.mean_abs, m.cosine


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", ml_dtypes.bfloat16, "int32", "uint8", "complex64"])
def test_they_are_numpys(kind: object) -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(1, 100, (7, 9)).astype(kind) for _ in range(2))
    b[:4] = a[:4]  # blocks that are the same, and one that is in part
    found = moved(a, b)
    assert said(found) == pytest.approx(expected(a, b), rel=1e-12)
    assert (found.tensors, found.elements, found.differing) == (1, 63, int((a != b).sum()))
    assert found.relative == pytest.approx(found.norm_of_difference / found.norm_a)


def test_types_may_differ() -> None:
    a, b = np.array([1.0, 2.0], "<f4"), np.array([1.0, 2.5]).astype(ml_dtypes.bfloat16)
    assert said(moved(a, b)) == pytest.approx(expected(a, b))


def test_equal_and_zero_tensors() -> None:
    ones, zeros = np.ones(40), np.zeros(40)
    assert (moved(ones, ones).relative, moved(ones, ones).cosine) == (0.0, pytest.approx(1))
    assert (moved(zeros, zeros).relative, moved(zeros, zeros).cosine) == (0.0, None)
    assert (moved(zeros, ones).relative, moved(zeros, ones).cosine) == (math.inf, None)
    empty = moved(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (empty.relative, empty.mean_abs, empty.max_abs) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("where", [0, 20, 39])
@pytest.mark.parametrize("both", [False, True])
def test_nan_is_nan_in_all_of_it(where: int, both: bool) -> None:
    a, b = np.ones(40), np.ones(40)
    b[where] = np.nan
    if both:
        a[where] = np.nan
    b[(where + 17) % 40] = 2
    found = moved(a, b)
    numbers = (found.relative, found.cosine, found.max_abs, found.mean_abs)
    assert all(value is not None and math.isnan(value) for value in numbers)
    shown = found.to_json()
    assert [shown[key] for key in ("relative", "cosine", "max_abs", "mean_abs")] == ["NaN"] * 4
    layer = by_layer([moved(np.ones(3), np.ones(3), "l.0.a"), Movement("l.0.b", *list(vars(found).values())[1:])])
    assert math.isnan(layer[0].relative)
    assert math.isnan(layer[0].max_abs)


@given(SIZES, st.integers(0, 2**32 - 1))
def test_a_layer_is_as_one_tensor_of_all_its_elements(sizes: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    pairs = [tuple(random.standard_normal((2, size))) for size in sizes]
    (layer,) = by_layer(moved(a, b, f"decoder.layers.3.m{number}.weight") for number, (a, b) in enumerate(pairs))
    whole = moved(*(np.concatenate(side) for side in zip(*pairs, strict=True)), "decoder.layers.3")
    assert said(layer) == pytest.approx(said(whole), rel=1e-9, abs=1e-12)
    assert (layer.name, layer.tensors, layer.elements) == (whole.name, len(sizes), whole.elements)


def test_layers_by_name() -> None:
    assert layer_of("decoder.layers.3.mlp.linear_fc1.weight") == "decoder.layers.3"
    assert layer_of("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight") == "decoder.layers.3"
    assert (
        layer_of("optimizer.exp_avg.decoder.layers.11.mlp.linear_fc1.weight") == "optimizer.exp_avg.decoder.layers.11"
    )
    assert layer_of("embedding.word_embeddings.weight") == "embedding.word_embeddings"
    assert layer_of("weight") == "weight"


def test_orders_put_nan_first_and_leave_out_what_stayed() -> None:
    tensors = {
        "still": moved(np.ones(2), np.ones(2), "still"),
        "far": moved(np.ones(2), np.ones(2) * 9, "far"),
        "turned": moved(np.array([1.0, 0.0]), np.array([0.0, 1.0]), "turned"),
        "nan": moved(np.ones(2), np.array([1, np.nan]), "nan"),
    }
    order = [[m.name for m in most_moved(tensors.values(), key, None)] for key in (None, "name", "relative", "cosine")]
    assert order == [
        ["far", "turned", "nan"],
        ["far", "nan", "turned"],
        ["nan", "far", "turned"],
        ["nan", "turned", "far"],
    ]
    assert [m.name for m in most_moved(tensors.values(), "max", 2)] == ["nan", "far"]
    with pytest.raises(UsageError, match="unknown order"):
        most_moved(tensors.values(), "size", None)


def folder(**arrays: np.ndarray) -> Checkpoint:
    return Checkpoint("made", "safetensors", {name.replace("__", "."): from_array(a) for name, a in arrays.items()})


def test_diff_tells_it_of_every_tensor_and_layer() -> None:
    a = folder(l__0__w=np.ones(4, "<f4"), l__1__w=np.ones(4, "<f4"), l__1__b=np.zeros(2, "<f4"), s=np.ones(3))
    b = folder(l__0__w=np.ones(4, "<f4"), l__1__w=np.full(4, 3, "<f4"), l__1__b=np.zeros(2, "<f4"), s=np.ones(2))
    assert anyckpt.diff(a, b).movements is None
    assert anyckpt.diff(a, b).layers is None
    with pytest.raises(UsageError, match="statistics=True"):
        anyckpt.diff(a, b).most_moved()
    found = anyckpt.diff(a, b, statistics=True)
    assert found.movements is not None
    assert [(m.name, m.relative) for m in found.movements] == [("l.0.w", 0), ("l.1.w", 2), ("l.1.b", 0)]
    assert [(m.name, m.tensors) for m in found.most_moved(layers=True, top=1)] == [("l.1", 2)]
    assert {tensor.name: tensor.reason for tensor in found.different} == {"l.1.w": "values", "s": "shape"}


def test_globs_choose_what_is_compared() -> None:
    a = folder(l__0__w=np.ones(4), l__1__w=np.ones(4), z=np.ones(1))
    b = folder(l__0__w=np.ones(4), l__1__w=np.zeros(4), y=np.ones(1))
    assert anyckpt.diff(a, b, tensors="l.0.*").equal
    found = anyckpt.diff(a, b, tensors=["l.1.*", "y"])
    assert ([tensor.name for tensor in found.different], found.only_in_a, found.only_in_b) == (["l.1.w"], [], ["y"])
    assert not found.complete
    with pytest.raises(UsageError, match=r"no tensor matches q\*"):
        anyckpt.diff(a, b, tensors="q*")


def test_a_tolerance_for_each_type() -> None:
    near = np.array([1.0078125])
    a = folder(half=np.ones(1).astype(ml_dtypes.bfloat16), single=np.ones(1, "<f4"))
    b = folder(half=near.astype(ml_dtypes.bfloat16), single=near.astype("<f4"))

    def differ(**given: object) -> list[str]:
        return [tensor.name for tensor in anyckpt.diff(a, b, **given).different]  # type: ignore[arg-type]

    assert differ() == ["half", "single"]
    assert differ(atol={"bf16": 1e-2}) == ["single"]
    assert differ(rtol={"torch.bfloat16": 1e-2, "fp32": 1e-6}) == ["single"]
    assert differ(atol={"": 1e-2, "float32": 0}) == ["single"]
    assert differ(atol=1e-2) == []
    mixed = folder(half=near.astype("<f4"), single=near.astype("<f4"))
    assert [t.name for t in anyckpt.diff(a, mixed, atol={"bf16": 1e-2, "fp32": 1e-6}).different] == ["single"]
    with pytest.raises(UsageError, match=r"rtol is for an element type.*found bf61"):
        differ(rtol={"bf61": 1})
    with pytest.raises(UsageError, match=r"negative.*atol bfloat16=-1"):
        differ(atol={"bfloat16": -1})


def test_real_models_meet_across_formats(tmp_path: Path) -> None:
    llama = fixture_path("families/llama/hf")
    anyckpt.convert(llama, tmp_path / "core", to="megatron-core", dtype="bfloat16")
    found = anyckpt.diff(llama, tmp_path / "core", statistics=True, weights_only=True)
    assert found.movements is not None
    assert len(found.movements) == found.compared
    assert all(0 < m.relative < 1e-2 and m.cosine is not None and m.cosine > 0.9999 for m in found.most_moved())
    assert [m.name for m in found.layers or ()][:2] == ["embedding.word_embeddings", "decoder.layers.0"]
