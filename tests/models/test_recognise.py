"""Families told by tensor names alone, and what is said where none is known."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import open_case, with_weights
from tests.models.proofs import samples
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import safetensors
from anyckpt.formats.format import WriteOptions
from anyckpt.models.recognise import resemblance
from anyckpt.tensor import Constant, LazyTensor, from_array

SAMPLES = samples()
LLAMAS = ("gemma", "mistral", "llama")


@pytest.mark.parametrize("name", SAMPLES)
def test_names_tell_the_family(name: str) -> None:
    checkpoint, model = SAMPLES[name].open()
    hub = models.to_hub(checkpoint, model)
    stored = [checkpoint.tensors, *(models.from_hub(hub, d).tensors for d in ("hub", "megatron-core", "nemo-flat"))]
    for tensors in stored:
        found = resemblance(tensors)
        assert found is not None
        assert model.family in found.families or model.definition.like
        assert found.strange == ()
        most = 3 if tensors is checkpoint.tensors else 8  # as many families have the layers of Llama
        assert len(found.families) <= most, "a guess among many says nothing"


def test_families_that_share_their_names_are_all_said() -> None:
    assert resemblance(open_case("llama").checkpoint.tensors).families == LLAMAS  # type: ignore[union-attr]
    assert resemblance(open_case("qwen2").checkpoint.tensors).families == ("qwen2",)  # type: ignore[union-attr]
    found = resemblance(open_case("mixtral").checkpoint.tensors)
    assert found is not None
    assert (found.families, found.text) == (("mixtral",), "mixtral")


def test_names_of_nothing_known() -> None:
    assert resemblance({}) is None
    assert resemblance({"encoder.conv.weight": Constant(BY_NAME["float32"], (2,))}) is None


def test_what_no_rule_covers() -> None:
    tensors = dict(open_case("llama").checkpoint.tensors)
    tensors["model.layers.0.self_attn.gate.weight"] = tensors["model.layers.1.self_attn.gate.weight"] = zeros()
    found = resemblance(tensors)
    assert found is not None
    assert found.families == LLAMAS
    assert found.strange == tuple(f"model.layers.{layer}.self_attn.gate.weight" for layer in range(2))


def zeros() -> LazyTensor:
    return from_array(np.zeros(3, "<f4"))


def loose(tensors: dict[str, LazyTensor], path: Path) -> Path:
    """One safetensors file, which has no configuration."""
    checkpoint = with_weights(open_case("llama").checkpoint, tensors, "hf")
    assert safetensors.FORMAT.plan is not None
    return write_plan(safetensors.FORMAT.plan(checkpoint, WriteOptions()), path)


def test_without_a_configuration(tmp_path: Path) -> None:
    case = open_case("llama")
    source = loose(case.checkpoint.tensors, tmp_path / "model.safetensors")
    found = anyckpt.inspect(source)
    assert (found.family, found.likely_families) == (None, LLAMAS)
    assert found.to_json()["likely_families"] == list(LLAMAS)
    text = r"no configuration; by names it looks like gemma, mistral or llama .*--config: names do not tell the number"
    with pytest.raises(UsageError, match=text):
        anyckpt.convert(source, tmp_path / "out", to="megatron-core")
    with pytest.raises(MappingError, match="names alone do not tell a model's heads; give one with --config"):
        anyckpt.convert(source, tmp_path / "out", to="megatron-core", family="llama")
    assert not (tmp_path / "out").exists()
    anyckpt.convert(source, tmp_path / "out", to="megatron-core", config=case.checkpoint.config)
    assert anyckpt.inspect(tmp_path / "out").likely_families == ()


def folder(tensors: dict[str, LazyTensor], config: dict[str, Any], path: Path) -> Path:
    path.mkdir()
    loose(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_configuration_of_an_unknown_type(tmp_path: Path) -> None:
    case = open_case("llama")
    config = {**case.checkpoint.config, "model_type": "orion", "architectures": ["OrionForCausalLM"]}
    same = folder(case.checkpoint.tensors, config, tmp_path / "same")
    assert anyckpt.inspect(same).likely_families == LLAMAS
    with pytest.raises(UsageError, match=r"model_type 'orion' is of none; by names it looks like .*--family"):
        anyckpt.convert(same, tmp_path / "out", to="nemo2")
    strange = {f"model.layers.{layer}.self_attn.gate.weight": zeros() for layer in range(9)}
    other = folder({**case.checkpoint.tensors, **strange}, config, tmp_path / "other")
    assert anyckpt.inspect(other).likely_families == ()
    with pytest.raises(UsageError) as caught:
        anyckpt.convert(other, tmp_path / "out", to="nemo2")
    assert "nearest to gemma, mistral or llama, of whose rules none covers 9 tensors: model.layers.0." in str(
        caught.value
    )
    assert "layers.7.self_attn.gate.weight and 1 more" in str(caught.value)
    assert "python -m pydoc anyckpt.extend" in str(caught.value)
    nothing = folder({"a.b": zeros()}, config, tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"'orion' is of none \(expected megatron-core names.*pydoc anyckpt"):
        anyckpt.convert(nothing, tmp_path / "out", to="megatron-core")


def test_ninety_thousand_names_take_a_moment() -> None:
    one = Constant(BY_NAME["bfloat16"], (2, 2))
    names = [f"model.layers.{i}.mlp.experts.{j}.{p}_proj.weight" for i in range(60) for j in range(500)
             for p in ("gate", "up", "down")]  # fmt: skip
    started = time.process_time()
    found = resemblance(dict.fromkeys(names, one))
    assert time.process_time() - started < 2
    assert found is not None
    assert not found.strange
