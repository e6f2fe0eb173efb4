"""Namings that other packages bring: to the hub and back, recognised, and refused where names collide."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models.cases import facts, open_case, with_weights

import anyckpt
from anyckpt import models
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.dialects import external as other_dialects
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.external import OtherDialect

HUBS = {rule.hub: None for family in ("llama", "mixtral") for rule in models.by_name(family).rules}
BLOCKS = OtherDialect(
    name="blocks",
    names=(
        ("embedding.word_embeddings.weight", "tok.weight"),
        *((hub, hub.replace("decoder.layers.", "blocks.")) for hub in HUBS if hub.startswith("decoder.layers.")),
    ),
    evidence=("tok.weight", "blocks.*.self_attention.linear_qkv.weight"),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_dialects, "other_dialects", lambda: {BLOCKS.name: BLOCKS})
    monkeypatch.setattr(spellings, "other_dialects", lambda: {BLOCKS.name: BLOCKS})


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_there_and_back(name: str) -> None:
    case = open_case(name)
    hub = case.hub()
    named = models.from_hub(hub, "blocks").tensors
    assert "blocks.1.self_attention.linear_qkv.weight" in named
    assert "decoder.final_layernorm.weight" in named, "what no pattern names is kept"
    if name == "mixtral":
        assert facts({"": named["blocks.1.mlp.experts.linear_fc1.weight2"]}) == facts(
            {"": hub.tensors["decoder.layers.1.mlp.experts.linear_fc1.weight2"]}
        )
    assert spellings.detect(named) == "blocks"
    assert facts(models.to_hub(with_weights(case.checkpoint, named), case.model).tensors) == facts(hub.tensors)


def test_as_a_choice_of_names(tmp_path: Path) -> None:
    case = open_case("llama")
    there = tmp_path / "there.safetensors"
    anyckpt.convert(case.checkpoint.path, there, to="safetensors", names="blocks")
    assert "tok.weight" in anyckpt.open(there).tensors
    anyckpt.convert(there, tmp_path / "hf", to="hf", config=case.checkpoint.config)
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(case.checkpoint.tensors)
    assert anyckpt.inspect(there).likely_families
    renamed, _ = spellings.rename(anyckpt.open(there).tensors, "blocks", "nemo-flat")
    assert "model.decoder.layers.0.self_attention.linear_qkv.weight" in renamed


def test_names_that_are_not_of_it() -> None:
    tensors = open_case("llama").hub().tensors
    some = {"tok.weight": tensors["embedding.word_embeddings.weight"]}
    assert spellings.detect(some) is None, "a model has all the evidence"
    assert spellings.detect(tensors) == "hub"
    assert spellings.is_megatron("blocks")
    assert not spellings.is_megatron("hf")
    assert not spellings.is_megatron(None)
    with pytest.raises(UsageError, match=r"unknown dialect 'klingon' .*nemo2, blocks"):
        spellings.from_hub_names(tensors, "klingon")


def test_two_tensors_of_one_name() -> None:
    tensors = open_case("llama").hub().tensors
    taken = {**tensors, "tok.weight": tensors["decoder.final_layernorm.weight"]}
    with pytest.raises(MappingError, match="two tensors would have one name"):
        BLOCKS.from_hub(taken)
