"""Gemma 4: heads of two widths, layers that share keys and values, and where a configuration says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.tensor import from_array


def opened(name: str, **values: Any) -> Checkpoint:
    checkpoint = samples()[name].open()[0]
    return replace(checkpoint, config={**checkpoint.config, **values})


def test_each_layer_s_heads_are_said_in_either_way() -> None:
    overrides = {"02": {"head_dim": 24, "num_key_value_heads": 1}, "05": {"head_dim": 24, "num_key_value_heads": 1}}
    plain = opened("gemma4-experts")
    listed = opened("gemma4-experts", per_layer_config=overrides, global_head_dim=None)
    hubs = []
    for checkpoint in (plain, listed):
        model = models.identify(checkpoint)
        assert model is not None
        hubs.append(facts(models.to_hub(checkpoint, model).tensors))
        assert {**checkpoint.config, **models.render_config(model, "hf")} == models.render_config(model, "hf") | {
            key: value for key, value in checkpoint.config.items() if value is None
        }
    assert hubs[0] == hubs[1]


def test_what_layers_that_share_have_besides_stays_where_names_do() -> None:
    checkpoint, model = samples()["gemma4-inputs"].open()
    spare = {f"model.layers.5.self_attn.{name}.weight": from_array(np.ones(3, "f4")) for name in ("k_proj", "k_norm")}
    hub = models.to_hub(with_weights(checkpoint, {**checkpoint.tensors, **spare}, "hf"), model)
    assert set(hub.ignored) == set(spare)
    assert set(models.from_hub(hub, "hf", in_place=True).tensors) == {*checkpoint.tensors, *spare}
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)
    with pytest.raises(MappingError, match=r"missing: model\.layers\.2\.self_attn\.k_proj\.weight"):
        rest = {key: t for key, t in checkpoint.tensors.items() if key != "model.layers.2.self_attn.k_proj.weight"}
        models.to_hub(with_weights(checkpoint, rest, "hf"), model)


@pytest.mark.parametrize(
    "values",
    [
        {"global_head_dim": -3},
        {"per_layer_config": {"2": {"num_key_value_heads": 3}}},
        {"per_layer_config": {"2": {"head_dim": "wide"}}},
        {"per_layer_config": [1]},
        {"hidden_size_per_layer_input": 1 << 50},
        {"num_kv_shared_layers": -1},
        {"layer_types": ["linear_attention"] * 6},
    ],
)
def test_what_no_model_is_is_refused(values: dict[str, Any]) -> None:
    checkpoint = opened("gemma4-inputs", **values)
    with pytest.raises(MappingError):
        model = models.identify(checkpoint)
        assert model is not None
        models.to_hub(checkpoint, model)
