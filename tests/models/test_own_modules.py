"""Checkpoints of NeMo 1's own modules (``mcore_gpt: false``), named as its converters name them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models.cases import facts, open_case, with_weights
from tests.models.proofs import samples
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats import nemo
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.models import Model
from anyckpt.models.dialects.spellings import detect
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import LazyTensor

OWN = (
    (r"^embedding\.", "language_model.embedding."),
    (r"^output_layer\.", "language_model.output_layer."),
    (r"^decoder\.", "language_model.encoder."),
    (r"self_attention\.linear_qkv\.layer_norm_", "input_layernorm."),
    (r"mlp\.linear_fc1\.layer_norm_", "post_attention_layernorm."),
    (r"self_attention\.linear_qkv\.", "self_attention.query_key_value."),
    (r"self_attention\.linear_proj\.", "self_attention.dense."),
    (r"mlp\.linear_fc1\.", "mlp.dense_h_to_4h."),
    (r"mlp\.linear_fc2\.", "mlp.dense_4h_to_h."),
)
"""Both names of each tensor stand side by side in NVIDIA's converters of Llama, Baichuan 2, ChatGLM and others."""


def own_names(tensors: dict[str, LazyTensor], apart: bool) -> dict[str, LazyTensor]:
    """The hub's tensors as NeMo's own modules have them; with the halves of a gated MLP apart for ``swiglu``."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        for core, own in OWN:
            name = re.sub(core, own, name)
        if apart and ".dense_h_to_4h." in name:
            half = tensor.shape[0] // 2
            found[f"model.{name}"] = tensor.narrow(0, 0, half)
            found[f"model.{name.replace('dense_h_to_4h', 'dense_h_to_4h_2')}"] = tensor.narrow(0, half, half)
        else:
            found[f"model.{name}"] = tensor
    return found


def opened(name: str) -> tuple[Checkpoint, Model]:
    if name in samples():
        return samples()[name].open()
    case = open_case(name)
    return case.checkpoint, case.model


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["llama", "baichuan2-alibi", "chatglm", "mpt", "gpt2", "nemotron"])
def test_a_nemo_file_of_own_modules_to_hugging_face(name: str, apart: bool, tmp_path: Path) -> None:
    source, model = opened(name)
    if apart and not model.config.gated_linear_unit:
        return
    hub = models.to_hub(source, model).tensors
    config = {**models.render_config(model, "nemo1"), "mcore_gpt": False, "transformer_engine": False}
    if apart:
        config["activation"] = "swiglu"
    tensors = own_names(hub, apart)
    assert detect(tensors) == "nemo-flat"
    theirs = replace(with_weights(source, tensors, "nemo-flat"), config=config, config_kind="nemo1", artifacts={})
    assert nemo.FORMAT.plan is not None
    write_plan(nemo.FORMAT.plan(theirs, WriteOptions()), tmp_path / "own.nemo")
    anyckpt.convert(tmp_path / "own.nemo", tmp_path / "hf", to="hf")
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(source.tensors)


@pytest.mark.parametrize("name", ["baichuan2-alibi", "mpt"])
def test_what_only_own_modules_have_is_written_for_them(name: str, tmp_path: Path) -> None:
    """Alibi, which Megatron-Core has not."""
    source, model = opened(name)
    assert FORMAT.plan is not None
    write_plan(FORMAT.plan(source, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(tmp_path / "hf", tmp_path / "own.nemo", to="nemo")
    found = anyckpt.open(tmp_path / "own.nemo")
    assert facts(found.tensors) == facts(own_names(models.to_hub(source, model).tensors, apart=False))
    assert (found.config["mcore_gpt"], found.config["position_embedding_type"]) == (False, "alibi")
    for given in ({"sharded": True}, {"layout": LayoutRequest(tensor_parallel=2)}):
        with pytest.raises(MappingError, match="NeMo 1 has alibi only in its own modules"):
            anyckpt.convert(tmp_path / "hf", tmp_path / "core.nemo", to="nemo", **given)  # type: ignore[arg-type]


def test_names_and_configuration_agree_on_megatron_core(tmp_path: Path) -> None:
    source, model = opened("llama")
    config = {**models.render_config(model, "nemo1"), "mcore_gpt": False}
    own = own_names(models.to_hub(source, model).tensors, apart=False)
    theirs = replace(with_weights(source, own, "nemo-flat"), config=config, config_kind="nemo1", artifacts={})
    assert nemo.FORMAT.plan is not None
    write_plan(nemo.FORMAT.plan(theirs, WriteOptions()), tmp_path / "own.nemo")
    anyckpt.convert(tmp_path / "own.nemo", tmp_path / "same.nemo", to="nemo")
    same = anyckpt.open(tmp_path / "same.nemo")
    assert (set(same.tensors), same.config["mcore_gpt"]) == (set(own), False)
    anyckpt.convert(tmp_path / "own.nemo", tmp_path / "core.nemo", to="nemo", layout=LayoutRequest(tensor_parallel=2))
    core = anyckpt.open(tmp_path / "core.nemo")
    assert core.config["mcore_gpt"] is True
    anyckpt.convert(tmp_path / "core.nemo", tmp_path / "hf", to="hf")
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(source.tensors)


def test_half_of_a_gated_mlp() -> None:
    source, model = opened("llama")
    tensors = own_names(models.to_hub(source, model).tensors, apart=True)
    gate = "model.language_model.encoder.layers.1.mlp.dense_h_to_4h.weight"
    config = models.render_config(model, "nemo1")
    bare = replace(source, config=config, config_kind="nemo1", artifacts={})
    for broken in (
        {name: tensor for name, tensor in tensors.items() if name != gate},
        {**tensors, gate: tensors[gate].narrow(0, 0, 3)},
    ):
        with pytest.raises(MappingError, match=r"other half of a gated projection is missing or different"):
            models.to_hub(with_weights(bare, broken, "nemo-flat"), model)
    up = gate.replace("4h.", "4h_2.")
    with pytest.raises(MappingError, match="its shape contradicts the configuration"):
        models.to_hub(with_weights(bare, {k: v for k, v in tensors.items() if k != up}, "nemo-flat"), model)
