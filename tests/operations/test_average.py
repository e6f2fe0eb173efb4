"""Averaging: exact means against an expectation, over all formats, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path, sha256_of, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint, ParallelLayout, storage_key
from anyckpt.containers.torch_file import zip_parts
from anyckpt.dtypes import dtype
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, MappingError, OutputError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.models.dialects import spellings
from anyckpt.operations.average import average
from anyckpt.operations.steps import weighted_mean as module
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.weighted_mean import Mean
from anyckpt.tensor import LazyTensor, from_array

FIXTURE = "legacy/averaging"
NEMO = ["nemo/nemo1_mp_tp2", "nemo/nemo1_mp_tp2_pp2", "nemo/nemo1_dist_tp1", "nemo/nemo1_dist_tp2"]
LLAMA = "families/llama/hf"


def inputs() -> list[Path]:
    return [fixture_path(f"{FIXTURE}/{name}") for name in expected_of(FIXTURE)["inputs"]]


def saved(path: Path, **tensors: Any) -> Path:
    root = {name: from_array(value) if isinstance(value, np.ndarray) else value for name, value in tensors.items()}
    return write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), path)


def test_the_exact_mean_rounded_once(tmp_path: Path) -> None:
    done = average(inputs(), tmp_path / "mean.ckpt", exclude=["steps", "mask"])
    assert done.format == registry.read(inputs()[0]).format
    found = registry.read(tmp_path / "mean.ckpt")
    assert_tensors_equal_expected(found.weights(), expected_of(FIXTURE)["exact_mean_rounded_once"])
    assert done.notes[0] == "mean of 3 checkpoints"
    assert {name.rpartition(".")[2] for name in done.ignored} >= {"steps", "mask"}


@pytest.mark.parametrize(("excluded", "named"), [("mask", "steps"), ("steps", "mask")])
def test_whole_numbers_and_booleans_that_differ_are_refused(excluded: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=f"{named}.*not averaged.*differs.*--exclude"):
        average(inputs(), tmp_path / "mean.ckpt", exclude=excluded)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_that_are_equal_are_kept(tmp_path: Path) -> None:
    count = np.arange(5)
    flag = np.array([True, False])
    for number in (1, 2):
        saved(tmp_path / f"{number}.pt", w=np.full(3, number, np.float32), count=count, flag=flag)
    average([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "mean.pt")
    found = registry.read(tmp_path / "mean.pt").tensors
    assert found["w"].numpy().tolist() == [1.5] * 3
    assert np.array_equal(found["count"].numpy(), count) and np.array_equal(found["flag"].numpy(), flag)


@pytest.mark.parametrize("target", ["hf", "safetensors", "torch", "nemo", "megatron-core", "megatron-core-zarr", "dcp"])
def test_means_of_equal_checkpoints_in_any_formats_are_the_checkpoint(target: str, tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    for other in ("nemo", "megatron-core"):
        anyckpt.convert(source, tmp_path / other, to=other)
    average([source, tmp_path / "nemo", tmp_path / "megatron-core"], tmp_path / "mean", to=target)
    assert not anyckpt.diff(source, tmp_path / "mean", weights_only=True)
    assert registry.read(tmp_path / "mean").format == target


@pytest.mark.parametrize("first", range(len(NEMO)))
def test_layouts_meet(first: int, tmp_path: Path) -> None:
    """The fixtures hold one model in four layouts."""
    order = [*NEMO[first:], *NEMO[:first]]
    paths = [next(fixture_path(name).glob("*.nemo")) for name in order]
    average(paths, tmp_path / "mean.nemo")
    found = open_checkpoint(tmp_path / "mean.nemo")
    assert found.layout == (registry.read(paths[0]).layout if first < 2 else ParallelLayout())
    assert bool(registry.read(tmp_path / "mean.nemo").ranks) == (first < 2)
    assert found.dialect is not None
    stacked = spellings.rename(found.weights(), found.dialect, "nemo-sharded")[0]
    assert_tensors_equal_expected(stacked, expected_of(order[0])["global_tensors_by_sharded_key"])


def test_layout_of_the_output(tmp_path: Path) -> None:
    paths = [fixture_path(f"{name}/model.nemo") for name in NEMO[:2]]
    average(paths, tmp_path / "mean", to="nemo", layout=LayoutRequest(tensor_parallel=1, pipeline_parallel=2))
    found = registry.read(tmp_path / "mean")
    assert found.layout == ParallelLayout(1, 2) and len(found.ranks) == 2


def test_formats_meet_with_different_values(tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    original = registry.read(source)
    doubled = {name: from_array(tensor.numpy() * np.float32(3)) for name, tensor in original.tensors.items()}
    twin = Checkpoint(**{**vars(original), "tensors": doubled})
    plan = registry.by_name("hf").plan
    assert plan is not None
    write_plan(plan(twin, WriteOptions()), tmp_path / "tripled")
    anyckpt.convert(tmp_path / "tripled", tmp_path / "core", to="megatron-core")
    average([source, tmp_path / "core"], tmp_path / "mean", weights=[3, 1])
    found = registry.read(tmp_path / "mean")
    assert found.format == "hf" and found.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        expected = (tensor.numpy().astype(np.float64) * 3 + doubled[name].numpy()) / 4
        assert np.array_equal(found.tensors[name].numpy(), expected.astype(np.float32)), name


def test_state_of_training_is_left_out(tmp_path: Path) -> None:
    path = next(fixture_path("nemo/ptl_ckpt_nemo3_0_0").glob("*.ckpt"))
    done = average([path, path], tmp_path / "mean.ckpt")
    found = registry.read(tmp_path / "mean.ckpt")
    assert found.format == "lightning" and not found.training.has_optimizer
    for name, tensor in registry.read(path).weights().items():
        assert sha256_of(found.weights()[name]) == sha256_of(tensor)
    assert any("optimizer_states" in name for name in done.ignored)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    for number in (1, 2):
        tensor = from_array(np.full((4, 3), number, np.float32))
        saved(tmp_path / f"{number}.pt", a=tensor, b=tensor, c=np.full((4, 3), number, np.float32))
    average([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "mean.pt")
    found = registry.read(tmp_path / "mean.pt").tensors
    assert storage_key(found["a"]) == storage_key(found["b"]) != storage_key(found["c"])
    assert found["b"].numpy().tolist() == [[1.5] * 3] * 4


def test_a_cast_follows_the_mean(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 1.0 + 2**-7)):
        saved(tmp_path / f"{number}.pt", w=np.full(2, value, np.float32))
    done = average([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "mean.pt", dtype="bf16")
    assert registry.read(tmp_path / "mean.pt").tensors["w"].numpy().astype(float).tolist() == [1.0] * 2
    assert done.casts == {"float32 -> bfloat16": 1}


def test_a_dry_run_and_an_existing_destination(tmp_path: Path) -> None:
    options = {"exclude": ["steps", "mask"]}
    planned = average(inputs(), tmp_path / "mean.ckpt", dry_run=True, **options)
    assert planned.dry_run and not list(tmp_path.iterdir())
    average(inputs(), tmp_path / "mean.ckpt", **options)
    with pytest.raises(OutputError, match="--overwrite"):
        average(inputs(), tmp_path / "mean.ckpt", **options)
    average(inputs(), tmp_path / "mean.ckpt", overwrite=True, **options)
    with pytest.raises(UsageError, match="the same"):
        average([tmp_path / "mean.ckpt", inputs()[0]], tmp_path / "mean.ckpt", overwrite=True)
    with pytest.raises(UsageError, match="the same"):
        average([inputs()[0], tmp_path / "mean.ckpt"], tmp_path / "mean.ckpt", overwrite=True, **options)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (0, None, "two or more"),
        (1, None, "two or more"),
        (3, [1, 1], "3 weights.*2"),
        (3, [0, 0, 0], "no mean"),
        (3, [1, -2, 1], "no mean"),
        (3, [1, float("nan"), 1], "no mean"),
        (3, [1, float("inf"), 1], "no mean"),
        (3, [1e308, 1e308, 1], "no mean"),
    ],
)
def test_weights_that_are_refused(sources: int, weights: list[float] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        average(inputs()[:sources], tmp_path / "mean.ckpt", weights=weights)


def arrays(**tensors: Any) -> dict[str, Any]:
    return {"w": np.zeros((2, 3), np.float32), **tensors}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"v": np.zeros(2, np.float32)}, r"1\.pt.*different names.*expected v.*no such"),
        ({"w": np.zeros((3, 2), np.float32)}, r"'w'.*not of one model.*float32 \(2, 3\).*\(3, 2\)"),
        ({"w": np.zeros((2, 3), np.float64)}, r"'w'.*float32.*float64.*--dtype"),
    ],
)
def test_checkpoints_of_different_models(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "1.pt", **arrays()), saved(tmp_path / "2.pt", **arrays(**other))
    with pytest.raises(MappingError, match=message):
        average([first, second], tmp_path / "mean.pt")
    assert not (tmp_path / "mean.pt").exists()


def test_missing_names_are_of_the_source_that_lacks_them(tmp_path: Path) -> None:
    first = saved(tmp_path / "1.pt", **arrays(v=np.zeros(1, np.float32)))
    second = saved(tmp_path / "2.pt", **arrays())
    with pytest.raises(MappingError, match=r"2\.pt.*different names.*expected v"):
        average([first, second], tmp_path / "mean.pt")


def test_different_families(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="another model family|not of one model"):
        average([fixture_path(LLAMA), fixture_path("families/mistral_swa/hf")], tmp_path / "mean")


def test_a_damaged_source(tmp_path: Path) -> None:
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(inputs()[1].read_bytes()[:300])
    with pytest.raises(FormatError, match=r"bad\.ckpt"):
        average([inputs()[0], bad], tmp_path / "mean.ckpt")


def mean_of(values: Sequence[np.ndarray[Any, Any]], shares: Sequence[float] | None = None) -> LazyTensor:
    return Mean(tuple(from_array(value) for value in values), tuple(shares or [1.0] * len(values)))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 13))
def test_the_mean_of_equal_tensors_is_the_tensor(name: str, seed: int, count: int) -> None:
    kind = dtype(name).numpy
    value = (np.random.default_rng(seed).standard_normal((3, 5)) * 10.0 ** (seed % 9 - 4)).astype(kind)
    found = mean_of([value] * count).numpy()
    if name == "float64":
        assert np.allclose(found, value, rtol=count * 2**-52, atol=0)  # nothing wider to sum in
    else:
        assert found.tobytes() == value.tobytes()


def test_signs_of_zero_and_values_that_are_not_finite() -> None:
    values = np.array([-0.0, np.inf, -np.inf, np.nan, 65504.0], np.float16)
    found = mean_of([values, values]).numpy()
    assert np.signbit(found[0]) and found[1] == np.inf and found[2] == -np.inf
    assert np.isnan(found[3]) and found[4] == 65504.0
    assert np.isnan(mean_of([values[1:2], values[2:3]]).numpy()[0])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_views_of_a_mean_are_means_of_views(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = [rng.standard_normal((4, 3, 6)).astype(np.float32) for _ in range(3)]
    shares = [1.0, 0.25, 3.0]
    whole = sum(value.astype(np.float64) * share for value, share in zip(values, shares, strict=True)) / 4.25
    expected = np.asarray(whole).astype(np.float32)
    mean = mean_of(values, shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ELEMENTS", data.draw(st.sampled_from([8, 25, 1 << 17])))
        assert np.array_equal(mean.numpy(), expected)
        start, stop = sorted((data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))))
        assert np.array_equal(mean[start:stop].numpy(), expected[start:stop])
        assert np.array_equal(mean.permute((2, 0, 1)).numpy(), expected.transpose(2, 0, 1))
        assert np.array_equal(mean.reshape((12, 6))[5:].numpy(), expected.reshape(12, 6)[5:])
        assert np.array_equal(mean.narrow(2, 1, 4).reshape((48,)).numpy(), expected[:, :, 1:5].reshape(48))
