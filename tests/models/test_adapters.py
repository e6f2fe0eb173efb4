"""Adapters in the hub: names of PEFT and Megatron, canonical and fused form, and the sum with a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.cases import open_case
from tests.models.proofs import Sample, samples
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path

from anyckpt import models
from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError, FormatError, MappingError, UsageError
from anyckpt.models import ModelConfig
from anyckpt.models.adapters import (
    Adapter,
    Layers,
    LowRank,
    Target,
    check_adapter,
    completed,
    fused,
    idle,
    merged,
    of_one_rank,
    read_adapter,
    separated,
    settings_of,
    without_empty,
)
from anyckpt.models.adapters.megatron import from_megatron, to_megatron
from anyckpt.models.adapters.peft_writer import to_peft
from anyckpt.models.adapters.rows import PREFIX
from anyckpt.models.adapters.settings import scale_of
from anyckpt.models.dialects import spellings
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV, Transposed
from anyckpt.models.language.variants import name_in_memory
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.storage import LocalFile
from anyckpt.tensor import Constant, LazyTensor, concatenate, from_array

LORA = "families/lora_llama"
SETTINGS = AdapterSettings(rank=4, alpha=12)
DORA = AdapterSettings(kind="dora", rank=4, alpha=12)
Tensors = dict[str, LazyTensor]


def stored(name: str) -> Tensors:
    return read_safetensors(LocalFile(fixture_path(f"{LORA}/{name}.safetensors")))[0]


def opened(tensors: Mapping[str, LazyTensor], told: AdapterSettings = SETTINGS) -> Checkpoint:
    return Checkpoint("adapter", "peft", dict(tensors), adapter=told)


@pytest.fixture(scope="module")
def layers() -> Layers:
    return Layers(open_case("llama").model)


@pytest.fixture
def peft() -> Tensors:
    return stored("hf_adapter/adapter_model")


def of(tensors: Mapping[str, LazyTensor], layers: Layers, told: AdapterSettings = SETTINGS) -> Adapter:
    return read_adapter(opened(tensors, told), told, layers)


def assert_equal(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert np.array_equal(found[name].numpy(), tensor.numpy()), name


def products(adapter: Adapter) -> dict[Target, np.ndarray]:
    return {
        target: update.scale * (update.up.numpy().astype("f8") @ update.down.numpy().astype("f8"))
        for target, update in adapter.updates.items()
    }


# -- the fixture: tensors whose merged weights and logits were compared with peft's ---------------------------


def test_peft_to_canonical_and_back(peft: Tensors, layers: Layers) -> None:
    adapter = of(peft, layers)
    assert_equal(to_megatron(adapter, "megatron"), stored("megatron_lora_canonical"))
    assert_equal(to_peft(adapter, layers).tensors, peft)
    again = of(stored("megatron_lora_canonical"), layers)
    written = to_peft(again, layers)
    assert_equal(written.tensors, peft)
    known = json.loads(fixture_path(f"{LORA}/hf_adapter/adapter_config.json").read_text())
    assert sorted(known["target_modules"]) == written.settings["target_modules"]
    assert {key: known[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora")} == {
        key: written.settings[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora")
    }


def test_peft_to_fused_and_back(peft: Tensors, layers: Layers) -> None:
    adapter = of(peft, layers)
    assert_equal(to_megatron(fused(adapter, layers), "megatron"), stored("megatron_lora_fused"))
    read = from_megatron(stored("megatron_lora_fused"), lambda weight, rank: 3.0)
    back = separated(read, layers)
    assert products(back).keys() == products(adapter).keys()
    for target, product in products(adapter).items():
        assert np.abs(products(back)[target] - product).max() < 1e-6


def test_merged_weights_are_those_of_the_fixture(peft: Tensors, layers: Layers) -> None:
    adapter = of(peft, layers)
    expected = stored("mcore_merged_layer0")
    for form in (adapter, fused(adapter, layers)):
        found = merged(open_case("llama").hub(), form).tensors
        for name, tensor in expected.items():
            assert np.abs(found[name].numpy() - tensor.numpy()).max() < 2e-7, name
    base = open_case("llama").hub().tensors
    changed = {name for name, tensor in base.items() if not np.array_equal(tensor.numpy(), found[name].numpy())}
    assert changed == {target.weight for target in adapter.updates}


def test_nemo_1_ranks_become_the_canonical_adapter() -> None:
    checkpoint = open_checkpoint(fixture_path("legacy/nemo_lora_tp2_pp2/lora.nemo"))
    assert checkpoint.adapter == AdapterSettings(rank=4, alpha=8, targets=("all",))
    adapter = read_adapter(checkpoint, checkpoint.adapter, None)
    assert {update.scale for update in adapter.updates.values()} == {2.0}
    config = ModelConfig(family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4,
                         num_query_groups=2, kv_channels=2, gated_linear_unit=True)  # fmt: skip
    layers = Layers(replace(open_case("llama").model, config=config))
    tensors = to_megatron(separated(adapter, layers), "nemo1")
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    assert_tensors_equal_expected(named, expected_of("legacy/nemo_lora_tp2_pp2")["canonical"])
    again = from_megatron(named, lambda weight, rank: 2.0)
    assert_equal(to_megatron(fused(again, layers), "nemo1"), checkpoint.tensors)


# -- every tensor counts --------------------------------------------------------------------------------------


def test_each_tensor_is_used_once(peft: Tensors, layers: Layers) -> None:
    whole = facts(of(peft, layers))
    for name in peft:
        with pytest.raises(MappingError) as error:
            of({other: tensor for other, tensor in peft.items() if other != name}, layers)
        assert name.rpartition(".lora_")[0] in str(error.value)
        assert f"has no {name.split('.')[-2]}" in str(error.value)
        rolled = from_array(np.roll(peft[name].numpy(), 1, axis=0))
        changed = facts(of({**peft, name: rolled}, layers))
        assert sum(whole[target] != changed[target] for target in whole) == 1, name


def facts(adapter: Adapter) -> dict[Target, tuple[bytes, bytes]]:
    return {target: (u.down.numpy().tobytes(), u.up.numpy().tobytes()) for target, u in adapter.updates.items()}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight", "x_proj.lora_A.weight"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "layers.7.self_attn.q_proj"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_E", "neither an adapter's factor nor a weight"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight", "two stored tensors are the same"),
    ],
)
def test_a_surplus_tensor_is_named(name: str, problem: str, peft: Tensors, layers: Layers) -> None:
    other = name.replace("lora_A", "lora_B")
    surplus = {name: from_array(np.ones((4, 64), "f4")), other: from_array(np.ones((64, 4), "f4"))}
    with pytest.raises(MappingError, match=problem):
        of({**peft, **surplus}, layers)


@pytest.mark.parametrize("shape", [(4, 65), (3, 64), (4,), (0, 64)])
def test_factors_of_another_shape_are_refused(shape: tuple[int, ...], peft: Tensors, layers: Layers) -> None:
    name = f"{PREFIX}model.layers.1.self_attn.k_proj.lora_A.weight"
    with pytest.raises(MappingError, match=r"layers\.1\.self_attn\.k_proj\.lora_[AB]"):
        of({**peft, name: from_array(np.ones(shape, "f4"))}, layers)


def test_an_adapter_of_another_base_is_refused(peft: Tensors) -> None:
    model = open_case("llama").model
    for changed in ({"hidden_size": 128}, {"num_query_groups": 4}, {"ffn_hidden_size": 96}):
        other = Layers(replace(model, config=replace(model.config, **changed)))
        with pytest.raises(MappingError, match=r"the adapter is of another base model.*--config"):
            of(peft, other)
    with pytest.raises(MappingError, match=r"layers\.1\."):
        of(peft, Layers(replace(model, config=replace(model.config, num_layers=1))))


def test_an_adapter_of_a_tied_output_layer_is_refused() -> None:
    model = open_case("llama_tied_bf16").model
    rows, hidden = model.config.vocab_size, model.config.hidden_size
    tensors = {
        f"{PREFIX}lm_head.lora_A.weight": from_array(np.ones((4, hidden), "f4")),
        f"{PREFIX}lm_head.lora_B.weight": from_array(np.ones((rows, 4), "f4")),
    }
    with pytest.raises(MappingError, match="adapts the output layer, which the model shares with its embedding"):
        of(tensors, Layers(model))
    attended = model.config.num_attention_heads * model.config.kv_channels
    module = f"{PREFIX}model.layers.0.self_attn.o_proj"
    saved = {
        f"{PREFIX}lm_head.weight": from_array(np.ones((rows, hidden), "f4")),
        f"{module}.lora_A.weight": from_array(np.ones((4, attended), "f4")),
        f"{module}.lora_B.weight": from_array(np.ones((hidden, 4), "f4")),
    }
    with pytest.raises(MappingError, match="an output layer of its own, and the base model's is tied"):
        of(saved, Layers(model))


def test_integers_are_no_factors(peft: Tensors, layers: Layers) -> None:
    name = f"{PREFIX}model.layers.1.self_attn.k_proj.lora_A.weight"
    with pytest.raises(MappingError, match="not of floating-point numbers"):
        of({**peft, name: from_array(np.ones((4, 64), "i4"))}, layers)


@pytest.mark.parametrize("drop", [".adapter_q.linear_in.weight", ".linear_proj.adapter.linear_out.weight"])
def test_a_missing_tensor_of_megatrons_is_named(drop: str) -> None:
    tensors = stored("megatron_lora_canonical")
    for name in [name for name in tensors if name.endswith(drop)]:
        del tensors[name]
    with pytest.raises(MappingError, match=r"has no linear_(in|out)\.weight"):
        from_megatron(tensors, lambda weight, rank: 1.0)


def test_no_tensor_is_taken_apart_without_bound() -> None:
    """Shapes without elements cost nothing to store."""
    nothing = Constant(dtype("float32"), (10**9, 1, 0))
    stem = "decoder.layers.0.mlp.experts.linear_fc1.adapter"
    with pytest.raises(MappingError):
        from_megatron({f"{stem}.linear_in.weight": nothing, f"{stem}.linear_out.weight": nothing}, lambda w, rank: 1.0)
    flat = Constant(dtype("float32"), (10**9, 0))
    stem = "decoder.layers.0.mlp.linear_fc2.adapter"
    with pytest.raises(MappingError, match="do not fit together"):
        from_megatron(
            {f"{stem}.linear_in.weight": flat, f"{stem}.linear_out.weight": flat.transpose()}, lambda w, rank: 1.0
        )


def test_whole_and_parts_together_are_refused(layers: Layers) -> None:
    both = {**stored("megatron_lora_canonical"), **stored("megatron_lora_fused")}
    with pytest.raises(MappingError, match="adapts a weight as a whole and in parts"):
        merged(open_case("llama").hub(), from_megatron(both, lambda weight, rank: 1.0))


def test_a_surplus_tensor_of_megatrons_is_named() -> None:
    tensors = {**stored("megatron_lora_canonical"), "decoder.final_layernorm.weight": from_array(np.ones(64, "f4"))}
    with pytest.raises(MappingError, match=r"1 tensors are not of an adapter: decoder\.final_layernorm"):
        from_megatron(tensors, lambda weight, rank: 1.0)
    assert settings_of(Checkpoint("x", "torch", tensors)) is None


# -- names ---------------------------------------------------------------------------------------------------


def test_live_names_and_models_without_a_head(peft: Tensors, layers: Layers) -> None:
    expected = facts(of(peft, layers))
    live = {name.replace(".weight", ".default.weight"): tensor for name, tensor in peft.items()}
    assert facts(of(live, layers)) == expected
    bare = {name.replace("model.model.model.", "model.model."): tensor for name, tensor in peft.items()}
    assert facts(of(bare, layers)) == expected


def test_wrappers_and_stacked_layers_of_megatron(layers: Layers) -> None:
    tensors = stored("megatron_lora_canonical")
    expected = facts(of(tensors, layers))
    for prefix in ("module.", "model.", "model.module."):
        assert facts(of({prefix + name: tensor for name, tensor in tensors.items()}, layers)) == expected
    wrapped = {name.replace(".adapter.", ".to_wrap.adapter.", 1): tensor for name, tensor in tensors.items()}
    assert facts(of(wrapped, layers)) == expected
    old = to_megatron(of(tensors, layers), "nemo1")
    for prefix in ("decoder.", "model.language_model.encoder.", "model.module.language_model.encoder."):
        renamed = {prefix + name.removeprefix("decoder."): tensor for name, tensor in old.items()}
        assert facts(of(renamed, layers)) == expected
    stacked = spellings.from_hub_names(tensors, "nemo2")
    assert len(stacked) == len(tensors) // 2
    assert facts(of(stacked, layers)) == expected


def saved_by_ranks(tensor: LazyTensor, ranks: int, halves: bool) -> LazyTensor:
    """Chunks as a distributed checkpoint of so many ranks has them; with halves as Megatron-Core saves a gated map."""
    whole = tensor.numpy()
    parts = np.split(whole, ranks * (2 if halves else 1))
    order = [*range(0, len(parts), 2), *range(1, len(parts), 2)] if halves else range(len(parts))
    return concatenate([from_array(parts[number]) for number in order], 0)


def test_rows_that_ranks_saved_as_halves(layers: Layers) -> None:
    """Canonical adapters of gate and up are saved so by NeMo 2 and Megatron-Bridge, whatever they hold."""
    tensors = stored("megatron_lora_canonical")
    expected = facts(of(tensors, layers))
    for ranks in (1, 2, 4):
        shuffled = {
            name: saved_by_ranks(tensor, ranks, name.endswith("linear_out.weight"))
            if ".linear_fc1." in name
            else tensor
            for name, tensor in tensors.items()
        }
        assert facts(of(shuffled, layers)) == expected
    fused_tensors = stored("megatron_lora_fused")
    told = AdapterSettings(alpha=12)
    same = {
        name: saved_by_ranks(tensor, 2, False) if "linear_in" in name else tensor
        for name, tensor in fused_tensors.items()
    }
    assert facts(of(same, layers, told)) == facts(of(fused_tensors, layers, told)), "gated: halves are what they seem"
    flat = {name: saved_by_ranks(tensor, 2, ".linear_fc1." in name and "linear_out" in name) if ".linear_fc1." in name
            else tensor for name, tensor in fused_tensors.items()}  # fmt: skip
    found = from_megatron(flat, lambda weight, rank: 1.0, gated=False)
    assert facts(found) == facts(from_megatron(fused_tensors, lambda weight, rank: 1.0))
    assert facts(from_megatron(flat, lambda weight, rank: 1.0, gated=True)) != facts(found)


def test_rows_that_megatron_core_saved_as_halves() -> None:
    """The same from a checkpoint that Megatron-Core's own code made of two ranks' adapters."""
    checkpoint = open_checkpoint(fixture_path("adapters/lora_halves_tp2"))
    named = to_megatron(from_megatron(checkpoint.weights(), lambda weight, rank: 1.0), "megatron")
    assert_tensors_equal_expected(named, expected_of("adapters/lora_halves_tp2")["tensors"])


def test_sections_of_mixers() -> None:
    stem = "decoder.layers.0.mixer.in_proj.adapter"
    whole = from_array(np.arange(40, dtype="f4").reshape(20, 2))
    lengths = {"z": 6, "x": 6, "B": 3, "C": 3, "dt": 2}
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
    tensors = {f"{stem}.linear_in.weight": from_array(np.ones((2, 5), "f4"))}
    for name in ("dt", "z", "B", "x", "C"):
        tensors[f"{stem}.linear_out.weight.{name}"] = whole.narrow(0, starts[name], lengths[name])
    found = from_megatron(tensors, lambda weight, rank: 1.0)
    assert np.array_equal(found.updates[Target("decoder.layers.0.mixer.in_proj.weight")].up.numpy(), whole.numpy())
    del tensors[f"{stem}.linear_out.weight.B"]
    with pytest.raises(MappingError, match=r"section of a mixer's adapter is missing|linear_out\.weight\.B"):
        from_megatron(tensors, lambda weight, rank: 1.0)


def experts(count: int) -> Layers:
    model = open_case("mixtral").model
    return Layers(replace(model, config=replace(model.config, num_moe_experts=count)))


def test_experts() -> None:
    layers = experts(3)
    config = layers.model.config
    rng = np.random.default_rng(0)
    width, hidden = 2 * (config.moe_ffn_hidden_size or 0), config.hidden_size
    down, up = from_array(rng.random((3, 2, hidden), "f4")), from_array(rng.random((3, width, 2), "f4"))
    base = "decoder.layers.0.mlp.experts"
    each = {
        f"{base}.local_experts.{number}.linear_fc1.adapter.linear_{side}.weight": tensor[number]
        for number in range(3)
        for side, tensor in (("in", down), ("out", up))
    }
    named = of(each, layers, AdapterSettings(alpha=2))
    assert [target.weight for target in named.updates] == [f"{base}.linear_fc1.weight{number}" for number in range(3)]
    assert_equal(to_megatron(named, "megatron"), each)
    assert_equal(to_megatron(named, "megatron", 3), {
        f"{base}.linear_fc1.adapter.linear_in.weight": down, f"{base}.linear_fc1.adapter.linear_out.weight": up,
    })  # fmt: skip
    assert_equal(to_megatron(named, "megatron", 4), each)
    with pytest.raises(UsageError, match=r"gate and up projection of an expert as one.*--adapter-form fused"):
        to_megatron(separated(named, layers), "megatron")
    stacked = {f"{base}.linear_fc1.adapter.linear_in.weight": down, f"{base}.linear_fc1.adapter.linear_out.weight": up}
    assert facts(of(stacked, layers, AdapterSettings(alpha=2))) == facts(named)
    shared = {name: tensor[0] for name, tensor in stacked.items()}
    found = of(shared, layers, AdapterSettings(alpha=2))
    assert list(facts(found).values()) == [facts(named)[Target(f"{base}.linear_fc1.weight0")]] * 3
    with pytest.raises(MappingError, match="adapter that all experts share"):
        from_megatron(shared, lambda weight, rank: 1.0)
    check_adapter(Checkpoint("shared", "x", shared))
    with pytest.raises(MappingError, match=r"has no linear_out\.weight"):
        check_adapter(Checkpoint("part", "x", {name: t for name, t in shared.items() if "linear_out" not in name}))
    written = to_peft(named, layers)
    assert {name: tensor.shape for name, tensor in written.tensors.items()} == {
        f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": (6, hidden),
        f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight": (width, 6),
    }
    assert written.settings["target_parameters"] == ["mlp.experts.gate_up_proj"]
    assert facts(of(written.tensors, layers, AdapterSettings(rank=2, alpha=2))) == facts(named)
    apart = to_peft(separated(named, layers), layers)
    assert f"{PREFIX}model.layers.0.block_sparse_moe.experts.2.w3.lora_B.weight" in apart.tensors
    assert len(apart.tensors) == 3 * 2 * 2
    del named.updates[Target(f"{base}.linear_fc1.weight1")]
    assert len(to_peft(named, layers).tensors) == 2 * 2 * 2, "peft adapts all experts of a parameter or none"
    strange = {name: tensor.narrow(1, 0, 5) for name, tensor in written.tensors.items()}
    with pytest.raises(MappingError, match="fits no parameter of the experts"):
        of(strange, layers, AdapterSettings(alpha=2))


# -- every family --------------------------------------------------------------------------------------------


def modules_of(layers: Layers) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """Matrices of a family by module name, whether they are stored as (in, out), and their shape as stored."""
    for item in layers.instances.values():
        operation = item.rule.operation
        rows = operation.on_rows()
        if not item.sources or item.hub.startswith("embedding."):
            continue
        shapes = operation.source_shapes(item.shape, item.config)
        for source, shape in zip(item.sources, shapes, strict=True):
            known = rows is not None and (len(item.sources) == 1 or rows.parts)
            if known and len(item.shape) == 2 and source.endswith(".weight") and not item.rule.of_vocabulary:
                yield source.removesuffix(".weight"), isinstance(operation, Transposed), shape


@pytest.mark.parametrize("sample", samples().values(), ids=samples())
def test_every_family(sample: Sample) -> None:
    """Rules alone map PEFT's names to the hub and back, and the sum is that of Hugging Face's own matrices."""
    checkpoint, model = sample.open()
    layers = Layers(model)
    rng = np.random.default_rng(1)
    adapter: Tensors = {}
    deltas: dict[str, np.ndarray] = {}
    for module, transposed, shape in list(modules_of(layers))[:60]:
        out, into = shape[::-1] if transposed else shape
        down = rng.integers(-4, 5, (2, into)).astype("f4")
        up = rng.integers(-4, 5, (out, 2)).astype("f4")
        adapter[f"{PREFIX}{module}.lora_A.weight"] = from_array(down)
        adapter[f"{PREFIX}{module}.lora_B.weight"] = from_array(up)
        deltas[f"{module}.weight"] = (up @ down).T / 2 if transposed else up @ down / 2
    assert deltas
    found = of(adapter, layers, AdapterSettings(rank=2, alpha=1))
    again = to_peft(found, layers)
    variants = model.definition.hugging_face.variants
    headless = model.definition.hugging_face.headless(model.config)
    prefix = model.definition.hugging_face.prefix if headless else ""
    renamed = {
        PREFIX + name_in_memory(f"{name.removeprefix(PREFIX).rpartition('.lora_')[0]}.weight", variants)
        .removesuffix(".weight").removeprefix(prefix) + f".lora_{name[-8]}.weight": tensor
        for name, tensor in adapter.items()
    }  # fmt: skip
    if not again.settings["target_parameters"]:
        assert_equal(again.tensors, renamed)
    assert facts(of(again.tensors, layers, AdapterSettings(rank=2, alpha=1))) == facts(found)
    hub = models.to_hub(checkpoint, model)
    sums = models.from_hub(merged(hub, found), "hf").tensors
    base = models.from_hub(hub, "hf").tensors
    compared = 0
    for name, delta in deltas.items():
        name = name if name in base else name.partition(".")[2]
        if name in base and base[name].shape == delta.shape:
            exact = base[name].numpy().astype("f4") + delta
            allowed = np.abs(exact) * 2.0**-7 + 1e-6
            assert (np.abs(sums[name].numpy().astype("f4") - exact) <= allowed).all(), name
            assert not np.array_equal(sums[name].numpy(), base[name].numpy())
            compared += 1
    assert compared or "expert" in next(iter(deltas))


# -- forms ---------------------------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    groups = draw(st.integers(1, 3))
    config = ModelConfig(
        family="llama", num_layers=1, hidden_size=draw(st.integers(1, 6)), ffn_hidden_size=draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.integers(1, 3)), num_query_groups=groups, vocab_size=7,
        kv_channels=draw(st.integers(1, 3)), gated_linear_unit=True,
    )  # fmt: skip
    return config, draw(st.integers(1, 3)), draw(st.integers(0, 2**31))


@given(geometries())
@settings(max_examples=60, deadline=None)
def test_forms_are_the_same_function(case: tuple[ModelConfig, int, int]) -> None:
    config, rank, seed = case
    rng = np.random.default_rng(seed)
    layers = Layers(replace(open_case("llama").model, config=config))
    updates: dict[Target, LowRank] = {}

    def whole(*shape: int) -> LazyTensor:
        return from_array(rng.integers(-8, 9, shape).astype("f4"))

    for name, operation in (("self_attention.linear_qkv", INTERLEAVED_QKV), ("mlp.linear_fc1", GATE_UP)):
        weight = f"decoder.layers.0.{name}.weight"
        shapes = operation.source_shapes(layers.instances[weight].shape, config)
        for part, (rows, columns) in zip(operation.parts, shapes, strict=True):
            own = rank + len(part)
            updates[Target(weight, part)] = LowRank(whole(own, columns), whole(rows, own), 2.0, names=(part,))
    canonical = Adapter(updates)
    joined = fused(canonical, layers)
    assert {str(target) for target in joined.updates} == {target.weight for target in updates}
    apart = separated(joined, layers)
    assert products(apart).keys() == products(canonical).keys()
    for target, product in products(canonical).items():
        assert np.array_equal(products(apart)[target], product)
    # once the parts share their first factor, fusing adds nothing
    assert facts(fused(apart, layers)) == facts(joined)
    one, size, alpha = of_one_rank(joined)
    assert {update.rank for update in one.updates.values()} == {size}
    assert alpha == 2.0 * size
    assert all(np.array_equal(products(one)[t], p) for t, p in products(joined).items())


def test_parts_that_are_missing_are_zeros(peft: Tensors, layers: Layers) -> None:
    some = {name: tensor for name, tensor in peft.items() if ".k_proj." not in name and ".up_proj." not in name}
    adapter = of(some, layers)
    joined = fused(adapter, layers)
    assert joined.updates[Target("decoder.layers.0.self_attention.linear_qkv.weight")].rank == 8
    complete, added = completed(adapter, layers)
    assert added == 4
    assert to_megatron(complete, "megatron").keys() == stored("megatron_lora_canonical").keys()
    base = open_case("llama").hub()
    for form in (joined, complete):
        sums = merged(base, form).tensors
        for name, tensor in merged(base, adapter).tensors.items():
            assert np.abs(sums[name].numpy() - tensor.numpy()).max() < 3e-7
    reduced, dropped = without_empty(complete)
    assert dropped == 4
    assert_equal(to_peft(reduced, layers).tensors, some)
    assert [str(target) for target in idle(complete)] == [
        f"decoder.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("mlp.linear_fc1.weight (up)", "self_attention.linear_qkv.weight (k)")
    ]


def test_scales_become_one_if_that_is_exact(peft: Tensors, layers: Layers) -> None:
    told = AdapterSettings(rank=4, alpha=12, alphas={"q_proj": 24, "o_proj": 3})
    adapter = of(peft, layers, told)
    one, rank, alpha = of_one_rank(adapter)
    assert (rank, alpha) == (4, 24.0)
    for target, product in products(adapter).items():
        assert np.array_equal(products(one)[target], product)
    written = to_peft(adapter, layers).settings
    assert (written["lora_alpha"], len(written["alpha_pattern"])) == (12, 4)
    assert written["alpha_pattern"]["model.layers.0.self_attn.q_proj"] == 24
    with pytest.raises(UsageError, match="different scales"):
        of_one_rank(of(peft, layers, replace(told, alphas={"q_proj": 13})))


def test_values_too_small_for_the_common_scale_are_refused(layers: Layers) -> None:
    weight = Target("decoder.layers.0.self_attention.linear_proj.weight")
    small = LowRank(from_array(np.ones((1, 64), "f2")), from_array(np.full((64, 1), 6e-8, "f2")), 1.0, names=("a",))
    large = replace(small, scale=1024.0, up=small.down.transpose())
    one, _, _ = of_one_rank(Adapter({weight: small, Target("decoder.layers.1.mlp.linear_fc2.weight"): large}))
    with pytest.raises(MappingError, match="without rounding"):
        one.updates[weight].up.numpy()


# -- DoRA, rsLoRA, and what else PEFT has ---------------------------------------------------------------------


def dora_of(peft: Tensors, seed: int = 3) -> Tensors:
    rng = np.random.default_rng(seed)
    lengths = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): from_array(
            rng.random(tensor.shape[0]).astype("f4") + 0.5
        )
        for name, tensor in peft.items()
        if "lora_B" in name
    }
    return {**peft, **lengths}


def test_dora(peft: Tensors, layers: Layers) -> None:
    tensors = dora_of(peft)
    adapter = of(tensors, layers, DORA)
    assert_equal(to_peft(adapter, layers).tensors, tensors)
    with pytest.raises(UsageError, match=r"Megatron's DoRA adapts fused weights.*--adapter-form fused"):
        to_megatron(adapter, "megatron")
    joined = fused(adapter, layers)
    named = to_megatron(joined, "megatron")
    assert named["decoder.layers.0.self_attention.linear_qkv.adapter.weight_magnitude"].shape == (128,)
    with pytest.raises(UsageError, match="NeMo 1 has no DoRA"):
        to_megatron(joined, "nemo1")
    base = open_case("llama").hub()
    sums = merged(base, adapter)
    read = from_megatron(named, lambda weight, rank: 3.0)
    for name, tensor in merged(base, read).tensors.items():
        assert np.abs(tensor.numpy() - sums.tensors[name].numpy()).max() < 3e-7, name
    weights = models.from_hub(base, "hf").tensors
    found = models.from_hub(sums, "hf").tensors
    for name in [name for name in tensors if "magnitude" in name]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector")
        down, up = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].numpy().astype("f8") for x in "AB")
        whole = weights[f"{module}.weight"].numpy().astype("f8") + 3 * up @ down
        exact = whole * (tensors[name].numpy() / np.linalg.norm(whole, axis=1))[:, None]
        assert np.abs(found[f"{module}.weight"].numpy() - exact).max() < 1e-6


def test_dora_of_some_parts_is_not_fused(peft: Tensors, layers: Layers) -> None:
    tensors = {name: tensor for name, tensor in dora_of(peft).items() if ".k_proj." not in name}
    with pytest.raises(UsageError, match=r"DoRA adapts only some of the parts.*merge-lora"):
        fused(of(tensors, layers, DORA), layers)


@pytest.mark.parametrize("told", [SETTINGS, DORA, AdapterSettings(alpha=12)])
def test_lengths_of_some_modules_are_refused(told: AdapterSettings, peft: Tensors, layers: Layers) -> None:
    tensors = dora_of(peft)
    del tensors[next(name for name in tensors if "magnitude" in name)]
    with pytest.raises(MappingError, match="contradict each other on DoRA"):
        of(tensors, layers, told)


def test_settings_without_the_lengths_that_they_mean(peft: Tensors, layers: Layers) -> None:
    with pytest.raises(MappingError, match=r"every module, found one without"):
        of(peft, layers, DORA)
    with pytest.raises(MappingError, match=r"no module, found one with it"):
        of(dora_of(peft), layers)
    unknown = AdapterSettings(alpha=12)
    assert of(peft, layers, unknown).updates and of(dora_of(peft), layers, unknown).updates


def test_an_adapter_of_whole_tensors_alone(peft: Tensors, layers: Layers) -> None:
    """What modules_to_save has is the adapter's, without any factors beside it."""
    norm = from_array(np.ones(64, "f4"))
    saved = replace(opened({f"{PREFIX}model.norm.weight": norm}), dialect="peft")
    found = read_adapter(saved, SETTINGS, layers)
    assert not found.updates
    assert found.replaced["decoder.final_layernorm.weight"][0].numpy().tobytes() == norm.numpy().tobytes()
    with pytest.raises(UsageError, match="replaces a whole tensor"):
        to_megatron(of_one_rank(found)[0], "megatron")


