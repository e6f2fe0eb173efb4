"""Models of two towers: CLIP and SigLIP, whole, and each of their towers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError

WHOLE = ("clip", "siglip")


def said(config: dict[str, Any], tower: str, **values: Any) -> dict[str, Any]:
    return {**config, tower: {**config[tower], **values}}


@pytest.mark.parametrize("name", WHOLE)
def test_each_tower_has_its_own_sizes(name: str) -> None:
    checkpoint, model = samples()[name].open()
    assert (model.config.num_layers, model.config.hidden_size) == (2, 24)
    seeing = model.config.towers["vision_config"]
    assert (seeing.num_layers, seeing.hidden_size) == (3, 32)
    hub = models.to_hub(checkpoint, model).tensors
    assert hub["encoder.layers.1.self_attention.linear_qkv.weight"].shape == (72, 24)
    assert hub["vision_model.decoder.layers.2.self_attention.linear_qkv.weight"].shape == (96, 32)


@pytest.mark.parametrize("name", WHOLE)
def test_keys_of_both_towers_come_back(name: str) -> None:
    checkpoint = samples()[name].open()[0]
    config = said(said(checkpoint.config, "text_config", own=1), "vision_config", other=2, layer_norm_eps=1e-3)
    model = models.identify(replace(checkpoint, config=config))
    assert model is not None
    longer = replace(model, config=replace(model.config, vocab_size=80, layernorm_epsilon=0.5))
    rendered = models.render_config(longer, "hf")
    assert rendered["model_type"] == name
    assert {"own": 1, "vocab_size": 80, "layer_norm_eps": 0.5}.items() <= rendered["text_config"].items()
    assert {"other": 2, "layer_norm_eps": 1e-3}.items() <= rendered["vision_config"].items()


def test_of_older_files_the_second_spelling_counts() -> None:
    checkpoint = samples()["clip"].open()[0]
    stale = {**checkpoint.config["text_config"], "num_hidden_layers": 7}
    told = {**checkpoint.config, "text_config": stale, "text_config_dict": checkpoint.config["text_config"]}
    model = models.identify(replace(checkpoint, config=told))
    assert model is not None
    assert model.config.num_layers == 2
    assert "text_config_dict" not in models.render_config(model, "hf")
    null = models.identify(replace(checkpoint, config={**checkpoint.config, "text_config_dict": None}))
    assert null is not None
    assert null.config.num_layers == 2


@pytest.mark.parametrize(("name", "prefix"), [("clip-text", "text_model."), ("siglip-vision", "vision_model.")])
def test_transformers_4_has_a_prefix(name: str, prefix: str) -> None:
    checkpoint, model = samples()[name].open()
    older: Checkpoint = with_weights(checkpoint, {prefix + key: t for key, t in checkpoint.tensors.items()}, "hf")
    hub = models.to_hub(older, model)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_what_a_tower_cannot_be_is_refused(tower: str) -> None:
    checkpoint = samples()["siglip"].open()[0]
    with pytest.raises(MappingError, match="hidden_act is unknown"):
        models.identify(replace(checkpoint, config=said(checkpoint.config, tower, hidden_act="mish")))
    with pytest.raises(MappingError, match="num_channels is not that of"):
        models.identify(replace(checkpoint, config=said(checkpoint.config, "vision_config", num_channels=4)))
