"""What is written for transformers has the names of its classes, whatever the module that was saved was wrapped in."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import open_case
from tests.support import fixture_path, sha256_of, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import hf
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import read
from anyckpt.tensor import LazyTensor, from_array

LLAMA = fixture_path("families/llama/hf")
UNKNOWN = {"model_type": "orion", "architectures": ["OrionForCausalLM"], "num_hidden_layers": 2}


def llama() -> dict[str, LazyTensor]:
    return dict(open_case("llama").checkpoint.tensors)


def folder(tensors: dict[str, LazyTensor], config: dict[str, Any], path: Path) -> Path:
    assert hf.FORMAT.plan is not None
    return write_plan(hf.FORMAT.plan(Checkpoint("x", "hf", tensors, config=config), WriteOptions()), path)


def digests(tensors: dict[str, LazyTensor]) -> dict[str, str]:
    return {name: sha256_of(tensor) for name, tensor in tensors.items()}


def between(name: str) -> str:
    """As activation checkpointing and torch.compile of single layers name them."""
    return name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.").replace("layers.1.", "layers.1._orig_mod.")


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "trl": lambda name: f"pretrained_model.{name}",
    "Lightning": lambda name: f"model.{name}",
    "several": lambda name: f"module._orig_mod.model.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "each layer": between,
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", WRAPPED)
def test_a_folder_of_wrapped_names(how: str, known: bool, tmp_path: Path) -> None:
    config = open_case("llama").checkpoint.config if known else UNKNOWN
    source = folder({WRAPPED[how](name): tensor for name, tensor in llama().items()}, config, tmp_path / "in")
    damaged = anyckpt.verify(source)
    assert not damaged.sound
    assert any("transformers does not find the weights under these names" in p.problem for p in damaged.problems)
    done = anyckpt.convert(source, tmp_path / "out", to="hf")
    assert digests(read(tmp_path / "out").tensors) == digests(llama())
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    assert any("taken off the names" in note for note in done.notes)
    assert anyckpt.verify(tmp_path / "out").sound
    anyckpt.convert(source, tmp_path / "same.safetensors", to="safetensors")
    assert set(read(tmp_path / "same.safetensors").tensors) == set(read(source).tensors)


@pytest.mark.parametrize("known", [True, False])
def test_names_that_are_the_models_own_stay(known: bool, tmp_path: Path) -> None:
    config = open_case("llama").checkpoint.config if known else UNKNOWN
    own = llama()
    headless = {name: tensor for name, tensor in own.items() if name.startswith("model.")}
    bare = {name.removeprefix("model."): tensor for name, tensor in headless.items()}
    seeing = {f"language_model.{name}": tensor for name, tensor in own.items()} | {
        "vision_tower.x": own["lm_head.weight"]
    }
    for number, tensors in enumerate((own, headless, bare, *([] if known else [seeing]))):
        source = folder(tensors, config, tmp_path / f"in{number}")
        done = anyckpt.convert(source, tmp_path / f"out{number}", to="hf")
        assert list(read(tmp_path / f"out{number}").tensors) == list(tensors)
        assert not any("names" in note for note in done.notes)
        assert not any("these names" in p.problem for p in anyckpt.verify(source).problems)


def test_what_is_beside_a_wrapped_model_has_to_be_left_out(tmp_path: Path) -> None:
    tensors = {f"pretrained_model.{name}": tensor for name, tensor in llama().items()}
    tensors["v_head.summary.weight"] = from_array(np.ones((1, 8), "<f4"))
    for number, config in enumerate((open_case("llama").checkpoint.config, UNKNOWN)):
        source = folder(tensors, config, tmp_path / f"in{number}")
        with pytest.raises(MappingError, match=r"v_head.summary.weight.*--exclude"):
            anyckpt.convert(source, tmp_path / "no", to="hf")
        assert not anyckpt.verify(source).sound
        anyckpt.convert(source, tmp_path / f"out{number}", to="hf", exclude="v_head.*")
        assert digests(read(tmp_path / f"out{number}").tensors) == digests(llama())


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    tensors = llama() | {"_orig_mod.model.norm.weight": llama()["model.norm.weight"]}
    source = folder(tensors, open_case("llama").checkpoint.config, tmp_path / "in")
    with pytest.raises(MappingError, match="two names are one without what is wrapped around the model"):
        anyckpt.convert(source, tmp_path / "out", to="hf")


def lightning(tensors: dict[str, LazyTensor], hyper_parameters: dict[str, Any]) -> Checkpoint:
    stored = {f"state_dict.{name}": tensor for name, tensor in tensors.items()}
    return Checkpoint(str(LLAMA), "lightning", stored, model_prefix="state_dict.", config=hyper_parameters)


def test_hyper_parameters_are_no_configuration(tmp_path: Path) -> None:
    source = lightning({f"model.{name}": tensor for name, tensor in llama().items()}, {"lr": 0.1, "name": "x"})
    for to in ("hf", "megatron-lm", "nemo2"):
        with pytest.raises(UsageError, match=r"hyper-parameters of the code that trained it.*--config"):
            anyckpt.convert(source, tmp_path / "out", to=to)
    for config in (open_case("llama").checkpoint.config, UNKNOWN):
        anyckpt.convert(source, tmp_path / "out", to="hf", config=config, overwrite=True)
        assert json.loads((tmp_path / "out/config.json").read_text()) == config
        assert digests(read(tmp_path / "out").tensors) == digests(llama())
    anyckpt.convert(source, tmp_path / "out.safetensors", to="safetensors")


def test_a_prefix_that_nothing_explains_is_told(tmp_path: Path) -> None:
    inner = {f"net.{name}": tensor for name, tensor in llama().items() if name.startswith("model.")}
    done = anyckpt.convert(lightning(inner, {}), tmp_path / "out", to="hf", config=UNKNOWN)
    assert set(read(tmp_path / "out").tensors) == set(inner)
    assert any("all names begin with net., which is kept" in note for note in done.notes)


def test_a_quantized_folder_is_unwrapped_too(tmp_path: Path) -> None:
    case = open_case("llama")
    config = {**case.checkpoint.config, "quantization_config": {"quant_method": "unheard of"}}
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in llama().items()}
    source = replace(case.checkpoint, tensors=wrapped, config=config, quantization=config["quantization_config"])
    anyckpt.convert(source, tmp_path / "out", to="hf")
    assert set(read(tmp_path / "out").tensors) == set(llama())


def test_a_wrapped_model_that_also_sees_is_written_whole(tmp_path: Path) -> None:
    """Where the text part goes through the hub, the other parts are unwrapped with it."""
    own = llama()
    text = {name: value for name, value in open_case("llama").checkpoint.config.items() if name != "architectures"}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text,
              "vision_config": {}}  # fmt: skip
    whole = {f"language_model.{name}": tensor for name, tensor in own.items()}
    whole["vision_tower.x.weight"] = own["model.norm.weight"]
    source = folder({f"module._orig_mod.{name}": tensor for name, tensor in whole.items()}, config, tmp_path / "in")
    anyckpt.convert(source, tmp_path / "out", to="hf", config=config)
    assert digests(read(tmp_path / "out").tensors) == digests(whole)


def state_dict(tensors: dict[str, LazyTensor], path: Path) -> Path:
    return write_plan(Plan("torch", (OutputFile("", zip_parts(tensors)),)), path)


def other_class(kind: str) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """A Llama as another of its classes has it: weights and configuration."""
    config = {**open_case("llama").checkpoint.config, "architectures": [kind]}
    trunk = {name: tensor for name, tensor in llama().items() if name.startswith("model.")}
    if kind.endswith("Classification"):
        width = trunk["model.norm.weight"].shape[0]
        return {**trunk, "score.weight": from_array(np.ones((3, width), "<f4"))}, config
    return {name.removeprefix("model."): tensor for name, tensor in trunk.items()}, config


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaModel", "LlamaForCausalLM"])
def test_a_state_dict_of_another_class_keeps_its_names(kind: str, before: str, tmp_path: Path) -> None:
    tensors, config = other_class(kind)
    named = {before + name: tensor for name, tensor in tensors.items()}
    done = anyckpt.convert(state_dict(named, tmp_path / "a.pt"), tmp_path / "out", to="hf", config=config, dtype="bf16")
    found = read(tmp_path / "out")
    assert set(found.tensors) == set(tensors)
    assert found.config["architectures"] == [kind]
    assert any("taken off" in note for note in done.notes) == bool(before)
    assert any("no rule covers it: score.weight" in note for note in done.notes) == kind.endswith("Classification")
    assert any("AutoModel" in note for note in done.notes) == (kind == "LlamaForCausalLM")
    assert anyckpt.verify(tmp_path / "out").sound


def test_a_state_dict_of_another_class_is_to_be_whole(tmp_path: Path) -> None:
    tensors, config = other_class("LlamaForSequenceClassification")
    convert = partial(anyckpt.convert, destination=tmp_path / "out", to="hf", config=config)
    lacking = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    with pytest.raises(MappingError, match="layer 1 is missing"):
        convert(Checkpoint("x", "safetensors", lacking))
    headless = {name: tensor for name, tensor in tensors.items() if name != "score.weight"}
    with pytest.raises(MappingError, match="the head of LlamaForSequenceClassification is missing"):
        convert(Checkpoint("x", "safetensors", headless))
    nameless = {key: value for key, value in config.items() if key != "architectures"}
    with pytest.raises(MappingError, match=r"lm_head\.weight"):
        anyckpt.convert(Checkpoint("x", "safetensors", tensors), tmp_path / "out", to="hf", config=nameless)
    with pytest.raises(MappingError, match=r"score\.weight"):
        anyckpt.convert(Checkpoint("x", "safetensors", tensors), tmp_path / "out", to="megatron-core", config=config)


@pytest.mark.parametrize("target", ["megatron-core", "megatron-lm", "nemo", "nemo2", "megatron-bridge"])
def test_a_head_that_megatron_has_no_place_for_is_refused_by_its_class(target: str, tmp_path: Path) -> None:
    tensors, config = other_class("LlamaForSequenceClassification")
    source = folder(tensors, config, tmp_path / "in")
    with pytest.raises(
        MappingError,
        match=rf"{target} holds language models, .* the head of LlamaForSequenceClassification .*lm_head\.weight, "
        r"found score\.weight.*convert to hf, safetensors, torch or dcp",
    ):
        anyckpt.convert(source, tmp_path / "out", to=target)
    anyckpt.convert(source, tmp_path / "dcp", to="dcp")
    anyckpt.convert(tmp_path / "dcp", tmp_path / "back", to="hf", config=config)
    assert digests(read(tmp_path / "back").tensors) == digests(tensors)
    lacking = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    with pytest.raises(MappingError, match="layer 1 is missing|tensors of the model are missing"):
        anyckpt.convert(folder(lacking, config, tmp_path / "lacking"), tmp_path / "out", to=target)


def test_what_a_wrapped_model_leaves_out_is_told_by_stored_names(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in llama().items()}
    tensors["model.lm_head.weight"] = tensors["model.model.embed_tokens.weight"]
    config = {**open_case("llama").checkpoint.config, "tie_word_embeddings": True}
    source = state_dict(tensors, tmp_path / "a.pt")
    done = anyckpt.convert(source, tmp_path / "out", to="hf", config=config)
    assert list(done.ignored) == ["model.lm_head.weight"]
