"""Gemma 3n: widths of each layer's MLP, and layers that share keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples, values
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import read
from anyckpt.tensor import from_array

TOWERS = {
    "vision_tower.timm_model.conv_stem.conv.weight": (4, 3, 3, 3),
    "audio_tower.subsample_conv_projection.conv_0.conv.weight": (4, 1, 3, 3),
    "audio_tower.subsample_conv_projection.input_proj_linear.weight": (8, 16),
    "embed_vision.embedding.weight": (8, 12),
    "embed_vision.hard_embedding_norm.weight": (12,),
    "embed_vision.embedding_projection.weight": (32, 12),
    "embed_audio.embedding_projection.weight": (32, 8),
}
"""Of the other parts, some as transformers' ``Gemma3nModel`` calls them."""


def test_the_whole_stays_in_containers_and_its_text_comes_out(tmp_path: Path) -> None:
    text = samples()["gemma3n"].open()[0]
    named = {f"model.language_model.{name.removeprefix('model.')}": t for name, t in text.tensors.items()}
    named |= {f"model.{name}": values(name, shape) for name, shape in TOWERS.items()}
    parts = {
        "text_config": {k: v for k, v in text.config.items() if k != "architectures"},
        "vision_config": {"model_type": "gemma3n_vision", "hidden_size": 12},
        "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 8},
    }
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], **parts}
    whole = replace(with_weights(text, named, "hf"), config=config, artifacts={}, details={})
    model = models.identify(whole)
    assert model is not None
    hub = models.to_hub(whole, model)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(text.tensors)
    assert set(hub.ignored) == {f"model.{name}" for name in TOWERS}
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(whole, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(source, tmp_path / "dcp", to="dcp")
    anyckpt.convert(tmp_path / "dcp", tmp_path / "back", to="hf", config=source / "config.json")
    back = read(str(tmp_path / "back"))
    assert facts(back.tensors) == facts(named)
    assert back.config == config
    with pytest.raises(MappingError, match=r"Megatron-Core has no models of family gemma3n.*convert to hf"):
        anyckpt.convert(source, tmp_path / "megatron", to="megatron-core")


def test_each_layer_s_width_is_its_own() -> None:
    checkpoint, model = samples()["gemma3n-widths"].open()
    hub = models.to_hub(checkpoint, model).tensors
    widths = [hub[f"decoder.layers.{layer}.mlp.linear_fc2.weight"].shape[1] for layer in range(6)]
    assert widths == [48, 40, 56, 48, 48, 32]
    assert models.render_config(model, "hf")["intermediate_size"] == widths


def test_what_layers_that_share_have_besides_stays_where_names_do() -> None:
    """As published, where transformers does not read it."""
    checkpoint, model = samples()["gemma3n"].open()
    spare = {f"model.layers.4.self_attn.{name}.weight": from_array(np.ones(3, "f4")) for name in ("k_proj", "v_proj")}
    hub = models.to_hub(with_weights(checkpoint, {**checkpoint.tensors, **spare}, "hf"), model)
    assert set(models.from_hub(hub, "hf", in_place=True).tensors) == {*checkpoint.tensors, *spare}
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)


def test_the_theta_of_older_files() -> None:
    checkpoint = samples()["gemma3n"].open()[0]
    model = models.identify(
        replace(checkpoint, config={**checkpoint.config, "rope_theta": 5e5, "rope_local_base_freq": 2e4})
    )
    assert model is not None
    rope = models.render_config(model, "hf")["rope_parameters"]
    assert (rope["full_attention"]["rope_theta"], rope["sliding_attention"]["rope_theta"]) == (5e5, 2e4)


@pytest.mark.parametrize(
    "changed",
    [
        {"intermediate_size": [48] * 5},
        {"intermediate_size": []},
        {"intermediate_size": ["wide"] * 6},
        {"intermediate_size": [48, 48, -1, 48, 48, 48]},
        {"altup_num_inputs": -2},
        {"altup_num_inputs": 1 << 30},
        {"laurel_rank": "low"},
        {"use_bidirectional_attention": True},
    ],
)
def test_what_no_model_is_is_refused(changed: dict[str, Any]) -> None:
    checkpoint = samples()["gemma3n"].open()[0]
    with pytest.raises(MappingError):
        model = models.identify(replace(checkpoint, config={**checkpoint.config, **changed}))
        assert model is not None
        models.to_hub(checkpoint, model)
