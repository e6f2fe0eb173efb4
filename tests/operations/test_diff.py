"""What ``diff`` looks at besides the tensors of a known family: other parts, configurations, state."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.parts import PARTS, RELEASE_5, folder, seeing
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file import zip_parts
from anyckpt.containers.torch_file.values import SparseTensor
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.tensor import from_array

LLAMA = fixture_path("families/llama/hf")
RANKS = fixture_path("legacy/megatron_gpt_fp32_optim_tp2")


def test_parts_that_only_one_has_are_a_difference(tmp_path: Path) -> None:
    whole = seeing(tmp_path / "whole")
    source = registry.read(whole)
    text = {name: tensor for name, tensor in source.tensors.items() if name not in PARTS}
    bare = folder(tmp_path / "bare", text, source.config)
    found = anyckpt.diff(whole, bare)
    assert not found.equal
    assert set(found.only_in_a) == set(PARTS)
    assert set(anyckpt.diff(bare, whole).only_in_b) == set(PARTS)
    anyckpt.convert(whole, tmp_path / "core", to="megatron-core")
    assert set(anyckpt.diff(whole, tmp_path / "core").only_in_a) == set(PARTS)


def test_parts_are_compared_by_value_in_any_spelling(tmp_path: Path) -> None:
    old, new = seeing(tmp_path / "old"), seeing(tmp_path / "new", spelling=RELEASE_5)
    found = anyckpt.diff(old, new)
    assert found.equal
    assert found.complete
    assert found.compared == 15 + len(PARTS)
    other = anyckpt.diff(old, seeing(tmp_path / "other", seed=1))
    assert {tensor.name for tensor in other.different} == set(PARTS)


def llama(path: Path, **changes: Any) -> Path:
    source = registry.read(LLAMA)
    return folder(path, source.tensors, {**source.config, **changes})


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("rms_norm_eps", 0.5, "layernorm_epsilon"),
        ("rope_theta", 1.0, "rotary_base"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling"),
        ("eos_token_id", 9, "eos_token_id"),
        ("max_position_embeddings", 17, "max_position_embeddings"),
    ],
)
def test_another_configuration_is_a_difference(key: str, value: Any, field: str, tmp_path: Path) -> None:
    without = {"rope_parameters": None}
    first, second = llama(tmp_path / "first", **without), llama(tmp_path / "second", **without, **{key: value})
    found = anyckpt.diff(first, second)
    assert [setting.name for setting in found.configuration] == [field]
    assert not found.equal
    aside = anyckpt.diff(first, second, weights_only=True)
    assert aside.equal
    assert not aside.complete
    for target in ("nemo", "megatron-core", "megatron-bridge"):
        anyckpt.convert(second, tmp_path / target, to=target)
        assert anyckpt.diff(second, tmp_path / target).equal
        across = anyckpt.diff(first, tmp_path / target)
        assert [setting.name for setting in across.configuration] == ([field] if across.configuration else [])
        assert across.configuration or field == "eos_token_id"  # for which not all have a word
    raw = anyckpt.diff(first, second, raw=True)
    assert [setting.name.partition(".")[0] for setting in raw.configuration] == [key]


def test_spellings_and_versions_are_no_difference(tmp_path: Path) -> None:
    spelled = {"transformers_version": "4.0.0", "torch_dtype": "float32", "dtype": None, "_name_or_path": "x"}
    first, second = llama(tmp_path / "first"), llama(tmp_path / "second", **spelled)
    assert anyckpt.diff(first, second).equal
    assert anyckpt.diff(first, second).complete
    assert anyckpt.diff(first, second, raw=True).equal


def test_configurations_that_tensors_contradict_are_compared_by_meaning(tmp_path: Path) -> None:
    """Of a changed vocabulary, what one side leaves out is what its class takes then."""
    whole = json.loads((LLAMA / "config.json").read_text())
    silent = {"rms_norm_eps": None, "hidden_act": None, "initializer_range": None, "max_position_embeddings": None}
    first = llama(tmp_path / "first", rms_norm_eps=1e-6, hidden_act="silu", max_position_embeddings=64)
    second = llama(tmp_path / "second", vocab_size=whole["vocab_size"] + 8, **silent)
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in silent}))
    found = anyckpt.diff(first, second)
    said = {setting.name: (setting.a, setting.b) for setting in found.configuration}
    sizes = tuple(str(whole["vocab_size"] + more) for more in (0, 8))
    assert said == {"max_position_embeddings": ("64", "2048"), "vocab_size": sizes}
    anyckpt.convert(LLAMA, tmp_path / "core", to="megatron-core")
    with pytest.raises(UsageError, match=r"no tensor name in common.*contradicts the configuration"):
        anyckpt.diff(tmp_path / "core", second)


def test_what_only_one_says_is_told(tmp_path: Path) -> None:
    first, second = llama(tmp_path / "first"), llama(tmp_path / "second", a_switch_of_ours=2.0)
    found = anyckpt.diff(first, second)
    assert found.equal
    assert not found.complete
    assert any("only one of them says a_switch_of_ours" in text for text in found.not_compared)
    other = anyckpt.diff(second, llama(tmp_path / "third", a_switch_of_ours=3.0))
    assert [setting.name for setting in other.configuration] == ["a_switch_of_ours"]


def test_what_changes_the_model_is_a_difference_where_only_one_says_it(tmp_path: Path) -> None:
    first, second = llama(tmp_path / "first"), llama(tmp_path / "second", embedding_multiplier=2.0)
    found = anyckpt.diff(first, second)
    assert not found.equal
    assert [setting.name for setting in found.configuration] == ["embedding_multiplier"]


def test_settings_that_are_not_of_the_model_are_named(tmp_path: Path) -> None:
    """No field of a model has the size of a batch, and yet two archives with another one are not alike."""
    anyckpt.convert(LLAMA, tmp_path / "a.nemo", to="nemo")
    anyckpt.edit(tmp_path / "a.nemo", set={"micro_batch_size": 9, "optim": {"lr": 0.5}}, output=tmp_path / "b.nemo")
    found = anyckpt.diff(tmp_path / "a.nemo", tmp_path / "b.nemo")
    assert found.equal
    assert not found.complete
    [told] = [text for text in found.not_compared if "of the model" in text]
    assert "micro_batch_size (1 in A, 9 in B)" in told
    assert "optim (not said in A, {'lr': 0.5} in B)" in told
    anyckpt.edit(tmp_path / "a.nemo", set={"rotary_base": 9}, output=tmp_path / "c.nemo")
    found = anyckpt.diff(tmp_path / "a.nemo", tmp_path / "c.nemo")
    assert [setting.name for setting in found.configuration] == ["rotary_base"]
    assert not [text for text in found.not_compared if "of the model" in text]


@pytest.mark.parametrize(
    ("key", "value"), [("tie_word_embeddings", True), ("model_type", "llama-of-ours"), ("rope_interleave", True)]
)
def test_settings_that_no_field_tells_are_named(key: str, value: Any, tmp_path: Path) -> None:
    first = llama(tmp_path / "first", rope_interleave=False)
    found = anyckpt.diff(first, llama(tmp_path / "second", **{"rope_interleave": False, key: value}))
    named = [setting.name for setting in found.configuration]
    assert key in named or any(f"{key} (" in text for text in found.not_compared)
    assert not (found.equal and found.complete)


def test_settings_of_adapters_that_scale_nothing_are_named(tmp_path: Path) -> None:
    source = fixture_path("families/lora_llama/hf_adapter")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    file = copy / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": config["target_modules"][::-1], "peft_version": "0"}))
    assert anyckpt.diff(source, copy).complete
    changes = {"base_model_name_or_path": "another", "lora_bias": True, "r": config["r"] * 2}
    file.write_text(json.dumps({**config, **changes}))
    for raw in (False, True):
        found = anyckpt.diff(source, copy, raw=raw)
        assert [setting.name for setting in found.configuration] == ["rank"]
        [told] = [text for text in found.not_compared if "another in B" in text]
        assert "lora_bias (False in A, True in B)" in told


def test_files_of_one_name_with_other_bytes_are_named(tmp_path: Path) -> None:
    """A tokenizer that counts otherwise is another model, though every weight is the same."""
    copy = tmp_path / "copy"
    shutil.copytree(LLAMA, copy)
    assert anyckpt.diff(LLAMA, copy).complete
    for name in ("tokenizer.json", "generation_config.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace("1", "2", 1))
        assert (copy / name).read_text() != text
    found = anyckpt.diff(LLAMA, copy)
    assert found.equal and not found.complete and not found.files
    assert any("generation_config.json, tokenizer.json (the bytes differ)" in text for text in found.not_compared)
    as_stored = anyckpt.diff(LLAMA, copy, raw=True)
    assert not as_stored.equal and as_stored.complete
    assert [file.name for file in as_stored.files] == ["generation_config.json", "tokenizer.json"]
    assert not any("tokenizer" in text for text in as_stored.not_compared)
    digest = hashlib.sha256((copy / "tokenizer.json").read_bytes()).hexdigest()
    assert (as_stored.files[1].b or "").endswith(f" bytes, sha256:{digest}")
    assert as_stored.to_json()["files"][0]["name"] == "generation_config.json"
    assert anyckpt.diff(LLAMA, LLAMA, raw=True).equal
    anyckpt.convert(copy, tmp_path / "copy.nemo", to="nemo")
    across = anyckpt.diff(LLAMA, tmp_path / "copy.nemo")
    assert any("of which each has its own: tokenizer.json (the bytes" in text for text in across.not_compared)


def test_a_configuration_that_only_one_has_is_a_difference(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "x.safetensors", to="safetensors")
    found = anyckpt.diff(LLAMA, tmp_path / "x.safetensors")
    assert [(s.name, s.a, s.b) for s in found.configuration] == [("configuration", "there", None)]
    assert not found.equal
    assert anyckpt.diff(LLAMA, tmp_path / "x.safetensors", weights_only=True).equal
    assert anyckpt.diff(tmp_path / "x.safetensors", tmp_path / "x.safetensors").complete


def test_models_of_no_known_family(tmp_path: Path) -> None:
    tensors = {"w": from_array(np.ones(3, "<f4"))}
    first = folder(tmp_path / "1", tensors, {"model_type": "unheard", "layers": 3, "inner": {"width": 2}})
    second = folder(tmp_path / "2", tensors, {"model_type": "unheard", "layers": 3, "inner": {"width": 4}})
    assert anyckpt.diff(first, first).equal
    found = anyckpt.diff(first, second)
    assert [(s.name, s.a, s.b) for s in found.configuration] == [("inner.width", "2", "4")]


def test_the_copies_that_carry_no_weights_are_told(tmp_path: Path) -> None:
    source = registry.read(LLAMA)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = folder(tmp_path / "more", {**source.tensors, name: from_array(np.ones(4, "<f4"))}, source.config)
    found = anyckpt.diff(LLAMA, more)
    assert found.equal
    assert any(f"not compared: {name}" in note for note in found.notes)


# -- state ---------------------------------------------------------------------------------------------------


def test_moments_and_the_iteration_of_ranks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(RANKS)
    same = anyckpt.diff(RANKS, checkpoint, raw=True)
    assert same.equal
    assert same.complete
    assert same.compared > 2 * len(checkpoint.tensors)
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    name, moments = next(iter(state.slots["exp_avg"].items()))
    changed = replace(state, slots={**state.slots, "exp_avg": {**state.slots["exp_avg"], name: twice(moments)}})
    other = replace(checkpoint, optimizer=lambda: changed)
    assert [tensor.name for tensor in anyckpt.diff(checkpoint, other, raw=True).different] == [
        f"optimizer.exp_avg.{name}"
    ]
    later = replace(
        checkpoint, objects={**checkpoint.objects, "iteration": 8}, training=replace(checkpoint.training, step=8)
    )
    found = anyckpt.diff(checkpoint, later, raw=True)
    assert [(s.name, s.a, s.b) for s in found.state] == [("step", "7", "8"), ("iteration", "7", "8")]
    assert [(s.name, s.a, s.b) for s in anyckpt.diff(checkpoint, later).state] == [("step", "7", "8")]
    aside = anyckpt.diff(checkpoint, later, weights_only=True)
    assert aside.equal
    assert "training state, as asked" in aside.not_compared


def twice(tensor: Any) -> Any:
    return from_array(tensor.numpy() * 2 + 1)


def test_an_optimizer_that_cannot_be_read_is_told() -> None:
    def fail() -> Any:
        raise MappingError("counts do not fit")

    checkpoint = replace(open_checkpoint(RANKS), optimizer=fail)
    found = anyckpt.diff(checkpoint, checkpoint, raw=True)
    assert not found.complete
    assert any("counts do not fit" in text for text in found.not_compared)


def saved(path: Path, **root: Any) -> Path:
    return write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), path)


def test_checkpoints_without_tensors(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "1.pt", epoch=1, seen=[1, 2]), saved(tmp_path / "2.pt", epoch=1, seen=[1, 3])
    for raw in (False, True):
        assert anyckpt.diff(first, first, raw=raw).equal
        found = anyckpt.diff(first, second, raw=raw)
        assert [(s.name, s.a, s.b) for s in found.state] == [("seen.1", "2", "3")]
    full = saved(tmp_path / "3.pt", epoch=1, seen=[1, 2], w=from_array(np.ones(2, "<f4")))
    assert anyckpt.diff(first, full).only_in_b == ["w"]


def test_objects_are_compared(tmp_path: Path) -> None:
    tensor = from_array(np.ones(2, "<f4"))
    first, second = (saved(tmp_path / f"{n}.pt", w=tensor, lr=n / 10, nan=float("nan")) for n in (1, 2))
    assert anyckpt.diff(first, second, weights_only=True).equal
    for raw in (False, True):
        found = anyckpt.diff(first, second, raw=raw)
        assert [(s.name, s.a, s.b) for s in found.state] == [("lr", "0.1", "0.2")]
    assert anyckpt.diff(first, first, raw=True).equal


@pytest.mark.parametrize(
    ("one", "other"), [(0.0, -0.0), ({1: 2}, {"1": 2}), ({1: 2, "1": 3, "a": 0}, {"1": 2, "a": 0})]
)
def test_objects_that_look_alike_and_are_not(one: Any, other: Any) -> None:
    weights = {"w": from_array(np.ones(2, "<f4"))}
    first, second = (Checkpoint("", "torch", weights, objects={"o": {"x": held}}) for held in (one, other))
    for raw in (False, True):
        assert anyckpt.diff(first, first, raw=raw).equal
        assert [s.name.startswith("o.x") for s in anyckpt.diff(first, second, raw=raw).state]
        assert not anyckpt.diff(first, second, raw=raw).equal


def test_tensors_of_several_parts_are_compared_part_by_part(tmp_path: Path) -> None:
    """torch's sparse, quantized and nested tensors."""
    path = fixture_path("legacy/zoo_kinds/zip.pt")
    (tmp_path / "copy.pt").write_bytes(path.read_bytes())
    assert anyckpt.diff(path, tmp_path / "copy.pt", raw=True).equal

    def sparse(*shape: int) -> Checkpoint:
        parts = {"indices": from_array(np.ones((1, 2), "<i8")), "values": from_array(np.ones(2, "<f4"))}
        return Checkpoint("made", "torch", {}, objects={"x": SparseTensor("sparse_coo", shape, parts)})

    assert anyckpt.diff(sparse(3), sparse(3), raw=True).equal
    found = anyckpt.diff(sparse(3), sparse(4), raw=True)
    assert [(s.name, s.a, s.b) for s in found.state] == [("x.shape.0", "3", "4")]


def test_objects_that_refer_to_themselves() -> None:
    one: list[Any] = [1]
    other: list[Any] = [1]
    one.append(one)
    other.append(other)
    made = [Checkpoint("made", "torch", {}, objects={"x": value}) for value in (one, other, [1, [2]])]
    assert anyckpt.diff(made[0], made[1]).equal
    assert not anyckpt.diff(made[0], made[2]).equal
