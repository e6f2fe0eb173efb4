"""Gemma 3n: widths of each layer's MLP, and layers that share keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.tensor import from_array


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
    "values",
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
def test_what_no_model_is_is_refused(values: dict[str, Any]) -> None:
    checkpoint = samples()["gemma3n"].open()[0]
    with pytest.raises(MappingError):
        model = models.identify(replace(checkpoint, config={**checkpoint.config, **values}))
        assert model is not None
        models.to_hub(checkpoint, model)
