"""What no rule knows travels unchanged, or is told: a model that sees is merged, averaged and converted whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.parts import PARTS, RELEASE_4, RELEASE_5, folder, parts, seeing
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import LazyTensor, from_array

LLAMA = fixture_path("families/llama/hf")
ADAPTER = fixture_path("families/lora_llama/hf_adapter")


def same(a: LazyTensor, b: LazyTensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def assert_same(found: dict[str, LazyTensor], expected: dict[str, LazyTensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []


@pytest.mark.parametrize("spelling", [RELEASE_4, RELEASE_5])
def test_an_adapter_of_the_text_leaves_all_else(spelling: tuple[str, str, str], tmp_path: Path) -> None:
    base = seeing(tmp_path / "base", spelling=spelling)
    done = anyckpt.merge_lora(base, ADAPTER, tmp_path / "out")
    anyckpt.merge_lora(LLAMA, ADAPTER, tmp_path / "text")
    found, text = registry.read(tmp_path / "out"), registry.read(tmp_path / "text").tensors
    expected = registry.read(base).tensors
    for name in expected:
        plain = name.replace(spelling[0], "model.") if name.startswith(spelling[0]) else name.split(".", 1)[-1]
        expected[name] = text.get(name if name in text else plain, expected[name])
    assert_same(found.tensors, expected)
    assert found.config == registry.read(base).config
    assert not done.ignored
    assert not any("left out" in note for note in done.notes)


def test_a_target_without_a_place_for_other_parts_is_told(tmp_path: Path) -> None:
    base = seeing(tmp_path / "base")
    for done in (
        anyckpt.merge_lora(base, ADAPTER, tmp_path / "merged", to="nemo"),
        anyckpt.average([base, base], tmp_path / "mean", to="nemo2"),
    ):
        assert set(PARTS) <= done.ignored.keys()
        assert any("only the text part of the seeing model is taken" in note for note in done.notes)


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama_tied_bf16"])
def test_conversions_through_the_hub_keep_all_parts(family: str, tmp_path: Path) -> None:
    base = seeing(tmp_path / "base", family)
    source = registry.read(base)
    known = registry.read(fixture_path(f"families/{family}/hf")).config
    size = source.config["text_config"]["vocab_size"]
    requests: dict[str, dict[str, Any]] = {
        "family": {"family": "llama" if "llama" in known["model_type"] else "gemma3"},
        "config": {"config": base},
        "vocabulary": {"layout": LayoutRequest(vocab_size=size)},
    }
    for name, request in requests.items():
        done = anyckpt.convert(base, tmp_path / name, to="hf", **request)
        found = registry.read(tmp_path / name)
        assert_same(found.tensors, source.tensors)
        assert found.config == source.config
        assert not done.ignored
    anyckpt.convert(base, tmp_path / "smaller", to="hf", layout=LayoutRequest(vocab_size=size - 1))
    smaller = registry.read(tmp_path / "smaller")
    assert smaller.tensors.keys() == source.tensors.keys()
    assert smaller.config["text_config"]["vocab_size"] == size - 1
    assert smaller.tensors["language_model.model.embed_tokens.weight"].shape[0] == size - 1


def test_buffers_of_the_text_stay(tmp_path: Path) -> None:
    source = registry.read(LLAMA)
    frequencies = from_array(np.arange(4, dtype=np.float32))
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    base = folder(tmp_path / "base", {**source.tensors, **dict.fromkeys(names, frequencies)}, source.config)
    done = anyckpt.merge_lora(base, ADAPTER, tmp_path / "out")
    found = registry.read(tmp_path / "out").tensors
    assert all(same(found[name], frequencies) for name in names)
    assert not done.ignored
    done = anyckpt.merge_lora(base, ADAPTER, tmp_path / "core", to="megatron-core")
    assert set(names) <= done.ignored.keys()


def test_the_copy_of_a_tied_embedding_is_told(tmp_path: Path) -> None:
    source = registry.read(fixture_path("families/llama_tied_bf16/hf"))
    copy = {"lm_head.weight": source.tensors["model.embed_tokens.weight"]}
    base = folder(tmp_path / "base", {**source.tensors, **copy}, source.config)
    other = folder(tmp_path / "other", source.tensors, source.config)
    done = anyckpt.average([base, other], tmp_path / "out")
    assert done.ignored["lm_head.weight"] == "tied to model.embed_tokens.weight"


def test_parts_that_one_source_has(tmp_path: Path) -> None:
    base = seeing(tmp_path / "base", factor=3)
    anyckpt.convert(LLAMA, tmp_path / "core", to="megatron-core")
    done = anyckpt.average([base, tmp_path / "core"], tmp_path / "out")
    found, stored, text = (registry.read(p) for p in (tmp_path / "out", base, LLAMA))
    assert found.config == stored.config
    assert found.tensors.keys() == stored.tensors.keys()
    assert all(same(found.tensors[name], stored.tensors[name]) for name in PARTS)
    embedding = found.tensors["language_model.model.embed_tokens.weight"].numpy()
    assert np.allclose(embedding, text.tensors["model.embed_tokens.weight"].numpy() * 2)
    assert any("3 tensors of multi_modal_projector, vision_tower are in base alone" in note for note in done.notes)
    turned = anyckpt.average([tmp_path / "core", base], tmp_path / "text", to="hf")
    assert set(PARTS) <= turned.ignored.keys()
    assert registry.read(tmp_path / "text").tensors.keys() == text.tensors.keys()


def test_two_spellings_meet(tmp_path: Path) -> None:
    old, new = seeing(tmp_path / "old"), seeing(tmp_path / "new", spelling=RELEASE_5, seed=1, factor=3)
    anyckpt.average([old, new], tmp_path / "out")
    found = registry.read(tmp_path / "out").tensors
    assert found.keys() == registry.read(old).tensors.keys()
    for name in PARTS:
        expected = (parts(0)[name].numpy().astype("f8") + parts(1)[name].numpy()) / 2
        assert np.array_equal(found[name].numpy(), expected.astype("f4"))


def test_parts_of_other_names_do_not_meet(tmp_path: Path) -> None:
    old, new = seeing(tmp_path / "old"), seeing(tmp_path / "new", spelling=RELEASE_5)
    source = registry.read(new)
    tensors = {name.replace("projector", "connector"): tensor for name, tensor in source.tensors.items()}
    other = folder(tmp_path / "other", tensors, source.config)
    with pytest.raises(MappingError, match=r"different names.*multi_modal_projector"):
        anyckpt.average([old, other], tmp_path / "out")


# -- what averages take from configurations ------------------------------------------------------------------


def resized(path: Path, rows: int, **changes: Any) -> Path:
    source = registry.read(LLAMA)
    tensors = {name: t.pad(0, rows) if t.shape[0] == 151 else t for name, t in source.tensors.items()}
    return folder(path, tensors, {**source.config, "vocab_size": rows, **changes})


def test_different_vocabularies_are_refused_in_any_order(tmp_path: Path) -> None:
    smaller, larger = resized(tmp_path / "a", 151), resized(tmp_path / "b", 160)
    for order in ([smaller, larger], [larger, smaller]):
        with pytest.raises(UsageError, match=r"different vocabularies.*1\d\d tokens.*--vocab-size"):
            anyckpt.average(order, tmp_path / "out")
    anyckpt.average([larger, smaller], tmp_path / "out", layout=LayoutRequest(vocab_size=151))
    found = registry.read(tmp_path / "out")
    assert found.config["vocab_size"] == 151
    assert found.tensors["lm_head.weight"].shape[0] == 151


def test_other_settings_are_told(tmp_path: Path) -> None:
    other = resized(tmp_path / "other", 151, rms_norm_eps=0.5)
    done = anyckpt.average([LLAMA, other], tmp_path / "out")
    assert any("differ in layernorm_epsilon" in note and "0.5" in note for note in done.notes)
    assert registry.read(tmp_path / "out").config == registry.read(LLAMA).config


def saved(path: Path, **tensors: np.ndarray[Any, Any]) -> Path:
    plan = registry.by_name("safetensors").plan
    assert plan is not None
    made = Checkpoint("made", "torch", {name: from_array(array) for name, array in tensors.items()})
    from tests.support import write_plan

    return write_plan(plan(made, WriteOptions()), path)


def test_task_arithmetic(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(n), w=np.full(3, n, np.float32)) for n in (5, 3, 2)]
    done = anyckpt.average(paths, tmp_path / "out", weights=[1, 1, -1])
    assert registry.read(tmp_path / "out").tensors["w"].numpy().tolist() == [6, 6, 6]
    assert done.notes[0] == "mean of 3 checkpoints, weighted 1, 1, -1 and divided by 1: some are subtracted"
    with pytest.raises(UsageError, match="no mean"):
        anyckpt.average(paths, tmp_path / "none", weights=[1, 1, -2])


def test_counters_of_batches_are_added_up(tmp_path: Path) -> None:
    counted = {"bn.num_batches_tracked": np.array(7), "bn.weight": np.ones(2, np.float32)}
    first = saved(tmp_path / "1", **counted)
    second = saved(tmp_path / "2", **{**counted, "bn.num_batches_tracked": np.array(5)})
    done = anyckpt.average([first, second], tmp_path / "out")
    assert registry.read(tmp_path / "out").tensors["bn.num_batches_tracked"].numpy() == 12
    assert any("added up and not averaged: bn.num_batches_tracked" in note for note in done.notes)
    again = anyckpt.average([first, first], tmp_path / "again")
    assert registry.read(tmp_path / "again").tensors["bn.num_batches_tracked"].numpy() == 7
    assert not any("counters" in note for note in again.notes)
