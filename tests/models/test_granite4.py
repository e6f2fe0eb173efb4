"""Granite 4: which layers have mixers, in the words of today's and of older files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.models.cases import facts
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.errors import MappingError


def hub_of(**values: Any) -> Any:
    checkpoint = samples()["granite-4-experts"].open()[0]
    model = models.identify(replace(checkpoint, config={**checkpoint.config, **values}))
    assert model is not None
    return models.to_hub(checkpoint, model)


def test_older_words_and_a_width_that_follows() -> None:
    older = hub_of(layer_types=["mamba", "attention"] * 2, mamba_d_head="auto")
    assert facts(older.tensors) == facts(hub_of().tensors)
    assert models.render_config(older.model, "hf")["layer_types"] == ["mamba", "attention"] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["mamba"] * 4}, "missing"),
        ({"layer_types": ["mamba"] * 3}, "layer_types is not that of the model"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is not that of the model"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is not what is known"),
        ({"num_local_experts": 0}, "no rule of family granitemoehybrid covers"),
    ],
)
def test_another_model_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        hub_of(**values)
