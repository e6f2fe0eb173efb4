"""Keys and types that say that a model computes something else than its names tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.models.cases import open_case

import anyckpt
from anyckpt import models
from anyckpt.config.decisive import NEUTRAL
from anyckpt.errors import MappingError

LLAMA = open_case("llama").checkpoint
MEANT: dict[str, Any] = {
    "attention_multiplier": 0.015625,
    "query_pre_attn_scalar": 256,
    "scale_depth": 1.4,
    "sliding_window": 2,
    "layer_types": ["full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0],
    "is_causal": False,
}
"""Of keys for which 2.5 is no value."""


def identified(config: dict[str, Any], family: str | None = None) -> models.Model:
    model = models.identify(replace(LLAMA, config={**LLAMA.config, **config}), family=family)
    assert model is not None
    return model


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_key_that_changes_outputs_is_refused(key: str) -> None:
    with pytest.raises(MappingError, match=f"{key} changes what the model computes, and family llama has no such"):
        identified({key: MEANT.get(key, 2.5)})


def test_a_key_that_changes_nothing_is_none() -> None:
    width = LLAMA.config["head_dim"]
    for key, value in {
        "embedding_multiplier": 1.0,
        "logit_scale": 1,
        "mlp_multipliers": [1.0, 1],
        "attention_multiplier": width**-0.5,
        "query_pre_attn_scalar": width,
        "scale_depth": -1,
        "sliding_window": LLAMA.config["max_position_embeddings"],
        "layer_types": ["full_attention"] * 2,
        "no_rope_layers": [1, True],
        "use_qk_norm": False,
        "final_logit_softcapping": None,
        "clip_qkv": None,
    }.items():
        assert replace(identified({key: value}).config, extra={}) == replace(identified({}).config, extra={}), key
    assert identified({"sliding_window": 2, "use_sliding_window": False}).family == "llama"


@pytest.mark.parametrize("value", [1 << 4000, 1e400, float("nan"), {}, "x", [None], [[1]], True])
@pytest.mark.parametrize("key", NEUTRAL)
def test_any_value_is_neutral_or_refused(key: str, value: Any) -> None:
    try:
        identified({key: value, "head_dim": 8})
    except MappingError as error:
        assert key in str(error)


def test_a_family_of_another_type_is_noted(tmp_path: Path) -> None:
    model = identified({"model_type": "orion", "architectures": ["OrionForCausalLM"]}, family="llama")
    assert model.notes == (
        "config.json's model_type 'orion' is of no family: names and shapes fit llama, but only you know that it "
        "computes the same",
    )
    config = {**LLAMA.config, "model_type": "orion", "architectures": ["OrionForCausalLM"]}
    source = replace(LLAMA, config=config)
    done = anyckpt.convert(source, tmp_path / "out", to="megatron-core", family="llama")
    assert any("only you know that it computes the same" in note for note in done.notes)


def test_a_family_that_computes_something_else_is_refused() -> None:
    with pytest.raises(MappingError, match="'gemma' is of family gemma, whose models compute something else"):
        models.identify(open_case("gemma").checkpoint, family="llama")
    assert "is of family llama: taken as mistral as you say" in identified({}, family="mistral").notes[0]


def test_the_class_tells_the_family_of_an_unknown_type() -> None:
    model = identified({"model_type": "mine"})
    assert (model.family, "taken as llama, whose class it names" in model.notes[0]) == ("llama", True)
    assert models.identify(replace(LLAMA, config={**LLAMA.config, "model_type": "mine", "architectures": 7})) is None
