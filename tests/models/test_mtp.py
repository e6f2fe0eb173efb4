"""Layers of multi-token prediction: after the last layer in DeepSeek-V3's files, a stack of their own in the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.models.cases import MEGATRON_DIALECTS, facts, open_case, with_weights
from tests.support import write_plan

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import LazyTensor, from_array


def checkpoint() -> Checkpoint:
    """The fixture, to which a layer like its last is added."""
    case = open_case("deepseek_v3")
    tensors: dict[str, LazyTensor] = dict(case.checkpoint.tensors)
    for name, tensor in case.checkpoint.tensors.items():
        if name.startswith("model.layers.1."):
            values = np.ascontiguousarray(tensor.numpy().reshape(-1)[::-1]).reshape(tensor.shape)
            tensors[name.replace(".1.", ".2.", 1)] = from_array(values)
    dtype = tensors["model.norm.weight"].numpy().dtype
    for name, shape in (("enorm", (48,)), ("hnorm", (48,)), ("eh_proj", (48, 96)), ("shared_head.norm", (48,))):
        random = np.random.default_rng(len(tensors)).random(shape, np.float32)
        tensors[f"model.layers.2.{name}.weight"] = from_array(random.astype(dtype))
    return with_weights(case.checkpoint, tensors, "hf")


@pytest.mark.parametrize("dialect", MEGATRON_DIALECTS)
def test_through_each_dialect_and_back(dialect: str) -> None:
    source = checkpoint()
    model = models.identify(source)
    assert model is not None
    assert model.config.mtp_num_layers == 1
    hub = models.to_hub(source, model)
    assert "mtp.layers.0.transformer_layer.pre_mlp_layernorm.weight" in hub.tensors
    assert "mtp.layers.0.final_layernorm.weight" in hub.tensors
    out = models.from_hub(hub, dialect).tensors
    main = {name.replace(".transformer_layer.", ".mtp_model_layer."): tensor for name, tensor in out.items()}
    for spelled in (out, main):
        again = models.to_hub(with_weights(source, spelled), model)
        assert facts(again.tensors) == facts(hub.tensors)
        assert facts(models.from_hub(again, "hf").tensors) == facts(source.tensors)


def test_copies_of_the_embedding_are_left_out() -> None:
    source = checkpoint()
    copies = {
        "model.layers.2.embed_tokens.weight": source.tensors["model.embed_tokens.weight"],
        "model.layers.2.shared_head.head.weight": source.tensors["lm_head.weight"],
    }
    model = models.identify(source)
    assert model is not None
    hub = models.to_hub(with_weights(source, {**source.tensors, **copies}, "hf"), model)
    assert set(hub.ignored) == set(copies)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(source.tensors)


def test_a_missing_tensor_is_named() -> None:
    source = checkpoint()
    model = models.identify(source)
    assert model is not None
    for missing in [name for name in source.tensors if name.startswith("model.layers.2.")]:
        rest = {name: tensor for name, tensor in source.tensors.items() if name != missing}
        with pytest.raises(MappingError, match="missing") as caught:
            models.to_hub(with_weights(source, rest, "hf"), model)
        assert missing in str(caught.value)


def test_a_configuration_that_promises_too_much() -> None:
    """transformers drops the layers and keeps the key."""
    model = open_case("deepseek_v3").model
    assert model.config.mtp_num_layers is None
    assert any("multi-token prediction" in note for note in model.notes)


@pytest.mark.parametrize("kind", ["nemo2", "megatron-args"])
def test_configuration_there_and_back(kind: str) -> None:
    source = checkpoint()
    model = models.identify(source)
    assert model is not None
    rendered = models.render_config(model, kind)
    back = models.identify(replace(source, config=rendered, config_kind=kind))
    assert back is not None
    assert back.config.mtp_num_layers == 1
    assert models.render_config(back, "hf")["num_nextn_predict_layers"] == 1


def test_ranks_and_back(tmp_path: Path) -> None:
    source = checkpoint()
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(source, WriteOptions()), tmp_path / "source")
    layout = LayoutRequest(tensor_parallel=2, expert_parallel=2)
    convert(path, tmp_path / "ranks", to="megatron-lm", layout=layout)
    convert(tmp_path / "ranks", tmp_path / "hf", to="hf")
    assert facts(open_checkpoint(tmp_path / "hf").weights()) == facts(source.tensors)