def test_an_adapter_of_nothing_is_refused(layers: Layers) -> None:
    with pytest.raises(MappingError, match="the adapter has no tensors; copy the whole adapter"):
        of({}, layers)


def test_scale_of_settings() -> None:
    assert scale_of(AdapterSettings(rank=4, alpha=12), "a.b", 4) == 3.0
    assert scale_of(AdapterSettings(rank=4, alpha=12, rank_stabilized=True), "a.b", 4) == 6.0
    patterns = AdapterSettings(rank=4, alpha=12, ranks={"layers.1.q": 8}, alphas={"^model.layers.1.q": 16})
    assert scale_of(patterns, "model.layers.1.q", 8) == 2.0
    assert scale_of(patterns, "model.layers.11.q", 4) == 3.0
    assert scale_of(AdapterSettings(alpha=4, ranks={r".*\.q": 2}), "a.q", 2) == 2.0
    with pytest.raises(MappingError, match=r"contradict each other on the rank.*expected 8, found 4"):
        scale_of(patterns, "model.layers.1.q", 4)
    with pytest.raises(UsageError, match="--alpha"):
        scale_of(AdapterSettings(rank=4), "a", 4)
    for pattern in ("(a+)+b", "(", "a" * 300, "a*b*c*d*"):
        with pytest.raises(FormatError, match="pattern of module names"):
            scale_of(AdapterSettings(alpha=1, alphas={pattern: 2.0}), "a" * 40, 1)


