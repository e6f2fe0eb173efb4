"""Merging models: mergekit's results, the same ones from any format, and bounded blocks that do not show."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.cases import facts
from tests.operations.test_average import saved
from tests.support import fixture_path

import anyckpt
from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.formats.registry import read
from anyckpt.operations.steps import thinning
from anyckpt.operations.steps.mean_rows import RowSum
from anyckpt.operations.steps.merge_rules import Linear, Updates, slerp
from anyckpt.operations.steps.merged_tensor import Merged
from anyckpt.operations.steps.thinning import ByChance, Whole, chance, largest
from anyckpt.tensor import from_array, reduction

MERGEKIT = fixture_path("mergekit")
CASES = sorted(path.stem for path in MERGEKIT.glob("*.yaml"))
LLAMA = fixture_path("families/llama/hf")
LORA = fixture_path("families/lora_llama/hf_adapter")
NUMBERS: dict[str, Any] = {"weights": [0.7, 1.1], "density": [0.3, 0.6]}
FLOAT32 = dtype("float32")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MERGEKIT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("models")
def test_a_recipe_gives_what_mergekit_gives(case: str, tmp_path: Path) -> None:
    """To the last bit but one of float32: mergekit adds in float32, in another order."""
    anyckpt.merge([], tmp_path / "out", recipe=f"{case}.yaml")
    found, expected = read(tmp_path / "out"), read(MERGEKIT / f"{case}.safetensors").tensors
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        array = tensor.numpy()
        np.testing.assert_allclose(found[name].numpy(), array, rtol=3e-7, atol=3e-7 * np.abs(array).max(), err_msg=name)
    stated = MERGEKIT / f"{case}.config.json"
    if stated.exists():
        layers = json.loads(stated.read_text())["num_hidden_layers"]
        assert found.config["num_hidden_layers"] == layers
    assert anyckpt.verify(tmp_path / "out").sound


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("task_arithmetic", {"weights": [0.7, -1.1]}),
        ("ties", NUMBERS),
        ("dare_ties", {**NUMBERS, "seed": 3}),
        ("dare_linear", {**NUMBERS, "seed": 3}),
    ],
)
@pytest.mark.usefixtures("models")
def test_formats_and_layouts_change_nothing(method: str, numbers: dict[str, Any], tmp_path: Path) -> None:
    """Not what is left of an update either, though the hub has query, key and value in one tensor."""
    anyckpt.convert("a", tmp_path / "a", to="megatron-lm", layout=anyckpt.LayoutRequest(tensor_parallel=2))
    anyckpt.convert("base", tmp_path / "base.nemo", to="nemo")
    anyckpt.merge(["a", "b"], tmp_path / "one", base="base", method=method, **numbers)
    anyckpt.merge([tmp_path / "a", "b"], tmp_path / "two.nemo", base=tmp_path / "base.nemo", method=method, **numbers)
    assert read(tmp_path / "two.nemo").format == "nemo"
    assert anyckpt.diff(tmp_path / "one", tmp_path / "two.nemo").equal


@pytest.mark.usefixtures("models")
def test_names_and_layout_are_those_of_the_leading_model(tmp_path: Path) -> None:
    layout = anyckpt.LayoutRequest(tensor_parallel=2, pipeline_parallel=2)
    anyckpt.convert("a", tmp_path / "ranks", to="megatron-lm", layout=layout)
    anyckpt.merge([tmp_path / "ranks", "b"], tmp_path / "out", method="slerp")
    assert read(tmp_path / "out").layout == read(tmp_path / "ranks").layout
    anyckpt.convert("a", tmp_path / "dcp", to="dcp", names="megatron-core")
    anyckpt.merge([tmp_path / "dcp", "b"], tmp_path / "again", method="slerp", config="a")
    assert read(tmp_path / "again").tensors.keys() == read(tmp_path / "dcp").tensors.keys()


@pytest.mark.usefixtures("models")
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"base": "base", "method": "dare_linear", "density": 0.4}
    anyckpt.merge(["a", "b"], tmp_path / "one", **numbers, workers=1)
    anyckpt.merge(["a", "b"], tmp_path / "two", **numbers, workers=3)
    anyckpt.merge(["a", "b"], tmp_path / "other", **numbers, seed=1)
    assert facts(read(tmp_path / "one").tensors) == facts(read(tmp_path / "two").tensors)
    other = facts(read(tmp_path / "other").tensors)
    assert all(other[name] != fact for name, fact in facts(read(tmp_path / "one").tensors).items())


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_several_adapters(method: str, tmp_path: Path) -> None:
    """Twice half an adapter is the adapter, and half of it is half of it before anything is rounded to 16 bits."""
    anyckpt.convert(LLAMA, tmp_path / "base", to="hf", dtype="bf16")
    anyckpt.merge_lora(tmp_path / "base", LORA, tmp_path / "half", scale=0.5)
    half = [tmp_path / "base", LORA] if method == "linear" else [LORA]
    anyckpt.merge(half, tmp_path / "out_half", base=tmp_path / "base", method=method, weights=[0.5] * len(half))
    assert anyckpt.diff(tmp_path / "out_half", tmp_path / "half").equal
    done = anyckpt.merge([LORA, LORA], tmp_path / "out", base=tmp_path / "base", method=method, weights=[0.5, 0.5])
    anyckpt.merge_lora(tmp_path / "base", LORA, tmp_path / "expected")
    assert anyckpt.diff(tmp_path / "out", tmp_path / "expected").equal
    assert any("LoRA adapter" in note for note in done.notes)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
@pytest.mark.usefixtures("models")
def test_a_base_among_the_sources_has_learned_nothing(method: str, tmp_path: Path) -> None:
    """Nor does its weight count in the divisor: ``group.non_base`` of mergekit 0.1.5's generalized_task_arithmetic."""
    numbers: dict[str, Any] = {"base": "base", "method": method, "normalize": True}
    expected = anyckpt.merge(["a", "b"], tmp_path / "expected", weights=[0.5, 2], **numbers)
    done = anyckpt.merge(["a", "base/", "b"], tmp_path / "out", weights=[0.5, 3, 2], **numbers)
    assert facts(read(tmp_path / "out").tensors) == facts(read(tmp_path / "expected").tensors)
    assert done.notes[: len(expected.notes)] == expected.notes
    assert any("learned nothing over itself" in note for note in done.notes)
    alone = anyckpt.merge(["base"], tmp_path / "alone", **numbers)
    assert alone.notes[0].startswith(f"{method} of nothing over base")
    assert facts(read(tmp_path / "alone").tensors) == facts(read("base").tensors)
    recipe = {"models": [{"model": "base"}], "merge_method": method, "base_model": "base"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    anyckpt.merge([], tmp_path / "of_recipe", recipe=tmp_path / "recipe.yaml")
    assert facts(read(tmp_path / "of_recipe").tensors) == facts(read("base").tensors)


@pytest.mark.usefixtures("models")
def test_slerp_goes_from_the_base_on_however_its_path_is_said(tmp_path: Path) -> None:
    anyckpt.merge(["b", "a"], tmp_path / "out", base="./a/", method="slerp", t=0.2)
    anyckpt.merge(["a", "b"], tmp_path / "expected", method="slerp", t=0.2)
    assert facts(read(tmp_path / "out").tensors) == facts(read(tmp_path / "expected").tensors)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_base_and_an_adapter_of_it_are_two_models(method: str, tmp_path: Path) -> None:
    anyckpt.merge_lora(LLAMA, LORA, tmp_path / "with")
    anyckpt.merge([LLAMA, LORA], tmp_path / "out", base=LLAMA, method=method)
    anyckpt.merge([LLAMA, tmp_path / "with"], tmp_path / "expected", method=method)
    assert anyckpt.diff(tmp_path / "out", tmp_path / "expected", rtol=1e-5, atol=1e-6).equal


def test_nothing_to_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is nothing to merge"):
        anyckpt.merge([], tmp_path / "out", base=LLAMA, method="ties")


def test_training_state_is_left_out_and_told(tmp_path: Path) -> None:
    path = next(fixture_path("nemo/ptl_ckpt_nemo3_0_0").glob("*.ckpt"))
    done = anyckpt.merge([path, path], tmp_path / "out.ckpt", base=path, method="ties", density=0.5)
    assert anyckpt.diff(path, tmp_path / "out.ckpt", weights_only=True).equal
    assert any("optimizer_states" in name for name in done.ignored)


def test_what_is_no_number_is_equal_or_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        saved(tmp_path / f"{number}.pt", w=np.full(3, number, np.float32), steps=np.arange(number))
    with pytest.raises(MappingError, match="not of one model"):
        anyckpt.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt")
    done = anyckpt.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt", weights=[3, -1], exclude="steps")
    assert read(tmp_path / "out.pt")["w"].numpy().tolist() == [0.5] * 3
    assert done.notes[0].endswith("configuration and files are those of the first; weight 3, -1")


def test_models_of_an_unknown_family_meet_under_megatrons_names(tmp_path: Path) -> None:
    source = fixture_path("mcore/gpt_opt_plain/ckpt")
    anyckpt.convert(source, tmp_path / "flat", to="dcp", names="nemo-flat")
    anyckpt.merge([tmp_path / "flat", source], tmp_path / "out", weights=[2, -1])
    assert facts(read(tmp_path / "out").tensors) == facts(read(tmp_path / "flat").tensors)


def test_kinds_of_elements(tmp_path: Path) -> None:
    """Scalars, nothing at all, and complex numbers, of which there is a sum and no order."""
    for number in (1, 2):
        scalar = {"layer.one": np.array(number, np.float32), "layer.two": np.ones(3, np.float32)}
        spins = np.array([number * 1j, 2], np.complex64)
        saved(tmp_path / f"{number}.pt", **scalar, none=np.zeros((0, 3), np.float32), spins=spins)
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    anyckpt.merge(paths, tmp_path / "sum.pt", weights=[3, 1])
    found = read(tmp_path / "sum.pt").tensors
    assert found["layer.one"].numpy() == 1.25 and found["none"].shape == (0, 3)
    assert found["spins"].numpy().tolist() == [1.25j, 2]
    for method in ("ties", "dare_ties"):
        with pytest.raises(UsageError, match=f"complex numbers, which {method} has no rule for"):
            anyckpt.merge(paths[1:], tmp_path / "x.pt", base=paths[0], method=method, density=0.9)
        out = tmp_path / f"{method}.pt"
        anyckpt.merge(paths[1:], out, base=paths[0], method=method, density=0.9, exclude="spins")
        assert read(out)["layer.one"].numpy() >= 1
    anyckpt.merge(paths, tmp_path / "slerp.pt", method="slerp", exclude="spins")
    assert read(tmp_path / "slerp.pt")["layer.one"].numpy() == 1.5


@pytest.mark.parametrize("operation", [anyckpt.merge, anyckpt.average])
@pytest.mark.parametrize("others", [("nf4", "fp4"), ("gptq_4", "gptq_4_act"), ("gptq_4", "awq")])
def test_models_that_are_quantized_otherwise_meet_as_numbers(operation: Any, others: Any, tmp_path: Path) -> None:
    sources = [fixture_path(f"quant/others/{name}") for name in others]
    with pytest.raises(MappingError, match=r"whose numbers may fit: ask for those with --dtype bf16$"):
        operation(sources, tmp_path / "out")
    operation(sources, tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("operation", [anyckpt.merge, anyckpt.average])
def test_a_quantized_model_and_one_that_is_not_meet_as_numbers(operation: Any, tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "codes", to="hf", quantize="fp8")
    for sources in ([LLAMA, tmp_path / "codes"], [tmp_path / "codes", LLAMA]):
        with pytest.raises(MappingError, match=r"--dtype bf16$"):
            operation(sources, tmp_path / "out")
    operation(sources, tmp_path / "out", dtype="fp32")
    gpt2 = fixture_path("families/gpt2/hf")
    with pytest.raises(MappingError) as error:
        operation([tmp_path / "codes", gpt2], tmp_path / "none", dtype="fp32")
    assert "--dtype" not in str(error.value)


def test_what_is_no_tensor_is_told_of(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        saved(tmp_path / name, **{"net.h.w": np.ones(2, np.float32), "net.h.version": 3, "epoch": 1})
    done = anyckpt.merge([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "out.pt")
    assert "no tensor" in done.ignored["net.h.version"]
    assert not read(tmp_path / "out.pt").objects


def recipe_of_layers(path: Path, model: Path, *stretches: list[int]) -> Path:
    slices = [{"sources": [{"model": str(model), "layer_range": stretch}]} for stretch in stretches]
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


@pytest.mark.parametrize("target", ["hf", "nemo", "nemo2", "megatron-core", "megatron-bridge", "megatron-lm"])
def test_layers_put_together_are_a_model_in_any_format(target: str, tmp_path: Path) -> None:
    """Whatever a format says of layers besides, it says of those that are there."""
    anyckpt.convert(LLAMA, tmp_path / "source", to=target)
    for name, source in (("expected", LLAMA), ("found", tmp_path / "source")):
        recipe = recipe_of_layers(tmp_path / "recipe.yaml", source, [0, 2], [1, 2])
        anyckpt.merge([], tmp_path / name, recipe=recipe)
    assert anyckpt.diff(tmp_path / "expected", tmp_path / "found", weights_only=True).equal
    anyckpt.convert(tmp_path / "found", tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_hidden_layers"] == 3


def test_layers_that_a_configuration_cannot_tell_apart_are_not_put_together(tmp_path: Path) -> None:
    """A dense first layer behind one of experts, of which the configuration counts those at the beginning."""
    source = fixture_path("families/deepseek_v3/hf")
    with pytest.raises(UsageError, match=r"first_k_dense_replace.*layers at an end"):
        anyckpt.merge([], tmp_path / "out", recipe=recipe_of_layers(tmp_path / "a.yaml", source, [0, 2], [0, 2]))
    anyckpt.merge([], tmp_path / "out", recipe=recipe_of_layers(tmp_path / "b.yaml", source, [0, 1], [0, 2]))
    assert read(tmp_path / "out").config["first_k_dense_replace"] == 2


def test_layers_of_two_stacks_are_not_put_together(tmp_path: Path) -> None:
    """Whichever of them has as many as the configuration says."""
    anyckpt.convert(fixture_path("families/t5_v1_1/hf"), tmp_path / "source", to="hf", drop_layers="decoder:0")
    with pytest.raises(UsageError, match=r"decoder\.block, encoder\.block"):
        anyckpt.merge([], tmp_path / "out", recipe=recipe_of_layers(tmp_path / "a.yaml", tmp_path / "source", [0, 2]))


def test_what_is_complex_in_one_model_alone_is_refused(tmp_path: Path) -> None:
    """Rather than written without its imaginary parts."""
    saved(tmp_path / "1.pt", one=np.ones(2, np.float32))
    saved(tmp_path / "2.pt", one=np.array([1j, 2], np.complex64))
    with pytest.raises(UsageError, match="tensor 'one': holds complex numbers in some of the models only"):
        anyckpt.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt")
    anyckpt.merge([tmp_path / "2.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    assert read(tmp_path / "out.pt")["one"].numpy().tolist() == [0.5 + 0.5j, 1.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "give the base with --base"),
        ({"method": "task_arithmetic", "base": "base", "density": 0.5}, "--density means nothing to task_arithmetic"),
        ({"method": "slerp", "weights": [1, 2]}, "--weights means nothing to slerp"),
        ({"method": "model_stock"}, "no such way to merge"),
        ({"weights": [1]}, "not a number for each source"),
        ({"weights": [1, -1]}, r"tensor '.*': these weights give no mean.*--no-normalize"),
        ({"weights": [1, -1 + 1e-12]}, "give no mean"),
        ({"method": "ties", "base": "base", "density": 1.5}, "density is not possible .expected numbers from 0 to 1"),
        ({"method": "ties", "base": "base", "density": [0.5, "b"]}, "density is not possible"),
        ({"method": "task_arithmetic", "base": "base", "weights": [float("nan"), 1]}, "weight is not possible"),
        ({"method": "task_arithmetic", "base": "base", "weights": [1e308, 1e308]}, "numbers that float32 can hold"),
        ({"weights": [1e308, 1e308]}, "weight is not possible"),
        ({"method": "slerp", "t": float("inf")}, "t is not possible"),
        ({"method": "ties", "base": "base", "scale": "x"}, "lambda is not possible"),
        ({"base": "base"}, "linear has no base"),
        ({"base": "a"}, "linear has no base"),
        ({"recipe": "ties.yaml"}, "a recipe says itself"),
        ({"names": "nix"}, "nix"),
    ],
)
@pytest.mark.usefixtures("models")
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AnyckptError, match=message):
        anyckpt.merge(["a", "b"], tmp_path / "out", to="torch" if "names" in options else None, **options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_a_base(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give its model with --base"):
        anyckpt.merge([LLAMA, LORA], tmp_path / "out")


# -- blocks ------------------------------------------------------------------------------------------------------------


def boxes(shape: tuple[int, ...]) -> Any:
    return st.tuples(
        *(st.integers(0, n).flatmap(lambda a, n=n: st.tuples(st.just(a), st.integers(a, n))) for n in shape)
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_chance_does_not_depend_on_blocks(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rule = chance(0, "w", 1, 0.5, rescaled=False)
    assert isinstance(rule, ByChance)
    whole = np.ones(shape, np.float32)
    rule(whole, (0,) * len(shape), shape)
    box = data.draw(boxes(shape))
    part = np.ones([b - a for a, b in box], np.float32)
    if part.size:
        rule(part, tuple(a for a, _ in box), shape)
    assert np.array_equal(part, whole[tuple(slice(a, b) for a, b in box)])


def test_chance_leaves_its_share_and_makes_up_for_the_rest() -> None:
    values = np.ones(200_000, np.float32)
    chance(5, "w", 1, 0.3, rescaled=True)(values, (0,), values.shape)
    assert abs(np.count_nonzero(values) / values.size - 0.3) < 0.01
    assert np.allclose(values[values != 0], 1 / 0.3)


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 1e-30, float("inf"), 0.1]), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(1, 7),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_are_exactly_as_many_as_asked_for(values: list[float], density: float, step: int) -> None:
    """Of equal ones the first; whichever runs they are found in, and whichever blocks they are asked for in."""
    update = np.array(values, np.float32)
    base = from_array(np.zeros_like(update))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "SCRATCH_BYTES", 4 * step)
        rule = largest(from_array(update), base, density, rescaled=False)
        found = np.concatenate(
            [_thinned(rule, update[at : at + step], at, update.shape) for at in range(0, len(update), step)]
        )
    count = max(1, int(density * len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(float(update[i])), i))[:count]
    expected = np.where(np.isin(np.arange(len(values)), order), update, 0)
    assert np.array_equal(found, expected)


def _thinned(rule: thinning.Sparsity, values: np.ndarray[Any, Any], at: int, whole: tuple[int, ...]) -> Any:
    part = values.copy()
    rule(part, (at,), whole)
    return part


def test_a_merged_tensor_is_the_same_in_any_boxes() -> None:
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(40, 30)).astype(np.float32) for _ in range(3)]
    children = tuple(map(from_array, arrays))
    thinned = (largest(children[1], children[0], 0.4, rescaled=True), chance(1, "w", 2, 0.5, rescaled=True))
    merged = Merged(children, Updates((0.5, -2.0), thinned, elected=True, normalized=True, scale=0.7), FLOAT32)
    whole = merged.numpy()
    assert np.array_equal(merged.T.numpy(), whole.T)
    assert np.array_equal(merged[3:17, 5:].numpy(), whole[3:17, 5:])
    assert np.array_equal(merged.reshape((20, 60))[1:].numpy(), whole.reshape(20, 60)[1:])


def test_rules_against_their_formulas() -> None:
    random = np.random.default_rng(1)
    a, b = (random.normal(size=500).astype(np.float32) for _ in range(2))
    children = (from_array(a), from_array(b))
    assert np.allclose(Merged(children, Linear((2.0, -1.0)), FLOAT32).numpy(), 2 * a - b)
    theta = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    expected = (np.sin(0.7 * theta) * a + np.sin(0.3 * theta) * b) / np.sin(theta)
    assert np.allclose(Merged(children, slerp(0.3, *children), FLOAT32).numpy(), expected, atol=1e-6)
    parallel = (children[0], from_array(3 * a))
    assert np.allclose(Merged(parallel, slerp(0.5, *parallel), FLOAT32).numpy(), 2 * a, atol=1e-6)
    opposite = (children[0], from_array(-3 * a))
    assert np.allclose(Merged(opposite, slerp(0.25, *opposite), FLOAT32).numpy(), 0 * a, atol=1e-6)
    nothing = (from_array(0 * a), children[1])
    quarter = np.sin(np.pi / 8)  # as mergekit 0.1.5 has it: nothing is at a right angle to all
    assert np.allclose(Merged(nothing, slerp(0.25, *nothing), FLOAT32).numpy(), quarter * b, atol=1e-6)
    update = Merged(children, Updates((0.5,), (Whole(),), scale=2.0), FLOAT32).numpy()
    assert np.allclose(update, b, atol=1e-6)


def test_numbers_of_which_some_are_wider_are_computed_in_64_bits() -> None:
    random = np.random.default_rng(2)
    a, b = random.normal(size=500).astype(np.float32), random.normal(size=500).astype(np.float16)
    found = Merged((from_array(a), from_array(b)), Linear((0.3, 1.7), 2.0), FLOAT32).numpy()
    assert np.array_equal(found, ((0.3 * a.astype(np.float64) + 1.7 * b.astype(np.float64)) / 2).astype(np.float32))


def test_where_signs_are_even_the_positive_ones_are_elected() -> None:
    """``sign_weight >= 0`` of mergekit's ``get_mask``."""
    children = tuple(from_array(np.array([value], np.float32)) for value in (1, 2, 0))
    assert Merged(children, Updates((1, 1), (Whole(), Whole()), elected=True), FLOAT32).numpy() == 2


def test_what_is_left_at_the_ends() -> None:
    """All but of a share that rounds to all; of nothing at all nothing, however it is scaled; of differences in
    float64 the largest, though they are none in float32; and each model has chances of its own."""
    values = np.ones(100, np.float32)
    chance(0, "w", 1, 1 - 1e-12, rescaled=False)(values, (0,), values.shape)
    assert values.all()
    zeros = from_array(np.zeros(8, np.float32))
    assert not _thinned(largest(zeros, zeros, 0.5, rescaled=True), np.zeros(8, np.float32), 0, (8,)).any()
    base, more = np.ones(3), np.array([1e-12, 3e-12, 2e-12])
    rule = largest(from_array(base + more), from_array(base), 0.4, rescaled=False)
    assert np.flatnonzero(_thinned(rule, (base + more) - base, 0, (3,))).tolist() == [1]
    first, second = (
        _thinned(chance(0, "w", model, 0.5, rescaled=False), np.ones(100, np.float32), 0, (100,)) for model in (1, 2)
    )
    assert not np.array_equal(first, second)


def test_a_reduction_begins_again_after_a_file_could_not_be_read() -> None:
    calls = []

    class Counted(reduction.Reduction[int]):
        def nothing(self) -> int:
            return 0

        def look_at(self, arrays: Any, group: int, start: int) -> int:
            calls.append(start)
            if len(calls) == 2:
                raise OSError
            return len(arrays[0])

        def join(self, first: int, second: int) -> int:
            return first + second

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "SCRATCH_BYTES", 8)
        counted = Counted([(from_array(np.zeros(7, np.float32)),)])
        with pytest.raises(OSError):
            counted.value()
        assert counted.value() == 7
        assert counted.value() == 7 and len(calls) == 6


class Listed(reduction.Reduction[list[int]]):
    """The starts of runs in the order in which they were joined; the first of all is read last."""

    def __init__(self, size: int) -> None:
        super().__init__([(from_array(np.zeros(size, np.float32)),)])
        self.others = threading.Event()
        self.looked_at: list[int] = []

    def nothing(self) -> list[int]:
        return []

    def look_at(self, arrays: Any, group: int, start: int) -> list[int]:
        if not start:
            self.others.wait(10)
        self.looked_at.append(start)
        if len(self.looked_at) == 3:
            self.others.set()
        return [start]

    def join(self, first: list[int], second: list[int]) -> list[int]:
        return first + second


def test_a_reduction_joins_runs_in_order_and_holds_few_that_wait() -> None:
    """However slow the thread with the first one is: sums of rounded numbers depend on their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "SCRATCH_BYTES", 4)
        patch.setattr(reduction, "_MOST_EARLY", 3)
        listed = Listed(40)
        with ThreadPoolExecutor(3) as pool:
            found = [each.result() for each in [pool.submit(listed.value) for _ in range(3)]]
        assert found == [[*range(40)]] * 3
        assert listed.looked_at.index(0) == 3


def test_of_one_sum_of_rows_no_more_is_held_than_a_row() -> None:
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "SCRATCH_BYTES", 8)
        total = RowSum([(from_array(values),)])
        assert total.value().tolist() == values.sum(axis=0).tolist()


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "model_stock"}, "merge_method model_stock"),
        ({"chat_template": "auto"}, "chat_template"),
        ({"modules": {"a": 1}}, "modules"),
        ({"strange": 1}, "the key strange"),
        ({"parameters": {"gamma": 0.1}}, "the parameter gamma"),
        ({"parameters": {"density": "much"}}, "density is not possible"),
        ({"parameters": {"density": [0.5, 2]}}, "density is not possible .expected numbers from 0 to 1"),
        ({"parameters": {"normalize": 1}}, "normalize is not possible"),
        ({"dtype": "float8"}, "dtype float8"),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "tokenizer with more than a source"),
        ({"tokenizer_source": "elsewhere"}, "tokenizer_source elsewhere"),
        ({"models": [{"model": "a"}, {"model": "b"}]}, "needs the parameter 'weight'"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "names a model twice"),
        ({"models": [{"model": "a", "layers": 3}]}, "the key layers of models"),
        ({"models": [{"model": "who/knows"}]}, "who/knows, which is not here.*write hf:who/knows"),
        ({"models": []}, "no list of entries"),
        ({"slices": []}, "models or slices"),
        ({"base_model": None}, "give the base"),
    ],
)
@pytest.mark.usefixtures("models")
def test_keys_that_are_not_done_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = {**yaml.safe_load((MERGEKIT / "ties.yaml").read_text()), **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match=message):
        anyckpt.merge([], tmp_path / "out", recipe=tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_weight": 1.0}, "residual_weight"),
        ({"base_model": "b"}, "base_model"),
        ({"sources": [{"model": "a", "layer_range": [0, 9]}]}, "not so many layers"),
        ({"sources": [{"model": "a"}]}, "no layer_range"),
        ({"sources": [{"model": "a", "layer_range": [3, 3]}]}, "empty layer_range"),
        (
            {"sources": [{"model": n, "layer_range": [0, 2]} for n in "ab"]},
            "different numbers of sources|another number",
        ),
    ],
)
@pytest.mark.usefixtures("models")
def test_slices_that_are_not_done_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load((MERGEKIT / "passthrough.yaml").read_text())
    recipe["slices"][1].update(changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match=message):
        anyckpt.merge([], tmp_path / "out", recipe=tmp_path / "recipe.yaml")


def test_a_recipe_with_an_adapter_and_types(tmp_path: Path) -> None:
    recipe = {
        "models": [{"model": f"{LLAMA}+{LORA}", "parameters": {"weight": 1.0}}],
        "merge_method": "task_arithmetic",
        "base_model": str(LLAMA),
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer_source": "union",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    anyckpt.merge([], tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    anyckpt.merge_lora(LLAMA, LORA, tmp_path / "expected", dtype="bf16")
    assert anyckpt.diff(tmp_path / "out", tmp_path / "expected").equal


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, None), ("base", "base"), ("a", "a"), ("union", "the tokenizers differ")],
)
def test_the_tokenizer_that_a_recipe_asks_for(
    method: str, said: str | None, expected: str | None, tmp_path: Path
) -> None:
    """That of the leading model, which is the first one for linear, where nothing is said."""
    paths = {name: str(tmp_path / name) for name in ("a", "base")}
    for name, path in paths.items():
        shutil.copytree(LLAMA, path)
        tokens = Path(path, "tokenizer.json")
        tokens.write_text(tokens.read_text() + " " * len(name))
    recipe = {
        "models": [{"model": path, "parameters": {"weight": 1}} for path in paths.values()],
        "merge_method": method,
        "base_model": paths["base"],
        "tokenizer_source": paths["a"] if said == "a" else said,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if said == "union":
        with pytest.raises(UsageError, match=expected):
            anyckpt.merge([], tmp_path / "out", recipe=tmp_path / "recipe.yaml")
        return
    anyckpt.merge([], tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    owner = paths[expected or ("a" if method == "linear" else "base")]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == Path(owner, "tokenizer.json").read_bytes()


def test_models_that_call_their_layers_otherwise_are_not_put_together(tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": str(fixture_path(f"families/{family}/hf")), "layer_range": [0, 1]}]}
        for family in ("llama", "gpt2")
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    with pytest.raises(MappingError, match="name their layers differently .expected model.layers, found "):
        anyckpt.merge([], tmp_path / "out", recipe=tmp_path / "recipe.yaml")
