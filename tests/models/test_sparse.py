"""Families with experts, latent attention or mixers: to the hub and back, bit for bit, and complete or refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import Case, facts, open_case, with_weights
from tests.models.sparse_cases import FAMILIES, NOT_IN_THE_HUB, UNSAYABLE, other_spelling, rendered_like

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.models import Model, ModelConfig
from anyckpt.tensor import from_array

KINDS = ("nemo1", "nemo2", "megatron-args")


def identified(case: Case, config: dict[str, Any], kind: str) -> Model | None:
    between = with_weights(case.checkpoint, models.from_hub(case.hub(), "hub").tensors)
    return models.identify(replace(between, config=config, config_kind=kind))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_other_stored_spelling(name: str) -> None:
    """Experts stacked, as transformers 5 has them in memory and may save them."""
    case = open_case(name)
    other = other_spelling(name, case.checkpoint.tensors)
    hub = models.to_hub(with_weights(case.checkpoint, other, "hf"), case.model)
    assert facts(hub.tensors) == facts(case.hub().tensors)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(case.checkpoint.tensors)
    stacks = [key for key, tensor in other.items() if ".experts." in key and tensor.ndim == 3]
    for key in stacks:
        fewer = {**other, key: other[key].narrow(0, 0, other[key].shape[0] - 1)}
        with pytest.raises(MappingError, match="missing"):
            models.to_hub(with_weights(case.checkpoint, fewer, "hf"), case.model)
        flat = {**other, key: other[key].reshape((other[key].size,))}
        with pytest.raises(MappingError, match="is not a stack of the model's experts"):
            models.to_hub(with_weights(case.checkpoint, flat, "hf"), case.model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_layer_is_called_so(name: str) -> None:
    case = open_case(name)
    for tensors, dialect in ((case.checkpoint.tensors, "hf"), (case.megatron, "hub")):
        rest = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
        with pytest.raises(MappingError, match="layer 1 is missing"):
            models.to_hub(with_weights(case.checkpoint, rest, dialect), case.padded())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.z.weight", "model.layers.1.mlp.experts.99.up_proj.weight", "v"]
)
def test_an_unknown_tensor_is_named(name: str, extra: str) -> None:
    case = open_case(name)
    more = {**case.checkpoint.tensors, extra: from_array(np.zeros((3, 3), "<f4"))}
    with pytest.raises(MappingError, match="no rule of family .* covers 1 tensors") as caught:
        models.to_hub(with_weights(case.checkpoint, more, "hf"), case.model)
    assert extra.removeprefix("model.layers.") in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_are_those_that_the_fixture_was_verified_with(name: str) -> None:
    case = open_case(name)
    verified = {**case.meta["transformer_config"], **case.meta.get("gpt_model", {})}
    config = asdict(case.model.config)
    window = verified.pop("window_size", None)
    assert config["window_size"] == (None if window is None else tuple(window))
    verified = {key: value for key, value in verified.items() if key not in NOT_IN_THE_HUB.get(name, ())}
    for key in ("moe_router_load_balancing_type", "moe_token_dispatcher_type", "moe_grouped_gemm", "rope_type"):
        verified.pop(key, None)
    verified["activation"] = {"relu2": "squared_relu"}.get(verified["activation"], verified["activation"])
    if "moe_layer_freq" in verified:
        verified["moe_layer_freq"] = tuple(verified["moe_layer_freq"])
    assert {key: config[key] for key in verified} == verified
    assert config["vocab_size"] == case.meta["vocab_size"]


def compared(config: ModelConfig, kind: str) -> dict[str, Any]:
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"} if kind == "nemo2" else set()
    return {k: v for k, v in asdict(config).items() if k not in {"extra", "padded_vocab_size", "dtype", *tokens}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_there_and_back(name: str, kind: str) -> None:
    case = open_case(name)
    for model in rendered_like(name, case.model):
        if kind in UNSAYABLE.get(name, ()):
            with pytest.raises(MappingError, match=rf"has no models of family {model.family}"):
                models.render_config(model, kind)
            continue
        rendered = json.loads(json.dumps(models.render_config(model, kind)))
        back = identified(case, rendered, kind)
        assert back is not None
        assert back.family == case.model.family
        assert compared(back.config, kind) == compared(model.config, kind)
        if kind != "nemo2":
            del rendered["hf_model_type"]
            unnamed = identified(case, rendered, kind)
            assert unnamed is not None
            assert unnamed.family == case.model.family, "told by its traits"
        final = models.render_config(back, "hf")
        again = models.identify(replace(case.checkpoint, config=final))
        assert again is not None
        assert compared(again.config, kind) == compared(model.config, kind)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_of_no_other_family(name: str) -> None:
    """By its configuration, or, where a family's traits leave that open, by its tensors."""
    case = open_case(name)
    arguments = models.render_config(case.model, "megatron-args")
    named = with_weights(case.checkpoint, models.from_hub(case.hub(), "hub").tensors, "hub")
    checkpoint = replace(named, config=arguments, config_kind="megatron-args")
    for other, definition in models.known_families().items():
        if case.model.family not in (other, definition.like):
            with pytest.raises(
                MappingError,
                match=f"is not that of family {other}|no rule of family {other} covers|of the model are missing",
            ):
                models.to_hub(checkpoint, models.identify(checkpoint, family=other))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_impossible_sizes(name: str) -> None:
    case = open_case(name)
    config = dict(case.checkpoint.config)
    experts = next(key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config)
    for value, problem in ((0, "not possible"), (-1, "not possible"), (10**9, "too many experts"), ("4", "wrong type")):
        with pytest.raises(MappingError, match=problem):
            models.identify(replace(case.checkpoint, config={**config, experts: value}))