def test_embeddings_biases_and_whole_tensors(peft: Tensors, layers: Layers) -> None:
    rng = np.random.default_rng(5)

    def some(*shape: int) -> LazyTensor:
        return from_array(rng.standard_normal(shape).astype("f4"))

    rows = layers.model.config.vocab_size
    tensors = {
        **peft,
        f"{PREFIX}model.embed_tokens.lora_embedding_A": some(4, rows),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": some(64, 4),
        f"{PREFIX}model.norm.weight": some(64),
        f"{PREFIX}lm_head.modules_to_save.default.weight": some(rows, 64),
        f"{PREFIX}lm_head.original_module.weight": some(rows, 64),
    }
    adapter = of(tensors, layers)
    hub = open_case("llama").hub()
    found = models.from_hub(merged(hub, adapter), "hf").tensors
    base = models.from_hub(hub, "hf").tensors
    down, up = (tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"].numpy() for x in "AB")
    exact = base["model.embed_tokens.weight"].numpy() + 3 * (up @ down).T
    assert np.abs(found["model.embed_tokens.weight"].numpy() - exact).max() < 1e-5
    for name in ("model.norm.weight", "lm_head.weight"):
        given = tensors.get(PREFIX + name, tensors[f"{PREFIX}lm_head.modules_to_save.default.weight"])
        assert np.array_equal(found[name].numpy(), given.numpy())
    written = to_peft(adapter, layers).tensors
    assert written[f"{PREFIX}model.embed_tokens.lora_embedding_A"].shape == (4, rows)
    with pytest.raises(UsageError, match="replaces a whole tensor"):
        to_megatron(adapter, "megatron")
    with pytest.raises(UsageError, match="Megatron adapts no embeddings"):
        to_megatron(replace(adapter, replaced={}), "megatron")
    grown = {**tensors, f"{PREFIX}model.norm.weight": some(65)}
    with pytest.raises(MappingError, match="replaces a weight by one of another shape"):
        of(grown, layers)


def test_bias_of_an_adapter() -> None:
    case = open_case("qwen2")
    layers = Layers(case.model)
    config = case.model.config
    rows = config.num_attention_heads * config.kv_channels
    rng = np.random.default_rng(6)
    module = f"{PREFIX}model.layers.0.self_attn"
    tensors = {
        f"{module}.q_proj.lora_A.weight": from_array(rng.random((2, config.hidden_size)).astype("f4")),
        f"{module}.q_proj.lora_B.weight": from_array(rng.random((rows, 2)).astype("f4")),
        f"{module}.q_proj.lora_B.bias": from_array(rng.random(rows).astype("f4")),
        f"{module}.v_proj.base_layer.bias": from_array(np.ones(config.num_query_groups * config.kv_channels, "f4")),
    }
    adapter = of(tensors, layers, AdapterSettings(rank=2, alpha=4))
    hub = case.hub()
    base = models.from_hub(hub, "hf").tensors
    found = models.from_hub(merged(hub, adapter, cast=lambda name, weight: dtype("float32")), "hf").tensors
    bias = "model.layers.0.self_attn.q_proj.bias"
    exact = base[bias].numpy().astype("f4") + 2 * tensors[f"{module}.q_proj.lora_B.bias"].numpy()
    assert np.abs(found[bias].numpy().astype("f4") - exact).max() < 2**-7 * np.abs(exact).max()
    assert (found["model.layers.0.self_attn.v_proj.bias"].numpy().astype("f4") == 1).all()
    assert np.array_equal(found["model.layers.0.self_attn.k_proj.bias"].numpy(),
                          base["model.layers.0.self_attn.k_proj.bias"].numpy())  # fmt: skip
    with pytest.raises(UsageError, match="Megatron's adapters have no bias"):
        to_megatron(replace(adapter, replaced={}), "megatron")


def test_two_adapters_in_one_file_are_refused(peft: Tensors, layers: Layers) -> None:
    live = {}
    for name, tensor in peft.items():
        adapter = "default" if "layers.0" in name else "second"
        live[name.replace(".weight", f".{adapter}.weight")] = tensor
    with pytest.raises(MappingError, match=r"more than one adapter.*default, second"):
        of(live, layers)


def test_a_quantized_base_is_refused(peft: Tensors, layers: Layers) -> None:
    hub = open_case("llama").hub()
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    hub.tensors[name] = from_array(np.ones((64, 64), "i1"))
    with pytest.raises(MappingError, match=r"type that no update can be added to.*int8"):
        merged(hub, of(peft, layers))


def test_errors_are_ours() -> None:
    for names in (["base_model.model.x.lora_A.weight"], ["decoder.layers.adapter.linear_in.weight"], [".adapter."]):
        tensors = {name: from_array(np.ones((2, 2), "f4")) for name in names}
        with pytest.raises(AnyckptError):
            read_adapter(Checkpoint("x", "torch", tensors), AdapterSettings(alpha=1), Layers(open_case("llama").model))


def test_factors_are_checked_without_a_base_model() -> None:
    """Also of modules that no family here has, such as convolutions."""
    module = f"{PREFIX}conv_in"
    down, up = from_array(np.ones((4, 3, 2, 2), "f4")), from_array(np.ones((8, 4, 1, 1), "f4"))
    check_adapter(Checkpoint("x", "x", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}))
    with pytest.raises(MappingError, match="different ranks"):
        check_adapter(Checkpoint("x", "x", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": down}))
